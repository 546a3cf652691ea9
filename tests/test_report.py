import csv
import json

import numpy as np
import pytest

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
