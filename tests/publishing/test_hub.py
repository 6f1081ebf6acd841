"""`hfgen publish` to a Hub on loopback: the repo loads anywhere, and what goes wrong loses nothing."""

import shutil

import pytest
from hub_client import Client, contents, digest_of
from published_toys import CODE, FAMILIES, files_to_publish
from toy_runs import checkpoint, train

from hfgen.inference.opening import open_pipeline


pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
# The check before an upload takes a process of its own: two publications below have it, and tests of its own.
CHECKED = ("gan", "library")
UNCHECKED = """
import hfgen.publishing.publish
hfgen.publishing.publish.check_loads_anywhere = lambda folder: None
"""


@pytest.fixture(scope="module")
def client(programs, hub, runs, tmp_path_factory):
    """A client with hfgen that has published every toy run; later publications are not checked."""
    with Client(programs, hub, tmp_path_factory.mktemp("homes") / "with") as client:
        client.ask("import os\nos.environ['DIFFUSERS_DISABLE_REMOTE_CODE'] = '1'")  # of the user's, for the processes
        for name in sorted(FAMILIES, key=CHECKED.__contains__, reverse=True):
            if name not in CHECKED:
                client.ask(UNCHECKED)
            said = client.command("publish", runs[name], f"tester/{name}")
            assert (said.status, said.error) == (0, None), said
            assert f"published tester/{name}: {hub.url}/tester/{name}/commit/" in said.out
        yield client


@pytest.fixture
def repo(request, hub):
    """The name of a repo of this test, in which a test may look for requests of its own."""
    yield f"tester/{request.function.__name__[5:50]}-{len(hub.repos)}-{len(hub.requests)}"
    hub.mend()


def asked(hub, repo, *methods):
    return [one for one in hub.requests if repo in one.path and one.method in methods]


def digest(run):
    return digest_of(open_pipeline(str(run), "cpu", plain=True))


# ------------------------------------------------------------------------------------------------------ loads anywhere


@pytest.mark.parametrize("name", FAMILIES)
def test_diffusers_alone_draws_the_same_images_from_the_repo(name, client, bare_client, runs):
    trust = {"trust_remote_code": True} if CODE[name] else {}
    assert bare_client.draw(f"tester/{name}", **trust) == digest(runs[name])


@pytest.mark.parametrize("name", [name for name in FAMILIES if CODE[name]])
def test_without_trust_the_error_names_what_to_give(name, client, bare_client):
    said = bare_client.run("DiffusionPipeline.from_pretrained(where)", where=f"tester/{name}")
    assert said.error.startswith("ValueError") and "trust_remote_code=True" in said.error


@pytest.mark.parametrize("name", FAMILIES)
def test_the_repo_holds_what_belongs_into_it_and_nothing_else(name, client, hub):
    assert hub.files(f"tester/{name}").keys() - {".gitattributes"} == files_to_publish(name)
    assert [commit.title for commit in hub.commits(f"tester/{name}")][1:] == ["Publish the pipeline with its card"]
    assert not hub.is_private(f"tester/{name}")
    assert client.leftovers() == set()


@pytest.mark.parametrize(("name", "pipeline"), [("gan", "GAN"), ("vae", "VAE"), ("ddpm", "DDPM"), ("library", "DDPM")])
def test_the_class_of_hfgen_neither_downloads_nor_runs_the_code_of_a_repo(name, pipeline, client, hub, runs):
    before = len(hub.requests)
    code = "import hfgen.pipelines\nanswer = digest_of(getattr(hfgen.pipelines, pipeline).from_pretrained(where))"
    assert client.ask(code, where=f"tester/{name}", pipeline=f"{pipeline}Pipeline") == digest(runs[name])
    downloads = [request.path for request in hub.requests[before:] if "/resolve/" in request.path]
    assert any(path.endswith(".safetensors") for path in downloads)
    assert not any(path.endswith((".py", ".png", ".gif", ".md")) for path in downloads)
    assert client.ask("import sys\nanswer = [name for name in sys.modules if 'diffusers_modules' in name]") == []


