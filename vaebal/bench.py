"""How fast the training step is: against a matrix product's peak, and against PyTorch.

python -m vaebal.bench [--config=configs/mnist_kappa.py] [--kappa=50] [--batch=64,100,256,1024]
    [--repeats=5] [--out=results/bench] [--quick]

Run it in the repository, on a machine that does nothing else. The images are random,
so no data is needed. Where PyTorch is installed, the same network is also trained by
it: eager with fused Adam, and under torch.compile. Whatever is compared takes turns
(A B A B ...), so that a ratio never mixes two moments of the machine.
"""

import contextlib
import copy
import datetime
import functools
import importlib.metadata
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from vaebal.checkpoints import write_atomically
from vaebal.data import ImageSet, steps_per_epoch
from vaebal.errors import InputError
from vaebal.evaluation import importance_weighted_nll
from vaebal.experiments import checks, kappa_sweep
from vaebal.models import GaussianVAE
from vaebal.nets import ACTIVATIONS
from vaebal.report import markdown_table
from vaebal.training import Trainer, member_params
from vaebal.units import LOG_2PI

DEFAULT_CONFIG = str(Path(__file__).resolve().parent.parent / "configs" / "mnist_kappa.py")
IMAGE_SHAPES = {"digits": (8, 8, 1)}  # any other data set: MNIST's
MNIST_SHAPE = (28, 28, 1)
OURS, EAGER, COMPILED = "vaebal", "PyTorch eager", "torch.compile"
PEAK = "matrix product"
# Does n units of its work (epochs, products, passes), and returns when they are done.
Work = Callable[[int], None]


class Spread(NamedTuple):
    """A quantity over the repeats."""

    median: float
    low: float
    high: float


class Peak(NamedTuple):
    """The yardstick."""

    work: Work  # matrix products
    flops: int  # of one


class Step(NamedTuple):
    """What was measured at one batch size."""

    batch_size: int
    rates: Mapping[str, Spread]  # images/s of the training step, by contestant
    utilisation: Spread  # of OURS: model FLOPs / peak, turn by turn
    compile_seconds: Mapping[str, float]  # by contestant; none for what is not compiled
    ratio: Spread | None  # OURS / the best of the others, turn by turn


class Results(NamedTuple):
    """All that `render` needs."""

    title: str
    machine: Sequence[tuple[str, str]]
    matrix_size: int
    peaks: Mapping[str, Spread]  # FLOP/s of a float32 matrix product, by library
    flops_per_image: int  # of a training step
    steps: Sequence[Step]
    nll: Spread  # importance samples/s
    nll_utilisation: Spread  # decoder FLOPs / peak, turn by turn
    nll_text: str
    notes: Sequence[str]


def spread(values: Sequence[float]) -> Spread:
    """Median, minimum and maximum."""
    return Spread(float(np.median(values)), float(np.min(values)), float(np.max(values)))


def take_turns(works: Mapping[str, Work], repeats: int, window: float) -> dict[str, np.ndarray]:
    """Seconds per unit of every work, [repeats] each: A B A B ..., after a warm-up.

    A turn lasts `window` seconds or one unit, whichever is longer, so that the clock and
    the dispatch weigh nothing.
    """
    counts = {}
    for name, work in works.items():
        work(1)  # compiles, fills caches, starts threads
        counts[name] = max(1, math.ceil(window / _seconds(work, 1)))
    turns = [
        {name: _seconds(work, counts[name]) / counts[name] for name, work in works.items()}
        for _ in range(repeats)
    ]
    return {name: np.array([turn[name] for turn in turns]) for name in works}


def _seconds(work: Work, count: int) -> float:
    start = time.perf_counter()
    work(count)
    return time.perf_counter() - start


def _kernel_sizes(params: Any) -> dict[str, int]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves
    ]
    return {name: leaf.size for name, leaf in names if name.endswith("kernel")}


