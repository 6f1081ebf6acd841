"""The card: valid, whole, and true to what lies beside it; nothing blank and nothing that was not measured."""

import json
import re
import shutil
from dataclasses import fields

import jinja2
import jinja2.meta
import pytest
from hub_client import contents
from hub_repositories import card_errors
from huggingface_hub import ModelCard
from published_toys import FAMILIES, files_to_publish
from stand_in_features import Colours, paintings, table_of, watch_drawing
from toy_runs import checkpoint, train

from hfgen.errors import UserError
from hfgen.families import family_of_index
from hfgen.hub.card import COURSE, SAMPLES, SETTINGS_OF_THE_LAUNCH, CardText, is_somebodys_own, write_card
from hfgen.hub.method import describe_method
from hfgen.inference.opening import find_pipeline, open_pipeline
from hfgen.inference.sampling import weights_digest
from hfgen.integrity import record_digests
from hfgen.metrics import feature_spaces
from hfgen.publishing.folder import make_publication, scores_of
from hfgen.training.settings import RunSettings


pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
PARTS = ("Use it", "Method", "Training data", "Training", "Scores", "Memorisation", "Limits and bias", "Licence")


@pytest.fixture
def evaluate(hfgen, monkeypatch, tmp_path):
    """Run `hfgen evaluate` in cheap features; return the folder of the scores."""
    monkeypatch.setattr(feature_spaces, "build_extractor", lambda *_: Colours("inception-2015 stand-in"))

    def run(pipeline, *arguments, reference="toy_paintings:14"):
        common = ["--reference", reference, "--num_images", "10", "--device", "cpu"]
        if family_of_index(json.loads((find_pipeline(pipeline) / "model_index.json").read_text())) == "ddpm":
            common += ["--num_inference_steps", "2"]
        assert hfgen("evaluate", pipeline, *common, *arguments, "--output", tmp_path / "scores")[0] == 0
        return tmp_path / "scores"

    return run


def card_of(source, folder, **options):
    """Publish into a folder; return the card, after what is to hold of every card was seen to hold."""
    make_publication(source, folder, "tester/toy", **options)
    return check_card(folder)


def check_card(folder):
    text = (folder / "README.md").read_text()
    card = ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
    assert card_errors(text) == []
    sections = dict(zip(PARTS, re.split(r"^## .*\n", card.text, flags=re.MULTILINE)[1:], strict=True))
    assert re.findall(r"^## (.*)$", card.text, re.MULTILINE) == list(PARTS)
    assert all(len(section.strip()) > 20 for section in sections.values())
    for blank in ("None", "nan", "{{", "}}", "{version}", "null", "  \n\n", "[]", "()"):
        assert blank not in text.replace("banana", ""), blank
    for link in re.findall(r"\]\(([^)]*)\)", text):
        assert link.startswith("https://") or (folder / link).is_file(), link
    shown = [name for name in SAMPLES | COURSE if (folder / "samples" / name).is_file()]
    assert re.findall(r"!\[[^]]+\]\(samples/([^)]+)\)", text) == shown
    assert sum(name in sections["Training"] for name in shown) == sum(name in COURSE for name in shown)
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "unconditional-image-generation"
    assert not is_somebodys_own(text) and is_somebodys_own("# My own card of hfgen") and not is_somebodys_own(None)
    return card, sections


# ----------------------------------------------------------------------------------------------------------- its form


def test_the_blanks_of_the_template_are_the_parts_of_the_card():
    from importlib.resources import files

    template = (files("hfgen.model_cards") / "TEMPLATE.md").read_text()
    blanks = jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(template))
    assert blanks == {field.name for field in fields(CardText)} | {"card_data"}


@pytest.mark.parametrize("name", [field.name for field in fields(CardText)])
@pytest.mark.parametrize("empty", ["", " \n"])
def test_a_card_with_an_empty_part_cannot_be_made(name, empty):
    whole = {field.name: "text" for field in fields(CardText)}
    assert CardText(**whole).title == "text"
    with pytest.raises(ValueError, match=f"the card's section '{name}' is empty"):
        CardText(**whole | {name: empty})