def test_the_folder_that_only_output_makes_is_what_would_have_gone_up(client, bare_client, hub, runs, tmp_path):
    before, run_before = len(hub.requests), contents(runs["gan"])
    said = client.command("publish", runs["gan"], "tester/gan", "--output", tmp_path / "folder")
    assert said.status == 0 and "checked" in said.out
    assert len(hub.requests) == before and contents(runs["gan"]) == run_before
    published = hub.files("tester/gan")
    del published[".gitattributes"]
    assert contents(tmp_path / "folder") == published
    assert bare_client.draw(tmp_path / "folder", trust_remote_code=True) == digest(runs["gan"])
    licensed = ("--license", "cc-by-4.0", "--output", tmp_path / "licensed")
    assert client.command("publish", runs["gan"], "tester/gan", *licensed).status == 0
    assert "license: cc-by-4.0\n" in (tmp_path / "licensed" / "README.md").read_text()
    said = client.command("publish", runs["gan"], "tester/gan", "--output", tmp_path / "folder")
    assert said.status == 2 and str(tmp_path / "folder") in said.err
    assert contents(tmp_path / "folder") == published


def test_another_network_replaces_the_one_before_and_the_user_s_own_files_stay(
    client, bare_client, hub, runs, repo, tmp_path
):
    assert client.command("publish", runs["vae"], repo).status == 0
    own = {
        "notes.txt": b"mine",
        "docs/method.md": b"mine",
        "tools/plot.py": b"mine",
        "samples/best of all.png": b"mine",
    }
    hub.put(repo, own)
    train("gan", tmp_path / "run", "--network", "resnet", "--loss", "hinge", "--max_train_steps", "1")
    assert client.command("publish", tmp_path / "run" / "pipeline", repo).status == 0
    files = hub.files(repo)
    expected = {"README.md", "model_index.json", "pipeline_gan.py", "generator/sngan.py", "generator/config.json"}
    expected |= {"generator/diffusion_pytorch_model.safetensors", "samples/sheet.png", "samples/interpolation.png"}
    of_the_run = {"training.json", "training_config.json", "metrics.jsonl"}
    run_known = (tmp_path / "run" / "launches.jsonl").is_file()
    assert run_known and files.keys() >= expected | of_the_run
    left = files.keys() - expected - of_the_run - {"samples/curves.png", "samples/progress.gif", ".gitattributes"}
    assert left == own.keys()
    # Earlier revisions can still be had.
    old = hub.commits(repo)[1].oid
    assert bare_client.draw(repo, trust_remote_code=True, revision=old) == digest(runs["vae"])
    assert bare_client.draw(repo, trust_remote_code=True) == digest(tmp_path / "run")
    code = "from hfgen.pipelines import VAEPipeline\nanswer = digest_of(VAEPipeline.from_pretrained(r, revision=old))"
    assert client.ask(code, r=repo, old=old) == digest(runs["vae"])


def test_a_bare_pipeline_leaves_nothing_of_the_run_that_was_published_before(client, hub, runs, repo, tmp_path):
    assert client.command("publish", runs["ddpm"], repo).status == 0
    shutil.copytree(runs["gan"] / "pipeline", tmp_path / "pipeline")
    assert client.command("publish", tmp_path / "pipeline", repo).status == 0
    gone = {"training.json", "training_config.json", "metrics.jsonl", "samples/curves.png", "samples/progress.gif"}
    assert hub.files(repo).keys() - {".gitattributes"} == files_to_publish("gan") - gone
    assert "Unknown: the pipeline was uploaded without its training run" in hub.files(repo)["README.md"].decode()


def test_publishing_the_same_again_makes_no_commit_and_sends_no_content(client, hub, runs):
    before, commits = len(hub.requests), len(hub.commits("tester/ddpm"))
    said = client.command("publish", runs["ddpm"], "ddpm")  # a name alone is one of the user's own
    assert said.status == 0 and "published tester/ddpm" in said.out
    assert len(hub.commits("tester/ddpm")) == commits
    assert [request.path for request in hub.requests[before:] if request.method == "PUT"] == []


# ------------------------------------------------------------------------------------------------------------- privacy


