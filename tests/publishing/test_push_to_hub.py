"""`--push_to_hub` of the training scripts, by the real scripts against a Hub on loopback."""

import io
import json
import os
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hub_client import Client, contents, digest_of
from loopback_hub import LoopbackHub
from published_toys import CODE
from stand_in_features import paintings
from toy_runs import METHODS, TINY, script

from hfgen.errors import UserError
from hfgen.inference.opening import open_pipeline
from hfgen.training.settings import RunSettings


pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SCRIPTS = Path(__file__).resolve().parents[2] / "training_scripts"
MAIN = """
import runpy, sys
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")
"""
# The check before an upload takes a process that imports torch: one training below has it, and tests of its own.
UNCHECKED = """
import runpy, sys
import hfgen.publishing.publish
hfgen.publishing.publish.check_loads_anywhere = lambda folder: None
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def hub():
    """A Hub with a dataset of 20 paintings."""
    encoded = []
    for image in paintings(range(20), 24):
        buffer = io.BytesIO()
        image.save(buffer, "png")
        encoded.append({"bytes": buffer.getvalue(), "path": "patient.png"})
    info = {"info": {"features": {"image": {"_type": "Image"}}}}
    table = pa.table({"image": encoded}).replace_schema_metadata({"huggingface": json.dumps(info)})
    shard = io.BytesIO()
    parquet.write_table(table, shard)
    with LoopbackHub() as hub:
        hub.put("tester/paintings", {"data/train-00000-of-00001.parquet": shard.getvalue()}, type="dataset")
        yield hub


@pytest.fixture(scope="module")
def client(programs, hub, tmp_path_factory):
    with Client(programs, hub, tmp_path_factory.mktemp("homes") / "with") as client:
        client.ask("import hfgen.publishing.publish as h\nh.check_loads_anywhere = lambda folder: None")
        yield client


@pytest.fixture(scope="module")
def train(programs, hub, tmp_path_factory):
    """Run a training script that publishes what it has trained; return how each of its processes ended."""
    temporary, unchecked = tmp_path_factory.mktemp("temporary"), tmp_path_factory.mktemp("programs") / "unchecked.py"
    unchecked.write_text(UNCHECKED)
    environment = hub.environment(tmp_path_factory.mktemp("home"))
    environment |= {"OMP_NUM_THREADS": "1", "TMPDIR": str(temporary), "PYTHON_EXEC": str(programs.python)}

    def run(folder, kind, *arguments, ranks=1):
        given = [*TINY, *METHODS[kind], "--output_dir", str(folder), "--push_to_hub", *arguments]
        command = (SCRIPTS / f"train_{kind}.py", *given)
        if ranks == 1:
            ended = [programs.run(unchecked, *command, environment=environment)]
        else:
            ended = programs.run_ranks(ranks, *command, environment=environment)
        assert [path.name for path in temporary.glob("hfgen*")] == []
        return ended

    return run


def published_settings(hub, repo, folder):
    """The settings that were published, which say nothing of the Hub."""
    settings = json.loads(hub.files(repo)["training_config.json"])
    assert not [key for key in settings if "hub" in key] and settings["output_dir"] == folder.name
    everything = b"\n".join(
        content for commit in hub.commits(repo) for content in (f.content for f in commit.files.values())
    )
    assert str(folder.parent).encode() not in everything and b"patient" not in everything
    return settings


def draws_the_same(client, repo, folder):
    return client.draw(repo, trust_remote_code=True) == digest_of(open_pipeline(str(folder), "cpu", plain=True))


def test_of_two_processes_one_publishes(hub, client, train, tmp_path):
    folder = tmp_path / "toy-gan"
    ranks = train(folder, "gan", "--hub_private_repo", ranks=2)
    assert [rank.returncode for rank in ranks] == [0, 0], [rank.stderr[-3000:] for rank in ranks]
    repo = "tester/toy-gan"  # the name of the folder, of the user's own
    said = "".join(rank.stdout for rank in ranks)
    assert said.count(f"published {repo}: {hub.url}/{repo}/commit/{hub.commits(repo)[-1].oid}") == 1
    creations = [one for one in hub.requests if one.path.endswith("/repos/create")]
    assert len(creations) == 1 and len(hub.commits(repo)) == 2 and hub.is_private(repo)
    sent = [one for one in hub.requests if repo in one.path and one.method in ("POST", "PUT")]
    assert len(sent) > 8 and {request.private for request in sent} == {True}
    assert published_settings(hub, repo, folder)["dataset"] == "toy_paintings:24"
    assert "2 processes on cpu" in hub.files(repo)["README.md"].decode()
    assert draws_the_same(client, repo, folder)
    preset = tmp_path / "preset.json"
    preset.write_bytes(hub.files(repo)["training_config.json"])
    again = tmp_path / "again"
    script("gan").main(["--preset", str(preset), "--output_dir", str(again), "--max_train_steps", "1"])
    saved = json.loads((again / "training_config.json").read_text())
    assert saved["push_to_hub"] is False and saved["generator_channels"] == 4


def test_a_run_whose_upload_fails_is_whole_and_names_the_command_to_publish_it(hub, client, train, tmp_path):
    folder, repo = tmp_path / "my run", "tester/my-vae"
    hub.fail("POST", f"{repo}/commit/", status=500)
    (result,) = train(folder, "vae", "--hub_model_id", repo, "--dataset", "tester/paintings", "--hub_private_repo")
    assert result.returncode == 2, result.stderr[-3000:]
    assert "Traceback" not in result.stderr
    error, later = result.stderr.splitlines()[-2:]
    assert error.startswith(
        f"error: {repo}: the upload failed, and without its single commit the repo is unchanged: run it again when"
    )
    assert later.startswith(f"  The run and its pipeline are saved in {folder}. To publish it later: hfgen publish ")
    assert later.endswith(f"my run' {repo} --private")  # whether or not the repo is there already
    assert len(hub.commits(repo)) == 1
    assert json.loads((folder / "status.json").read_text())["status"] == "complete"
    assert json.loads((folder / "training_config.json").read_text())["push_to_hub"] is True
    sent = [one.path for one in hub.requests if one.method == "PUT" and repo in one.path]
    assert len(sent) >= 5
    before = contents(folder)
    said = client.command(*shlex.split(later.rpartition("later: hfgen ")[2]))
    assert said.status == 0 and f"published {repo}" in said.out
    assert contents(folder) == before
    assert [one.path for one in hub.requests if one.method == "PUT" and repo in one.path] == sent
    assert hub.is_private(repo) and {path for path in hub.files(repo) if path.endswith(".py")} == CODE["vae"]
    assert published_settings(hub, repo, folder)["dataset"] == "tester/paintings"
    card = hub.files(repo)["README.md"].decode()
    assert "[tester/paintings](https://huggingface.co/datasets/tester/paintings): 20 images" in card
    assert draws_the_same(client, repo, folder)


def test_a_run_that_ends_because_its_time_is_up_is_published_too(hub, client, train, tmp_path):
    folder, repo = tmp_path / "toy", "tester/toy-ddpm"
    limits = ("--max_train_time", "2s", "--max_train_steps", "90000", "--checkpoint_every", "0", "--log_every", "9")
    streamed = ("--dataset", "tester/paintings", "--streaming", "--shuffle_buffer_size", "5")
    (result,) = train(folder, "ddpm", "--hub_model_id", repo, *limits, *streamed)
    assert result.returncode == 0, result.stderr[-3000:]
    status = json.loads((folder / "status.json").read_text())
    assert status["status"] == "stopped"
    card = hub.files(repo)["README.md"].decode()
    assert f"| steps | {status['step']:,}, {status['step'] * 4:,} images |" in card
    assert f"Its training ended early: {status['reason']}." in card
    assert "streamed: its images were not counted or examined" in card and not hub.is_private(repo)
    published_settings(hub, repo, folder)
    assert draws_the_same(client, repo, folder)


@pytest.mark.parametrize("kind", METHODS)
def test_what_would_fail_after_the_training_fails_before_it(kind, hub, client, tmp_path):
    hub.put("tester/shown", {"notes.txt": b"mine"})
    commits = len(hub.commits("tester/shown"))
    arguments = [*TINY, *METHODS[kind], "--output_dir", str(tmp_path / "run"), "--push_to_hub"]
    cases = {
        ("hf_read", "tester/new"): "tester/new: your Hub token is read-only",
        ("hf_nobody", "tester/new"): "tester/new: nothing was uploaded: the Hub does not know your token",
        ("", "tester/new"): "tester/new: you are not logged in to the Hub",
        ("hf_test", "stranger/new"): "stranger/new: you are tester, who can write only to tester",
        ("hf_test", "tester/shown"): "tester/shown exists and is public",
    }
    for (token, repo), words in cases.items():
        given = [*arguments, "--hub_model_id", repo, "--hub_private_repo", "--cache_dir", str(tmp_path / "cache")]
        client.ask(f"import os\nos.environ['HF_TOKEN'] = {token!r}\nif not {token!r}: del os.environ['HF_TOKEN']")
        said = client.run(MAIN, script=SCRIPTS / f"train_{kind}.py", arguments=given)
        client.ask("os.environ['HF_TOKEN'] = 'hf_test'")
        assert said.status == 2 and f"error: {words}" in said.err.splitlines()[-1], said
        assert not (tmp_path / "run").exists()
    assert ("model", "tester/new") not in hub.repos and len(hub.commits("tester/shown")) == commits


@pytest.mark.parametrize("given", [{"hub_model_id": "tester/cats"}, {"hub_private_repo": True}])
def test_settings_of_the_hub_without_push_to_hub_are_refused(given):
    (name,) = given
    with pytest.raises(UserError, match=f"--{name} does nothing without --push_to_hub"):
        RunSettings(**given)
    assert RunSettings(push_to_hub=True, **given).push_to_hub


def test_the_repo_is_called_like_the_folder_unless_it_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert RunSettings(output_dir="runs/cats/", push_to_hub=True).hub_repo_id == "cats"
    assert RunSettings(output_dir=".", push_to_hub=True).hub_repo_id == tmp_path.name
    assert RunSettings(push_to_hub=True, hub_model_id="tester/cats").hub_repo_id == "tester/cats"


def test_nothing_is_asked_of_the_hub_by_a_run_that_is_not_to_be_published(tmp_path):
    # This process is offline: a question would be an error.
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    script("gan").main([*TINY, *METHODS["gan"], "--output_dir", str(tmp_path / "run"), "--max_train_steps", "1"])
    assert (tmp_path / "run" / "pipeline").is_dir()
