"""What goes into a published folder of a run: all that belongs there, and nothing private."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from edm_pipelines import edm_pipeline
from hub_client import contents, digest_of
from labelled_sheets import tiles
from PIL import Image
from published_toys import FAMILIES, files_to_publish
from safetensors.torch import load_file
from toy_runs import checkpoint, script, train

from hfgen.errors import UserError
from hfgen.inference.figures import denoising_steps
from hfgen.inference.opening import open_pipeline
from hfgen.inference.sampling import SamplingOptions, network_digest
from hfgen.integrity import record_digests
from hfgen.publishing import folder as publication
from hfgen.publishing import records
from hfgen.publishing.folder import make_publication, refuse_private_paths, run_of
from hfgen.publishing.publish import prepare
from hfgen.training.history import images_at
from hfgen.training.lock import lock_folder


pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SECRETS = ("patient", "clinic")  # in the names of files and of the folders above them


@pytest.fixture(scope="module")
def published(runs, tmp_path_factory):
    """The published folder of each toy run."""
    root = tmp_path_factory.mktemp("published")
    for name, run in runs.items():
        make_publication(run, root / name, f"tester/{name}")
    return root


def publish(source, target, **options):
    """Make a publication; return it and what is in its files of JSON by name."""
    make_publication(source, target, "tester/toy", **options)
    return {file.name: json.loads(file.read_text()) for file in target.glob("*.json")}


def make_pictures(folder: Path) -> Path:
    """Nine pictures with telling names, of which two are equal and two are nearly so, and two that cannot be read."""
    folder.mkdir(parents=True)
    for index in range(7):
        noise = np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"patient-{index}.png")
    shutil.copy(folder / "patient-0.png", folder / "patient-0 again.png")
    picture = np.asarray(Image.open(folder / "patient-1.png")).copy()
    picture[0, 0] += 1
    Image.fromarray(picture).save(folder / "patient-1 nearly.png")
    (folder / "patient-broken.png").write_bytes(b"no picture")
    (folder / "patient-half.png").write_bytes((folder / "patient-2.png").read_bytes()[:200])
    return folder


# ---------------------------------------------------------------------------------------------------------- what it is


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_the_pipeline_with_its_code_pictures_figures_and_card(name, runs, published):
    assert contents(published / name).keys() == files_to_publish(name)
    assert digest_of(open_pipeline(str(published / name), "cpu", plain=True)) == digest_of(
        open_pipeline(str(runs[name]), "cpu", plain=True)
    )
    for picture in (published / name / "samples").iterdir():
        with Image.open(picture) as image:
            assert image.size > (32, 16) and np.asarray(image.convert("RGB")).std() > 5, picture


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_stored_in_half_take_half_the_space_and_load_as_rounded(name, runs, tmp_path):
    make = prepare if name == "vae" else make_publication  # the first also loads it without hfgen, in seconds
    make(runs[name], tmp_path / name, f"tester/{name}", half=True)
    opened, original = (open_pipeline(str(folder), "cpu", plain=True) for folder in (tmp_path / name, runs[name]))
    for part, network in original.components.items():
        if isinstance(network, torch.nn.Module):
            loaded = getattr(opened, part).state_dict()
            for key, weights in network.state_dict().items():
                rounded = weights.half().float() if weights.is_floating_point() else weights
                assert loaded[key].dtype == weights.dtype and torch.equal(loaded[key], rounded), f"{part}.{key}"
    for file in tmp_path.glob("*/*/*.safetensors"):
        assert {str(weights.dtype) for weights in load_file(file).values()} <= {"torch.float16", "torch.int64"}
    assert "are stored as 16-bit floats and loaded as 32-bit floats" in (tmp_path / name / "README.md").read_text()


def test_weights_that_are_too_large_for_half_are_refused_by_name(runs, tmp_path):
    pipeline = open_pipeline(str(runs["gan"]), "cpu", plain=True)
    name, weights = next(iter(pipeline.generator.state_dict().items()))
    weights[0] = 1e5
    pipeline.save_pretrained(tmp_path / "large")
    message = f"--half: generator.{name} has values up to 1e\\+05, more than 16-bit floats hold; leave out --half"
    with pytest.raises(UserError, match=message):
        make_publication(tmp_path / "large", tmp_path / "published", "tester/toy", half=True)
    assert not (tmp_path / "published").exists()


def test_the_pictures_are_those_that_their_captions_tell_of(runs, published):
    # Sixteen of seed 0, as everybody can draw them; five in a walk's row are none of them.
    sheet = tiles(published / "gan" / "samples" / "sheet.png", 4, 4, 16, captions=True)
    gan = open_pipeline(str(runs["gan"]), "cpu", plain=True)
    drawn = list(publication.generate_images(gan, SamplingOptions(16, 0, None, 16)))
    assert np.array_equal(sheet.reshape(16, 16, 16, 3), np.stack([np.asarray(image) for image in drawn]))
    walks = tiles(published / "gan" / "samples" / "interpolation.png", 4, 8, 16)
    assert np.array_equal(walks[0, 0], np.asarray(drawn[0]))
    assert np.array_equal(walks[0, 7], walks[1, 0])  # a walk begins where the one above it ends
    ends = publication.latents_of_seeds(gan, [0, 1], None)
    on_the_sphere = publication.interpolated_images(gan, ends, [step / 7 for step in range(8)], spherical=True)
    assert np.array_equal(walks[0], np.stack([np.asarray(image) for image in on_the_sphere]))
    denoising = tiles(published / "ddpm" / "samples" / "denoising.png", 4, 2, 16)  # of its two steps
    ddpm = open_pipeline(str(runs["ddpm"]), "cpu", plain=True)
    # Those of `hfgen sample --seed 0`.
    finished = list(publication.generate_images(ddpm, SamplingOptions(4, 0, None, 4)))
    for row, image in enumerate(finished):
        far = [np.abs(cell.astype(float) - np.asarray(image)).mean() for cell in denoising[row]]
        assert far[-1] < 1 < far[0] and far[-1] == min(far)
    with Image.open(published / "gan" / "samples" / "progress.gif") as film:
        sheets = len(list((runs["gan"] / "samples").glob("*.png")))
        assert film.n_frames >= sheets == 4 and film.info["duration"] == 500


def test_diffusion_of_few_timesteps_is_shown_in_all_of_them(tmp_path):
    arguments = ("--num_train_timesteps", "20", "--max_train_steps", "1", "--cache_dir", str(tmp_path / "cache"))
    arguments += ("--num_inference_steps", "20")
    train("ddpm", tmp_path / "run", *arguments)
    publish(tmp_path / "run", tmp_path / "published")
    assert (tmp_path / "published" / "samples" / "denoising.png").is_file()
    assert "num_inference_steps=20).images" in (tmp_path / "published" / "README.md").read_text()


def test_a_long_film_has_so_many_frames_from_the_first_to_the_last(tmp_path):
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    for step in range(60):
        Image.new("L", (8, 8), 4 * step).save(run / "samples" / f"step-{step:08d}.png")
    (tmp_path / "to").mkdir()
    publication.add_pictures_of_run(run, tmp_path / "to")
    with Image.open(tmp_path / "to" / "progress.gif") as film:
        levels, seconds = [], 0
        for frame in range(film.n_frames):
            film.seek(frame)
            levels.append(int(np.asarray(film.convert("L"))[0, 0]))
            seconds += film.info["duration"] / 1000
    assert len(set(levels)) == publication.MAX_FRAMES and levels == sorted(levels)
    assert levels[0] == 0 and abs(levels[-1] - 236) <= 4 and seconds == pytest.approx(0.5 * (24 + 3))
    assert not (tmp_path / "to" / "curves.png").exists()


def test_the_settings_serve_as_a_preset_and_say_nothing_of_this_machine(runs, published, tmp_path):
    settings = json.loads((published / "gan" / "training_config.json").read_text())
    own = json.loads((runs["gan"] / "training_config.json").read_text())
    assert own.keys() - settings.keys() == set(records.PRIVATE_SETTINGS) >= {"push_to_hub", "hub_model_id"}
    assert {key for key in settings if settings[key] != own[key]} == {"output_dir"} and settings["output_dir"] == "gan"
    preset = ("--preset", str(published / "gan" / "training_config.json"), "--output_dir", str(tmp_path / "again"))
    script("gan").main([*preset, "--cache_dir", own["cache_dir"]])
    assert contents(tmp_path / "again" / "pipeline") == contents(runs["gan"] / "pipeline")


def test_nothing_of_the_run_is_changed_by_publishing_it(runs, tmp_path):
    before = contents(runs["vae"])
    publish(runs["vae"], tmp_path / "published")
    assert contents(runs["vae"]) == before


# --------------------------------------------------------------------------------------------- where it is taken from


def test_a_run_its_checkpoints_and_its_best_state_their_own_steps_and_images(runs, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(runs["gan"], run)
    best = run / "best"
    shutil.copytree(checkpoint(run, 4) / "pipeline", best / "pipeline")
    scores = {"step": 4, "num_images": 12, "fid": 3.0, "kid": 0.25, "copying": False, "copies": 0.0,
              "copies_expected": 0.01, "copies_by_pixels": 0.0, "copies_by_pixels_expected": 0.0}  # fmt: skip
    (best / "scores.json").write_text(json.dumps(scores))
    lines = [scores | {"step": 2, "fid": 5.0}, scores, scores | {"step": 6, "fid": 7.0}]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sources = {run: 6, run / "pipeline": 6, best: 4, best / "pipeline": 4, checkpoint(run, 2): 2}
    sources[checkpoint(run, 2) / "pipeline"] = 2
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for index, (source, step) in enumerate(sources.items()):
        told = publish(source, tmp_path / str(index))
        training = told["training.json"]
        assert (training["step"], training["images"]) == (step, step * 4)
        assert training["seconds"] == pytest.approx(log[step - 1]["seconds"], abs=0.2 if step < 6 else 60)
        assert told["scores.json"]["step"] == step and told["scores.json"]["fid"] == {2: 5.0, 4: 3.0, 6: 7.0}[step]
        assert contents(tmp_path / str(index))["evaluations.jsonl"] == (run / "evaluations.jsonl").read_bytes()
        card = (tmp_path / str(index) / "README.md").read_text()
        assert f"| steps | {step}, {step * 4} images, {step * 4 / 24:.1f} epochs |" in card
        assert f"at step {step}: FID" in card
    # A rollback may repeat the step of the best pipeline, with other weights.
    (run / "evaluations.jsonl").write_text(json.dumps(scores | {"fid": 9.0}) + "\n")
    assert publish(best, tmp_path / "kept")["scores.json"]["fid"] == 3.0
    # Nor are scores of other weights of that step.
    for digest, is_told in ((network_digest(open_pipeline(str(run), "cpu")), True), ("f" * 64, False)):
        (run / "evaluations.jsonl").write_text(json.dumps(lines[2] | {"network_sha256": digest}) + "\n")
        assert ("scores.json" in publish(run, tmp_path / digest)) is is_told
    # Without scores of that step none are published.
    (run / "evaluations.jsonl").write_text(json.dumps(lines[0]) + "\n")
    told = publish(run, tmp_path / "unscored")
    assert "scores.json" not in told and "Not measured." in (tmp_path / "unscored" / "README.md").read_text()


def test_paths_in_what_a_run_changed_of_another_are_not_published(runs, tmp_path):
    run, secret = tmp_path / "run", tmp_path / "secret" / "model"
    shutil.copytree(runs["gan"], run)
    launch = json.loads((run / "launches.jsonl").read_text())
    changes = [f"init_from: {str(secret)!r} -> None", "learning_rate: 0.1 -> 0.2"]
    (run / "launches.jsonl").write_text(json.dumps(launch | {"from_step": 2, "changed_settings": changes}) + "\n")
    told = publish(run, tmp_path / "published")["training.json"]["launches"]
    assert told[0]["changed_settings"] == ["init_from", "learning_rate: 0.1 -> 0.2"]
    for file in (tmp_path / "published").rglob("*"):
        assert file.is_dir() or b"secret" not in file.read_bytes()


def test_data_have_the_name_that_they_had_when_the_training_began(tmp_path, monkeypatch):
    for folder in ("cats", "elsewhere"):
        (tmp_path / folder).mkdir()
    for index in range(4):
        Image.new("RGB", (16, 16), (index, 9, 9)).save(tmp_path / "cats" / f"{index}.png")
    monkeypatch.chdir(tmp_path / "cats")
    train("gan", tmp_path / "run", "--dataset", ".", "--max_train_steps", "1")
    monkeypatch.chdir(tmp_path / "elsewhere")
    told = publish(tmp_path / "run", tmp_path / "published")
    assert told["training.json"]["data"]["name"] == told["training_config.json"]["dataset"] == "cats"


@pytest.mark.parametrize(
    ("start", "name"),
    [
        ("models/cats", "cats"),  # a folder, although the working folder is another one by now
        ("models/cats/pipeline", "cats"),
        ("models/cats/checkpoints/step-00000002", "cats"),
        ("models/cats/best/pipeline", "cats"),
        ("runs/best", "best"),
        ("runs/best/checkpoints/step-00000002/pipeline", "best"),
        ("runs/best/best", "best"),
        ("gone/dogs/checkpoints/step-00000002/pipeline", "dogs"),
        ("gone/pipeline/dogs", "dogs"),
        ("~/gone/best", "best"),
        ("owner/cats", "owner/cats"),  # on the Hub, although there is a folder of this name
        ("~/gone/cats", "cats"),
    ],
)
def test_what_a_run_started_from_is_called_by_its_name_or_its_id(start, name, tmp_path, monkeypatch):
    for run in ("models/cats", "runs/best"):
        for part in ("checkpoints/step-00000002/pipeline", "best/pipeline", "pipeline"):
            (tmp_path / "work" / run / part).mkdir(parents=True)
        (tmp_path / "work" / run / "launches.jsonl").touch()
    for folder in ("elsewhere", "owner/cats"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert records.name_of_start(start, tmp_path / "work" / "runs" / "few") == name


def test_images_are_counted_back_from_the_last_entry_of_the_log():
    """Here 100 steps of 4 images, of another run, were continued in batches of 10."""
    log = [{"step": step, "images": 400 + 10 * (step - 100)} for step in (110, 120, 200)]
    assert [images_at(log, step) for step in (100, 110, 150, 200)] == [400, 500, 900, 1400]
    assert images_at(log[:1], 110) == 500 and images_at([], 3) is None


def test_a_pipeline_s_folder_alone_is_of_no_run(runs, tmp_path):
    shutil.copytree(runs["ddpm"] / "pipeline", tmp_path / "pipeline")
    told = publish(tmp_path / "pipeline", tmp_path / "published")
    assert told.keys() == {"model_index.json"}
    assert run_of(tmp_path / "pipeline") is None and run_of(runs["ddpm"] / "pipeline") == runs["ddpm"].resolve()
    assert {file.name for file in (tmp_path / "published" / "samples").iterdir()} == {"sheet.png", "denoising.png"}


@pytest.mark.parametrize("name", FAMILIES)
def test_published_again_it_keeps_the_records_and_pictures_of_its_training(name, published, tmp_path):
    before = contents(published / name)
    make_publication(published / name, tmp_path / "again", f"tester/{name}")
    assert contents(tmp_path / "again") == before
    for source in (published / name, tmp_path / "half"):  # rounded, and again
        make_publication(source, tmp_path / f"{source.name}, half", f"tester/{name}", half=True)
        (tmp_path / f"{source.name}, half").rename(tmp_path / ("half" if source != tmp_path / "half" else "twice"))
    assert contents(tmp_path / "twice") == contents(tmp_path / "half")
    assert contents(tmp_path / "half").keys() == before.keys()


def test_pictures_of_large_images_do_not_become_large_files(tmp_path, monkeypatch):
    def count_rows(pipeline, rows, *others):
        asked.append(rows)
        return denoising_steps(pipeline, rows, *others)

    asked = []
    monkeypatch.setattr(publication, "denoising_steps", count_rows)
    (tmp_path / "run" / "samples").mkdir(parents=True)
    for step in (1, 2):
        Image.effect_noise((1030, 1044), 50).save(tmp_path / "run" / "samples" / f"step-{step:08d}.png")
    publication.add_pictures_of_run(tmp_path / "run", tmp_path)
    with Image.open(tmp_path / "progress.gif") as film:
        assert max(film.size) <= 768 + 14
    for side in (8, 128):
        publication.save_pictures(edm_pipeline(side), tmp_path / str(side), 2)
    assert asked == [4, 2]


def test_what_was_published_into_its_run_keeps_its_records_when_that_has_gone_on(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs["gan"], run)
    before = publish(checkpoint(run, 4), run / "published")
    assert publish(run / "published", tmp_path / "again") == before and before["training.json"]["step"] == 4


def test_what_is_private_stays_so_although_it_lies_beside_a_published_pipeline(published, tmp_path):
    shutil.copytree(published / "gan", tmp_path / "first")
    file = tmp_path / "first" / "training_config.json"
    own = json.loads(file.read_text()) | {"init_from": "cats"}
    file.write_text(json.dumps(own | {"hub_model_id": "clinic/patients", "resume": "latest"}))
    assert publish(tmp_path / "first", tmp_path / "again")["training_config.json"] == own


def test_a_run_in_a_folder_called_best_is_no_best_pipeline(runs, tmp_path):
    shutil.copytree(runs["gan"], tmp_path / "best")
    told = publish(tmp_path / "best", tmp_path / "published")["training.json"]
    assert told["step"] == json.loads((runs["gan"] / "status.json").read_text())["step"]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_who_may_read_the_index_may_read_the_weights(umask, runs, tmp_path):
    before = os.umask(umask)
    try:
        open_pipeline(str(runs["gan"]), "cpu", plain=True).save_pretrained(tmp_path / "saved")
        make_publication(runs["gan"], tmp_path / "half", "tester/toy", half=True, discriminator=True)
    finally:
        os.umask(before)
    files = list(tmp_path.rglob("*.safetensors"))
    assert len(files) == 3 and {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~umask}


def test_of_launches_those_are_told_that_the_weights_went_through(runs, tmp_path):
    run, cache = tmp_path / "run", ("--cache_dir", str(runs["gan"].parent / "cache"))
    train("gan", run, *cache)
    train("gan", run, *cache, "--resume", str(checkpoint(run, 4)))
    first, second = (json.loads(line) for line in (run / "launches.jsonl").read_text().splitlines())
    (run / "launches.jsonl").write_text(f"{json.dumps(first)}\n{json.dumps(second | {'num_processes': 3})}\n")
    launches = {}
    for step in (2, 4, 6):
        launches[step] = publish(checkpoint(run, step), tmp_path / str(step))["training.json"]["launches"]
    assert [[launch["from_step"] for launch in launches[step]] for step in (2, 4, 6)] == [[0], [0], [0, 4]]
    for step, words in ((4, "| 1 process on"), (6, "; then 3 processes on")):
        card = (tmp_path / str(step) / "README.md").read_text()
        assert words in card and ("s, in 2 launches |" in card) is (step == 6)


def test_a_run_that_continued_another_says_so_with_the_settings_that_changed(runs, tmp_path):
    run, cache = tmp_path / "run", ("--cache_dir", str(runs["gan"].parent / "cache"))
    train("gan", run, *cache, "--resume", str(checkpoint(runs["gan"], 6)), "--learning_rate", "3e-4")
    (run / "pipeline" / "progress.json").write_text('{"step": 6, "rollbacks": 1}')
    record_digests(run / "pipeline")
    publish(run, tmp_path / "published")
    card = (tmp_path / "published" / "README.md").read_text()
    start = "continued from step 6 of another run with other settings (before -> now): learning_rate: 0.0002 -> 0.0003"
    assert f"| start | {start} |" in card
    assert "| rollbacks | 1, each of which halved the learning rates |" in card
    publish(runs["gan"], tmp_path / "other")
    other = (tmp_path / "other" / "README.md").read_text()
    assert "| start |" not in other and "| rollbacks |" not in other


def test_an_unfinished_run_is_published_from_its_newest_checkpoint_and_says_so(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs["ddpm"], run)
    shutil.rmtree(run / "pipeline")
    shutil.rmtree(checkpoint(run, 6))
    status = {"status": "running", "reason": "", "step": 0, "seconds": 0.0}
    (run / "status.json").write_text(json.dumps(status))
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 7, "im')  # is being written
    lock = lock_folder(run)
    training = publish(run, tmp_path / "going on")["training.json"]
    lock.release()
    assert (training["step"], training["images"], training["end"]) == (4, 16, "published while training continued")
    assert "training ended early" not in (tmp_path / "going on" / "README.md").read_text()
    # Of a process that was killed, the status says "running" for ever.
    assert publish(run, tmp_path / "killed")["training.json"]["end"] == "killed after step 4"
    assert "Its training ended early: killed after step 4." in (tmp_path / "killed" / "README.md").read_text()
    failed = {**status, "status": "failed", "reason": "/scratch/anna/cats.zip: Input/output error", "step": 4}
    (run / "status.json").write_text(json.dumps(failed))
    assert publish(run, tmp_path / "failed")["training.json"]["end"] == "an error after step 4"
    assert "anna" not in (tmp_path / "failed" / "README.md").read_text()
    (run / "status.json").write_text(json.dumps(status | {"status": "stopped", "reason": "stopped by SIGTERM"}))
    assert publish(run, tmp_path / "stopped")["training.json"]["end"] == "stopped by SIGTERM"
    card = (tmp_path / "stopped" / "README.md").read_text()
    assert "| end | stopped by SIGTERM |" in card and "Its training ended early: stopped by SIGTERM." in card


def test_no_training_pictures_without_a_log_or_with_sheets_of_several_sizes(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs["gan"], run)
    (run / "metrics.jsonl").write_text("")
    Image.new("RGB", (3, 3)).save(run / "samples" / "step-00000009.png")
    training = publish(run, tmp_path / "published")["training.json"]
    assert training["images"] is None and training["step"] == 6
    shown = {file.name for file in (tmp_path / "published" / "samples").iterdir()}
    assert shown == {"sheet.png", "interpolation.png"}
    assert "| steps | 6 |" in (tmp_path / "published" / "README.md").read_text()


# ----------------------------------------------------------------------------------------------------- what is private


@pytest.mark.parametrize("where", ["absolute", "relative", "home", "zip"])
def test_no_path_and_no_file_name_of_the_data_leaves_the_machine(where, tmp_path, monkeypatch):
    pictures = make_pictures(tmp_path / "the clinic" / "faces")
    monkeypatch.setenv("HOME", str(tmp_path / "the clinic"))
    monkeypatch.chdir(tmp_path)
    dataset = {"absolute": pictures, "relative": "the clinic/../the clinic/faces/", "home": "~/faces"}.get(where)
    if where == "zip":
        dataset = tmp_path / "the clinic" / "faces.zip"
        with zipfile.ZipFile(dataset, "w") as archive:
            for file in pictures.iterdir():
                archive.write(file, file.name)
    run, weights = tmp_path / "clinic runs" / "toy", tmp_path / "patient weights.pt"
    train("gan", run, "--dataset", str(dataset), "--max_train_steps", "2", "--cache_dir", str(tmp_path / "patients"),
          "--feature_weights", str(weights))  # fmt: skip
    intake = json.loads((run / "intake.json").read_text())
    assert len(intake["unreadable"]) == 2 and intake["exact_duplicates"] and "patient-" in str(intake)
    told = publish(run, tmp_path / "published")
    name = "faces.zip" if where == "zip" else "faces"
    assert told["training_config.json"]["dataset"] == told["training.json"]["data"]["name"] == name
    assert told["training_config.json"]["output_dir"] == "toy" and not told["training.json"]["data"]["on_hub"]
    everything = b"\n".join(content + path.encode() for path, content in contents(tmp_path / "published").items())
    for private in (str(tmp_path), str(Path.home()), *SECRETS):
        assert private.encode() not in everything, private
    card = (tmp_path / "published" / "README.md").read_text()
    assert f"{name}: 9 images, used as 9 training images of 16 x 16 pixels." in card
    for line in ("| unreadable | 2 |", "| exact duplicates | 1 |", "| formats | PNG: 9 |", "| of these removed | 0 |",
                 "| short side | 16 to 16, median 16 pixels |", "| enlarged | 0 |", "| modes | RGB: 9 |"):  # fmt: skip
        assert line in card
    near = sum(len(group) - 1 for group in intake["near_duplicates"])
    assert near and f"| near duplicates | {near} |" in card
    assert "Only 9 images: a generator may memorise them" in card


@pytest.mark.parametrize(
    ("streaming", "source", "dataset", "name", "on_hub"),
    [
        (True, None, "tester/paintings", "tester/paintings", True),
        (False, "Hub dataset tester/paintings, split train", "tester/paintings", "tester/paintings", True),
        (False, "folder tester/paintings", "tester/paintings", "paintings", False),
        (False, "24 toy paintings", "toy_paintings:24", "toy_paintings:24", False),
        (False, "200 toy paintings", "toy_paintings", "toy_paintings", False),
        (False, "TFRecords", "~/secret/cats-*.tfrec", "cats-*.tfrec", False),
    ],
)
def test_data_of_the_hub_is_named_in_full_and_data_of_this_machine_by_its_last_part(
    streaming, source, dataset, name, on_hub, tmp_path
):
    if source:
        (tmp_path / "intake.json").write_text(json.dumps({"source": source}))
    told = records.data_of(tmp_path, {"dataset": dataset, "streaming": streaming})
    assert told[:2] == (name, on_hub) and (told[2] is None) is (source is None)


def test_a_path_of_this_machine_in_any_text_is_refused(tmp_path):
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "picture.png").write_bytes(b"/home/me \xff")
    for suffix in (".json", ".jsonl", ".md", ".py", ".txt", ".yml"):
        file = folder / "deep" / f"told{suffix}"
        for text in ('{"a": "/home/me/x"}', "see /home/me", "in '/home/me'", "/home/me\nis where"):
            file.write_text(text)
            with pytest.raises(UserError, match=f"told{suffix} would publish /home/me, a path on this machine"):
                refuse_private_paths(folder, ["/root", "/home/me"])
        # A short path may be part of a longer word, or of somebody's dataset.
        file.write_text("https://host/home/menu and huggan/home/me2 and x/home/me ")
        refuse_private_paths(folder, ["/root", "/home/me", "/", ""])
        file.unlink()


def test_a_publication_that_names_a_path_is_refused(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "data_of", lambda run, settings: (str(tmp_path / "cats"), False, None))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="would publish .*, a path on this machine; nothing was uploaded"):
        make_publication(runs["gan"], tmp_path / "published", "tester/toy")


def test_a_time_that_the_log_does_not_reach_is_unknown(tmp_path):
    best = tmp_path / "run" / "best"
    (best / "pipeline").mkdir(parents=True)
    (best / "scores.json").write_text('{"step": 20}')
    (tmp_path / "run" / "status.json").write_text('{"status": "running", "reason": "", "step": 30, "seconds": 20}')
    log = [{"step": 10, "seconds": 5.0}, {"step": 20, "seconds": 9.0}]
    assert records.moment_of(tmp_path / "run", best / "pipeline", log) == (20, 9.0, 0)
    assert records.moment_of(tmp_path / "run", best / "pipeline", log[:1]) == (20, None, 0)


def test_the_card_of_a_run_whose_prolongation_failed_is_about_its_pipeline(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs["gan"], run)
    before = publish(run, tmp_path / "before")["training.json"]
    status = {"status": "diverged", "reason": "a loss is not finite", "step": before["step"] + 3, "seconds": 1e6}
    (run / "status.json").write_text(json.dumps(status))
    (run / "events.jsonl").write_text('{"step": 8, "event": "rollback", "what": "collapse"}\n')
    training = publish(run, tmp_path / "after")["training.json"]
    assert training["end"] == f"an earlier step of a run that continued to step {before['step'] + 3}"
    assert training["seconds"] < 1e6
    of_pipeline = ("step", "images", "launches", "rollbacks")
    assert [training[key] for key in of_pipeline] == [before[key] for key in of_pipeline]
