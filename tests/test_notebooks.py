"""Every notebook runs, and the numbers it prints are the mathematics it tells of."""

import re
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest

from configs import theorem1 as theorem1_config
from vaebal.experiments.theorem1 import run as theorem1
from vaebal.experiments.theorem3.linear import meant
from vaebal.streams import stream
from vaebal.theory import affine, regularized_ae
from vaebal.theory.landscape import affine_stationary_points
from vaebal.theory.penalties import named

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def said(notebook) -> str:
    """All text that a notebook's cells have put out: prints and tables."""
    texts = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            texts.append(output.get("text", ""))
            texts.append(output.get("data", {}).get("text/markdown", ""))
    return "\n".join(texts)


def numbers(text: str, pattern: str) -> list[float]:
    """The numbers where `pattern` has "#", of its one match."""
    wanted = re.escape(pattern).replace(r"\#", r"([-−+]?[\d.]+(?:e[-−+]?\d+)?)")
    (found,) = re.finditer(wanted.replace(r"\ ", r"\s+"), text)
    return [float(value.replace("−", "-")) for value in found.groups()]


def table_rows(text: str) -> list[list[str]]:
    """The cells of every line of every Markdown table, headers and rules among them."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Executes a notebook, once, in a directory of its own; its text."""
    texts = {}

    def execute(name: str) -> str:
        if name not in texts:
            notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", nbformat.NO_CONVERT)
            where = tmp_path_factory.mktemp(name)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("PYTHONPATH", str(ROOT))
                patch.setenv("IPYTHONDIR", str(where / "ipython"))
                patch.delenv("MPLBACKEND", raising=False)  # the kernel's own: figures inline
                patch.setenv("JUPYTER_PLATFORM_DIRS", "1")
                nbclient.NotebookClient(
                    notebook,
                    timeout=600,
                    coalesce_streams=True,
                    resources={"metadata": {"path": str(where)}},
                ).execute()
            assert not any(
                output.get("name") == "stderr"
                for cell in notebook.cells
                for output in cell.get("outputs", [])
            )
            texts[name] = said(notebook)
        return texts[name]

    return execute


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == [
        "affine_landscape", "where_deep_vaes_collapse", "why_h_needs_an_infinite_slope",
    ]  # fmt: skip


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stored_clean(path):
    """Every code cell run in order, figures among the outputs, no error, warning or path."""
    notebook = nbformat.read(path, nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {
        "stream", "display_data", "execute_result",
    }  # fmt: skip
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4
    assert not re.search(r"/(home|root|tmp|work|usr)/|0x[0-9a-f]{6}", said(notebook))
    assert notebook.metadata.kernelspec.name == "python3"
    assert path.stat().st_size < 500_000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["affine_landscape", "why_h_needs_an_infinite_slope"])
