"""`hfgen study ...`: train a grid of settings under one budget, on one or many machines, and report."""

import importlib.util
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import hfgen
from hfgen.commands.options import absolute_if_path, in_range, loading, require_new_folder
from hfgen.errors import UserError
from hfgen.files import require_place_for, require_replaceable, writing
from hfgen.ranges import MAX_COUNT, Range
from hfgen.texts import say, say_lines


if TYPE_CHECKING:  # slow to import, like the imports inside the functions
    from hfgen.studies.cells import Study
    from hfgen.studies.launch import Workspace
    from hfgen.studies.storage import StudyStore
    from hfgen.studies.study_file import StudyFile


study_app = typer.Typer(no_args_is_help=True)

File = Annotated[str, typer.Argument(metavar="FILE", help="study file, or the name of a shipped one")]
Dataset = Annotated[
    str | None, typer.Option("--dataset", help="dataset, as for the training scripts; unset: the study file's")
]
Output = Annotated[Path | None, typer.Option("--output", help="folder for runs and report; unset: runs/studies/NAME")]
Storage = Annotated[
    str | None,
    typer.Option("--storage", help="database URL, such as postgresql://user@host/name; unset: study.db in --output"),
]
BudgetOption = Annotated[
    str | None,
    typer.Option("--budget", help="total time on this machine, such as 2h or 45m; the study is scaled down to fit"),
]
Weights = Annotated[
    str | None, typer.Option("--feature_weights", help="Inception's TorchScript file; unset: found if installed")
]
Grace = Annotated[
    int,
    typer.Option(
        "--grace_seconds",
        callback=in_range(Range(2, MAX_COUNT)),
        help="seconds without a heartbeat after which a worker's cell is given to others",
    ),
]
NameInDatabase = Annotated[str | None, typer.Option("--study", help="name of the study, if the database has several")]
Where = Annotated[str, typer.Argument(metavar="WHERE", help="study folder, or URL of its database")]


@study_app.callback()
def require_optuna() -> None:
    """Train a grid of settings and write a table of scores."""
    if importlib.util.find_spec("optuna") is None:
        raise UserError('hfgen study needs Optuna: pip install "hfgen[study]"')


@study_app.command()
def run(
    file: File,
    dataset: Dataset = None,
    output: Output = None,
    storage: Storage = None,
    budget: BudgetOption = None,
    feature_weights: Weights = None,
    grace_seconds: Grace = 120,
) -> None:
    """Train and score all unfinished cells of a study, and write the report."""
    study_file, study, workspace = read(file, dataset, output, feature_weights)
    with loading():
        from hfgen.studies.report import MARKER
        from hfgen.studies.storage import StudyStore, sqlite_url
        from hfgen.studies.worker import work

    require_place_for(workspace.output, "--output")
    require_replaceable(workspace.output / "report", MARKER)
    with writing(workspace.output):
        workspace.output.mkdir(parents=True, exist_ok=True)
    store = StudyStore(storage or sqlite_url(workspace.output), grace_seconds)
    if budget is not None:
        study = reduced(store.stored(study.name), study_file, study, workspace, budget)
    study = store.open_or_create(study)
    try:
        work(store, study, workspace)
    except BaseException:
        with suppress(UserError):  # the first error is the one to print
            report_so_far(store, study, workspace.output / "report")
        raise
    report_so_far(store, study, workspace.output / "report")


def report_so_far(store: "StudyStore", study: "Study", folder: Path) -> None:
    """Write the report of a study with the results that there are.

    Raises:
        UserError: if the database cannot be read or the folder cannot be written.
    """
    from hfgen.studies.database import reading_from
    from hfgen.studies.report import write_report

    with reading_from(store.url):
        outcomes = store.outcomes(study)
    write_report(study, outcomes, folder)
    what = "report so far" if None in outcomes.values() else "report"
    say(f"{what}: {folder / 'index.html'}, report.md, cells.csv, table.tex")


@study_app.command()
def plan(file: File, dataset: Dataset = None, budget: BudgetOption = None, feature_weights: Weights = None) -> None:
    """Estimate a study's cost from short training runs: cells, images/s, hours, disk space. Nothing is kept."""
    from hfgen.training.duration import parse_duration

    seconds = parse_duration("--budget", budget)
    study_file, study, workspace = read(file, dataset, None, feature_weights)
    with loading():
        from hfgen.studies.plan import describe_plan, make_plan, scale_down

    made = make_plan(study, workspace)
    say_lines(describe_plan(study, made))
    if budget is not None and seconds is not None:
        scaled = scale_down(study_file, study, made, budget, seconds, workspace)
        result = "it fits" if scaled is study else f"scaled down to it:\n{describe_plan(scaled, made)}"
        say_lines(f"\n--budget {budget}: {result}")


