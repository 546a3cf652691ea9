import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.flatten_util import ravel_pytree

from vaebal.models import init_params
from vaebal.models.objectives import gaussian_vae_terms
from vaebal.streams import stream
from vaebal.theory import certificates, gradients, hessian, lanczos

# One size for most problems, and one size of block and basis: compiled once.
SIZE, COUNT, BASIS = 100, 2, 24


def quadratic(params, matrix):
    """A loss whose Hessian is known."""
    flat = ravel_pytree(params)[0]
    return 0.5 * flat @ (matrix @ flat)


def rotated(spectrum, seed=0):
    """A symmetric matrix of this spectrum, its eigenvectors at random."""
    size = len(spectrum)
    vectors = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]
    matrix = (vectors * spectrum) @ vectors.T
    return (matrix + matrix.T) / 2


def at_zero(size=SIZE):
    """Parameters of a quadratic: a pytree of two leaves, at its stationary point."""
    return {"one": jnp.zeros(size - 6), "two": jnp.zeros((2, 3))}


# Losses compare by identity: one object for one model, so that it is compiled once.
_LOSSES = {}


@pytest.fixture
def vae(small_vae, pixels):
    """Builds (loss, params, args) of a deep VAE at a random or a collapsed point."""

    def build(collapsed=False, **changes):
        options = {"outputs": 6, "latents": 2, "width": 4, "encoder_layers": 2, "decoder_blocks": 1}
        model = small_vae(**(options | changes))
        x = jnp.asarray(pixels[:12, : model.outputs], float)
        eps = jax.random.normal(stream(0, "eps"), (12, model.latents))

        def loss(params, x, eps):
            x, eps = jnp.concatenate([x, x]), jnp.concatenate([eps, -eps])  # antithetic
            terms = gaussian_vae_terms(x, model.apply({"params": params}, x, eps))
            return terms.negative_elbo.mean()

        shapes = jax.eval_shape(lambda: init_params(model, stream(0, "init"), x.mean(0)))
        rng = np.random.default_rng(0)  # a point like any other, without compiling init
        params = jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(size=leaf.shape, scale=0.3), leaf.dtype), shapes
        )
        if collapsed:  # every latent alike: drowned in noise, and ignored
            for layer in (
                params["decoder"]["first"],
                params["encoder"]["mean"],
                params["encoder"]["log_var"],
            ):
                layer["kernel"] = jnp.zeros_like(layer["kernel"])
            params["affine"]["kernel"] = jnp.zeros_like(params["affine"]["kernel"])
        return _LOSSES.setdefault(model, loss), params, (x, eps)

    return build


# ---------------------------------------------------------------- norms


def test_group_norms_are_of_the_groups_and_add_up(vae):
    _, params, _ = vae()
    norms = gradients.norms_by_group(params)
    assert set(norms) == {"encoder", "decoder", "affine", "log_gamma"}
    decoder = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params["decoder"])])
    assert norms["decoder"] == pytest.approx(np.linalg.norm(decoder))
    assert "encoder/mean" in gradients.norms_by_group(params, 2)
    leaves = gradients.norms_by_group(params, 9)
    assert len(leaves) == len(jax.tree.leaves(params))
    whole = np.linalg.norm(ravel_pytree(params)[0])
    for depth in (1, 2, 9):
        squares = [norm**2 for norm in gradients.norms_by_group(params, depth).values()]
        assert sum(squares) == pytest.approx(whole**2, rel=1e-5)


def test_latent_norms_are_those_of_rows_and_columns(vae):
    _, params, _ = vae()
    norms = gradients.norms_by_latent(params)
    known = gradients.LATENT_WEIGHTS | gradients.LATENT_BIASES
    assert set(norms) == set(known) - {"encoder/affine/kernel"}
    expected = {
        "decoder/first/kernel": np.linalg.norm(params["decoder"]["first"]["kernel"], axis=1),
        "encoder/mean/kernel": np.linalg.norm(params["encoder"]["mean"]["kernel"], axis=0),
        "encoder/mean/bias": np.abs(params["encoder"]["mean"]["bias"]),
        "affine/kernel": np.linalg.norm(params["affine"]["kernel"], axis=1),
    }
    for path, norm in expected.items():
        np.testing.assert_allclose(norms[path], norm, rtol=1e-6)
    del params["affine"], params["encoder"]["mean"]["bias"]
    assert set(norms) - set(gradients.norms_by_latent(params)) == {
        "affine/kernel",
        "encoder/mean/bias",
    }


