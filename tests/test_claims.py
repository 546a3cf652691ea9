"""docs/claims.md is what the rows in results/ give; its verdicts follow the numbers."""

import datetime
import json
import math

import claims
import claims_measured as measured
import pytest
from claims import Claim
from claims_rows import NoRows, Source, read

ADAPTIVE = Claim("it ends with r", "gamma", measured.exact("adaptive"), "–", "network_gamma")


def wilson(hits: int, trials: int) -> str:
    """Its closed form."""
    z = 1.959963984540054
    centre = (hits + z**2 / 2) / (trials + z**2)
    half = z / (trials + z**2) * math.sqrt(hits * (trials - hits) / trials + z**2 / 4)
    return f"[{centre - half:.2f}, {centre + half:.2f}]"


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of one experiment: 39 adaptive runs that end with r = 2, and one that does not."""
    rows = [
        {"arm": "adaptive", "rank": 2, "seed": seed, "active_0.01": 2.0 + (seed == 7), "data": "x"}
        for seed in range(40)
    ]
    folder = tmp_path / "gamma"
    folder.mkdir()
    (folder / "table.md").write_text('# t\n\n```json\n{"a": {"b": 3}}\n```\n')
    (folder / "rows.json").write_text(json.dumps(rows))
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    monkeypatch.setattr(claims, "SECTIONS", (("One", [ADAPTIVE]),))
    return folder


def test_the_committed_page_is_what_the_rows_give():
    page = claims.PAGE.read_text()
    assert page == claims.written(page), "results/ have changed: run python docs/claims.py"


def test_every_experiment_is_named_in_the_table():
    page = claims.PAGE.read_text()
    folders = {path.name for path in claims.RESULTS.iterdir() if path.is_dir()}
    assert {name for name in folders if f"results/{name}/" not in page} == set()


def test_a_row_says_count_interval_seeds_and_verdict(results):
    cells = claims.line(ADAPTIVE, {"gamma": "2020-01-02"})
    assert cells[1] == f"39 of 40 {wilson(39, 40)} runs"
    assert cells[3:5] == ["holds", "x; r = 2; seeds 0 to 39"]
    assert cells[5] == "`network_gamma`, [page](../results/gamma/table.md), 2020-01-02"


@pytest.mark.parametrize(("wrong", "verdict"), [(2, "holds"), (3, "falls short")])
def test_the_verdict_follows_the_rows(results, wrong, verdict):
    rows = json.loads((results / "rows.json").read_text())
    for row in rows:
        row["active_0.01"] = 2.0 + (row["seed"] < wrong)
    (results / "rows.json").write_text(json.dumps(rows))
    assert claims.line(ADAPTIVE, {"gamma": ""})[3] == verdict


def test_what_has_no_rows_is_not_run(results):
    other = ADAPTIVE._replace(measure=measured.exact("learned 1e-1"))
    cells = claims.line(other, {"gamma": ""})
    assert cells[1::2][:2] == ["no rows with arm = learned 1e-1", "not run"]
    absent = ADAPTIVE._replace(source="not_there")
    assert claims.line(absent, {})[1:4] == ["–", "–", "not run"]


def test_a_date_moves_when_the_rows_do(results):
    mark = claims.digest("gamma")
    page = f"| `gamma` | `{mark} 2020-01-02` |\n"
    assert claims.dated(["gamma"], page) == {"gamma": (mark, "2020-01-02")}
    assert claims.written(page) == claims.written(claims.written(page))
    (results / "rows.json").write_text((results / "rows.json").read_text() + "\n")
    assert claims.dated(["gamma"], page)["gamma"][1] == datetime.date.today().isoformat()


def source_of(rows, **more) -> Source:
    return Source("x", [more | row for row in rows], {}, "", "x/table.md")


def test_a_front_is_judged_at_the_papers_counts():
    """The paper's points: 4.98 at 10 latents, 3.42 at 15, 2.74 at 20, 2.57 and 2.78 at 22."""
    few = {"arm": "settled after adaptive", "active_0.01": 10.0, "error_mean": 4.0}
    many = {"arm": "plain 5e-3 of 20", "active_0.01": 20.0, "error_mean": 2.5}
    assert measured.front(source_of([few, many])) == (
        "10.0 latents 4.00; 20.0 latents 2.50",
        "in part",  # 4.00 at 15 is too much
        [many["arm"], few["arm"]],
    )
    assert measured.front(source_of([few | {"error_mean": 2.0}])).verdict == "reproduced"
    with pytest.raises(NoRows):
        measured.front(source_of([many | {"active_0.01": 30.0}]))


