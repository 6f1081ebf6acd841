"""`hfgen study ...`: a grid of trainings under one budget, on one machine or many, and its report."""

from pathlib import Path
from typing import Annotated

import typer

from hfgen.cli_options import require_new_folder
from hfgen.errors import UserError


study_app = typer.Typer(no_args_is_help=True, help="Train a grid of settings and write the table.")

File = Annotated[str, typer.Argument(metavar="FILE", help="a study file, or the name of a shipped one")]
Dataset = Annotated[
    str | None, typer.Option("--dataset", help="what the training scripts take; as in the file if not given")
]
Output = Annotated[
    Path | None, typer.Option("--output", help="folder of the runs and the report; runs/studies/NAME if not given")
]
Storage = Annotated[
    str | None, typer.Option("--storage", help="URL of a database; study.db in the folder if not given")
]
BudgetOption = Annotated[
    str | None, typer.Option("--budget", help="hours of this machine for all of it, such as 2h or 45m: scales it down")
]
Weights = Annotated[
    str | None, typer.Option("--feature_weights", help="TorchScript file of Inception, found by itself if installed")
]
Grace = Annotated[
    int, typer.Option("--grace_seconds", min=2, help="a worker silent for so long has lost its cell to the others")
]
NameInDatabase = Annotated[
    str | None, typer.Option("--study", help="its name, if the database holds more than one study")
]


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
    """Train and score all cells of a study that are not finished, and write the report."""
    from hfgen.evaluate_command import where_it_is
    from hfgen.studies.cells import expand
    from hfgen.studies.launch import Workplace
    from hfgen.studies.report import write_report
    from hfgen.studies.storage import StudyStore, sqlite_url
    from hfgen.studies.study_file import find_scripts, find_study_file, read_study_file
    from hfgen.studies.worker import work

    study_file = read_study_file(find_study_file(file))
    output = output or Path("runs/studies") / study_file.name
    output.mkdir(parents=True, exist_ok=True)
    source = where_it_is(dataset or study_file.data.get("dataset", ""))
    study = expand(study_file, find_scripts(), source)
    store = StudyStore(storage or sqlite_url(output), grace_seconds)
    study = store.open_or_create(study)
    try:
        work(store, study, Workplace(output, find_scripts(), dataset or study.dataset, feature_weights))
    finally:  # as far as it has come
        write_report(study, store.outcomes(study), output / "report")
        typer.echo(f"the report so far: {output / 'report' / 'index.html'}, report.md, cells.csv, table.tex")


@study_app.command("work")
def work_command(
    url: Annotated[str, typer.Argument(metavar="URL", help="of the database that holds the study")],
    study: NameInDatabase = None,
    dataset: Dataset = None,
    output: Output = None,
    feature_weights: Weights = None,
    grace_seconds: Grace = 120,
) -> None:
    """Join a study that runs elsewhere: train and score its cells until none is left."""
    import hfgen
    from hfgen.studies.launch import Workplace
    from hfgen.studies.storage import StudyStore
    from hfgen.studies.study_file import find_scripts
    from hfgen.studies.worker import work

    store = StudyStore(url, grace_seconds)
    stored = store.open(study)
    if stored.version != hfgen.__version__:
        raise UserError(f"the study was made with hfgen {stored.version}, and this is {hfgen.__version__}")
    output = output or Path("runs/studies") / stored.name
    work(store, stored, Workplace(output, find_scripts(), dataset or stored.dataset, feature_weights))


@study_app.command()
def report(
    where: Annotated[str, typer.Argument(metavar="WHERE", help="folder of a study, or URL of its database")],
    output: Annotated[Path, typer.Option("--output", help="new folder for the report")],
    study: NameInDatabase = None,
) -> None:
    """Write the report of a study as far as it has come, also while it runs."""
    require_new_folder(output)
    from hfgen.studies.report import write_report
    from hfgen.studies.storage import StudyStore, sqlite_url

    if "://" not in where and not (Path(where) / "study.db").is_file():
        raise UserError(f"{where}: no study there: there is no study.db in it, and it is not the URL of a database")
    store = StudyStore(where if "://" in where else sqlite_url(Path(where)))
    stored = store.open(study)
    write_report(stored, store.outcomes(stored), output)
    typer.echo(f"{output / 'index.html'}, report.md, cells.csv, table.tex")
