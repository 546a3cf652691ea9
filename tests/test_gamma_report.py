import json
import math

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest

from vaebal.data import ImageSet
from vaebal.experiments.gamma import fields, figures, order, page, tables
from vaebal.experiments.gamma.evaluate import draw_pictures
from vaebal.experiments.report import rows_with
from vaebal.models import init_params, mlp_vae
from vaebal.theory.collapse import collapse

ARMS = ("learned 0.01", "adaptive", "fixed at adaptive", "learned 0.001")


def row(arm, rank, seed, active, error, mmd, **changes):
    numbers = dict.fromkeys(("kl", "train_seconds", "gamma_residual_train"), 1.0)
    numbers |= dict.fromkeys(
        ("error_mean_se", "negative_elbo_se", "mmd_se", "mmd_active_se"), 0.001
    )
    return {
        **{"arm": arm, "rank": rank, "seed": seed, "kappa": 20, "steps": 1000, "epochs": 10},
        **numbers,
        **{"data": "rendered", "batch_size": 8, "test_images": 100, "noise": 0.0},
        **{"gamma": 1e-4, "gamma_start": 1.0, "gamma_residual_relative": -0.01},
        **{
            "error_mean": error,
            "error_train": 0.9 * error,
            "negative_elbo": -1000.0 + error,
            "mmd": mmd,
            "mmd_active": mmd,
        },
        **{"active_0.01": float(active), "informative": active, "residual_over_gamma": 0.5},
        **{"factor_r2": [0.9] * rank, "variance_per_dimension": [0.1] * 20},
        **{"kl_per_dimension": [0.1 * k for k in range(20)], "data_seed": seed},
        **{"active_latents": list(range(19, 19 - min(int(active), 20), -1))},
        "factor_shares": [[0.9 * (k % rank == j) for j in range(rank)] for k in range(20)]
        if rank
        else [],
        **changes,
    }


def some_rows(ranks=(2, 4), seeds=(0, 1, 2), arms=ARMS):
    """The adaptive arm balanced at twice the error of the fast one; 0.001 wrong at one seed."""
    excess = {"learned 0.01": 5, "adaptive": 0, "fixed at adaptive": 10, "learned 0.001": 0}
    errors = {"learned 0.01": 1.0, "adaptive": 2.0, "fixed at adaptive": 0.8, "learned 0.001": 1.5}
    mmds = {"learned 0.01": 0.4, "adaptive": 0.1, "fixed at adaptive": 0.3, "learned 0.001": 0.2}
    return [
        row(
            *(arm, rank, seed, (rank or 4) + excess[arm] + (arm == "learned 0.001" and seed == 1)),
            *(errors[arm] * (1 + seed), mmds[arm] * (1 + seed)),
        )
        for rank in ranks
        for seed in seeds
        for arm in arms
    ]


def cells(table, column):
    """One column of a table, by its first cells (r and arm, or arm)."""
    header, body = table
    keys = 2 if header[0] == "r" else 1
    return {line[:keys][-1] if keys == 1 else tuple(line[:2]): line[header.index(column)]
            for line in body}  # fmt: skip


def experiment(rows):
    """What `write` takes, small: 4 × 4 grey images."""
    config = fields.defaults("test")
    config.data.noise, config.train.patience, config.train.jitter = 0.1, 750, 0.1
    keys = [(each["arm"], each["rank"], each["seed"]) for each in rows]
    entry = {"squared_error": 1.6, "gamma": 0.05, "latent_gradient": 3.0, "active": 5.0}
    histories = {
        key: [entry | {"step": step, "latent_gradient": float(step + 1)} for step in (0, 10, 20)]
        for key in keys
    }
    shapes = dict.fromkeys(("images", "reconstructions", "samples"), np.full((3, 16), 0.5))
    shapes |= {"traversals": np.full((2, 3, 16), 0.5), "latents": np.array([19, 0])}
    shapes |= {"values": np.array([-1.0, 0.0, 1.0])}
    images = ImageSet("rendered", np.zeros((8, 16)), np.zeros((4, 16)), (4, 4, 1))
    return config, histories, dict.fromkeys(keys, shapes), images


def test_how_far_gamma_is_off_is_told_of_test_images_too():
    rows = some_rows()
    assert "on test images" not in tables.main_table(rows)[0]  # of rows that do not say
    rows = [each | {"gamma_residual_test": -0.25 * each["gamma"]} for each in rows]
    header, body = tables.main_table(rows)
    assert header[-2:] == ["γ off by", "on test images"]
    assert {tuple(line[-2:]) for line in body} == {("−1.0 %", "−25.0 %")}


