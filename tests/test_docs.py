"""The pages' programs run as they stand, and end with what the pages say."""

import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
# Pages of which the Python blocks, one after the other, are a program that checks its own end.
PROGRAMS = ("in_your_loop.md", "in_your_pytorch_loop.md")
RUN_ELSEWHERE = ("diagnose.md",)  # by test_diagnose_page


def program_of(page: str) -> str:
    """The page's Python blocks, each at its line of the page, so that an error is found there."""
    kept, inside = [], False
    for line in (ROOT / "docs" / page).read_text().splitlines():
        inside = inside and line != "```"
        kept.append(line if inside else "")
        inside = inside or line == "```python"
    return "\n".join(kept) + "\n"


PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_points_at_is_there(page):
    """Links to files, and to headings of pages; paths of the project in backquotes."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    headings = {page: _anchors(page)}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if heading:
            assert heading in headings.setdefault(file, _anchors(file)), target
    rooms = "configs|vaebal|tests|results|docs|notebooks"
    for path in re.findall(rf"`((?:{rooms})/[\w/.-]*)(?::\w+)?`", text):
        assert (ROOT / path).exists(), path


def _anchors(page: Path) -> set[str]:
    """Of a page's headings, as they are made on GitHub."""
    told = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in told}


def test_the_constraints_pin_what_is_installed_at_versions_that_are_allowed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    asked = "\n".join([setup["options"]["install_requires"], extras["test"], extras["docs"]])
    asked = {Requirement(line).name: Requirement(line) for line in asked.split("\n") if line}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert {pin.name for pin in pinned} == {*asked, "jaxlib"}
    for python in ("3.11", "3.12", "3.13"):
        here = [
            pin
            for pin in pinned
            if not pin.marker or pin.marker.evaluate({"python_version": python})
        ]
        assert sorted(pin.name for pin in here) == sorted({*asked, "jaxlib"})
    for pin in pinned:
        (version,) = pin.specifier
        assert pin.name == "jaxlib" or version.version in asked[pin.name].specifier


def test_every_page_with_a_program_is_run():
    told = {page.name for page in (ROOT / "docs").glob("*.md") if "```python" in page.read_text()}
    assert told == {*PROGRAMS, *RUN_ELSEWHERE}


@pytest.mark.parametrize("page", PROGRAMS)
def test_a_program_says_itself_what_it_ends_with(page):
    """Else running it would show no more than that it runs; the last block holds the claim."""
    blocks = re.split(r"\n\s*\n\n+", program_of(page).strip())
    compile(program_of(page), page, "exec")
    assert re.search(r"^assert ", blocks[-1], re.M)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.torch if "torch" in page else pytest.mark.slow)
        for page in PROGRAMS
    ],
)
def test_a_program_runs_to_what_it_says_it_ends_with(page, tmp_path):
    """In a process of its own, with JAX's own settings and no warning."""
    if "torch" in page:
        pytest.importorskip("torch")
    file = tmp_path / f"{page}.py"
    file.write_text(program_of(page))
    # -O would leave the asserts out; so would a block that was not extracted.
    written = (ROOT / "docs" / page).read_text()
    assert file.read_text().count("\nassert ") == written.count("\nassert ") > 0
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own = {
        "PYTHONPATH": path,
        "PYTHONOPTIMIZE": "",
        "XLA_FLAGS": "",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", str(file)], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | own, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout
