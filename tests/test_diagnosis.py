"""The certificate on Gaussian VAEs whose optimum is known in closed form (Theorem 1)."""

import dataclasses
import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from vaebal.diagnosis import diagnose, evidence, inputs
from vaebal.diagnosis.repeats import told_by_others
from vaebal.diagnosis.verdict import judge, redundancy, repeating
from vaebal.errors import InputError
from vaebal.measures.evaluation import Estimate

SIZE, PIXELS, NOISE = 1500, 24, 0.02
SPECTRUM = np.array([1.0, 0.7, 0.5, 0.3])  # of the signal, r = 4


def affine_vae(*, kept=4, latents=10, gamma=NOISE**2, variances=SPECTRUM, seed=0):
    """Data N(0, U diag(variances) U^T + noise) and the optimum of a Gaussian VAE at `gamma`.

    Theorem 1 with `kept` directions: columns sqrt(lambda - gamma) u, sigma^2 = gamma / lambda,
    posterior mean sqrt(lambda - gamma) / lambda u^T x; the other latents are the prior's.
    """
    random = np.random.default_rng(seed)
    basis = np.linalg.qr(random.standard_normal((PIXELS, len(variances))))[0]
    scores = random.standard_normal((SIZE, len(variances))) * np.sqrt(variances)
    x = scores @ basis.T + NOISE * random.standard_normal((SIZE, PIXELS))
    total = variances[:kept] + NOISE**2
    used = total > gamma
    slope = np.sqrt(np.where(used, total - gamma, 0.0))
    mean, log_var = np.zeros((SIZE, latents)), np.zeros((SIZE, latents))
    mean[:, :kept] = (x @ basis[:, :kept]) * slope / total
    log_var[:, :kept] = np.log(np.where(used, gamma / total, 1.0))
    z = mean + np.exp(0.5 * log_var) * random.standard_normal(mean.shape)
    decoder = basis[:, :kept] * slope
    return {
        "x": x,
        "x_hat": mean[:, :kept] @ decoder.T,
        "x_hat_sampled": z[:, :kept] @ decoder.T,
        "mean": mean,
        "log_var": log_var,
        "gamma": gamma,
    }


def crowded_vae(latents=10):
    """Every latent reads a mixture of the four scores, with little noise of its own."""
    outputs = affine_vae(latents=latents)
    random = np.random.default_rng(1)
    mixture = np.linalg.qr(random.standard_normal((latents, 4)))[0].T
    outputs["mean"] = outputs["mean"][:, :4] @ mixture * np.sqrt(latents / 4)
    outputs["log_var"] = np.full((SIZE, latents), np.log(0.01))
    return outputs


def collapsed_vae():
    return affine_vae(gamma=1.5)


@functools.cache
def diagnosed(build):
    """The certificate of what `build` makes, once for all tests."""
    return diagnose(**build())


def test_balance_is_certified_with_the_closed_form_numbers():
    certificate = diagnosed(affine_vae)
    e = certificate.evidence
    assert certificate.verdict == "balanced"
    assert (e.active.value, e.informative.value, e.doubtful) == (4, 4, ())
    # E KL = (E mu^2 + sigma^2 - log sigma^2 - 1) / 2 = log(lambda / gamma) / 2 at the optimum.
    expected = 0.5 * np.log((SPECTRUM + NOISE**2) / NOISE**2)
    assert np.all(np.abs(e.kl[:4] - expected) < 4 * e.kl_error[:4])
    np.testing.assert_array_equal(e.kl[4:], 0.0)
    assert abs(e.mmd2.value) < 4 * e.mmd2.error
    assert abs(e.mmd2_active.value) < 4 * e.mmd2_active.error
    # Probabilistic PCA: gamma = noise^2 is the share of the D - r directions left out ...
    assert abs(e.gamma_stationary.value - NOISE**2) < 4 * e.gamma_stationary.error
    # ... and noise in z moves x_hat by gamma sum_k (1 - sigma_k^2).
    assert abs(e.gamma_response.value - NOISE**2) < 4 * e.gamma_response.error
    assert e.directions == 0
    assert e.unexplained.value == pytest.approx(
        (PIXELS - 4) * NOISE**2 / (SPECTRUM.sum() + PIXELS * NOISE**2), rel=0.05
    )
    assert 3.5 < e.codes.value.value < 4.5
    assert redundancy(e).value == pytest.approx(1, abs=0.1)
    assert np.all(np.abs(e.repeated[:4] + 0.1) < 4 * e.repeated_error[:4])  # -1 / neighbours
    assert np.isnan(e.repeated[4:]).all()
    assert e.lost == pytest.approx(0, abs=0.001)