@pytest.mark.parametrize("name", FAMILIES)
def test_the_card_of_a_run_tells_what_it_is_of_what_and_how_it_was_made(name, runs, tmp_path):
    card, sections = card_of(runs[name], tmp_path / "published")
    family = name.replace("library", "ddpm").replace("edm", "ddpm")
    assert card.data.tags == ["hfgen", family, "image-generation"]
    assert card.data.license is None and card.data.datasets is None and card.data.eval_results is None
    assert "# toy" in card.text
    trust = ", trust_remote_code=True" if name != "library" else ""
    assert f'DiffusionPipeline.from_pretrained("tester/toy"{trust})' in sections["Use it"]
    assert ("`trust_remote_code=True` lets diffusers run it" in sections["Use it"]) is (name != "library")
    classes = {"gan": "GANPipeline", "vae": "VAEPipeline", "ddpm": "DDPMPipeline"}
    assert f'`hfgen.pipelines.{classes[family]}.from_pretrained("tester/toy")`' in sections["Use it"]
    assert sections["Method"].startswith("\nDifferences from the papers above:\n\n- ")
    assert "toy_paintings:24: 24 images, used as 24 training images of 16 x 16 pixels." in sections["Training data"]
    assert "Only 24 images: a generator may memorise them" in sections["Training data"]
    assert "With only 24 training images" in sections["Limits and bias"]
    rows = dict(re.findall(r"^\| (\w+) \| (.*) \|$", sections["Training"], re.MULTILINE))
    status = json.loads((runs[name] / "status.json").read_text())
    launch = json.loads((runs[name] / "launches.jsonl").read_text())
    assert rows["steps"] == "6, 24 images, 1.0 epochs" and rows["end"] == "complete"
    assert rows["time"] == f"{status['seconds']:,.0f} s"
    assert rows["hardware"].startswith("1 process on cpu") and rows["hardware"].endswith("mixed precision no")
    assert f"(threads: {launch['threads']})" in rows["hardware"]
    assert f"torch {launch['torch']}" in rows["software"] and f"python {launch['python']}" in rows["software"]
    settings = json.loads((tmp_path / "published" / "training_config.json").read_text())
    told = sections["Training"].partition(")): ")[2].partition("\n\n")[0]
    assert "`batch_size` 4" in told and "`max_train_steps` 6" in told and "`seed` 0" in told
    assert not {"report_to", "max_train_time", "hub_model_id"} & settings.keys()  # of nobody else's launches
    for rail in ("output_dir", "checkpoint_every", "sample_every", "cpu", "mixed_precision"):
        assert rail in settings and f"`{rail}`" not in told
    assert not re.search(r"` False|` None|\[|\]", told)
    assert (f"`block_out_channels` {'4 8' if name == 'vae' else '8 16'}" in told) is (name != "gan")
    assert "Not measured." in sections["Scores"] and "Not measured:" in sections["Memorisation"]
    assert "ended early" not in sections["Limits and bias"]
    limits = {"gan": "it may miss kinds of images", "vae": "it blurs"}
    assert [key for key, text in limits.items() if text in sections["Limits and bias"]] == [family] * (
        family in limits
    )


def test_the_card_of_a_bare_pipeline_calls_unknown_what_it_does_not_know(runs, tmp_path):
    shutil.copytree(runs["gan"] / "pipeline", tmp_path / "pipeline")
    card, sections = card_of(tmp_path / "pipeline", tmp_path / "published")
    assert sections["Training data"].strip() == "Unknown: the pipeline was uploaded without its training run."
    assert sections["Training"].strip() == "Unknown: the pipeline was uploaded without its training run."
    assert "Not measured." in sections["Scores"] and "Not measured:" in sections["Memorisation"]
    assert "an unknown objective" in card.text
    nothing = "The training settings are unknown, so nothing was compared with the papers above."
    assert sections["Method"].strip() == nothing
    assert card.data.eval_results is None and card.data.datasets is None
    # Without pictures it says so.
    shutil.rmtree(tmp_path / "published" / "samples")
    write_card(tmp_path / "published", "tester/toy")
    assert "No sample images were uploaded." in check_card(tmp_path / "published")[0].text


