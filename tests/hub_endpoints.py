"""The endpoints of the Hub on loopback: who may do what, and what it answers."""

import base64
import hashlib
import json
import re
from email.message import Message
from urllib.parse import parse_qs, unquote

from hub_repositories import File, Refusal, Reply, Repo, card_errors


TOKENS = {"hf_test": ("tester", "write"), "hf_read": ("tester", "read"), "hf_stranger": ("stranger", "write")}
LFS_SUFFIXES = (".safetensors", ".bin", ".onnx", ".parquet", ".png", ".jpg", ".gif", ".zip", ".tfrec", ".tar")
LFS_BYTES = 10 << 20  # larger files go to LFS whatever their name
DATE = "2026-01-01T00:00:00.000Z"
REPO = r"/api/(?P<type>models|datasets|spaces)/(?P<repo_id>[^/]+/[^/]+)"
PAGE = r"/(?P<type>datasets/|spaces/)?(?P<repo_id>[^/]+/[^/]+?)"
LFS = r"/_lfs/(?P<type>models|datasets|spaces)/(?P<repo_id>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})"
REVISION = r"(?P<revision>[^/]+)"
ENDPOINTS = [  # methods, path, method of `Call`
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("POST", "/api/repos/create", "create_repo"),
    ("DELETE", "/api/repos/delete", "delete_repo"),
    ("PUT", f"{REPO}/settings", "change_settings"),
    ("GET HEAD", f"{REPO}(?:/revision/{REVISION})?", "repo_info"),
    ("GET", f"{REPO}/refs", "list_branches"),
    ("GET", f"{REPO}/commits/{REVISION}", "list_commits"),
    ("GET", f"{REPO}/tree/{REVISION}(?:/(?P<folder>.*))?", "tree"),
    ("POST", f"{REPO}/paths-info/{REVISION}", "paths_info"),
    ("GET HEAD", f"{PAGE}/(?:resolve|raw)/{REVISION}/(?P<path>.+)", "resolve"),
    ("POST", f"{REPO}/branch/{REVISION}", "create_branch"),
    ("POST", f"{REPO}/preupload/{REVISION}", "preupload"),
    ("POST", rf"{PAGE}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", LFS, "lfs_upload"),
    ("POST", f"{LFS}/verify", "lfs_verify"),
    ("POST", f"{REPO}/commit/{REVISION}", "commit"),
]


def endpoint_for(method: str, path: str) -> tuple[str | None, dict[str, str | None]]:
    """Return the name of the method of `Call` that answers, and its arguments; None and {} if there is none."""
    for methods, pattern, name in ENDPOINTS:
        if method in methods.split() and (match := re.fullmatch(pattern, path)):
            named = {key: value and unquote(value) for key, value in match.groupdict().items()}
            if "repo_id" in named:
                named["type"] = (named["type"] or "models").rstrip("/").removesuffix("s")
            return name, named
    return None, {}


def goes_to_lfs(path: str, size: int) -> bool:
    return path.lower().endswith(LFS_SUFFIXES) or size > LFS_BYTES


def wants_privacy(asked: dict) -> bool:
    return bool(asked.get("private")) or asked.get("visibility") == "private"  # huggingface_hub 0.36, and 2


