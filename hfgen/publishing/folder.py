"""The folder to publish: a pipeline with its code, card, pictures, settings and records; nothing private.

Never uploaded: checkpoints and optimizer states, logs, file names of the data, sheets with training images, and local
paths.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from hfgen.data.location import TOY_PAINTINGS, is_hub_id
from hfgen.errors import UserError
from hfgen.families import family
from hfgen.files import json_lines, read_json, read_json_lines
from hfgen.hub.card import EARLIER, REPORT_FILE, WHILE_TRAINING, write_card
from hfgen.hub.model_index import reference_name
from hfgen.inference.curves import plot_curves
from hfgen.inference.figures import denoising_steps, labelled_sheet
from hfgen.inference.gifs import progress_frames, write_gif
from hfgen.inference.opening import find_pipeline, open_pipeline
from hfgen.inference.sampling import (
    SamplingOptions,
    generate_images,
    interpolated_images,
    latents_of_seeds,
    network_digest,
    way_of_sampling,
    weights_digest,
)
from hfgen.metrics.report import read_report, to_json
from hfgen.publishing.discriminator import discriminator_of
from hfgen.publishing.half import round_to_half, round_weights, store_in_half
from hfgen.run_files import (
    DISCRIMINATOR_FILE,
    EVALUATIONS_FILE,
    EVENTS_FILE,
    INTAKE_FILE,
    METRICS_FILE,
    SCORES_FILE,
    SETTINGS_FILE,
    STATUS_FILE,
    TRAINING_FILE,
)
from hfgen.training.checkpoints import PROGRESS_FILE, final_progress
from hfgen.training.folder import BEST_FOLDER, STATUS_KEYS, read_launches, run_of
from hfgen.training.history import NEEDED, images_at
from hfgen.training.lock import holder_of


# Settings about local paths and upload targets, not about the training.
PRIVATE_SETTINGS = (
    "resume",
    "init_from",
    "cache_dir",
    "feature_weights",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "max_train_time",
    "report_to",
)
NUM_SAMPLES, DENOISING_ROWS, WALKS, WALK_STEPS, MAX_FRAMES = 16, 4, 4, 8, 24
TEXT_FILES = (".json", ".jsonl", ".md", ".py", ".txt", ".yml")


class Moment(NamedTuple):
    """When during training a pipeline was saved.

    Attributes:
        step: number of updates.
        seconds: of training; None if not in the log.
        rollbacks: before it.
    """

    step: int
    seconds: float | None
    rollbacks: int


def make_publication(
    source: Path,
    target: Path,
    repo_id: str,
    scores: Path | None = None,
    license_id: str | None = None,
    half: bool = False,
    discriminator: bool = False,
) -> None:
    """Write everything to publish into a new folder.

    Args:
        source: a run, its `best/`, one of its checkpoints, or a pipeline folder.
        target: empty or non-existent folder.
        repo_id: "owner/name", for the card.
        scores: a folder from `hfgen evaluate`, or the `evaluation.json` in it.
        license_id: licence of the weights, for the card.
        half: store the weights as 16-bit floats; the pictures are then made with these.
        discriminator: also write the weights of the discriminator.

    Raises:
        UserError: if there is no pipeline or discriminator, the scores belong to other weights or another way of
            sampling, a local path would be published, or a weight is too large for 16 bits.
    """
    folder = find_pipeline(source)
    pipeline, run = open_pipeline(str(folder), plain=True), run_of(folder)
    digests, network = [weights_digest(pipeline)], network_digest(pipeline)
    opponent = _opponent(pipeline, folder, run) if discriminator else {}
    if half:
        round_to_half(pipeline)
        round_weights("discriminator", opponent)
        digests.append(weights_digest(pipeline))
    report = None if scores is None else scores_of(scores, digests)
    if report is not None:
        refuse_other_sampling(f"--scores {scores}", report, pipeline)
    pipeline.save_pretrained(target)
    if opponent:
        (target / DISCRIMINATOR_FILE).parent.mkdir()
        save_file(opponent, target / DISCRIMINATOR_FILE, metadata={"format": "pt"})
    if half:
        store_in_half(target)
    if report is not None:
        report["reference"] = reference_name(report["reference"])
        (target / REPORT_FILE).write_text(to_json(report))
    save_pictures(pipeline, target / "samples", (report or {}).get("num_inference_steps"))
    if run is not None:
        add_records_of_run(run, folder, target, network)
        add_pictures_of_run(run, target / "samples")
    write_card(target, repo_id, license_id)
    private = [Path.home(), Path.cwd(), source.expanduser().resolve(), *([run.resolve()] if run else [])]
    refuse_private_paths(target, [str(path) for path in private])


def _opponent(pipeline: DiffusionPipeline, folder: Path, run: Path | None) -> dict[str, torch.Tensor]:
    """Return the weights of the discriminator that the pipeline in a folder was trained against."""
    step = None if run is None else moment_of(run, folder, ()).step
    return discriminator_of(pipeline, folder, run, step)


def scores_of(scores: Path, digests: Sequence[str]) -> dict[str, Any]:
    """Read a report of `hfgen evaluate`.

    Args:
        scores: its folder or file.
        digests: of the trained weights and, if they are rounded to 16 bits for publishing, of the rounded ones.

    Raises:
        UserError: if it is not a report, or belongs to other weights.
    """
    file = scores / REPORT_FILE if scores.is_dir() else scores
    try:
        report = read_report(file)
        digest = report.get("weights_sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--scores {scores}: contains no {REPORT_FILE} from hfgen evaluate ({error!r})") from error
    if digest not in digests:
        raise UserError(
            f"--scores {scores}: these scores belong to other weights; run hfgen evaluate for this pipeline"
        )
    return {**report, "before_rounding": True} if digest != digests[-1] else report


def refuse_other_sampling(argument: str, report: dict[str, Any], pipeline: DiffusionPipeline) -> None:
    """Raise a `UserError` if images were sampled for a report in another way than the pipeline samples by default."""
    options = {"sampler": "--sampler", "sample_from": "--sample_from"}
    for name, own in way_of_sampling(pipeline).items():
        if report.get(name, own) != own:
            raise UserError(
                f"{argument}: measured with {report[name]}, but this pipeline samples with {own}; run hfgen evaluate "
                f"without {options[name]}"
            )


def save_pictures(pipeline: DiffusionPipeline, folder: Path, num_inference_steps: int | None) -> None:
    """Generate the card's pictures of a pipeline: samples, and interpolations or the denoising."""
    folder.mkdir(exist_ok=True)
    images = list(generate_images(pipeline, SamplingOptions(NUM_SAMPLES, 0, num_inference_steps, NUM_SAMPLES)))
    numbers = [str(index) for index in range(NUM_SAMPLES)]
    labelled_sheet(images, title="seed 0; image numbers below", captions=numbers).save(folder / "sheet.png")
    if family(pipeline) == "ddpm":
        states, heads, _ = denoising_steps(pipeline, DENOISING_ROWS, 0, num_inference_steps)
        labelled_sheet(states, len(heads), heads=heads).save(folder / "denoising.png")
        return
    ends = latents_of_seeds(pipeline, range(WALKS + 1), None)
    parts = [step / (WALK_STEPS - 1) for step in range(WALK_STEPS)]
    walks = interpolated_images(pipeline, ends, parts, spherical=True)
    heads = ["a = 0", *(f"{step}/{WALK_STEPS - 1}" for step in range(1, WALK_STEPS - 1)), "1"]
    names = [f"seed {seed} to {seed + 1}" for seed in range(WALKS)]
    labelled_sheet(walks, WALK_STEPS, heads=heads, names=names).save(folder / "interpolation.png")


