"""Latent diffusion in miniature: its fields, their meaning and their defaults."""

import ml_collections

from vaebal.experiments.gamma import fields as gamma_fields
from vaebal.experiments.schema import data_section

# Fields that change no number: where things lie, how often they are saved or shown.
FREE = frozenset(
    {
        *("data.dir", "data.folder", "data.bad", "eval.pictures", "eval.samples_only"),
        *("train.epochs_per_chunk", "train.epochs_per_checkpoint"),
    }
)


def defaults(name: str) -> ml_collections.ConfigDict:
    """Every field; configs/latent_diffusion.py changes a few.

    `model` and most of `train` are the fields of the experiment on gamma's descent, with the same
    meaning: see its `fields`.
    """
    config = ml_collections.ConfigDict()
    config.experiment = "latent_diffusion"
    config.name = name
    config.data = data_section("mnist")

    first = gamma_fields.defaults(name)  # of the autoencoder
    gamma_fields.one_by_one(first)
    config.model, train = first.model, first.train
    config.train = train
    for unused in ("device_bytes", "shard_parameters"):
        del train[unused]
    # "kl WEIGHT": gamma fixed from scratch at the value that public code's KL weight implies;
    # "learned RATE": closed form, at most RATE nats of log gamma a step; "adaptive": latents opened
    # one by one, then settled; "none": a plain autoencoder. "kl WEIGHT as adaptive" has as many
    # latents as the adaptive arm of its seed ended with: what the count alone is worth.
    train.arms = ("kl 1e-6", "learned 5e-3", "adaptive", "none", "kl 1e-6 as adaptive")
    # Of the squared error, summed over pixels in [0, 1], in the loss whose KL weight is meant:
    # |x - x_hat|^2 of pixels in [-1, 1], as there, is 4 times that.
    train.error_weight = 4.0
    train.seeds = (0, 1, 2)
    train.epochs = 45  # of every arm
    train.adaptive_epochs = 30  # of them, in which the adaptive arm opens latents; then it settles

    prior = config.prior = ml_collections.ConfigDict()
    # Each a kind ("flow" matching, "invertible" or "vae", see `generation.priors`) and a width;
    # of the first the page tells the most.
    prior.stages = ("flow 512",)
    prior.blocks = 3
    prior.epochs = (1, 4, 16, 64)  # after which it is judged; the last ends it
    prior.batch_size = 256
    prior.learning_rate = 1e-3  # constant, after the warm-up
    prior.average = 0.999  # decay of the mean of its weights that samples are drawn with
    prior.warmup_steps = 200
    prior.clip_norm = 1.0
    prior.gamma_rate = 5e-3  # "vae": at most so many nats of log gamma a step

    # The network whose penultimate features all distances are measured in. (On MNIST, 3 epochs that
    # end at 2e-5 make it the one of configs/mnist_generation.py:quick.)
    classifier = config.classifier = ml_collections.ConfigDict()
    classifier.features = 64
    classifier.width = 256
    classifier.epochs = 10
    classifier.batch_size = 256
    classifier.learning_rate = 1e-3
    classifier.final_learning_rate = 2e-6
    classifier.clip_norm = 20.0

    config.eval = ml_collections.ConfigDict()
    config.eval.samples = 10_000  # images of every set compared; at most as many as test images
    config.eval.parts = 5  # subsets, for the spread of Fréchet distances
    config.eval.bins = 100  # K of NDB/K
    config.eval.neighbours = 5  # k of precision, recall, density and coverage
    config.eval.block = 1000  # images computed at a time
    config.eval.pictures = 12
    # True: figures show samples alone, no image of the data and nothing made from one.
    config.eval.samples_only = False
    return config
