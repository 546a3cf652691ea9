"""The same network in PyTorch, and under pythae's trainer."""

import contextlib
import functools
import logging
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from vaebal.bench.machine import cores
from vaebal.bench.timing import Work, seconds
from vaebal.data import steps_per_epoch
from vaebal.models import GaussianVAE
from vaebal.models.nets import ACTIVATIONS, MLPEncoder
from vaebal.units import LOG_2PI

# What PyTorch calls the products of `nets.PRODUCTS` on a GPU.
PRECISIONS = {"float32": "highest", "tensorfloat32": "high", "bfloat16": "medium"}


@contextlib.contextmanager
def torch_at_its_best(products: str = "tensorfloat32") -> Iterator[Any]:
    """Yields PyTorch set up as fast and as precise as JAX here; None if it cannot take part.

    Args:
      products: how a network's are taken on a GPU, of `PRECISIONS`.
    """
    try:
        import torch
    except ImportError:
        yield None
        return
    gpu = jax.default_backend() == "gpu"
    if jax.default_backend() not in ("cpu", "gpu") or gpu != torch.cuda.is_available():
        yield None
        return
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    # Before the first operation: the worker threads inherit it. JAX flushes denormals too,
    # and without it Adam's second moments slow PyTorch down at small batches.
    torch.set_flush_denormal(True)
    torch.set_num_threads(cores())
    if gpu:
        torch.set_float32_matmul_precision(PRECISIONS[products])
    try:
        yield torch
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def with_threads(torch: Any, threads: int, work: Work) -> Work:
    """`work` on so many threads."""

    def limited(count: int) -> None:
        torch.set_num_threads(threads)
        work(count)

    return limited


def described(torch: Any) -> tuple[str, str]:
    """A row of the machine's table."""
    text = f"{torch.__version__}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        text += f", products of precision {torch.get_float32_matmul_precision()!r}"
    return "PyTorch", text


def can_be_rebuilt(model: GaussianVAE) -> bool:
    """Whether `torch_vae` knows the network."""
    return type(model.encoder) is MLPEncoder and not model.encoder.affine_skip


def torch_device(torch: Any) -> str:
    """Where PyTorch computes. Passed by hand: a default device would slow every call down."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def torch_wait(torch: Any) -> None:
    """Returns when the device has done all it was asked to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def torch_product(torch: Any, size: int) -> Work:
    """As `timing.jax_product`."""
    a, b, c = torch.randn(3, size, size, device=torch_device(torch))

    def work(count: int) -> None:
        for _ in range(count):
            torch.mm(a, b, out=c)
        torch_wait(torch)

    return work


def _linear(torch: Any, layer: Mapping[str, Any]) -> Any:
    """A Dense layer's parameters as a torch.nn.Linear."""
    linear = torch.nn.Linear(*layer["kernel"].shape, bias="bias" in layer)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(np.asarray(layer["kernel"]).T))
        if "bias" in layer:
            linear.bias.copy_(torch.tensor(np.asarray(layer["bias"])))
    return linear


def _activation(torch: Any, model: GaussianVAE) -> Any:
    functional = torch.nn.functional
    return {
        "relu": functional.relu,
        "gelu": functools.partial(functional.gelu, approximate="tanh"),
        "silu": functional.silu,
        "tanh": torch.tanh,
        "softplus": functional.softplus,
    }[next(name for name, f in ACTIVATIONS.items() if f is model.encoder.activation)]


