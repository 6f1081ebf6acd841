"""Fits the ex-post density, a mixture of Gaussians or a flow, to the latents of the training set."""

import math
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture as Fit

from hfgen.bars import progress_bar, working_on
from hfgen.errors import NotFiniteError
from hfgen.models import GaussianMixture, LatentFlow
from hfgen.texts import counted


# Number of latents to fit a mixture to, sampled from the posteriors: several from each if there are few images, since
# full covariances need many samples.
NUM_LATENTS = 20_000
# One image in HELD_OUT_PART is held out to choose the number of components.
HELD_OUT_PART = 10
CANDIDATES = (1, 2, 5, 10, 20, 50, 100)
# A fit ends when an iteration adds less to the mean log-density, in nats. In 100 dimensions scikit-learn's 1e-3 takes
# up to twice as many iterations for less than 0.03 nats on held-out images; 1e-2 loses up to 0.1.
TOLERANCE = 3e-3
# The flow is trained for at most FLOW_STEPS updates, with early stopping if the log-density of held-out latents, one
# image in HELD_OUT_PART, has not improved for FLOW_PATIENCE checks. Fewer than MIN_FLOW_IMAGES images get a mixture.
FLOW_STEPS, FLOW_LOOK_EVERY, FLOW_PATIENCE = 4000, 100, 5
MIN_FLOW_IMAGES = 20
LATENTS_NOT_FINITE = "latents of training images are not finite: the training has diverged; lower --learning_rate"
FLOW_BATCH, FLOW_LEARNING_RATE = 256, 5e-4


class FittedDensity(NamedTuple):
    """A density of latents, and how well it fits.

    Attributes:
        model: a mixture, fitted to all images; or a flow, fitted to four fifths of them.
        held_out_nats: mean log-density, in nats, of latents of held-out images, under the flow or under a mixture with
            the same number of components that was fitted without them.
        prior_nats: mean log-density of the same latents under the standard normal prior.
        tried: held-out nats of the best model of each kind that was fitted, "mixture" and "flow".
    """

    model: GaussianMixture | LatentFlow
    held_out_nats: float
    prior_nats: float
    tried: dict[str, float]

    def report(self) -> dict[str, Any]:
        """Return kind and log-densities as plain values."""
        kind = "mixture" if isinstance(self.model, GaussianMixture) else "flow"
        components = {"num_components": self.model.config.num_components} if kind == "mixture" else {}
        return {
            "kind": kind,
            **components,
            "held_out_nats": self.held_out_nats,
            "prior_nats": self.prior_nats,
            "tried": self.tried,
        }


