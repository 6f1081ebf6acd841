"""The check before an upload: what does not load without hfgen, or draws otherwise there, is refused."""

import os
import shutil

import pytest
import torch
from hub_client import contents
from toy_runs import train

from hfgen.errors import UserError
from hfgen.hub.upload import Target
from hfgen.publishing import load_check
from hfgen.publishing import publish as hub
from hfgen.publishing.load_check import check_loads_anywhere


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    train("gan", folder / "run", "--cache_dir", str(folder / "cache"), "--max_train_steps", "1")
    return folder / "run" / "pipeline"


@pytest.fixture
def folder(pipeline, tmp_path):
    return shutil.copytree(pipeline, tmp_path / "folder", ignore=shutil.ignore_patterns("digests.json"))


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """The cache of the modules of remote code, which nothing may be left in."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.setenv("HF_MODULES_CACHE", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture
def quick(programs, monkeypatch, tmp_path):
    """Let the process of the check be forked from one that has imported torch."""

    def run(command, cwd, env, **options):
        _, flag, code, *arguments = command
        assert flag == "-c"
        (tmp_path / "code.py").write_text(code)
        return programs.run(tmp_path / "code.py", *arguments, environment=env, folder=cwd)

    monkeypatch.setattr(load_check.subprocess, "run", run)


def edit(file, old, new):
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))


@pytest.mark.slow
def test_a_whole_folder_passes_whatever_the_user_has_set(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFUSERS_DISABLE_REMOTE_CODE", "1")
    monkeypatch.chdir(folder.parent)
    threads, before = torch.get_num_threads(), contents(folder)
    torch.set_num_threads(3)
    try:
        check_loads_anywhere(folder.relative_to(folder.parent))
        assert contents(folder) == before and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] == "1"


def test_code_that_draws_otherwise_is_refused(folder, quick):
    edit(folder / "pipeline_gan.py", "images = [self.generator(chunk)", "images = [0.9999 * self.generator(chunk)")
    with pytest.raises(UserError, match="generates other images without hfgen installed; nothing was uploaded"):
        check_loads_anywhere(folder)


def test_code_that_needs_hfgen_is_refused(folder, quick):
    edit(folder / "generator" / "dcgan.py", "import torch\n", "import torch\nimport hfgen.errors\n")
    with pytest.raises(UserError, match="does not load without hfgen installed: .*hfgen.*; nothing was uploaded"):
        check_loads_anywhere(folder)


def test_a_folder_whose_code_is_missing_is_refused_and_nothing_of_it_goes_up(pipeline, quick, tmp_path, monkeypatch):
    make = hub.make_publication

    def without_code(source, target, *options):
        make(source, target, *options)
        (target / "generator" / "dcgan.py").unlink()

    monkeypatch.setattr(hub, "make_publication", without_code)
    monkeypatch.setattr(hub, "check_access", lambda repo_id, *_: Target(repo_id, "model", False, None, False))
    monkeypatch.setattr(hub, "upload", lambda *_: pytest.fail("it was uploaded"))
    with pytest.raises(UserError, match="does not load without hfgen installed"):
        hub.publish(pipeline, "tester/toy")