def test_a_card_without_departures_names_what_was_compared_and_claims_no_more(runs, tmp_path):
    """Its schedule and loss are the paper's; its widths and learning rate are not, but they are not compared."""
    folder = tmp_path / "published"
    make_publication(runs["library"], folder, "tester/toy")
    file = folder / "scheduler" / "scheduler_config.json"
    paper = {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "prediction_type": "epsilon"}
    file.write_text(json.dumps(json.loads(file.read_text()) | paper))
    settings = json.loads((folder / "training_config.json").read_text()) | {"num_inference_steps": 1000}
    (folder / "training_config.json").write_text(json.dumps(settings))
    write_card(folder, "tester/toy")
    told = check_card(folder)[1]["Method"].strip()
    compared = describe_method(folder, json.loads((folder / "training_config.json").read_text())).compared
    assert len(compared) == 7
    assert told.startswith(
        "No difference was found in what was compared. Only these points were compared with the papers above: kind of "
        "noise schedule, prediction target, whether the network has self-attention, sampler, loss, loss weighting, "
        "pairing of images with noise. Others, such as channel widths, attention levels, optimizer, learning rate, "
    )
    # Without the settings of the training, fewer things can be compared.
    (folder / "training_config.json").unlink()
    write_card(folder, "tester/toy")
    told = check_card(folder)[1]["Method"].strip()
    assert "papers above: kind of noise schedule, prediction target, whether the network has self-attention, " in told
    assert "self-attention, sampler. Others, such as " in told


@pytest.mark.parametrize("name", FAMILIES)
def test_no_card_claims_to_agree_with_a_paper_in_everything(name, runs, tmp_path):
    told = card_of(runs[name], tmp_path / "published")[1]["Method"]
    assert told.count("Others, such as channel widths, attention levels, optimizer, learning rate, ") == 1


@pytest.mark.parametrize(("choice", "words"), [("ada (300 training images)", "adaptive"), ("none (60,000)", "")])
def test_an_augmentation_that_was_chosen_is_named_and_none_is_not(runs, tmp_path, choice, words):
    make_publication(runs["gan"], tmp_path / "published", "tester/toy")
    training = json.loads((tmp_path / "published" / "training.json").read_text())
    assert training["launches"][0]["choices"]["augment"]
    training["launches"][0]["choices"] = {"augment": choice}
    (tmp_path / "published" / "training.json").write_text(json.dumps(training))
    settings = json.loads((tmp_path / "published" / "training_config.json").read_text())
    (tmp_path / "published" / "training_config.json").write_text(json.dumps(settings | {"augment": "auto"}))
    write_card(tmp_path / "published", "tester/toy")
    text = (tmp_path / "published" / "README.md").read_text()
    assert ("adaptive augmentation (Karras" in text) == bool(words) and "augmentation of the discriminator" not in text
    asked_for = json.dumps(settings | {"augment": "diffaugment"})  # in a later launch
    (tmp_path / "published" / "training_config.json").write_text(asked_for)
    write_card(tmp_path / "published", "tester/toy")
    assert "- DiffAugment (Zhao" in (tmp_path / "published" / "README.md").read_text()


def test_a_learned_term_is_told_only_of_weights_that_were_trained_with_it(runs, tmp_path):
    published = tmp_path / "published"
    make_publication(runs["vae"], published, "tester/toy")
    settings = json.loads((published / "training_config.json").read_text())
    for start, learned in ((5, True), (6, False), (0, True)):  # of 6 updates
        with_term = settings | {"adversarial_weight": 10.0, "learned_term_start": start}
        (published / "training_config.json").write_text(json.dumps(with_term))
        write_card(published, "tester/toy")
        sections = check_card(published)[1]
        assert ("a learned loss from a discriminator" in sections["Method"]) == learned
        assert ("Like other VAEs, it blurs" in sections["Limits and bias"]) != learned


def test_settings_that_edm_does_not_have_are_not_listed(runs, tmp_path):
    for name, listed in (("edm", False), ("ddpm", True)):
        told = card_of(runs[name], tmp_path / name)[1]["Training"]
        assert all((f"`{setting}`" in told) == listed for setting in ("beta_schedule", "prediction_type"))
        assert "`formulation`" in told