def test_latents_that_are_not_used_get_no_gradient(small_vae, vae):
    """The last two of five latents unused: exactly their slices of the gradient vanish."""
    options = {"outputs": 6, "latents": 5, "encoder_layers": 2, "decoder_blocks": 1}
    _, params, (x, eps) = vae(width=12, **options)
    model = small_vae(**options)

    @jax.jit
    @jax.grad
    def gradient(params):
        return gaussian_vae_terms(
            x, model.apply({"params": params}, x, eps, 3)
        ).negative_elbo.mean()

    for norm in gradients.norms_by_latent(gradient(params)).values():
        np.testing.assert_array_equal(norm > 0, [True] * 3 + [False] * 2)


class Affine(NamedTuple):
    """A model with other names: the paths are arguments."""

    W_x: Array  # [D, K]
    b_x: Array  # [D]
    W_z: Array  # [K, D]
    b_z: Array  # [K]
    log_s2: Array  # [K]


def test_latent_norms_of_another_model():
    rng = np.random.default_rng(0)
    params = Affine(*(rng.normal(size=s) for s in ((6, 4), (6,), (4, 6), (4,), (4,))))
    norms = gradients.norms_by_latent(params, {"W_x": 1, "W_z": 0, "log_s2": -1})
    np.testing.assert_allclose(norms["W_x"], np.linalg.norm(params.W_x, axis=0), rtol=1e-6)
    np.testing.assert_allclose(norms["W_z"], np.linalg.norm(params.W_z, axis=1), rtol=1e-6)
    np.testing.assert_allclose(norms["log_s2"], np.abs(params.log_s2), rtol=1e-6)


# ---------------------------------------------------------------- products


def test_a_python_numbers_weak_type_is_no_other_dtype():
    """The third power's second derivative at 2, in direction 1."""
    params, vector = {"a": 2.0}, {"a": jnp.ones(())}
    for given in ((params, vector), ({"a": jnp.full((), 2.0)}, {"a": 1.0})):
        assert hessian.hessian_vector_product(lambda p: p["a"] ** 3, *given)["a"] == 12
    with pytest.raises(ValueError, match="dtypes of params"):
        hessian.hessian_vector_product(lambda p: p["a"] ** 3, params, {"a": jnp.bfloat16(1)})


def test_products_agree_with_differences_of_gradients(vae):
    """Central differences err by h^2; at h = 1e-5 in float64, by about 1e-9."""
    with jax.enable_x64(True):
        loss, params, args = vae()
        flat, unravel = ravel_pytree(params)
        gradient = jax.jit(lambda flat: jax.grad(loss)(unravel(flat), *args))
        product = jax.jit(
            lambda v: hessian.hessian_vector_product(loss, params, unravel(v), args=args)
        )
        for seed in range(3):
            v = jax.random.normal(jax.random.key(seed), flat.shape)
            v /= jnp.linalg.norm(v)
            difference = jax.tree.map(
                lambda a, b: (a - b) / 2e-5, gradient(flat + 1e-5 * v), gradient(flat - 1e-5 * v)
            )
            got = product(v)
            assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, params)
            expected = ravel_pytree(difference)[0]
            np.testing.assert_allclose(
                ravel_pytree(got)[0], expected, atol=1e-7 * np.abs(expected).max()
            )


