"""What import-linter cannot see: imports of compiled modules, imports made late, names and sizes of modules."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import incckpt

PACKAGE = Path(incckpt.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 520


def imported(path: Path) -> set[str]:
    """Return the absolute names that a module imports anywhere in it, functions included.

    ``from a import b`` counts as both ``a`` and ``a.b``: the syntax does not tell whether b is a module.
    """
    package = ".".join(path.relative_to(PACKAGE.parent).parent.parts)
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def importers(name: str) -> set[str]:
    """Return the modules, relative to the package, that import `name`."""
    return {str(path.relative_to(PACKAGE)) for path in MODULES if name in imported(path)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "only"),
    [
        ("staging._detect", {"staging/detect.py"}),
        ("codec._planes", {"codec/frames.py"}),
        ("codec._sha256", {"codec/digests.py"}),
        ("backends._files", {"backends/system.py"}),
    ],
)
def test_a_kernel_has_few_callers(kernel: str, only: set[str]) -> None:
    assert importers(f"incckpt.{kernel}") == only


@pytest.mark.slow
def test_backends_import_no_tensor_library() -> None:
    assert {name for name in importers("torch") | importers("numpy") if name.startswith("backends")} == set()


def test_no_module_is_a_drawer() -> None:
    names = {path.stem for path in MODULES} | {path.parent.name for path in MODULES}
    assert names.isdisjoint({"util", "utils", "helpers", "common", "misc"})


def test_modules_stay_readable() -> None:
    lines = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


@pytest.mark.slow
def test_import_loads_no_cloud_library_and_no_framework() -> None:
    program = "import sys, incckpt; print(*sorted(name.partition('.')[0] for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "incckpt" in loaded
    assert loaded.isdisjoint({"s3fs", "botocore", "aiobotocore", "aiohttp", "gcsfs", "adlfs", "azure", "google"})
    assert loaded.isdisjoint({"accelerate", "lightning", "peft", "transformers"})
