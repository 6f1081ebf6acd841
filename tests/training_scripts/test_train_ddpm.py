"""`training_scripts/train_ddpm.py`, end to end, at toy size."""

import json
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import load_script
from PIL import Image
from run_files import state_of
from safetensors.torch import load_file

from hfgen.errors import UserError
from hfgen.integrity import record_digests
from hfgen.pipelines import DDPMPipeline
from hfgen.training.run import Run


pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "training_scripts" / "train_ddpm.py"
TINY = [
    *("--dataset", "toy_paintings:24", "--sample_size", "16", "--block_out_channels", "8", "16", "--batch_size", "4"),
    *("--max_train_steps", "6", "--checkpoint_every", "2", "--checkpoints_total_limit", "9", "--log_every", "1"),
    *(
        "--num_inference_steps",
        "2",
        "--num_sample_images",
        "4",
        "--report_to",
        "none",
        "--lr_warmup_steps",
        "2",
        "--cpu",
    ),
]


@pytest.fixture(scope="module")
def train_ddpm():
    return load_script("train_ddpm")


def train(module, folder, *arguments):
    module.main([*TINY, "--output_dir", str(folder), *arguments])
    return weights(folder)


def weights(folder):
    return load_file(folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")


def assert_equal_weights(one, other):
    assert one.keys() == other.keys() and len(one) > 10
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("unet", ["base", "attention", "library", "compact"])
def test_a_resumed_run_ends_bit_equal_to_an_uninterrupted_one(train_ddpm, tmp_path, unet):
    folder = tmp_path / "run"
    edm = ["--formulation", "edm", "--match_noise"] if unet == "compact" else []
    augmented = [*edm, "--unet", unet, "--horizontal_flip", "--random_rotation", "10", "--random_erasing", "0.5"]
    uninterrupted = train(train_ddpm, folder, *augmented)
    states = [torch.load(folder / "checkpoints" / "step-00000006" / "state.pt", weights_only=True)]
    resumed = train(train_ddpm, folder, *augmented, "--resume", str(folder / "checkpoints" / "step-00000002"))
    states.append(torch.load(folder / "checkpoints" / "step-00000006" / "state.pt", weights_only=True))
    assert_equal_weights(uninterrupted, resumed)
    assert_equal_weights(states[0]["unet"], states[1]["unet"])
    assert states[0]["optimizer"]["state"].keys() == states[1]["optimizer"]["state"].keys()
    for index, moments in states[0]["optimizer"]["state"].items():
        assert_same = states[1]["optimizer"]["state"][index]
        assert all(torch.equal(moments[key], assert_same[key]) for key in moments)


@pytest.mark.slow
def test_a_checkpoint_in_another_memory_format_goes_on_alike(train_ddpm, tmp_path):
    """One from a GPU, say: a fused optimizer would match its moments with the wrong weights."""
    folder, compact = tmp_path / "run", ["--unet", "compact"]
    uninterrupted = train(train_ddpm, folder, *compact)
    file = folder / "checkpoints" / "step-00000002" / "state.pt"
    state = torch.load(file, weights_only=True)
    turned = 0
    for moments in state["optimizer"]["state"].values():
        for key, value in moments.items():
            if value.ndim == 4:
                moments[key] = value.contiguous(memory_format=torch.channels_last)
                turned += moments[key].stride() != value.stride()
    assert turned > 10
    torch.save(state, file)
    record_digests(file.parent, ("progress.json", "state.pt"))
    resumed = train(train_ddpm, folder, *compact, "--resume", str(file.parent))
    assert_equal_weights(uninterrupted, resumed)


def test_a_run_killed_at_any_moment_and_resumed_ends_bit_equal(train_ddpm, programs, tmp_path):
    """The real thing: processes killed with -9 while they train, the same command until it is done."""
    uninterrupted = train(train_ddpm, tmp_path / "uninterrupted", "--max_train_steps", "40")
    folder = tmp_path / "killed"
    arguments = [*TINY, "--output_dir", str(folder), "--resume", "latest"]
    arguments += ["--max_train_steps", "40", "--checkpoint_every", "3", "--checkpoints_total_limit", "2"]
    for lines in (5, 22):  # killed as soon as so many steps are logged, wherever in a step or a checkpoint that is
        program = programs.start(SCRIPT, *arguments)
        wait_for_lines(folder / "metrics.jsonl", lines, program)
        program.send_signal(signal.SIGKILL)
        assert program.wait() == -signal.SIGKILL
        assert not (folder / "pipeline").exists()
    assert programs.run(SCRIPT, *arguments).returncode == 0
    assert_equal_weights(uninterrupted, weights(folder))
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 41))
    starts = [json.loads(line)["from_step"] for line in (folder / "launches.jsonl").read_text().splitlines()]
    assert len(starts) == 3 and starts[0] == 0 < starts[1] < starts[2]