def test_the_threads_of_all_launches_are_named_in_their_order(runs, tmp_path):
    make_publication(runs["gan"], tmp_path / "published", "tester/toy")
    file = tmp_path / "published" / "training.json"
    training = json.loads(file.read_text())
    (launch,) = training["launches"]
    training["launches"] = [launch | {"threads": threads} for threads in (1, 1, 2, 1)]
    file.write_text(json.dumps(training))
    write_card(tmp_path / "published", "tester/toy")
    assert "(threads: 1, then 2, then 1), mixed precision no" in check_card(tmp_path / "published")[1]["Training"]
    training["launches"][1:] = [launch | {"device": "a GPU", "mixed_precision": "bf16"}, launch]
    file.write_text(json.dumps(training))
    write_card(tmp_path / "published", "tester/toy")
    told = check_card(tmp_path / "published")[1]["Training"]
    assert re.search(
        r"1 process on cpu.* precision no; then 1 process on a GPU .* precision bf16; then 1 process on cpu", told
    )


@pytest.mark.parametrize("origin", ["cats_before", None])
def test_the_weights_that_training_began_with_are_told(runs, tmp_path, origin):
    make_publication(runs["gan"], tmp_path / "published", "tester/toy")
    file = tmp_path / "published" / "training_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_from": origin}))
    write_card(tmp_path / "published", "tester/toy")
    training = check_card(tmp_path / "published")[1]["Training"]
    begun = "| start | from the weights of cats_before, whose own training is not counted here |"
    assert (begun in training) == ("| start |" in training) == (origin is not None)


def test_the_licence_of_the_weights_is_told_or_said_to_be_open(runs, tmp_path):
    card, sections = card_of(runs["gan"], tmp_path / "one", license_id="cc-by-4.0")
    assert card.data.license == "cc-by-4.0" and "Weights: cc-by-4.0." in sections["Licence"]
    card, sections = card_of(runs["gan"], tmp_path / "two")
    assert card.data.license is None and "The author has not chosen a licence" in sections["Licence"]
    assert "Apache-2.0" in sections["Licence"]


def test_a_hub_data_set_is_linked_and_a_streamed_one_is_not_said_to_be_counted(runs, tmp_path):
    make_publication(runs["ddpm"], tmp_path / "published", "tester/toy")
    file = tmp_path / "published" / "training.json"
    training = json.loads(file.read_text())
    training["data"] = {"name": "someone/cats", "on_hub": True, "images": None, "training_images": None,
                        "sample_size": None, "intake": {}, "warnings": []}  # fmt: skip
    training["launches"][0]["num_processes"], training["seconds"] = 2, None
    training["end"] = "the time is up"
    file.write_text(json.dumps(training))
    write_card(tmp_path / "published", "tester/toy")
    card, sections = check_card(tmp_path / "published")
    assert card.data.datasets == ["someone/cats"]
    link = "[someone/cats](https://huggingface.co/datasets/someone/cats)"
    assert sections["Training data"].strip() == f"{link}, streamed: its images were not counted or examined."
    assert "| steps | 6, 24 images |" in sections["Training"] and "2 processes on cpu" in sections["Training"]
    assert "| time | unknown |" in sections["Training"]
    assert "- Its training ended early: the time is up." in sections["Limits and bias"]
    assert "are few" not in card.text


# --------------------------------------------------------------------------------------------------------- the scores


