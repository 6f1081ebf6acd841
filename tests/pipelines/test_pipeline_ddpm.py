import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import PipelineCallback
from tiny_ddpm import NETWORKS, ZeroUNet, build, draw, quiet, seeded

from hfgen.methods.schedules import SAMPLERS, noise_schedule, sampling_scheduler
from hfgen.models import UNetBase
from hfgen.pipelines import DDPMPipeline


every_network = pytest.mark.parametrize("network", NETWORKS)
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)
# Of diffusers, with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# ------------------------------------------------------------------------------------------------- saving and loading


@every_network
@every_sampler
def test_a_reloaded_pipeline_draws_the_same_images_bit_for_bit(network, sampler, tmp_path):
    pipeline = build(network, sampler)
    pipeline.save_pretrained(tmp_path)
    reloaded = quiet(DDPMPipeline.from_pretrained(tmp_path))
    assert type(reloaded) is DDPMPipeline
    assert type(reloaded.unet) is type(pipeline.unet)
    assert type(reloaded.scheduler) is type(pipeline.scheduler)
    assert not reloaded.unet.training
    assert np.array_equal(draw(reloaded), draw(pipeline))


@every_network
@every_sampler
def test_saving_a_loaded_pipeline_writes_the_same_bytes(network, sampler, tmp_path):
    build(network, sampler).save_pretrained(tmp_path / "first")
    DDPMPipeline.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert contents(tmp_path / "second") == contents(tmp_path / "first")


@every_network
def test_no_path_of_this_machine_is_in_any_json_file(network, tmp_path):
    build(network).save_pretrained(tmp_path / "first")
    DDPMPipeline.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    files = list((tmp_path / "second").rglob("*.json"))
    assert len(files) == 3

    def strings(value):
        if isinstance(value, dict):
            return [text for part in value.values() for text in strings(part)]
        return [text for part in value for text in strings(part)] if isinstance(value, list) else [value]

    for file in files:
        assert [text for text in strings(json.loads(file.read_text())) if os.sep in str(text)] == []


@pytest.mark.parametrize(("network", "module"), [("base", "unet_base"), ("attention", "unet_attention")])
def test_the_code_of_a_network_of_hfgen_lies_beside_its_weights(network, module, tmp_path):
    pipeline = build(network)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_ddpm", "DDPMPipeline"]
    assert index["unet"] == [module, type(pipeline.unet).__name__]
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    shipped = {name for name in contents(tmp_path) if name.endswith(".py")}
    assert shipped == {"pipeline_ddpm.py", f"unet/{module}.py"}


def test_a_pipeline_of_parts_of_diffusers_alone_needs_no_code(tmp_path):
    build("library").save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert (index["_class_name"], index["unet"]) == ("DDPMPipeline", ["diffusers", "UNet2DModel"])
    assert [name for name in contents(tmp_path) if name.endswith(".py")] == []


@pytest.mark.parametrize("scheduler_class", [UniPCMultistepScheduler, EulerDiscreteScheduler])
def test_code_comes_along_if_diffusers_own_pipeline_could_not_use_the_scheduler(scheduler_class, tmp_path):
    pipeline = build("library")
    pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config)
    pipeline.register_to_config(num_inference_steps=7)
    pipeline.save_pretrained(tmp_path)
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True))
    assert loaded.config.num_inference_steps == 7
    assert np.array_equal(draw(loaded), draw(pipeline))


@pytest.mark.parametrize("arguments", [{}, {"trust_remote_code": True}])
def test_no_code_of_the_folder_is_run_even_if_code_is_trusted(arguments, tmp_path):
    pipeline, folder, trace = build(), tmp_path / "pipeline", tmp_path / "the code was run"
    pipeline.save_pretrained(folder)
    for file in folder.rglob("*.py"):
        file.write_text(f"open({str(trace)!r}, 'w').close()\n" + file.read_text())
    assert len(list(folder.rglob("*.py"))) == 2
    reloaded = quiet(DDPMPipeline.from_pretrained(folder, **arguments))
    assert type(reloaded) is DDPMPipeline
    assert type(reloaded.unet) is UNetBase
    assert np.array_equal(draw(reloaded), draw(pipeline))
    assert not trace.exists()


