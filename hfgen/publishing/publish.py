"""Publishing: from a run or a pipeline to a Hub repo that loads anywhere, and to a Space with its demo.

Stages: folder.py (pipeline, code, pictures, records, card), load_check.py, hub/upload.py.
"""

import shlex
import tempfile
from pathlib import Path
from typing import NamedTuple

from hfgen.demo.space import BY_HFGEN, gradio_version, write_space
from hfgen.errors import UserError
from hfgen.files import LARGER_DISK, writing
from hfgen.hub.card import is_somebodys_own
from hfgen.hub.upload import Commit, check_access, check_repo_id, read_card, upload
from hfgen.inference.opening import find_pipeline, runs_beside
from hfgen.publishing.folder import make_publication
from hfgen.publishing.load_check import check_loads_anywhere
from hfgen.texts import say
from hfgen.training.run import Run


class Published(NamedTuple):
    """The result of publishing.

    Attributes:
        repo_id: "owner/name".
        commit: commit of the model repo.
        replaced_card: whether the card replaced a hand-written README.md, which stays in the repo's history.
        space_commit: commit of the Space, if there is one.
        replaced_space: whether the Space's files replaced those of a Space that hfgen had not written.
    """

    repo_id: str
    commit: Commit
    replaced_card: bool
    space_commit: Commit | None = None
    replaced_space: bool = False


def publish(
    source: str | Path,
    repo_id: str,
    private: bool = False,
    scores: Path | None = None,
    license_id: str | None = None,
    space: bool = False,
    token: str | None = None,
    half: bool = False,
    discriminator: bool = False,
) -> Published:
    """Publish a pipeline on the Hub, after checking that it loads without hfgen.

    Args:
        source: a run, its `best/`, one of its checkpoints, or a pipeline folder. Nothing in it is changed.
        repo_id: "owner/name", or "name" for your own repo. It is created if necessary; the files of an earlier
            publication are replaced, in one commit.
        private: make the repo (and the Space) private; fails if it exists and is public.
        scores: a folder from `hfgen evaluate`, for the card.
        license_id: Hub licence id for the weights, such as "apache-2.0".
        space: also publish the demo as a Space of the same name.
        token: Hub token; if None, that of the current login.
        half: store the weights as 16-bit floats, half the size; they are loaded as 32-bit floats.
        discriminator: also publish the discriminator, so that `--init_from` can continue the training.

    Raises:
        UserError: if there is nothing to publish, it does not load by itself, or the Hub refuses; then the repo is
            unchanged, unless the message says that only the Space failed. The same call can be repeated later.
    """
    find_pipeline(_existing(source))  # report a misspelt path before asking for a token
    if space:
        gradio_version()
    target = check_access(repo_id, private, token)
    of_space = check_access(target.repo_id, private, token, "space") if space else None
    with tempfile.TemporaryDirectory(prefix="hfgen-publication-") as temporary:
        folder = Path(temporary) / target.repo_id.split("/")[1]
        with writing(Path(temporary), LARGER_DISK):
            prepare(source, folder, target.repo_id, scores, license_id, half, discriminator)
        replaces = is_somebodys_own(read_card(target))
        commit = upload(folder, target, "Publish the pipeline with its card")
        if of_space is None:
            return Published(target.repo_id, commit, replaces)
        app = Path(temporary) / "its space"  # not a valid repo name
        # Pin the revision, so that the Space keeps running the code it was published with.
        write_space(app, target.repo_id, commit.revision, target.repo_id.split("/")[1], license_id)
        try:
            of_others = read_card(of_space)
            of_demo = upload(app, of_space, "Publish the demo")
        except UserError as error:
            raise UserError(f"the model was published at {commit.address}, but its demo was not: {error}") from error
        is_replaced = of_others is not None and BY_HFGEN not in of_others
        return Published(target.repo_id, commit, replaces, of_demo, is_replaced)


def say_published(published: Published) -> None:
    """Print where a pipeline was published, and what was replaced there."""
    say(f"published {published.repo_id}: {published.commit.address}")
    if published.replaced_card:
        say("the repo had a hand-written README.md; the card has replaced it, and the old one is in the history")
    if published.space_commit is not None:
        say(f"its Space: {published.space_commit.address}")
    if published.replaced_space:
        say("the Space was not written by hfgen: files of these names were replaced; the old ones are in its history")


def publish_if_asked(run: Run) -> None:
    """Publish a run if `--push_to_hub` was given; only the main process does it.

    Raises:
        UserError: as `publish` does; the message says how to publish later.
    """
    settings = run.settings
    if not (settings.push_to_hub and run.is_main):
        return
    try:
        published = publish(run.output_dir, settings.hub_repo_id, settings.hub_private_repo)
    except UserError as error:
        private = " --private" if settings.hub_private_repo else ""
        again = f"hfgen publish {shlex.quote(str(run.output_dir))} {settings.hub_repo_id}{private}"
        raise UserError(
            f"{error}\nThe run and its pipeline are saved in {run.output_dir}. To publish it later: {again}"
        ) from error
    say_published(published)


def prepare(
    source: str | Path,
    folder: Path,
    repo_id: str,
    scores: Path | None = None,
    license_id: str | None = None,
    half: bool = False,
    discriminator: bool = False,
) -> None:
    """Write the folder that `publish` uploads, and check that it loads without hfgen.

    Args:
        source: as in `publish`.
        folder: empty or non-existent folder.
        repo_id: "owner/name", for the card.
        scores: as in `publish`.
        license_id: as in `publish`.
        half: as in `publish`.
        discriminator: as in `publish`.

    Raises:
        UserError: as `publish` does, except for Hub errors.
    """
    check_repo_id(repo_id)
    if "/" not in repo_id:  # whose it is, only the Hub knows
        raise UserError(f"{repo_id}: give the whole name, such as your-name/{repo_id}")
    make_publication(_existing(source), folder, repo_id, scores, license_id, half, discriminator)
    check_loads_anywhere(folder)


def _existing(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if not path.is_dir():
        raise UserError(f"{source}: no such folder{runs_beside(Path(source))}")
    return path
