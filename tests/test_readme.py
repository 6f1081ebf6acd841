"""The commands of the README and of docs/ are run as they stand there, at toy size."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import typer
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import load_script
from demo_pages import free_port, serving
from loopback_hub import LoopbackHub
from typer.testing import CliRunner

from hfgen import cli
from hfgen.data.toy_paintings import paint
from hfgen.studies import launch
from hfgen.studies.cells import expand
from hfgen.studies.launch import launch_command
from hfgen.studies.scripts import find_scripts
from hfgen.studies.study_file import find_study_file, read_study_file


ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL)
LINES = [
    line.split("  #")[0].strip()
    for language, text in BLOCKS
    if language == ""
    for line in text.replace("\\\n", " ").splitlines()
    if re.match(r"(accelerate|hfgen|make|pip) ", line)
]
COMMANDS = list(dict.fromkeys(LINES))  # a command that stands on two pages is run once
PYTHON = [text for language, text in BLOCKS if language == "python"]
# What makes a training command small; it follows the page's own arguments and overrides them.
TOY_SIZE = [
    *("--sample_size", "16", "--batch_size", "4", "--max_train_steps", "2", "--sample_every", "1"),
    *("--num_sample_images", "2", "--num_epochs", "0.5", "--cpu"),
]
TOY_NETWORK = {
    "train_ddpm.py": ["--block_out_channels", "8", "16", "--num_inference_steps", "2"],
    "train_gan.py": ["--generator_channels", "4", "--discriminator_channels", "4"],
    "train_vae.py": ["--block_out_channels", "4", "8", "--latent_dim", "4"],
}
SCORED = ["--evaluate_every", "2", "--evaluate_num_images", "10"]  # for `hfgen curves --reference`
SETTINGS = {"train_ddpm": "DDPMSettings", "train_gan": "GANSettings", "train_vae": "VAESettings"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder as a reader has it: the scripts and some images."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("readme")
    for name in ("training_scripts", "model_cards"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("path/to/images", "photos"):
        (folder / name).mkdir(parents=True)
        for index in range(8 if name == "photos" else 12):
            Image.fromarray(paint(index, 32)).save(folder / name / f"{index}.jpg")
    return folder


@pytest.fixture(scope="module")
def environment(programs, tmp_path_factory):
    """The environment of a reader who is logged in to a Hub, here one on loopback."""
    with LoopbackHub() as hub:
        environment = hub.environment(tmp_path_factory.mktemp("home"))
        path = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        yield environment | {"PATH": path, "PYTHON_EXEC": str(programs.python)}


@pytest.fixture(scope="module")
def run(programs, workplace, environment):
    """Return a function that runs a command as a reader would, but that it need not import torch.

    What a launcher is to start is started without it, unless `really` is true.
    """

    def run(command, really=False):
        program, *arguments = (part.replace("your-name", "tester") for part in command)
        if really:
            options = {"cwd": workplace, "env": environment, "capture_output": True, "text": True, "timeout": 300}
            return subprocess.run([program, *arguments], **options)
        if program == "accelerate":
            parsed = launch_command_parser().parse_args(arguments[1:])
            program, arguments = workplace / parsed.training_script, parsed.training_script_args
        elif program == "hfgen":
            program = programs.hfgen
        return programs.run(program, *arguments, environment=environment, folder=workplace)

    return run


@pytest.fixture
def hfgen(workplace, monkeypatch):
    """Return a function that runs a command of hfgen in this process, which saves the seconds of a start."""
    monkeypatch.chdir(workplace)

    def hfgen(words):
        result = CliRunner().invoke(cli.app, words)
        assert result.exit_code == 0, f"{words}: {result.output}{result.exception!r}"

    return hfgen


def toy_size_of(command):
    """Return what makes a command of `hfgen train` small, and gives it a folder of its own."""
    kind = re.search(r"--preset (vae|ddpm)|hfgen train (vae|ddpm)", command)
    network = TOY_NETWORK[f"train_{(kind[1] or kind[2]) if kind else 'gan'}.py"]
    size = TOY_SIZE
    if "--images" in command:  # another name of --max_train_steps; --num_epochs ends the training
        at = size.index("--max_train_steps")
        size = size[:at] + size[at + 2 :]
    place = ["--output_dir", f"runs/{abs(hash(command))}"] if "--output_dir" in command else []
    if "--init_from" in command:  # of the size of the trained model; and one starts from another, in its folder
        size, place = size[size.index("--batch_size") :], []
        network = ["--statistics_images", "8"] if "_gan" in command else ["--num_inference_steps", "1"]
    return [*size, *network, *place]


def look_at_the_demo(programs, words):
    """Start it at a port that is free, fetch its page, and end it as Ctrl-C does."""
    with serving(programs, (programs.hfgen, *words, "--port", free_port()), r"http://\S+\s") as process:
        with urllib.request.urlopen(re.search(r"http://\S+", process.output.read_text()).group()) as page:
            assert b"gradio" in page.read()
        process.send_signal(signal.SIGINT)
        assert process.wait() == 0


def test_the_commands_in_order_train_sample_and_load(workplace, environment, programs, run, hfgen):
    trained = [command for command in COMMANDS if command.startswith("accelerate") and "path/to/images" in command]
    assert {script for script in TOY_NETWORK for command in trained if script in command} == set(TOY_NETWORK)
    for command in trained:
        (network,) = [arguments for script, arguments in TOY_NETWORK.items() if script in command]
        scored = SCORED if "runs/gan" in command else []
        scored += ["--learned_term_start", "1"] if "vae_learned" in command else []
        result = run([*shlex.split(command), *TOY_SIZE, *network, *scored], really=command == trained[0])
        assert result.returncode == 0, result.stderr
    for command in [command for command in COMMANDS if command.startswith("hfgen train ")]:
        result = run([*shlex.split(command), *toy_size_of(command)])
        assert result.returncode == 0, result.stderr
    described = re.search(r"^runs/ddpm/\n(.*?)```", TEXT, re.DOTALL | re.MULTILINE).group(1)
    for name in re.findall(r"^    ([\w.]+?)/?[ ,]", described, re.MULTILINE):
        assert (workplace / "runs" / "ddpm" / name).exists(), name
    for command in COMMANDS:
        if "model_cards/" in command:
            continue  # below
        if command.startswith("hfgen demo"):
            look_at_the_demo(programs, shlex.split(command)[1:])
        elif command.startswith("hfgen ") and not command.startswith(("hfgen study ", "hfgen train ")):
            number = {"sample": "2", "denoise": "2", "compare": "10", "evaluate": "10"}.get(command.split()[1])
            small = ["--num_images", number] if number else []
            small += ["--num_inference_steps", "2"] if number and "runs/ddpm" in command else []
            if command.startswith("hfgen steps"):
                small = ["--steps", "1,2", "--num_images", "10"]
            words = [*shlex.split(command), *small]
            if "your-name" in command:  # the Hub's address is read when a process starts
                result = run(words)
                assert result.returncode == 0, result.stderr
            elif command == "hfgen presets":  # which imports nothing that is slow: the command that is installed
                result = run(words, really=True)
                assert result.returncode == 0, result.stderr
            else:
                hfgen(words[1:])
    made = ("samples_sheet.png", "strips/denoising.png", "walk/sheet.png", "walk/walk.gif", "gan.gif", "curves.png")
    made += (
        "reconstructions_sheet.png",
        "between/sheet.png",
        "between/walk.gif",
        "scores/evaluation.md",
        "scores/closest.png",
        "comparison/sheet.png",
        "onnx/generator.onnx",
    )
    assert "hfgen presets" in COMMANDS and [name for name in made if not (workplace / name).is_file()] == []
    for code in PYTHON:
        if "your-name" in code:
            (workplace / "of_the_page.py").write_text(code.replace("your-name", "tester"))
            result = programs.run(workplace / "of_the_page.py", environment=environment, folder=workplace)
            assert result.returncode == 0, result.stderr
        else:
            exec(compile(code, "a page", "exec"), {})


def test_faces_are_seen_before_any_training(workplace, programs, run, monkeypatch):
    """At full size, and the first command in a new process, as whoever has just installed it runs them."""
    monkeypatch.chdir(workplace)
    (sampling,) = (command for command in COMMANDS if command.startswith("hfgen sample model_cards/"))
    (demo,) = (command for command in COMMANDS if command.startswith("hfgen demo model_cards/"))
    assert "model_cards/cat_faces_gan --num_images 64 " in sampling
    result = run(shlex.split(sampling), really=True)
    assert result.returncode == 0, result.stderr
    assert len(list((workplace / "faces").glob("*.png"))) == 64 and (workplace / "faces_sheet.png").is_file()
    look_at_the_demo(programs, shlex.split(demo)[1:])


def test_the_settings_of_a_run_are_a_preset(workplace, run):
    arguments = ["--preset", "runs/ddpm/training_config.json", "--output_dir", "runs/again"]
    result = run(["accelerate", "launch", "training_scripts/train_ddpm.py", *arguments])
    assert result.returncode == 0, result.stderr
    first, again = (
        json.loads((workplace / "runs" / name / "training_config.json").read_text()) for name in ("ddpm", "again")
    )
    assert {**first, "output_dir": "runs/again", "resume": None} == again


def test_the_study_runs_and_is_reported_as_the_page_says(programs, workplace, hfgen, monkeypatch):
    (text,) = [text for language, text in BLOCKS if language == "yaml"]
    (workplace / "my_study.yaml").write_text(text)
    assert len(expand(read_study_file(workplace / "my_study.yaml"), find_scripts(), "photos").cells) == 18
    tiny = yaml.safe_load(text)
    tiny |= {"data": {"sample_size": 16}, "budget": {"images": 8}, "seeds": [0], "evaluation": {"num_images": 10}}
    tiny |= {"grid": {"latent_dim": [4]}, "settings": {"batch_size": 4, "cpu": True}}
    tiny["families"]["SNGAN"]["settings"] = {"generator_channels": 4, "discriminator_channels": 4}
    tiny["families"]["VAE"]["settings"] = {"block_out_channels": [4, 8]}
    (workplace / "my_study.yaml").write_text(yaml.safe_dump(tiny, sort_keys=False))
    monkeypatch.setattr(launch, "launch_command", lambda *of: [str(programs.python), *launch_command(*of)[1:]])
    studies = [command for command in COMMANDS if command.startswith("hfgen study ")]
    for command in studies:
        words = shlex.split(command)
        if "my_study" in command and "--storage" not in command:
            hfgen(words[1:])
        else:  # hours, or machines that are not here: it is read as the command line does
            typer.main.get_command(cli.app).commands["study"].commands[words[2]].make_context(words[2], words[3:])
            assert words[2] == "work" or words[3] == "my_study.yaml" or find_study_file(words[3])
    assert len(studies) == 8
    for folder in ("runs/studies/my_study/report", "report"):
        assert "| SNGAN | latent_dim 4 |" in (workplace / folder / "report.md").read_text()
        assert (workplace / folder / "index.html").is_file()


def test_every_training_command_is_valid(workplace):
    """Those for several machines cannot be launched here; their settings are read as the script reads them."""
    launches = [command for command in COMMANDS if command.startswith("accelerate launch")]
    assert len(launches) == 8
    for line in launches:
        parsed = launch_command_parser().parse_args(line.split()[2:])
        script = load_script(Path(parsed.training_script).stem)
        method = getattr(script, SETTINGS[Path(parsed.training_script).stem])
        classes = (script.RunSettings, script.DataSettings, method)
        script.parse_settings(classes, script.PRESETS, parsed.training_script_args)


def test_every_option_and_preset_that_the_pages_name_exists():
    scripts = {name: load_script(name) for name in SETTINGS}
    classes = [getattr(scripts[name], settings) for name, settings in SETTINGS.items()]
    classes += [scripts["train_gan"].RunSettings, scripts["train_gan"].DataSettings]
    known = {field for cls in classes for field in cls.__dataclass_fields__} | {"preset", "help"}
    launcher = {"multi_gpu", "num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port"}
    commands = {
        "num_images",
        "reference",
        "extrapolate",
        "held_out",
        "repeats",
        "bits_per_dimension",
        "features",
        "mode",
        "steps",
        "save",
        "output",
        "cpu",
        "seeds",
        "sample_from",
        "image",
        "private",
        "half",
        "discriminator",
        "curves",
        "scores",
        "license",
        "space",
        "format",
        "budget",
        "storage",
        "grace_seconds",
        "time",
        "images",
        "version",
        "index",  # pip's --index-url
    }  # of `hfgen ...` and of the launcher, in the text
    assert set(re.findall(r"--(\w+)", TEXT)) <= known | launcher | commands
    presets = {path.stem for script in scripts.values() for path in script.PRESETS.glob("*.json")}
    assert set(re.findall(r"^\| `(\w+)`", TEXT, re.MULTILINE)) == presets


def test_the_make_targets_that_the_pages_name_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"\bmake ([\w-]+)$|`make ([\w-]+)`", TEXT, re.MULTILINE))
    assert targets
    for target in filter(None, sum(targets, ())):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def headings(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_link_between_pages_leads_to_a_file_and_a_heading():
    pages = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"]
    pages += [page for page in (ROOT / "model_cards").rglob("*.md") if page.name != "TEMPLATE.md"]
    for page in pages:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if "://" in link:
                continue
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in headings(target), f"{page.name}: {link}"
