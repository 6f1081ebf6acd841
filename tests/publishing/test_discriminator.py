"""The discriminator beside a published pipeline: `hfgen publish --discriminator`, and `--init_from` what it wrote."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from hub_client import Client
from safetensors.torch import load_file, save_file
from toy_runs import checkpoint, train

from hfgen.errors import UserError
from hfgen.inference.opening import open_pipeline
from hfgen.publishing.folder import make_publication
from hfgen.run_files import DISCRIMINATOR_FILE


pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
UNCHECKED = """
import hfgen.publishing.publish
hfgen.publishing.publish.check_loads_anywhere = lambda folder: None
"""


def test_the_discriminator_goes_along_if_asked_for_and_a_run_starts_from_both(runs, tmp_path, capsys):
    make_publication(runs["gan"], tmp_path / "both", "tester/toy", discriminator=True)
    before = torch.load(checkpoint(runs["gan"], 6) / "state.pt", weights_only=True)
    published = load_file(tmp_path / "both" / DISCRIMINATOR_FILE)
    assert published.keys() == before["discriminator"].keys()
    assert all(torch.equal(weights, before["discriminator"][name]) for name, weights in published.items())
    assert (
        "--preset training_config.json --init_from tester/toy --images 10000"
        in (tmp_path / "both" / "README.md").read_text()
    )

    # So small a rate that the weights stay as they are.
    still = ("--learning_rate", "1e-30", "--max_train_steps", "1", "--checkpoint_every", "1")
    train("gan", tmp_path / "further", *still, "--init_from", tmp_path / "both")
    after = torch.load(checkpoint(tmp_path / "further", 1) / "state.pt", weights_only=True)
    for name, weights in after["discriminator"].items():
        if "running_" not in name and "num_b" not in name:
            assert torch.allclose(weights, published[name], atol=1e-7), name
    assert (
        f"initialised from {tmp_path / 'both'}: generator, discriminator and EMA weights\n" in capsys.readouterr().out
    )


def test_it_is_rounded_with_the_rest_and_goes_along_when_published_again(runs, tmp_path):
    make_publication(runs["gan"], tmp_path / "half", "tester/toy", half=True, discriminator=True)
    make_publication(tmp_path / "half", tmp_path / "again", "tester/toy", discriminator=True)
    make_publication(tmp_path / "half", tmp_path / "without", "tester/toy")
    half, again = (load_file(tmp_path / name / DISCRIMINATOR_FILE) for name in ("half", "again"))
    assert "stored as 16-bit floats" in (tmp_path / "half" / "README.md").read_text()
    card = (tmp_path / "again" / "README.md").read_text()
    assert "stored as 16-bit floats" not in card and "--init_from tester/toy" in card
    whole = torch.load(checkpoint(runs["gan"], 6) / "state.pt", weights_only=True)["discriminator"]
    for name, weights in whole.items():
        assert torch.equal(half[name], weights.half() if weights.is_floating_point() else weights)
        assert again[name].dtype == weights.dtype and torch.equal(again[name], half[name].to(weights.dtype))
    assert not (tmp_path / "without" / "discriminator").exists()


def test_a_discriminator_of_other_weights_or_of_none_is_refused(runs, tmp_path):
    run = shutil.copytree(runs["gan"], tmp_path / "gan")
    lone = shutil.copytree(run / "pipeline", tmp_path / "lone")
    for source, told in (
        (runs["ddpm"], "was trained without one; leave out --discriminator"),
        (lone, "has none, and is not part of a run"),
    ):
        with pytest.raises(UserError, match=f"--discriminator: .*{told}"):
            make_publication(source, tmp_path / "published", "tester/toy", discriminator=True)
    # As after a rollback: another pipeline of the same step.
    other = open_pipeline(str(run), "cpu", plain=True)
    next(other.generator.parameters()).data.add_(1)
    other.save_pretrained(run / "pipeline")
    (run / "pipeline" / "digests.json").unlink()
    with pytest.raises(
        UserError, match=r"step-00000006 has other weights than \S+gan/pipeline; publish the checkpoint"
    ):
        make_publication(run, tmp_path / "published", "tester/toy", discriminator=True)
    shutil.rmtree(checkpoint(run, 6))
    kept = r"\(\S+step-00000002, \S+step-00000004\)"
    told = rf"gan has deleted its checkpoint of step 6; publish one of those that it has {kept}"
    with pytest.raises(UserError, match=told):
        make_publication(run, tmp_path / "published", "tester/toy", discriminator=True)
    assert not (tmp_path / "published").exists()


def test_the_discriminator_of_a_learned_term_goes_along(tmp_path):
    learned = ("--feature_weight", "1", "--discriminator_channels", "4", "--max_train_steps", "2")
    train("vae", tmp_path / "vae", *learned)
    make_publication(tmp_path / "vae", tmp_path / "published", "tester/toy", discriminator=True)
    state = torch.load(checkpoint(tmp_path / "vae", 2) / "state.pt", weights_only=True)["discriminator"]
    published = load_file(tmp_path / "published" / DISCRIMINATOR_FILE)
    assert published.keys() == state.keys() and all(torch.equal(published[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("start", "kind"), [("run", "ada"), ("run/pipeline", "diffaugment"), ("both", "ada"), (None, "diffaugment")]
)
def test_few_images_are_augmented_by_ada_if_the_discriminator_is_trained(runs, tmp_path, capsys, start, kind):
    (tmp_path / "run").symlink_to(runs["gan"])
    if start == "both":
        make_publication(runs["gan"], tmp_path / "both", "tester/toy", discriminator=True)
    arguments = ("--init_from", tmp_path / start) if start else ()
    train("gan", tmp_path / "further", "--max_train_steps", "1", *arguments)
    assert f"augmentation: {kind} (24 images, " in capsys.readouterr().out
    train("gan", tmp_path / "further", "--max_train_steps", "2", *arguments, "--resume", "latest")
    *_, last = (line for line in capsys.readouterr().out.splitlines() if line.startswith("augmentation: "))
    assert re.match(rf"augmentation: {kind}\W", last)


def test_a_damaged_or_foreign_discriminator_is_refused_by_name(runs, tmp_path):
    make_publication(runs["gan"], tmp_path / "both", "tester/toy", discriminator=True)
    file = tmp_path / "both" / DISCRIMINATOR_FILE
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"discriminator.safetensors cannot be read: .*; download or publish it again"):
        train("gan", tmp_path / "further", "--init_from", tmp_path / "both")
    save_file({"weight": torch.zeros(3)}, file)
    with pytest.raises(UserError, match="both: its discriminator has another architecture: "):
        train("gan", tmp_path / "further", "--init_from", tmp_path / "both")


def test_from_the_hub_it_is_downloaded_only_for_a_training(runs, programs, hub, tmp_path):
    with Client(programs, hub, tmp_path / "home") as client:
        said = client.command("publish", runs["gan"], "tester/both", "--discriminator")
        assert (said.status, said.error) == (0, None), said
        client.ask(UNCHECKED)  # the check, seconds long, was made here
        assert client.command("publish", runs["gan"], "tester/without").status == 0
        assert DISCRIMINATOR_FILE in hub.files("tester/both")
        assert client.command("sample", "tester/both", "--num_images", 1, "--output", tmp_path / "drawn").status == 0
        assert client.draw("tester/both", trust_remote_code=True)  # diffusers alone
        client.ask("from hfgen.pipelines import GANPipeline\nGANPipeline.from_pretrained('tester/both')")
        assert not any(DISCRIMINATOR_FILE in request.path for request in hub.requests if request.method == "GET")
        # Without a connection, what was not downloaded is not taken for missing.
        offline = "from huggingface_hub import constants\nconstants.HF_HUB_OFFLINE = {}"
        load = "from hfgen.inference.opening import load_discriminator\nload_discriminator('tester/both')"
        client.ask(offline.format(True))
        error = f"UserError: tester/both: {DISCRIMINATOR_FILE} could not be downloaded: "
        assert client.run(load).error.startswith(error)
        client.ask(offline.format(False))
        client.ask(
            "from hfgen.inference.opening import load_discriminator\n"
            "assert load_discriminator('tester/without') is None"
        )
        train_here = "import sys\nsys.path.insert(0, tests)\nfrom toy_runs import train\ntrain('gan', *arguments)"
        arguments = [tmp_path / "further", "--max_train_steps", "1", "--init_from", "tester/both"]
        said = client.run(train_here, tests=Path(__file__).parents[1], arguments=list(map(str, arguments)))
        assert said.error is None and "from tester/both: generator, discriminator and EMA weights\n" in said.out, said
        assert any(DISCRIMINATOR_FILE in request.path for request in hub.requests if request.method == "GET")
        # Published again without it, the repo has none any more.
        assert client.command("publish", runs["gan"], "tester/both").status == 0
        assert DISCRIMINATOR_FILE not in hub.files("tester/both")
