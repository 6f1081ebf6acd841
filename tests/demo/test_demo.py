"""What the demo draws, what it reads, what it refuses; without a browser."""

import copy
import socket

import diffusers
import numpy as np
import pytest
import torch
from demo_pages import toy_pipelines
from edm_pipelines import edm_pipeline
from PIL import Image

from hfgen.errors import UserError
from hfgen.families import image_network
from hfgen.inference.sampling import image_generators, open_image
from hfgen.methods.schedules import EDM_SAMPLERS, SAMPLERS, noise_schedule, sampling_scheduler
from hfgen.models import UNetBase
from hfgen.pipelines import DDPMPipeline


gr = pytest.importorskip("gradio", reason='needs gradio: pip install "hfgen[demo]"')

from hfgen.commands.demo import pipeline_names, refuse_port_in_use  # noqa: E402
from hfgen.demo import drawing  # noqa: E402
from hfgen.demo.drawing import Settings, generate, image_generator, interpolate, open_upload  # noqa: E402
from hfgen.demo.fields import MAX_SEED, only_finite, option_fields, read_settings, whole_number  # noqa: E402
from hfgen.demo.page import build_demo  # noqa: E402


STEPS = 8


@pytest.fixture(scope="module")
def pipelines():
    return toy_pipelines()


def pixels(image):
    return np.asarray(image).astype(int)


def generators(seed, count):
    return [image_generator(seed, index) for index in range(count)]


# ------------------------------------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize(
    ("name", "settings", "arguments"),
    [
        ("gan", Settings(), {}),
        ("gan", Settings(truncation=1.5), {"truncation": 1.5}),
        ("vae", Settings(), {"sample_from": "ex_post"}),
        ("vae", Settings(sample_from="prior"), {"sample_from": "prior"}),
        ("ddpm", Settings(steps=STEPS), {"num_inference_steps": STEPS}),
    ],
)
def test_an_image_is_the_one_that_sample_draws_for_the_seed(pipelines, name, settings, arguments):
    expected = pipelines[name](3, generator=image_generators(7, 0, 3), **arguments).images
    drawn = generate(pipelines[name], generators(7, 3), settings)
    for ours, theirs in zip(drawn, expected, strict=True):
        np.testing.assert_allclose(pixels(ours), pixels(theirs), atol=1)
    assert np.abs(pixels(drawn[0]) - pixels(drawn[1])).mean() > 4
    assert np.abs(pixels(drawn[0]) - pixels(generate(pipelines[name], generators(8, 1), settings)[0])).mean() > 4


@pytest.mark.parametrize("sampler", [*SAMPLERS, "saved"])
def test_a_sampler_is_that_of_the_option_of_sample_and_the_pipeline_keeps_its_own(pipelines, sampler):
    pipeline = pipelines["ddpm"]
    before, config = pipeline.scheduler, dict(pipeline.scheduler.config)
    before.set_timesteps(3)
    timesteps = before.timesteps.clone()
    (ours,) = generate(pipeline, generators(3, 1), Settings(STEPS, sampler))
    assert pipeline.scheduler is before and dict(before.config) == config and torch.equal(before.timesteps, timesteps)
    other = type(pipeline)(pipeline.unet, sampling_scheduler(before, "dpm" if sampler == "saved" else sampler))
    other.set_progress_bar_config(disable=True)
    theirs = other(1, generator=image_generators(3, 0, 1), num_inference_steps=STEPS).images[0]
    assert np.array_equal(pixels(ours), pixels(theirs))


@pytest.mark.parametrize("sampler", [*EDM_SAMPLERS, "saved"])
def test_a_pipeline_of_edm_draws_what_its_call_draws_and_counts_its_timesteps_down(sampler):
    pipeline = edm_pipeline()
    (ours,) = generate(pipeline, generators(2, 1), Settings(5, sampler))
    other = edm_pipeline(sampler="dpm" if sampler == "saved" else sampler)
    theirs = other(1, generator=image_generators(2, 0, 1), num_inference_steps=5).images[0]
    assert np.array_equal(pixels(ours), pixels(theirs))
    noise = drawing.starting_noise(pipeline, generators(2, 1))
    left = drawing.denoise(pipeline, noise, generators(2, 1), Settings(5, sampler))
    assert [timestep for _, _, timestep, _ in left] == [999, 749, 500, 250, 0]


