"""The card of a published pipeline, built from the files next to it: nothing blank, and only measured results.

The text is in `TEMPLATE.md`; each of its placeholders is a field of `CardText`.
"""

import re
from dataclasses import asdict, dataclass
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from hfgen import __version__
from hfgen.files import read_json
from hfgen.hub.method import Method, describe_method, sides
from hfgen.hub.model_index import TASK, eval_results, eval_results_of_run, reference_name
from hfgen.methods.schedules import NOT_OF_EDM
from hfgen.metrics.report import read_report, score_table
from hfgen.run_files import DISCRIMINATOR_FILE, SCORES_FILE, SETTINGS_FILE, TRAINING_FILE
from hfgen.texts import markdown_text


# From `hfgen evaluate`; for what else a folder to publish may contain, see hfgen/publishing/folder.py.
REPORT_FILE = "evaluation.json"
# Description of the end of training if the run continued after this step.
EARLIER, WHILE_TRAINING = "an earlier step", "published while training continued"
# Settings that do not affect a run's weights.
SETTINGS_OF_THE_LAUNCH = frozenset(
    "output_dir resume max_train_time mixed_precision cpu log_every sample_every num_sample_images checkpoint_every "
    "checkpoints_total_limit evaluate_every evaluate_num_images best_by feature_weights push_to_hub hub_model_id "
    "hub_private_repo report_to".split()
)
CLOSING = "This card was written by hfgen {version} from the files in this repo."
# file in samples/ -> caption
SAMPLES = {
    "sheet.png": "uncurated samples, seed 0",
    "interpolation.png": "spherical interpolation between two latents, one pair per row",
    "denoising.png": "denoising, from noise on the left to the image on the right",
}
COURSE = {
    "progress.gif": "samples from the same random numbers over the course of training",
    "curves.png": "training curves: losses, and scores if measured",
}


@dataclass(frozen=True)
class CardText:
    """The sections of a card, as Markdown; none may be empty."""

    title: str
    summary: str
    pictures: str
    usage: str
    departures: str
    data: str
    training: str
    scores: str
    memorisation: str
    limits: str
    licence: str
    closing: str

    def __post_init__(self):
        for name, text in asdict(self).items():
            if not text.strip():
                raise ValueError(f"the card's section {name!r} is empty")


def write_card(folder: Path, repo_id: str, license_id: str | None = None) -> ModelCard:
    """Write `README.md` into a folder to publish.

    Args:
        folder: contains the pipeline and optionally `training_config.json`, `training.json`, `evaluation.json`,
            `scores.json` and `samples/`; the card calls missing information unknown or unmeasured.
        repo_id: "owner/name".
        license_id: Hub licence id for the weights, such as "apache-2.0"; None if undecided.
    """
    settings, training = _read(folder / SETTINGS_FILE), _read(folder / TRAINING_FILE)
    report = read_report(folder / REPORT_FILE) if (folder / REPORT_FILE).is_file() else None
    run_scores = _read(folder / SCORES_FILE)
    chosen = settings and settings | _choices(training, settings)
    method = describe_method(folder, chosen, report["num_inference_steps"] if report else None)
    text = CardText(
        title=repo_id.split("/")[-1],
        summary=method.summary,
        pictures=_pictures(folder / "samples", SAMPLES) or "No sample images were uploaded.",
        usage=_usage(repo_id, method, folder),
        departures=_departures(method),
        data=_data(training),
        training=f"{_training(training, settings)}\n\n{_pictures(folder / 'samples', COURSE)}".strip(),
        scores=_scores(report, run_scores, _is_half(folder)),
        memorisation=_memorisation(report, run_scores),
        limits=_limits(method, chosen or {}, training, report, run_scores),
        licence=_licence(license_id),
        closing=CLOSING.format(version=__version__),
    )
    card_data = _card_data(repo_id, method, training, report, run_scores, license_id)
    template = files("hfgen.model_cards") / "TEMPLATE.md"
    card = ModelCard.from_template(card_data, template_str=template.read_text(encoding="utf-8"), **asdict(text))
    card.save(folder / "README.md")
    return card


def is_somebodys_own(card: str | None) -> bool:
    """Whether there is a card that was not written by `write_card`."""
    return card is not None and CLOSING.split("{")[0] not in card