def test_the_papers_table_2_is_transcribed_right():
    """Its ratios, as the text states them: about the same error, more than 3 times the MMD."""
    header, body = tables.paper_table(some_rows(arms=("adaptive",)))
    assert len(body) == 2
    assert [line[header.index("Rec. ratio")] for line in body] == ["0.985", "0.992"]
    assert [line[header.index("MMD ratio")] for line in body] == ["3.44", "3.13"]
    assert body[0][2:4] + body[0][5:7] == ["60.5", "59.6", "20.24", "69.59"]
    assert body[1][2:4] + body[1][5:7] == ["352.8", "349.9", "93.3", "291.8"]


def test_our_ratios_are_of_the_same_r_and_seed():
    """Errors and MMDs vary threefold with the seed, their ratios not at all."""
    header, body = tables.paper_table(some_rows())
    for line in body[2:]:
        assert line[header.index("Rec. ratio")] == "0.400 ± 0.000"
        assert line[header.index("MMD ratio")] == "3.00 ± 0.00"
    assert [line[0] for line in body[2:]] == ["rendered, r = 2", "rendered, r = 4"]
    unpaired = [each for each in some_rows() if (each["arm"], each["seed"]) != ("adaptive", 0)]
    assert len(order.pairs_of(unpaired, "fixed at adaptive")) == 4


@pytest.mark.parametrize(
    ("learned", "fixed", "text"),
    [
        ((0.1, 0.001), (0.3, 0.001), "3.00"),
        ((0.01, 0.01), (0.5, 0.01), "> 16.0"),  # (.5 − .02) / (.01 + .02)
        ((-0.01, 0.01), (0.5, 0.01), "> 24.0"),  # (.5 − .02) / .02
        ((0.0, 0.01), (0.01, 0.01), "–"),
    ],
)
def test_an_mmd_that_may_be_zero_bounds_the_ratio(learned, fixed, text):
    pair = [row("adaptive", 2, 0, 2, 1.0, mmd, mmd_se=error) for mmd, error in (learned, fixed)]
    assert tables.mmd_ratio([tuple(pair)]) == text


def test_the_nll_is_shown_where_it_was_measured_beside_both_errors():
    rows = some_rows()
    header, body = tables.main_table([each | {"nll": -990.0, "kl": 1.0} for each in rows])
    assert {line[header.index("NLL ≤")] for line in body} == {"−990.0 ± 0.0"}
    assert "NLL ≤" not in tables.main_table(rows)[0]
    errors = [line[header.index("Rec. Err.") :][:2] for line in body]
    assert all(float(b.split()[0]) == pytest.approx(0.9 * float(a.split()[0]), rel=0.01)
               for a, b in errors)  # fmt: skip


def test_runs_with_exactly_r_are_counted():
    rows = some_rows()
    main = cells(tables.main_table(rows), "= r")
    assert main["2", "adaptive"] == "3 of 3"
    assert main["4", "learned 0.001"] == "2 of 3"
    assert main["4", "fixed at γ* of adaptive"] == "0 of 3"
    summary = cells(tables.summary_table(rows), "active = r")
    assert list(summary.values()) == ["6 of 6", "4 of 6", "0 of 6", "0 of 6"]
    excess = cells(tables.summary_table(rows), "active − r")
    assert excess["learned 0.01"] == "+5.00 ± 0.00"
    assert excess["adaptive"] == "0.00 ± 0.00"


def test_where_r_is_unknown_nothing_is_counted():
    rows = some_rows(ranks=(0,))
    for table in (tables.main_table(rows), tables.summary_table(rows)):
        assert all("of 3" not in cell for line in table[1] for cell in line)
    assert set(cells(tables.main_table(rows), "factor R²").values()) == {""}
    assert "Exactly" not in page.sentence(rows)


def test_the_price_is_beside_the_crowded_learned_run_of_least_error():
    """Neither a balanced run nor one with gamma fixed is the reference, whatever its error."""
    others = [row("learned 0.1", 2, 0, 3, 1.9, 0.1), row("learned 1", 2, 0, 2, 0.1, 0.1)]
    rows = [*some_rows(), *others]
    reference = order.reference(rows)
    assert {run["arm"] for run in reference.values()} == {"learned 0.01"}
    adaptive = rows_with(rows, arm="adaptive")
    for (error, elbo), run in zip(order.price(adaptive, reference), adaptive, strict=True):
        assert error == pytest.approx(2)
        assert elbo == pytest.approx(run["error_mean"] / 2)
    balanced = [run for run in rows if run["active_0.01"] == run["rank"]]
    assert order.reference(balanced) == {}
    assert set(cells(tables.summary_table(balanced), "Rec. Err. ×").values()) == {""}