@pytest.mark.parametrize("arguments", [{}, {"trust_remote_code": True}])
def test_a_folder_with_an_unknown_class_is_refused_and_its_code_is_not_run(arguments, tmp_path):
    folder, trace = tmp_path / "pipeline", tmp_path / "the code was run"
    build().save_pretrained(folder)
    (folder / "unet" / "other.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "unet": ["other", "Other"]}))
    with pytest.raises(ValueError, match="other.py"):
        DDPMPipeline.from_pretrained(folder, **arguments)
    assert not trace.exists()


def test_pickled_weights_are_not_read_unless_asked_for(tmp_path):
    pipeline = build()
    pipeline.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "unet" / "diffusion_pytorch_model.bin").is_file()
    with pytest.raises(OSError, match="diffusion_pytorch_model.safetensors"):
        DDPMPipeline.from_pretrained(tmp_path)
    asked_for = quiet(DDPMPipeline.from_pretrained(tmp_path, use_safetensors=False))
    assert np.array_equal(draw(asked_for), draw(pipeline))


@pytest.mark.parametrize(
    ("name", "first_lines", "message"),
    [
        ("network_with_numpy.py", "import numpy.linalg", "network_with_numpy.py imports numpy.linalg"),
        ("network_of_hfgen.py", "from hfgen.losses import diffusion", "network_of_hfgen.py imports hfgen.losses"),
        ("network_late.py", "def later():\n    import PIL", "network_late.py imports PIL"),
        ("network_with_helper.py", "def later():\n    from . import helper", r"network_with_helper.py imports \.,"),
        ("ddpm.py", "import math", "ddpm.py has the name of a diffusers pipeline"),
    ],
)
def test_a_network_file_that_would_not_load_elsewhere_is_not_shipped(
    name, first_lines, message, tmp_path, monkeypatch
):
    file = tmp_path / name
    file.write_text(
        f"{first_lines}\nfrom diffusers import ConfigMixin, ModelMixin\n"
        "class Network(ModelMixin, ConfigMixin):\n    config_name = 'config.json'\n"
    )
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, file.stem, module)
    spec.loader.exec_module(module)
    with pytest.raises(ValueError, match=message):
        DDPMPipeline(module.Network(), noise_schedule("linear", 10)).save_pretrained(tmp_path / "pipeline")


# -------------------------------------------------------------------------------------------- a machine without hfgen

CLEAN_MACHINE = """
import json, sys
sys.modules["hfgen"] = None  # any import of it fails, as where it is not installed
import numpy, torch
from diffusers import DiffusionPipeline

folder, threads, requests = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
torch.set_num_threads(threads)
for name, arguments in requests:
    answer = {}
    try:
        pipeline = DiffusionPipeline.from_pretrained(f"{folder}/{name}", **arguments)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        images = pipeline(2, generator=generator, num_inference_steps=4, output_type="np").images
        numpy.save(f"{folder}/{name}{len(arguments)}.npy", images)
        answer = {"pipeline": type(pipeline).__module__, "unet": type(pipeline.unet).__module__}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    answer["hfgen"] = [module for module in sys.modules if module.startswith("hfgen.")]
    print(json.dumps([name, arguments, answer]))
"""