def test_dense_hessian_is_that_of_a_quadratic_and_reverse_over_reverse(vae):
    with jax.enable_x64(True):
        known = rotated(np.linspace(-2, 3, SIZE))
        got = hessian.dense_hessian(quadratic, at_zero(), args=(known,))
        np.testing.assert_allclose(got, known, atol=1e-14)
        loss, params, args = vae()
        dense = np.asarray(hessian.dense_hessian(loss, params, args=args))
        np.testing.assert_allclose(dense, dense.T, atol=1e-12 * np.abs(dense).max())
        flat, unravel = ravel_pytree(params)
        twice = jax.jacrev(jax.grad(lambda flat: loss(unravel(flat), *args)))
        expected = np.asarray(jax.jit(twice)(flat))
        np.testing.assert_allclose(dense, expected, atol=1e-12 * np.abs(expected).max())


# ---------------------------------------------------------------- both ends of the spectrum

SPECTRA = {
    "three values": np.r_[-np.ones(3), np.zeros(SIZE - 5), 2, 2],
    "zero": np.zeros(SIZE),
    "identity": np.full(SIZE, 3.0),
    # kappa - q identical modes below, exact zero modes in the middle.
    "collapse": np.r_[np.full(7, -0.117728), np.zeros(40), np.geomspace(0.1, 50, SIZE - 47)],
    "many zeros at the lower end": np.r_[np.zeros(30), np.linspace(1, 4, SIZE - 30)],
    "small and negative": np.r_[-1e-4, np.zeros(SIZE - 11), np.geomspace(1, 1e3, 10)],
    "more negative than positive": np.r_[-5.0, -5.0, np.linspace(-4, 1, SIZE - 2)],
    "no degeneracy": np.linspace(-1, 1, SIZE) ** 3,
}


@pytest.mark.parametrize("aligned", [False, True], ids=["rotated", "diagonal"])
@pytest.mark.parametrize("name", SPECTRA)
def test_ends_of_a_known_spectrum(name, aligned):
    """Exactly diagonal matrices have exactly invariant subspaces: beta = 0, not 1e-16."""
    spectrum = np.sort(SPECTRA[name])
    with jax.enable_x64(True):
        matrix = np.diag(spectrum) if aligned else rotated(spectrum)
        got = lanczos.extreme_eigenvalues(
            quadratic, at_zero(), args=(matrix,), count=COUNT, basis=BASIS
        )
    scale = np.abs(spectrum).max()
    assert got.converged
    for pairs, expected in (
        (got.smallest, spectrum[:COUNT]),
        (got.largest, spectrum[::-1][:COUNT]),
    ):
        np.testing.assert_allclose(pairs.values, expected, rtol=1e-6, atol=1e-13 * scale)
        vectors = np.concatenate(
            [np.reshape(v, (COUNT, -1)) for v in jax.tree.leaves(pairs.vectors)], 1
        )
        np.testing.assert_allclose(vectors @ vectors.T, np.eye(COUNT), atol=1e-8)
        residuals = np.linalg.norm(vectors @ matrix - pairs.values[:, None] * vectors, axis=1)
        np.testing.assert_allclose(residuals, pairs.residuals, rtol=1e-3, atol=1e-13 * scale)


def test_ends_in_float32_are_within_their_rounding():
    """Lanczos without a guard divides by beta = 0 here: NaN, or eigenvalues of 1e2."""
    for name in ("three values", "zero", "identity", "collapse"):
        spectrum = np.sort(SPECTRA[name])
        for matrix in (np.diag(spectrum), rotated(spectrum)):
            got = lanczos.extreme_eigenvalues(
                quadratic, at_zero(), args=(np.float32(matrix),), count=COUNT, basis=BASIS
            )
            assert got.smallest.values.dtype == np.float32
            for pairs, expected in (
                (got.smallest, spectrum[:COUNT]),
                (got.largest, spectrum[::-1][:COUNT]),
            ):
                np.testing.assert_allclose(
                    pairs.values, expected, atol=1e-5 * np.abs(spectrum).max()
                )


