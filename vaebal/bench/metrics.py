"""What evaluation costs, and how it grows: NLL, MMD, Fréchet distance, NDB, Hessian, Inception."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from vaebal.bench.page import Page, seconds_text, with_range
from vaebal.bench.timing import Spread, Turns, Work, growth_exponent, repeated, spread
from vaebal.experiments.report import markdown_table
from vaebal.measures.evaluation import importance_weighted_nll
from vaebal.measures.frechet import Moments, frechet_distance
from vaebal.measures.inception import inception_features, parameter_shapes
from vaebal.measures.mmd import imq_mmd2
from vaebal.measures.ndb import ndb
from vaebal.models import GaussianVAE, init_params, latent_noise, mlp_vae
from vaebal.theory.collapse import antithetic_loss
from vaebal.theory.hessian import hessian_vector_product
from vaebal.theory.lanczos import extreme_eigenvalues


class Ladder(NamedTuple):
    """One quantity at several sizes."""

    quantity: str
    variable: str  # what grows
    sizes: Sequence[int]
    work: Callable[[int], tuple[Work, float, float]]
    # size -> the work, the value of the variable, and the units that one piece of work yields
    unit: str


class Growth(NamedTuple):
    """A ladder, climbed."""

    quantity: str
    variable: str
    sizes: Sequence[float]
    seconds: Sequence[Spread]
    exponent: Spread  # p of seconds ~ size^p
    rate: Spread  # units/s at the largest size
    unit: str


def climb(ladder: Ladder, turns: Turns) -> Growth:
    """All sizes in turns."""
    works, sizes, units = {}, [], 1.0
    for size in ladder.sizes:
        works[size], variable, units = ladder.work(size)
        sizes.append(variable)
    taken = turns(works)
    return Growth(
        ladder.quantity,
        ladder.variable,
        sizes,
        [spread(taken[size]) for size in ladder.sizes],
        growth_exponent(sizes, np.stack([taken[size] for size in ladder.sizes])),
        spread(units / taken[ladder.sizes[-1]]),
        ladder.unit,
    )


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _vae(width: int, outputs: int, latents: int) -> tuple[GaussianVAE, dict]:
    model = mlp_vae(
        outputs=outputs, latents=latents, width=width, encoder_layers=6, decoder_blocks=3,
        activation=jax.nn.silu, residual=True, affine_skip=True,
    )  # fmt: skip
    return model, init_params(model, jax.random.key(0), jnp.full(outputs, 0.5))


def nll(samples: int, images: int, width: int = 512) -> tuple[Work, float, float]:
    """Table 1's network at kappa = 50."""
    model, params = _vae(width, 784, 50)
    x = jnp.asarray(np.random.default_rng(0).random((images, 784), np.float32))
    once = functools.partial(
        importance_weighted_nll, model, params, x, samples=samples, seed=0, block=images
    )
    return repeated(once), samples, samples * images


def mmd(points: int, latents: int, *, over: str) -> tuple[Work, float, float]:
    """Two samples of as many points."""
    x, y = jnp.asarray(_normal(2, points, latents))
    return repeated(lambda: imq_mmd2(x, y)), points if over == "n" else latents, points


def moments(images: int, features: int, *, over: str) -> tuple[Work, float, float]:
    """Count, mean and scatter of one block of features."""
    x, empty = _normal(images, features), Moments.empty(features)
    return repeated(lambda: empty.update(x).mean), images if over == "n" else features, images


def distance(features: int) -> tuple[Work, float, float]:
    """From moments to distance."""
    x, y = _normal(2, 2 * features, features)
    ours, theirs = (Moments.empty(features).update(each) for each in (x, y))
    given = ours.mean, ours.covariance, theirs.mean, theirs.covariance
    return repeated(lambda: frechet_distance(*given)), features, 1


def bins(images: int, bins: int, *, over: str) -> tuple[Work, float, float]:
    """Two samples in 64 dimensions, k-means included."""
    x, y = _normal(2, images, 64)
    once = lambda: ndb(x, y, bins, 0).ndb  # noqa: E731
    return repeated(once), images if over == "n" else bins, images


def hessian(width: int, *, lanczos: int = 0) -> tuple[Work, float, float]:
    """Products with the Hessian of -ELBO on 64 images, one by one or in a Lanczos space."""
    model, params = _vae(width, 64, 16)
    x = jnp.asarray(np.random.default_rng(0).random((64, 64), np.float32))
    args = x, latent_noise(jax.random.key(1), 64, 16)
    loss = functools.partial(antithetic_loss, model)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    if lanczos:
        options = {"tolerance": 1e-30, "basis": 24, "max_products": lanczos}
        once = lambda: extreme_eigenvalues(loss, params, args=args, **options).products  # noqa: E731
        return repeated(once), size, once()
    product = jax.jit(lambda v: hessian_vector_product(loss, params, v, args=args))
    return repeated(lambda: product(params)), size, 1


