"""The validation of `diagnose`: states told from known r and noise, and the page."""

import sys

import numpy as np
import pytest

from vaebal.diagnosis import population, validation
from vaebal.diagnosis.population import Case, Outcome, Source
from vaebal.diagnosis.verdict import BALANCED, OVER, UNDER
from vaebal.errors import InputError

SOURCE = Source("linear", 2, 20, 0.1, 0)


def outcome(activities, variances, *, lost=0.0, gamma=None, size=4000):
    """Outputs with these Var(E[z|x]) and sigma^2, losing a share of x's variance beyond noise."""
    random = np.random.default_rng(0)
    x = random.standard_normal((size, 20))
    error = np.sqrt(SOURCE.noise**2 + lost) * random.standard_normal(x.shape)
    mean = random.standard_normal((size, len(activities))) * np.sqrt(activities)
    log_var = np.broadcast_to(np.log(variances), mean.shape)
    gamma = SOURCE.noise**2 + lost if gamma is None else gamma
    return Outcome(x, x, x + error, mean, log_var, gamma)


@pytest.mark.parametrize(
    ("given", "state"),
    [
        (outcome([1, 1, 0], [0.01, 0.01, 1]), BALANCED),
        (outcome([1, 1, 0], [0.01, 0.01, 1], lost=0.1), OVER),
        (outcome([1, 0, 0], [0.01, 1, 1], lost=0.5), OVER),
        (outcome([1, 1, 1], [0.01, 0.01, 0.01]), UNDER),
        (outcome([1, 1, 0, 0], [0.01, 0.01, 0.1, 0.1]), UNDER),
        (outcome([1, 1, 0], [0.01, 0.01, 1], gamma=0.001), UNDER),
        (outcome([1, 1, 0.1], [0.01, 0.01, 0.9]), "mixed"),
        (outcome([1, 1, 0], [0.01, 0.01, 1], gamma=0.03), "mixed"),
        (outcome([1, 1, 1], [0.01, 0.01, 0.01], lost=0.2), "mixed"),
    ],
)
def test_the_state_follows_from_r_and_the_noise(given, state):
    case = Case(SOURCE, "any", state, 3, 1.0, 0.0, 1, "short")
    assert validation.state(case, given) == state


def test_sources_cover_every_r_and_differ_between_seeds():
    first, other = population.sources(1, 16), population.sources(2, 16)
    assert sorted(source.rank for source in first) == sorted([*range(1, 9)] * 2)
    assert not set(first) & set(other)
    assert first == population.sources(1, 16)


@pytest.mark.slow
def test_the_program_trains_diagnoses_and_reports(monkeypatch, tmp_path):
    chosen = ("γ slow, κ = r", "collapsed at birth", "autoencoder, tiny KL")
    every = population.cases
    monkeypatch.setattr(population, "STEPS", {"long": 60, "short": 60})
    monkeypatch.setattr(
        population, "cases", lambda source: [c for c in every(source) if c.arm in chosen]
    )
    validation.main(["--seed=11", "--sets=1", f"--out={tmp_path}"])
    page = (tmp_path / "table.md").read_text()
    assert "3 VAEs on 1 data sets (seed 11, never seen before the rule stood" in page
    collapsed = next(line for line in page.splitlines() if line.startswith("| collapsed at birth"))
    assert collapsed == "| collapsed at birth | 0 | 1 | 0 | 0 |"


@pytest.mark.slow
def test_arms_of_one_program_do_not_disturb_each_other(monkeypatch):
    monkeypatch.setattr(population, "STEPS", {"long": 60, "short": 60})
    source = Source("linear", 1, 20, 0.01, 7)
    cases = [case._replace(steps=5) for case in population.cases(source) if case.length == "short"]
    two = population.train([cases[0], cases[3]])
    one = population.train([cases[0]])
    np.testing.assert_allclose(one[0].x_hat, two[0].x_hat, atol=2e-3)
    assert np.abs(two[1].x_hat - two[0].x_hat).max() > 1e-2


@pytest.mark.torch
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_case_by_pytorch_holds_or_learns_its_gamma(rate):
    """A point outside the training rows is encoded and decoded; gamma is told."""
    pytest.importorskip("torch")
    from vaebal.diagnosis import torch_population

    source = torch_population.sources(3, 1)[0]
    case = Case(source, "PyTorch", "any", 3, 0.5, rate, 1, "torch")
    got = torch_population.train(case)
    assert [a.shape for a in got[:5]] == [(2000, source.dim)] * 3 + [(2000, 3)] * 2
    assert (got.gamma == 0.5) == (rate == 0)
    explained = 1 - np.square(got.x - got.x_hat).sum() / np.square(got.x - got.x.mean(0)).sum()
    assert explained > 0.1 or rate == 0


def test_without_torch_it_is_said_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "vaebal.diagnosis.torch_population", raising=False)
    with pytest.raises(InputError, match="--torch needs torch: pip install torch pythae"):
        validation.main(["--torch", f"--out={tmp_path}"])
