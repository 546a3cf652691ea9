"""Variants of one network: what a variant changes, what it may not, and the page."""

import jax
import ml_collections
import numpy as np
import pytest

from vaebal.errors import InputError
from vaebal.experiments.collapse import fields, page, run
from vaebal.experiments.kappa_sweep import run as sweep


def tiny(*variants):
    config = fields.defaults("tiny")
    config.data.name = "digits"
    config.model.kappas, config.model.skips = (3,), ("none", "residual+affine")
    config.model.width, config.model.encoder_layers, config.model.decoder_blocks = 8, 2, 1
    config.train.epochs, config.train.epochs_per_checkpoint = 1, 1
    config.eval.nll_samples = 1
    config.variants = variants
    return config


def test_a_variant_changes_what_it_names_and_nothing_else():
    config = tiny("model.gamma=2 model.activation=relu")
    own = run.changed(config, config.variants[0]).to_dict()
    assert (own["model"]["gamma"], own["model"]["activation"]) == (2, "relu")
    own["model"] |= {"gamma": config.model.gamma, "activation": config.model.activation}
    assert own == config.to_dict()


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ("model.gama=1", "'model.gama=1' is no field of model or train with a value"),
        ("data.seed=1", "'data.seed=1' is no field of model or train"),
        ("model.gamma", "'model.gamma' is no field of model or train with a value"),
        ("model.gamma=much", "'model.gamma=much' has a value of another kind than 1.0"),
        ("model.activation=sine", r"model\.activation='sine' must be one of"),
        ("model.weights=0", r"model\.weights=0\.0 must be a finite number above 0"),
    ],
)
def test_what_is_no_variant_is_one_sentence(variant, said):
    with pytest.raises(InputError, match=said):
        run.check(tiny("", variant))


def test_kernels_start_smaller_and_nothing_else_does(small_vae, pixels):
    from vaebal.training import Member, gaussian_vae

    objective = gaussian_vae(small_vae())
    usual, small = (
        each.init(Member(0, 5, 1.0), pixels.mean(0))
        for each in (objective, sweep.scaled_start(objective, 0.25))
    )
    expected = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.asarray(leaf) * (0.25 if path[-1].key == "kernel" else 1), usual
    )
    jax.tree.map(np.testing.assert_array_equal, small, expected)
    assert np.abs(small["decoder"]["first"]["kernel"]).max() > 0


def row(variant, skips, active):
    numbers = {"informative": active, "active_0.01": active, "error_mean": 2.0, "seed": 0}
    return {"variant": variant, "skips": skips, "kappa": 9} | numbers


def test_the_sentence_names_who_keeps_nothing():
    rows = [
        row("", "none", 4), row("model.weights=0.1 model.gamma=1", "none", 0),
        row("", "residual+affine", 5), row("model.weights=0.1 model.gamma=1", "residual+affine", 3),
    ]  # fmt: skip
    assert page.sentence(rows) == (
        "Variants that keep no active latent: with no skips 1 of 2: weights = 0.1, γ = 1. And with "
        "residual + affine skips 0 of 2."
    )
    _, body = page.table(rows)
    assert body == [
        ["–", "9", *("4.0", "4.0", "2.0"), *("5.0", "5.0", "2.0")],
        ["weights = 0.1, γ = 1", "9", *("0.0", "0.0", "2.0"), *("3.0", "3.0", "2.0")],
    ]


@pytest.mark.slow
def test_a_whole_run_is_reported_and_not_done_again(tmp_path, capsys):
    config = tiny("", "model.weights=0.01")
    rows = run.run(config, str(tmp_path))
    assert [(r["variant"], r["skips"]) for r in rows] == [
        (v, s) for v in config.variants for s in config.model.skips
    ]
    assert rows[0]["error_mean"] != rows[2]["error_mean"]
    assert "Variants that keep no active latent" in (tmp_path / "table.md").read_text()
    capsys.readouterr()
    assert run.run(ml_collections.ConfigDict(config.to_dict()), str(tmp_path)) == rows
    assert "finished before" in capsys.readouterr().out