@pytest.fixture(scope="module")
def clean_machine(programs, tmp_path_factory) -> dict:
    """What another process without hfgen says: (network, whether code is trusted) -> answer; plus the folder."""
    folder = tmp_path_factory.mktemp("published")
    for network in NETWORKS:
        build(network).save_pretrained(folder / network)
    trusted = {"trust_remote_code": True}
    requests = [("library", {}), ("base", {}), ("base", trusted), ("attention", {}), ("attention", trusted)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    (folder / "clean_machine.py").write_text(CLEAN_MACHINE)
    arguments = (folder, torch.get_num_threads(), json.dumps(requests))
    process = programs.run(folder / "clean_machine.py", *arguments, environment=environment, folder=folder)
    assert process.returncode == 0, process.stderr
    answers = {"folder": folder}
    for line in process.stdout.splitlines():
        name, arguments, answer = json.loads(line)
        answers[name, bool(arguments)] = answer
    return answers


def test_without_hfgen_and_trust_plain_diffusers_draws_with_the_library_network(clean_machine):
    answer = clean_machine["library", False]
    assert answer == {
        "pipeline": "diffusers.pipelines.ddpm.pipeline_ddpm",
        "unet": "diffusers.models.unets.unet_2d",
        "hfgen": [],
    }
    assert np.array_equal(np.load(clean_machine["folder"] / "library0.npy"), draw(build("library")))


@pytest.mark.parametrize("network", ["base", "attention"])
def test_without_hfgen_plain_diffusers_draws_with_hfgen_s_networks_if_trusted(network, clean_machine):
    answer = clean_machine[network, True]
    assert answer == {
        "pipeline": "diffusers_modules.local.pipeline_ddpm",
        "unet": f"diffusers_modules.local.unet_{network}",
        "hfgen": [],
    }
    assert np.array_equal(np.load(clean_machine["folder"] / f"{network}1.npy"), draw(build(network)))


@pytest.mark.parametrize("network", ["base", "attention"])
def test_plain_diffusers_refuses_the_networks_of_hfgen_if_their_code_is_not_trusted(network, clean_machine):
    answer = clean_machine[network, False]
    assert answer["error"].startswith("ValueError")
    assert "trust_remote_code" in answer["error"]


# ------------------------------------------------------------------------------------------------------------ drawing


@every_sampler
@pytest.mark.parametrize("network", ["base", "attention"])
def test_with_a_generator_for_each_an_image_does_not_depend_on_its_batch(network, sampler):
    pipeline = build(network, sampler)
    together = draw(pipeline, 3, generator=[seeded(5), seeded(6), seeded(7)])
    reversed_order = draw(pipeline, 2, generator=[seeded(7), seeded(6)])
    alone = draw(pipeline, 1, generator=[seeded(6)])
    np.testing.assert_allclose(together[1:2], alone, atol=1e-5)
    np.testing.assert_allclose(together[[2, 1]], reversed_order, atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 0.1


@every_sampler
def test_the_generator_fixes_the_images_whatever_the_global_random_state(sampler):
    pipeline = build(sampler=sampler)
    torch.manual_seed(10)
    one = draw(pipeline)
    torch.manual_seed(20)
    assert np.array_equal(draw(pipeline), one)
    assert not np.array_equal(draw(pipeline, seed=4), one)


def test_without_a_generator_the_images_differ_from_call_to_call():
    pipeline = build()
    assert not np.array_equal(draw(pipeline, generator=None), draw(pipeline, generator=None))


def test_given_latents_replace_the_generator_s_noise_and_are_not_changed():
    pipeline = build()
    latents = torch.randn(2, 3, 8, 8, generator=seeded(3))
    before = latents.clone()
    assert np.array_equal(draw(pipeline, latents=latents, seed=99), draw(pipeline))
    assert torch.equal(latents, before)


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (2, 1, 8, 8), (2, 3, 8, 16), (2, 3, 64), (3, 3, 8, 8)])
def test_latents_of_another_shape_are_refused_with_the_shape_that_is_needed(shape):
    with pytest.raises(ValueError, match=r"latents must have shape \(2, 3, 8, 8\), not "):
        draw(build(), latents=torch.zeros(shape))


@pytest.mark.parametrize("steps", [-1, 0, 41, 1000])
def test_a_number_of_steps_that_the_training_did_not_have_is_refused(steps):
    with pytest.raises(ValueError, match=f"num_inference_steps={steps} must be from 1 to 40"):
        draw(build(), num_inference_steps=steps)


@every_sampler
@pytest.mark.parametrize("steps", [1, 5, 40])
def test_the_callback_sees_each_step_once_and_last_the_finished_image(sampler, steps):
    pipeline, seen = build(sampler=sampler), []
    images = draw(
        pipeline,
        num_inference_steps=steps,
        output_type="pt",
        callback_on_step_end=lambda *given: seen.append((*given[:3], given[3]["latents"].clone())),
    )
    assert all(given is pipeline for given, *_ in seen)
    assert [index for _, index, *_ in seen] == list(range(steps))
    timesteps = [timestep for _, _, timestep, _ in seen]
    assert timesteps == pipeline.scheduler.timesteps.tolist()
    assert timesteps == sorted(set(timesteps), reverse=True)
    assert all(type(timestep) is int for timestep in timesteps)
    assert torch.equal(seen[-1][3].clamp(-1, 1) / 2 + 0.5, images)


