"""What goes wrong on the way to the Hub: told in a line, nothing is lost, and the second attempt completes it."""

import signal
import time

import pytest
from hub_client import Client, contents
from published_toys import files_to_publish
from toy_runs import train


# The check that a folder loads has its own tests, and takes a process.
UNCHECKED = """
import hfgen.publishing.publish
hfgen.publishing.publish.check_loads_anywhere = lambda folder: None
"""
UPLOAD = """
import sys
from pathlib import Path
from hfgen.hub.upload import check_access, upload
print(upload(Path(sys.argv[1]), check_access(sys.argv[2], False), "Again").revision)
"""
LARGE = "hfgen-weights.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    train("gan", folder / "gan", "--cache_dir", str(folder / "cache"), "--sample_every", "2")
    return folder / "gan"


@pytest.fixture(scope="module")
def client(programs, hub, tmp_path_factory):
    with Client(programs, hub, tmp_path_factory.mktemp("homes") / "with") as client:
        client.ask(UNCHECKED)
        yield client


@pytest.fixture
def repo(request, hub):
    """The name of a repo of this test."""
    yield f"tester/{request.function.__name__[5:50]}-{len(hub.repos)}-{len(hub.requests)}"
    hub.mend()


def refusal(said):
    """The one line of a command that was refused."""
    assert (said.status, said.out, said.error) == (2, "", None), said
    (line,) = [line for line in said.err.split("\n") if line and not line.startswith("\rLoading")]
    assert line.startswith("error: ")
    return line


def check_nothing_is_left(client, run, before):
    assert contents(run) == before
    assert client.leftovers() == set()


# ------------------------------------------------------------------------------------------------ told before anything


@pytest.mark.parametrize(
    ("token", "name", "words"),
    [
        (None, "tester/new", "you are not logged in to the Hub; log in with `hf auth login`, or set HF_TOKEN"),
        ("hf_nobody", "tester/new", "the Hub does not know your token; log in with `hf auth login`, or set HF_TOKEN"),
        ("hf_read", "tester/new", "your Hub token is read-only; log in with `hf auth login`, or set HF_TOKEN"),
        ("hf_test", "stranger/new", "you are tester, who can write only to tester"),
        ("hf_test", "tester/a/b", "not a valid name of a Hub repo"),
        ("hf_test", "tester/my model", "not a valid name of a Hub repo"),
    ],
)
def test_who_may_not_write_is_told_before_anything_is_made(token, name, words, client, hub, run):
    before, requests = contents(run), len(hub.requests)
    line = refusal(client.command("publish", run, name, token=token))
    assert line.startswith(f"error: {name}: ") and words in line
    assert {request.method for request in hub.requests[requests:]} <= {"GET"}
    check_nothing_is_left(client, run, before)


def test_a_path_that_leads_nowhere_is_told_without_asking_the_hub(client, hub, run, tmp_path):
    requests = len(hub.requests)
    for source, words in ((tmp_path / "nowhere", "no such folder"), (tmp_path, "contains no pipeline")):
        assert words in refusal(client.command("publish", source, "tester/new", token=None))
    scores = refusal(client.command("publish", run, "tester/new", "--scores", tmp_path, "--output", tmp_path / "to"))
    assert f"--scores {tmp_path}: contains no evaluation.json from hfgen evaluate" in scores
    assert "its value is empty" in refusal(client.command("publish", run, "", "--output", tmp_path / "to"))
    for flag in ("--space", "--private"):
        line = refusal(client.command("publish", run, "tester/new", flag, "--output", tmp_path / "to"))
        assert f"{flag}: nothing is uploaded with --output; leave it out" in line
    line = refusal(client.command("publish", run, "new", "--output", tmp_path / "to"))
    assert "new: give the whole name, such as your-name/new" in line
    for name in ("my model", "a/b/c", "../x"):
        line = refusal(client.command("publish", run, name, "--output", tmp_path / "to"))
        assert f"{name}: not a valid name of a Hub repo" in line
    assert len(hub.requests) == requests and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("method", "path"), [("GET", "/whoami"), ("GET", "/api/models/tester/")])
def test_a_hub_that_does_not_answer_is_told_before_anything_is_made(method, path, client, hub, run, repo):
    before = contents(run)
    hub.cut(method, path, times=None, unread=True)
    line = refusal(client.command("publish", run, repo))
    assert f"{repo}: nothing was uploaded: run it again when the Hub is reachable" in line
    check_nothing_is_left(client, run, before)
    assert ("model", repo) not in hub.repos


# --------------------------------------------------------------------------------------------------- while it goes up


