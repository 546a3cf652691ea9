"""The training step: images/s and model-FLOPs utilisation, PyTorch beside it; the NLL's samples."""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax import Array

from vaebal.bench import pytorch
from vaebal.bench.flops import READ_DATA, decoder_flops, step_flops
from vaebal.bench.page import Page, with_range
from vaebal.bench.subjects import (
    EPOCH_IMAGES,
    LEAST_STEPS,
    Subject,
    build,
    build_model,
    epoch_size,
    image_shape,
    random_images,
    training,
    with_batch_size,
)
from vaebal.bench.timing import PEAK, Peak, Spread, Turns, Work, jax_peak, repeated, spread
from vaebal.data import ImageSet, steps_per_epoch
from vaebal.experiments.report import markdown_table
from vaebal.measures.evaluation import importance_weighted_nll
from vaebal.models.nets import PRODUCTS, Products, product

OURS, EAGER, COMPILED, PYTHAE = "vaebal", "PyTorch eager", "torch.compile", "pythae"
PRODUCTS_ALONE, ADAM_ALONE = PIECES = ("its matrix products alone", "Adam alone")
COUNTED = (
    "Model FLOPs are counted from the Dense and Conv kernels: six per weight and output position "
    "of an image (two in the forward pass, four in the backward pass), less two per weight of a "
    "layer that reads the data, which need no gradient; activations, noise, loss, Adam, and what "
    "an adaptive γ decodes beside, count as nothing."
)


class Step(NamedTuple):
    """What was measured at one batch size."""

    batch_size: int
    rates: Mapping[str, Spread]  # images/s of the training step, by contestant
    utilisation: Spread  # of OURS: model FLOPs / peak, turn by turn
    compile_seconds: Mapping[str, float]  # by contestant; none for what is not compiled
    ratio: Spread | None  # OURS / the best of PyTorch's own, turn by turn
    pieces: Mapping[str, Spread]  # of PIECES alone: what share of a step's time; of Dense nets


class Results(NamedTuple):
    """All that `page` needs."""

    name: str
    title: str
    machine: Sequence[tuple[str, str]]
    matrix_size: int
    products: str  # how the network and the peak take theirs, of `nets.PRODUCTS`
    peaks: Mapping[str, Spread]  # FLOP/s of a matrix product, by library
    flops_per_image: int  # of a training step
    steps: Sequence[Step]
    nll: Spread  # importance samples/s
    nll_utilisation: Spread  # decoder FLOPs / peak, turn by turn
    nll_text: str
    notes: Sequence[str]


