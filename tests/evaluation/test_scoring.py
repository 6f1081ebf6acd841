"""What is scored beside the samples: of a VAE, the images that it encodes and decodes."""

import numpy as np
import pytest
import torch
from stand_in_features import Colours, paintings

from hfgen.evaluation.reference import ReferenceImages
from hfgen.evaluation.scoring import reconstruction_scores, score_pipeline
from hfgen.inference.sampling import SamplingOptions
from hfgen.metrics.frechet import frechet_distance
from hfgen.metrics.report import score_table
from hfgen.models import ConvVAE, DCGANGenerator
from hfgen.pipelines import GANPipeline, VAEPipeline


@pytest.fixture
def real(tmp_path):
    images = np.stack([np.asarray(image) for image in paintings(range(14))])
    return ReferenceImages(images, Colours()(iter(images)), tmp_path, Colours())


def vae() -> VAEPipeline:
    torch.manual_seed(0)
    return VAEPipeline(ConvVAE(16, latent_dim=4, block_out_channels=(4, 8)).eval())


class Perfect(VAEPipeline):
    """Gives back what it was given, and notes it."""

    def reconstruct(self, images, return_dict):
        self.seen = [*getattr(self, "seen", []), *images]
        return (images,)


def test_perfect_reconstructions_have_no_distance_and_each_image_counts_once(real):
    pipeline = Perfect(vae().vae)
    scores = reconstruction_scores(pipeline, real, SamplingOptions(20, seed=1, batch_size=4))
    assert scores["num_images"] == 14 and scores["fid"] == pytest.approx(0, abs=1e-4)
    assert len({np.asarray(image).tobytes() for image in pipeline.seen}) == len(pipeline.seen) == 14


def test_as_many_images_as_are_drawn_are_chosen_by_the_seed(real):
    chosen = []
    for seed in (0, 0, 1):
        pipeline = Perfect(vae().vae)
        assert reconstruction_scores(pipeline, real, SamplingOptions(5, seed))["num_images"] == 5
        chosen.append([np.asarray(image).tobytes() for image in pipeline.seen])
    assert chosen[0] == chosen[1] != chosen[2]


def test_the_score_is_that_of_what_the_pipeline_reconstructs(real):
    pipeline = vae()
    expected = pipeline.reconstruct(paintings(range(14))).images
    features = Colours()(np.asarray(image) for image in expected)
    scores = reconstruction_scores(pipeline, real, SamplingOptions(14))
    assert scores["fid"] == pytest.approx(frechet_distance(real.features, features)) and scores["fid"] > 1e-3


def test_reconstructions_in_grey_are_scored_as_colours_of_equal_channels(real):
    torch.manual_seed(0)
    grey = VAEPipeline(ConvVAE(16, in_channels=1, latent_dim=4, block_out_channels=(4, 8)).eval())
    features = Colours()(np.asarray(one.convert("RGB")) for one in grey.reconstruct(paintings(range(14))).images)
    scores = reconstruction_scores(grey, real, SamplingOptions(14))
    assert scores["fid"] == pytest.approx(frechet_distance(real.features, features))


def test_a_report_of_a_vae_has_it_and_says_so_and_that_of_a_gan_has_not(real):
    report = score_pipeline(vae(), real, SamplingOptions(12)).report
    told = f"FID of 12 real images after encoding and decoding: {report['reconstructions']['fid']:.4g}."
    assert told in score_table(report)
    torch.manual_seed(0)
    gan = GANPipeline(DCGANGenerator(16, 4, base_channels=4).eval())
    report = score_pipeline(gan, real, SamplingOptions(12)).report
    assert "reconstructions" not in report and "after encoding" not in score_table(report)