def test_where_r_is_unknown_no_run_is_called_crowded():
    rows = [*some_rows(ranks=(0,)), row("learned 0.1", 0, 0, 2, 0.5, 0.1)]
    assert order.reference(rows)[0, 0]["arm"] == "learned 0.1"
    config, *_, images = experiment(rows)
    said = page.sentence(rows) + page.protocol(config, rows, images)["summary"]
    assert "Beside the learned run of least error (same r, same seed; 3 pairs)" in said
    assert "to the learned run of the same seed with the least error." in said
    assert "crowded" not in said


@pytest.mark.parametrize(
    ("changes", "arms", "told", "untold"),
    [
        (
            {"train.patience": 250},
            ("adaptive", "fixed at adaptive"),
            ["for 250 steps (or, where that is less, for 15% of the steps so far and 300 at least)",
             "it has all κ latents open from the start",
             "γ moves by at most 0.02 nats a step"],
            ["which no arm has found"],
        ),
        (
            {"train.patience": 0, "train.fastest": 0.5},
            ("adaptive", "fixed at adaptive"),
            ["γ moves by at most 0.5 nats a step"],
            ["open from the start"],
        ),
        (
            {},
            ("plain 5e-3 of 8", "adaptive"),
            ["200 epochs (20,000 steps of", "a plain VAE of K latents, which no arm has found"],
            ["a plain VAE beside it"],
        ),
    ],
)  # fmt: skip
def test_the_protocol_is_of_the_arms_and_their_numbers(changes, arms, told, untold):
    rows = [row(arm, 2, 0, 2, 1.0, 0.1) for arm in arms]
    for each in rows:
        twice = 1 + each["arm"].startswith("plain")
        each |= {"epochs": 200 * twice, "steps": 20_000 * twice}
    config, *_, images = experiment(rows)
    config.update_from_flattened_dict(changes)
    said = page.protocol(config, rows, images)["main"].replace("20000", "20,000")
    assert [text for text in told if text not in said] == []
    assert [text for text in untold if text in said] == []


def test_the_sentence_is_made_of_the_rows():
    text = page.sentence([*some_rows(), row("held 0.1", 3, 0, 2, 1.0, 0.1)])
    assert "adaptive in 6 of 6 runs (0.00); learned 0.001 in 4 of 6 runs (+0.33)" in text
    assert "γ held at 0.1 in 0 of 1 runs (−1.00)." in text
    assert "it has 2.00 times the error and −ELBO +2.0 nats (positive: worse)." in text
    assert "the higher MMD² in 6 of 6 pairs (0.200 → 0.600 on average), 0.40 times" in text
    assert "within 1.0 % of stationary" in text


def test_the_sentence_speaks_against_the_paper_where_the_rows_do():
    turned = [
        run | {"mmd": -run["mmd"], "negative_elbo": -run["negative_elbo"]} for run in some_rows()
    ]
    text = page.sentence(turned)
    assert "the higher MMD² in 0 of 6 pairs" in text
    assert "−ELBO −2.0 nats" in text


def test_the_adaptive_runs_speed_is_its_mean():
    """Taking that many steps of that size leads from gamma's start to its end."""
    run = row("adaptive", 2, 0, 2, 1.0, 0.1, gamma_start=4.0, gamma=3e-4, steps=700)
    assert 4.0 * math.exp(-order.speed(run) * 700) == pytest.approx(3e-4)
    assert order.speed(row("learned 0.003", 2, 0, 2, 1, 1)) == 0.003
    assert order.speed(row("annealed 0.02 to adaptive", 2, 0, 2, 1, 1)) == 0.02
    assert math.isnan(order.speed(row("fixed at learned 0.003", 2, 0, 2, 1, 1)))
    assert math.isnan(order.speed(row("held 0.003", 2, 0, 2, 1, 1)))


