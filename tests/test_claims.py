"""docs/claims.md is what the rows in results/ give; its verdicts follow the numbers."""

import datetime
import json
import math

import claims
import claims_measured as measured
import pytest
from claims import Claim, Source

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


def test_rows_of_a_csv_are_numbers_and_truths(tmp_path):
    (tmp_path / "a.csv").write_text("n,x,so,name\n3,inf,True,2a\n")
    assert measured.read(tmp_path / "a.csv") == [{"n": 3, "x": math.inf, "so": True, "name": "2a"}]


def test_a_source_knows_its_config(results):
    assert Source.of(results.parent, "gamma").config == {"a": {"b": 3}}


def test_table_1s_columns_do_not_fit():
    """At a stationary γ the Gaussian's log density averages −(d/2)(log 2πγ + 1)."""
    found = measured.table_1_columns(4.98, -315, 784)(None)
    assert found == ("−871 nats, by arithmetic", "shown")
    assert measured.table_1_columns(4.98, -871, 784)(None).verdict == "not shown"
