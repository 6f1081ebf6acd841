"""What the Hub on loopback holds and refuses: repositories with their commits, and cards that are not valid."""

import hashlib
import re
from typing import Any, NamedTuple

import yaml


class File(NamedTuple):
    """A file of a commit."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        version = "version https://git-lfs.github.com/spec/v1"
        return f"{version}\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()

    @property
    def oid(self) -> str:
        """What git calls it."""
        blob = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def describe(self, path: str) -> dict[str, Any]:
        told = {"type": "file", "path": path, "oid": self.oid, "size": len(self.content)}
        pointer = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        return told | {"lfs": pointer} if self.lfs else told


class Commit(NamedTuple):
    oid: str
    title: str
    files: dict[str, File]


class Repo:
    """A repository of type "model", "dataset" or "space"."""

    def __init__(self, type: str, repo_id: str, private: bool, sdk: str | None = None):
        self.type, self.id, self.private, self.sdk = type, repo_id, private, sdk
        self.commits: list[Commit] = []  # oldest first
        self.branches: dict[str, str] = {}
        self.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", lfs=False)}, "initial commit")

    @property
    def path(self) -> str:
        return self.id if self.type == "model" else f"{self.type}s/{self.id}"

    def commit(self, branch: str, files: dict[str, File], title: str) -> str:
        listing = [self.path, self.branches.get(branch), len(self.commits), title, sorted(files)]
        self.commits.append(Commit(hashlib.sha1(repr(listing).encode()).hexdigest(), title, files))
        self.branches[branch] = self.commits[-1].oid
        return self.commits[-1].oid

    def at(self, revision: str | None) -> Commit:
        oid = self.branches.get(revision or "main", revision)
        for commit in self.commits:
            if commit.oid == oid:
                return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")


class Reply(NamedTuple):
    status: int = 200
    content: bytes | dict[str, Any] | list[Any] = b""
    headers: dict[str, str] = {}


class Refusal(Exception):
    """Ends a request; the client chooses its exception by status and `code`."""

    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None):
        named = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self.reply = Reply(status, {"error": message}, named)


def card_errors(card: str) -> list[str]:
    """Return what the Hub would refuse in the YAML at the head of a README.md."""
    match = re.match(r"---\r?\n(.*?)^---\s*$", card, re.DOTALL | re.MULTILINE)
    if not match:
        return []  # the Hub only warns
    try:
        metadata = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"YAML: {error}"]
    if not isinstance(metadata, dict):
        return ["the metadata must be a mapping"]
    errors = [] if isinstance(metadata.get("license", ""), str) else ['"license" must be a string']
    models = metadata.get("model-index", [])
    if not isinstance(models, list):
        return [*errors, '"model-index" must be an array']
    for place, model in enumerate(models):
        required = [(model, "name"), (model, "results")]
        for result in _dictionary(model).get("results") or []:
            task, dataset = (_dictionary(result).get(name) for name in ("task", "dataset"))
            required += [(task, "type"), (dataset, "type"), (dataset, "name"), (result, "metrics")]
            required += [(one, key) for one in _dictionary(result).get("metrics") or [] for key in ("type", "value")]
        missing = [key for part, key in required if _dictionary(part).get(key) in (None, "", [])]
        errors += [f'"model-index[{place}]": "{key}" is required' for key in missing]
    return errors


def _dictionary(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