def test_the_page_offers_a_pipeline_of_edm_the_samplers_that_it_has(pipelines):
    choices = [[key for _, key in option_fields(one)[1].choices] for one in (edm_pipeline(), pipelines["ddpm"])]
    assert choices == [["saved", "dpm", "ddim"], ["saved", "dpm", "unipc", "ddim", "ddpm"]]
    assert "DPM-Solver++" in option_fields(edm_pipeline())[1].choices[0][0]
    assert read_settings(edm_pipeline(), (5, "ddim")).sampler == "ddim"
    with pytest.raises(gr.Error, match="Choose a sampler"):
        read_settings(edm_pipeline(), (5, "unipc"))


def test_the_samplers_draw_different_images(pipelines):
    drawn = [pixels(generate(pipelines["ddpm"], generators(3, 1), Settings(STEPS, name))[0]) for name in SAMPLERS]
    assert len({image.tobytes() for image in drawn}) == len(SAMPLERS)


def test_a_number_of_steps_for_which_diffusers_adds_one_draws_what_the_call_draws():
    torch.manual_seed(0)
    schedule = sampling_scheduler(noise_schedule("linear", 100), "dpm")
    pipeline = DDPMPipeline(UNetBase(8, block_out_channels=(4, 8), time_embedding_dim=6).eval(), schedule)
    pipeline.set_progress_bar_config(disable=True)
    (ours,) = generate(pipeline, generators(2, 1), Settings(steps=29))
    theirs = pipeline(1, generator=image_generators(2, 0, 1), num_inference_steps=29).images[0]
    assert np.array_equal(pixels(ours), pixels(theirs))


def test_a_pipeline_of_diffusers_own_draws_what_its_call_draws():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = diffusers.UNet2DModel(8, 1, 1, block_out_channels=(8,), norm_num_groups=4, **blocks)
    pipeline = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(20))
    pipeline.set_progress_bar_config(disable=True)
    (ours,) = generate(pipeline, generators(2, 1), Settings(steps=5))
    theirs = pipeline(1, generator=image_generators(2, 0, 1), num_inference_steps=5).images[0]
    assert ours.mode == "L" and np.array_equal(pixels(ours), pixels(theirs))
    assert drawing.describe(pipeline).startswith("Diffusion (DDPM) · 8 × 8 pixels · ")


@pytest.mark.parametrize("name", ["gan", "vae", "ddpm"])
def test_the_ends_of_the_way_are_the_images_of_the_seeds_and_the_middle_is_neither(pipelines, name):
    settings = Settings(STEPS, "dpm")
    ends = [pixels(generate(pipelines[name], generators(seed, 1), settings)[0]) for seed in (4, 9)]
    way = [pixels(image) for image in interpolate(pipelines[name], (4, 9), [0, 0.5, 1], settings)]
    assert np.array_equal(way[0], ends[0]) and np.array_equal(way[2], ends[1])
    assert min(np.abs(way[1] - end).mean() for end in ends) > 1


def test_the_way_keeps_the_length_of_normal_latents():
    start, end = torch.randn(2, 400, generator=torch.Generator().manual_seed(0))
    middle = drawing.spherical(torch.stack([start, end]), [0.5])[0]
    assert middle.norm().item() == pytest.approx((start.norm() + end.norm()).item() / 2, rel=1e-5)
    # Half way it makes the same angle with both.
    cosines = [torch.cosine_similarity(middle, one, dim=0).item() for one in (start, end)]
    assert cosines[0] == pytest.approx(cosines[1], abs=1e-5)
    torch.testing.assert_close(drawing.spherical(torch.stack([start, start]), [0.3])[0], start)


# ------------------------------------------------------------------------------------------------------------- uploads


def upload(folder, name, image, **options):
    image.save(folder / name, **options)
    return folder / name


def noise(mode="RGB", size=(50, 31)):
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    levels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
    return Image.fromarray(levels, mode)


