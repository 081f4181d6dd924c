"""Wrong answers, by a proxy before a server: to each request of a restore from S3 in turn, and among saves to GCS."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import s3fs
import torch

import incckpt
from incckpt.backends.base import Backend
from incckpt.backends.retry import RetryBackend
from incckpt.backends.s3 import S3Backend
from tests.lying_soak import KINDS, SERVICES, LyingSoak
from tests.servers.fault_proxy import FaultProxy, Rule

BUCKET = "wrong-answers"


@pytest.fixture(scope="module")
def port(s3_server: dict[str, Any]) -> int:
    s3fs.S3FileSystem(**s3_server).mkdir(BUCKET)
    return int(s3_server["endpoint_url"].rpartition(":")[2])


@pytest.fixture
def proxy(port: int) -> Iterator[FaultProxy]:
    with FaultProxy(port) as proxy:
        yield proxy


@pytest.fixture
def backend(proxy: FaultProxy, s3_server: dict[str, Any]) -> Iterator[Backend]:
    options = {**s3_server, "endpoint_url": f"http://127.0.0.1:{proxy.port}"}
    with S3Backend(BUCKET, str(uuid.uuid4()), options) as backend:
        yield RetryBackend(backend, sleep=lambda _: None)


@pytest.mark.parametrize("do", ["page", "blank", "shorten", "corrupt"])
def test_no_wrong_answer_costs_a_restore_its_checkpoint(proxy: FaultProxy, backend: Backend, do: str) -> None:
    with incckpt.CheckpointManager(backend, threads=1) as manager:
        for step in (1, 2):
            manager.save(step, {"w": torch.full((1000,), float(step))}).result()

    def restored() -> tuple[int | None, torch.Tensor]:
        target = {"w": torch.zeros(1000)}
        with incckpt.CheckpointManager(backend, read_only=True, threads=1) as manager:
            return manager.restore(target), target["w"]

    proxy.seen.clear()
    assert restored()[0] == 2
    requests = len(proxy.seen)
    assert requests > 5
    for skip in range(requests):
        rule = Rule(do, skip=skip)
        proxy.rules = [rule]
        found, values = restored()
        assert rule.struck == 1
        assert found == 2, f"request {skip}: {proxy.seen[-1]}"
        assert torch.equal(values, torch.full((1000,), 2.0))


@pytest.mark.slow
def test_saves_among_wrong_answers(gcs_server: int) -> None:
    """The soak of tests/lying_soak.py, small: a lie in ten answers, and no checkpoint lost."""
    pytest.importorskip("gcsfs", reason="needs the extra gcs")
    figures = LyingSoak(gcs_server, seed=3, service=SERVICES["gcs"], chance=0.1, session=4).run(16, 300)
    assert figures["saves"] == 16
    assert all(figures["lies"][kind] for kind in KINDS), figures["lies"]
