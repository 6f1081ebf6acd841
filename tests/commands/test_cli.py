import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from tiny_ddpm import save_pipeline

from hfgen import __version__, cli
from hfgen.bars import IN_A_LOG, update_interval
from hfgen.commands.options import LOADING, loading


# Of diffusers, with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("cli") / "pipeline")


def test_help_names_every_command(hfgen):
    status, out, _ = hfgen("--help")
    assert status == 0
    assert all(command in out for command in ("sample", "denoise", "data"))
    status, out, _ = hfgen("data", "--help")
    assert status == 0
    assert "inspect" in out


def test_help_lists_the_commands_in_the_order_of_their_use(hfgen, monkeypatch):
    for name in ("GITHUB_ACTIONS", "FORCE_COLOR", "PY_COLORS"):  # they colour what is printed
        monkeypatch.delenv(name, raising=False)
    status, out, _ = hfgen("--help")
    rows = re.findall(r"^│ ([a-z]\S*)", out, re.MULTILINE)
    assert status == 0 and tuple(rows) == cli.ORDER and set(typer.main.get_command(cli.app).commands) == {*cli.ORDER}
    assert re.search(r"--version +print", out)


@pytest.mark.parametrize("option", ["--num-images", "--num_images", "--num-images="])
def test_an_option_may_be_written_with_dashes(refusal, hfgen, pipeline, tmp_path, option):
    output = tmp_path / "with-dash_and-more"  # a value is taken as it is
    number = ["--num-images=1"] if option.endswith("=") else [option, 1]
    options = ("--num-inference-steps", 2, "--output", output, "--device", "cpu")
    status, _, err = hfgen("sample", pipeline, *number, *options)
    assert status == 0 and len([*output.iterdir()]) == 1, err


@pytest.mark.parametrize("words", [("study", "plan", "no-such-study", "--feature-weights", "my-file")])
def test_options_of_a_group_may_be_written_with_dashes_and_values_keep_theirs(refusal, words):
    assert "no-such-study" in refusal(*words)


def test_an_error_that_is_no_mistake_of_the_user_keeps_its_traceback(monkeypatch, tmp_path, pipeline):
    monkeypatch.setattr("hfgen.inference.opening.open_pipeline", lambda *arguments: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["hfgen", "sample", str(pipeline), "--output", str(tmp_path / "images")])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_the_command_line_answers_without_importing_torch_or_diffusers():
    code = (
        "import sys, hfgen.cli, hfgen\n"
        "heavy = {'torch', 'diffusers', 'numpy', 'PIL'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("command", [("data", "inspect"), ("page",)])
def test_ctrl_c_ends_a_command_in_one_line(hfgen, monkeypatch, image_folder, command):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hfgen.data.store.load_images", interrupt)
    monkeypatch.setattr("hfgen.training.page.best_fitting_classes", interrupt)
    assert hfgen(*command, image_folder) == (130, "", "interrupted by Ctrl-C\n")


def test_the_commands_run_as_a_module(tmp_path):
    # From elsewhere, so that it is the installed hfgen.
    words = (sys.executable, "-m", "hfgen", "--version")
    assert subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stdout == (
        f"hfgen {__version__}\n"
    )


def test_slow_imports_are_announced_on_a_terminal_and_the_line_is_erased(capsys, monkeypatch):
    with loading():
        pass
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with loading():  # nothing is slow any more
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.delitem(sys.modules, "diffusers", raising=False)
    with pytest.raises(KeyboardInterrupt), loading():
        assert capsys.readouterr().err == LOADING
        raise KeyboardInterrupt
    assert capsys.readouterr().err == f"\r{' ' * len(LOADING)}\r"


def test_a_command_needs_no_stderr(monkeypatch):
    monkeypatch.delitem(sys.modules, "diffusers")
    monkeypatch.setattr(sys, "stderr", None)
    with loading():
        pass
    assert update_interval() == IN_A_LOG