def _card_data(
    repo_id: str,
    method: Method,
    training: dict[str, Any] | None,
    report: dict[str, Any] | None,
    run_scores: dict[str, Any] | None,
    license_id: str | None,
) -> ModelCardData:
    """Build the card's metadata, which the Hub reads."""
    results: list[EvalResult] = []
    data = training["data"] if training else None
    if report:
        results = eval_results(report)
    elif run_scores and data:
        results = eval_results_of_run(run_scores, data["name"], data["training_images"])
    return ModelCardData(
        model_name=repo_id.split("/")[-1],
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=["hfgen", method.family, "image-generation"],
        license=license_id,
        datasets=[data["name"]] if data and data["on_hub"] else None,
        eval_results=results or None,
    )


def _pictures(folder: Path, captions: dict[str, str]) -> str:
    """Show the available pictures, with a caption below each."""
    shown = [name for name in captions if (folder / name).is_file()]
    return "\n\n".join(f"![{captions[name]}](samples/{name})\n\n*{captions[name]}*" for name in shown)


def variant_of(folder: Path) -> str | None:
    """Return the variant, such as "fp16", that a pipeline's weights must be loaded with; None if they need none.

    Args:
        folder: a pipeline's folder, as `save_pretrained(..., variant=...)` writes it.
    """
    found: list[set[str]] = []  # the variants of each component
    for part in folder.iterdir():
        if part.name == Path(DISCRIMINATOR_FILE).parent.name:  # not loaded with the pipeline
            continue
        # model.safetensors, model.fp16.safetensors; in parts: model.fp16-00001-of-00002.safetensors
        stems = {re.sub(r"-\d{5}-of-\d{5}", "", file.stem) for file in part.glob("*.safetensors")}
        if stems:
            found.append({stem.partition(".")[2] for stem in stems})
    common = set.intersection(*found) if found else {""}
    return min(common, default="") or None


def _is_half(folder: Path) -> bool:
    """Whether any weights of a pipeline are stored as 16-bit floats."""
    for file in folder.glob("*/*.safetensors"):
        with safe_open(file, "pt") as tensors:
            if any(tensors.get_slice(name).get_dtype() == "F16" for name in tensors.keys()):  # noqa: SIM118
                return True
    return False


def _usage(repo_id: str, method: Method, folder: Path) -> str:
    variant = variant_of(folder)
    rounded = " The weights are stored as 16-bit floats and loaded as 32-bit floats." if _is_half(folder) else ""
    trust = ", trust_remote_code=True" if method.needs_trust else ""
    kept = f', variant="{variant}"' if variant else ""
    code = (
        "Its code is stored next to the weights, and `trust_remote_code=True` lets diffusers run it."
        if method.needs_trust
        else "It consists of diffusers' own classes: no code from this repo is run."
    )
    name = {"gan": "GANPipeline", "vae": "VAEPipeline", "ddpm": "DDPMPipeline"}[method.family]
    return f"""```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{repo_id}"{trust}{kept})
images = pipeline({method.call}).images
```

This needs only torch and diffusers (0.38 or newer). {code} With
[hfgen](https://github.com/hfgen/hfgen) installed, no code from the repo is run at all:
`hfgen.pipelines.{name}.from_pretrained("{repo_id}"{kept})`.{rounded}{_further_training(repo_id, folder)}"""


def _further_training(repo_id: str, folder: Path) -> str:
    """Say how to train a pipeline further that was published with its discriminator."""
    if not ((folder / DISCRIMINATOR_FILE).is_file() and (folder / SETTINGS_FILE).is_file()):
        return ""
    return f"""

The discriminator is here too (`{DISCRIMINATOR_FILE}`), so that training can continue, also on other images;
[`{SETTINGS_FILE}`]({SETTINGS_FILE}) has the settings of both networks:

```
hf download {repo_id} {SETTINGS_FILE} --local-dir .
hfgen train path/to/images --preset {SETTINGS_FILE} --init_from {repo_id} --images 10000
```"""


def _departures(method: Method) -> str:
    """List the differences from the papers that were found, and say exactly what was compared to find them."""
    if not method.compared:
        return "The training settings are unknown, so nothing was compared with the papers above."
    scope = (
        f"Only these points were compared with the papers above: {', '.join(method.compared)}. Others, such as "
        "channel widths, attention levels, optimizer, learning rate, batch size and length of training, were not."
    )
    if not method.departures:
        return f"No difference was found in what was compared. {scope}"
    return (
        "Differences from the papers above:\n\n"
        + "\n".join(f"- {clause}" for clause in method.departures)
        + f"\n\n{scope}"
    )