def test_stored_outputs_are_those_of_the_present_code(executed, name):
    """Word for word, and number for number; the third notebook trains, which rounding changes."""
    stored = said(nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", nbformat.NO_CONVERT))
    number = r"[-−+]?\b\d[\d.,]*(?:e[-−+]?\d+)?"
    texts = [re.sub(r"(?:[\s|]|-{2,}:?)+", " ", text) for text in (stored, executed(name))]
    assert re.sub(number, "#", texts[0]) == re.sub(number, "#", texts[1])
    values = [
        [float(n.replace("−", "-").replace(",", "").rstrip(".")) for n in re.findall(number, text)]
        for text in texts
    ]
    np.testing.assert_allclose(values[0], values[1], rtol=0.05, atol=1e-6)


@pytest.mark.slow
def test_affine_landscape(executed):
    text = executed("affine_landscape")
    config = theorem1_config.get_config()
    mean, cov = theorem1.covariance(config)
    least = float(affine.affine_global_minimum(cov, config.model.kappa, config.model.gamma))
    for line in ("L at the minimiser #", "L* in closed form #", "pPCA #"):
        assert numbers(text, line) == [pytest.approx(least, rel=1e-11)]
    for place in ("random decoder", "global minimum"):
        exact, mean_draw, error = numbers(text, f"{place}: closed form #, Monte Carlo # ± #")
        assert abs(exact - mean_draw) < 4 * error
    points = list(affine_stationary_points(mean, cov, 3, 0.2))
    listed, agree = numbers(text, "stationary points #, index as predicted #")
    assert listed == agree == len(points)
    assert numbers(text, "minima among them #") == [1]
    assert numbers(text, "copies of the minimum #") == [2**3 * 6]
    aligned = sum(point.copies for point in points if point.axis_aligned)
    assert numbers(text, "axis-aligned points, copies included #") == [aligned]
    runs, ended = numbers(text, "# descents, # end within 1e-8 of the minimum")
    assert runs == ended == 40
    ridge = 2 * np.log(3) - np.log(8)  # eigenvalues 4 and 2
    assert numbers(text, "top of the rotation #, theory #") == pytest.approx([ridge] * 2, abs=1e-8)
    top, theory = numbers(text, "top of the lowest #, theory #")
    height, index = numbers(text, "the list's saddle #, of index #")
    saddles = [point.energy - least for point in points if not point.axis_aligned]
    assert top == pytest.approx(theory, abs=1e-8)
    assert height == pytest.approx(theory, abs=1e-8)
    assert height == pytest.approx(min(saddles), abs=1e-8)
    assert index == 1
    columns, error, slope = numbers(text, "γ = 1e-06: # columns, error #, dL/dlogγ #")
    assert (columns, slope) == (3, pytest.approx(5 - 3, abs=1e-3))
    assert error == pytest.approx(3e-6)


@pytest.mark.slow
def test_where_deep_vaes_collapse(executed):
    text = executed("where_deep_vaes_collapse")
    gradients = {name: [float(cell) for cell in cells]
                 for name, *cells in table_rows(text)
                 if name.startswith(("as trained", "collapsed"))}  # fmt: skip
    assert min(gradients["as trained"]) > 1e-3
    assert max(gradients["collapsed"]) < 1e-12
    assert min(gradients["collapsed, biases live"]) > 1e-6
    one_draw = gradients["collapsed, one draw"]  # W_x, decoder; then the two heads
    assert min(one_draw[:2]) > 1e-2
    assert max(one_draw[2:]) < 1e-12
    assert re.search(r"^strict saddle", text, re.M)
    assert "as trained: not stationary" in text
    predicted, measured = numbers(text, "least eigenvalue predicted #, measured #")
    assert measured == pytest.approx(predicted, rel=1e-5)
    assert predicted < -1
    (ratio,) = numbers(text, "along the best direction # γ")
    assert ratio > 1
    low, high = numbers(text, "total collapse: from # to #")
    assert low == pytest.approx(predicted, rel=1e-4)
    trained_low, trained_high = numbers(text, "as trained: from # to #")
    assert trained_low < 0
    assert trained_high > 3 * high
    with_skip, with_skip_small = numbers(text, "residual + affine skips: # as trained, # at 1/100")
    bare, bare_small = numbers(text, "without the affine skip: # as trained, # at 1/100")
    assert with_skip == pytest.approx(predicted, abs=1e-3)
    assert with_skip_small < 0.5 * with_skip
    assert with_skip < bare < 0
    assert bare_small > 0.02 * bare


@pytest.mark.slow
def test_why_h_needs_an_infinite_slope(executed):
    text = executed("why_h_needs_an_infinite_slope")
    for formula in ("sqrt(u)", "u^0.25"):
        assert numbers(text, f"{formula}: best t #, error left #") == [0, 0]
    for formula in ("u", "log(1+u)", "u^0.75", "log(u+1e-3)"):
        (match,) = re.findall(rf"^{re.escape(formula)}: best t (\S+), error left (\S+)", text, re.M)
        assert float(match[0]) > 0
        assert float(match[1]) > 0
    # A bounded slope has counter-examples, an infinite one may have.
    undercut = {
        cells[0]: cells[3] != "none pays"
        for cells in table_rows(text)
        if len(cells) == 8 and cells[1] != "h′(0)" and "-" not in cells[1]
    }
    assert len(undercut) == 8
    for formula, found in undercut.items():
        assert found == (meant(named(formula)).bounded or formula == "u^0.75")
    led = {cells[0]: cells[1:] for cells in table_rows(text) if len(cells) == 7}
    assert [float(led[formula][0]) for formula in ("u", "sqrt(u)", "log(u+1e-6)")] == [6, 6, 3]
    assert led["log(u+1e-6)"][2] == "4 of 4"
    assert numbers(text, "zero error up to p = #, exactly r = 3 rows up to p = #") == [0.5, 0.45]
    x = regularized_ae.low_rank_data(stream(0, "notebook"), 60, 10, 3)
    mean_square = float(np.square(np.asarray(x)).mean())
    error, predicted = numbers(text, "at ε = 1e-05: error #, predicted #")
    assert error == pytest.approx(predicted, rel=1e-2)
    assert predicted == pytest.approx(0.3**2 * 1e-10 / mean_square, rel=1e-3)
