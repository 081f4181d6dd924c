"""The extensions build, and the kernels answer the same, without OpenMP and without instructions of one processor."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
KERNEL_TESTS = ["tests/staging/test_detect.py", "tests/codec/test_planes.py", "tests/codec/test_digests.py"]
PROGRAM = """
from incckpt.staging import _detect
from incckpt.codec import _planes, _sha256
from incckpt.staging import detect
assert _detect.__file__.startswith({root!r}), _detect.__file__
assert _planes.__file__.startswith({root!r}), _planes.__file__
assert not _detect.OPENMP
assert not _sha256.PAIRED
assert detect.KERNELS == ("generic",), detect.KERNELS
"""


def run(*command: str, cwd: Path, **environment: str) -> str:
    """Run Python with these arguments; return what it printed."""
    result = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(cwd), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.mark.skipif("INCCKPT_BUILD" not in os.environ, reason="a minute and more: make thorough")
def test_a_build_for_any_processor_without_openmp_passes_the_kernels_tests(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "incckpt", tmp_path / "incckpt", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "tests/effort.py", *KERNEL_TESTS):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    output = run(
        *("setup.py", "build_ext", "--inplace"),
        cwd=tmp_path,
        INCCKPT_NO_OPENMP="1",
        CPPFLAGS=f"{os.environ.get('CPPFLAGS', '')} -DINCCKPT_GENERIC_ONLY",
    )
    assert "-fopenmp" not in output
    run("-c", PROGRAM.format(root=str(tmp_path)), cwd=tmp_path)
    run("-m", "pytest", "-q", "-x", *KERNEL_TESTS, cwd=tmp_path)