def add_pictures_of_run(run: Path, folder: Path) -> None:
    """Add a GIF of the training and its curves, if the run has the files for them."""
    try:
        frames = progress_frames(run)
    except UserError:  # no sheets, or different sizes
        frames = []
    if len(frames) > 1:
        shown = [frames[round(index * (len(frames) - 1) / (MAX_FRAMES - 1))] for index in range(MAX_FRAMES)]
        shown = frames if len(frames) <= MAX_FRAMES else shown
        write_gif([*shown, *shown[-1:] * 3], folder / "progress.gif", frame_seconds=0.5)
    if read_json_lines(run / METRICS_FILE, NEEDED):
        plot_curves([run]).savefig(folder / "curves.png", dpi=80)


def add_records_of_run(run: Path, pipeline_folder: Path, target: Path, digest: str) -> None:
    """Write the settings, log and scores of the training, without private information.

    Args:
        run: folder of the run.
        pipeline_folder: what is published of it.
        target: where to write.
        digest: `network_digest` of it; a checkpoint of a VAE has another density than what was scored at its step.
    """
    settings = read_json(run / SETTINGS_FILE, ("output_dir", "dataset", "streaming"))
    name, on_hub, intake = data_of(run, settings)
    public = {key: value for key, value in settings.items() if key not in PRIVATE_SETTINGS}
    public |= {"output_dir": Path(settings["output_dir"]).resolve().name, "dataset": name}
    if (start := settings.get("init_from")) is not None:
        public["init_from"] = start if is_hub_id(start) else Path(start).resolve().name
    _write_json(target / SETTINGS_FILE, public)

    log = read_json_lines(run / METRICS_FILE, (*NEEDED, "images"))
    moment = moment_of(run, pipeline_folder, log)
    launches, status = read_launches(run), read_json(run / STATUS_FILE, STATUS_KEYS)
    training = {
        "end": end_of(status, moment.step, holder_of(run) is not None),
        "step": moment.step,
        "seconds": moment.seconds,
        "images": images_at(log, moment.step),
        # A launch that started at this step came after it, unless it was the first.
        "launches": [public_launch(launch) for launch in launches if launch["from_step"] < max(moment.step, 1)]
        or [public_launch(launch) for launch in launches[:1]],
        "rollbacks": moment.rollbacks,
        "data": {"name": name, "on_hub": on_hub, **summary_of_intake(intake)},
    }
    _write_json(target / TRAINING_FILE, training)
    if log:
        _write_json_lines(target / METRICS_FILE, log)
    evaluations = read_json_lines(run / EVALUATIONS_FILE, ("step",))
    if evaluations:
        _write_json_lines(target / EVALUATIONS_FILE, evaluations)
    kept = pipeline_folder.resolve().parent / SCORES_FILE  # of the best pipeline: a rollback may repeat its step
    scored = [read_json(kept, ("step",))] if kept.is_file() else evaluations
    # Earlier versions did not note the network.
    own = [one for one in scored if one["step"] == moment.step and one.get("network_sha256", digest) == digest]
    if own:
        _write_json(target / SCORES_FILE, own[-1])