@pytest.mark.parametrize(
    ("kind", "moved", "kept", "verdict"),
    [("sigmoid", 3, 3, "holds"), ("sigmoid", 2, 3, "holds"), ("sigmoid", 4, 3, "in part"),
     ("sigmoid", 3, 2, "falls short"), ("sphere", 3, 2, "holds"), ("sphere", 3, 4, "falls short")],
)  # fmt: skip
def test_a_superset_is_more_latents_than_r_by_either_criterion(kind, moved, kept, verdict):
    """Their nets under the homotopy are told beside ours under it."""
    theirs = {"arm": "theirs", "active": 3, "informative": 5}
    same_net = {"arm": "theirs, adaptive", "active": 3, "informative": moved}
    ours = {"arm": "ours, adaptive", "active": 3, "informative": kept}
    found = measured.superset(source_of([theirs, same_net, ours], rank=3, kind=kind))
    assert found.text.startswith("more than r in 1 of 1 ")
    assert f"{int(moved > 3)} of 1 {wilson(moved > 3, 1)} of their nets under" in found.text
    assert found.verdict == verdict


@pytest.mark.parametrize(
    ("mmds", "errors", "patience", "verdict"),
    [
        ((0.1, 0.3), (1.0, 0.99), 0, "reproduced"),  # as the paper's own numbers
        ((0.1, 0.3), (1.0, 0.5), 0, "in part"),
        ((0.3, 0.1), (1.0, 1.0), 750, "not so here"),
        ((0.1, 0.3), (1.0, 1.2), 750, "in part"),
    ],
)
def test_table_2_is_a_higher_mmd_at_about_the_same_error(mmds, errors, patience, verdict):
    arms = ("adaptive", "fixed at adaptive")
    rows = [
        {"arm": a, "mmd": m, "error_mean": e} for a, m, e in zip(arms, mmds, errors, strict=True)
    ]
    source = source_of(rows, rank=2, seed=0)._replace(config={"train": {"patience": patience}})
    found = measured.fixed_against_learned(source)
    assert found.verdict == verdict
    assert ("all κ latents open" in found.text) == (patience > 0)


@pytest.mark.parametrize(
    ("counts", "verdict"), [((2, 2), "holds"), ((2, 1), "in part"), ((3, 1), "falls short")]
)
def test_a_slow_descent_is_judged_by_both_criteria(counts, verdict):
    row = {"arm": "learned 2e-3", "mmd": 0.5}
    row |= dict(zip(("active_0.01", "informative"), counts, strict=True))
    found = measured.by_both_criteria("learned 2e-3")(source_of([row], rank=2))
    assert found.verdict == verdict
    assert "|" not in found.text  # which would end a cell


@pytest.mark.parametrize("times", ["5.28", "12.3", "123", "1,234"])
def test_a_sweeps_speed_is_read_whatever_its_digits(times):
    eager = f"{times} times as fast as in PyTorch eager; 4.17 times as fast as in torch.compile; "
    text = f"separate runs: {eager}2.35 times as fast as in torch.compile, a run a core.\n\n"
    source = source_of([])._replace(text=f"| CPU     | Any, 2 cores |\n{text}")
    found = measured.sweep_speed(source)
    assert found.text.startswith(f"{times.replace(',', '')} times as fast as PyTorch eager, 4.17 ")


def test_a_priors_speed_is_the_share_of_the_steps_to_the_crowded_ones_best():
    balanced = [{"steps": steps, "fd": fd} for steps, fd in ((10, 9.0), (30, 5.0), (100, 2.0))]
    crowded = [{"steps": steps, "fd": fd} for steps, fd in ((10, 20.0), (30, 8.0), (100, 5.0))]
    rows = [row | {"arm": "adaptive"} for row in balanced]
    rows += [row | {"arm": "kl 1e-6"} for row in crowded]
    speed = measured.prior_speed("flow 64")
    # Rows tell their second stage, or, where there was one kind, its width; others do not count.
    for stage, other in (
        ({"stage": "flow 64"}, {"stage": "vae 64"}),
        ({"width": 64}, {"width": 8}),
    ):
        own = [row | stage for row in rows]
        found = speed(source_of([*own, own[0] | other | {"fd": 0.0}], seed=0))
        assert found.text.endswith("in 1 of 1 seeds, after 0.30 of its steps")
        assert found.verdict == "holds"
        own[1]["fd"] = 6.0
        assert speed(source_of(own, seed=0)).verdict == "falls short"


def pipelines(means):
    """Rows of two pipelines: by method a Fréchet distance, and .5 to either side of it."""
    return source_of(
        [
            {"method": method, "seed": seed, "gen_fd": mean + seed - 0.5}
            for method, mean in means.items()
            for seed in (0, 1)
        ],
        latents=8,
        error=1.0,
    )


