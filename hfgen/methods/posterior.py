"""How much information a VAE's posteriors carry: monitored in training, measured on the whole training set."""

import math
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from diffusers import ModelMixin

from hfgen.bars import progress_bar
from hfgen.data.loading import Batches
from hfgen.errors import NotFiniteError
from hfgen.losses.vae import MIN_SIGMA, bits_per_dimension, gaussian_nats, kl_per_dimension
from hfgen.methods.density import LATENTS_NOT_FINITE
from hfgen.methods.watch import WatchResult


# Burda et al. 2016 (arXiv:1509.00519), section 5.2: a unit is active if its mean has a larger variance over the data.
ACTIVE_VARIANCE = 0.01
# Checks in a row without an active unit after which the posterior has collapsed: every image gets the same code. A run
# that has had no active unit yet gets more checks, because all units start inactive.
CHECKS_TO_COLLAPSE, CHECKS_TO_TAKE_OFF = 3, 8
# Below this fraction of active units, latent_dim is larger than needed, and the user is warned.
FEW_ACTIVE = 0.1


class PosteriorWatch:
    """Measures how many latent units are active, and the KL of each.

    Args:
        latent_dim: size of a latent.
        device: device of the posteriors; there is a device sync only in `check`.
        num_images: in the dataset; None if unknown. Units cannot vary over a single image, and are not judged then.
    """

    def __init__(self, latent_dim: int, device: torch.device, num_images: int | None = None):
        self._latent_dim, self._device, self._judges = latent_dim, device, num_images != 1
        self._dead_checks, self._most_active, self._warned = 0, 0, False
        self._forget()

    @torch.no_grad()
    def observe(self, mean: torch.Tensor, kl_dimensions: torch.Tensor) -> None:
        """Record the posteriors of one update.

        Args:
            mean: `(batch_size, latent_dim, 1, 1)`.
            kl_dimensions: `(latent_dim,)`, in nats.
        """
        mean = mean.float().flatten(1)
        self._sums += torch.stack([mean.mean(dim=0), mean.square().mean(dim=0), kl_dimensions])
        self._updates += 1

    def check(self) -> WatchResult:
        """Judge the observations since the last check."""
        average, square, kl = self._sums.cpu().double() / max(self._updates, 1)  # some GPUs lack float64
        active = int((square - average.square() > ACTIVE_VARIANCE).sum())
        signals = {
            "active_units": float(active),
            "kl_dimension_min": float(kl.min()),
            "kl_dimension_median": float(kl.median()),
            "kl_dimension_max": float(kl.max()),
        }
        if not self._judges:
            self._forget()
            return WatchResult(signals, True, None, None)
        self._dead_checks = 0 if active else self._dead_checks + 1
        enough = FEW_ACTIVE * self._latent_dim
        self._most_active = max(self._most_active, active)
        few = active < enough
        trouble, warning = None, None
        remedy = "try a lower --kl_weight, --kl_warmup_steps, --free_bits or a lower --learning_rate"
        if self._dead_checks >= (CHECKS_TO_COLLAPSE if self._most_active else CHECKS_TO_TAKE_OFF):
            trouble = (
                f"the posterior has collapsed: none of the {self._latent_dim} latent units is active, in "
                f"{self._dead_checks} checks in a row; {remedy}"
            )
        elif few and not self._warned:
            warning = (
                f"only {active} of {self._latent_dim} latent units are active; if that does not improve, {remedy}; a "
                "smaller --latent_dim would do as well"
            )
        self._warned = self._warned or few
        self._forget()
        # Some images need few units; but where more were active, few are the beginning of a collapse.
        good = active > 0 if self._most_active < enough else not few
        return WatchResult(signals, good, trouble, warning)

    def _forget(self) -> None:
        """Start a new window of observations."""
        self._sums = torch.zeros(3, self._latent_dim, device=self._device)
        self._updates = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs to reach the same results."""
        counts = (self._dead_checks, self._most_active, self._warned, self._updates)
        return {"counts": counts, "sums": self._sums.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self._dead_checks, most_active, self._warned, self._updates = state_dict["counts"]
        self._most_active = int(most_active)  # earlier versions kept whether any was active
        self._sums = state_dict["sums"].to(self._device, copy=True)


class EncodedImages(NamedTuple):
    """The posteriors of images, and the reconstruction error of the decoder.

    Attributes:
        mean: `(num_images, latent_dim)`, float32, on the CPU.
        logvar: same shape.
        mean_squared_error: of reconstructions from one sample of each posterior, over all pixels, in [-1, 1].
        num_dims: channels times height times width.
    """

    mean: torch.Tensor
    logvar: torch.Tensor
    mean_squared_error: float
    num_dims: int

    def require_finite(self) -> None:
        """Raise a `NotFiniteError` unless all means and variances are finite."""
        if not (self.mean.isfinite().all() and self.logvar.exp().isfinite().all()):
            raise NotFiniteError(LATENTS_NOT_FINITE)

    def report(self) -> dict[str, Any]:
        """Return the measurements as plain values: losses in nats per image, for a calibrated decoder."""
        kl_dimensions = kl_per_dimension(self.mean, self.logvar)
        error = torch.tensor(self.mean_squared_error, dtype=torch.float64)
        variance = error.clamp(min=MIN_SIGMA**2)
        likelihood = float(gaussian_nats(error, variance, self.num_dims))
        nats = likelihood + float(kl_dimensions.sum())
        return {
            "num_images": len(self.mean),
            "rmse": math.sqrt(self.mean_squared_error),
            "sigma": math.sqrt(float(variance)),
            "reconstruction_loss": likelihood,
            "kl_loss": float(kl_dimensions.sum()),
            "negative_elbo": nats,
            "bits_per_dimension": bits_per_dimension(nats, self.num_dims),
            "active_units": int((self.mean.var(dim=0, correction=0) > ACTIVE_VARIANCE).sum()),
            "kl_dimensions": [round(nats, 4) for nats in kl_dimensions.sort(descending=True).values.tolist()],
        }


@torch.no_grad()
def encode_images(
    vae: ModelMixin, batches: Batches, count: int, generator: torch.Generator, accelerator: Accelerator
) -> EncodedImages:
    """Encode and reconstruct the next images of all processes together; all must call this.

    Args:
        vae: the network, in eval mode, on the device; all processes get the weights of the main one.
        batches: batches of this process.
        count: number of images, over all processes.
        generator: random number generator for sampling the latents.
        accelerator: gathers the results of all processes.
    """
    for tensor in vae.state_dict().values():  # each process has its own BatchNorm statistics
        broadcast(tensor)
    means, logvars, errors, encoded, num_dims = [], [], [], 0, 0
    with progress_bar("encoding the training images", count, disable=not accelerator.is_main_process) as bar:
        while encoded < count:
            images = next(batches)
            reconstruction, posterior = vae(images, sample_posterior=True, return_dict=False, generator=generator)
            error = (reconstruction.float() - images).square().flatten(1).mean(dim=1)
            parts = (posterior.mean.float().flatten(1), posterior.logvar.float().flatten(1), error)
            mean, logvar, error = (part.cpu() for part in accelerator.gather(parts))
            means.append(mean)
            logvars.append(logvar)
            errors.append(error)
            encoded, num_dims = encoded + len(mean), images[0].numel()
            bar.update(len(mean))
    mean_squared_error = torch.cat(errors)[:count].double().mean().item()
    return EncodedImages(torch.cat(means)[:count], torch.cat(logvars)[:count], mean_squared_error, num_dims)