def fit_density(
    mean: torch.Tensor, logvar: torch.Tensor, max_components: int, seed: int, kind: str = "mixture"
) -> FittedDensity:
    """Fit a density to samples from the posteriors of the training images.

    Either a mixture of Gaussians with full covariances, whose number of components (1, 2, 5, 10, ...) maximises the
    log-density of held-out images' latents: with few images, many components would only memorise them. Or a flow,
    trained until the log-density of a further held-out part stops improving.

    Args:
        mean: means of the posteriors, `(num_images, latent_dim)`, at least 2 images.
        logvar: logarithm of their variances, same shape.
        max_components: maximum number of components of the mixture.
        seed: seeds the sampling and the initialisation.
        kind: "mixture", "flow", or "auto": the one with the higher log-density of held-out images' latents. With
            `latent_dim` 1 or fewer than `MIN_FLOW_IMAGES` images it is always a mixture.

    Returns:
        The density, on the CPU.

    Raises:
        ValueError: for an unknown kind.
        NotFiniteError: if a latent is not finite.
    """
    if kind not in ("mixture", "flow", "auto"):
        raise ValueError(f"kind={kind!r} must be mixture, flow or auto")
    generator = torch.Generator().manual_seed(seed)
    draws = max(1, NUM_LATENTS // len(mean))
    noise = torch.randn(draws, *mean.shape, generator=generator)
    latents = (mean + (logvar / 2).exp() * noise).double().numpy()  # (draws, num_images, latent_dim)
    if not np.isfinite(latents).all():
        raise NotFiniteError(LATENTS_NOT_FINITE)
    held_out = torch.randperm(len(mean), generator=generator).numpy() < max(1, len(mean) // HELD_OUT_PART)
    unseen = latents[:, held_out].reshape(-1, mean.shape[1])
    prior = float(-0.5 * (np.square(unseen) + np.log(2 * np.pi)).sum(axis=1).mean())

    fitted: dict[str, tuple[GaussianMixture | LatentFlow, float]] = {}
    can_flow = mean.shape[1] >= 2 and len(mean) >= MIN_FLOW_IMAGES
    if kind != "flow" or not can_flow:
        fitted["mixture"] = _fit_mixture(latents, held_out, max_components, seed)
    if kind != "mixture" and can_flow:
        flow = _fit_flow(mean[~held_out], logvar[~held_out], generator)
        fitted["flow"] = (flow, _mean_log_density(flow, torch.from_numpy(unseen).float()))
    best = max(fitted, key=lambda name: fitted[name][1])
    tried = {name: nats for name, (_, nats) in fitted.items()}
    return FittedDensity(fitted[best][0].eval(), fitted[best][1], prior, tried)


def _fit_mixture(
    latents: np.ndarray, held_out: np.ndarray, max_components: int, seed: int
) -> tuple[GaussianMixture, float]:
    """Fit a mixture to `(draws, num_images, latent_dim)`; also return the mean log-density of the held-out latents."""
    dimension = latents.shape[2]
    seen, unseen = (part.reshape(-1, dimension) for part in (latents[:, ~held_out], latents[:, held_out]))
    fits: dict[int, Fit] = {}
    scores: dict[int, float] = {}
    with working_on("fitting the density") as bar:
        for components in [count for count in CANDIDATES if count <= min(max_components, (~held_out).sum())]:
            bar.set_description_str(_in_words(components, len(seen)), refresh=False)
            fits[components] = _fit(seen, components, seed)
            scores[components] = fits[components].score(unseen)
            if scores[components] < max(scores.values()):  # more will not help either
                break
        best = max(scores, key=lambda components: scores[components])
        bar.set_description_str(_in_words(best, latents[..., 0].size), refresh=False)
        fit = _fit(latents.reshape(-1, dimension), best, seed, fits[best])
    mixture = GaussianMixture(dimension, best)
    mixture.weights.copy_(torch.from_numpy(fit.weights_))
    mixture.means.copy_(torch.from_numpy(fit.means_))
    mixture.scale_trils.copy_(torch.linalg.cholesky(torch.from_numpy(fit.covariances_).double()))
    return mixture, float(scores[best])


def _in_words(components: int, num_latents: int) -> str:
    return f"fitting the density: mixture of {counted(components, 'Gaussian')} to {counted(num_latents, 'latent')}"


def _fit_flow(mean: torch.Tensor, logvar: torch.Tensor, generator: torch.Generator) -> LatentFlow:
    """Train a flow on fresh samples from most posteriors, `(num_images, latent_dim)`; validate on the rest."""
    watched = torch.randperm(len(mean), generator=generator) < max(1, len(mean) // HELD_OUT_PART)
    noise = torch.randn(int(watched.sum()), mean.shape[1], generator=generator)
    unseen = mean[watched] + (logvar[watched] / 2).exp() * noise
    mean, logvar = mean[~watched], logvar[~watched]
    with torch.random.fork_rng(devices=[]):  # for the initialisation
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        flow = LatentFlow(mean.shape[1])
    # Initialised as the best Gaussian fit: covariance of the means plus the mean posterior variance.
    covariance = torch.cov(mean.double().T) + torch.diag(logvar.double().exp().mean(dim=0))
    flow.location.copy_(mean.mean(dim=0))
    flow.scale_tril.copy_(torch.linalg.cholesky(covariance + 1e-6 * torch.eye(mean.shape[1])))
    weights = [weight for weight in flow.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=FLOW_LEARNING_RATE, weight_decay=0.01)
    best, best_state, since = -math.inf, {}, 0
    with progress_bar("fitting the density (flow)", FLOW_STEPS, unit="step") as bar:
        for step in range(FLOW_STEPS + 1):
            bar.update()
            if step % FLOW_LOOK_EVERY == 0:
                nats = _mean_log_density(flow, unseen)
                since = 0 if nats > best else since + 1
                if nats > best:
                    best, best_state = nats, {key: value.clone() for key, value in flow.state_dict().items()}
                if since == FLOW_PATIENCE:
                    break
            chosen = torch.randint(len(mean), (FLOW_BATCH,), generator=generator)
            noise = torch.randn(FLOW_BATCH, mean.shape[1], generator=generator)
            loss = -flow.log_density(mean[chosen] + (logvar[chosen] / 2).exp() * noise).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 10.0)
            optimizer.step()
    flow.load_state_dict(best_state)
    return flow


@torch.no_grad()
def _mean_log_density(flow: LatentFlow, latents: torch.Tensor) -> float:
    return float(torch.cat([flow.log_density(part) for part in latents.split(4096)]).mean())


def _fit(latents: np.ndarray, components: int, seed: int, start: Fit | None = None) -> Fit:
    """Fit a mixture to `(count, latent_dim)`, from a fit to most of the latents if there is one, else from k-means.

    In float32, which is about three times as fast; in float64 if a covariance is too close to singular for that.
    """
    first = {}
    if start is not None:
        first = {"weights_init": start.weights_, "means_init": start.means_, "precisions_init": start.precisions_}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # after 100 iterations it is good enough to sample from
        for kind in (np.float32, np.float64):
            begin = {name: value.astype(kind) for name, value in first.items()}
            fit = Fit(components, covariance_type="full", tol=TOLERANCE, random_state=seed % 2**32, **begin)
            try:
                return fit.fit(latents.astype(kind))
            except ValueError:
                if kind is np.float64:
                    raise
    raise AssertionError("unreachable")
