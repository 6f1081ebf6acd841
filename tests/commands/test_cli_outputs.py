import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image
from tiny_ddpm import save_pipeline

from hfgen.commands.options import require_apart
from hfgen.models import ConvVAE
from hfgen.pipelines import VAEPipeline


# Of diffusers, with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("cli") / "pipeline")


@pytest.fixture
def trained(pipeline, image_folder, tmp_path):
    """A run as `hfgen train .` leaves it in the folder of its images."""
    run = image_folder / "runs" / "run"
    shutil.copytree(pipeline, run / "pipeline")
    (run / "training_config.json").write_text(json.dumps({"dataset": ".", "output_dir": "runs/run"}))
    return run


def test_pictures_are_not_written_among_the_images_of_a_dataset(
    refusal, pipeline, image_folder, trained, tmp_path, monkeypatch
):
    """They would be read as data by the next training, and by the same run when it is resumed."""
    monkeypatch.chdir(tmp_path)
    inside = ("--output", image_folder / "new" / "pictures")
    told = f"--output {image_folder / 'new' / 'pictures'} is inside the dataset folder {image_folder} and"
    for command in ("sample", "denoise", "interpolate"):
        for source in (trained, trained / "pipeline"):
            assert told in refusal(command, source, *inside)
    assert told in refusal("reconstruct", trained, image_folder / "0.png", *inside)
    assert told in refusal("data", "inspect", image_folder, *inside)
    for command in ("evaluate", "compare", "steps"):
        assert told in refusal(command, pipeline, "--reference", image_folder, *inside)
        assert told in refusal(command, trained, "--reference", "toy_paintings:14", *inside)
    assert told in refusal("evaluate-images", image_folder, "--reference", "x", "--sample_size", 16, *inside)
    for command, name in (("progress", "a.gif"), ("curves", "a.png")):
        line = refusal(command, trained, "--output", image_folder / name)
        assert f"--output {image_folder / name} is inside the dataset folder" in line
    assert not (image_folder / "new").exists()


def test_what_another_command_has_written_meanwhile_is_not_overwritten(refusal, pipeline, tmp_path, monkeypatch):
    def generate(*_):
        (output / "000000.png").write_bytes(b"of another command")
        yield Image.new("RGB", (8, 8))

    output = tmp_path / "faces"
    output.mkdir()
    (output / ".faces.partial-7").touch()  # of a process that was killed when it filled the folder
    monkeypatch.setattr("hfgen.inference.sampling.generate_images", generate)
    line = refusal("sample", pipeline, "--output", output)
    assert line.endswith(f"--output {output}: another command has written there meanwhile; choose another folder")
    assert [file.read_bytes() for file in output.glob("[!.]*")] == [b"of another command"]
    assert not (tmp_path / "faces_sheet.png").exists()


def test_pictures_may_lie_in_runs_and_where_nothing_is_known_of_the_data(trained, image_folder, tmp_path, monkeypatch):
    require_apart(trained / "curves.png", str(image_folder), [trained])  # the loader skips runs
    monkeypatch.chdir(tmp_path)
    require_apart(tmp_path / "curves.png", sources=[trained])
    monkeypatch.chdir(trained)
    require_apart(image_folder / "new", sources=["owner/model"])  # on the Hub
    shutil.move(trained, tmp_path / "moved")
    require_apart(tmp_path / "new", sources=[tmp_path / "moved"])
    require_apart(image_folder / "new", "~nobody-of-that-name/images")


def test_names_of_any_length_can_be_reconstructed_and_a_folder_is_called_one(hfgen, refusal, tmp_path):
    VAEPipeline(ConvVAE(8, latent_dim=3, block_out_channels=(4,)).eval()).save_pretrained(tmp_path / "vae")
    long = tmp_path / f"{'ü' * 120}.png"
    Image.new("RGB", (8, 8)).save(long)
    assert hfgen("reconstruct", tmp_path / "vae", long, "--output", tmp_path / "out", "--device", "cpu")[0] == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"000000-{'ü' * 100}.png"]
    odd = tmp_path / os.fsdecode(b"caf\xe9.png")  # Latin-1
    Image.new("RGB", (8, 8)).save(odd)
    assert hfgen("reconstruct", tmp_path / "vae", odd, "--output", tmp_path / "odd", "--device", "cpu")[0] == 0
    assert [path.name for path in (tmp_path / "odd").iterdir()] == ["000000-caf.png"]
    line = refusal("reconstruct", tmp_path / "vae", tmp_path, "--output", tmp_path / "other", "--device", "cpu")
    assert line == f"error: IMAGES {tmp_path}: is a folder; give image files"


@pytest.mark.parametrize(
    "arguments",
    [
        ("data", "inspect", "toy_paintings:12", "--json", "file/report.json"),
        ("data", "floor", "toy_paintings:12", "--json", "file/report.json"),
        ("sample", "gone", "--output", "file/new"),
        ("progress", "gone", "--output", "file/new.gif"),
        ("kaggle-zip", "gone", "--output", "file/images.zip"),
    ],
)
def test_an_output_that_cannot_be_created_is_refused_before_the_work(refusal, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("a file, where a folder is needed")
    line = refusal(*arguments)
    option, place = arguments[-2:]
    assert f"{option} {place}: cannot be created, because" in line and "file is not a folder" in line


def test_a_file_of_another_kind_is_not_written_under_a_name_that_says_otherwise(refusal, tmp_path):
    for command, ending in (("progress", ".gif"), ("curves", ".png or .pdf or .svg"), ("kaggle-zip", ".zip")):
        assert f"a.doc: must end in {ending}" in refusal(command, "gone", "--output", tmp_path / "a.doc")
