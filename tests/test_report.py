import csv
import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
from ml_collections import ConfigDict

from vaebal.experiments import report
from vaebal.experiments.kappa_sweep import page as kappa_report


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (4.9849, 2, "4.98"),
        (-315.0, 0, "−315"),
        (-0.0001, 1, "−1.0e−04"),
        (0.0, 2, "0.00"),
        (-0.0, 2, "0.00"),
        (0.996, 2, "1.00"),
    ],
)
def test_numbers_read_as_printed_ones(value, digits, text):
    assert report.number(value, digits) == text


def test_the_spread_is_the_standard_deviation_over_seeds():
    values = [4.0, 5.0, 9.0]
    assert report.with_spread(values, 2) == f"6.00 ± {np.std(values, ddof=1):.2f}"
    assert report.with_spread([4.0], 2) == "4.00"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([45.6], "45.6"),
        ([1.43e-6], "1.43e−6"),
        ([1.4e-6, 1.6e-6], "(1.50 ± 0.14)e−6"),
        ([-0.0002, 0.0002], "(0.00 ± 2.83)e−4"),
        ([0.0], "0"),
        ([1000.0, 1002.0], "1001 ± 1"),
        ([0.0009999999], "1.00e−3"),
    ],
)
def test_three_figures_at_any_scale(values, text):
    assert report.scaled(values) == text


def test_a_markdown_table_reads_as_text_too():
    text = report.markdown_table(["name", "n"], [["a", "1"], ["long", "20"]])
    assert text.splitlines() == [
        "| name |  n |",
        "| ---- | -: |",
        "| a    |  1 |",
        "| long | 20 |",
    ]


def test_rows_survive_json_and_csv(tmp_path):
    rows = [{"a": 1, "b": 0.1, "kl": [1.0, 2.0]}, {"a": 2, "b": -3e-9, "kl": [3.0]}]
    report.write_rows(rows, tmp_path, "rows")
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    with (tmp_path / "rows.csv").open() as file:
        read = [{"a": int(row["a"]), "b": float(row["b"])} for row in csv.DictReader(file)]
    assert read == [{k: row[k] for k in ("a", "b")} for row in rows]


def test_the_tighter_bound_is_told_over_the_runs_that_have_it():
    names = ("laplace_gain", "laplace_gain_se", "laplace_effective_sample_size")
    rows = [
        dict(zip(names, numbers, strict=True)) for numbers in ((3.0, 0.2, 8.0), (7.0, 0.5, 20.0))
    ]
    told = report.laplace([*rows, {"nll": 1.0}])
    assert "by 3 to 7 nats" in told
    assert "over images .5)" in told.replace("0.5", ".5")
    assert told.endswith("effective sample size of 8 to 20.")
    assert report.laplace([{"nll": 1.0}]) == ""


def _row(skips, kappa, seed, data, **values):
    names = ("error_mean", "error_sampled", "nll", "gamma", "gamma_residual", "kl")
    row = dict.fromkeys(names, 1.0) | {"nll_se": 0.5, "error_mean_se": 0.1}
    counts = dict.fromkeys(("active_0.001", "active_0.01", "active_0.1", "informative"), 3)
    return row | counts | {"skips": skips, "kappa": kappa, "seed": seed, "data": data} | values


def test_the_papers_column_stands_beside_ours_on_mnist_only():
    rows = [_row("residual", kappa, 0, "mnist", error_mean=2.5) for kappa in (50, 60)]
    header, body = kappa_report.table(rows)
    assert header.count("paper") == 3
    columns = [i for i, name in enumerate(header) if name == "paper"]
    assert [body[0][i] for i in columns] == ["4.98", "−315", "10"]
    assert [body[1][i] for i in columns] == ["–", "–", "–"]
    assert body[0][header.index("Rec. Err.")] == "2.50"
    header, body = kappa_report.table([_row("residual", 50, 0, "digits")])
    assert "paper" not in header
    assert len(body[0]) == len(header)


def test_the_paper_is_not_credited_with_results_for_a_net_it_does_not_report():
    header, body = kappa_report.table([_row("none", 50, 0, "mnist")])
    assert body[0][header.index("paper")] == "–"


def test_the_papers_table_is_transcribed_right():
    """Rec. Err., NLL and active dimensions of Table 1; the sums guard against a slip."""
    values = np.array(list(kappa_report.PAPER.values()))
    np.testing.assert_allclose(values.sum(0), [16.49, -3162, 89])
    assert list(kappa_report.PAPER) == [50, 100, 200, 400, 784]


