"""VAEs of known state by PyTorch alone and by pythae: outputs of another make for `diagnose`.

Needs both installed. pythae's are its own: networks, losses and trainer as they come, so that their
decoders end in a sigmoid and their data must lie in [0, 1], as network manifolds do. PyTorch's are
a plain loop with log gamma a parameter, as papers have it.

Shapes: N examples, D pixels, K latents, B batch.
"""

import contextlib
import logging
import os
import tempfile
from typing import Any

import numpy as np
import torch

from vaebal.diagnosis.population import LATENTS, TRAIN, Case, Outcome, Source, examples, spectrum

NOISE = 0.03  # standard deviation: large enough for a gamma of its square to be reached
EPOCHS, BATCH, LEARNING_RATE = 120, 64, 1e-3
WIDTH = 128


def sources(seed: int, count: int) -> list[Source]:
    """Network manifolds, r = 1..8 in turn; D drawn at random by `seed`."""
    random = np.random.default_rng(seed)
    return [
        Source(
            "network", index % 8 + 1, int(random.choice([48, 96])), NOISE, 100 * seed + 50 + index
        )
        for index in range(count)
    ]


def cases(source: Source) -> list[Case]:
    """Every arm on one data set; `rate` is 1 where log gamma is learned."""
    r, variances = source.rank, spectrum(source)
    noise, least, top = NOISE**2, float(variances[r - 1]), float(variances[0])
    few = max(r // 2, 1)
    made = [
        ("pythae VAE, κ = 16", "over-regularized", LATENTS, 1.0, 0.0),
        ("pythae β-VAE, β = 1e-6, κ = 16", "under-regularized", LATENTS, 1e-6, 0.0),
        ("pythae β-VAE, β = σ², κ = 16", "balanced", LATENTS, noise, 0.0),
        ("pythae β-VAE, β = σ², κ = r", "balanced", r, noise, 0.0),
        ("pythae β-VAE, β = 1e-8, κ = r", "under-regularized", r, 1e-8, 0.0),
        ("PyTorch, log γ by Adam, κ = 16", "balanced", LATENTS, top, 1.0),
        ("PyTorch, log γ by Adam, κ = r", "balanced", r, top, 1.0),
        ("PyTorch, γ fixed at half of λ_r", "over-regularized", LATENTS, 0.5 * least, 0.0),
        ("PyTorch, γ fixed at 1e-6, κ = 16", "under-regularized", LATENTS, 1e-6, 0.0),
    ]
    if r > 1:
        made += [
            ("pythae β-VAE, β = σ², κ < r", "over-regularized", few, noise, 0.0),
            ("PyTorch, log γ by Adam, κ < r", "over-regularized", few, top, 1.0),
        ]
    return [Case(source, *each, EPOCHS, "torch") for each in made]


def train(case: Case) -> Outcome:
    """Trains a case; its held-out outcome."""
    torch.manual_seed(case.source.seed)
    x = torch.tensor(examples(case.source))
    run = _pythae if case.arm.startswith("pythae") else _pytorch
    encode, decode, gamma = run(case, x[:TRAIN])
    held = x[TRAIN:]
    with torch.no_grad():
        mean, log_var = encode(held)
        z = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        arrays = (held, decode(mean), decode(z), mean, log_var)
    return Outcome(*(each.numpy() for each in arrays), gamma)


def _pythae(case: Case, x: torch.Tensor) -> tuple[Any, Any, float]:
    """Its loss is half the squared error, summed, and beta KL: gamma = beta."""
    from pythae.data.datasets import BaseDataset
    from pythae.models import BetaVAE, BetaVAEConfig
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    logging.getLogger("pythae").setLevel(logging.WARNING)
    config = BetaVAEConfig(input_dim=(x.shape[1],), latent_dim=case.kappa, beta=case.gamma)
    model = BetaVAE(config)
    with tempfile.TemporaryDirectory() as folder:
        trainer = BaseTrainer(
            model, BaseDataset(x, torch.zeros(len(x))),
            training_config=BaseTrainerConfig(
                output_dir=folder, num_epochs=case.steps, per_device_train_batch_size=BATCH,
                learning_rate=LEARNING_RATE,
            ),
        )  # fmt: skip
        trainer.prepare_training()
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # its bar
            for epoch in range(1, case.steps + 1):
                trainer.train_step(epoch)
    model.eval()

    def encode(x):
        out = model.encoder(x)
        return out.embedding, out.log_covariance

    return encode, lambda z: model.decoder(z).reconstruction, case.gamma


def _pytorch(case: Case, x: torch.Tensor) -> tuple[Any, Any, float]:
    """Adam on -ELBO, whose log gamma is a parameter, or is held."""
    nn, pixels = torch.nn, x.shape[1]
    layers = lambda first, last: nn.Sequential(  # noqa: E731
        nn.Linear(first, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(),
        nn.Linear(WIDTH, last),
    )  # fmt: skip
    encoder, decoder = layers(pixels, 2 * case.kappa), layers(case.kappa, pixels)
    log_gamma = torch.tensor(float(np.log(case.gamma)), requires_grad=bool(case.rate))
    learned = [*encoder.parameters(), *decoder.parameters(), *([log_gamma] if case.rate else [])]
    adam = torch.optim.Adam(learned, 3 * LEARNING_RATE)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, case.steps)
    encode = lambda x: (encoder(x - x_bar)).chunk(2, -1)  # noqa: E731
    decode = lambda z: x_bar + decoder(z)  # noqa: E731
    x_bar = x.mean(0)
    for _ in range(case.steps):
        for rows in torch.randperm(len(x)).split(BATCH)[: len(x) // BATCH]:
            mean, log_var = encode(x[rows])
            x_hat = decode(mean + (0.5 * log_var).exp() * torch.randn_like(mean))
            error = (x[rows] - x_hat).square().sum(1).mean()
            kl = 0.5 * (mean.square() + log_var.exp() - log_var - 1).sum(1).mean()
            loss = 0.5 * (error / log_gamma.exp() + pixels * log_gamma) + kl
            adam.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(learned, 100.0)
            adam.step()
        falling.step()
    return encode, decode, float(log_gamma.detach().exp())