def test_an_interrupted_search_says_so_and_its_bounds_hold():
    """Residuals bound the distance to an eigenvalue, Ritz counts the number of eigenvalues."""
    spectrum = np.sort(np.r_[-np.geomspace(1e-6, 1e-2, 20), np.geomspace(1e-6, 1e3, SIZE - 20)])
    with jax.enable_x64(True):
        for products in (20, 60, 160):
            got = lanczos.extreme_eigenvalues(
                quadratic, at_zero(), args=(rotated(spectrum),), count=COUNT, basis=BASIS,
                max_products=products,
            )  # fmt: skip
            assert not got.converged
            assert not got.smallest.converged.any()
            assert got.products <= products
            for pairs in (got.smallest, got.largest):
                distance = np.abs(pairs.values[:, None] - spectrum).min(1)
                assert (distance <= pairs.residuals + 1e-10).all()
            for bound in (-1e-3, -1e-8, 1e-8, 1.0):
                assert (got.ritz_values < bound).sum() <= (spectrum < bound).sum()
                assert (got.ritz_values > bound).sum() <= (spectrum > bound).sum()


def _assert_ends_agree(loss, params, args, **options):
    expected = np.linalg.eigvalsh(np.asarray(hessian.dense_hessian(loss, params, args=args)))
    got = lanczos.extreme_eigenvalues(loss, params, args=args, **options)
    assert got.converged
    count = options["count"]
    np.testing.assert_allclose(got.smallest.values, expected[:count], rtol=1e-6)
    np.testing.assert_allclose(got.largest.values, expected[::-1][:count], rtol=1e-6)
    return expected


@pytest.mark.parametrize("collapsed", [False, True], ids=["initial", "collapsed"])
def test_ends_of_a_vae(vae, collapsed):
    with jax.enable_x64(True):
        loss, params, args = vae(collapsed, outputs=10, latents=4, width=8)
        expected = _assert_ends_agree(loss, params, args, count=2, basis=24)
    if collapsed:  # whatever the ignored latents lead to: exact zero modes
        assert (np.abs(expected) < 1e-12 * expected[-1]).sum() > 50


@pytest.mark.slow
@pytest.mark.parametrize("collapsed", [False, True], ids=["initial", "collapsed"])
@pytest.mark.parametrize("basis", [24, None])
def test_ends_of_a_vae_of_3000_parameters(vae, collapsed, basis):
    with jax.enable_x64(True):
        loss, params, args = vae(collapsed, outputs=16, latents=5, width=27)
        assert 2_700 < ravel_pytree(params)[0].size < 3_300
        _assert_ends_agree(loss, params, args, count=3, basis=basis)


def test_few_parameters_are_diagonalised():
    with jax.enable_x64(True):
        matrix = rotated(np.linspace(-1, 2, 9))
        got = lanczos.extreme_eigenvalues(quadratic, at_zero(9), args=(matrix,), count=9)
    np.testing.assert_allclose(got.smallest.values, np.linspace(-1, 2, 9), atol=1e-14)
    np.testing.assert_allclose(got.largest.values, np.linspace(2, -1, 9), atol=1e-14)


# ---------------------------------------------------------------- spectral density