def test_the_sentence_is_made_of_the_rows():
    rows = [
        _row(
            "residual+affine", kappa, seed, "digits", informative=kappa // 2 + seed, error_mean=0.5
        )
        for kappa in (4, 8)
        for seed in (0, 2)
    ]
    assert kappa_report.sentence(rows) == (
        "At κ = 8, with residual + affine skips 5 of 8 latents stay informative (σ² < ½) at error "
        "0.50."
    )


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.25, 2, "0.25"),
        (1e-6, 2, "1e−6"),
        (-3.14e4, 2, "−3.1e4"),
        (6.3e-17, 1, "6e−17"),
        (1.04e-5, 2, "1e−5"),
        (0.0, 2, "0"),
        (1.0, 2, "1"),
    ],
)
def test_short_numbers_keep_their_figures(value, digits, text):
    assert report.short(value, digits) == text
    shown = float(report.short(value, digits).replace("−", "-"))
    assert shown == pytest.approx(value, rel=0.5 * 10.0 ** (1 - digits))
    assert report.short(2.0, sign="+") == "+2"


def _page(tmp_path, **changes):
    config = ConfigDict({"name": "trial", "train": {"steps": 7}})
    figure = report.Figure("curve", "a curve", lambda: plt.figure(figsize=(1, 1)))
    table = ["arm", "n"], [["a", "1"], ["b", "2"]]
    sections = [
        report.Section("", table, ["Under the table.", ""], [figure]),
        report.Section("More", table, ["Not said."], shown=False),
        report.Section("Last", None, ["Said aloud."], said=True),
    ]
    options = {
        "title": "a title",
        "seen": "Seen.",
        "sections": sections,
        "rows": {"rows": [{"a": 1}]},
    }
    report.write_page(config, tmp_path, **options | changes)
    return (tmp_path / "table.md").read_text()


def test_a_page_has_everything_once_and_in_order(tmp_path, capsys):
    text = _page(tmp_path)
    wanted = [
        "# trial: a title", "Seen.", "| arm |", "Under the table.", "![a curve](curve.png)",
        "## More", "| arm |", "Not said.", "## Last", "Said aloud.", "Versions: python ",
        '"steps": 7',
    ]  # fmt: skip
    places = [text.index(part) for part in wanted if wanted.count(part) == 1]
    assert places == sorted(places)
    assert text.count("| arm |") == 2
    assert "jax " in text
    assert "\n\n\n" not in text
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "rows.json").read_text()) == [{"a": 1}]
    said = capsys.readouterr().out
    assert said.count("arm") == 1
    assert "Said aloud." in said
    assert "Not said." not in said
    assert f"figures {tmp_path / 'curve.png'}" in said
    assert said.rstrip().endswith("Seen.")


def test_the_page_comes_last(tmp_path):
    """A figure that fails leaves no page that names it."""
    broken = report.Figure("broken", "nothing", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _page(tmp_path, sections=[report.Section("", None, [], [broken])])
    assert not (tmp_path / "table.md").exists()


def test_protocols_are_filled_from_the_config_and_must_fit_it(monkeypatch, tmp_path):
    template = (
        "## one\n\nAt {train.rate:short} over\n{train.kappas:g}.\n\n"
        "Then {computed}.\n\n## two\n\n{n}\n"
    )
    (tmp_path / "protocol.md").write_text(template)
    monkeypatch.setattr(report.importlib.resources, "files", lambda _: tmp_path)
    config = ConfigDict({"train": {"rate": 1e-6, "kappas": (4.0, 0.5)}, "n": 3})
    assert report.protocol("any", config, computed="so") == {
        "one": "At 1e−6 over 4, 0.5.\n\nThen so.",
        "two": "3",
    }
    with pytest.raises(KeyError, match="computed"):
        report.protocol("any", config)
    with pytest.raises(AttributeError, match="kappas"):
        report.protocol("any", ConfigDict({"train": {"rate": 1.0}, "n": 3}), computed="so")


def test_a_page_tells_where_its_rows_were_trained_not_where_it_is_written():
    """Rows of old pages do not say, and are taken for this machine's."""
    old = {"train_seconds": 2.0}
    rows = [old | {"device": name} for name in ("1 × TPU", "1 × GPU", "1 × TPU")]
    assert report.training_took(rows) == "Training took 6 s in all on 1 × TPU and 1 × GPU."
    assert report.training_took([old]) == f"Training took 2 s in all on {report.device()}."