def wait_for_lines(log, count, program):
    """Wait until a running program has written so many lines."""
    deadline = time.monotonic() + 300
    while not (log.is_file() and len(log.read_text().splitlines()) >= count):
        assert program.poll() is None and time.monotonic() < deadline, program.errors.read_text()
        time.sleep(0.002)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_heeded_while_a_sheet_is_drawn(programs, tmp_path, number):
    """A preempted machine leaves half a minute: a sheet of a thousand steps must not use it up."""
    folder = tmp_path / "run"
    drawing = ["--num_inference_steps", "1000", "--num_sample_images", "64", "--sample_every", "1"]
    arguments = [*TINY, "--output_dir", folder, "--resume", "latest"]
    assert programs.run(SCRIPT, *arguments, "--max_train_steps", "1").returncode == 0
    program = programs.start(SCRIPT, *arguments, *drawing, "--max_train_steps", "50")
    wait_for_lines(folder / "launches.jsonl", 2, program)
    time.sleep(1)  # by now the update is done and its sheet has begun; if not, the test is only easier to pass
    program.send_signal(number)
    ended = program.ended()
    assert ended.returncode == 128 + number
    why = "stopped by SIGTERM" if number == signal.SIGTERM else "interrupted by Ctrl-C"
    assert f"{why}: step 2 of 50" in ended.stdout
    assert (folder / "checkpoints" / "step-00000002").is_dir()
    assert not (folder / "samples" / "step-00000002.png").exists()


def test_a_run_whose_time_is_up_still_draws_its_last_sheet(train_ddpm, tmp_path):
    train(train_ddpm, tmp_path / "run", "--max_train_time", "0.001s", "--sample_every", "0")
    assert [path.name for path in (tmp_path / "run" / "samples").iterdir()] == ["step-00000001.png"]


@pytest.mark.slow
def test_the_loss_of_a_few_images_falls(train_ddpm, tmp_path):
    settings = ["--max_train_steps", "80", "--learning_rate", "2e-3", "--checkpoint_every", "0", "--unet", "library"]
    train(train_ddpm, tmp_path / "run", *settings, "--dataset", "toy_paintings:4", "--block_out_channels", "16", "32")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-20:]) < 0.35 * sum(losses[:20])


@pytest.mark.parametrize("count", [100, 1000])
def test_every_timestep_is_trained_alike(train_ddpm, count):
    settings = train_ddpm.DDPMSettings(num_train_timesteps=count)
    run = SimpleNamespace(generator=lambda purpose: torch.Generator().manual_seed(3), device=torch.device("cpu"))
    images = torch.zeros(20_000, 1, 1, 1)
    _, timesteps, _, _ = train_ddpm.noised(images, images, train_ddpm.build_schedule(settings), settings, run)
    assert (timesteps.min(), timesteps.max()) == (0, count - 1)
    assert timesteps.double().mean() == pytest.approx((count - 1) / 2, rel=0.02)


def test_sheets_show_the_same_noise_throughout_the_run(train_ddpm, tmp_path):
    """With a rate of next to nothing, the images change only with the noise that they start from."""
    still = ("--learning_rate", "1e-30", "--unet", "library", "--sample_every", "2", "--max_train_steps", "4")
    train(train_ddpm, tmp_path / "run", *still)
    first, second = (tmp_path / "run" / "samples" / f"step-0000000{step}.png" for step in (2, 4))
    assert first.read_bytes() == second.read_bytes()