def test_scores_have_their_floor_and_image_counts_in_the_text_and_the_model_index(evaluate, runs, tmp_path):
    scores = evaluate(runs["ddpm"], "--seed", "3", "--repeats", "2")
    report = json.loads((scores / "evaluation.json").read_text())
    card, sections = card_of(runs["ddpm"], tmp_path / "published", scores=scores)
    assert (scores / "evaluation.md").read_text().partition("\n\nMemorisation:")[0] in sections["Scores"]
    speed = f"Generated in 2 denoising steps at {report['drawing_images_per_second']:.3g} images/s."
    assert f"Reference: toy_paintings:14. {speed} 10 images of 16 pixels" in sections["Scores"]
    assert len(table_of(sections["Scores"])) == 7
    assert "pipeline(batch_size=16, num_inference_steps=2).images" in sections["Use it"]  # those that were scored
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["fid"].metric_value == round(report["scores"]["fid"], 6)
    told = {"num_images": 10, "num_real": 14, "seed": 3, "features": "inception-2015 stand-in"}
    for kind, result in results.items():
        assert result.metric_args == told | {"num_inference_steps": 2}
        assert f"floor {report['floor']['split'][kind]:.4g} (7 against 7)" in result.metric_name
        assert result.dataset_name == "toy_paintings:14"
    statements = [report[kind]["statement"] for kind in ("memorisation", "memorisation_by_pixels")]
    for statement in statements:
        assert statement[1:] in sections["Memorisation"]
    assert json.loads((tmp_path / "published" / "evaluation.json").read_text()) == report
    # Not the sheets, which show images of the data.
    assert contents(tmp_path / "published").keys() == files_to_publish("ddpm") | {"evaluation.json"}
    # The file itself serves as well as its folder.
    again, _ = card_of(runs["ddpm"], tmp_path / "again", scores=scores / "evaluation.json")
    assert contents(tmp_path / "again") == contents(tmp_path / "published")


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the spread of infinite ones
def test_an_infinite_score_is_null_in_json_and_missing_in_the_model_index(evaluate, runs, tmp_path, monkeypatch):
    originals = paintings([0, 1, 2, 3, 4]) * 2
    watch_drawing(monkeypatch, lambda pipeline, index: originals[index])
    scores = evaluate(runs["gan"], "--repeats", "2")
    assert json.loads((scores / "evaluation.json").read_text())["scores"]["mifid"] is None
    card, sections = card_of(runs["gan"], tmp_path / "published", scores=scores)
    assert json.loads((tmp_path / "published" / "evaluation.json").read_text())["scores"]["mifid"] is None
    (row,) = [row for row in table_of(sections["Scores"]) if row["score"] == "MiFID"]
    assert row["generated"] == "inf" and row["mean ± standard deviation over 2 seeds"].startswith("inf ± ")
    assert {result.metric_type for result in card.data.eval_results} == {"fid", "kid", "precision", "recall"}


def test_a_reference_on_this_machine_is_named_without_its_path(evaluate, runs, tmp_path, monkeypatch):
    folder = tmp_path / "secret" / "paintings"
    folder.mkdir(parents=True)
    for index, image in enumerate(paintings(range(14))):
        image.save(folder / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    scores = evaluate(runs["gan"], reference="./secret/paintings")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # where there is no such folder
    card, sections = card_of(runs["gan"], tmp_path / "published", scores=scores)
    assert "secret" not in (tmp_path / "published" / "evaluation.json").read_text() + card.content
    assert "Reference: paintings." in sections["Scores"]


def test_scores_of_weights_before_and_after_rounding_are_told_apart(evaluate, runs, tmp_path):
    note = "Measured before the weights were rounded to 16 bits."
    _, sections = card_of(runs["gan"], tmp_path / "first", scores=evaluate(runs["gan"]), half=True)
    assert note in sections["Scores"]
    shutil.rmtree(tmp_path / "scores")
    _, sections = card_of(runs["gan"], tmp_path / "again", scores=evaluate(tmp_path / "first"), half=True)
    assert note not in sections["Scores"] and "Reference: toy_paintings:14." in sections["Scores"]


def test_scores_come_along_when_a_pipeline_is_published_again(evaluate, runs, tmp_path):
    scores = evaluate(runs["gan"])
    for half in (False, True):
        first, again, other = (tmp_path / f"{name} {half}" for name in ("first", "again", "other"))
        _, sections = card_of(runs["gan"], first, scores=scores, half=half)
        _, of_again = card_of(first, again, half=half)
        assert of_again["Scores"] == sections["Scores"]
        assert (again / "evaluation.json").read_bytes() == (first / "evaluation.json").read_bytes()
        pipeline = open_pipeline(str(first), "cpu", plain=True)
        next(pipeline.generator.parameters()).data.add_(1)
        pipeline.save_pretrained(first)
        _, sections = card_of(first, other, half=half)
        assert not {"evaluation.json", "training.json", "scores.json"} & {file.name for file in other.iterdir()}
        assert sections["Scores"].strip().startswith("Not measured.")


def test_scores_that_a_publication_came_with_serve_for_the_same_weights(evaluate, runs, tmp_path):
    card_of(runs["gan"], tmp_path / "half", scores=evaluate(runs["gan"]), half=True)
    note = "Measured before the weights were rounded to 16 bits."
    for source, is_rounded in ((runs["gan"], False), (tmp_path / "half", True)):
        target = tmp_path / f"of {source.name}"
        _, sections = card_of(source, target, scores=tmp_path / "half", half=False)
        assert (note in sections["Scores"]) is is_rounded and "Reference: toy_paintings:14." in sections["Scores"]
        assert ("rounded_sha256" in json.loads((target / "evaluation.json").read_text())) is is_rounded


def test_scores_from_another_sampler_do_not_come_along_and_that_is_said(evaluate, runs, tmp_path, capsys):
    card_of(runs["ddpm"], tmp_path / "first", scores=evaluate(runs["ddpm"]))
    file = tmp_path / "first" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "UniPCMultistepScheduler"}))
    index = tmp_path / "first" / "model_index.json"
    scheduler = {"scheduler": ["diffusers", "UniPCMultistepScheduler"]}
    index.write_text(json.dumps(json.loads(index.read_text()) | scheduler))
    record_digests(tmp_path / "first")
    _, sections = card_of(tmp_path / "first", tmp_path / "again")
    assert (
        sections["Scores"].strip().startswith("Not measured.")
        and not (tmp_path / "again" / "evaluation.json").exists()
    )
    assert "note: its scores are left out: " in capsys.readouterr().out


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weights_sha256": 1}', '{"end": "complete", "fid": "best"}'])
def test_files_of_other_programs_beside_a_pipeline_are_no_records(content, runs, tmp_path):
    shutil.copytree(runs["gan"] / "pipeline", tmp_path / "pipeline")
    for name in ("evaluation.json", "training.json", "scores.json"):
        (tmp_path / "pipeline" / name).write_text(content)
    _, sections = card_of(tmp_path / "pipeline", tmp_path / "published")
    assert sections["Scores"].strip().startswith("Not measured.")
    assert {file.name for file in (tmp_path / "published").glob("*.json")} == {"model_index.json"}


