"""Saving again, and pushing from Python: with hfgen, and of a pipeline that was loaded without hfgen."""

import copy
import json
import shutil

import pytest
import torch
from diffusers import DDPMScheduler
from hub_client import Client, contents, digest_of
from published_toys import CODE, FAMILIES

from hfgen import pipelines
from hfgen.hub.card import write_card
from hfgen.inference.opening import open_pipeline


pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
CLASSES = {
    "gan": "GANPipeline",
    "vae": "VAEPipeline",
    "ddpm": "DDPMPipeline",
    "library": "DDPMPipeline",
    "edm": "DDPMPipeline",
}
LOAD = "pipeline = DiffusionPipeline.from_pretrained(where, trust_remote_code=True)\n"
LOAD_WITH_HFGEN = "import hfgen.pipelines\npipeline = getattr(hfgen.pipelines, name).from_pretrained(where)\n"
OWN_CARD = b"---\nlicense: mit\n---\n# Cats\n\nMy own words about hfgen.\n"


@pytest.fixture(scope="module")
def client(programs, hub, tmp_path_factory):
    with Client(programs, hub, tmp_path_factory.mktemp("homes") / "with") as client:
        yield client


def digest(run):
    return digest_of(open_pipeline(str(run), "cpu", plain=True))


def files_of(hub, repo):
    return {path: content for path, content in hub.files(repo).items() if path != ".gitattributes"}