def test_the_learning_rate_rises_over_the_warm_up(train_ddpm, tmp_path):
    train(train_ddpm, tmp_path / "run", "--lr_warmup_steps", "4", "--learning_rate", "0.001")
    rates = [
        json.loads(line)["learning_rate"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert rates == pytest.approx([0.00025, 0.0005, 0.00075, 0.001, 0.001, 0.001])


def test_a_batch_in_parts_trains_as_a_whole_one(train_ddpm, tmp_path):
    """Exact but for the order of sums: the library U-Net has no batch norm, and fp32 has digits enough to see."""
    settings = ["--unet", "library", "--mixed_precision", "no", "--max_train_steps", "1", "--snr_gamma", "5"]
    train(train_ddpm, tmp_path / "whole", *settings)
    train(train_ddpm, tmp_path / "parts", *settings, "--gradient_accumulation_steps", "2")
    one, other = (
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0]) for name in ("whole", "parts")
    )
    assert [state_of(tmp_path / name, 1)["accumulation"]["parts"] for name in ("whole", "parts")] == [1, 2]
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        ["--prediction_type", "v_prediction", "--beta_schedule", "cosine", "--loss", "huber", "--sampler", "dpm"],
        ["--prediction_type", "sample", "--loss", "l1", "--num_train_timesteps", "100", "--sampler", "unipc"],
        ["--unet", "compact", "--patch_size", "2", "--dropout", "0.3", "--prediction_type", "v_prediction"],
        ["--unet", "compact", "--formulation", "edm", "--sampler", "ddim", "--gradient_accumulation_steps", "2"],
        ["--crop", "random", "--five_crop", "--lr_scheduler", "cosine", "--num_epochs", "0.5", "--sampler", "ddpm"],
    ],
)
def test_every_option_of_the_method_trains_and_draws(train_ddpm, tmp_path, method):
    train(train_ddpm, tmp_path / "run", *method)
    images = DDPMPipeline.from_pretrained(tmp_path / "run" / "pipeline")(2, num_inference_steps=4).images
    assert [image.size for image in images] == [(16, 16), (16, 16)]
    with Image.open(sorted((tmp_path / "run" / "samples").iterdir())[-1]) as sheet:
        assert sheet.size == (34, 34)


def test_the_first_sheet_ends_when_the_time_is_up_and_one_update_is_done(train_ddpm, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "is_time_up", property(lambda run: run.step == 0))
    train(train_ddpm, tmp_path / "run", "--max_train_steps", "1", "--sample_every", "1")
    assert [file.name for file in (tmp_path / "run" / "samples").iterdir()] == ["step-00000001.png"]


def test_without_attention_at_any_level_the_user_is_told(train_ddpm, tmp_path, capsys):
    note = "note: at --sample_size 16 no level of the U-Net has self-attention; raise --attention_size"
    for size, told in ((16, False), (4, True), (0, False)):
        given = ("--unet", "compact", "--attention_size", str(size), "--max_train_steps", "1")
        train(train_ddpm, tmp_path / f"run {size}", *given)
        assert (note in capsys.readouterr().out) is told


def test_a_sheet_of_many_images_is_generated_in_parts(train_ddpm, tmp_path, monkeypatch):
    sizes = []
    call = DDPMPipeline.__call__

    def watched(pipeline, count, **options):
        sizes.append(count)
        return call(pipeline, count, **options)

    monkeypatch.setattr(DDPMPipeline, "__call__", watched)
    train(train_ddpm, tmp_path / "run", "--num_sample_images", "70", "--max_train_steps", "1", "--sample_every", "1")
    assert set(sizes) == {32, 6} and len(sizes) % 3 == 0


def test_the_pipeline_of_a_checkpoint_draws_what_the_shipped_one_does(train_ddpm, tmp_path):
    train(train_ddpm, tmp_path / "run")
    drawn = []
    for folder in (tmp_path / "run" / "pipeline", tmp_path / "run" / "checkpoints" / "step-00000006" / "pipeline"):
        pipeline = DDPMPipeline.from_pretrained(folder)
        drawn.append(pipeline(2, torch.Generator().manual_seed(0), num_inference_steps=3, output_type="pt").images)
    assert torch.equal(*drawn)


