"""A demo served by a process of its own, and its page in a headless browser."""

import contextlib
import os
import re
import shutil
import signal
import socket
import tempfile
import time
from pathlib import Path

import pytest


# Only what hangs is to fail, on a machine that is busy with other tests.
PATIENCE_MILLISECONDS = 300_000


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@contextlib.contextmanager
def serving(programs, command, ready, **environment):
    """Run a server; yield its process, which has printed what matches `ready`, and what it has printed until then."""
    with tempfile.TemporaryDirectory() as folder:  # a server that is killed leaves its downloads in it
        own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TMPDIR": folder, **environment}
        process = programs.start(*command, environment=os.environ | own)
        deadline = time.monotonic() + PATIENCE_MILLISECONDS / 1000
        try:
            while not re.search(ready, process.output.read_text()):
                assert process.poll() is None and time.monotonic() < deadline, process.errors.read_text()
                time.sleep(0.05)
            yield process
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


def patient(page):
    """Let a page wait for as long as a busy machine may need."""
    page.set_default_timeout(PATIENCE_MILLISECONDS)
    return page


@contextlib.contextmanager
def browser():
    """Yield a headless browser; skip the test where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next((found for name in names if (found := shutil.which(name))), None)
    if executable is None:
        pytest.skip(f"needs a browser: none of {', '.join(names)} is installed")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=executable, args=["--no-sandbox"], timeout=PATIENCE_MILLISECONDS
        )
        try:
            yield chromium
        finally:
            chromium.close()


class Complaints:
    """What is wrong with a page, as it goes: requests to other machines, failed ones, errors in its console."""

    def __init__(self, page, address):
        self.found = []
        page.route(lambda url: not url.startswith((address, "data:", "blob:")), self._refuse)
        page.on("console", lambda message: message.type == "error" and self.found.append(message.text))
        page.on("pageerror", lambda error: self.found.append(str(error)))
        page.on("requestfailed", self._failed)
        page.on("response", lambda answer: answer.status >= 400 and self.found.append(f"{answer.status} {answer.url}"))

    def _refuse(self, route):
        self.found.append(f"request to {route.request.url}")
        route.abort()

    def _failed(self, request):
        # The page itself ends its stream of events when a handler is done, and drops a picture that the next replaces.
        dropped = request.resource_type == "image" or "/queue/data" in request.url
        if not (request.failure == "net::ERR_ABORTED" and dropped):
            self.found.append(f"{request.url}: {request.failure}")


def hfgen_blocked(folder: Path) -> str:
    """Make a folder for PYTHONPATH in which hfgen cannot be imported."""
    (folder / "hfgen").mkdir(parents=True)
    (folder / "hfgen" / "__init__.py").write_text("raise ImportError('hfgen is not installed here')\n")
    return str(folder)


def toy_pipelines():
    """One of each family, untrained, whose images differ from seed to seed."""
    import torch

    from hfgen.methods.schedules import noise_schedule, sampling_scheduler
    from hfgen.models import ConvVAE, DCGANGenerator, GaussianMixture, UNetBase
    from hfgen.pipelines import DDPMPipeline, GANPipeline, VAEPipeline

    torch.manual_seed(0)
    generator = DCGANGenerator(16, latent_dim=5, base_channels=4).eval()
    network = ConvVAE(16, latent_dim=5, block_out_channels=(4, 8), layers_per_block=0).eval()
    mixture = GaussianMixture(5, 1)
    with torch.no_grad():
        for weight in generator.parameters():
            weight *= 10 if weight.ndim == 4 else 1
        network.to_posterior.weight *= 30
        network.from_latents.weight *= 3
        network.conv_out.weight *= 30
        mixture.means.fill_(1.0)
    unet = UNetBase(16, block_out_channels=(4, 8), time_embedding_dim=6).eval()
    scheduler = sampling_scheduler(noise_schedule("cosine", 40, "v_prediction"), "dpm")
    pipelines = {
        "gan": GANPipeline(generator),
        "vae": VAEPipeline(network, mixture),
        "ddpm": DDPMPipeline(unet, scheduler),
    }
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
    return pipelines


def picture(page, source):
    """The pixels of an image of a page, fetched as the page does."""
    import io

    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB")).astype(int)


def shown_images(page, count):
    """Wait for a gallery that one can see to hold so many images; return their pixels."""
    thumbnails = page.locator(".images img").locator("visible=true")
    page.wait_for_function(
        "count => [...document.querySelectorAll('.images img')].filter(one => one.offsetParent && one.naturalWidth)"
        ".length === count",
        arg=count,
    )
    return [picture(page, thumbnails.nth(index).get_attribute("src")) for index in range(count)]
