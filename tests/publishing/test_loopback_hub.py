"""That the Hub on loopback is what the tests of uploads and downloads take it for; huggingface_hub is its client."""

import json
import subprocess
import sys
import textwrap

import pytest
from loopback_hub import LoopbackHub


CLIENT = """
import io, json, sys
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, metadata_load

api, said = HfApi(), []

def say(function, *arguments, **options):
    try:
        said.append(function(*arguments, **options) and "done")
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")

def add(path, content):
    return CommitOperationAdd(path, io.BytesIO(content))
"""
CARD = """---
license: mit
model-index:
- name: m
  results:
  - task: {type: unconditional-image-generation}
    dataset: {type: cats, name: cats}
    metrics: [{type: fid, value: 1.5}]
---
# A card
"""


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def client(hub, tmp_path):
    """Run code in a process that talks to the Hub; return what each `say(...)` of it came to."""

    def run(code: str, token: str | None = "hf_test") -> list[str]:
        command = [sys.executable, "-c", CLIENT + textwrap.dedent(code) + "\nprint('SAID', json.dumps(said))"]
        environment = hub.environment(tmp_path / "home", token)
        result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert result.returncode == 0, result.stderr[-2000:]
        return json.loads(result.stdout.rpartition("SAID ")[2])

    return run


def asked(hub, method, part):
    return [request for request in hub.requests if request.method == method and part in request.path]


def test_a_private_repository_is_there_for_its_owner_alone(hub, client):
    hub.put("tester/hidden", {"w.bin": b"1", "a/b.txt": b"2"}, private=True)
    hub.put("tester/shown", {"w.bin": b"1"})
    looks = """
        say(api.repo_info, "tester/hidden")
        say(hf_hub_download, "tester/hidden", "w.bin")
        say(api.list_repo_files, "tester/hidden")
        say(lambda: list(api.list_repo_tree("tester/hidden", "a")))
        say(api.get_paths_info, "tester/hidden", "a")
        say(api.list_repo_commits, "tester/hidden")
        say(api.list_repo_refs, "tester/hidden")
        """
    look_for_both = looks + looks.replace("hidden", "nowhere")  # nothing tells the two apart
    refusals = {"hf_stranger": "RepositoryNotFoundError: 404", None: "RepositoryNotFoundError: 401", "hf_x": "401"}
    for token, refusal in refusals.items():
        *answers, shown = client(look_for_both + "\n        say(api.repo_info, 'tester/shown')", token)
        assert len(answers) == 14 and all(refusal in answer for answer in answers), answers
        assert (shown == "done") == (token != "hf_x")
    assert client(looks, "hf_read") == ["done"] * 7
    change = "api.update_repo_settings('tester/hidden', private=False)"
    assert client(looks + f"\n        {change}") == ["done"] * 7
    assert not hub.is_private("tester/hidden")
    assert client(looks, "hf_stranger") == ["done"] * 7


def test_only_a_token_that_may_write_writes_and_only_in_its_own_namespace(hub, client):
    hub.put("tester/there", {"a.txt": b"1"})
    hub.put("stranger/theirs", {"a.txt": b"1"})
    code = """
        say(api.create_repo, "tester/new")
        say(api.upload_file, repo_id="tester/there", path_in_repo="b.txt", path_or_fileobj=b"2")
        say(api.create_commit, "tester/there", [CommitOperationDelete("a.txt")], commit_message="delete")
        say(api.update_repo_settings, "tester/there", private=True)
        say(api.delete_repo, "tester/there")
        say(api.create_branch, "tester/there", branch="dev")
        say(api.upload_file, repo_id="stranger/theirs", path_in_repo="b.bin", path_or_fileobj=b"2")
        say(api.create_repo, "stranger/new")
        """
    for token, refusal in (("hf_read", "403 Forbidden: You don't have the rights"), (None, "401")):
        answers = client(code, token)
        assert len(answers) == 8 and all(refusal in answer for answer in answers), answers
    answers = client("\n".join(textwrap.dedent(code).strip().splitlines()[-2:]))
    assert all("403 Forbidden: You don't have the rights" in answer for answer in answers), answers
    assert hub.repos.keys() == {("model", "tester/there"), ("model", "stranger/theirs")}
    assert len(hub.commits("tester/there")) == len(hub.commits("stranger/theirs")) == 2
    assert not hub.is_private("tester/there") and hub.objects == {}
    assert client("say(api.whoami)\nsay(api.whoami)", "hf_read") == ["done"] * 2


def test_a_commit_is_made_whole_or_not_at_all(hub, client):
    hub.put("tester/m", {"a.txt": b"1", "a.txt.b": b"2", "c/d.txt": b"3", "cd.txt": b"4"})
    hub.fail("POST", "/commit/main", status=500, after=1)
    refused, failed, done = client("""
        first = [add("new.txt", b"5"), add("w.safetensors", b"6"), CommitOperationDelete("nowhere.txt")]
        say(api.create_commit, "tester/m", first, commit_message="one")
        rest = [CommitOperationDelete("a.txt"), CommitOperationDelete("c/")]
        say(api.create_commit, "tester/m", [add("new.txt", b"5"), *rest], commit_message="two")
        say(api.create_commit, "tester/m", [add("new.txt", b"5"), *rest], commit_message="three")
        """)
    assert "EntryNotFoundError" in refused and "500" in failed and done == "done"
    assert [commit.title for commit in hub.commits("tester/m")[2:]] == ["three"]
    files = hub.files("tester/m")
    assert files == {".gitattributes": files[".gitattributes"], "a.txt.b": b"2", "cd.txt": b"4", "new.txt": b"5"}
    assert hub.files("tester/m", revision=hub.commits("tester/m")[1].oid)["a.txt"] == b"1"