def test_a_second_stage_is_not_needed_where_samples_come_as_near_without():
    """The nearest of either kind: not told apart, or nearer still; and ahead of WAE-MMD."""

    def verdict(codes, images=30.0, rival=15.0):
        means = {"VAE": 20.0, "VAE (codes)": codes, "VAE (balanced images)": images}
        means |= {"VAE+": 9.0, "VAE+ (codes)": 6.0, "WAE-MMD": rival}
        return measured.without_second_stage(pipelines(means)).verdict

    assert [verdict(codes) for codes in (3.0, 6.5, 9.0)] == ["holds", "holds", "falls short"]
    assert verdict(9.0, images=6.5) == "holds"
    assert verdict(6.5, rival=7.0) == "falls short"


def test_opening_latents_is_judged_against_a_plain_vae_of_the_same_space():
    balanced = {"VAE (balanced codes)": 5.0}
    on_codes = measured.opened_against_plain("codes")
    found = on_codes(pipelines({"VAE": 3.0, "VAE (codes)": 9.0} | balanced))
    assert found.verdict == "holds"
    assert found.text.startswith("opened one by one: 5.00 ± 0.71 with 8.0 ± 0.0 latents")
    # Where codes are the first space listed, their VAE has no brackets.
    assert on_codes(pipelines({"VAE": 5.5} | balanced)).verdict == "falls short"
    second = measured.opened_against_plain("images", "VAE+")
    means = {"VAE+": 9.0, "VAE+ (balanced images)": 5.0, "VAE (balanced images)": 60.0}
    assert second(pipelines(means)).verdict == "holds"


def test_latents_are_counted_against_the_factors_that_data_were_drawn_with():
    source = pipelines({"VAE (balanced codes)": 5.0, "VAE": 9.0})
    found = measured.counts_factors("VAE (balanced codes)")
    of_eight, of_seven = (source._replace(config={"data": {"rank": rank}}) for rank in (8, 7))
    assert found(of_eight).verdict == "holds"
    assert found(of_seven).verdict == "falls short"
    assert found(of_eight).text.startswith("8, 8 of 8; error 1.00 ± 0.00, with all latents 1.00")


def test_samples_reach_their_reconstructions_at_one_and_a_half_times_their_distance():
    """Of the method that is asked for."""

    def found(floor):
        source = pipelines({"Flow matching": 3.0, "Flow matching (codes)": 1.0, "VAE+": 1.0})
        for row in source.rows:
            row["rec_fd"] = floor
        return measured.reaches_reconstructions("Flow matching")(source)

    assert found(2.0).verdict == "holds"
    assert found(1.9).verdict == "falls short"
    assert found(2.0).text.endswith(
        "3.00 ± 0.71, of reconstructions 2.00 ± 0.00: 1.50 ± 0.35 times"
    )


@pytest.mark.parametrize(
    ("errors", "reached", "less_by_heart"),
    [  # test and training error: of the homotopy, gone on with, of a plain VAE
        (((9, 8), (6, 5), (7, 5)), "holds", "holds"),
        (((9, 8), (7.5, 6), (7, 5)), "falls short", "holds"),  # the plain one is ahead
        (((5, 4.5), (6, 2), (7, 1)), "falls short", "holds"),  # going on learns by heart
        (((9, 8), (6, 4), (7, 5)), "holds", "falls short"),
    ],
)
def test_going_on_is_judged_by_the_test_error_and_by_its_ratio(errors, reached, less_by_heart):
    arms = ("adaptive", "settled after adaptive", "plain 5e-3 after adaptive")
    rows = [
        {"arm": arm, "active_0.01": 8.0, "error_mean": float(test), "error_train": float(train)}
        for arm, (test, train) in zip(arms, errors, strict=True)
    ]
    source = source_of(rows, seed=0)
    assert measured.settled_against_plain(source).verdict == reached
    assert measured.generalises(source).verdict == less_by_heart


def test_the_steps_told_are_an_arms_own():
    """A plain VAE's are as many as those of two arms, which a settled one has behind it."""
    arms = {"adaptive": 100, "settled after adaptive": 100, "plain 5e-3 after adaptive": 200}
    rows = [{"arm": arm, "steps": steps} for arm, steps in arms.items()]
    assert source_of(rows).data() == "100 steps"
    assert source_of(rows).data(["settled after adaptive"]) == "200 steps"
    assert source_of(rows).data([*arms]) == "100 and 200 steps"


def test_rows_of_a_csv_are_numbers_and_truths(tmp_path):
    (tmp_path / "a.csv").write_text("n,x,so,name\n3,inf,True,2a\n")
    assert read(tmp_path / "a.csv") == [{"n": 3, "x": math.inf, "so": True, "name": "2a"}]


def test_a_source_knows_its_config(results):
    assert Source.of(results.parent, "gamma").config == {"a": {"b": 3}}


def test_table_1s_columns_do_not_fit():
    """At a stationary γ the Gaussian's log density averages −(d/2)(log 2πγ + 1)."""
    found = measured.table_1_columns(4.98, -315, 784)(None)
    assert found[:2] == ("−871 nats, by arithmetic", "shown")
    assert measured.table_1_columns(4.98, -871, 784)(None).verdict == "not shown"