@pytest.mark.parametrize("latents", [2, 10])
def test_missing_latents_are_over_regularization(latents):
    # Probabilistic PCA's gamma: the mean of the variances left out.
    stationary = (SPECTRUM[2:].sum() + (PIXELS - 2) * NOISE**2) / (PIXELS - 2)
    certificate = diagnose(**affine_vae(kept=2, latents=latents, gamma=stationary))
    e = certificate.evidence
    assert certificate.verdict == "over-regularized"
    assert e.gamma_ratio == pytest.approx(1, abs=0.1)
    assert e.directions == 2
    left = (SPECTRUM[2:].sum() + (PIXELS - 2) * NOISE**2) / (SPECTRUM.sum() + PIXELS * NOISE**2)
    assert e.unexplained.value == pytest.approx(left, rel=0.1)
    assert e.top_residual.value == pytest.approx(SPECTRUM[2] + NOISE**2, rel=0.15)
    assert ("more than 2 latents" in certificate.advice) == (latents == 2)


def test_total_collapse_is_over_regularization():
    certificate = diagnosed(collapsed_vae)
    assert certificate.verdict == "over-regularized"
    assert certificate.evidence.active.value == 0
    assert certificate.evidence.codes is None
    assert "total collapse" in certificate.reasons[0]
    # Also on white noise, which leaves no direction to explain.
    random = np.random.default_rng(0)
    outputs = {"x": random.standard_normal((300, 5)), "x_hat": np.zeros((300, 5))}
    idle = {"mean": np.zeros((300, 3)), "log_var": np.zeros((300, 3))}
    assert diagnose(**outputs, **idle, gamma=1.0).verdict == "over-regularized"


def test_a_large_gamma_drowns_latents():
    certificate = diagnose(**affine_vae(gamma=0.15))
    assert certificate.verdict == "over-regularized"
    assert certificate.evidence.active.value == 4  # none is collapsed
    assert certificate.evidence.gamma_ratio > 1.5
    assert certificate.advice.startswith("Lower γ")
    # At a sampled z, Theorem 1's error: gamma for each direction in use, noise for the others.
    total = SPECTRUM.sum() + PIXELS * NOISE**2
    assert certificate.evidence.lost == pytest.approx(4 * (0.15 - NOISE**2) / total, rel=0.1)


def test_crowding_is_under_regularization():
    certificate = diagnosed(crowded_vae)
    assert certificate.verdict == "under-regularized"
    assert redundancy(certificate.evidence).value > 2
    assert len(repeating(certificate.evidence)) == 10  # any four tell the other six
    assert "about 4 latents" in certificate.advice


def test_one_latent_too_many_is_seen_where_the_dimension_lies_between():
    """Two latents on one dimension, one of them a noisy function of the other."""
    outputs = affine_vae(variances=SPECTRUM[:1], kept=1, latents=3)
    random = np.random.default_rng(3)
    first = outputs["mean"][:, 0]
    bent = np.square(first) / np.sqrt(2) + 0.35 * random.standard_normal(SIZE)
    outputs["mean"][:, 1] = bent - bent.mean()
    outputs["log_var"][:, 1] = np.log(0.05)
    certificate = diagnose(**outputs)
    assert certificate.evidence.codes.value.value > 1.3
    assert certificate.verdict == "under-regularized"
    assert repeating(certificate.evidence).tolist() == [1]


def test_the_latents_of_a_circle_do_not_repeat_each_other():
    random = np.random.default_rng(0)
    angle = random.uniform(0, 2 * np.pi, SIZE)
    circle = np.sqrt(2) * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    x = np.pad(circle, ((0, 0), (0, PIXELS - 2))) + NOISE * random.standard_normal((SIZE, PIXELS))
    mean, log_var = np.zeros((SIZE, 4)), np.zeros((SIZE, 4))
    mean[:, :2], log_var[:, :2] = x[:, :2], np.log(NOISE**2)
    x_hat = np.pad(x[:, :2], ((0, 0), (0, PIXELS - 2)))
    certificate = diagnose(x, x_hat, mean, log_var, gamma=NOISE**2)
    assert len(repeating(certificate.evidence)) == 0
    assert certificate.evidence.redundancy.value > 1.5
    assert certificate.verdict == "undecided"
    assert "closed curve" in certificate.missing[0]