def step_flops(params: Any) -> int:
    """Model FLOPs of one training step per image, a multiply-add counted as two.

    Each weight of a Dense kernel is used in three products: x W forward, x^T g for its
    own gradient and g W^T for its input's. The first layer's input are the data, which
    get no gradient. All else (activations, loss, Adam, noise) is counted as nothing.

    Args:
      params: of an `mlp_vae`; arrays or shapes.
    """
    sizes = _kernel_sizes(params)
    return 6 * sum(sizes.values()) - 2 * sizes["encoder/layer1/kernel"]


def decoder_flops(params: Any) -> int:
    """Model FLOPs of decoding one z, a multiply-add counted as two."""
    sizes = _kernel_sizes(params)
    return 2 * sum(size for name, size in sizes.items() if not name.startswith("encoder/"))


def random_images(shape: tuple[int, int, int], train: int, test: int, seed: int = 0) -> ImageSet:
    """Uniform bytes: the speed of a dense net does not depend on what it is shown."""
    rng = np.random.default_rng(seed)
    dim = math.prod(shape)
    draw = lambda size: rng.integers(0, 256, (size, dim), dtype=np.uint8)  # noqa: E731
    return ImageSet("random", draw(train), draw(test), shape)


def jax_product(size: int) -> Work:
    """Products of two float32 matrices [size, size]."""
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), jnp.float32)
    product = jax.jit(jnp.matmul)

    def work(count: int) -> None:
        for _ in range(count):
            c = product(a, b)
        c.block_until_ready()

    return work


def jax_training(trainer: Trainer) -> Work:
    """Epochs of the trainer, all of them in one compiled call."""
    state = trainer.init()

    def work(count: int) -> None:
        nonlocal state  # donated: the old one is gone
        state, _ = trainer.run(state, count)
        jax.block_until_ready(state)

    return work


# ---- PyTorch: imported here and nowhere else; absent, its columns are left out. ----


@contextlib.contextmanager
def torch_at_its_best() -> Iterator[Any]:
    """Yields PyTorch set up as fast and as precise as JAX here; None if it cannot take part."""
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
    torch.set_num_threads(_cores())
    if gpu:
        torch.set_float32_matmul_precision("high")  # TF32, JAX's default on a GPU
    try:
        yield torch
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def torch_device(torch: Any) -> str:
    """Where PyTorch computes. Passed by hand: a default device would slow every call down."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def torch_wait(torch: Any) -> None:
    """Returns when the device has done all it was asked to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def torch_product(torch: Any, size: int) -> Work:
    """As `jax_product`."""
    a, b, c = torch.randn(3, size, size, device=torch_device(torch))

    def work(count: int) -> None:
        for _ in range(count):
            torch.mm(a, b, out=c)
        torch_wait(torch)

    return work