class Call:
    """One request, made by the user whose token it carries. The endpoints return a `Reply` or raise a `Refusal`.

    Args:
        url: of the server.
        repos: by type and id.
        objects: what was uploaded to LFS, by SHA-256.
        headers: of the request.
        query: the arguments in its address.
        body: its content.
    """

    def __init__(
        self,
        url: str,
        repos: dict[tuple[str, str], Repo],
        objects: dict[str, bytes],
        headers: Message,
        query: dict[str, str],
        body: bytes,
    ):
        self.url, self.repos, self.objects = url, repos, objects
        self.headers, self.query, self.body = headers, query, body
        self.user, self.role = self.who_asks()

    # ------------------------------------------------------------------------------------------------ who may do what

    def who_asks(self) -> tuple[str | None, str | None]:
        if not (authorization := self.headers.get("Authorization")):
            return None, None
        if (token := authorization.removeprefix("Bearer ")) not in TOKENS:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return TOKENS[token]

    def readable(self, type: str, repo_id: str) -> Repo:
        repo = self.repos.get((type, repo_id))
        if repo is None or (repo.private and repo_id.split("/")[0] != self.user):
            if self.user is None:
                raise Refusal(401, "Invalid username or password.", "RepoNotFound")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, type: str, repo_id: str) -> Repo:
        repo = self.readable(type, repo_id)
        self.check_rights(type, repo_id, "write to")
        return repo

    def check_rights(self, type: str, repo_id: str, what: str) -> None:
        namespace = repo_id.split("/")[0]
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        if self.user != namespace or self.role != "write":
            raise Refusal(403, f'You don\'t have the rights to {what} a {type} under the namespace "{namespace}"')

    # ---------------------------------------------------------------------------------------------------- the account

    def whoami(self) -> Reply:
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        token = {"displayName": "a token", "role": self.role, "createdAt": DATE}
        account = {"type": "user", "id": "1", "name": self.user, "fullname": self.user, "orgs": []}
        return Reply(content={**account, "auth": {"type": "access_token", "accessToken": token}})

    def validate_yaml(self) -> Reply:
        errors = [{"message": message} for message in card_errors(json.loads(self.body)["content"])]
        return Reply(400 if errors else 200, {"errors": errors, "warnings": []})

    def named_in_body(self) -> tuple[dict, str, str]:
        asked = json.loads(self.body)
        return asked, asked.get("type") or "model", f"{asked.get('organization') or self.user}/{asked['name']}"

    def create_repo(self) -> Reply:
        asked, type, repo_id = self.named_in_body()
        self.check_rights(type, repo_id, "create")
        if type == "space" and asked.get("sdk") not in ("gradio", "docker", "static"):
            raise Refusal(400, '"sdk" must be one of gradio, docker, static')
        repo = Repo(type, repo_id, wants_privacy(asked), asked.get("sdk"))
        created = {"url": f"{self.url}/{repo.path}", "name": repo_id, "id": repo_id}
        if (type, repo_id) in self.repos:
            return Reply(409, {"error": f"You already created this {type} repo", **created})
        self.repos[type, repo_id] = repo
        return Reply(content=created)

    def delete_repo(self) -> Reply:
        _, type, repo_id = self.named_in_body()
        self.writable(type, repo_id)
        del self.repos[type, repo_id]
        return Reply(content={})

    def change_settings(self, type, repo_id) -> Reply:
        repo, asked = self.writable(type, repo_id), json.loads(self.body)
        if "private" in asked or "visibility" in asked:
            repo.private = wants_privacy(asked)
        return Reply(content={})

    # ------------------------------------------------------------------------------------------------------- reading

    def repo_info(self, type, repo_id, revision=None) -> Reply:
        repo = self.readable(type, repo_id)
        commit = repo.at(revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        if "blobs" in self.query:
            for sibling in siblings:
                file = commit.files[sibling["rfilename"]].describe(sibling["rfilename"])
                pointer = file.get("lfs") and {"lfs": {**file["lfs"], "sha256": file["lfs"]["oid"]}}
                sibling |= {"size": file["size"], "blobId": file["oid"], **(pointer or {})}
        told = {"_id": "1", "id": repo_id, "author": repo_id.split("/")[0], "sha": commit.oid, "private": repo.private}
        told |= {"gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": [], "createdAt": DATE}
        return Reply(content={**told, "lastModified": DATE, "sdk": repo.sdk, "siblings": siblings})

    def list_branches(self, type, repo_id) -> Reply:
        branches = self.readable(type, repo_id).branches.items()
        told = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in branches]
        return Reply(content={"branches": told, "converts": [], "tags": []})

    def list_commits(self, type, repo_id, revision) -> Reply:
        repo = self.readable(type, repo_id)
        told = {"message": "", "authors": [{"user": "tester"}], "date": DATE}
        return Reply(content=[{"id": one.oid, "title": one.title, **told} for one in reversed(repo.commits)])

    def tree(self, type, repo_id, revision, folder=None) -> Reply:
        commit = self.readable(type, repo_id).at(revision)
        above = f"{folder.strip('/')}/" if folder and folder.strip("/") else ""
        deep, found = self.query.get("recursive", "").lower() in ("true", "1"), {}
        for path in sorted(path for path in commit.files if path.startswith(above)):
            parts = path.removeprefix(above).split("/")
            for depth in range(1, len(parts) if deep else min(2, len(parts))):
                below = above + "/".join(parts[:depth])
                found[below] = {"type": "directory", "path": below, "oid": "0" * 40, "size": 0}
            if deep or len(parts) == 1:
                found[path] = commit.files[path].describe(path)
        if above and not found:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        last = {"lastCommit": {"id": commit.oid, "title": commit.title, "date": DATE}}
        expanded = self.query.get("expand", "").lower() in ("true", "1")
        return Reply(content=[entry | last if expanded else entry for entry in found.values()])

    def paths_info(self, type, repo_id, revision) -> Reply:
        files = self.readable(type, repo_id).at(revision).files
        is_json = "json" in self.headers.get("Content-Type", "")
        paths = (json.loads(self.body) if is_json else parse_qs(self.body.decode()))["paths"]
        found = []
        for path in [paths] if isinstance(paths, str) else paths:
            if path in files:
                found.append(files[path].describe(path))
            elif any(file.startswith(f"{path.strip('/')}/") for file in files):
                found.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        return Reply(content=found)

    def resolve(self, type, repo_id, revision, path) -> Reply:
        commit = self.readable(type, repo_id).at(revision)
        if (file := commit.files.get(path)) is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit.oid})
        content, size, headers = file.content, len(file.content), {"X-Repo-Commit": commit.oid}
        headers |= {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if file.lfs:
            headers |= {"X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": str(size)}
        if not (match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")):
            return Reply(200, content, headers)
        first, last = (int(match[1]), int(match[2] or size - 1)) if match[1] else (max(0, size - int(match[2])), size)
        if first >= size:
            return Reply(416, b"", {"Content-Range": f"bytes */{size}"})
        last = min(last, size - 1)
        return Reply(206, content[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{size}"})

    # ------------------------------------------------------------------------------------------------------- writing

    def create_branch(self, type, repo_id, revision) -> Reply:
        repo = self.writable(type, repo_id)
        if revision in repo.branches:
            raise Refusal(409, f"Reference already exists: {revision}")
        repo.branches[revision] = repo.at(json.loads(self.body or b"{}").get("startingPoint")).oid
        return Reply(content={})

    def preupload(self, type, repo_id, revision) -> Reply:
        files, told = self.writable(type, repo_id).at(revision).files, []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            mode = "lfs" if goes_to_lfs(path, file["size"]) else "regular"
            known = {"oid": files[path].etag} if path in files else {}
            told.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        return Reply(content={"files": told})

    def lfs_batch(self, type, repo_id) -> Reply:
        self.writable(type, repo_id)
        told = []
        for asked in json.loads(self.body)["objects"]:
            href = f"{self.url}/_lfs/{type}s/{repo_id}/{asked['oid']}"
            actions = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            known = asked["oid"] in self.objects  # then there is nothing to do
            told.append({"oid": asked["oid"], "size": asked["size"], **({} if known else {"actions": actions})})
        headers = {"Content-Type": "application/vnd.git-lfs+json"}
        return Reply(200, {"transfer": "basic", "objects": told, "hash_algo": "sha256"}, headers)

    def lfs_upload(self, type, repo_id, oid) -> Reply:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(422, "the content has another SHA-256")
        self.objects[oid] = self.body
        return Reply()

    def lfs_verify(self, type, repo_id, oid) -> Reply:
        return Reply(200 if oid in self.objects else 404, {})

    def commit(self, type, repo_id, revision) -> Reply:
        """All operations, or none."""
        repo = self.writable(type, repo_id)
        before = repo.at(revision)
        if revision not in repo.branches or "create_pr" in self.query:
            raise Refusal(400, "commits go to a branch; pull requests are beyond this Hub")
        files, title = dict(before.files), ""
        for line in self.body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, before.oid):
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"], validate=True), lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.objects:
                    raise Refusal(400, f"LFS pointer to an object that was not uploaded: {value['oid']}")
                files[value["path"]] = File(self.objects[value["oid"]], lfs=True)
            elif key in ("deletedFile", "deletedFolder"):
                folder = value["path"].rstrip("/") + "/"
                whole = key == "deletedFolder"
                gone = [path for path in files if (path.startswith(folder) if whole else path == value["path"])]
                if not gone:
                    raise Refusal(404, f"{value['path']} does not exist", "EntryNotFound")
                files = {path: file for path, file in files.items() if path not in gone}
            else:
                raise Refusal(400, f"unknown operation {key}")
        if "README.md" in files and (errors := card_errors(files["README.md"].content.decode())):
            raise Refusal(400, f"Invalid metadata in README.md: {errors}")
        oid = repo.commit(revision, files, title)
        url = f"{self.url}/{repo.path}/commit/{oid}"
        return Reply(content={"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})
