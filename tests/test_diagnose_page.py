"""docs/diagnose.md: its examples run, and print what the page says."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "diagnose.md"
EXAMPLES = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def names():
    """What one example leaves to the next."""
    return {}


def test_every_example_has_its_output():
    assert len(EXAMPLES) == PAGE.read_text().count("```python") == 5


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_print_what_the_page_says(number, names, capsys):
    code, printed = EXAMPLES[number]
    if "import torch" in code:
        pytest.importorskip("torch")
    if number == 1 and not names:  # goes on from the first one, which was not asked for
        exec(EXAMPLES[0][0], names)
        capsys.readouterr()
    exec(compile(code, f"{PAGE}, example {number}", "exec"), names)
    assert capsys.readouterr().out == printed