def inception(images: int) -> tuple[Work, float, float]:
    """Random weights: the speed does not depend on them."""
    params = {
        tuple(name.split("/")): jnp.full(shape, 1e-3) for name, shape in parameter_shapes().items()
    }
    x = np.random.default_rng(0).integers(0, 256, (images, 64, 64, 3), np.uint8)
    block = min(images, 16)
    return repeated(lambda: inception_features(unflatten_dict(params), x, block)), images, images


def ladders(quick: bool) -> list[Ladder]:
    """All that is measured; `quick`: the lower rungs."""

    def up(*sizes: int) -> tuple[int, ...]:
        return sizes[:-1] if quick else sizes

    part = functools.partial
    n, k = (1000, 500) if quick else (2000, 1000)
    return [
        Ladder(f"NLL, {k:,} images", "S", up(5, 10, 20, 40), part(nll, images=k), "samples"),
        Ladder("MMD², K = 64", "n", up(1000, 2000, 4000, 8000),
               part(mmd, latents=64, over="n"), "points"),
        Ladder(f"MMD², n = {n:,}", "K", up(8, 32, 128, 512),
               lambda size: mmd(n, size, over="K"), "points"),
        Ladder("Fréchet moments, d = 512", "n", up(1000, 2000, 4000, 8000),
               part(moments, features=512, over="n"), "images"),
        Ladder(f"Fréchet moments, n = {n:,}", "d", up(256, 512, 1024, 2048),
               lambda size: moments(n, size, over="d"), "images"),
        Ladder("Fréchet distance", "d", up(256, 512, 1024, 2048), distance, "distances"),
        Ladder("NDB, 100 bins", "n", up(1250, 2500, 5000, 10_000),
               part(bins, bins=100, over="n"), "images"),
        Ladder(f"NDB, n = {n:,}", "bins", up(50, 100, 200, 400),
               lambda size: bins(n, size, over="bins"), "images"),
        Ladder("Hessian-vector product", "parameters", up(64, 128, 256, 512), hessian,
               "products"),
        Ladder("Lanczos, both ends", "parameters", up(64, 128, 256, 512),
               part(hessian, lanczos=48), "products"),
        Ladder("Inception features", "n", up(4, 8, 16), inception, "images"),
    ]  # fmt: skip


def measure(
    ladders: Sequence[Ladder], *, turns: Turns, say: Callable[[str], None] = lambda line: None
) -> list[Growth]:
    """Every ladder, one after the other."""
    grown = []
    for ladder in ladders:
        say(f"{ladder.quantity}, {ladder.variable} = {', '.join(map(str, ladder.sizes))}")
        grown.append(climb(ladder, turns))
    return grown


def page(grown: Sequence[Growth]) -> Page:
    """One row a ladder."""
    header = ["quantity", "over", "sizes", "median time", "grows as", "rate at the largest"]
    body = [
        [
            each.quantity,
            each.variable,
            " · ".join(f"{size:,.0f}" for size in each.sizes),
            " · ".join(seconds_text(taken.median) for taken in each.seconds),
            f"{each.variable}^{with_range(each.exponent, '.2f')}",
            f"{with_range(each.rate)} {each.unit}/s",
        ]
        for each in grown
    ]
    return Page(
        name="metrics",
        title="What evaluation costs, and how it grows",
        sections=[markdown_table(header, body)],
        method=[
            "The exponent is a least-squares slope in the logarithms, over all sizes, turn by "
            "turn. Below 1: overhead weighs, or larger pieces use the machine better.",
            "NLL: Table 1's network (κ = 50, 512 wide). MMD²: `imq_mmd2`, n points on either side. "
            "Fréchet: float64 on the CPU, moments of float32 features. NDB: 64 dimensions, normal "
            "data, k-means (whose iterations depend on the data) and both assignments. Hessian: "
            "−ELBO of such a network (D = 64, K = 16, 64 to 512 wide) on 64 images with antithetic "
            "noise; Lanczos with a basis of 24 and full reorthogonalisation. Inception: blocks of "
            "at most 16 images of 64 px, resized to 299, with weights that mean nothing.",
        ],
    )
