"""The files of a Space, and its page where hfgen is not installed."""

import ast
import os
import sys
from importlib.metadata import version

import numpy as np
import pytest
import yaml
from demo_pages import Complaints, browser, free_port, hfgen_blocked, patient, serving, shown_images, toy_pipelines

from hfgen.demo.space import write_space
from hfgen.errors import UserError
from hfgen.inference.sampling import image_generators


pytest.importorskip("gradio", reason='needs gradio: pip install "hfgen[demo]"')


def card_of(folder):
    _, settings, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(settings), text


def test_the_card_names_the_pipeline_and_what_runs_it(tmp_path):
    title = 'Cats: "drawn" #1 · ü'
    write_space(tmp_path / "space", "someone/cats", None, title)
    settings, text = card_of(tmp_path / "space")
    assert settings == {
        "title": title,
        "sdk": "gradio",
        "sdk_version": version("gradio"),
        "app_file": "app.py",
        "models": ["someone/cats"],
    }
    assert "https://huggingface.co/someone/cats" in text
    write_space(tmp_path / "licensed", "someone/cats", None, title, license_name="apache-2.0")
    assert card_of(tmp_path / "licensed")[0] == settings | {"license": "apache-2.0"}


def test_a_title_is_text_on_the_card_and_the_page(tmp_path):
    title = "[x](javascript:alert(1)) <img src=y>"
    write_space(tmp_path / "space", "someone/cats", None, title)
    settings, text = card_of(tmp_path / "space")
    shown = "# [x\\](javascript:alert(1)) &lt;img src=y&gt;"
    assert settings["title"] == title and shown in text.splitlines()
    gradio = pytest.importorskip("gradio", reason='needs gradio: pip install "hfgen[demo]"')
    from hfgen.demo.page import build_demo

    page = build_demo(toy_pipelines(), title)
    assert shown in [block.value for block in page.blocks.values() if isinstance(block, gradio.Markdown)]


def test_what_is_required_holds_here_and_pins_the_major_of_gradio(tmp_path):
    from packaging.requirements import Requirement

    write_space(tmp_path, "someone/cats", None, "Cats")
    required = {
        one.name: one.specifier for one in map(Requirement, (tmp_path / "requirements.txt").read_text().split())
    }
    assert set(required) == {"torch", "diffusers", "gradio"}
    assert all(specifier.contains(version(name)) for name, specifier in required.items())
    major = int(version("gradio").split(".")[0])
    assert not required["gradio"].contains(f"{major + 1}.0") and not required["gradio"].contains(f"{major - 1}.9")
    assert not required["diffusers"].contains("0.30")


def test_the_files_import_each_other_and_nothing_of_hfgen(tmp_path):
    write_space(tmp_path, "someone/cats", "v1", "Cats")
    modules = set()
    for file in tmp_path.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            modules |= {name.split(".")[0] for name in names}
    own = {
        "page",
        "fields",
        "drawing",
        "families",
        "interpolation",
        "metadata",
        "randomness",
        "rgb",
        "schedules",
        "texts",
    }
    assert modules - set(sys.stdlib_module_names) == own | {"torch", "diffusers", "gradio", "PIL", "numpy"}
    assert {f"{name}.py" for name in own} | {"app.py"} == {file.name for file in tmp_path.glob("*.py")}


@pytest.mark.parametrize("revision", [None, "v1", "it's"])
def test_the_app_loads_the_revision(tmp_path, revision):
    write_space(tmp_path, 'a "quoted" \\ path', revision, "Cats")
    assigned = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse((tmp_path / "app.py").read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }
    assert assigned == {"REPO_ID": 'a "quoted" \\ path', "REVISION": revision}


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "app.py").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        write_space(tmp_path, "someone/cats", None, "Cats")
    assert [file.name for file in tmp_path.iterdir()] == ["app.py"] and (tmp_path / "app.py").read_text() == "mine"


@pytest.mark.slow
def test_the_page_draws_where_hfgen_is_not_installed(programs, tmp_path):
    pipeline = toy_pipelines()["gan"]
    pipeline.save_pretrained(tmp_path / "published")
    write_space(tmp_path / "space", str(tmp_path / "published"), None, "Toy cats")
    path, port = hfgen_blocked(tmp_path / "path"), free_port()
    environment = {"PYTHONPATH": path, "HF_HOME": str(tmp_path / "home"), "GRADIO_SERVER_PORT": str(port)}
    (tmp_path / "blocked.py").write_text("import hfgen\n")
    blocked = programs.run(tmp_path / "blocked.py", environment=os.environ | environment, folder=tmp_path)
    assert "hfgen is not installed here" in blocked.stderr
    command, address = (tmp_path / "space" / "app.py",), f"http://127.0.0.1:{port}"
    with browser() as chromium, serving(programs, command, address, **environment):
        page = patient(chromium.new_page())
        complaints = Complaints(page, address)
        page.goto(address)
        drawn = shown_images(page, 12)
        assert page.title() == "Toy cats"
        assert page.get_by_role("heading", name="Toy cats").is_visible()
        assert complaints.found == []
    expected = pipeline(12, generator=image_generators(0, 0, 12)).images
    for ours, theirs in zip(drawn, expected, strict=True):
        np.testing.assert_allclose(ours, np.asarray(theirs).astype(int), atol=1)