def measure(
    config: Any,
    *,
    turns: Turns,
    kappa: int | None = None,
    batch_sizes: Sequence[int] = (64, 100, 256, 1024),
    matrix_size: int = 4096,
    epoch_seconds: float = 0.5,
    nll_samples: int = 50,
    with_torch: bool = True,
    with_compile: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Results:
    """The step of one config at several batch sizes, and its NLL.

    Args:
      config: of a kappa sweep, whose first skip variant is taken, or of an experiment on gamma.
      kappa: latent dimensions of a sweep's network; None: its first.
      epoch_seconds: what an epoch would last at the peak's rate.
      nll_samples: S.
      say: told what is being measured.

    Raises:
      InputError: a field or an argument that cannot be meant.
    """
    model, *_ = (build_model(with_batch_size(config, size), kappa) for size in batch_sizes)
    products = config.model.products
    machine: list[Any] = [("Products", products)]
    dense = pytorch.can_be_rebuilt(model)
    rebuilt = with_torch and dense
    best = functools.partial(pytorch.torch_at_its_best, products)
    with best() if rebuilt else contextlib.nullcontext() as torch:
        if torch is not None:
            machine.append(pytorch.described(torch))
        say(f"{products} product, {matrix_size} x {matrix_size}")
        peaks, peak = _peaks(torch, matrix_size, PRODUCTS[products], turns)
        rate, flops, steps = max(peaks.values()).median, step_flops(model), []
        for batch_size in batch_sizes:
            say(f"training step, B = {batch_size}")
            images = random_images(config, _images(batch_size, epoch_seconds * rate / flops))
            subject = build(with_batch_size(config, batch_size), images, kappa)
            pieces = _pieces(subject.params, batch_size, PRODUCTS[products]) if dense else {}
            steps.append(_step(subject, images.train, peak, turns, torch, with_compile, pieces))

        say("importance-weighted NLL")
        budget = epoch_seconds * rate / (nll_samples * decoder_flops(model))
        test = random_images(config, 1, int(np.clip(budget, 4, 1000)))
        block = min(config.eval.block, len(test.test))
        nll, nll_utilisation = _nll(subject, test, nll_samples, block, peak, turns)
    return Results(
        name=config.name,
        title=_title(config, subject),
        machine=machine,
        matrix_size=matrix_size,
        products=products,
        peaks=peaks,
        flops_per_image=flops,
        steps=steps,
        nll=nll,
        nll_utilisation=nll_utilisation,
        nll_text=f"{len(test.test)} images, S = {nll_samples}, blocks of {block}",
        notes=_absences(steps, with_torch, rebuilt, with_compile, torch is not None),
    )


def _peaks(
    torch: Any, matrix_size: int, products: Products, turns: Turns
) -> tuple[dict[str, Spread], Peak]:
    """A product's rate by library, and the faster library's."""
    candidates = {"JAX": jax_peak(matrix_size, products)}
    if torch is not None:
        work = pytorch.torch_product(torch, matrix_size)
        candidates["PyTorch"] = candidates["JAX"]._replace(work=work)
    taken = turns({name: each.work for name, each in candidates.items()})
    peaks = {name: spread(candidates[name].rate(taken[name])) for name in taken}
    return peaks, candidates[max(peaks, key=lambda name: peaks[name].median)]


def _images(batch_size: int, aim: float) -> int:
    """About `aim` images, in whole batches of which there are neither too few nor too many."""
    most = max(EPOCH_IMAGES // batch_size, LEAST_STEPS)
    return int(np.clip(aim / batch_size, LEAST_STEPS, most)) * batch_size


def _title(config: Any, subject: Subject) -> str:
    height, width, _ = image_shape(config)
    size = sum(leaf.size for leaf in jax.tree.leaves(subject.params))
    kind = f"{config.model.skips[0]}, " if config.experiment == "kappa_sweep" else ""
    return (
        f"Speed: {config.name}, {kind}κ = {subject.model.latents}, width {config.model.width}, "
        f"{size:,} parameters, {height}×{width} pixels"
    )


def _step(
    subject: Subject,
    images: np.ndarray,
    peak: Peak,
    turns: Turns,
    torch: Any = None,
    with_compile: bool = False,
    pieces: Mapping[str, Work] = MappingProxyType({}),
) -> Step:
    """vaebal's epochs, PyTorch's and a step's pieces, in turns with the peak's product."""
    train = subject.config.train
    works: dict[str, Work] = {OURS: training(subject.program)}
    compile_seconds = {OURS: subject.program.compile_seconds}
    if torch is not None:
        net = lambda: pytorch.torch_vae(torch, subject.model, subject.params)  # noqa: E731
        same = {
            "images": images,
            "batch_size": train.batch_size,
            "learning_rate": train.learning_rate,
        }
        plain = functools.partial(pytorch.torch_training, torch, **same)
        works[EAGER] = plain(net())
        if with_compile:
            compiled, taken = pytorch.torch_compiled(torch, plain, net())
            if compiled is not None:
                works[COMPILED], compile_seconds[COMPILED] = compiled, taken
        pythae = pytorch.pythae_training(torch, net(), **same)
        if pythae is not None:
            works[PYTHAE] = pythae
    seconds = turns({PEAK: peak.work, **works, **pieces})
    steps = steps_per_epoch(len(images), train.batch_size)
    epoch = steps * train.batch_size
    rates = {name: epoch / seconds[name] for name in works}
    best = max({EAGER, COMPILED} & works.keys(), key=lambda n: np.median(rates[n]), default=None)
    utilisation = rates[OURS] * step_flops(subject.model) / peak.rate(seconds[PEAK])
    return Step(
        train.batch_size,
        {name: spread(rate) for name, rate in rates.items()},
        spread(utilisation),
        compile_seconds,
        None if best is None else spread(rates[OURS] / rates[best]),
        {name: spread(steps * seconds[name] / seconds[OURS]) for name in pieces},
    )


def products_alone(
    params: Any, batch_size: int, kind: Products = None
) -> tuple[Callable[[Any], Any], dict[str, tuple[Array, Array, Array]]]:
    """The matrix products of one step of a net of Dense layers that reads the data.

    Args:
      kind: how they are taken.

    Returns:
      A function whose results are all products of every layer, and its argument: by layer,
      random inputs [B, I], the kernel [I, O], and random gradients of the outputs [B, O].
    """
    kernels = {
        name.removesuffix("/kernel"): jnp.asarray(leaf)
        for name, leaf in flatten_dict(params, sep="/").items()
        if leaf.ndim == 2
    }
    draw = functools.partial(jax.random.normal, jax.random.key(0))
    factors = {
        name: (draw((batch_size, kernel.shape[0])), kernel, draw((batch_size, kernel.shape[1])))
        for name, kernel in kernels.items()
    }

    def products(factors):
        results = {}
        for name, (x, kernel, g) in factors.items():
            y, pull = jax.vjp(lambda x, kernel: product(x, kernel, kind), x, kernel)
            dx, dkernel = pull(g)
            results[name] = (y, dkernel) if name in READ_DATA else (y, dx, dkernel)
        return results

    return products, factors


def _pieces(params: Any, batch_size: int, kind: Products) -> dict[str, Work]:
    """Parts of a step of such a net on their own."""
    products, factors = products_alone(params, batch_size, kind)
    adam, gradients = optax.adam(1e-3), jax.tree.map(jnp.ones_like, params)
    carried = jax.tree.map(jnp.copy, params), adam.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, state, gradients):
        updates, state = adam.update(gradients, state)
        return optax.apply_updates(params, updates), state

    def updates(count: int) -> None:
        nonlocal carried
        for _ in range(count):
            carried = jax.block_until_ready(update(*carried, gradients))

    alone = repeated(functools.partial(jax.jit(products), factors))
    return dict(zip(PIECES, (alone, updates), strict=True))


def _nll(
    subject: Subject, images: ImageSet, samples: int, block: int, peak: Peak, turns: Turns
) -> tuple[Spread, Spread]:
    """Importance samples per second over the test images, and the decoder's share of the peak."""
    test, params = jax.device_put(images.test), subject.params

    def work(count: int) -> None:
        for _ in range(count):
            importance_weighted_nll(
                subject.model, params, test, samples=samples, seed=0, block=block
            )

    seconds = turns({PEAK: peak.work, "nll": work})
    rate = len(test) * samples / seconds["nll"]
    share = rate * decoder_flops(subject.model) / peak.rate(seconds[PEAK])
    return spread(rate), spread(share)


def _absences(
    steps: Sequence[Step], with_torch: bool, rebuilt: bool, with_compile: bool, torch: bool
) -> list[str]:
    """One sentence for each thing that was not measured."""
    if not with_torch:
        return ["The comparison with PyTorch was left out."]
    if not rebuilt:
        return ["PyTorch is compared on the feed-forward networks only."]
    if not torch:
        return [
            "PyTorch is not installed (or not for JAX's kind of device): no comparison with it."
        ]
    if not with_compile:
        return ["torch.compile was left out."]
    failed = [str(step.batch_size) for step in steps if COMPILED not in step.rates]
    return [f"torch.compile failed at batch {', '.join(failed)}: left out."] if failed else []


SHARES = (
    "*Where a step's time goes*: shares of the whole step's time, of parts that were timed on "
    "their own in the same turns: the same products on random factors, each result written to "
    "memory; one Adam update of all parameters and both moments in place. All else "
    "(activations, noise, loss, the gradient's norm, reading the images) is what is left. *Of "
    "peak, those products*: how near the peak these products come by themselves, which bounds "
    "what any step made of them could reach."
)
COMPARED = (
    "PyTorch trains the same network on the same loss: same initial parameters, data on the "
    "device as float32, no loader, fused Adam for the weights and for log γ, denormals flushed, "
    "all cores. vaebal's step does more: it also converts stored bytes, scales and clips "
    "gradients, follows schedules, and sums the statistics of its metrics. *Compile* of "
    "torch.compile: the first epoch's seconds less the second's."
)
BESIDE = (
    "*pythae*: its `BaseTrainer` as it comes, with its loader and plain Adam, on the same network "
    "with pythae's loss of a fixed decoder variance; not in the ratio."
)


def _steps_table(results: Results, names: Sequence[str]) -> str:
    timed = [name for name in (OURS, COMPILED) if name in names]
    compared = any(step.ratio for step in results.steps)
    header = ["batch", *(f"{name}, images/s" for name in names), "of peak"]
    header += [f"compile {name}, s" for name in timed]
    header += ["vaebal / best PyTorch"] if compared else []
    body = []
    for step in results.steps:
        rates = (step.rates.get(name) for name in names)
        line = [str(step.batch_size), *(with_range(r, ",.0f") if r else "–" for r in rates)]
        line.append(with_range(step.utilisation, ".2f"))
        for name in timed:
            taken = step.compile_seconds.get(name)
            line.append("–" if taken is None else f"{taken:.1f}")
        if compared:
            line.append(with_range(step.ratio, ".2f") if step.ratio else "–")
        body.append(line)
    return markdown_table(header, body)


def _shares_table(results: Results) -> str:
    """ "" where no pieces were timed."""
    shares = [
        [
            str(step.batch_size),
            *(with_range(step.pieces[piece], ".2f") for piece in PIECES),
            f"{1 - sum(share.median for share in step.pieces.values()):.2f}",
            f"{step.utilisation.median / step.pieces[PRODUCTS_ALONE].median:.2f}",
        ]
        for step in results.steps
        if step.pieces
    ]
    header = ["batch", *PIECES, "all else", "of peak, those products"]
    return markdown_table(header, shares) if shares else ""


def page(results: Results) -> Page:
    """The peak, the training step, the NLL, and how to read them."""
    names = [
        name
        for name in (OURS, EAGER, COMPILED, PYTHAE)
        if any(name in step.rates for step in results.steps)
    ]
    shares = _shares_table(results)
    where = ["### Where a step's time goes", shares] if shares else []
    n = results.matrix_size
    peaks = [[name, with_range(peak, ",.0f", 1e-9)] for name, peak in results.peaks.items()]
    method = [
        "*Of peak*: model FLOPs per second of vaebal's step over the rate of the product above (by "
        f"the faster library), which took its turns too. {COUNTED} Here that is "
        f"{results.flops_per_image:,} per image and step.",
        *([SHARES] if shares else []),
        *([COMPARED] if any(step.ratio for step in results.steps) else []),
        *([BESIDE] if PYTHAE in names else []),
    ]
    return Page(
        name=results.name,
        title=results.title,
        sections=[
            f"## A {n} × {n} × {n} product in {results.products}",
            markdown_table(["library", "GFLOP/s"], peaks),
            "## The training step",
            _steps_table(results, names),
            *where,
            "## Importance-weighted NLL",
            f"{with_range(results.nll, ',.0f')} samples of z per second ({results.nll_text}), "
            f"{with_range(results.nll_utilisation, '.2f')} of the peak by the decoder's products.",
        ],
        method=method,
        machine=results.machine,
        notes=results.notes,
    )


# ---- One table over many configs ----


class Row(NamedTuple):
    """One config's step."""

    name: str
    network: str
    products: str  # of the network and of the peak, of `nets.PRODUCTS`
    batch_size: int
    parameters: int
    flops_per_image: int
    rate: Spread  # images/s
    utilisation: Spread
    compile_seconds: float


def measure_many(
    configs: Sequence[Any],
    *,
    turns: Turns,
    matrix_size: int = 4096,
    epoch_seconds: float = 1.5,
    say: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """The step of every config at its own batch size, or at the largest half, quarter ... of it
    that this machine can afford (`epoch_size`).

    Raises:
      InputError: a field that cannot be meant.
    """
    models = [build_model(config, None) for config in configs]
    kinds = dict.fromkeys(config.model.products for config in configs)
    peaks = {kind: jax_peak(matrix_size, PRODUCTS[kind]) for kind in kinds}
    taken = turns({kind: peak.work for kind, peak in peaks.items()})
    rates = {kind: float(np.median(peak.rate(taken[kind]))) for kind, peak in peaks.items()}
    rows = []
    for config, model in zip(configs, models, strict=True):
        flops, kind = step_flops(model), config.model.products
        batch_size, steps = epoch_size(config.train.batch_size, flops, rates[kind], epoch_seconds)
        say(f"{config.name}, B = {batch_size}, {steps} steps")
        images = random_images(config, steps * batch_size)
        subject = build(with_batch_size(config, batch_size), images)
        step = _step(subject, images.train, peaks[kind], turns)
        rows.append(
            Row(
                name=config.name,
                network=network(config),
                products=kind,
                batch_size=batch_size,
                parameters=sum(leaf.size for leaf in jax.tree.leaves(subject.params)),
                flops_per_image=flops,
                rate=step.rates[OURS],
                utilisation=step.utilisation,
                compile_seconds=step.compile_seconds[OURS],
            )
        )
    return rows


def network(config: Any) -> str:
    """The kind of network, its width and its pixels, in a word."""
    height, width, _ = image_shape(config)
    kind = config.model.network if config.experiment == "gamma" else "mlp"
    return f"{kind}, {config.model.width} wide, {height}×{width}"


def many_page(rows: Sequence[Row]) -> Page:
    """One table."""
    header = ["config", "network", "products", "parameters", "MFLOP an image", "batch"]
    header += ["images/s", "of peak", "compile, s"]
    body = [
        [
            row.name,
            row.network,
            row.products,
            f"{row.parameters:,}",
            f"{row.flops_per_image / 1e6:,.1f}",
            str(row.batch_size),
            with_range(row.rate, ",.0f"),
            with_range(row.utilisation, ".2f"),
            f"{row.compile_seconds:.1f}",
        ]
        for row in rows
    ]
    return Page(
        name="configs",
        title="Speed: the training step of every config",
        sections=[markdown_table(header, body)],
        method=[
            "*Of peak*: model FLOPs per second over the rate of a matrix product of the config's "
            f"kind that took its turns beside. {COUNTED} An epoch's metrics, one more pass over a "
            "batch, are in the time. Random images, stored as the config's are, lie on the device. "
            f"The batch is the config's, halved until {LEAST_STEPS} steps make a short epoch."
        ],
    )