@study_app.command("work")
def join(
    url: Annotated[str, typer.Argument(metavar="URL", help="URL of the study's database")],
    study: NameInDatabase = None,
    dataset: Dataset = None,
    output: Output = None,
    feature_weights: Weights = None,
    grace_seconds: Grace = 120,
) -> None:
    """Join a study running elsewhere: train and score its cells until none are left."""
    from hfgen.studies.database import require_database
    from hfgen.studies.launch import Workspace
    from hfgen.studies.scripts import find_scripts, require_same_scripts, script_digests
    from hfgen.studies.storage import StudyStore

    with loading():
        from hfgen.studies.worker import work

    require_database(url)
    store = StudyStore(url, grace_seconds)
    stored = store.open(study)
    if stored.version != hfgen.__version__:
        raise UserError(
            f"the study was made with hfgen {stored.version}, not {hfgen.__version__}: install the same version"
        )
    scripts = find_scripts()
    require_same_scripts(stored.scripts, script_digests(scripts, stored.methods))
    say_own_scripts(stored, scripts)
    output = output or Path("runs/studies") / stored.name
    images = absolute_if_path(dataset) if dataset else stored.dataset
    work(store, stored, Workspace(output, scripts, images, feature_weights))


def say_own_scripts(study: "Study", scripts: Path) -> None:
    """Say which training scripts of a study are the user's own, if any are; a checkout has unchanged copies."""
    from hfgen.studies.scripts import own_scripts, script_digests

    digests = script_digests(scripts, study.methods)
    if own := [str(file) for method, file in own_scripts(scripts, study.methods).items() if digests[method]]:
        say(f"training with your own {', '.join(own)}")


@study_app.command()
def status(where: Where, study: NameInDatabase = None) -> None:
    """Show a study's progress: cells done, running and to do, their workers, and the estimated time left."""
    import datetime

    from hfgen.studies.database import reading_from
    from hfgen.studies.progress import describe_progress

    store, stored = find(where, study)
    with reading_from(store.url):
        trials, silent = store.trials(), store.silent()
    say_lines(describe_progress(stored, trials, datetime.datetime.now(), silent))


@study_app.command()
def report(
    where: Where,
    output: Annotated[Path, typer.Option("--output", help="new folder for the report")],
    study: NameInDatabase = None,
) -> None:
    """Write a study's report with the results so far; works while it runs."""
    require_new_folder(output)
    from hfgen.studies.database import reading_from
    from hfgen.studies.report import write_report

    store, stored = find(where, study)
    with reading_from(store.url):
        outcomes = store.outcomes(stored)
    write_report(stored, outcomes, output)
    say(f"{output / 'index.html'}, report.md, cells.csv, table.tex")


def find(where: str, study: str | None) -> "tuple[StudyStore, Study]":
    """Open a started study by its folder or database URL.

    Raises:
        UserError: if there is none.
    """
    from hfgen.studies.database import require_database
    from hfgen.studies.storage import StudyStore, sqlite_url

    if "://" not in where and not (Path(where) / "study.db").is_file():
        raise UserError(f"{where}: not a study: it contains no study.db, and is not the URL of a database")
    if "://" in where:
        require_database(where)
    store = StudyStore(where if "://" in where else sqlite_url(Path(where)))
    return store, store.open(study)


def read(
    file: str, dataset: str | None, output: Path | None, feature_weights: str | None
) -> "tuple[StudyFile, Study, Workspace]":
    """Read a study file and expand its cells, for this machine.

    Raises:
        UserError: if the file is missing or invalid, or no dataset is given.
    """
    from hfgen.studies.study_file import find_study_file, read_study_file

    study_file = read_study_file(find_study_file(file))
    named = dataset or study_file.data.get("dataset")
    if not named:
        raise UserError(f"{file} names no dataset: give --dataset")
    with loading():  # after what can be told without
        from hfgen.studies.cells import expand
        from hfgen.studies.launch import Workspace
        from hfgen.studies.scripts import find_scripts

        folder = output or Path("runs/studies") / study_file.name
        workspace = Workspace(folder, find_scripts(), absolute_if_path(str(named)), feature_weights)
        study = expand(study_file, workspace.scripts, workspace.dataset)  # imports the training scripts
    say_own_scripts(study, workspace.scripts)
    return study_file, study, workspace


def reduced(
    stored: "Study | None", study_file: "StudyFile", study: "Study", workspace: "Workspace", budget: str
) -> "Study":
    """Scale a study down to a time budget, or reuse the version scaled down to it before.

    Raises:
        UserError: if the budget is not a duration, or not even one seed fits into it.
    """
    from dataclasses import replace

    from hfgen.studies.cells import differences, expand
    from hfgen.studies.plan import describe_plan, make_plan, scale_down, with_original_values, with_smaller_budget
    from hfgen.training.duration import parse_duration

    seconds = parse_duration("--budget", budget)
    if stored is not None and stored.asked == budget:
        before = replace(study_file, evaluation=stored.evaluation, seeds=stored.seeds)
        if stored.budget != study_file.budget:
            before = with_smaller_budget(before, study, stored.budget)
        return with_original_values(expand(before, workspace.scripts, study.dataset), study_file, budget)
    if stored is not None and not differences(stored, study):
        say(f"note: --budget {budget} is ignored: this study was begun without it, and continues at full size")
        return study
    plan = make_plan(study, workspace)
    scaled = scale_down(study_file, study, plan, budget, seconds or 0.0, workspace)
    say_lines(describe_plan(scaled, plan))
    return scaled
