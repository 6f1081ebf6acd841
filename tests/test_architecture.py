import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import diffusers
import pytest


ROOT = Path(__file__).resolve().parents[1]
LIBRARY, PIPELINES, SCRIPTS = ROOT / "hfgen", ROOT / "pipelines", ROOT / "training_scripts"
SOURCES = sorted(file for folder in (LIBRARY, PIPELINES, SCRIPTS) for file in folder.rglob("*.py"))
MODEL_FILES = sorted(file for file in (LIBRARY / "models").glob("*.py") if file.name != "__init__.py")
SHIPPED_FILES = [*MODEL_FILES, *sorted(PIPELINES.glob("pipeline_*.py"))]
LOSS_FILES = sorted((LIBRARY / "losses").glob("*.py"))

NUMBERS = ("float", "int", "torch.Tensor | float")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_TEST_NAME = 80
MAX_MAIN_LINES = 120  # a script's `main` is the whole method, from top to bottom
MODULES_THAT_UNPICKLE = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def each(files: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("file", files, ids=name_of)


@functools.cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def imports(file: Path) -> set[str]:
    """The modules that a file imports, anywhere in it: `a.b` for `import a.b`, `a.b.c` for `from a.b import c`."""
    found = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(file)}:{node.lineno} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imports_of_hfgen(file: Path) -> set[str]:
    return {module for module in imports(file) if module.split(".")[0] == "hfgen"}