# -------------------------------------------------------------------------------------------------------- saving again


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pipeline_loaded_without_hfgen_is_saved_again_byte_for_byte(name, bare_client, runs, tmp_path):
    folder = runs[name] / "pipeline"
    bare_client.ask(LOAD + "pipeline.save_pretrained(to)", where=folder, to=tmp_path / "again")
    if name == "library":  # is then a pipeline of diffusers alone, which marks its index with another name
        assert contents(tmp_path / "again").keys() == contents(folder).keys()
    else:
        assert contents(tmp_path / "again") == contents(folder)
    assert bare_client.draw(tmp_path / "again", trust_remote_code=True) == digest(runs[name])
    # And once more, from where it was saved.
    bare_client.ask(LOAD + "pipeline.save_pretrained(to)", where=tmp_path / "again", to=tmp_path / "third")
    assert contents(tmp_path / "third").keys() == contents(folder).keys()
    assert bare_client.draw(tmp_path / "third", trust_remote_code=True) == digest(runs[name])
    assert digest_of(open_pipeline(str(tmp_path / "third"), "cpu", plain=True)) == digest(runs[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pipeline_loaded_by_hfgen_is_saved_again_byte_for_byte(name, runs, tmp_path):
    folder = runs[name] / "pipeline"
    getattr(pipelines, CLASSES[name]).from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_the_code_of_a_card_loads_the_variant_that_was_saved(name, variant, runs, tmp_path):
    pipeline = getattr(pipelines, CLASSES[name]).from_pretrained(runs[name] / "pipeline")
    pipeline.save_pretrained(tmp_path / "cats", variant=variant, max_shard_size="20KB")
    (tmp_path / "cats" / "samples").mkdir()
    write_card(tmp_path / "cats", "tester/cats")
    text = (tmp_path / "cats" / "README.md").read_text()
    named = f', variant="{variant}"' if variant else ""
    for line in (
        f'.{CLASSES[name]}.from_pretrained("tester/cats"{named})',
        'DiffusionPipeline.from_pretrained("tester/cats"',
    ):
        assert line in text
    code = text.split("```python\n")[1].split("```")[0].replace("tester/cats", str(tmp_path / "cats"))
    loaded = {}
    exec(code.split("images =")[0], loaded)
    assert digest_of(loaded["pipeline"]) == digest(runs[name])
    assert digest(tmp_path / "cats") == digest(runs[name])  # `hfgen sample` finds the only variant


@pytest.mark.parametrize("name", FAMILIES)
def test_a_compiled_network_is_saved_as_the_one_inside(name, runs, tmp_path):
    folder = runs[name] / "pipeline"
    for index, kind in enumerate((getattr(pipelines, CLASSES[name]), None)):
        if kind is None:
            kind = getattr(pipelines, CLASSES[name]).__mro__[2]  # the plain class, as it is published
        loaded = getattr(pipelines, CLASSES[name]).from_pretrained(folder)
        pipeline = kind(**{key: part for key, part in loaded.components.items()})
        for key in ("generator", "vae", "unet"):
            if hasattr(pipeline, key):
                setattr(pipeline, key, torch.compile(getattr(pipeline, key)))
        pipeline.save_pretrained(tmp_path / str(index))
        found, saved = contents(tmp_path / str(index)), contents(folder)
        assert found.keys() == saved.keys() - {"progress.json", "digests.json"}
        assert digest(tmp_path / str(index)) == digest(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pipeline_is_made_of_the_parts_of_another(name, runs):
    kind = getattr(pipelines, CLASSES[name])
    pipeline = kind.from_pretrained(runs[name] / "pipeline")
    made = kind.from_pipe(pipeline)
    assert type(made) is kind and made.components == pipeline.components
    assert (
        made.config.items() == {key: pipeline.config[key] for key in pipeline.config if key != "_name_or_path"}.items()
    )
    assert digest_of(made) == digest(runs[name])
    if name == "ddpm":
        assert kind.from_pipe(pipeline, num_inference_steps=3).config.num_inference_steps == 3
        other = DDPMScheduler.from_config(pipeline.scheduler.config)
        assert kind.from_pipe(pipeline, scheduler=other).scheduler is other
    half = kind.from_pipe(copy.deepcopy(pipeline), torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and pipeline.dtype == torch.float32


@pytest.mark.parametrize("where", ["pipeline", ""])
def test_a_pipeline_of_diffusers_has_the_steps_of_its_run(where, runs, tmp_path):
    shutil.copytree(runs["library"], run := tmp_path / "run")
    settings = json.loads((run / "training_config.json").read_text()) | {"num_inference_steps": 7}
    (run / "training_config.json").write_text(json.dumps(settings))
    loaded = pipelines.DDPMPipeline.from_pretrained(run / where)
    assert loaded.config.num_inference_steps == open_pipeline(str(run), "cpu").config.num_inference_steps == 7
    assert pipelines.DDPMPipeline.from_pretrained(run / where, num_inference_steps=3).config.num_inference_steps == 3


@pytest.mark.parametrize("name", FAMILIES)
def test_no_images_are_refused(name, runs):
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        open_pipeline(str(runs[name]), "cpu")(0)


# ----------------------------------------------------------------------------------------------------------- pushing


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pushed_pipeline_loads_anywhere_with_a_card_that_calls_it_unmeasured(name, client, bare_client, hub, runs):
    repo = f"tester/pushed-{name}"
    code = LOAD_WITH_HFGEN + "answer = pipeline.push_to_hub(repo, commit_message='The first')"
    address = client.ask(code, where=runs[name] / "pipeline", name=CLASSES[name], repo=repo)
    _, commit = hub.commits(repo)
    assert address == f"{hub.url}/{repo}/commit/{commit.oid}" and commit.title == "The first"
    assert bare_client.draw(repo, trust_remote_code=bool(CODE[name])) == digest(runs[name])
    files = files_of(hub, repo)
    card = files.pop("README.md").decode()
    assert files == contents(runs[name] / "pipeline")
    assert "Not measured." in card and "Unknown: the pipeline was uploaded without its training run." in card
    assert f'from_pretrained("{repo}"' in card and not hub.is_private(repo)
    assert client.leftovers() == set()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pipeline_loaded_without_hfgen_can_be_pushed_and_loads(name, bare_client, hub, runs):
    repo = f"tester/pushed-bare-{name}"
    code = LOAD + "pipeline.push_to_hub(repo, private=True)"
    bare_client.ask(code, where=runs[name] / "pipeline", repo=repo)
    assert hub.is_private(repo) and {path for path in files_of(hub, repo) if path.endswith(".py")} == CODE[name]
    assert {one.private for one in hub.requests if repo in one.path and one.method in ("POST", "PUT")} == {True}
    assert bare_client.draw(repo, trust_remote_code=True) == digest(runs[name])


def test_somebody_s_own_card_is_kept_and_one_of_hfgen_is_written_anew(client, hub, runs):
    code = LOAD_WITH_HFGEN + "pipeline.push_to_hub(repo)"
    hub.put("tester/own-card", {"README.md": OWN_CARD, "samples/mine.png": b"mine"})
    gan, vae = {"where": runs["gan"] / "pipeline", "name": "GANPipeline"}, {"where": runs["vae"] / "pipeline"}
    client.ask(code, **gan, repo="tester/own-card")
    assert hub.files("tester/own-card")["README.md"] == OWN_CARD
    assert hub.files("tester/own-card")["samples/mine.png"] == b"mine"
    assert "pipeline_gan.py" in hub.files("tester/own-card")
    client.ask(code, **gan, repo="tester/its-card")
    first = hub.files("tester/its-card")["README.md"].decode()
    client.ask(code, **vae, name="VAEPipeline", repo="tester/its-card")
    second = hub.files("tester/its-card")["README.md"].decode()
    assert "adversarial" in first and "adversarial" not in second and "variational" in second
    assert not any("generator" in path for path in files_of(hub, "tester/its-card"))
    # The same again is no commit.
    before = len(hub.commits("tester/its-card"))
    client.ask(code, **vae, name="VAEPipeline", repo="tester/its-card")
    assert len(hub.commits("tester/its-card")) == before


def test_privacy_and_the_token_of_a_push_are_honoured(client, hub, runs):
    given = {"where": runs["gan"] / "pipeline", "name": "GANPipeline"}
    client.ask(LOAD_WITH_HFGEN + "pipeline.push_to_hub('hidden', private=True)", **given)
    assert hub.is_private("tester/hidden") and "README.md" in hub.files("tester/hidden")
    sent = [one for one in hub.requests if "tester/hidden" in one.path and one.method in ("POST", "PUT")]
    assert {request.private for request in sent} == {True}
    client.ask("pipeline.push_to_hub('hidden')")  # again, from which its card is read
    assert hub.is_private("tester/hidden")
    hub.put("tester/open", {})
    refusals = {
        "'tester/open', private=True": "exists and is public",
        "'tester/new', token='hf_read'": "is read-only",
        "'tester/new', token='hf_nobody'": "does not know your token",
        "'tester/new', token='hf_stranger'": "you are stranger, who can write only to stranger",
    }
    for arguments, words in refusals.items():
        said = client.run(f"pipeline.push_to_hub({arguments})")
        assert said.error.startswith("UserError") and words in said.error, said.error
    for arguments in ("safe_serialization=False", "subfolder='deep'"):
        said = client.run(f"pipeline.push_to_hub('tester/new', {arguments})")
        remedy = "leave out safe_serialization and subfolder"
        assert said.error == f"ValueError: push_to_hub uploads safetensors to the top of the repo: {remedy}"
    assert ("model", "tester/new") not in hub.repos and len(hub.commits("tester/open")) == 2
    client.ask("pipeline.push_to_hub('mine', token='hf_stranger')")
    assert "pipeline_gan.py" in hub.files("stranger/mine")


@pytest.mark.parametrize("with_hfgen", [True, False])
def test_saving_with_push_to_hub_saves_the_whole_folder_and_then_uploads_it(
    with_hfgen, client, bare_client, hub, runs, tmp_path
):
    one, load = (client, LOAD_WITH_HFGEN) if with_hfgen else (bare_client, LOAD)
    given = {"where": runs["ddpm"] / "pipeline", "name": "DDPMPipeline", "to": tmp_path / f"saved-{with_hfgen}"}
    one.ask(load + "pipeline.save_pretrained(to, push_to_hub=True)", **given)
    assert contents(given["to"]) == contents(runs["ddpm"] / "pipeline")
    repo = f"tester/saved-{with_hfgen}"
    files = files_of(hub, repo)
    assert "README.md" in files and files == contents(given["to"]) | {"README.md": files["README.md"]}
    assert bare_client.draw(repo, trust_remote_code=True) == digest(runs["ddpm"])
    named = f"tester/named-{with_hfgen}"
    arguments = "push_to_hub=True, repo_id=repo, private=True, commit_message='Named', token='hf_test', variant='fp32'"
    one.ask(f"pipeline.save_pretrained(to, {arguments})", repo=named)
    assert hub.is_private(named) and hub.commits(named)[-1].title == "Named"
    weights = [path for path in hub.files(named) if path.endswith(".safetensors")]
    assert "pipeline_ddpm.py" in hub.files(named) and weights == ["unet/diffusion_pytorch_model.fp32.safetensors"]


def test_what_is_refused_leaves_the_folder_whole(client, hub, runs, tmp_path):
    given = {"where": runs["gan"] / "pipeline", "name": "GANPipeline", "to": tmp_path / "saved"}
    said = client.run(
        LOAD_WITH_HFGEN + "pipeline.save_pretrained(to, push_to_hub=True, repo_id='stranger/x')", **given
    )
    assert said.error.startswith("UserError: stranger/x: you are tester")
    assert contents(tmp_path / "saved") == contents(runs["gan"] / "pipeline")
    assert ("model", "stranger/x") not in hub.repos


def test_a_part_that_is_left_out_has_no_code_and_no_folder(runs, tmp_path):
    folder = tmp_path / "without"
    pipeline = pipelines.VAEPipeline.from_pretrained(runs["vae"] / "pipeline")
    pipelines.VAEPipeline(pipeline.vae).save_pretrained(folder)
    assert not (folder / "density").exists()
    assert json.loads((folder / "model_index.json").read_text())["density"] == [None, None]
    shutil.copytree(folder, tmp_path / "copy")
    assert digest_of(open_pipeline(str(tmp_path / "copy"), "cpu", plain=True)) == digest_of(
        pipelines.VAEPipeline(pipeline.vae)
    )


@pytest.mark.parametrize("name", ["gan", "library"])
def test_a_command_takes_a_pipeline_on_the_hub_by_id_or_address(name, client, hub, runs, tmp_path):
    repo = f"tester/sampled-{name}"
    settings = {"training_config.json": (runs[name] / "training_config.json").read_bytes()}  # published beside it
    hub.put(repo, contents(runs[name] / "pipeline") | settings)
    for folder, where in {"disk": runs[name], "id": repo, "address": f"https://huggingface.co/{repo}"}.items():
        said = client.command("sample", where, "--num_images", 2, "--output", tmp_path / folder, "--device", "cpu")
        assert not said.status and said.error is None, said.err
    assert contents(tmp_path / "id") == contents(tmp_path / "address") == contents(tmp_path / "disk")
    pipeline = getattr(pipelines, CLASSES[name]).from_pretrained(runs[name] / "pipeline")
    pipeline.save_pretrained(tmp_path / "half", variant="fp16", max_shard_size="20KB")
    hub.put(f"{repo}-half", contents(tmp_path / "half") | settings)
    said = client.command("sample", f"{repo}-half", "--num_images", 2, "--output", tmp_path / "v", "--device", "cpu")
    assert not said.status and contents(tmp_path / "v") == contents(tmp_path / "disk"), said.err
    said = client.command("sample", "tester/nothing", "--output", tmp_path / "nothing")
    assert "tester/nothing: no such folder, and no pipeline could be loaded from the Hub" in said.err