@pytest.fixture
def unusual_files(tmp_path):
    rotated = Image.Exif()
    rotated[0x0112] = 6
    grey16 = Image.fromarray(np.random.default_rng(0).integers(0, 65536, (40, 30)).astype(np.uint16))
    palette = noise().quantize(9)
    return [
        upload(tmp_path, "plain.png", noise()),
        upload(tmp_path, "odd.bmp", noise(size=(33, 64))),
        upload(tmp_path, "transparent.png", noise("RGBA")),
        upload(tmp_path, "grey.webp", noise("L"), lossless=True),
        upload(tmp_path, "grey16.png", grey16),
        upload(tmp_path, "cmyk.jpg", noise("CMYK")),
        upload(tmp_path, "rotated.jpg", noise(), exif=rotated),
        upload(tmp_path, "large.jpg", noise(size=(300, 200))),
        upload(tmp_path, "animated.gif", palette, save_all=True, append_images=[palette.rotate(180)]),
        upload(tmp_path, "palette.png", palette, transparency=3),
        upload(tmp_path, "strip.tiff", noise(size=(200, 1))),
    ]


def test_an_upload_is_read_as_reconstruct_reads_it(unusual_files):
    for file in unusual_files:
        ours, theirs = open_upload(str(file), (16, 16)), open_image(file, 16)
        assert ours.mode == "RGB" and np.array_equal(pixels(ours), pixels(theirs)), file.name


def test_what_cannot_be_read_is_refused_with_a_sentence(tmp_path, monkeypatch):
    whole = upload(tmp_path, "whole.png", noise()).read_bytes()
    floats = Image.fromarray(np.zeros((4, 4), np.float32))
    files = {
        "text.png": (b"no image", "not a readable image"),
        "empty.jpg": (b"", "not a readable image"),
        "truncated.png": (whole[: len(whole) // 2], "damaged"),
        "float.tiff": (upload(tmp_path, "float.tiff", floats).read_bytes(), "damaged or of an unsupported kind"),
        "postscript.png": (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
            "not a readable image",
        ),
    }
    for name, (content, sentence) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=sentence) as refusal:
            open_upload(str(tmp_path / name), (16, 16))
        assert str(tmp_path) not in str(refusal.value)
    bomb = upload(tmp_path, "bomb.png", Image.new("1", (9000, 9000)))
    for limit in (10**9, 10**6):  # Pillow's own limit is a setting of the whole process
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match="more than 64 million pixels"):
            open_upload(str(bomb), (16, 16))


# --------------------------------------------------------------------------------------------------- fields and pages


@pytest.mark.parametrize("value", [None, -1, 1.5, MAX_SEED + 1, 1e300, float("nan"), float("inf"), "7", True])
def test_a_seed_that_is_none_is_refused_with_a_sentence(value):
    with pytest.raises(Exception, match=f"Seed must be a whole number from 0 to {MAX_SEED}") as refusal:
        whole_number(value, "Seed", 0, MAX_SEED)
    assert type(refusal.value).__name__ == "Error" and not refusal.value.print_exception


def test_a_whole_number_may_come_as_a_float():
    assert whole_number(7.0, "Seed", 0, MAX_SEED) == 7 and whole_number(MAX_SEED, "Seed", 0, MAX_SEED) == MAX_SEED


def test_interpolation_takes_no_sampler_that_adds_noise(pipelines):
    assert read_settings(pipelines["ddpm"], (8, "ddpm")).sampler == "ddpm"
    for sampler in ("ddpm", "saved", None):
        with pytest.raises(Exception, match="Choose a sampler"):
            read_settings(pipelines["ddpm"], (8, sampler), between=True)


def test_truncation_counts_only_if_it_is_ticked(pipelines):
    assert read_settings(pipelines["gan"], (False, 0.5)).truncation is None
    assert read_settings(pipelines["gan"], (True, 0.5)).truncation == 0.5


def test_all_drawing_waits_in_one_queue(pipelines):
    page = build_demo(pipelines)
    queued = [function for function in page.fns.values() if function.fn is not None]
    assert len(queued) == 3 + 2 * 3 + 1 + 1 + 1  # draw, walk and interpolate; denoise, reconstruct, compare
    assert {(function.concurrency_id, function.concurrency_limit) for function in queued} == {("drawing", 1)}