def test_a_commit_whose_answer_was_lost_is_found_complete_by_the_next_attempt(client, hub, run, repo):
    hub.cut("POST", "/commit/")  # carried out
    refusal(client.command("publish", run, repo))
    files, commits = hub.files(repo), len(hub.commits(repo))
    assert files_to_publish("gan") <= files.keys()
    assert client.command("publish", run, repo).status == 0
    assert hub.files(repo) == files and len(hub.commits(repo)) == commits


@pytest.mark.parametrize(
    ("method", "path", "status", "remedy"),
    [
        ("POST", "/preupload/", 403, "your token has no write access to it: is that name yours?"),
        ("POST", "/objects/batch", 403, "your token has no write access to it"),
        ("PUT", "/_lfs/", 403, "run it again when the Hub is reachable"),  # of a storage, whose tokens are its own
        ("POST", "/validate-yaml", 400, "the Hub does not accept the content"),
        ("POST", "/commit/", 500, "run it again when the Hub is reachable"),
        ("POST", "/commit/", 401, "the Hub does not know your token"),
        ("POST", "/commit/", "cut", "run it again when the Hub is reachable"),
    ],
)
def test_a_failure_leaves_the_repo_as_it_was_and_the_next_attempt_completes_it(
    method, path, status, remedy, client, hub, run, repo, tmp_path
):
    source, before = run, contents(run)
    hub.objects.clear()  # of the other tests
    hub.put(repo, {"notes.txt": b"mine", "pipeline_old.py": b"old"})
    files, commits = hub.files(repo), len(hub.commits(repo))
    if status == "cut":
        hub.cut(method, path, unread=True)
    else:
        hub.fail(method, path, status=status)
    line = refusal(client.command("publish", source, repo))
    assert f"{repo}: the upload failed, and without its single commit the repo is unchanged: {remedy}" in line
    assert hub.files(repo) == files and len(hub.commits(repo)) == commits
    check_nothing_is_left(client, source, before)
    hub.mend()
    assert client.command("publish", source, repo).status == 0
    assert hub.files(repo).keys() == files_to_publish("gan") | {"notes.txt", ".gitattributes"}
    sent = [request.path for request in hub.requests if request.method == "PUT" and repo in request.path]
    assert len(hub.objects) >= 5
    # What had gone up did not go again; the one that the Hub refused did.
    assert len(sent) == len(set(sent)) + (method == "PUT")
    check_nothing_is_left(client, source, before)


def test_a_repo_that_cannot_be_made_is_told_of(client, hub, run, repo):
    before = contents(run)
    hub.fail("POST", "/repos/create", status=403)
    line = refusal(client.command("publish", run, repo))
    assert "your token has no write access to it: is that name yours?" in line and ("model", repo) not in hub.repos
    check_nothing_is_left(client, run, before)


def test_a_client_killed_in_the_upload_changes_nothing_and_the_next_completes_it(hub, programs, repo, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for index in range(3):
        (folder / f"{index}{LARGE}").write_bytes(bytes([index]) * 5000)
    (folder / "README.md").write_text("# Mine\n")
    before = contents(folder)
    hub.fail("PUT", "/_lfs/", status=503, times=None, after=1)  # of which the client waits for an end
    (tmp_path / "upload.py").write_text(UPLOAD)
    command, environment = (tmp_path / "upload.py", folder, repo), hub.environment(tmp_path / "home")
    client, deadline = programs.start(*command, environment=environment), time.monotonic() + 300
    while sum(one.method == "PUT" and repo in one.path for one in list(hub.requests)) < 2:
        assert time.monotonic() < deadline and client.poll() is None
        time.sleep(0.01)
    client.send_signal(signal.SIGKILL)
    assert client.wait() == -signal.SIGKILL
    assert len(hub.commits(repo)) == 1 and contents(folder) == before
    hub.mend()
    done = {request.path for request in hub.requests if request.path.split("/")[-1] in hub.objects}
    requests = len(hub.requests)
    result = programs.run(*command, environment=environment)
    assert result.returncode == 0, result.stderr
    assert hub.commits(repo)[-1].oid == result.stdout.strip() and len(hub.commits(repo)) == 2
    assert {path: hub.files(repo)[path] for path in before} == before
    assert done and not done & {request.path for request in hub.requests[requests:] if request.method == "PUT"}


def test_a_space_that_fails_is_completed_by_the_same_command(client, hub, run, repo):
    pytest.importorskip("gradio")
    hub.fail("POST", "/api/spaces/.*/commit/", status=500)
    line = refusal(client.command("publish", run, repo, "--space"))
    assert f"the model was published at {hub.url}/{repo}" in line and ", but its demo was not: " in line
    assert "without its single commit the repo is unchanged" in line and len(hub.commits(repo)) == 2
    assert client.command("publish", run, repo, "--space").status == 0
    assert len(hub.commits(repo)) == 2 and "app.py" in hub.files(repo, "space")