def below(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def functions(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def public(file: Path) -> list[ast.FunctionDef | ast.ClassDef]:
    """The functions and classes at the top of a file that do not start with an underscore."""
    definitions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return [node for node in tree(file).body if isinstance(node, definitions) and not node.name.startswith("_")]


def has_docstring(node: ast.FunctionDef | ast.ClassDef) -> bool:
    """Whether it has one of its own, or takes that of another class: `__doc__ = Other.__doc__`."""
    taken = [part for part in node.body if isinstance(part, ast.Assign) and ast.unparse(part.targets[0]) == "__doc__"]
    return bool((ast.get_docstring(node) or "").strip() or taken)


def test_the_files_that_the_rules_speak_of_are_found():
    assert {"unet_base.py", "unet_attention.py", "pipeline_ddpm.py"} <= {file.name for file in SHIPPED_FILES}
    assert {"run.py", "cli.py", "train_ddpm.py", "diffusion.py"} <= {file.name for file in SOURCES}


@each([file for file in SOURCES if file not in SHIPPED_FILES and file != LIBRARY / "texts.py"])
def test_what_is_printed_goes_through_one_place_that_makes_names_harmless(file):
    calls = [ast.unparse(node.func) for node in ast.walk(tree(file)) if isinstance(node, ast.Call)]
    assert not {"print", "typer.echo", "click.echo", "typer.secho", "sys.stdout.write"} & set(calls)
    assert "tqdm.write" not in calls or "one_message" in calls


# ----------------------------------------------------------------------------------------------------- who knows whom


@each(SHIPPED_FILES)
def test_a_published_file_imports_only_what_diffusers_brings_along(file):
    assert {module.split(".")[0] for module in imports(file)} <= {
        "torch",
        "diffusers",
        "PIL",
        *sys.stdlib_module_names,
    }


@each([*LOSS_FILES, *MODEL_FILES])
def test_losses_and_models_know_nothing_of_hfgen(file):
    if file.name == "__init__.py":  # may list what is in its own folder
        assert all(below(module, f"hfgen.{file.parent.name}") for module in imports_of_hfgen(file))
    else:
        assert imports_of_hfgen(file) == set()


def test_the_list_of_models_imports_model_files_alone():
    assert all(below(module, "hfgen.models") for module in imports_of_hfgen(LIBRARY / "models" / "__init__.py"))


@each(sorted((LIBRARY / "training").glob("*.py")))
def test_the_rails_know_no_method_no_model_no_loss_and_no_pipeline(file):
    forbidden = ("hfgen.methods", "hfgen.models", "hfgen.losses", "hfgen.pipelines", "diffusers")
    assert [module for module in imports(file) if below(module, *forbidden)] == []


@each(sorted(PIPELINES.glob("*.py")))
def test_pipelines_know_of_hfgen_only_the_models_and_how_to_publish(file):
    known = ["hfgen.models", "hfgen.pipelines"]
    if file.name == "self_contained.py":  # `push_to_hub` of a pipeline
        known += ["hfgen.hub"]
    assert all(below(module, *known) for module in imports_of_hfgen(file))


# A room is a folder of hfgen/, or pipelines/ or training_scripts/, which are imported as hfgen.pipelines and
# hfgen.training_scripts, or one of the files beside them, which anybody may import. From below to above: a room knows
# only rooms that stand before it. A training script combines the rooms before it; only a study imports it, to read its
# settings.
ROOMS = (
    *("models", "losses", "data", "methods", "metrics", "hub", "training", "pipelines", "inference", "evaluation"),
    *("settings", "demo", "export", "publishing", "training_scripts", "studies", "commands", "cli", "__main__"),
)
FILES = (
    *("errors", "arguments", "config", "ranges", "families", "randomness", "hardware", "files", "integrity", "texts"),
    *("bars", "pages", "run_files", "__init__"),
)


def rooms_of(file: Path) -> set[str]:
    """The rooms that a file imports from."""
    found = {module.split(".")[1] for module in imports_of_hfgen(file) if module != "hfgen"}
    return {name for name in found if name not in FILES and not name.startswith("__")}


def test_every_folder_and_file_of_the_library_is_a_room_or_importable_by_anybody():
    names = {path.stem for path in LIBRARY.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert names | {"pipelines", "training_scripts"} == {*ROOMS, *FILES}


def room_of(file: Path) -> str:
    return file.relative_to(LIBRARY if LIBRARY in file.parents else ROOT).parts[0].removesuffix(".py")


@each(SOURCES)
def test_a_room_knows_only_those_below_it(file):
    room = room_of(file)
    above = () if room not in ROOMS else ROOMS[ROOMS.index(room) + 1 :]
    assert rooms_of(file) & {*above} == set()
    assert room in ROOMS or not rooms_of(file)  # the files that anybody may import know no room


def test_what_each_pipeline_s_file_brings_along_is_word_for_word_the_same():
    # Each is published by itself, so that they cannot import it from one another. A class's own name may differ.
    texts: dict[str, dict[str, str]] = {"_save_code": {}, "save_pretrained": {}, "LIBRARIES": {}, "HUB_ARGUMENTS": {}}
    for file in SHIPPED_FILES:
        for node in ast.walk(tree(file)):
            name = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else getattr(node, "name", None)
            if name in texts:
                source = ast.get_source_segment(file.read_text(), node)
                texts[name][file.name] = re.sub(r"\b(DDPM|GAN|VAE)Pipeline\b", "Pipeline", source)
    pipelines = {file.name for file in PIPELINES.glob("pipeline_*.py")}
    assert [found.keys() == pipelines for found in texts.values()] == [True] * 4
    assert [len(set(found.values())) for found in texts.values()] == [1] * 4


@each([file for file in SOURCES if room_of(file) != "studies"])
def test_nothing_but_a_study_imports_a_training_script(file):
    scripts = ("hfgen.training_scripts", "training_scripts", *(script.stem for script in SCRIPTS.glob("train_*.py")))
    assert [module for module in imports(file) if below(module, *scripts)] == []


def test_only_a_script_of_the_user_s_own_is_imported_by_its_path():
    # Such an import is not seen by the tests above.
    found = [name_of(file) for file in SOURCES if "spec_from_file_location" in file.read_text()]
    assert found == ["hfgen/studies/scripts.py"]


def test_hfgen_and_its_lists_of_losses_import_neither_torch_nor_diffusers():
    code = (
        "import sys, hfgen, hfgen.losses; print({'torch', 'diffusers', 'numpy', 'PIL'} & sys.modules.keys() or 'none')"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (process.stdout.strip(), process.stderr) == ("none", "")


@pytest.mark.parametrize("arguments", [("gan", "--lerning_rate=1"), ("vae", "--preset=v"), ("ddpm", "--help")])
def test_hfgen_train_answers_without_the_slow_imports(arguments):
    code = (
        "import sys; from hfgen.cli import main; sys.argv = ['hfgen', 'train', *sys.argv[1:]]\n"
        "try: main()\n"
        "finally: print({'torch', 'diffusers', 'accelerate', 'matplotlib'} & sys.modules.keys(), file=sys.stderr)"
    )
    process = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert process.returncode == (0 if "--help" in arguments else 2)
    assert process.stderr.splitlines()[-1] == "set()"


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ("progress nowhere --output x.gif", 2),
        ("curves nowhere --output x.png", 2),
        ("page nowhere", 2),
        ("presets", 0),
        ("study status nowhere", 2),
        ("study plan nowhere.yaml", 2),
        ("study run nowhere.yaml", 2),
    ],
)
def test_what_reads_only_texts_and_pictures_does_not_import_torch(tmp_path, arguments, status):
    code = (
        "import sys; from hfgen.cli import main; sys.argv = ['hfgen', *sys.argv[1:]]\n"
        "try: main()\n"
        "finally: print({'torch', 'diffusers', 'accelerate', 'transformers'} & sys.modules.keys(), file=sys.stderr)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments.split()], capture_output=True, text=True, cwd=tmp_path
    )
    assert (process.returncode, process.stderr.splitlines()[-1]) == (status, "set()")


# ------------------------------------------------------------------------------------------- names that diffusers has


@each(SHIPPED_FILES)
def test_no_published_file_or_folder_is_named_like_a_pipeline_of_diffusers(file):
    assert hasattr(diffusers.pipelines, "ddpm")  # such a name would be taken for that pipeline on loading
    assert not hasattr(diffusers.pipelines, file.stem)
    assert not hasattr(diffusers.pipelines, file.parent.name)


def test_published_files_have_names_of_their_own():
    # Published code lands in one folder, whichever repository it is from: files of one name overwrite each other.
    names = [file.name for file in SHIPPED_FILES]
    assert len(names) == len(set(names))
    assert "pipeline.py" not in names


@each(MODEL_FILES)
def test_the_file_of_a_network_has_modelmixin_as_a_global_name(file):
    # diffusers looks it up in the network's module when it loads a pipeline with the installed class.
    assert "diffusers.ModelMixin" in imports(file)


# ------------------------------------------------------------------------------------------------------ documentation


@each(SOURCES)
def test_every_module_and_every_public_function_and_class_has_a_docstring(file):
    assert ast.get_docstring(tree(file))
    assert [node.name for node in public(file) if not has_docstring(node)] == []


@each(LOSS_FILES)
def test_the_docstring_of_every_public_function_of_the_losses_states_shapes(file):
    def takes_tensors_only(node):  # a function of plain numbers has no shapes to tell
        arguments = node.args.args if isinstance(node, ast.FunctionDef) else []
        return not any(
            argument.annotation and ast.unparse(argument.annotation) in NUMBERS for argument in arguments[:1]
        )

    told = [node for node in public(file) if takes_tensors_only(node)]
    silent = [node.name for node in told if "(batch_size" not in (ast.get_docstring(node) or "")]
    assert told or file.name == "__init__.py"
    assert silent == []


@each(MODEL_FILES)
def test_the_docstring_of_every_forward_of_a_model_states_shapes(file):
    forwards = [node for node in functions(file) if node.name == "forward"]
    assert forwards

    def is_silent(node: ast.FunctionDef) -> bool:  # a parametrization maps a weight, which has no batch
        shape = "(out_channels" if [one.arg for one in node.args.args] == ["self", "weight"] else "(batch_size"
        return shape not in (ast.get_docstring(node) or "")

    assert [node.lineno for node in forwards if is_silent(node)] == []


# --------------------------------------------------------------------------------------------------------------- size


@each(SOURCES)
def test_no_file_is_longer_than_one_concept_needs(file):
    assert len(file.read_text().splitlines()) <= MAX_FILE_LINES


@each(SOURCES)
def test_no_function_is_longer_than_a_screen_but_the_main_of_a_script(file):
    def limit(function: ast.FunctionDef) -> int:
        return MAX_MAIN_LINES if function.name == "main" and file.parent == SCRIPTS else MAX_FUNCTION_LINES

    lengths = {node: node.end_lineno - node.lineno + 1 for node in functions(file)}
    assert {node.name: length for node, length in lengths.items() if length > limit(node)} == {}


def test_no_function_of_the_tests_is_longer_than_a_screen_and_no_name_too_long():
    for file in sorted((ROOT / "tests").rglob("*.py")):
        for function in functions(file):
            where = f"{name_of(file)}:{function.lineno}"
            assert function.end_lineno - function.lineno + 1 <= MAX_FUNCTION_LINES, where
            assert len(function.name) <= MAX_TEST_NAME, where


# ----------------------------------------------------------------------------------------------------------- security


@each(SOURCES)
def test_nothing_is_unpickled(file):
    assert {module.split(".")[0] for module in imports(file)} & MODULES_THAT_UNPICKLE == set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Call):
            arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert arguments.get("allow_pickle", "False") == "False", f"line {node.lineno}"
            if ast.unparse(node.func) == "torch.load":
                assert arguments.get("weights_only") == "True", f"line {node.lineno}"
    assert "torch.load" not in imports(file)  # as `from torch import load`, which the line above would not see
