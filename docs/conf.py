"""The site of these pages: python -m sphinx -W -c docs . build/site

The sources are the repository as it is: README.md, docs/ and the pages of results/ where they lie,
with links that work on GitHub as well. Only the order of the pages is told here.
"""

import contextlib
import inspect
import re
from pathlib import Path

from sphinx.domains.python import PyObject

from vaebal import __doc__ as summary

project = "vaebal"
author = "The vaebal authors"
html_title = "vaebal"
language = "en"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
include_patterns = ["README.md", "CHANGELOG.md", "docs/**.md", "results/**.md"]
root_doc = "README"
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["wide.css"]
html_show_copyright = False
html_copy_source = False
html_meta = {"description": summary.splitlines()[0]}

myst_enable_extensions = []
myst_heading_anchors = 4
default_role = "literal"  # docstrings are plain text with `names`
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False

# Under each page, those that follow it in the table of contents.
FIRST = (
    *("how_to_choose", "diagnose", "in_your_loop", "in_your_pytorch_loop"),
    *("faq", "claims", "results", "experiments"),
)
OTHERS = sorted({page.stem for page in Path(__file__).parent.glob("*.md")} - {*FIRST})
ORDER = {
    "README": (
        ("Use", [f"docs/{page}" for page in FIRST[:4]]),
        ("Results", [f"docs/{page}" for page in FIRST[4:6]]),
        ("Experiments", [f"docs/{page}" for page in (*FIRST[6:], *OTHERS)]),
        ("Reference", ("docs/api/vaebal", "docs/api/*", "CHANGELOG")),
    ),
    "docs/results": (
        (
            "",
            (
                "results/*/table",
                "results/*/verdicts",
                "results/diagnosis/torch",
                "results/bench/*",
                "results/earlier/README",
            ),
        ),
    ),
    "results/earlier/README": (("", ("results/earlier/**/table",)),),
}


def with_contents(app, name: str, source: list[str]) -> None:
    """Ends a page with its contents, which need not be seen on GitHub."""
    for caption, pages in ORDER.get(name, ()):
        lines = [f":caption: {caption}"] if caption else []
        lines += [":hidden:", ":glob:", "", *(f"/{page}" for page in pages)]
        source[0] += "\n\n```{toctree}\n" + "\n".join(lines) + "\n```\n"


def as_restructured(app, what, name, thing, options, lines: list[str]) -> None:
    """Docstrings are plain text: indented paragraphs are displays, |x| and x* mean themselves."""
    found, display, above, blank = [], None, 0, False
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if display is not None and line and indent < display:
            display = None
        if display is None and line and blank and indent > above:
            display = indent
            found += [" " * above + "::", ""]
        found.append(line if display is not None else escaped(line))
        if line and display is None:
            above = indent
        blank = not line
    lines[:] = found


def with_fields(app, what, name, thing, options, lines: list[str]) -> None:
    """Classes of which the fields are told in comments beside them get these as Attributes."""
    if what == "class" and "Attributes:" not in lines:
        with contextlib.suppress(OSError, TypeError):
            fields = re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(thing), re.M)
            told = [f"  {field}: {meaning}" for field, meaning in fields]
            lines += ["Attributes:", *told, ""] if told else []


def escaped(line: str) -> str:
    """A line of which * | and a trailing _ mean themselves, but in backquotes."""
    pieces = re.split(r"(`[^`]*`)", line)
    special = r"([*|]|(?<=\w)_\b|(?<=^[A-Z])\.|(?<=: [A-Z])\.)"  # "D." would begin a list
    pieces[::2] = [re.sub(special, r"\\\1", piece) for piece in pieces[::2]]
    return "".join(pieces)


def told_in_the_class(app, what, name, thing, skip, options) -> bool | None:
    """A NamedTuple's fields stand under its class's Attributes, not as aliases of numbers."""
    return True if str(thing.__doc__).startswith("Alias for field number") else None


def readable(app, what, name, thing, options, signature: str | None, returns: str | None):
    """A default that is a function is not its address, and then types are short as elsewhere."""
    if signature is None or not re.search("<(function|object)|~", signature):
        return None
    own = re.sub(r"(, )?(\*, )?parent: .*", ")", signature)  # without Flax's own two fields
    short = re.sub(r"~(\w+\.)+", "", re.sub(r"<[a-z]+ [^ ]*( at \w+)?>", "...", own))
    return short, returns


def front_page(app, problem) -> None:
    """Sphinx names a page after its source; a server looks for index.html."""
    if app.builder.format == "html" and problem is None:
        here = '<meta http-equiv="refresh" content="0; url=README.html">'
        (Path(app.outdir) / "index.html").write_text(f"<!doctype html>\n{here}\n")


def setup(app) -> None:
    for field in PyObject.doc_field_types:
        field.label = "Attributes" if field.name == "variable" else field.label
    app.connect("source-read", with_contents)
    app.connect("autodoc-process-docstring", with_fields, priority=300)
    app.connect("autodoc-process-docstring", as_restructured, priority=400)
    app.connect("autodoc-process-signature", readable)
    app.connect("autodoc-skip-member", told_in_the_class)
    app.connect("build-finished", front_page)