def test_many_latents_too_many_are_seen_where_none_is_told_by_the_others():
    """Sixteen waves on six dimensions, bent so much that neighbours are too far to tell them."""
    random = np.random.default_rng(5)
    u, waves = random.uniform(-1, 1, (SIZE, 6)), random.standard_normal((6, 16))
    phase = 4 * u @ (waves / np.linalg.norm(waves, axis=0)) + random.uniform(0, 6, 16)
    outputs = crowded_vae(latents=16) | {"mean": np.sqrt(2) * np.sin(phase)}
    certificate = diagnose(**outputs)
    assert len(repeating(certificate.evidence)) == 0
    assert certificate.verdict == "under-regularized"
    assert "times as many" in certificate.reasons[0]


def test_what_is_told_by_the_others_is_the_share_of_variance():
    random = np.random.default_rng(0)
    z = random.standard_normal((4000, 3))
    a, b, c = z.T
    told, errors = told_by_others(z)
    assert np.all(np.abs(told + 0.1) < 4 * errors)
    # Of a third latent half the variance is a bent function of the first two.
    half = np.sin(a) * np.sign(b)
    half = half / half.std() + c
    told, errors = told_by_others(np.stack([a, b, half], axis=1))
    assert told[2] == pytest.approx(0.5, abs=0.08)
    scaled, _ = told_by_others(np.stack([1e3 * half, a - 5, 1e-3 * b], axis=1))
    np.testing.assert_allclose(scaled, told[[2, 0, 1]], atol=1e-9)
    # Rows that come twice do not tell themselves; one latent has no others.
    twice, _ = told_by_others(np.concatenate([z[:500], z[:500]]))
    np.testing.assert_array_equal(twice, told_by_others(z[:500])[0])
    np.testing.assert_array_equal(told_by_others(z[:, :1]), 0)
    still, _ = told_by_others(np.pad(z[:500], ((0, 0), (0, 1))))  # a latent that does not vary
    np.testing.assert_array_equal(still, [*told_by_others(z[:500])[0], np.nan])


def test_of_many_latents_those_of_largest_variance_are_looked_at():
    random = np.random.default_rng(0)
    codes = random.standard_normal((300, 70)) * np.linspace(2, 1, 70)
    codes[:, 0] = 2 * codes[:, 1:].mean(1) + 10 * codes[:, 1]
    told, _ = told_by_others(codes)
    assert np.isfinite(told).sum() == 64
    assert np.isfinite(told[np.argsort(-codes.var(0))[:64]]).all()


@pytest.mark.parametrize(("lost", "verdict"), [(0.05, "under-regularized"), (0.3, "undecided")])
def test_crowding_with_a_bad_reconstruction_is_judged_by_how_bad(lost, verdict):
    outputs = crowded_vae()
    total, direction = outputs["x"].var(0).sum(), np.ones(PIXELS) / np.sqrt(PIXELS)
    size = np.sqrt(lost * total) * np.random.default_rng(4).standard_normal((SIZE, 1))
    for name in ("x_hat", "x_hat_sampled"):
        outputs[name] = outputs[name] + size * direction
    outputs["gamma"] = np.square(outputs["x"] - outputs["x_hat_sampled"]).mean()
    certificate = diagnose(**outputs)
    assert certificate.evidence.structured == pytest.approx(lost, rel=0.15)
    assert certificate.verdict == verdict
    if verdict == "undecided":
        assert "signs of both" in certificate.missing[0]


def test_a_posterior_far_from_the_prior_is_under_regularization():
    outputs = affine_vae(latents=4)
    outputs["mean"], outputs["log_var"] = 8 * outputs["mean"], outputs["log_var"] - 4
    certificate = diagnose(**outputs)
    assert certificate.verdict == "under-regularized"
    assert "far from the prior" in certificate.reasons[0]


def test_a_gamma_below_its_stationary_value_is_under_regularization():
    certificate = diagnose(**(affine_vae() | {"gamma": 0.1 * NOISE**2}))
    assert certificate.verdict == "under-regularized"
    assert "too small" in certificate.reasons[0]


def test_gamma_is_asked_for_or_estimated():
    outputs = affine_vae()
    del outputs["gamma"]
    estimated = diagnose(**outputs)
    assert estimated.verdict == "balanced"
    assert estimated.evidence.gamma_source == "response"
    assert estimated.evidence.gamma == pytest.approx(NOISE**2, rel=0.05)
    del outputs["x_hat_sampled"]
    unknown = diagnose(**outputs)
    assert unknown.verdict == "undecided"
    assert "give gamma" in unknown.missing[0]
    # By the loss: |x - x_hat|^2 / D + beta KL has gamma = beta D / 2.
    beta = 2 * NOISE**2 / PIXELS
    by_loss = diagnose(**outputs, loss={"kl_weight": beta, "pixels": "mean"})
    assert by_loss.verdict == "balanced"
    assert by_loss.evidence.gamma == pytest.approx(NOISE**2, rel=1e-12)


def test_the_stationary_value_without_a_sample_is_that_with_one():
    outputs = affine_vae()
    sampled = diagnosed(affine_vae).evidence.gamma_stationary
    del outputs["x_hat_sampled"]
    expected = diagnose(**outputs).evidence.gamma_stationary
    assert abs(sampled.value - expected.value) < 4 * np.hypot(sampled.error, expected.error)


def test_a_latent_in_doubt_leaves_the_verdict_open():
    outputs = affine_vae()
    outputs["mean"] = outputs["mean"].copy()
    outputs["mean"][:, 7] = 0.2 * np.random.default_rng(5).standard_normal(SIZE)  # sigma^2 is 1
    certificate = diagnose(**outputs)
    assert certificate.verdict == "undecided"
    assert certificate.evidence.doubtful == (7,)


def test_neither_units_nor_the_order_of_pixels_and_latents_matter():
    plain = affine_vae()
    random = np.random.default_rng(3)
    pixels, latents = random.permutation(PIXELS), random.permutation(10)
    moved = {name: 1000 * plain[name][:, pixels] + 7 for name in ("x", "x_hat", "x_hat_sampled")}
    moved |= {name: plain[name][:, latents] for name in ("mean", "log_var")}
    first, second = diagnosed(affine_vae), diagnose(**moved, gamma=1e6 * NOISE**2)
    assert first.verdict == second.verdict
    a, b = first.evidence, second.evidence
    np.testing.assert_allclose(b.kl, a.kl[latents], rtol=1e-12)
    for name in ("structured", "directions", "gamma_ratio"):
        np.testing.assert_allclose(getattr(b, name), getattr(a, name), rtol=1e-6)
    np.testing.assert_allclose(b.data.value, a.data.value, rtol=1e-6)


def union_of_planes():
    """Three 4-dimensional flats; latents 4 c .. 4 c + 3 inform the examples of flat c alone."""
    random = np.random.default_rng(0)
    mean, log_var = np.zeros((SIZE, 12)), np.zeros((SIZE, 12))
    x = np.zeros((SIZE, 40))
    part = np.arange(SIZE) % 3
    for c in range(3):
        rows, columns = np.flatnonzero(part == c), slice(4 * c, 4 * c + 4)
        z = random.standard_normal((len(rows), 4))
        x[rows] = 3 * c + z @ np.linalg.qr(random.standard_normal((40, 4)))[0].T
        mean[rows, columns], log_var[rows, columns] = np.sqrt(1 - 1e-4) * z, np.log(1e-4)
    x_hat = x + 1e-2 * random.standard_normal(x.shape)
    return {"x": x, "x_hat": x_hat, "mean": mean, "log_var": log_var, "gamma": 1e-4}


def test_a_union_of_manifolds_is_judged_by_the_latents_of_one_example():
    certificate = diagnosed(union_of_planes)
    e = certificate.evidence
    assert e.intermittent == tuple(range(12))
    assert e.informative_per_example.value == 4
    assert e.active.value == 12
    assert e.redundancy.value > 1.5  # of the pooled codes
    assert redundancy(e).value == pytest.approx(1, abs=0.2)
    assert certificate.verdict == "balanced"
    assert "4.0 in one example" in certificate.reasons[0]


def test_images_and_other_arrays_are_read():
    class Tensor:
        """What np.asarray makes of a tensor on the CPU."""

        def __init__(self, values):
            self.values = values

        def __array__(self, dtype=None, copy=None):
            return self.values

    outputs = affine_vae()
    images = {n: outputs[n].reshape(SIZE, 2, 4, 3) for n in ("x", "x_hat", "x_hat_sampled")}
    read = {name: Tensor(value) for name, value in (outputs | images).items() if name != "gamma"}
    assert diagnose(**read, gamma=NOISE**2).json() == diagnosed(affine_vae).json()


