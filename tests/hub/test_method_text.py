"""From settings and configurations to sentences: each method with its own paper, and what was changed in it."""

import json
import re
from typing import get_args, get_type_hints

import pytest
import torch
from diffusers import UNet2DModel
from edm_pipelines import edm_pipeline
from published_toys import FAMILIES

from hfgen.hub.method import DISCRIMINATORS, NETWORKS, OBJECTIVES, count_parameters, describe_method
from hfgen.inference.opening import open_pipeline
from hfgen.methods.schedules import noise_schedule, sampling_scheduler
from hfgen.models import (
    ConvVAE,
    DCGAN256Generator,
    DCGANGenerator,
    GaussianMixture,
    LatentFlow,
    SNGANConvGenerator,
    SNGANGenerator,
    UNetAttention,
    UNetBase,
    UNetCompact,
)
from hfgen.pipelines import DDPMPipeline, GANPipeline, VAEPipeline
from hfgen.settings.gan import GANSettings


# arXiv id -> its first author, as the papers have them
PAPERS = {
    "1406.2661": "Goodfellow", "1611.04076": "Mao", "1802.05957": "Miyato", "1701.07875": "Arjovsky",
    "2501.05441": "Huang", "1511.06434": "Radford", "1312.6114": "Kingma", "2006.11239": "Ho", "2010.02502": "Song",
    "2211.01095": "Lu", "2302.04867": "Zhao", "2102.09672": "Nichol", "2202.00512": "Salimans", "2303.09556": "Hang",
    "1704.00028": "Gulrajani", "1801.04406": "Mescheder", "2006.10738": "Zhao", "2006.06676": "Karras",
    "1807.00734": "Jolicoeur-Martineau", "2006.13202": "Rybkin", "1903.12436": "Ghosh", "2301.11093": "Hoogeboom",
    "1512.09300": "Larsen", "2206.00364": "Karras", "2406.12303": "Li", "1606.03498": "Salimans",
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Untrained pipelines, one of each network."""
    root = tmp_path_factory.mktemp("folders")
    small = {"block_out_channels": (4, 8)}
    library = {"sample_size": 8, "layers_per_block": 1, "norm_num_groups": 2, "out_channels": 3}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    schedule = sampling_scheduler(noise_schedule("linear", 40), "ddim")
    torch.manual_seed(0)
    GANPipeline(DCGANGenerator(16, 4, base_channels=4)).save_pretrained(root / "dcgan")
    GANPipeline(SNGANGenerator(32, 5, base_channels=4)).save_pretrained(root / "sngan")
    VAEPipeline(ConvVAE(16, latent_dim=6, block_out_channels=(4, 8))).save_pretrained(root / "vae")
    density = GaussianMixture(latent_dim=6, num_components=2)
    VAEPipeline(ConvVAE(16, latent_dim=6, block_out_channels=(4, 8)), density).save_pretrained(root / "density")
    DDPMPipeline(UNetBase(8, time_embedding_dim=6, **small), schedule).save_pretrained(root / "base")
    edm_pipeline().save_pretrained(root / "edm")
    DDPMPipeline(UNet2DModel(**library, **small, **blocks), schedule).save_pretrained(root / "library")
    for name, sampler in (("cosine", "dpm"), ("velocity", "unipc"), ("clean", "ddpm")):
        prediction = {"cosine": "epsilon", "velocity": "v_prediction", "clean": "sample"}[name]
        made = noise_schedule("cosine" if name == "cosine" else "linear", 40, prediction_type=prediction)
        network = UNetAttention(8, time_embedding_dim=6, num_attention_heads=2, max_attention_size=4, **small)
        DDPMPipeline(network, sampling_scheduler(made, sampler)).save_pretrained(root / name)
    return root


def papers(text):
    """The arXiv ids in a text, each with the author before it; the link leads where it says."""
    found = re.findall(r"\(([^()]*?),? ?\[arXiv:([\d.]+)\]\(https://arxiv.org/abs/([\d.]+)\)", text)
    assert len(found) == text.count("arxiv.org"), text
    for told, name, link in found:
        assert name == link and PAPERS[name] in told, (told, name, link)
    return [name for _, name, _ in found]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_setting_that_the_scripts_write_is_described(name, runs):
    settings = json.loads((runs[name] / "training_config.json").read_text())
    method = describe_method(runs[name] / "pipeline", settings)
    assert (method.family, method.sample_size) == (name.replace("library", "ddpm").replace("edm", "ddpm"), 16)
    assert method.needs_trust is (name != "library")
    assert papers(method.summary) and len(method.departures) == len(set(method.departures)) > 0
    papers("; ".join(method.departures))
    pipeline = open_pipeline(str(runs[name]), "cpu", plain=True)
    network = getattr(pipeline, {"gan": "generator", "vae": "vae"}.get(name, "unet"))
    assert f"{sum(weight.numel() for weight in network.parameters()):,} parameters" in method.summary
    assert "16x16-pixel images, without a prompt," in method.summary
    images = eval(f"pipeline({method.call}).images", {"pipeline": pipeline})
    assert len(images) == 16


@pytest.mark.parametrize(
    ("loss", "paper", "words"),
    [
        ("non_saturating", "1406.2661", "non-saturating"),
        ("least_squares", "1611.04076", "LSGAN"),
        ("hinge", "1802.05957", "hinge"),
        ("wasserstein", "1701.07875", "Wasserstein"),
        ("relativistic", "2501.05441", "R3GAN"),
        ("relativistic_average", "1807.00734", "RaSGAN"),
        ("relativistic_average_least_squares", "1807.00734", "RaLSGAN"),
        ("relativistic_average_hinge", "1807.00734", "RaHingeGAN"),
    ],
)
def test_each_objective_of_a_gan_has_its_paper(loss, paper, words, folders):
    method = describe_method(folders / "dcgan", {"loss": loss})
    assert papers(method.summary) == ["1406.2661", "1511.06434", paper]
    assert words in method.summary.rpartition("It was trained against an unknown discriminator, with")[2]
    from hfgen.losses.gan import GAN_LOSSES

    assert OBJECTIVES.keys() == GAN_LOSSES.keys()


@pytest.mark.parametrize("network", DISCRIMINATORS)
def test_the_discriminator_of_a_gan_is_named(network, folders):
    named = f"trained against {DISCRIMINATORS[network]}, with"
    assert named in describe_method(folders / "dcgan", {"network": network}).summary
    settings = {"network": "sngan", "discriminator_network": network}
    assert named in describe_method(folders / "dcgan", settings).summary
    choices = get_args(get_type_hints(GANSettings)["discriminator_network"])
    assert DISCRIMINATORS.keys() == {name for kind in choices for name in get_args(kind)}


def test_every_network_of_hfgen_is_described(folders):
    networks = {DCGANGenerator, DCGAN256Generator, SNGANGenerator, SNGANConvGenerator}
    networks |= {ConvVAE, UNetBase, UNetAttention, UNetCompact, UNet2DModel}
    assert NETWORKS.keys() == {network.__name__ for network in networks}
    assert papers(describe_method(folders / "sngan", None).summary) == ["1406.2661", "1802.05957"]
    summary = describe_method(folders / "sngan", None).summary
    assert "32x32-pixel images" in summary and "from 5-dimensional latents." in summary
    assert "It was trained against an unknown discriminator, with an unknown objective." in summary
    assert papers(describe_method(folders / "vae", None).summary) == ["1312.6114"]
    assert papers(describe_method(folders / "base", None).summary) == ["2006.11239"]
    assert "It has 40 timesteps." in describe_method(folders / "base", None).summary
    assert papers(describe_method(folders / "edm", None).summary) == ["2006.11239", "2206.00364"]
    assert "with self-attention at its coarse levels" in describe_method(folders / "edm", None).summary
    fine = UNetCompact(64, block_out_channels=(4, 4), layers_per_block=1)
    DDPMPipeline(fine, edm_pipeline().scheduler).save_pretrained(folders / "fine")
    assert "a U-Net of residual blocks. " in describe_method(folders / "fine", None).summary


@pytest.mark.parametrize(
    ("network", "name"),
    [
        (
            ConvVAE(16, latent_dim=6, block_out_channels=(4, 8), layers_per_block=0),
            "a decoder of strided convolutions. It has",
        ),
        (
            ConvVAE(16, latent_dim=6, block_out_channels=(4, 8), layers_per_block=0, upsampling="nearest"),
            "strided convolutions with nearest-neighbour upsampling. It",
        ),
        (
            ConvVAE(
                16,
                latent_dim=6,
                block_out_channels=(4, 8),
                layers_per_block=1,
                upsampling="nearest",
                refine_channels=4,
            ),
            "with residual blocks, nearest-neighbour upsampling and convolutions at full resolution. It",
        ),
        (SNGANConvGenerator(16, 5, base_channels=4), "(https://arxiv.org/abs/1802.05957)). It has"),
        (SNGANConvGenerator(16, 5, base_channels=4, upsampling="nearest"), ")) with nearest-neighbour upsampling. It"),
    ],
)
def test_a_network_is_described_with_the_parts_that_it_was_built_with(network, name, tmp_path):
    kind = VAEPipeline if isinstance(network, ConvVAE) else GANPipeline
    kind(network).save_pretrained(tmp_path)
    assert name in describe_method(tmp_path, None).summary


GAN = {"network": "dcgan", "normalization": "batch", "gradient_penalty_weight": 0.0, "r1_weight": 0.0,
       "r2_weight": 0.0, "n_critic": 1, "augment": "none", "ema_decay": 0.999}  # fmt: skip
AVERAGE = "samples come from a moving average of the generator's weights"


@pytest.mark.parametrize(
    ("settings", "clauses"),
    [
        ({}, []),
        ({"gradient_penalty_weight": 10.0}, [("a gradient penalty of weight 10 (WGAN-GP", "1704.00028")]),
        ({"r1_weight": 0.5, "r2_weight": 2.0}, [("R1 and R2 penalties with gamma 0.5 and 2 (", "1801.04406")]),
        ({"r1_weight": 0.0, "r2_weight": 2.0}, [("R1 and R2 penalties with gamma 0 and 2 (", "1801.04406")]),
        ({"n_critic": 5}, [("5 discriminator updates per generator update", None)]),
        ({"n_critic": 5, "loss": "wasserstein"}, [("5 discriminator updates per generator update", None)]),
        ({"loss": "wasserstein"}, [("one discriminator update per generator update instead of the 5 of", None)]),
        ({"normalization": "spectral"}, [("spectral normalisation of the discriminator", "1802.05957")]),
        ({"network": "sngan", "normalization": "spectral"}, [("spectral normalisation of the disc", "1802.05957")]),
        ({"network": "resnet", "normalization": "spectral"}, []),
        (
            {"normalization": "spectral", "spectral_scale": 2.0},
            [
                ("spectral normalisation of the disc", "1802.05957"),
                ("each spectrally normalised weight multiplied by 2", None),
            ],
        ),
        ({"upsampling": "nearest"}, [("nearest-neighbour upsampling and a convolution", None)]),
        ({"statistics_images": 64}, [("BatchNorm statistics recomputed for the EMA generator", None)]),
        ({"label_smoothing": 0.1}, [("real images labelled 0.9 instead of 1 (", "1606.03498")]),
        ({"normalization": "instance"}, [("InstanceNorm in the discriminator", None)]),
        ({"normalization": "none"}, [("no normalisation in the discriminator", None)]),
        ({"augment": "diffaugment"}, [("DiffAugment (", "2006.10738")]),
        ({"augment": "ada"}, [("adaptive augmentation (", "2006.06676")]),
        (
            {"augment": "auto"},
            [("augmentation of the discriminator's input, chosen by the number of training images", None)],
        ),
    ],
)
def test_what_a_gan_was_changed_in_is_told_clause_by_clause(settings, clauses, folders):
    told = describe_method(folders / "dcgan", GAN | settings).departures
    assert told[0] == AVERAGE and len(told) == 1 + len(clauses)
    for clause, (words, paper) in zip(told[1:], clauses, strict=True):
        assert clause.startswith(words) and papers(clause) == ([paper] if paper else [])


def test_no_average_is_claimed_where_there_is_none(folders):
    assert describe_method(folders / "dcgan", GAN | {"ema_decay": 0.0}).departures == []


VAE = {"reconstruction": "mse", "kl_weight": 1.0, "free_bits": 0.0}


def test_a_learned_term_is_a_departure_and_since_when_it_acts_is_said(folders):
    plain = describe_method(folders / "vae", VAE).departures
    for start, ending in (
        (0, "(https://arxiv.org/abs/1512.09300))"),
        (15_625, ") after 15,625 updates, when the encoder is frozen"),
    ):
        settings = VAE | {"adversarial_weight": 10.0, "learned_term_start": start}
        *others, clause = describe_method(folders / "vae", settings).departures
        assert others == plain and papers(clause) == ["1512.09300"] and clause.endswith(ending)


@pytest.mark.parametrize(
    ("settings", "clauses"),
    [
        ({}, ["the decoder's likelihood: Gaussian of variance 1"]),
        ({"reconstruction": "l1"}, ["the decoder's likelihood: Laplacian of scale 1"]),
        ({"reconstruction": "bce"}, ["the decoder's likelihood: binary cross-entropy"]),
        ({"reconstruction": "calibrated"}, ["a Gaussian decoder whose variance is the best-fitting one at each step"]),
        ({"kl_weight": 0.25}, ["the decoder's likelihood", "a KL term of weight 0.25, which makes it a beta-VAE"]),
        ({"free_bits": 0.5}, ["the decoder's likelihood", "free bits: 0.5 nats of KL per latent dimension"]),
    ],
)
def test_what_a_vae_was_changed_in_is_told_clause_by_clause(settings, clauses, folders):
    told = describe_method(folders / "vae", VAE | settings).departures
    assert [words[: len(clause)] for words, clause in zip(told, clauses, strict=True)] == clauses
    assert papers(" ".join(told)) == ["2006.13202"] * (settings.get("reconstruction") == "calibrated")
    with_density = describe_method(folders / "density", VAE | settings).departures
    assert with_density[:-1] == told and papers(with_density[-1]) == ["1903.12436"]


@pytest.mark.parametrize(
    ("name", "settings", "clauses"),
    [
        ("base", {}, [("no self-attention", None), ("sampled with DDIM", "2010.02502")]),
        ("library", {}, [("sampled with DDIM", "2010.02502")]),
        (
            "edm",
            {},
            [("EDM's noise levels, preconditioning and loss weights", None), ("sampled with DPM-S", "2211.01095")],
        ),
        (
            "library",
            {"match_noise": True},
            [("each image of a batch", "2406.12303"), ("sampled with DDIM", "2010.02502")],
        ),
        ("cosine", {}, [("a cosine noise schedule", "2102.09672"), ("sampled with DPM-Solver++", "2211.01095")]),
        ("velocity", {}, [("the network predicts the velocity", "2202.00512"), ("sampled with UniPC", "2302.04867")]),
        ("clean", {}, [("the network predicts the clean image", None)]),
        ("clean", {"loss": "l1"}, [("the network predicts the clean", None), ("the L1 loss instead", None)]),
        ("clean", {"loss": "huber"}, [("the network predicts", None), ("the Huber loss instead", None)]),
        (
            "clean",
            {"loss": "l2", "snr_gamma": 5.0},
            [("the netw", None), ("Min-SNR loss weights with gamma 5 (", "2303.09556")],
        ),
    ],
)
def test_what_diffusion_was_changed_in_is_told_clause_by_clause(name, settings, clauses, folders):
    told = describe_method(folders / name, settings).departures
    assert len(told) == len(clauses), told
    for clause, (words, paper) in zip(told, clauses, strict=True):
        assert clause.startswith(words) and papers(clause) == ([paper] if paper else [])


def test_the_steps_of_sampling_are_told_unless_they_are_those_of_the_paper(folders):
    def last(name, steps):
        return describe_method(folders / name, None, steps).departures[-1]

    assert last("base", 25).endswith("in 25 steps instead of with ancestral sampling in 40")
    assert last("base", 40).endswith("2010.02502)) instead of with ancestral sampling")
    assert last("clean", 25) == "ancestral sampling in 25 steps instead of 40"
    assert "sampling" not in last("clean", 40)
    file = folders / "clean" / "scheduler" / "scheduler_config.json"
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | {"_class_name": "HeunDiscreteScheduler"}))
    assert last("clean", 40) == "sampled with HeunDiscreteScheduler instead of with ancestral sampling"
    file.write_text(before)


def test_a_scale_of_edm_s_noise_is_told_unless_it_is_one(folders):
    plain, scaled = (describe_method(folders / "edm", {"noise_scale": scale}).departures for scale in (1.0, 2.5))
    (told,) = set(scaled) - set(plain)
    assert told.startswith("noise levels in training 2.5 times EDM's") and papers(told) == ["2301.11093"]


def test_a_u_net_without_attention_at_any_level_is_told_to_have_none(folders):
    """The class alone does not say it: attention is left out above a size, and at every level of some networks."""
    schedule = noise_schedule("linear", 40)
    library = {"layers_per_block": 1, "norm_num_groups": 2, "block_out_channels": (4, 8)}
    library |= {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    attention = {"block_out_channels": (4, 8), "time_embedding_dim": 6, "num_attention_heads": 2}
    compact = {"patch_size": 2, "block_out_channels": (4, 4), "layers_per_block": 1}
    networks = {
        "library": (UNet2DModel(8, **library, add_attention=False), UNet2DModel(8, **library)),
        "attention": (UNetAttention(8, max_attention_size=3, **attention),
                      UNetAttention(8, max_attention_size=4, **attention)),
        "compact": (UNetCompact(64, attention_size=15, **compact), UNetCompact(64, attention_size=16, **compact)),
    }  # fmt: skip
    for name, pair in networks.items():
        told = []
        for index, network in enumerate(pair):
            folder = folders / f"{name} {index}"
            DDPMPipeline(network, schedule).save_pretrained(folder)
            told.append(describe_method(folder, None).departures)
        assert told == [["no self-attention"], []], name


def test_what_was_compared_with_the_papers_depends_on_what_is_known(folders):
    def compared(name, settings):
        return describe_method(folders / name, settings).compared

    assert compared("dcgan", None) == []
    assert compared("vae", None) == ["distribution that the latents are sampled from"]
    assert "loss" not in compared("base", None) and "sampler" in compared("base", None)
    assert compared("vae", VAE)[1:] == [
        "likelihood of the decoder", "weight of the KL term", "free bits", "loss from a discriminator"
    ]  # fmt: skip
    assert {"loss", "sampler"} < set(compared("base", {"loss": "l2"}))
    # The normalisation of the other discriminators is no setting, and is not compared.
    normalised = "normalisation of the discriminator"
    assert [normalised in compared("sngan", GAN | {"network": kind}) for kind in ("dcgan", "sngan", "resnet")] == [
        True, True, False
    ]  # fmt: skip
    assert normalised in compared("sngan", GAN | {"network": "resnet", "discriminator_network": "sngan"})
    assert normalised in compared("dcgan", GAN)  # leaving it out before has changed nothing


def test_diffusion_is_called_with_no_more_steps_than_it_was_trained_on(folders, runs):
    called = [describe_method(folders / "base", None, steps).call for steps in (None, 25, 40, 50)]
    assert called == [f"batch_size=16, num_inference_steps={steps}" for steps in (40, 25, 40, 40)]
    assert describe_method(runs["ddpm"] / "pipeline", None).call == "batch_size=16, num_inference_steps=2"  # its own


@pytest.mark.parametrize("name", ["dcgan", "vae", "base"])
def test_of_unknown_settings_nothing_is_told(name, folders):
    told = describe_method(folders / name, None).departures
    assert told == (["no self-attention", told[-1]] if name == "base" else [])


def test_the_parameters_of_a_vae_s_density_are_counted_beside_its_own(folders):
    own, more = (count_parameters(folders / "density" / part) for part in ("vae", "density"))
    assert (
        f"It has {own:,} parameters, and {more:,} more in the density of its latents."
        in describe_method(folders / "density", None).summary
    )


def test_the_orders_of_a_flow_are_not_among_its_parameters(tmp_path):
    flow = LatentFlow(latent_dim=6)
    flow.save_pretrained(tmp_path)
    assert count_parameters(tmp_path) == sum(weight.numel() for weight in flow.parameters())


def test_parameters_are_counted_without_reading_the_weights(folders):
    for folder, part, kind in (("dcgan", "generator", DCGANGenerator), ("density", "density", GaussianMixture),
                               ("density", "vae", ConvVAE), ("library", "unet", UNet2DModel)):  # fmt: skip
        weights = kind.from_pretrained(folders / folder / part).parameters()
        assert count_parameters(folders / folder / part) == sum(weight.numel() for weight in weights) > 4