@pytest.mark.parametrize(
    ("name", "changed", "option"), [("vae", "sample_from", "--sample_from"), ("ddpm", "sampler", "--sampler")]
)
def test_scores_of_another_way_of_sampling_are_refused(name, changed, option, evaluate, runs, tmp_path):
    scores = evaluate(runs[name])
    report = json.loads((scores / "evaluation.json").read_text())
    assert report[changed] and report["sampler" if name == "vae" else "sample_from"] is None
    other = tmp_path / "evaluation.json"
    other.write_text(json.dumps(report | {changed: "another"}))
    with pytest.raises(UserError, match=f"measured with another, but .* run hfgen evaluate without {option}"):
        make_publication(runs[name], tmp_path / "published", "tester/toy", other)
    make_publication(runs[name], tmp_path / "same", "tester/toy", scores)
    older = {key: value for key, value in report.items() if key not in ("sampler", "sample_from")}
    other.write_text(json.dumps(older))
    make_publication(runs[name], tmp_path / "older", "tester/toy", other)


def test_scores_of_other_weights_and_what_is_no_report_are_refused(evaluate, runs, tmp_path):
    scores = evaluate(runs["gan"])
    digest = weights_digest(open_pipeline(str(checkpoint(runs["gan"], 6)), "cpu"))
    assert scores_of(scores, [digest])["scores"]["num_fake"] == 10
    for other in (checkpoint(runs["gan"], 4), runs["vae"]):
        with pytest.raises(
            UserError, match=f"--scores {scores}: these scores belong to other weights; run hfgen eval"
        ):
            make_publication(other, tmp_path / "published", "tester/toy", scores=scores)
    report = json.loads((scores / "evaluation.json").read_text())
    del report["weights_sha256"]  # of hfgen evaluate-images, or of an earlier hfgen
    broken = {"old": json.dumps(report), "no object": "[1]", "no json": "{", "half": '{"scores": {}}', "text": "é"}
    for name, text in broken.items():
        file = tmp_path / f"{name}.json"
        file.write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match=f"--scores {file}: "):
            make_publication(runs["gan"], tmp_path / "published", "tester/toy", scores=file)
    for missing in (tmp_path, tmp_path / "nowhere", runs["gan"]):
        with pytest.raises(UserError, match=f"--scores {missing}: contains no evaluation.json from hfgen evaluate"):
            make_publication(runs["gan"], tmp_path / "published", "tester/toy", scores=missing)
    assert not (tmp_path / "published").exists()


