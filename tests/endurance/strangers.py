"""Open pipelines as strangers could write them, and check that each is only loaded or refused.

    python tests/endurance/strangers.py

Not part of `make test`: it takes about five minutes on one CPU core. A toy pipeline of each family is changed in ways
that a stranger could choose: modules, classes, files and sizes in `model_index.json` and the configurations, code and
pickles beside them. Each is opened and sampled from in a process of its own, which has 3 GB of memory and one minute
beyond what the libraries take. It may generate images or end in a `UserError`. It must not run code or a program,
unpickle, connect to anything, or open a file outside its folder. A link is followed, as the cache of the Hub is made
of links, but what it leads to must not be quoted.
"""

import contextlib
import itertools
import json
import os
import pickle
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
os.environ["HF_HUB_OFFLINE"] = "1"

from published_toys import train_toys  # noqa: E402

from hfgen.errors import UserError  # noqa: E402
from hfgen.inference.opening import open_pipeline  # noqa: E402
from hfgen.inference.sampling import SamplingOptions, generate_images  # noqa: E402


MEMORY = 3 << 30
SECONDS = 60
SECRET = "a secret of the user, outside the folder"
EVIL_CODE = """
import pathlib
pathlib.Path({mark!r}).write_text("code of the folder was run")
from diffusers import ModelMixin, DiffusionPipeline
class Evil(ModelMixin): pass
class GANPipeline(DiffusionPipeline): pass
"""
HUGE, DEEP = 10**12, "[" * 200_000 + "]" * 200_000
# Values that a setting can be given, of the wrong type, size or kind.
ODD_VALUES: list[Any] = [HUGE, -1, 0, 1e308, None, True, "x", [], [HUGE], {"a": 1}, [[1]], "../../secret", "é\n\x00"]

Change = Callable[[Path], object]


def edit(file: str, **changes: Any) -> Change:
    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | changes))

    return change


def write(file: str, content: str | bytes) -> Change:
    def change(folder: Path) -> None:
        data = content.encode() if isinstance(content, str) else content
        (folder / file).unlink(missing_ok=True)
        (folder / file).write_bytes(data)

    return change


def link(file: str, target: str | Path) -> Change:
    def change(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).symlink_to(target)

    return change


def fifo(file: str) -> Change:
    def change(folder: Path) -> None:
        (folder / file).unlink()
        os.mkfifo(folder / file)

    return change


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


class Unpickled:
    def __init__(self, mark: Path):
        self._mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self._mark}",)


def folders_of_strangers(family: str, part: str, settings: list[str], secret: Path, mark: Path) -> dict[str, Change]:
    """Return what is done to a pipeline of a family, by description.

    Args:
        part: the network, and so the folder of its files.
        settings: of the network's configuration.
        secret: a file that must not be read.
        mark: a file that code of the folder would create.
    """
    weights, config = f"{part}/diffusion_pytorch_model.safetensors", f"{part}/config.json"
    code = EVIL_CODE.format(mark=str(mark))
    changes: dict[str, Change] = {"unchanged": lambda folder: None}
    modules = [("os", "system"), ("subprocess", "Popen"), ("builtins", "eval"), ("evil", "Evil"), ("antigravity", "x")]
    modules += [("diffusers", "StableDiffusionPipeline"), ("diffusers", "UNet2DModel"), ("transformers", "BertModel")]
    modules += [("../evil", "Evil"), ("hfgen.errors", "UserError"), ("", ""), ("pickle", "loads"), (None, None)]
    for module, name in modules:
        evil_files = both(write("evil.py", code), write(f"{part}/evil.py", code))
        changes[f"{part} is {module}.{name}"] = both(evil_files, edit("model_index.json", **{part: [module, name]}))
    for name in ["Evil", ["evil", "GANPipeline"], "../evil", 7, None, ["os", "system"], {}, "StableDiffusionPipeline"]:
        changes[f"pipeline class {name}"] = both(write("evil.py", code), edit("model_index.json", _class_name=name))
    changes["code of its own"] = both(*(write(f"{place}", code) for place in _code_of(family)))
    changes["a part more"] = edit("model_index.json", safety_checker=["os", "system"])
    changes["a part in another folder"] = edit("model_index.json", **{f"../{part}": ["diffusers", "UNet2DModel"]})
    changes["auto_map"] = edit(config, auto_map={"AutoModel": "evil--evil.Evil"}, _name_or_path="http://127.0.0.1:9")
    changes["class of the configuration"] = edit(config, _class_name="Evil")
    for setting, value in itertools.product(settings, ODD_VALUES):
        changes[f"{setting}={str(value)[:20]!r}"] = edit(config, **{setting: value})
    for file in ("model_index.json", config):
        for name, content in {
            "deep": DEEP,
            "list": "[]",
            "number": "7",
            "nothing": "",
            "bytes": b"\xff\xfe\x00",
        }.items():
            changes[f"{file} is {name}"] = write(file, content)
        changes[f"{file} is a link out"] = link(file, secret)
        changes[f"{file} is endless"] = link(file, "/dev/zero")
        changes[f"{file} is a fifo"] = fifo(file)
    changes["weights claim 2**60 bytes"] = write(weights, (2**60).to_bytes(8, "little") + b"{}")
    header = json.dumps({"x": {"dtype": "F32", "shape": [HUGE, HUGE], "data_offsets": [0, 4]}}).encode()
    changes["weights of a huge shape"] = write(weights, len(header).to_bytes(8, "little") + header + b"\0" * 4)
    changes["weights are a link out"] = link(weights, secret)
    changes["weights are endless"] = link(weights, "/dev/zero")
    changes["weights are a fifo"] = fifo(weights)
    changes["only pickled weights"] = both(
        lambda folder: (folder / weights).unlink(),
        write(f"{part}/diffusion_pytorch_model.bin", pickle.dumps(Unpickled(mark))),
    )
    index = json.dumps({"metadata": {}, "weight_map": {"x": os.path.relpath(secret, "/tmp/a/b")}})
    changes["an index of shards out"] = both(
        lambda folder: (folder / weights).unlink(), write(f"{weights}.index.json", index)
    )
    if family == "ddpm":
        for setting in ("num_train_timesteps", "beta_start", "beta_schedule", "trained_betas", "solver_order"):
            for value in ODD_VALUES:
                name = "scheduler/scheduler_config.json"
                changes[f"scheduler: {setting}={str(value)[:20]!r}"] = edit(name, **{setting: value})
        changes["10**9 steps"] = edit("model_index.json", num_inference_steps=10**9)
    return changes