def public_launch(launch: dict[str, Any]) -> dict[str, Any]:
    """Return what is noted of a launch, of changed settings that hold paths only the names."""
    if "changed_settings" not in launch:
        return launch
    changes = [
        text.split(":")[0] if text.split(":")[0] in PRIVATE_SETTINGS else text for text in launch["changed_settings"]
    ]
    return {**launch, "changed_settings": changes}


def end_of(status: dict[str, Any], step: int, is_running: bool) -> str:
    """Describe how training ended for a pipeline of this step, from the run's `status.json`, in public words."""
    if step < status["step"]:
        return f"{EARLIER} of a run that continued to step {status['step']:,}"
    if status["status"] == "failed":  # whose message may name files of this machine
        return f"an error after step {step:,}"
    if status["status"] != "running":
        return status["reason"]
    return WHILE_TRAINING if is_running else f"killed after step {step:,}"


def data_of(run: Path, settings: dict[str, Any]) -> tuple[str, bool, dict[str, Any] | None]:
    """Return the public name of the training data, whether it is a Hub dataset, and its intake report."""
    file = run / INTAKE_FILE
    remedy = f"delete it: {SETTINGS_FILE} says what the data are, and the card calls the rest unknown"
    intake = read_json(file, ("source",), remedy) if file.is_file() else None
    dataset = settings["dataset"]
    on_hub = settings["streaming"] or (intake is not None and intake["source"].startswith("Hub dataset"))
    # Not by `is_path`: the data may have moved since the training.
    is_local = not on_hub and not TOY_PAINTINGS.fullmatch(dataset)
    if not is_local:
        return dataset, on_hub, intake
    # As it was called when the training began: "." may be another folder now. Earlier versions did not note it.
    return (intake or {}).get("name") or Path(dataset).expanduser().resolve().name, on_hub, intake