def test_the_digest_of_weights_changes_with_each_of_them(runs):
    pipeline = open_pipeline(str(runs["vae"]), "cpu", plain=True)
    seen = {weights_digest(pipeline), weights_digest(open_pipeline(str(runs["vae"]), "cpu"))}
    assert len(seen) == 1
    for network in (pipeline.vae, pipeline.density):
        for tensor in network.state_dict().values():
            tensor.view(-1)[-1] += 1
            seen.add(weights_digest(pipeline))
    assert len(seen) == 1 + sum(len(network.state_dict()) for network in (pipeline.vae, pipeline.density))


@pytest.mark.usefixtures("fresh_accelerate_state")
def test_scores_of_the_training_are_told_with_their_step_and_as_without_a_floor(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_spaces, "build_extractor", lambda *_: Colours())
    run = tmp_path / "run"
    train("gan", run, "--evaluate_every", "2", "--cache_dir", str(tmp_path / "cache"))
    lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    best = json.loads((run / "best" / "scores.json").read_text())
    for source, line in ((run, lines[-1]), (run / "best", best), (checkpoint(run, 2), lines[0])):
        folder = tmp_path / f"published {line['step']} {source.name}"
        card, sections = card_of(source, folder)
        assert f"at step {line['step']}: FID {line['fid']:.4g} and KID {line['kid']:.4g} of 12" in sections["Scores"]
        assert "was not measured" in sections["Scores"]
        results = {result.metric_type: result for result in card.data.eval_results}
        assert {kind: result.metric_value for kind, result in results.items()} == {
            kind: round(line[kind], 6) for kind in ("fid", "kid")
        }
        for result in results.values():
            assert result.metric_name.endswith(", 12 images against 24 training images; floor unmeasured")
            assert result.metric_args["step"] == line["step"] and result.metric_args["num_images"] == 12
        assert f"{line['copies']:.1%} of 12 samples are nearer" in sections["Memorisation"]
        assert "no more than chance explains." in sections["Memorisation"]
        assert "With only 24 training images, its diversity is limited." in sections["Limits and bias"]
        assert "rounded to 16 bits" not in sections["Scores"]
    rounded = card_of(run / "best", tmp_path / "rounded", half=True)[1]["Scores"]
    assert "It was measured before the weights were rounded to 16 bits." in rounded
    # Of diffusion, the scores are those of a number of steps.
    file = folder / "scores.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_inference_steps": 50}))
    write_card(folder, "tester/toy")
    card, sections = check_card(folder)
    assert " of 12 images (in 50 denoising steps) against the training images" in sections["Scores"]
    for result in card.data.eval_results:
        assert ", 12 images in 50 denoising steps against" in result.metric_name
        assert result.metric_args["num_inference_steps"] == 50
    # A pipeline that copies is said to.
    file = folder / "scores.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"copying": True, "copies": 0.5}))
    write_card(folder, "tester/toy")
    told = check_card(folder)[1]["Memorisation"]
    assert "50.0% of 12 samples are nearer" in told and "more than chance explains" in told and "no more" not in told


def test_a_recall_far_below_the_floor_is_a_limitation_and_held_out_images_are_named(evaluate, runs, tmp_path):
    scores = evaluate(runs["gan"], "--held_out", "toy_paintings:20")
    file = scores / "evaluation.json"
    report = json.loads(file.read_text())
    for recall, told in ((0.2, True), (0.3, False)):
        report["scores"]["recall"], report["floor"]["split"]["recall"] = recall, 0.5
        file.write_text(json.dumps(report))
        _, sections = card_of(runs["gan"], tmp_path / str(recall), scores=file)
        limits = sections["Limits and bias"]
        assert (f"Its recall of {recall} is far below that of 7 real images (0.5): it" in limits) is told
        assert report["held_out"]["statement"][1:] in sections["Memorisation"]


def test_the_floor_of_an_earlier_version_that_was_of_two_halves_is_still_read(evaluate, runs, tmp_path):
    file = evaluate(runs["gan"]) / "evaluation.json"
    report = json.loads(file.read_text())
    report["floor"]["halves"] = report["floor"].pop("split")
    file.write_text(json.dumps(report))
    _, sections = card_of(runs["gan"], tmp_path / "published", scores=file)
    assert "floor: 7 real images against 7 others" in sections["Scores"]


def test_a_card_leaves_out_settings_of_the_launch_but_not_seed_length_and_start():
    rails = {field.name for field in fields(RunSettings)}
    assert SETTINGS_OF_THE_LAUNCH == rails - {"seed", "max_train_steps", "num_epochs", "init_from"}