def test_arms_come_by_kind_and_speed():
    wanted = [
        *("adaptive", "learned 3e-4", "learned 0.01", "learned 0.1", "adam 0.001"),
        *("annealed 0.1 to adaptive", "fixed at adaptive", "fixed at learned 0.01"),
        *("held 1e-3", "held 0.1"),
    ]
    assert order.in_order(wanted[::-1] * 2) == wanted
    looks = figures.looks(wanted)
    assert list(looks) == wanted
    colours = [tuple(np.atleast_1d(looks[arm]["color"])) for arm in wanted]
    assert len(set(colours[:6])) == 6
    assert colours[6:8] == [colours[0], colours[2]]
    assert len(set(colours)) == 8


@pytest.fixture
def closing():
    yield
    plt.close("all")


def test_the_headline_figure_shows_the_rows_means(closing):
    rows = some_rows(ranks=(2,))
    # What goes on at a count found has no speed, and no place here.
    counted = [
        row | {"arm": f"settled after {row['arm']}"} for row in rows_with(rows, arm="adaptive")
    ]
    dimensions, mmd, error = figures.draw_speed([*rows, *counted]).axes
    for axis, field in ((dimensions, None), (mmd, "mmd"), (error, "error_mean")):
        lines = [line for line in axis.lines if line.get_marker() in ("o", "*", "x")]
        seen = {line.get_marker(): line.get_xydata() for line in lines}
        for marker, arms in (
            ("o", ["learned 0.001", "learned 0.01"]), ("*", ["adaptive"]),
            ("x", ["fixed at adaptive"]),
        ):  # fmt: skip
            runs = [rows_with(rows, arm=arm) for arm in arms]
            means = [
                np.mean([run[field] if field else run["active_0.01"] - 2 for run in seeds])
                for seeds in runs
            ]
            np.testing.assert_allclose(seen[marker][:, 1], means)
        np.testing.assert_allclose(seen["o"][:, 0], [0.001, 0.01])
        np.testing.assert_allclose(seen["*"][:, 0], math.log(1e4) / 1000)
        assert seen["x"][0, 0] > 0.02
        assert "D" not in {line.get_marker() for line in axis.lines}
        low, high = axis.get_ylim()
        assert all(low < value < high for points in seen.values() for value in points[:, 1])


def test_no_seed_hides_another_in_the_dimensions_figure(closing):
    rows = some_rows()
    axes = figures.draw_dimensions(rows, opens=True).axes
    assert len(axes) == len(ARMS)
    for axis, arm in zip(axes, order.in_order(ARMS), strict=True):
        points = [
            tuple(point)
            for line in axis.lines
            if line.get_linestyle() == "None"
            for point in line.get_xydata()
        ]
        runs = rows_with(rows, arm=arm)
        assert len(set(points)) == len(runs)
        drawn = sorted((round(x), y) for x, y in points)
        assert drawn == sorted((run["rank"], run["active_0.01"]) for run in runs)
        assert axis.get_title().startswith("latents opened one by one") == (arm == "adaptive")
        diagonal = axis.lines[0].get_xydata()
        np.testing.assert_array_equal(diagonal[:, 0], diagonal[:, 1])
    first = figures.draw_dimensions(rows, opens=False).axes[0]
    assert first.get_title().startswith("all latents from the start\n(adaptive)")


def test_figure_1_is_of_the_median_r_with_errors_per_pixel(closing):
    rows = some_rows(ranks=(2, 4, 7))
    _, histories, _, images = experiment(rows)
    figure = figures.draw_homotopy(histories, images)
    assert figure.get_suptitle().startswith("r = 4;")
    gradient, gamma, _ = figure.axes
    assert len(gradient.lines) == len(ARMS) * 3
    np.testing.assert_array_equal(gradient.lines[0].get_xydata(), [[1, 1], [10, 11], [20, 21]])
    dotted = [line.get_ydata() for line in gamma.lines if line.get_linestyle() == ":"]
    np.testing.assert_allclose(dotted, np.full((len(ARMS) * 3, 3), 1.6 / 16))