def test_a_retry_uploads_no_large_file_again_and_an_equal_folder_makes_no_commit(hub, client):
    hub.fail("POST", "/commit/main", status=500)
    code = """
        api.create_repo("tester/m", private=True, exist_ok=True)
        for _ in range(3):
            files = [add("w.safetensors", b"weights"), add("note.txt", b"words")]
            say(api.create_commit, "tester/m", files, commit_message="both")
        """
    answers = client(code)
    assert "500" in answers[0] and answers[1:] == ["done", "done"]
    assert len(asked(hub, "PUT", "/_lfs/")) == 1
    assert [commit.title for commit in hub.commits("tester/m")] == ["initial commit", "both"]
    assert hub.files("tester/m")["w.safetensors"] == b"weights"
    assert {request.private for request in asked(hub, "POST", "tester/m")} == {True}


def test_a_failure_lasts_as_long_as_it_is_told_to(hub, client):
    hub.put("tester/m", {"w.bin": bytes(range(256)) * 4000, "a.txt": b"1"})
    hub.cut("GET", "/resolve/.*w.bin")  # the client goes on with the rest of the file
    hub.cut("POST", "/commit/")  # carried out, but the client cannot know
    hub.cut("GET", "/refs", unread=True)
    hub.fail("GET", "/api/models/tester/m/commits", status=404, times=None)
    hub.fail("POST", "/branch/", status=403, times=2, after=1)
    code = """
        path = hf_hub_download("tester/m", "w.bin")
        said.append(open(path, "rb").read() == bytes(range(256)) * 4000)
        say(api.upload_file, repo_id="tester/m", path_in_repo="b.txt", path_or_fileobj=b"2", commit_message="b")
        say(api.list_repo_refs, "tester/m")
        for _ in range(3):
            say(api.list_repo_commits, "tester/m")
        for name in ("one", "two", "three", "four"):
            say(lambda: api.create_branch("tester/m", branch=name) or True)
        """
    whole, commit, refs, *rest = client(code)
    commits, branches = rest[:3], rest[3:]
    assert whole is True
    assert "RemoteProtocolError" in commit or "ConnectionError" in commit or "ChunkedEncodingError" in commit
    assert hub.files("tester/m")["b.txt"] == b"2"
    assert "RemoteProtocolError" in refs or "ConnectionError" in refs
    assert all("404" in answer for answer in commits)
    assert [answer == "done" for answer in branches] == [True, False, False, True]
    hub.mend()
    assert client("say(api.list_repo_commits, 'tester/m')\nsay(api.list_repo_refs, 'tester/m')") == ["done"] * 2


def test_a_card_that_is_not_valid_is_refused(hub, client):
    mistakes = [
        ("license: mit", "license: [mit", "YAML"),
        ("license: mit", "license: 3", "license"),
        ("- name: m\n  results", "- results", "name"),
        ("task: {type: unc", "task: {tipe: unc", "type"),
        ("name: cats}", "name: ''}", "name"),
        (", value: 1.5", "", "value"),
        ("model-index:\n- name: m\n  results", "model-index:\n  results", "array"),
    ]
    assert all(old in CARD for old, _, _ in mistakes)
    hub.put("tester/m", {})
    cards = [CARD.replace(old, new) for old, new, _ in mistakes]
    *refused, taken = client(f"""
        for card in {[*cards, CARD]}:
            content = card.encode()
            say(api.upload_file, repo_id="tester/m", path_in_repo="README.md", path_or_fileobj=content)
        """)
    for answer, (_, _, complaint) in zip(refused, mistakes, strict=True):
        assert answer.startswith("ValueError: Invalid metadata in README.md") and complaint in answer
    assert taken == "done"
    assert hub.files("tester/m")["README.md"] == CARD.encode() and len(hub.commits("tester/m")) == 3


def test_a_space_needs_its_sdk_and_ranges_of_files_are_served(hub, client):
    hub.put("tester/data", {"x.parquet": bytes(range(100))}, type="dataset")
    answers = client("""
        from huggingface_hub import HfFileSystem
        from huggingface_hub.utils import get_session
        say(api.create_repo, "tester/s", repo_type="space", space_sdk="gradio", private=True)
        said.append(api.space_info("tester/s").sdk)
        create = {"name": "t", "type": "space"}
        headers = {"Authorization": "Bearer hf_test"}
        said.append(get_session().post(f"{api.endpoint}/api/repos/create", json=create, headers=headers).status_code)
        said.append(HfFileSystem().cat_file("datasets/tester/data/x.parquet", start=10, end=13).hex())
        url = f"{api.endpoint}/datasets/tester/data/resolve/main/x.parquet"
        for part in ("bytes=98-", "bytes=-3", "bytes=0-0", "bytes=50-500", "bytes=100-"):
            response = get_session().get(url, headers={"Range": part})
            said.append([response.status_code, response.content[:3].hex(), response.headers["Content-Range"]])
        """)
    assert answers == [
        "done",
        "gradio",
        400,
        "0a0b0c",
        [206, "6263", "bytes 98-99/100"],
        [206, "616263", "bytes 97-99/100"],
        [206, "00", "bytes 0-0/100"],
        [206, "323334", "bytes 50-99/100"],
        [416, "", "bytes */100"],
    ]
    assert hub.is_private("tester/s", "space")
