"""The examples and the save benchmark run, in small form, and show what they claim."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from torch.distributed.checkpoint import staging

import incckpt
from tests import programs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


def run(*command: object, cwd: Path) -> str:
    """Run a script of this repository in a folder of its own; return what it printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive", "PYTHONWARNINGS": "default"}
    done = programs.run(*command, folder=cwd, environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The demo, run once in a small form: its store, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    size = ("--steps", 12, "--every", 2, "--width", 64, "--depth", 1)
    return folder / "store", run(ROOT / "examples" / "demo.py", "--folder", folder, *size, cwd=folder)


def test_demo_is_killed_while_saving_and_resumes_bit_for_bit(demo: tuple[Path, str]) -> None:
    _, output = demo
    assert "Killed while saving step" in output
    assert "resumed from step" in output
    assert "All 12 losses are identical to the last bit" in output


def test_demo_leaves_a_store_without_pins(demo: tuple[Path, str]) -> None:
    store, _ = demo
    assert [path for path in store.glob("pins/*/*") if path.is_file()] == []
    with incckpt.CheckpointManager(store, read_only=True) as manager:
        assert [checkpoint.step for checkpoint in manager.checkpoints()] == [2, 4, 6, 8, 10, 12]


def test_finetune_stores_what_is_frozen_once(demo: tuple[Path, str]) -> None:
    store, output = demo
    assert "parameters are trained" in output
    with incckpt.CheckpointManager(store, run="lora", read_only=True) as manager:
        first, *rest = manager.checkpoints()
    assert rest
    assert all(checkpoint.written < first.nbytes / 4 for checkpoint in rest)


def test_finetune_resumes(demo: tuple[Path, str], tmp_path: Path) -> None:
    store, _ = demo
    output = run(ROOT / "examples" / "finetune_lora.py", store, "--steps", 50, cwd=tmp_path)
    assert [line.split()[0] for line in output.splitlines()[2:]] == ["10", "20", "30", "40", "50"]


def test_sample_from_a_url_alone(demo: tuple[Path, str], tmp_path: Path) -> None:
    store, _ = demo
    output = run(ROOT / "examples" / "sample.py", f"file://{store}#default@best", "--length", 9, cwd=tmp_path)
    assert output.startswith("def ")


def test_readme_code_runs_and_resumes(tmp_path: Path) -> None:
    program = tmp_path / "readme.py"
    program.write_text("".join(re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)))
    for _ in range(2):
        run(program, cwd=tmp_path)
        # The second run resumes at the end: it saves nothing, so it makes no attempt of its own.
        assert len(list((tmp_path / "checkpoints" / "runs" / "default" / "attempts").glob("*.from"))) == 1
    with incckpt.CheckpointManager(tmp_path / "checkpoints", read_only=True) as manager:
        assert [checkpoint.step for checkpoint in manager.checkpoints()] == [60, 70, 80, 90, 100]
    with incckpt.CheckpointManager(tmp_path / "elsewhere", read_only=True) as manager:
        assert [checkpoint.step for checkpoint in manager.checkpoints()] == [0, 1]


PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pytest.mark.skipif(not hasattr(staging, "DefaultStager"), reason="compares with what later versions of torch have")
def test_save_benchmark_runs(tmp_path: Path) -> None:
    from benchmarks import bench_save

    benchmark = ROOT / "benchmarks" / "bench_save.py"
    output = run(benchmark, "--scale", 0.001, "--rounds", 1, "--only", "time", "--folder", tmp_path, cwd=tmp_path)
    assert output.count("async_save cached") == 5
    assert bench_save.memory("incckpt", 0.001, "cpu", tmp_path).split()[-3:] == ["kept", "for", "recycling"]


def test_the_sharded_example(tmp_path: Path) -> None:
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    printed = run(*command, ROOT / "examples/fsdp.py", tmp_path / "store", "--steps", 5, cwd=tmp_path)
    assert "checkpoints [5]" in printed
    assert set(incckpt.load(str(tmp_path / "store"))) == {"model", "optimizer"}