def test_half_precision_is_read():
    outputs = affine_vae()
    short = {name: jnp.asarray(value, jnp.bfloat16) for name, value in outputs.items()}
    given = inputs.check(*(short[name] for name in ("x", "x_hat", "mean", "log_var")), None, None)
    np.testing.assert_allclose(given.x, outputs["x"], rtol=2**-8)


def test_variance_may_be_given_instead_of_its_log():
    outputs, expected = affine_vae(), diagnosed(affine_vae)
    outputs["variance"] = np.exp(outputs.pop("log_var"))
    found = diagnose(**outputs)
    np.testing.assert_allclose(found.evidence.kl, expected.evidence.kl, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("build", [affine_vae, crowded_vae, union_of_planes, collapsed_vae])
def test_every_certificate_can_be_shown(build, tmp_path):
    certificate = diagnosed(build)
    read = json.loads(certificate.json(), parse_constant=lambda name: pytest.fail(name))
    assert read["verdict"] == certificate.verdict
    assert read["evidence"]["kl"] == pytest.approx(certificate.evidence.kl.tolist())
    text = certificate.markdown()
    assert text.startswith(f"## Verdict: {certificate.verdict}")
    tables = [line for line in text.splitlines() if line.startswith("|")]
    widths = {line.replace("\\|", "").count("|") for line in tables}
    assert widths == {4, 7}  # no cell breaks its row
    assert repr(certificate).startswith(certificate.verdict)
    assert certificate.advice in str(certificate)
    certificate.figure().savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_evidence_is_a_function_of_the_seed():
    first = diagnosed(affine_vae)
    same, other = (diagnose(**affine_vae(), seed=seed) for seed in (0, 1))
    assert first.evidence.mmd2 == same.evidence.mmd2 != other.evidence.mmd2


def _broken(**changes):
    return affine_vae() | changes


X = affine_vae()["x"]
LOG_VAR = affine_vae()["log_var"]


@pytest.mark.parametrize(
    ("outputs", "sentence"),
    [
        (_broken(x=np.where(np.arange(PIXELS) == 3, np.nan, X)), "x has a value that is not fin"),
        (_broken(x=X[:, 0]), "x has shape .1500,.; give"),
        (_broken(x=X.astype(object)), "x has dtype object"),
        (_broken(x=X[:, :0]), "at least one value a row"),
        (_broken(x=np.ones_like(X)), "same value in every row"),
        (_broken(x_hat=X[:, :5]), "x_hat has shape .1500, 5."),
        (_broken(x_hat=X[:70]), "x_hat has shape .70, 24."),
        (_broken(log_var=LOG_VAR[:, :3]), "log_var has shape .1500, 3."),
        (_broken(x_hat_sampled=X[:, :5]), "x_hat_sampled has shape"),
        (_broken(mean=LOG_VAR[:70], log_var=LOG_VAR[:70]), "mean has 70 rows"),
        (_broken(log_var=np.exp(LOG_VAR)), "log_var has no negative value"),
        (_broken(log_var=np.exp(0.5 * LOG_VAR)), "log_var has no negative value"),
        (_broken(log_var=LOG_VAR + 1e3), "log_var reaches 1e.03"),
        (_broken(log_var=None), "give exactly one of them"),
        (_broken(variance=LOG_VAR), "give exactly one of them"),
        (_broken(log_var=None, variance=LOG_VAR), "pass them as log_var"),
        (_broken(log_var=None, variance=0 * LOG_VAR), "deterministic encoder"),
        (_broken(gamma=-1.0), "gamma=-1.0 must be one positive"),
        (_broken(gamma=np.ones(3)), "must be one positive"),
        (_broken(gamma="small"), "gamma='small' must be one positive"),
        (_broken(gamma=1j), "gamma=1j must be one positive"),
        (_broken(gamma=None, loss=1e-3), "loss=0.001 must be a dictionary"),
        (_broken(seed=-1), "seed=-1 must be an integer"),
        (_broken(x_hat_sampled=X), "x_hat_sampled is x itself"),
        (_broken(x=np.ma.masked_greater(X, 0.5)), "x has masked values"),
        (_broken(x=np.round(X[:1] * np.eye(2)[np.arange(SIZE) % 2, :1])), "x has 2 different rows"),
        (_broken(loss={"kl_weight": 1.0}), "gamma and loss both say"),
        (_broken(gamma=None, loss={"weight": 1.0}), "is not understood"),
        (_broken(gamma=None, loss={"error": "bce"}), "Bernoulli likelihood"),
        ({n: v[:60] if n != "gamma" else v for n, v in affine_vae().items()}, "has 60 examples"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_sentence(outputs, sentence):
    with pytest.raises(InputError, match=sentence):
        diagnose(**outputs)


@pytest.mark.parametrize(
    ("slope", "shift", "sentence"),
    [
        (255, 0, "0..255 and x_hat on 0..1"),
        (2, -1, "x is on -1..1 and x_hat on 0..1"),
        (0.5, 0.5, "x is on 0..1 and x_hat on -1..1"),
        (1 / 255, 0, "x is on 0..1 and x_hat on 0..255"),
        (1000, 3, "on one scale"),
    ],
)
def test_pixel_scales_that_differ_are_named(slope, shift, sentence):
    random = np.random.default_rng(0)
    outputs = affine_vae()
    x = random.random((SIZE, PIXELS))
    near = np.clip(x + 0.02 * random.standard_normal(x.shape), 0, 1)
    # In x's unit interval either way: x = slope * x_hat + shift.
    given = {"x": slope * x + shift, "x_hat": near}
    if slope < 1:
        given = {"x": x, "x_hat": (near - shift) / slope}
    with pytest.raises(ValueError, match=sentence):
        diagnose(**given, mean=outputs["mean"], log_var=outputs["log_var"])


def test_log_variances_just_above_the_priors_are_not_taken_for_variances():
    # As they are early in training: no negative value, and yet no variances.
    outputs = affine_vae(gamma=1.5)
    outputs["log_var"] = outputs["log_var"] + 0.25
    assert diagnose(**outputs).verdict == "over-regularized"


def test_posteriors_as_wide_as_the_prior_or_wider_are_not_taken_for_logs():
    outputs = affine_vae()
    wide = {"mean": 3 * outputs["mean"], "gamma": NOISE**2}
    given = {"x": outputs["x"], "x_hat": outputs["x_hat"], **wide}
    diagnose(**given, log_var=np.zeros_like(LOG_VAR))
    diagnose(**given, variance=np.full_like(LOG_VAR, 2.0))


@pytest.mark.parametrize(
    ("samples", "pixels"), [(100, 12_288), (1000, 20_000), (500, 600), (500, 50)]
)
def test_white_noise_is_measured_as_what_it_is(samples, pixels):
    """From the middle of its spectrum, whether there are more samples or pixels."""
    rows = 3 * np.random.default_rng(0).standard_normal((samples, pixels))
    middle = evidence._noise(evidence._spectrum(rows)[0], samples, pixels, np.random.default_rng(1))
    assert middle == pytest.approx(9, rel=0.03)


def test_shrunken_reconstructions_are_not_taken_for_another_scale():
    # A half of x - x_bar: over-regularized, on the right scale.
    outputs = affine_vae()
    outputs["x"], outputs["x_hat"] = 0.5 + 0.1 * outputs["x"], 0.5 + 0.05 * outputs["x_hat"]
    del outputs["x_hat_sampled"]
    assert diagnose(**outputs).verdict == "over-regularized"


DOUBTS = [
    ({"gamma": 0.45}, "times its stationary value"),
    ({"gamma": 2.1}, "times its stationary value"),
    ({"structured": 0.012}, "structured directions"),
    ({"lost": 0.03}, "beyond white noise"),
    ({"doubtful": (7,)}, "in doubt"),
    ({"repeated": 0.45}, "in part be told"),
    ({"missing": Estimate(1.5, 0.05), "structured": 0.006}, "above that of the codes"),
    ({"mmd2": Estimate(0.35, 0.1)}, "may be far"),
    ({"mmd2_active": Estimate(0.35, 0.1)}, "may be far"),
]


@pytest.mark.parametrize(("changes", "said"), DOUBTS)
def test_each_doubt_alone_withholds_balance(changes, said):
    of = diagnosed(affine_vae).evidence
    changes = dict(changes)
    if "gamma" in changes:  # as a share of its stationary value
        changes["gamma"] *= of.gamma_stationary.value
    if "repeated" in changes:  # of the first latent
        changes["repeated"] = np.r_[changes["repeated"], of.repeated[1:]]
    found = judge(dataclasses.replace(of, **changes))
    assert (found.name, len(found.missing)) == ("undecided", 1)
    assert said in found.missing[0]
