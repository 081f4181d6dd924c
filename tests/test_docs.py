"""The reference has every public name, and the examples in docstrings give what they say."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest

import incckpt

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
MODULES = sorted(module.name for module in pkgutil.walk_packages(incckpt.__path__, "incckpt."))


def test_the_reference_has_every_public_name() -> None:
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    listed = set(re.findall(r"auto(?:class|function):: (\w+)", pages))
    for module in re.findall(r"automodule:: ([\w.]+)", pages):
        listed.update(importlib.import_module(module).__all__)
    modules = {"errors", "__version__"}
    assert set(incckpt.__all__) - modules - listed == set()
    for name in set(incckpt.__all__) - modules:
        assert getattr(incckpt, name).__doc__, name


def test_every_page_is_in_the_table_of_contents() -> None:
    contents = (ROOT / "docs" / "index.md").read_text().split("```{toctree}\n")[1].splitlines()
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"} - set(contents) == set()


@pytest.mark.parametrize("page", ["interchange"])
def test_examples_on_pages(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    done = doctest.testfile(str(ROOT / "docs" / f"{page}.md"), module_relative=False, optionflags=options)
    assert done.attempted > 0
    assert done.failed == 0


def has_examples(name: str) -> bool:
    """Whether a module's source, if it is Python, holds doctests."""
    spec = importlib.util.find_spec(name)  # does not import it: an adapter needs its framework
    origin = None if spec is None else spec.origin
    return origin is not None and origin.endswith(".py") and ">>> " in Path(origin).read_text()


@pytest.mark.parametrize("name", [name for name in MODULES if has_examples(name)])
def test_examples_in_docstrings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = name.startswith("incckpt.integrations.")
    module = pytest.importorskip(name, exc_type=ImportError) if adapter else importlib.import_module(name)
    done = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert done.failed == 0