@pytest.mark.parametrize(
    ("ranks", "seeds", "arms", "missing"),
    [
        ((2, 4), (0, 1), ARMS, ()),
        (
            *((0,), (0,), ("learned 0.01", "fixed at learned 0.01")),
            ("dimensions.png", "factors.png"),
        ),
        ((3,), (5,), ("adaptive",), ("speed.png",)),
        ((3,), (0, 1), ("held 1e-2", "held 1e-3"), ("speed.png",)),
        ((3,), (0, 1), ("learned 0.01", "held 1e-3"), ()),
    ],
)
def test_a_report_leaves_out_only_what_the_rows_do_not_have(
    tmp_path, capsys, ranks, seeds, arms, missing
):
    rows = [row(arm, rank, seed, 3, 1.0, 0.1) for rank in ranks for seed in seeds for arm in arms]
    config, histories, pictures, images = experiment(rows)
    page.write(config, tmp_path, rows, "", histories, pictures, images)
    text = (tmp_path / "table.md").read_text()
    names = ("speed", "dimensions", "factors", "traversals", "homotopy", "pictures")
    drawn = [f"{name}.png" for name in names]
    for figure in drawn:
        assert (tmp_path / figure).exists() == (figure not in missing)
        assert (f"({figure})" in text) == (figure not in missing)
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    assert "nan" not in text
    assert ("±" in text.split("## Learned against")[0].split("## By r")[1].split("\n\n")[1]) == (
        len(seeds) > 1
    )
    assert "a floor of 0.01" in text
    assert ("data of its own" in text) == (len(seeds) > 1)
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith(page.sentence(rows))


def test_where_images_may_not_be_shown_figures_hold_samples_alone(tmp_path, closing):
    rows = some_rows(ranks=(2,))
    config, histories, pictures, images = experiment(rows)
    config.eval.samples_only = True
    page.write(config, tmp_path, rows, "", histories, pictures, images)
    assert not (tmp_path / "traversals.png").exists()
    assert "traversals" not in (tmp_path / "table.md").read_text()
    figure = figures.draw_pictures(pictures, images, samples_only=True)
    labels = [text.get_text() for text in figure.axes[0].texts]
    assert labels == [f"samples,\n{order.shown(arm)}" for arm in order.in_order(ARMS)]
    shown = figure.axes[0].images[0].get_array()
    first = pictures[order.in_order(ARMS)[0], 2, 0]["samples"][0]
    np.testing.assert_allclose(np.ravel(shown), np.clip(first, 0, 1))


def test_active_latents_are_ordered_by_the_factor_that_they_hold():
    """One panel an r, of the first arm's lowest seed; no idle latent is in it."""
    rows = some_rows(ranks=(2, 4))
    for each in rows:
        if each["seed"]:
            each["factor_shares"] = [[0.0] * each["rank"]] * 20
    figure = figures.draw_factors(rows, ["a", "b", "c", "d"])
    panels = [axis for axis in figure.axes if axis.images and axis.get_title()]
    assert [axis.get_title() for axis in panels] == ["r = 2, seed 0", "r = 4, seed 0"]
    for axis, rank in zip(panels, (2, 4), strict=True):
        np.testing.assert_array_equal(axis.images[0].get_array(), 0.9 * np.eye(rank))
        assert [label.get_text() for label in axis.get_yticklabels()] == list("abcd"[:rank])
    plt.close(figure)


def test_idle_latents_change_nothing_and_open_ones_do():
    """Of four latents 1 and 3 are collapsed; open ones come first, by their KL."""
    model = mlp_vae(
        outputs=16, latents=4, width=8, encoder_layers=2, decoder_blocks=1, activation=jnp.tanh,
        residual=True, affine_skip=True,
    )  # fmt: skip
    x = np.random.default_rng(0).uniform(size=(6, 16)).astype(np.float32)
    params = init_params(model, jax.random.key(0), jnp.asarray(x.mean(0)))
    params = collapse(collapse(params, 1), 3)
    row = {"kl_per_dimension": [1.0, 0.0, 2.0, 0.0], "active_latents": [0, 2]}
    images = ImageSet("any", x, x, (4, 4, 1))
    got = draw_pictures(fields.defaults("test"), model, params, 0, images, row)
    assert got["latents"].tolist() == [2, 0, 1, 3]
    assert got["values"][[0, -1]].tolist() == [-2.0, 2.0]
    for line, latent in zip(got["traversals"], got["latents"], strict=True):
        assert line.shape == (len(got["values"]), 16)
        moved = np.abs(line - line[:1]).max()
        assert moved == 0 if latent in (1, 3) else moved > 1e-3


def test_traversals_are_of_the_first_arm_the_largest_r_and_the_least_seed(closing):
    rows = some_rows()
    _, _, pictures, images = experiment(rows)
    figure = figures.draw_traversals(rows, pictures, images)
    assert figure.get_suptitle().startswith("adaptive, r = 4, seed 0:")
    labels = [text.get_text() for text in figure.axes[0].texts]
    assert labels == ["z19, KL 1.9", "z0, idle", "−1", "0", "1"]
