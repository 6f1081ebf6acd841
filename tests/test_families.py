"""What family a pipeline is of, loaded or saved, of hfgen's classes or of diffusers' own."""

import json

import diffusers
import pytest
from demo_pages import toy_pipelines

from hfgen.families import family, family_of_index, image_network


def index_of(pipeline, folder):
    pipeline.save_pretrained(folder)
    return json.loads((folder / "model_index.json").read_text())


@pytest.mark.parametrize("name", ["gan", "vae", "ddpm"])
def test_a_pipeline_and_its_saved_index_are_of_one_family(name, tmp_path):
    pipeline = toy_pipelines()[name]
    assert family(pipeline) == name == family_of_index(index_of(pipeline, tmp_path))
    network = {"gan": "generator", "vae": "vae", "ddpm": "unet"}[name]
    assert image_network(pipeline) is getattr(pipeline, network)


def test_diffusers_own_ddpm_is_one_and_a_saved_number_of_steps_is_no_component(tmp_path):
    ours = toy_pipelines()["ddpm"]
    assert family(diffusers.DDPMPipeline(ours.unet, ours.scheduler)) == "ddpm"
    assert family_of_index(index_of(ours, tmp_path) | {"num_inference_steps": 7}) == "ddpm"


def test_a_vae_without_a_density_is_one_nevertheless(tmp_path):
    pipeline = toy_pipelines()["vae"]
    pipeline = type(pipeline)(pipeline.vae)
    assert family(pipeline) == "vae" == family_of_index(index_of(pipeline, tmp_path))


def test_an_index_with_more_components_is_of_no_family():
    index = {"_class_name": "Upscaler", "unet": ["diffusers", "UNet2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
    with pytest.raises(ValueError, match=r"a Upscaler \(unet, vae\) does not generate images from noise alone"):
        family_of_index(index)
