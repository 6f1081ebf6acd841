"""Uploading a folder to the Hub: in one commit, private from the start, with errors that say what to do."""

from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from hfgen.errors import UserError
from hfgen.run_files import (
    DISCRIMINATOR_FILE,
    EVALUATIONS_FILE,
    METRICS_FILE,
    SCORES_FILE,
    SETTINGS_FILE,
    TRAINING_FILE,
)
from hfgen.texts import one_line


LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token with write access"
# Files of an earlier upload that are deleted from the repo if the new upload does not contain them. All other files
# belong to the repo's owner.
PARTS = ("density", "generator", "scheduler", "unet", "vae")
PICTURES = ("curves.png", "denoising.png", "interpolation.png", "progress.gif", "sheet.png")
RECORDS = ("evaluation.json", EVALUATIONS_FILE, METRICS_FILE, SCORES_FILE, TRAINING_FILE)
OWN_FILES = ["pipeline_*.py", *(f"{part}/*" for part in PARTS), *(f"samples/{picture}" for picture in PICTURES)]
OWN_FILES += [*RECORDS, SETTINGS_FILE, DISCRIMINATOR_FILE]


@dataclass(frozen=True)
class Target:
    """A writable Hub repo.

    Attributes:
        repo_id: "owner/name".
        repo_type: "model" or "space".
        private: make a new repo private, and require it of an existing one.
        token: Hub token; if None, that of the current login.
        has_card: whether it contains a README.md.
    """

    repo_id: str
    repo_type: str
    private: bool
    token: str | None
    has_card: bool

    def __str__(self) -> str:
        return f"the Space {self.repo_id}" if self.repo_type == "space" else self.repo_id


def check_repo_id(repo_id: str) -> None:
    """Raise a `UserError` if a name, with or without its owner, cannot be that of a Hub repo."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{repo_id}: not a valid name of a Hub repo: {one_line(error)}") from error


def check_access(repo_id: str, private: bool, token: str | None = None, repo_type: str = "model") -> Target:
    """Check in advance whether an upload can succeed. Nothing is created.

    Args:
        repo_id: "owner/name", or "name" for the user's own repo.
        private: fail if the repo exists and is public.
        token: Hub token; if None, that of the current login.
        repo_type: "model" or "space".

    Raises:
        UserError: if there is no token with write access, the name is invalid, a private repo is requested but the
            repo is public, or the Hub cannot be reached.
    """
    api = HfApi(token=token)
    check_repo_id(repo_id)
    try:
        user = api.whoami()
    except LocalTokenNotFoundError as error:
        raise UserError(f"{repo_id}: you are not logged in to the Hub; {LOG_IN}") from error
    except Exception as error:  # HTTP or network; the classes differ between huggingface_hub 0.36 and 1.0
        raise _explained(repo_id, error, "nothing was uploaded") from error
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise UserError(f"{repo_id}: your Hub token is read-only; {LOG_IN}")
    repo_id = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
    owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
    if role == "write" and repo_id.split("/")[0] not in owners:  # rights of fine-grained tokens are unknown
        raise UserError(f"{repo_id}: you are {user['name']}, who can write only to {', '.join(owners)}")
    new = Target(repo_id, repo_type, private, token, has_card=False)
    try:
        info = api.repo_info(repo_id, repo_type=repo_type)
    except RepositoryNotFoundError:
        return new
    except Exception as error:
        raise _explained(str(new), error, "nothing was uploaded") from error
    _check_private(new, info.private)
    has_card = any(file.rfilename == "README.md" for file in getattr(info, "siblings", None) or [])
    return replace(new, has_card=has_card)


@dataclass(frozen=True)
class Commit:
    """The commit of an upload: its URL, and its revision for `from_pretrained(..., revision=)`."""

    address: str
    revision: str


def read_card(target: Target) -> str | None:
    """Return the text of a repo's README.md, or None if there is none.

    Raises:
        UserError: if the Hub refuses or the connection fails.
    """
    if not target.has_card:
        return None
    try:
        file = hf_hub_download(target.repo_id, "README.md", repo_type=target.repo_type, token=target.token)
    except Exception as error:
        raise _explained(str(target), error, "nothing was uploaded") from error
    return Path(file).read_text(encoding="utf-8", errors="replace")


def upload(folder: Path, target: Target, message: str, create_pr: bool = False) -> Commit:
    """Create the repo if necessary, and update it to the state of a folder in one commit.

    If interrupted, the repo stays as it was, and large files already uploaded need not be uploaded again.

    Args:
        folder: the new content of the repo; not changed.
        target: from `check_access`.
        message: commit message.
        create_pr: open a pull request instead of committing.

    Raises:
        UserError: if the Hub refuses or the connection fails.
    """
    api = HfApi(token=target.token)
    sdk = "gradio" if target.repo_type == "space" else None
    try:
        api.create_repo(
            target.repo_id,
            repo_type=target.repo_type,
            private=target.private or None,  # None: public, or the organisation's default
            exist_ok=True,
            space_sdk=sdk,
        )
        # Another process may have created it in the meantime.
        _check_private(target, api.repo_info(target.repo_id, repo_type=target.repo_type).private)
        commit = api.upload_folder(
            repo_id=target.repo_id,
            repo_type=target.repo_type,
            folder_path=folder,
            commit_message=message,
            create_pr=create_pr or None,
            delete_patterns=OWN_FILES if target.repo_type == "model" else None,  # a Space has other files
        )
    except UserError:
        raise
    except Exception as error:  # HTTP, network or disk; perhaps only the Hub's answer was lost
        raise _explained(
            str(target), error, "the upload failed, and without its single commit the repo is unchanged"
        ) from error
    return Commit(str(commit.pr_url or commit.commit_url), commit.oid)


def _check_private(target: Target, private: bool | None) -> None:
    if target.private and not private:
        raise UserError(
            f"{target} exists and is public, but a private repo was requested: make it private in its settings on "
            "the Hub, or choose another name; nothing was uploaded"
        )


def _explained(where: str, error: Exception, outcome: str) -> UserError:
    """Explain a Hub or network error: what it means, the outcome of the upload, and what to do."""
    # Not only HfHubHTTPError: for a wrong token huggingface_hub 0.36 raises a plain HTTPError.
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        remedy = f"the Hub does not know your token; {LOG_IN}"
    elif status == 403:
        remedy = f"your token has no write access to it: is that name yours? {LOG_IN}"
    elif status == 400 or isinstance(error, ValueError):  # ValueError: invalid card, such as an unknown licence
        remedy = "the Hub does not accept the content"
    else:
        remedy = "run it again when the Hub is reachable; files already uploaded are not sent again"
    return UserError(f"{where}: {outcome}: {remedy} ({one_line(error)})")