def _code_of(family: str) -> list[str]:
    return {
        "gan": ["pipeline_gan.py", "generator/dcgan.py"],
        "vae": ["pipeline_vae.py", "vae/vae.py", "density/gaussian_mixture.py"],
        "ddpm": ["pipeline_ddpm.py", "unet/unet_base.py"],
    }[family]


def opened(folder: Path) -> str:
    """Open a folder in a process of its own; return what was wrong, empty if nothing."""
    report = folder.with_suffix(".report")
    report.write_text("")
    pid = os.fork()
    if pid == 0:
        _child(folder, report)
    _, status = os.waitpid(pid, 0)
    said = report.read_text()
    if os.WIFSIGNALED(status):
        said += f"ended by {signal.Signals(os.WTERMSIG(status)).name}; "
    return said


def _child(folder: Path, report: Path) -> None:
    """Open the folder, write the faults into `report`, and end this process."""
    watching, faults = True, []
    allowed = [str(folder), sys.prefix, sys.base_prefix, str(ROOT), "/proc/", "/sys/", "/dev/null", "/usr/", "/etc/"]
    allowed += [str(folder.parent / "secret")]
    allowed += [str(Path(path).resolve()) for path in sys.path if path] + [os.path.expanduser("~/.cache")]

    def watch(event: str, arguments: tuple) -> None:
        if not watching:
            return
        if event == "open" and isinstance(arguments[0], str):
            path = os.path.realpath(arguments[0])
            if not any(path.startswith(start) for start in allowed):
                faults.append(f"opened {arguments[0]}")
        elif event in ("subprocess.Popen", "os.system", "os.exec", "pickle.find_class", "socket.connect"):
            faults.append(f"{event} {str(arguments)[:80]}")
        elif event == "import" and arguments[0] in ("antigravity", "evil"):
            faults.append(f"imported {arguments[0]}")

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        sys.addaudithook(watch)
        try:
            pipeline = open_pipeline(str(folder))
            for _ in generate_images(pipeline, SamplingOptions(1)):
                pass
        except UserError as error:
            faults += ["quotes what a link leads to"] if SECRET in str(error) else []
        except BaseException:
            faults.append(" ".join(traceback.format_exc().splitlines()[-5:])[-400:])
        watching = False
    report.write_text("".join(f"{fault}; " for fault in faults))
    os._exit(0)


def main() -> None:
    faults, count = [], 0
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        os.environ["HFGEN_CACHE"] = str(root / "cache")
        secret, mark = root / "secret", root / "mark"
        secret.write_text(SECRET)
        toys = train_toys(root / "toys")
        for family, part in {"gan": "generator", "vae": "vae", "ddpm": "unet"}.items():
            config = json.loads((toys[family] / "pipeline" / part / "config.json").read_text())
            settings = [name for name in config if not name.startswith("_")]
            for description, change in folders_of_strangers(family, part, settings, secret, mark).items():
                folder = root / f"stranger-{count}"
                shutil.copytree(toys[family] / "pipeline", folder)
                (folder / "digests.json").unlink()  # a stranger would not tell of the change
                change(folder)
                wrong = opened(folder)
                if mark.exists():
                    wrong += f"{mark.read_text() or 'unpickled'}; "
                    mark.unlink()
                if wrong:
                    faults.append(f"{family}, {description}: {wrong}")
                    print(faults[-1], flush=True)
                count += 1
                shutil.rmtree(folder)
    print(f"{count} folders, {len(faults)} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