def torch_vae(torch: Any, model: GaussianVAE, params: Any) -> Any:
    """The network and the loss of an `mlp_vae`, written in PyTorch, with its parameters.

    Args:
      model: built by `mlp_vae`.
      params: of one member.

    Returns:
      A torch.nn.Module on the CPU, (x [B, D], eps [B, K]) -> mean -ELBO in nats, with
      `encode(x)` and `decode(z)`.
    """
    nn, activation = torch.nn, _activation(torch, model)

    dense = functools.partial(_linear, torch)

    class VAE(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = (
                nn.ModuleDict({name: dense(layer) for name, layer in params[part].items()})
                for part in ("encoder", "decoder")
            )
            if model.affine_skip:
                self.affine = dense(params["affine"])
            learned = params.get("log_gamma")
            self.log_gamma = math.log(model.gamma) if learned is None else nn.Parameter(
                torch.tensor(float(learned))
            )  # fmt: skip

        def encode(self, x):
            for i in range(1, model.encoder.layers):
                x = activation(self.encoder[f"layer{i}"](x))
            log_var = self.encoder["log_var"](x)
            if model.linear_variance:
                log_var = torch.where(log_var > 0, torch.log1p(torch.relu(log_var)), log_var)
            return self.encoder["mean"](x), log_var

        def decode(self, z):
            h = self.decoder["first"](z)
            for i in range(1, model.decoder.blocks + 1):
                branch = self.decoder[f"block{i}a"](activation(h))
                branch = self.decoder[f"block{i}b"](activation(branch))
                h = h + branch if model.decoder.residual else branch
            x_hat = self.decoder["out"](activation(h))
            return x_hat + self.affine(z) if model.affine_skip else x_hat

        def forward(self, x, eps):
            mean, log_var = self.encode(x)
            x_hat = self.decode(mean + torch.exp(0.5 * log_var) * eps)
            squared_error = (x - x_hat).square().sum(-1)
            precision = torch.exp(-self.log_gamma) if model.gamma is None else 1 / model.gamma
            constant = model.outputs * (LOG_2PI + self.log_gamma)
            reconstruction = 0.5 * (squared_error * precision + constant)
            kl = 0.5 * (mean.square() + (torch.expm1(log_var) - log_var))
            return (reconstruction + kl.sum(-1)).mean()

    return VAE()


def _pixels(torch: Any, images: np.ndarray) -> Any:
    return torch.tensor(images / np.float32(255) if images.dtype == np.uint8 else images)


def torch_training(
    torch: Any,
    net: Any,
    *,
    images: np.ndarray,
    batch_size: int,
    learning_rate: float,
    gamma_rate: float = 1e-3,
    compiled: bool = False,
) -> Work:
    """Epochs of a plain PyTorch loop: the data on the device, fused Adam, no loader."""
    device = torch_device(torch)
    net = net.to(device)
    pixels = _pixels(torch, images).to(device)
    latents = net.encoder["mean"].out_features
    weights = [p for name, p in net.named_parameters() if name != "log_gamma"]
    groups = [{"params": weights, "lr": learning_rate}]
    if isinstance(net.log_gamma, torch.nn.Parameter):
        groups.append({"params": [net.log_gamma], "lr": gamma_rate})
    optimiser = torch.optim.Adam(groups, fused=True)
    loss_of = torch.compile(net, dynamic=False) if compiled else net

    def work(count: int) -> None:
        for _ in range(count):
            order = torch.randperm(len(pixels), device=device)
            for i in range(steps_per_epoch(len(pixels), batch_size)):
                x = pixels[order[i * batch_size : (i + 1) * batch_size]]
                loss = loss_of(x, torch.randn(batch_size, latents, device=device))
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
        torch_wait(torch)

    return work


def torch_compiled(
    torch: Any, train: Callable[..., Work], net: Any
) -> tuple[Work, float] | tuple[None, None]:
    """`train(net)` under torch.compile and the seconds of its compilation; None if it fails."""
    torch.compiler.reset()  # or the next batch size would be compiled for any size
    try:
        work = train(net, compiled=True)
        first, later = seconds(work, 1), seconds(work, 1)
    except Exception as error:  # of many kinds; no C++ compiler, for one
        print(f"torch.compile failed: {type(error).__name__}", file=sys.stderr)
        return None, None
    return work, max(first - later, 0.0)


def pythae_training(
    torch: Any, net: Any, *, images: np.ndarray, batch_size: int, learning_rate: float
) -> Work | None:
    """Epochs of pythae's trainer as it comes, on a `torch_vae`'s layers; None if not installed.

    The loss is pythae's own, of a decoder variance fixed at 1, so log gamma stays where it is.
    """
    try:
        from pythae.data.datasets import BaseDataset
        from pythae.models import VAE, VAEConfig
        from pythae.models.base.base_utils import ModelOutput
        from pythae.models.nn import BaseDecoder, BaseEncoder
        from pythae.trainers import BaseTrainer, BaseTrainerConfig
    except ImportError:
        return None

    class Encoder(BaseEncoder):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            mean, log_var = net.encode(x)
            return ModelOutput(embedding=mean, log_covariance=log_var)

    class Decoder(BaseDecoder):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, z):
            return ModelOutput(reconstruction=net.decode(z))

    logging.getLogger("pythae.trainers.base_trainer.base_trainer").setLevel(logging.WARNING)
    pixels = _pixels(torch, images)
    latents = net.encoder["mean"].out_features
    model = VAE(
        VAEConfig(input_dim=tuple(pixels.shape[1:]), latent_dim=latents), Encoder(), Decoder()
    )
    with tempfile.TemporaryDirectory() as folder:  # epochs alone write nothing there
        trainer = BaseTrainer(
            model,
            BaseDataset(pixels, torch.zeros(len(pixels))),
            training_config=BaseTrainerConfig(
                output_dir=folder,
                per_device_train_batch_size=batch_size,
                learning_rate=learning_rate,
            ),
        )
        trainer.prepare_training()

    def work(count: int) -> None:
        # Its progress bar is part of it, but not of this program's output.
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            for epoch in range(count):
                trainer.train_step(epoch)
        torch_wait(torch)

    return work