@pytest.mark.parametrize(
    ("names", "tabs"),
    [
        (["gan"], {"Generate", "Interpolate"}),
        (["vae"], {"Generate", "Interpolate", "Reconstruct"}),
        (["ddpm"], {"Generate", "Interpolate", "Denoise"}),
        (["gan", "ddpm"], {"gan", "ddpm", "Compare", "Generate", "Interpolate", "Denoise"}),
    ],
)
def test_a_page_has_the_tabs_that_its_families_allow(pipelines, names, tabs):
    page = build_demo({name: pipelines[name] for name in names})
    assert {block.label for block in page.blocks.values() if type(block).__name__ == "Tab"} == tabs


@pytest.mark.parametrize(("sides", "sharp"), [((8, 16), True), ((8, 256), False)])
def test_two_pipelines_are_shown_with_sharp_pixels_unless_one_has_large_images(sides, sharp):
    demo = build_demo({str(side): edm_pipeline(side) for side in sides})
    compared = [block for block in demo.blocks.values() if getattr(block, "label", None) in ("Left", "Right")]
    classes = [block.elem_classes for block in compared if "images" in block.elem_classes]
    assert len(classes) == 2 and all(("pixels" in one) is sharp for one in classes)


def test_a_pipeline_that_draws_from_more_than_noise_is_refused(pipelines):
    class Upscaler(diffusers.DiffusionPipeline):
        def __init__(self, unet, scheduler, vae):
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler, vae=vae)

    other = Upscaler(pipelines["ddpm"].unet, pipelines["ddpm"].scheduler, pipelines["vae"].vae)
    with pytest.raises(
        ValueError, match=r"a Upscaler \(scheduler, unet, vae\) does not generate images from noise alone"
    ):
        build_demo({"upscaler": other})


# --------------------------------------------------------------------------------------------------------- the command


def test_pipelines_are_named_by_their_folders_if_these_differ(tmp_path):
    for folder in ("a/cats/pipeline", "b/cats", "dogs/best"):
        (tmp_path / folder).mkdir(parents=True)
    cats, more, dogs = (str(tmp_path / folder) for folder in ("a/cats/pipeline", "b/cats", "dogs/best"))
    assert pipeline_names([cats, dogs, "someone/cats"]) == ["cats", "dogs", "someone/cats"]
    assert pipeline_names([cats, more]) == [cats, more]
    (tmp_path / "dogs" / "best" / "launches.jsonl").touch()  # a run of that name
    assert pipeline_names([cats, dogs]) == ["cats", "best"]
    with pytest.raises(UserError, match="give each pipeline only once"):
        pipeline_names([cats, cats])


def test_a_port_in_use_and_a_host_of_another_machine_are_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port} is in use"):
            refuse_port_in_use("127.0.0.1", port)
    refuse_port_in_use("127.0.0.1", port)
    with pytest.raises(UserError, match="--host 192.0.2.1"):
        refuse_port_in_use("192.0.2.1", port)


def test_without_gradio_the_command_says_what_to_install(hfgen, monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "gradio", None)
    status, _, err = hfgen("demo", tmp_path, "--port", "59871")
    assert status == 2 and 'pip install "hfgen[demo]"' in err


@pytest.mark.parametrize("name", ["gan", "vae", "ddpm"])
def test_a_pipeline_that_has_diverged_is_said_to_be_so_and_not_shown_black(pipelines, name):
    broken = copy.deepcopy(pipelines[name])
    with torch.no_grad():
        for weight in image_network(broken).parameters():
            weight.fill_(torch.nan)
    with pytest.raises(gr.Error, match="are NaN: its training has diverged"), only_finite():
        generate(broken, generators(0, 1), Settings(steps=2))
    functions = {function.api_name: function.fn for function in build_demo({"model": broken}).fns.values()}
    options = [2, "ddim"] if name == "ddpm" else []
    with pytest.raises(gr.Error, match="are NaN"):
        functions["draw"](0, 1, *options)