def moment_of(run: Path, pipeline_folder: Path, log: Sequence[dict[str, Any]]) -> Moment:
    """Determine when a pipeline was saved: at the end, at the best score, or with a checkpoint."""
    above, status = pipeline_folder.resolve().parent, read_json(run / STATUS_FILE, STATUS_KEYS)
    # Of runs that began with an earlier version, some files lack the rollbacks.
    events = read_json_lines(run / EVENTS_FILE)
    saved = {"step": status["step"], "rollbacks": sum(event.get("event") == "rollback" for event in events)}
    if (above / PROGRESS_FILE).is_file():
        saved |= read_json(above / PROGRESS_FILE, ("step", "seconds"))
    elif above.name == BEST_FOLDER:
        saved |= read_json(above / SCORES_FILE, ("step",))
    else:
        saved |= final_progress(pipeline_folder)
    step = saved["step"]
    logged = next((entry["seconds"] for entry in log if entry["step"] >= step), None)
    at_the_end = status["seconds"] if step == status["step"] else logged
    return Moment(step, saved.get("seconds", at_the_end), saved["rollbacks"])


def summary_of_intake(intake: dict[str, Any] | None) -> dict[str, Any]:
    """Return the counts of an intake report, without file names; empty without a report."""
    if intake is None:
        return {"images": None, "training_images": None, "sample_size": None, "intake": {}, "warnings": []}
    near = intake["near_duplicates"]
    low, median, high = intake["short_side"]
    counts = {
        key: ", ".join(f"{name}: {count:,}" for name, count in intake[key].items())
        for key in ("formats", "modes", "sizes")
    }
    return {
        "images": intake["images"],
        "training_images": intake["training_images"],
        "sample_size": intake["sample_size"],
        "intake": counts
        | {
            "short side": f"{low} to {high}, median {median} pixels",
            "enlarged": intake["upsampled"],
            "unreadable": len(intake["unreadable"]),
            "exact duplicates": sum(len(group) - 1 for group in intake["exact_duplicates"]),
            "of these removed": intake["dropped"],
            "near duplicates": "not searched" if near is None else sum(len(group) - 1 for group in near),
        },
        "warnings": intake["warnings"],
    }


def refuse_private_paths(folder: Path, paths: Sequence[str]) -> None:
    """Raise a `UserError` if a text file in a folder to publish contains a local path."""
    for file in sorted(folder.rglob("*")):
        if file.suffix in TEXT_FILES:
            text = file.read_text(encoding="utf-8")
            for path in paths:
                # Not as part of a longer word: "/cats" also occurs in "huggan/cats".
                if len(path) > 1 and re.search(rf"(?<![\w.-]){re.escape(path)}(?!\w)", text):
                    raise UserError(f"{file.name} would publish {path}, a path on this machine; nothing was uploaded")


def _write_json_lines(file: Path, entries: Sequence[dict[str, Any]]) -> None:
    file.write_text(json_lines(entries))


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