def test_a_private_repo_is_private_before_anything_is_in_it(client, bare_client, hub, runs, repo):
    source = checkpoint(runs["gan"], 2)  # whose weights the Hub does not have yet
    said = client.command("publish", source, repo, "--private", "--license", "cc-by-4.0")
    assert said.status == 0 and hub.is_private(repo)
    assert b"license: cc-by-4.0\n" in hub.files(repo)["README.md"]
    sent = asked(hub, repo, "POST", "PUT")
    assert {request.private for request in sent} == {True}
    assert len([request for request in sent if request.method == "PUT"]) >= 3
    load = "DiffusionPipeline.from_pretrained(r, trust_remote_code=True, token='hf_stranger')"
    assert repo in bare_client.run(load, r=repo).error
    assert bare_client.draw(repo, trust_remote_code=True, token="hf_test") == digest(source)
    # It stays so where the flag is left out.
    assert client.command("publish", runs["vae"], repo).status == 0
    assert hub.is_private(repo) and "pipeline_vae.py" in hub.files(repo)


def test_a_public_repo_is_refused_for_a_private_publication_before_anything_is_built(client, hub, runs, repo):
    pytest.importorskip("gradio", reason="a Space needs gradio")
    hub.put(repo, {"notes.txt": b"mine"})
    hub.put("tester/shown", {}, type="space")
    code = "def counted(*given):\n    made.append(1)\n    return make(*given)\nh.make_publication = counted"
    client.ask("import hfgen.publishing.publish as h\nmake, made = h.make_publication, []\n" + code)
    for arguments in ((repo,), ("tester/shown", "--space")):
        said = client.command("publish", runs["gan"], *arguments, "--private")
        assert said.status == 2 and "exists and is public" in said.err and "nothing was uploaded" in said.err
    assert client.ask("h.make_publication = make\nanswer = made") == []
    assert asked(hub, repo.split("/")[1], "POST", "PUT") == [] and len(hub.commits(repo)) == 2
    assert ("model", "tester/shown") not in hub.repos


def test_a_repo_that_somebody_makes_public_meanwhile_gets_no_content(client, hub, runs, repo):
    client.ask("import hfgen.publishing.publish as h\nmake = h.make_publication\n"
               "def slow(*given):\n    make(*given)\n    HfApi().create_repo(r, private=False)\n"
               "h.make_publication = slow", r=repo)  # fmt: skip
    said = client.command("publish", runs["gan"], repo, "--private")
    client.ask("h.make_publication = make")
    assert said.status == 2 and "exists and is public" in said.err
    assert len(hub.commits(repo)) == 1 and asked(hub, repo, "PUT") == []


@pytest.mark.parametrize("private", [False, True])
def test_the_space_is_there_and_names_the_revision_of_the_model(private, client, hub, runs, repo):
    pytest.importorskip("gradio")
    flags = ("--space", "--private", "--license", "mit") if private else ("--space",)
    said = client.command("publish", runs["gan"], repo, *flags)
    assert said.status == 0, said
    assert f"its Space: {hub.url}/spaces/{repo}/commit/" in said.out
    assert ("HF_TOKEN" in said.out) is private
    app = hub.files(repo, "space")["app.py"].decode()
    assert f"REPO_ID = {repo!r}" in app and f"REVISION = {hub.commits(repo)[-1].oid!r}" in app
    assert hub.is_private(repo) is hub.is_private(repo, "space") is private
    assert {"app.py", "README.md", "requirements.txt"} <= hub.files(repo, "space").keys()
    assert hub.repos["space", repo].sdk == "gradio"
    assert (b'license: "mit"' in hub.files(repo, "space")["README.md"]) is private
    # Again with another model: the Space goes along.
    said = client.command("publish", runs["vae"], repo, *flags)
    assert said.status == 0 and "not written by hfgen" not in said.out
    app = hub.files(repo, "space")["app.py"].decode()
    assert f"REVISION = {hub.commits(repo)[-1].oid!r}" in app and len(hub.commits(repo)) == 3


def test_replacing_the_space_of_somebody_else_is_said_and_its_other_files_stay(client, hub, runs, repo):
    pytest.importorskip("gradio")
    make = (
        "hub = HfApi()\nhub.create_repo(r, repo_type='space', space_sdk='gradio')\n"
        "for name, text in (('README.md', b'# Mine'), ('generator/notes.txt', b'mine')):\n"
        "    hub.upload_file(path_or_fileobj=text, path_in_repo=name, repo_id=r, repo_type='space')\n"
    )
    assert client.run(make, r=repo).error is None
    said = client.command("publish", runs["gan"], repo, "--space")
    assert said.status == 0 and "the Space was not written by hfgen: files" in said.out
    files = hub.files(repo, "space")
    assert b"# Mine" not in files["README.md"] and files["generator/notes.txt"] == b"mine"