def test_the_average_is_shipped_and_not_the_last_weights(train_ddpm, tmp_path):
    shipped = train(train_ddpm, tmp_path / "run", "--ema_decay", "0.9")
    state = torch.load(tmp_path / "run" / "checkpoints" / "step-00000006" / "state.pt", weights_only=True)
    averaged = {name.removeprefix("module."): value for name, value in state["ema"].items() if name != "n_averaged"}
    assert_equal_weights(shipped, averaged)
    assert any(not torch.equal(shipped[name], state["unet"][name]) for name in shipped)


def test_a_run_that_diverges_says_so_and_keeps_its_good_checkpoint(train_ddpm, tmp_path):
    wild = ["--learning_rate", "1e20", "--max_grad_norm", "1e30", "--lr_warmup_steps", "0", "--checkpoint_every", "1"]
    wild += ["--sample_every", "0"]
    with pytest.raises(UserError, match="not finite.*learning_rate=1e\\+20.*Last good checkpoint"):
        train(train_ddpm, tmp_path / "run", *wild)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "diverged"
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        state = torch.load(checkpoint / "state.pt", weights_only=True)
        assert all(value.isfinite().all() for value in state["unet"].values())


@pytest.mark.parametrize(
    ("widths", "groups"),
    [([48, 64], 16), ([64, 128], 32), ([8, 16], 8), ([96, 144, 192], 24), ([20, 30], 10), ([9, 16], 1)],
)
def test_the_library_network_gets_groups_that_fit_its_widths(train_ddpm, widths, groups):
    settings = train_ddpm.DDPMSettings(unet="library", block_out_channels=widths, layers_per_block=1)
    network = train_ddpm.build_unet(settings, 16)
    assert network.config.norm_num_groups == groups
    assert network(torch.zeros(2, 3, 16, 16), torch.tensor([1, 2])).sample.shape == (2, 3, 16, 16)
    settings.block_out_channels = [0, 8]
    with pytest.raises(ValueError, match="must be positive"):
        train_ddpm.build_unet(settings, 16)


def test_a_start_that_failed_is_corrected_by_the_next_command(train_ddpm, tmp_path):
    run = tmp_path / "run"
    for wrong in (["--dataset", str(tmp_path / "mistyped")], ["--sample_size", "31"]):
        for resume in ([], ["--resume", "latest"]):
            with pytest.raises(UserError):
                train(train_ddpm, run, *wrong, *resume)
    train(train_ddpm, run, "--max_train_steps", "2")
    assert json.loads((run / "intake.json").read_text())["sample_size"] == 16


def test_a_refused_resume_keeps_the_intake_report(train_ddpm, tmp_path):
    run = tmp_path / "run"
    train(train_ddpm, run, "--max_train_steps", "2")
    report = (run / "intake.json").read_text()
    with pytest.raises(UserError, match="these are not the images"):
        train(train_ddpm, run, "--max_train_steps", "2", "--dataset", "toy_paintings:25", "--resume", "latest")
    assert (run / "intake.json").read_text() == report


def test_changed_settings_are_refused_on_resume(train_ddpm, tmp_path):
    train(train_ddpm, tmp_path / "run")
    with pytest.raises(UserError, match="batch_size: 4 -> 8"):
        train(train_ddpm, tmp_path / "run", "--resume", "latest", "--batch_size", "8")