def _data(training: dict[str, Any] | None) -> str:
    if training is None:
        return "Unknown: the pipeline was uploaded without its training run."
    data = training["data"]
    where = markdown_text(data["name"])
    if data["on_hub"]:
        where = f"[{where}](https://huggingface.co/datasets/{quote(data['name'])})"
    if data["images"] is None:
        return f"{where}, streamed: its images were not counted or examined."
    lines = [
        f"{where}: {data['images']:,} images, used as {data['training_images']:,} training images of "
        f"{data['sample_size']} x {data['sample_size']} pixels.",
        "",
        "| dataset report | |",
        "| --- | --- |",
        *(f"| {key} | {markdown_text(str(value))} |" for key, value in data["intake"].items()),
    ]
    return "\n".join(lines + [f"\n{warning[0].upper()}{warning[1:]}." for warning in data["warnings"]])


def _training(training: dict[str, Any] | None, settings: dict[str, Any] | None) -> str:
    if training is None or settings is None:
        return "Unknown: the pipeline was uploaded without its training run."
    launch = training["launches"][-1]
    alike = groupby(training["launches"], lambda one: (one["num_processes"], one["device"], one["mixed_precision"]))
    hardware = "; then ".join(_hardware(list(launches)) for _, launches in alike)
    count = len(training["launches"])
    passes = ""
    if training["images"]:
        passes = f", {training['images']:,} images"
        if training["data"]["training_images"]:
            passes += f", {training['images'] / training['data']['training_images']:.1f} epochs"
    time = "unknown" if training["seconds"] is None else f"{training['seconds']:,.0f} s"
    time += f", in {count} launches" if count > 1 else ""
    rows = _start(training["launches"], settings)
    rows |= {
        "steps": f"{training['step']:,}{passes}",
        "time": time,
        "hardware": hardware,
        "software": ", ".join(
            f"{package} {launch[package]}" for package in ("hfgen", "torch", "diffusers", "accelerate", "python")
        ),
        "end": training["end"],
    }
    if rollbacks := training.get("rollbacks", 0):
        rows["rollbacks"] = f"{rollbacks}, each of which halved the learning rates"
    table = ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows.items())]
    given = {key: value for key, value in settings.items() if value is not None and value is not False}
    if settings.get("formulation") == "edm":
        given = {key: value for key, value in given.items() if key not in NOT_OF_EDM}
    chosen = ", ".join(
        f"`{key}` {markdown_text(_plain(value))}" for key, value in given.items() if key not in SETTINGS_OF_THE_LAUNCH
    )
    return "\n".join(table) + f"\n\nSettings (all of them are in [`{SETTINGS_FILE}`]({SETTINGS_FILE})): {chosen}."


def _hardware(launches: list[dict[str, Any]]) -> str:
    """Describe what launches that differ at most in their threads ran on."""
    launch, processes = launches[0], launches[0]["num_processes"]
    threads = ", then ".join(str(number) for number, _ in groupby(one["threads"] for one in launches))
    return (
        f"{processes} process{'es' if processes > 1 else ''} on {launch['device']} (threads: {threads}), "
        f"mixed precision {launch['mixed_precision']}"
    )


def _start(launches: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, str]:
    """Return the row that says where training started, for a run that continued another one or began from a model."""
    step, changes = launches[0]["from_step"], launches[0].get("changed_settings")
    if not step:
        if (origin := settings.get("init_from")) is None:
            return {}
        return {"start": f"from the weights of {markdown_text(origin)}, whose own training is not counted here"}
    with_changes = f" with other settings (before -> now): {', '.join(changes)}" if changes else ""
    return {"start": f"continued from step {step:,} of another run{with_changes}"}


def _scores(report: dict[str, Any] | None, run_scores: dict[str, Any] | None, is_half: bool) -> str:
    if report:
        steps = report["num_inference_steps"]
        in_steps = f" in {steps} denoising steps" if steps else ""
        speed = f"Generated{in_steps} at {report['drawing_images_per_second']:.3g} images/s."
        rounded = " Measured before the weights were rounded to 16 bits." if report.get("before_rounding") else ""
        reference = markdown_text(reference_name(report["reference"]))
        return f"Reference: {reference}. {speed}{rounded} {score_table(report)}"
    if run_scores:
        rounded = " It was measured before the weights were rounded to 16 bits." if is_half else ""
        steps = run_scores.get("num_inference_steps")
        images = f"{run_scores['num_images']:,} images" + (f" (in {steps} denoising steps)" if steps else "")
        return (
            f"Measured during training, at step {run_scores['step']:,}: FID {run_scores['fid']:.4g} and KID "
            f"{run_scores['kid']:.4g} of {images} against the training images, in "
            "features of the 2015 Inception network. The floor, which is the score of real images against real ones, "
            f"was not measured, so compare this only with other scores from the same training.{rounded}"
        )
    return "Not measured. `hfgen evaluate` measures scores, next to the floor that the data itself reaches."


def _memorisation(report: dict[str, Any] | None, run_scores: dict[str, Any] | None) -> str:
    if report:
        statements = [report["memorisation"]["statement"], report["memorisation_by_pixels"]["statement"]]
        if "held_out" in report:
            statements.append(report["held_out"]["statement"])
        return " ".join(f"{part[0].upper()}{part[1:]}." for part in statements)
    if run_scores:
        verdict = "more than" if run_scores["copying"] else "no more than"
        return (
            f"{run_scores['copies']:.1%} of {run_scores['num_images']:,} samples are nearer to a training image than "
            f"{1 - run_scores['copies_expected']:.0%} of the training images are to their nearest "
            f"neighbour ({run_scores['copies_expected']:.1%} expected), and {run_scores['copies_by_pixels']:.1%} are "
            f"copies by their pixels ({run_scores['copies_by_pixels_expected']:.1%} expected): {verdict} chance "
            "explains."
        )
    return "Not measured: it is unknown whether its samples copy training images."


def _limits(
    method: Method,
    settings: dict[str, Any],
    training: dict[str, Any] | None,
    report: dict[str, Any] | None,
    run_scores: dict[str, Any] | None,
) -> str:
    data = training["data"] if training else None
    sentences = [
        f"It generates only {sides(method.sample_size)}-pixel images of the kind it was trained on: it takes no "
        "prompt.",
        "Its samples reproduce the subjects and styles of the training images; which of them are over-represented or "
        "missing was not examined. Samples are not filtered.",
    ]
    if data and data["images"] is not None and data["images"] < 1000:
        unknown = report is None and run_scores is None
        copies = "; whether its samples copy training images was not measured" if unknown else ""
        sentences.append(f"With only {data['images']:,} training images, its diversity is limited{copies}.")
    if method.family == "vae" and not (settings.get("feature_weight") or settings.get("adversarial_weight")):
        sentences.append("Like other VAEs, it blurs: fine detail is averaged out.")
    if method.family == "gan":
        seen = ": see recall and coverage" if report else ""
        sentences.append(f"Like other GANs, it may miss kinds of images that are in the data{seen}.")
    real = report["floor"]["split"] if report else None
    if report and real and report["scores"]["recall"] < real["recall"] / 2:
        sentences.append(
            f"Its recall of {report['scores']['recall']:.2g} is far below that of {real['num_fake']:,} real "
            f"images ({real['recall']:.2g}): it misses much of the data's diversity."
        )
    if training and not training["end"].startswith(("complete", EARLIER, WHILE_TRAINING)):
        sentences.append(f"Its training ended early: {training['end']}.")
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _licence(license_id: str | None) -> str:
    of_code = "The code files of hfgen in this repo are licensed under Apache-2.0."
    if license_id is None:
        return f"The author has not chosen a licence for the weights: ask before using them. {of_code}"
    return f"Weights: {license_id}. {of_code}"


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _choices(training: dict[str, Any] | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what a run chose for settings that are "auto", and weights of 0 for a learned term that had not begun."""
    choices = ((training or {}).get("launches") or [{}])[0].get("choices", {})
    chosen: dict[str, Any] = {
        name: text.split(" ")[0] for name, text in choices.items() if settings.get(name) == "auto"
    }
    if training and training["step"] <= settings.get("learned_term_start", 0) > 0:
        chosen |= {"feature_weight": 0.0, "adversarial_weight": 0.0}
    return chosen


def _read(file: Path) -> dict[str, Any] | None:
    return read_json(file) if file.is_file() else None