def test_a_callback_of_diffusers_can_change_the_images_on_the_way():
    class Brighter(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            if step_index < 4:
                return {}  # unchanged
            return {"latents": callback_kwargs["latents"] + 0.5}

    options = {"num_inference_steps": 5, "output_type": "pt", "latents": torch.zeros(2, 3, 8, 8)}
    pipeline = quiet(DDPMPipeline(ZeroUNet(), sampling_scheduler(noise_schedule("linear", 40), "ddim")))
    plain, brighter = draw(pipeline, **options), draw(pipeline, **options, callback_on_step_end=Brighter())
    assert torch.equal(plain, torch.full_like(plain, 0.5)) and torch.equal(brighter, torch.full_like(plain, 0.75))


def test_the_network_is_asked_once_a_step():
    pipeline, asked = build(), []
    pipeline.unet.register_forward_hook(lambda network, inputs, output: asked.append(int(inputs[1])))
    draw(pipeline, num_inference_steps=7)
    assert asked == pipeline.scheduler.timesteps.tolist()
    assert len(asked) == 7


def test_the_output_types_show_the_same_images():
    pipeline = build()
    arrays, tensors = draw(pipeline), draw(pipeline, output_type="pt")
    pictures = draw(pipeline, output_type="pil")
    assert arrays.shape == (2, 8, 8, 3)
    assert arrays.dtype == np.float32
    assert 0 <= arrays.min() < arrays.max() <= 1
    assert tensors.shape == (2, 3, 8, 8)
    assert np.array_equal(tensors.permute(0, 2, 3, 1).numpy(), arrays)
    assert [(picture.mode, picture.size) for picture in pictures] == [("RGB", (8, 8))] * 2
    assert np.array_equal(np.stack(pictures), np.round(arrays * 255).astype(np.uint8))


def test_by_default_pictures_come_in_an_output_and_without_return_dict_in_a_tuple():
    pipeline = build()
    output = pipeline(2, generator=seeded(3), num_inference_steps=4)
    plain = pipeline(2, generator=seeded(3), num_inference_steps=4, return_dict=False)
    assert isinstance(plain, tuple)
    assert len(plain) == 1
    assert np.array_equal(np.stack(output.images), np.stack(plain[0]))


def test_a_network_of_one_channel_draws_grey_pictures():
    pipeline = build(in_channels=1, out_channels=1)
    assert [picture.mode for picture in draw(pipeline, output_type="pil")] == ["L", "L"]


@pytest.mark.parametrize("network", ["base", "attention"])
def test_a_network_in_bfloat16_draws_nearly_the_same_images(network):
    pipeline = build(network)
    latents = torch.randn(2, 3, 8, 8, generator=seeded(3))
    full = draw(pipeline, latents=latents)
    pipeline.to(torch.bfloat16)
    half = draw(pipeline, latents=latents)
    assert half.dtype == np.float32
    assert 0 < np.abs(half - full).mean() < 0.05


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_generators_than_of_images_is_refused(count):
    with pytest.raises(ValueError, match=f"generator: there are {count} for 2 images"):
        build()(2, generator=[seeded(seed) for seed in range(count)])


@pytest.mark.parametrize("training", [False, True])
def test_drawing_changes_neither_weights_nor_mode_and_tracks_no_gradient(training):
    pipeline = build()
    pipeline.unet.train(training)
    statistics = {key for key, _ in pipeline.unet.named_buffers()}
    before = {key: value.clone() for key, value in pipeline.unet.state_dict().items()}
    images = draw(pipeline, output_type="pt")
    assert not images.requires_grad
    assert pipeline.unet.training == training
    for key, value in pipeline.unet.state_dict().items():
        assert torch.equal(value, before[key]) or (training and key in statistics)