def torch_vae(torch: Any, model: GaussianVAE, params: Any) -> Any:
    """The network and the loss of an `mlp_vae`, written in PyTorch, with its parameters.

    Args:
      model: built by `mlp_vae`.
      params: of one member.

    Returns:
      A torch.nn.Module on the CPU, (x [B, D], eps [B, K]) -> mean -ELBO in nats.
    """
    nn, functional = torch.nn, torch.nn.functional
    activation = {
        "relu": functional.relu,
        "gelu": functools.partial(functional.gelu, approximate="tanh"),
        "silu": functional.silu,
        "tanh": torch.tanh,
        "softplus": functional.softplus,
    }[next(name for name, f in ACTIVATIONS.items() if f is model.encoder.activation)]

    def dense(layer: Mapping[str, Any]) -> Any:
        linear = nn.Linear(*layer["kernel"].shape, bias="bias" in layer)
        with torch.no_grad():
            linear.weight.copy_(torch.tensor(np.asarray(layer["kernel"]).T))
            if "bias" in layer:
                linear.bias.copy_(torch.tensor(np.asarray(layer["bias"])))
        return linear

    class VAE(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = (
                nn.ModuleDict({name: dense(layer) for name, layer in params[part].items()})
                for part in ("encoder", "decoder")
            )
            if model.affine_skip:
                self.affine = dense(params["affine"])
            if model.gamma is None:
                self.log_gamma = nn.Parameter(torch.tensor(float(params["log_gamma"])))
            else:
                self.log_gamma = math.log(model.gamma)

        def forward(self, x, eps):
            h = x
            for i in range(1, model.encoder.layers):
                h = activation(self.encoder[f"layer{i}"](h))
            mean, log_var = self.encoder["mean"](h), self.encoder["log_var"](h)
            z = mean + torch.exp(0.5 * log_var) * eps
            h = self.decoder["first"](z)
            for i in range(1, model.decoder.blocks + 1):
                branch = self.decoder[f"block{i}a"](activation(h))
                branch = self.decoder[f"block{i}b"](activation(branch))
                h = h + branch if model.decoder.residual else branch
            x_hat = self.decoder["out"](activation(h))
            if model.affine_skip:
                x_hat = x_hat + self.affine(z)
            squared_error = (x - x_hat).square().sum(-1)
            precision = torch.exp(-self.log_gamma) if model.gamma is None else 1 / model.gamma
            constant = model.outputs * (LOG_2PI + self.log_gamma)
            reconstruction = 0.5 * (squared_error * precision + constant)
            kl = 0.5 * (mean.square() + (torch.expm1(log_var) - log_var))
            return (reconstruction + kl.sum(-1)).mean()

    return VAE()


def torch_training(
    torch: Any, net: Any, *, config: Any, images: np.ndarray, compiled: bool = False
) -> Work:
    """Epochs of a plain PyTorch loop: the data on the device, fused Adam, no loader."""
    batch_size = config.train.batch_size
    device = torch_device(torch)
    net = net.to(device)
    pixels = torch.tensor(images.astype(np.float32) / 255, device=device)
    latents = net.encoder["mean"].out_features
    weights = [p for name, p in net.named_parameters() if name != "log_gamma"]
    groups = [{"params": weights, "lr": config.train.learning_rate}]
    if isinstance(net.log_gamma, torch.nn.Parameter):
        groups.append({"params": [net.log_gamma], "lr": config.train.gamma_rate})
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
        first, later = _seconds(work, 1), _seconds(work, 1)
    except Exception as error:  # of many kinds; no C++ compiler, for one
        print(f"torch.compile failed: {type(error).__name__}", file=sys.stderr)
        return None, None
    return work, max(first - later, 0.0)


# ---- Measuring ----


def run(
    config: Any,
    *,
    kappa: int = 50,
    batch_sizes: Sequence[int] = (64, 100, 256, 1024),
    repeats: int = 5,
    window: float = 1.0,
    matrix_size: int = 4096,
    images: int = 8192,
    nll_images: int = 1000,
    nll_samples: int = 50,
    with_torch: bool = True,
    with_compile: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Results:
    """Measures everything.

    Args:
      config: a kappa sweep's; its first skip variant and first seed are taken.
      window: seconds that one turn lasts at least.
      images: in an epoch, rounded down to whole batches.
      nll_samples: S.
      say: told what is being measured.

    Raises:
      InputError: a field or an argument that cannot be meant.
    """
    _require_positive(kappa=kappa, repeats=repeats, batch=min(batch_sizes, default=0))
    shape = IMAGE_SHAPES.get(config.data.name, MNIST_SHAPE)
    data = random_images(shape, max(images, *batch_sizes), nll_images)
    configs = [_with_batch_size(config, batch_size) for batch_size in batch_sizes]
    for each in configs:  # before anything is measured
        kappa_sweep.check(each)
        checks.batch_size(each, data)
    machine, others = describe_machine(), watch_others()
    timing = functools.partial(take_turns, repeats=repeats, window=window)
    with torch_at_its_best() if with_torch else contextlib.nullcontext() as torch:
        if torch is not None:
            machine.append(("PyTorch", f"{torch.__version__}, {torch.get_num_threads()} threads"))
        say(f"float32 product, {matrix_size} x {matrix_size}")
        products = {"JAX": jax_product(matrix_size)}
        if torch is not None:
            products["PyTorch"] = torch_product(torch, matrix_size)
        flops = 2 * matrix_size**3
        peaks = {name: spread(flops / taken) for name, taken in timing(products).items()}
        # Goes on taking turns with all that is measured against it.
        peak = Peak(products[max(peaks, key=lambda name: peaks[name].median)], flops)

        steps = []
        for each in configs:
            say(f"training step, B = {each.train.batch_size}")
            model, trainer, params = _trainer(each, data, kappa)
            works, compile_seconds = {OURS: jax_training(trainer)}, {OURS: trainer.compile_seconds}
            if torch is not None:
                train = functools.partial(torch_training, torch, config=each, images=data.train)
                works[EAGER] = train(torch_vae(torch, model, params))
                if with_compile:
                    compiled, taken = torch_compiled(torch, train, torch_vae(torch, model, params))
                    if compiled is not None:
                        works[COMPILED], compile_seconds[COMPILED] = compiled, taken
            steps.append(measure_step(each, data, params, peak, works, compile_seconds, timing))

        say("importance-weighted NLL")
        nll, nll_utilisation = measure_nll(
            model, params, data, kappa, nll_samples, config.eval.block, peak, timing
        )
    share = others()
    if not math.isnan(share):
        machine.append(("Used by other processes", f"{share:.0%} of the cores, during the run"))
    return Results(
        title=f"{config.name}, {config.model.skips[0]}, κ = {kappa}, width {config.model.width}, "
        f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters, "
        f"{shape[0]}×{shape[1]} pixels",
        machine=machine,
        matrix_size=matrix_size,
        peaks=peaks,
        flops_per_image=step_flops(params),
        steps=steps,
        nll=nll,
        nll_utilisation=nll_utilisation,
        nll_text=f"{nll_images} images, S = {nll_samples}, "
        f"blocks of {min(config.eval.block, nll_images)}",
        notes=_busy(share) + _absences(steps, with_torch, with_compile, torch is not None),
    )


def _with_batch_size(config: Any, batch_size: int) -> Any:
    config = copy.deepcopy(config)
    config.train.batch_size = batch_size
    return config


def _trainer(config: Any, data: ImageSet, kappa: int) -> tuple[GaussianVAE, Trainer, Any]:
    """The program of one member, and its parameters at the first step."""
    cell = kappa_sweep.Cell(config.model.skips[0], kappa, config.train.seeds[0])
    model, trainer = kappa_sweep.make_trainer(config, data, [cell])
    return model, trainer, member_params(trainer.init(), 0)


def measure_step(
    config: Any,
    data: ImageSet,
    params: Any,
    peak: Peak,
    works: Mapping[str, Work],
    compile_seconds: Mapping[str, float],
    timing: Callable[[Mapping[str, Work]], Mapping[str, np.ndarray]],
) -> Step:
    """The contestants' epochs `works`, in turns with each other and with the peak's product."""
    seconds = timing({PEAK: peak.work, **works})
    batch_size = config.train.batch_size
    epoch = steps_per_epoch(len(data.train), batch_size) * batch_size
    rates = {name: epoch / seconds[name] for name in works}
    best = max(works.keys() - {OURS}, key=lambda name: np.median(rates[name]), default=None)
    return Step(
        batch_size,
        {name: spread(rate) for name, rate in rates.items()},
        spread(rates[OURS] * step_flops(params) / (peak.flops / seconds[PEAK])),
        compile_seconds,
        None if best is None else spread(rates[OURS] / rates[best]),
    )


def measure_nll(
    model: GaussianVAE,
    params: Any,
    data: ImageSet,
    kappa: int,
    samples: int,
    block: int,
    peak: Peak,
    timing: Callable[[Mapping[str, Work]], Mapping[str, np.ndarray]],
) -> tuple[Spread, Spread]:
    """Importance samples per second over `data.test`, and the decoder's share of the peak."""
    test = jax.device_put(data.test)

    def work(count: int) -> None:
        for _ in range(count):
            importance_weighted_nll(
                model, params, test, samples=samples, seed=0, block=block, kappa=kappa
            )

    seconds = timing({PEAK: peak.work, "nll": work})
    rate = len(test) * samples / seconds["nll"]
    return spread(rate), spread(rate * decoder_flops(params) / (peak.flops / seconds[PEAK]))


def _busy(share: float) -> list[str]:
    if not share > 0.1:  # nor NaN
        return []
    return [
        "**The machine was busy with something else**: the numbers are low, and on a CPU "
        "PyTorch's most of all, because its threads wait for each other by spinning."
    ]


def _absences(
    steps: Sequence[Step], with_torch: bool, with_compile: bool, torch: bool
) -> list[str]:
    """One sentence for each thing that was not measured."""
    if not with_torch:
        return ["The comparison with PyTorch was left out."]
    if not torch:
        return [
            "PyTorch is not installed (or not for JAX's kind of device): no comparison with it."
        ]
    if not with_compile:
        return ["torch.compile was left out."]
    failed = [str(step.batch_size) for step in steps if COMPILED not in step.rates]
    return [f"torch.compile failed at batch {', '.join(failed)}: left out."] if failed else []


def _require_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise InputError(f"--{name} must be 1 or more, not {value}.")


def _cores() -> int:
    # Not os.cpu_count: a container or a scheduler may have given us fewer.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _seconds_of_cpu() -> tuple[float, float]:
    """Seconds of CPU used since boot by all processes (NaN if unknown), and by this one."""
    own = sum(os.times()[:4])
    try:
        fields = Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
    except OSError:
        return math.nan, own
    user, nice, system, _, _, irq, softirq, _ = (int(field) for field in fields)
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK"), own


def watch_others() -> Callable[[], float]:
    """A function that tells what share of the cores other processes have used from now on."""
    start, (busy, own) = time.perf_counter(), _seconds_of_cpu()

    def share() -> float:
        busy_now, own_now = _seconds_of_cpu()
        others = (busy_now - busy) - (own_now - own)
        return max(others, 0.0) / (os.cpu_count() * (time.perf_counter() - start))

    return share


def describe_machine() -> list[tuple[str, str]]:
    """What a reader needs to place the numbers; nothing that names the machine."""
    try:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    processor = match[1].strip() if match else platform.processor() or platform.machine()
    rows = [("CPU", f"{processor}, {_cores()} cores")]
    with contextlib.suppress(ValueError, OSError, AttributeError):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        rows.append(("RAM", f"{memory / 2**30:.0f} GiB"))
    versions = (
        f"{name} {importlib.metadata.version(name)}" for name in ("jaxlib", "flax", "optax")
    )
    precision = [("Products", "TF32, the default of JAX; PyTorch is set to the same")]
    if jax.default_backend() != "gpu":
        precision = []
    return [
        *rows,
        ("Devices", f"{jax.device_count()} × {jax.devices()[0].device_kind}"),
        *precision,
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("JAX", ", ".join([jax.__version__, *versions])),
        ("Date", datetime.date.today().isoformat()),
    ]


# ---- Reporting ----


def with_range(value: Spread, form: str, scale: float = 1.0) -> str:
    """ "9,450 (9,200–9,600)", each number written by the format spec `form`."""
    median, low, high = (format(scale * number, form) for number in value)
    return f"{median} ({low}–{high})"


def render(results: Results) -> str:
    """Markdown: the machine, the peak, the training step, the NLL, and how to read them."""
    names = [
        name for name in (OURS, EAGER, COMPILED) if any(name in s.rates for s in results.steps)
    ]
    compared = any(step.ratio for step in results.steps)
    header = ["batch", *(f"{name}, images/s" for name in names), "of peak"]
    header += [f"compile {name}, s" for name in names if name != EAGER]
    header += ["vaebal / best PyTorch"] if compared else []
    body = []
    for step in results.steps:
        rates = (step.rates.get(name) for name in names)
        line = [str(step.batch_size), *(with_range(r, ",.0f") if r else "–" for r in rates)]
        line.append(with_range(step.utilisation, ".2f"))
        for name in names:
            if name != EAGER:
                taken = step.compile_seconds.get(name)
                line.append("–" if taken is None else f"{taken:.1f}")
        if compared:
            line.append(with_range(step.ratio, ".2f") if step.ratio else "–")
        body.append(line)
    n = results.matrix_size
    peaks = [[name, with_range(peak, ",.0f", 1e-9)] for name, peak in results.peaks.items()]
    method = [
        "Every number is the median over the repeats, with the smallest and the largest in "
        "brackets; what stands side by side was measured in turns (A B A B ...), and the ratio is "
        "taken turn by turn. *Of peak*: model FLOPs per second of vaebal's step over the rate of "
        "the product above (by the faster library), which took its turns too. Model FLOPs are "
        f"counted from the Dense kernels, {results.flops_per_image:,} "
        "per image and step: six per weight (two in the forward pass, four in the backward pass), "
        "less two per weight of the first layer, whose input needs no gradient; activations, "
        "noise, loss and Adam count as nothing.",
    ]
    if compared:
        method.append(
            "PyTorch trains the same network on the same loss: same initial parameters, data on "
            "the device as float32, no loader, fused Adam for the weights and for log γ, denormals "
            "flushed, all cores. vaebal's step does more: it also converts stored bytes, scales "
            "and clips gradients, follows schedules, and sums the statistics of its metrics. "
            "*Compile* of torch.compile: the first epoch's seconds less the second's."
        )
    sections = [
        f"# Speed: {results.title}",
        markdown_table(["machine", ""], results.machine),
        f"## A {n} × {n} × {n} product in float32",
        markdown_table(["library", "GFLOP/s"], peaks),
        "## The training step",
        markdown_table(header, body),
        "## Importance-weighted NLL",
        f"{with_range(results.nll, ',.0f')} samples of z per second ({results.nll_text}), "
        f"{with_range(results.nll_utilisation, '.2f')} of the peak by the decoder's products.",
        "## How it was measured",
        *method,
        *results.notes,
    ]
    return "\n\n".join(sections) + "\n"


# ---- Command line ----


def define_flags(values: flags.FlagValues) -> None:
    """Defines this program's flags in `values`."""
    config_flags.DEFINE_config_file(
        "config", DEFAULT_CONFIG, "The network and its training.", flag_values=values
    )
    flags.DEFINE_integer("kappa", 50, "Latent dimensions.", flag_values=values)
    flags.DEFINE_list("batch", "64,100,256,1024", "Batch sizes.", flag_values=values)
    flags.DEFINE_integer("repeats", 5, "Turns of each contestant.", flag_values=values)
    flags.DEFINE_string("out", "results/bench", "Folder of the Markdown file.", flag_values=values)
    flags.DEFINE_bool(
        "quick", False, "Smaller product, shorter turns, no torch.compile.", flag_values=values
    )


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Defines and parses the flags; a bad one is one sentence and exit code 2."""
    try:
        define_flags(flags.FLAGS)  # reads the config's overrides, so it can fail as parsing can
        rest = flags.FLAGS(argv)
        _ = flags.FLAGS.config.experiment  # a file that could not be loaded raises only here
    except (flags.Error, AttributeError, KeyError, ValueError, TypeError, OSError) as error:
        cause = error if isinstance(error, OSError) or not error.args else error.args[0]
        text = " ".join(str(cause).split())
        print(f"error: {text} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)
    return rest


def main(argv: Sequence[str]) -> int:
    """Measures, prints, and writes `--out`/CONFIG_DEVICE.md."""
    options = flags.FLAGS
    quick = {
        "window": 0.2,
        "matrix_size": 2048,
        "images": 2048,
        "nll_samples": 10,
        "with_compile": False,
    }
    try:
        if len(argv) > 1:
            raise InputError(f"Unexpected argument {argv[1]!r}: see --help.")
        batch_sizes = [_integer("batch", text) for text in options.batch]
        device = re.sub(r"\W+", "_", jax.devices()[0].device_kind.lower()).strip("_")
        path = Path(options.out) / f"{options.config.name}_{device}.md"
        _require_writable(path.parent)  # now, not after the measurements
        results = run(
            options.config,
            kappa=options.kappa,
            batch_sizes=batch_sizes,
            repeats=options.repeats,
            say=functools.partial(print, flush=True, file=sys.stderr),
            **(quick if options.quick else {}),
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = render(results)
    write_atomically(path, text)
    print(f"{text}\nwritten to {path}")
    return 0


def _integer(flag: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"--{flag}: {text!r} is not an integer.") from None


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"--out={folder} cannot be written ({error.strerror}).") from error


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
