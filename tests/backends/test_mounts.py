"""Stores on real FUSE mounts: of a folder by rclone, of a bucket by s3fs-fuse. Skipped where nothing can be mounted."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

import incckpt
from incckpt.backends import Backend
from incckpt.backends.local import LocalBackend
from incckpt.testing.conformance import BackendConformance
from tests.servers.installed import NotInstalled, rclone

pytestmark = pytest.mark.server


@contextmanager
def mounted(command: list[str], folder: Path) -> Iterator[Path]:
    """Mount with a program that returns once the mount stands; give the folder, and unmount it in the end."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK) or shutil.which("fusermount3") is None:
        pytest.skip("needs /dev/fuse and fusermount3 (Debian: fuse3)")
    folder.mkdir()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode or not os.path.ismount(folder):
        pytest.skip(f"{command[0]} cannot mount here: {done.stderr[-300:]}")
    try:
        yield folder
    finally:
        subprocess.run(["fusermount3", "-uz", str(folder)], check=True)


@pytest.fixture(scope="module")
def rclone_mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder mounted by rclone."""
    try:
        program = rclone()
    except NotInstalled as exc:
        pytest.skip(str(exc))
    base = tmp_path_factory.mktemp("rclone")
    (base / "served").mkdir()
    options = ["--config", os.devnull, "--cache-dir", str(base / "cache"), "--vfs-cache-mode", "writes", "--daemon"]
    with mounted([program, "mount", str(base / "served"), str(base / "mount"), *options], base / "mount") as folder:
        yield folder


@pytest.fixture(scope="module")
def s3_mount(s3_server: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a bucket mounted by s3fs-fuse."""
    program = shutil.which("s3fs")
    if program is None:
        pytest.skip("needs s3fs-fuse (Debian: s3fs)")
    base = tmp_path_factory.mktemp("s3fs")
    bucket = f"mounted-{uuid.uuid4()}"
    fsspec.filesystem("s3", **s3_server).mkdir(bucket)
    secret = base / "secret"
    secret.write_text(f"{s3_server['key']}:{s3_server['secret']}\n")
    secret.chmod(0o600)
    options = f"passwd_file={secret},url={s3_server['endpoint_url']},use_path_request_style"
    with mounted([program, bucket, str(base / "mount"), "-o", options], base / "mount") as folder:
        yield folder


@pytest.fixture(params=["rclone_mount", "s3_mount"])
def mount(request: pytest.FixtureRequest) -> Path:
    """Return a mount."""
    folder: Path = request.getfixturevalue(request.param)
    return folder


def test_a_run_on_a_mount(mount: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = mount / str(uuid.uuid4())
    weights = torch.arange(300_000.0)
    with incckpt.CheckpointManager(url, keep_last_n=2) as manager:
        for step in range(4):
            weights[step] = -1.0
            manager.save(step, {"w": weights, "step": step}).result()
    assert "only one process may write to it" in caplog.text
    with incckpt.CheckpointManager(url, keep_last_n=2) as manager:
        restored = torch.zeros(300_000)
        assert manager.restore({"w": restored, "step": -1}) == 3
        assert torch.equal(restored, weights)
        manager.save(4, {"w": restored, "step": 4}).result()
    assert incckpt.load(url)["step"] == 4
    assert incckpt.save({"step": 5}, url).step == 5


class TestOnRclone(BackendConformance):
    """The contract, without exclusive creation."""

    large_value = 1 << 20
    many_keys = 20

    @pytest.fixture
    def backend(self, rclone_mount: Path) -> Iterator[Backend]:
        with LocalBackend(rclone_mount / str(uuid.uuid4())) as backend:
            assert not backend.probe_exclusive()
            yield backend

    @pytest.fixture
    def plain_get(self, backend: Backend) -> Callable[[str], bytes]:
        return lambda key: Path(backend.url.removeprefix("file://"), key).read_bytes()

    def test_put_is_atomic_under_readers(self, backend: Backend) -> None:
        pytest.skip("while rclone renames over a file, readers find none; what is overwritten needs no more")