def test_the_images_may_have_moved_when_a_run_is_resumed_but_must_be_the_same(train_ddpm, tmp_path, image_folder):
    moved, run = tmp_path / "moved", tmp_path / "run"
    train(train_ddpm, run, "--dataset", str(image_folder))
    config = (run / "training_config.json").read_text()
    shutil.copytree(image_folder, moved)
    next(moved.iterdir()).unlink()
    with pytest.raises(UserError, match="--dataset: these are not the images"):
        train(train_ddpm, run, "--dataset", str(moved), "--resume", "latest")
    assert (run / "training_config.json").read_text() == config
    shutil.copytree(image_folder, moved, dirs_exist_ok=True)
    train(train_ddpm, run, "--dataset", str(moved), "--resume", "latest")
    assert json.loads((run / "training_config.json").read_text())["dataset"] == str(moved)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--sample_size", "30", "--unet", "base", "--block_out_channels", "8", "8", "8"], "multiple of 4"),
        (["--batch_size", "6", "--gradient_accumulation_steps", "4"], "--batch_size 6 must be a multiple"),
        (["--dataset", "nowhere/at/all"], "--dataset nowhere/at/all: no such file or folder"),
        (["--num_inference_steps", "2000"], "--num_inference_steps 2000"),
        (["--unet", "compact", "--patch_size", "3"], "patch_size=3: it must be a multiple of 6"),
        (["--patch_size", "2"], "--patch_size 2: only for --unet compact; give --patch_size 1 with --unet base"),
        (["--dropout", "0.3"], "--dropout 0.3: only for --unet compact"),
        (["--layers_per_block", "3"], "--layers_per_block 3: only for --unet library or compact"),
        (["--unet", "compact", "--patch_size", "0"], "--patch_size 0: must be positive"),
        (["--unet", "library", "--block_out_channels", "1", "2"], r"\(1, 2\): the last must be at least 8"),
        (["--dropout", "1"], "--dropout 1.0: must be from 0 to below 1"),
        (["--snr_gamma", "5", "--loss", "l1"], "--snr_gamma 5: its weights are those of --loss l2, not l1"),
        (["--formulation", "edm"], "--formulation edm needs --unet compact"),
        (
            ["--formulation", "edm", "--unet", "compact", "--num_train_timesteps", "99"],
            "--num_train_timesteps 99: EDM",
        ),
        (["--formulation", "edm", "--unet", "compact", "--sampler", "ddpm"], "--sampler ddpm: .* use ddim or dpm"),
        (["--formulation", "edm", "--unet", "compact", "--snr_gamma", "5"], "--snr_gamma 5.0: EDM has its own"),
    ],
)
def test_bad_input_is_named(train_ddpm, tmp_path, arguments, told):
    with pytest.raises(UserError, match=told):
        train(train_ddpm, tmp_path / "run", *arguments)


def test_a_mistake_ends_in_one_line_and_status_2(programs, tmp_path):
    result = programs.run(SCRIPT, *TINY, "--output_dir", tmp_path / "run", "--dataset", "./nowhere")
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1] == "error: --dataset ./nowhere: no such file or folder"
    assert "Traceback" not in result.stderr


# Settings by their names in a network's configuration.
OF_NETWORKS = ("block_out_channels", "layers_per_block", "patch_size", "attention_size", "dropout")


@pytest.mark.parametrize(
    "preset", sorted(path.stem for path in (ROOT / "training_scripts" / "presets" / "ddpm").glob("*.json"))
)
def test_every_preset_is_valid_and_builds_its_network(train_ddpm, preset):
    _, data, method = train_ddpm.parse_settings(
        (train_ddpm.RunSettings, train_ddpm.DataSettings, train_ddpm.DDPMSettings),
        train_ddpm.PRESETS,
        ["--preset", preset],
    )
    with torch.device("meta"):
        network = train_ddpm.build_unet(method, data.sample_size)
    assert network.config.sample_size == data.sample_size
    for name in OF_NETWORKS if method.unet == "compact" else OF_NETWORKS[:2]:
        if name in network.config and (value := getattr(method, name)) is not None:
            built = network.config[name]
            assert (list(built) if isinstance(value, list) else built) == value, name
    assert network.config.get("time_scale", 1) == (1000 if method.formulation == "edm" else 1)


def test_two_processes_train_together_and_resume_exactly(programs, tmp_path):
    folder = tmp_path / "run"
    arguments = [str(SCRIPT), *TINY, "--mixed_precision", "no", "--output_dir", str(folder)]
    assert [rank.returncode for rank in programs.run_ranks(2, *arguments)] == [0, 0]
    assert json.loads((folder / "launches.jsonl").read_text())["num_processes"] == 2
    first = weights(folder)
    assert [json.loads(line)["images"] for line in (folder / "metrics.jsonl").read_text().splitlines()][-1] == 48
    state = torch.load(folder / "checkpoints" / "step-00000006" / "state.pt", weights_only=True)
    assert len(state["batches"]) == 2

    resume = ["--resume", str(folder / "checkpoints" / "step-00000002")]
    assert [rank.returncode for rank in programs.run_ranks(2, *arguments, *resume)] == [0, 0]
    assert_equal_weights(first, weights(folder))
    launches = [json.loads(line) for line in (folder / "launches.jsonl").read_text().splitlines()]
    assert [(entry["num_processes"], entry["from_step"]) for entry in launches] == [(2, 0), (2, 2)]