def test_density_of_a_diagonal_hessian_is_exact():
    """Signs make v^T D^p v the trace of D^p whatever they are: no Monte-Carlo error."""
    spectrum = np.r_[-np.ones(10), np.zeros(60), np.geomspace(0.1, 5, 20), np.full(10, 5.0)]
    with jax.enable_x64(True):
        got = lanczos.spectral_density(
            quadratic, at_zero(), args=(np.diag(spectrum),), probes=3, steps=40, width=0.1
        )
    np.testing.assert_allclose(got.weights.sum(1), 1)
    for power in range(1, 9):
        moments = (got.weights * got.nodes**power).sum(1)
        np.testing.assert_allclose(moments, (spectrum**power).mean(), rtol=1e-10)
    kernel = np.exp(-0.5 * ((got.grid[:, None] - spectrum) / 0.1) ** 2) / (0.1 * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(got.density, kernel.mean(1), atol=1e-6)
    np.testing.assert_allclose(np.trapezoid(got.density, got.grid), 1, rtol=1e-4)
    assert got.error.max() < 1e-6


def test_density_is_within_its_errors():
    spectrum = np.sort(np.random.default_rng(0).normal(size=100) ** 3)
    with jax.enable_x64(True):
        got = lanczos.spectral_density(
            quadratic, at_zero(), args=(rotated(spectrum),), probes=20, steps=40, width=0.2
        )
    assert (got.error > 0).any()
    for power in (1, 2, 3):
        each = (got.weights * got.nodes**power).sum(1)
        error = each.std(ddof=1) / np.sqrt(20)
        assert abs(each.mean() - (spectrum**power).mean()) < 4 * error
    kernel = np.exp(-0.5 * ((got.grid[:, None] - spectrum) / 0.2) ** 2) / (0.2 * np.sqrt(2 * np.pi))
    assert (np.abs(got.density - kernel.mean(1)) < 5 * got.error + 1e-9).all()


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_density_of_one_point(value):
    """The Krylov space ends after one step; float32, where guards matter most."""
    got = lanczos.spectral_density(
        quadratic, at_zero(), args=(np.float32(value * np.eye(SIZE)),), probes=2, steps=40
    )
    assert np.isfinite(got.density).all()
    np.testing.assert_allclose((got.weights * got.nodes).sum(1), value, atol=1e-5)
    np.testing.assert_allclose(np.trapezoid(got.density, got.grid), 1, rtol=1e-3)


# ---------------------------------------------------------------- certificates

DENSE = {"dense_limit": 3000}
LANCZOS = {"dense_limit": 0, "basis": BASIS}


@pytest.mark.parametrize("options", [DENSE, LANCZOS], ids=["dense", "lanczos"])
@pytest.mark.parametrize(
    ("spectrum", "verdict"),
    [
        (np.linspace(1, 4, SIZE), "minimum"),
        (np.r_[-0.5, -0.5, np.linspace(1, 4, SIZE - 2)], "strict saddle"),
        (np.r_[-0.5, np.zeros(9), np.linspace(1, 4, SIZE - 10)], "strict saddle"),
        (-np.linspace(1, 4, SIZE), "strict saddle"),
        (np.r_[np.zeros(9), np.linspace(1, 4, SIZE - 9)], "degenerate"),
        (np.zeros(SIZE), "degenerate"),
    ],
    ids=["minimum", "saddle", "saddle with zero modes", "maximum", "valley", "plain"],
)
def test_verdicts_on_quadratics(spectrum, verdict, options):
    with jax.enable_x64(True):
        got = certificates.certify(quadratic, at_zero(), 1e-8, args=(rotated(spectrum),), **options)
    negative, zero = (spectrum < -1e-9).sum(), (np.abs(spectrum) < 1e-9).sum()
    assert got.verdict == verdict
    assert got.smallest == pytest.approx(spectrum.min(), abs=1e-5)
    assert got.largest == pytest.approx(spectrum.max(), abs=1e-5)
    low, high = got.index_bounds
    assert low <= negative <= negative + zero <= high
    assert low > 0 or negative == 0
    if options is DENSE:
        assert (got.index, got.zero_modes) == (negative, zero)
    else:
        assert got.index is None
    assert verdict in str(got)


def monkey(params):
    x, y = params
    return x**3 - 3 * x * y**2


def quartic(params):
    return (params**4).sum()


@pytest.mark.parametrize("loss", [monkey, quartic])
def test_what_second_order_cannot_tell_is_degenerate(loss):
    with jax.enable_x64(True):
        got = certificates.certify(loss, jnp.zeros(2), 1e-8)
    assert got.verdict == "degenerate"
    assert (got.index, got.index_bounds, got.zero_modes) == (0, (0, 2), 2)


def test_a_point_with_a_gradient_is_not_stationary():
    got = certificates.certify(monkey, jnp.array([1.0, 0.0]), 1e-3)
    assert got.verdict == "not stationary"
    assert got.gradient_norm == pytest.approx(3)
    assert got.index is got.index_bounds is None
    assert "gradient norm 3 > tolerance 0.001" in str(got)
    assert certificates.certify(monkey, jnp.array([1.0, 0.0]), 4.0).verdict != "not stationary"


def test_negative_curvature_convicts_before_convergence_and_else_it_stays_undecided():
    hard = np.geomspace(1e-7, 1e3, SIZE)
    options = {"dense_limit": 0, "basis": BASIS, "max_products": 24, "zero_tolerance": 1e-12}
    with jax.enable_x64(True):
        psd = certificates.certify(quadratic, at_zero(), 1e-8, args=(rotated(hard),), **options)
        hard[:5] *= -1
        hard[0] = -1e3
        saddle = certificates.certify(quadratic, at_zero(), 1e-8, args=(rotated(hard),), **options)
        direction = ravel_pytree(saddle.direction)[0]
        assert direction @ rotated(hard) @ direction == pytest.approx(saddle.smallest)
    assert psd.verdict == "undecided"
    assert saddle.verdict == "strict saddle"


def test_the_assumptions_are_stated():
    with jax.enable_x64(True):
        matrix = rotated(np.linspace(1, 2, SIZE))
        certify = functools.partial(
            certificates.certify, quadratic, at_zero(), 1e-8, args=(matrix,), expectation="sampled"
        )
        dense, lanczos = certify(), certify(dense_limit=0, basis=BASIS)
    for got in (dense, lanczos):
        text = "\n".join(got.assumptions)
        for said in ("sample", "float64", "1e-08", "twice differentiable", got.method):
            assert said in text
        assert str(got).startswith("minimum: ")
    assert "dense" in dense.method
    assert "Lanczos" in lanczos.method
    assert "rests on a random starting block" in str(lanczos)
    assert "random" not in str(dense)


def eq3_energy(params, cov, gamma):
    """Eq. 3 in closed form, for centred data."""
    W_x, W_z = params["W_x"], params["W_z"]
    residual = jnp.eye(len(cov)) - W_x @ W_z
    s2 = jnp.exp(params["log_s2"])
    error = (
        jnp.trace(residual @ cov @ residual.T)
        + jnp.square(W_x @ params["b_z"] + params["b_x"]).sum()
        + (s2 * jnp.square(W_x).sum(0)).sum()
    )
    kl = (s2 - params["log_s2"]).sum() + jnp.trace(W_z @ cov @ W_z.T)
    return error / gamma + len(cov) * jnp.log(gamma) + kl + jnp.square(params["b_z"]).sum()


@pytest.mark.parametrize("options", [DENSE, {"dense_limit": 0, "basis": 24}])
@pytest.mark.parametrize(
    ("gamma", "least", "negative", "verdict"),
    [(4.0, -0.117728, 4, "strict saddle"), (5.5, 0.031997, 0, "minimum")],
)
def test_total_collapse_of_the_affine_vae(gamma, least, negative, verdict, options):
    """A minimum exactly where gamma is at least the data's largest variance, 5."""
    kappa, cov = 4, np.diag([5, 3, 1.5, 0.6, 0.3, 0.1])
    with jax.enable_x64(True):
        collapsed = {
            "W_x": jnp.zeros((6, kappa)), "b_x": jnp.zeros(6), "W_z": jnp.zeros((kappa, 6)),
            "b_z": jnp.zeros(kappa), "log_s2": jnp.zeros(kappa),
        }  # fmt: skip
        got = certificates.certify(
            eq3_energy, collapsed, 1e-12, args=(cov, gamma), count=4, expectation="exact", **options
        )
    assert got.verdict == verdict
    assert got.smallest == pytest.approx(least, abs=5e-7)
    if options is DENSE:
        assert (got.index, got.zero_modes) == (negative, 0)
    assert got.index_bounds[0] == negative  # all copies found: blocks see multiplicity


# ---------------------------------------------------------------- bad input


def _bad(params):
    return (params**2).sum()


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: certificates.certify(_bad, jnp.array([1.0, np.nan]), 1e-6), "params"),
        (
            lambda: certificates.certify(_bad, {"a": {"b": jnp.array(np.inf)}}, 1e-6),
            "params at 'a/b'",
        ),
        (lambda: certificates.certify(_bad, {}, 1e-6), "params is empty"),
        (lambda: certificates.certify(_bad, jnp.zeros((0, 3)), 1e-6), "params is empty"),
        (lambda: certificates.certify(_bad, jnp.arange(3), 1e-6), "params must be real"),
        (lambda: certificates.certify(_bad, jnp.ones(3) * 1j, 1e-6), "params must be real"),
        (lambda: certificates.certify(_bad, np.ones(3), 1e-6), "float64"),
        (lambda: certificates.certify(_bad, jnp.ones(3), 0.0), "tolerance"),
        (lambda: certificates.certify(_bad, jnp.ones(3), -1e-6), "tolerance"),
        (lambda: certificates.certify(_bad, jnp.ones(3), np.nan), "tolerance"),
        (
            lambda: certificates.certify(_bad, jnp.ones(3), 1.0, zero_tolerance=0.0),
            "zero_tolerance",
        ),
        (lambda: certificates.certify(_bad, jnp.ones(3), 1.0, dense_limit=-1), "dense_limit"),
        (lambda: certificates.certify(_bad, jnp.ones(3), 1.0, expectation="?"), "expectation"),
        (lambda: certificates.certify(_bad, jnp.ones(3), 1.0, args=3), "args"),
        (lambda: certificates.certify(lambda p: p, jnp.ones(3), 1e-6), "loss"),
        (lambda: certificates.certify(lambda p: (p.sum(), p), jnp.ones(3), 1e-6), "loss"),
        (lambda: certificates.certify(lambda p: p.argmax(), jnp.ones(3), 1e-6), "loss"),
        (
            lambda: certificates.certify(lambda p: jnp.log(p).sum(), -jnp.ones(3), 1e-6),
            "loss is nan",
        ),
        (lambda: hessian.hessian_vector_product(_bad, jnp.ones(3), jnp.ones(2)), "vector"),
        (lambda: hessian.hessian_vector_product(_bad, jnp.ones(3), [jnp.ones(3)]), "vector"),
        (lambda: hessian.dense_hessian(_bad, jnp.ones(3), block=0), "block"),
        (lambda: lanczos.extreme_eigenvalues(_bad, jnp.ones(3), count=4), "count"),
        (lambda: lanczos.extreme_eigenvalues(_bad, jnp.ones(3), count=0), "count"),
        (lambda: lanczos.extreme_eigenvalues(_bad, jnp.ones(3), count=1.5), "count"),
        (lambda: lanczos.extreme_eigenvalues(_bad, jnp.ones(3), basis=3), "basis"),
        (lambda: lanczos.extreme_eigenvalues(_bad, jnp.ones(3), max_products=3), "max_products"),
        (lambda: lanczos.extreme_eigenvalues(_bad, jnp.ones(3), tolerance=0.0), "tolerance"),
        (lambda: lanczos.extreme_eigenvalues(_bad, jnp.ones(3), floor=-1.0), "floor"),
        (lambda: lanczos.extreme_eigenvalues(lambda p: (p**1.5).sum(), jnp.zeros(3)), "Hessian"),
        (lambda: lanczos.spectral_density(_bad, jnp.ones(3), probes=1), "probes"),
        (lambda: lanczos.spectral_density(_bad, jnp.ones(3), steps=0), "steps"),
        (lambda: lanczos.spectral_density(_bad, jnp.ones(3), width=-1.0), "width"),
        (lambda: lanczos.spectral_density(_bad, jnp.ones(3), grid=np.eye(2)), "grid"),
        (lambda: gradients.norms_by_group({}), "tree is empty"),
        (lambda: gradients.norms_by_group({"a": jnp.ones(3)}, 0), "depth"),
        (lambda: gradients.norms_by_latent({"a": jnp.ones(3)}), "axes"),
        (lambda: gradients.norms_by_latent({"a": jnp.ones(3)}, {"b": 0}), "axes names 'b'"),
        (lambda: gradients.norms_by_latent({"a": jnp.ones(3)}, {"a": 1}), "no axis 1"),
        (
            lambda: gradients.norms_by_latent(
                {"a": jnp.ones(3), "b": jnp.ones(4)}, {"a": 0, "b": 0}
            ),
            "disagree",
        ),
    ],
)
def test_bad_input_is_named(call, argument):
    with pytest.raises(ValueError, match=argument):
        call()
