"""Saving, restoring and retention over every backend, and through a proxy that breaks requests."""

from __future__ import annotations

import json
import logging
import os
import random
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import s3fs
import torch

import incckpt
from incckpt.backends import open_backend
from incckpt.backends.s3 import S3Backend
from incckpt.errors import BackendError, BackendTimeoutError, ReadOnlyError, SaveError
from incckpt.testing.compare import assert_same_state
from incckpt.testing.faults import CountingBackend
from tests.backends.remote_suite import patient
from tests.programs import run
from tests.servers.fault_proxy import FaultProxy, Rule
from tests.servers.processes import python_server
from tests.stores import object_keys, orphans

pytestmark = pytest.mark.slow

BUCKET = "runs"


@dataclass
class Place:
    """Somewhere a store can be."""

    url: str
    options: dict[str, Any] = field(default_factory=dict)
    exclusive: bool = True  # else nothing may be collected


def s3(request: pytest.FixtureRequest, _: Path) -> Place:
    options = request.getfixturevalue("s3_server")
    s3fs.S3FileSystem(**options).makedirs(BUCKET, exist_ok=True)
    return Place(f"s3://{BUCKET}/{uuid.uuid4()}", options)


def ceph(request: pytest.FixtureRequest, _: Path) -> Place:
    endpoint = os.environ.get("INCCKPT_CEPH_URL")
    if not endpoint:
        pytest.skip("set INCCKPT_CEPH_URL to a gateway's endpoint (make test-ceph starts one)")
    credentials = (os.environ.get("INCCKPT_CEPH_KEY", "test"), os.environ.get("INCCKPT_CEPH_SECRET", "testtest"))
    options = {"key": credentials[0], "secret": credentials[1], "endpoint_url": endpoint}
    s3fs.S3FileSystem(**options).makedirs(BUCKET, exist_ok=True)
    return Place(f"s3://{BUCKET}/{uuid.uuid4()}", options)


def rclone(request: pytest.FixtureRequest, _: Path) -> Place:
    return Place(f"s3://bucket/{uuid.uuid4()}", request.getfixturevalue("rclone_server"), exclusive=False)


def gcs(request: pytest.FixtureRequest, _: Path) -> Place:
    port = request.getfixturevalue("gcs_server")
    url = f"http://127.0.0.1:{port}/storage/v1/b?project=test"
    bucket = f"runs-{uuid.uuid4()}"
    create = urllib.request.Request(url, json.dumps({"name": bucket}).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(create, timeout=30):
        pass
    return Place(f"gs://{bucket}/store", {"token": "anon", "endpoint_url": f"http://127.0.0.1:{port}"})


def azure(request: pytest.FixtureRequest, _: Path) -> Place:
    from azure.storage.blob import BlobServiceClient

    from tests.backends.test_azure import options_for

    options = options_for(request.getfixturevalue("azure_server"))
    container = f"runs-{uuid.uuid4()}"
    with BlobServiceClient.from_connection_string(options["connection_string"]) as service:
        service.create_container(container)
    return Place(f"az://{container}/store", options)


PLACES: dict[str, Callable[[pytest.FixtureRequest, Path], Place]] = {
    "local": lambda _, folder: Place(str(folder / "store")),
    "memory": lambda _, folder: Place(f"memory://{uuid.uuid4()}"),
    "s3": s3,
    "ceph": ceph,
    "rclone": rclone,
    "gcs": gcs,
    "azure": azure,
}


@pytest.fixture(params=list(PLACES))
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return PLACES[request.param](request, tmp_path)


def state_at(step: int) -> dict[str, Any]:
    torch.manual_seed(5)
    changing = torch.randn(400_000)
    changing[: 10 * step] = step
    return {"frozen": torch.full((300_000,), 0.5), "changing": changing, "small": torch.full((9,), step), "step": step}


@pytest.mark.filterwarnings("ignore:Unclosed connection:ResourceWarning")
def test_a_life_of_a_run(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"storage_options": place.options}
    with incckpt.CheckpointManager(place.url, keep_last_n=2, keep_best_n=1, metric="loss", **options) as manager:
        assert manager.restore(state_at(0)) is None
        for step, loss in enumerate([3.0, 1.0, 2.0, 4.0, 5.0], start=1):
            manager.save(step, state_at(step), metrics={"loss": loss})
        manager.wait()
        assert [checkpoint.step for checkpoint in manager.checkpoints()] == [2, 4, 5]
        assert sum(report.put_bytes for report in manager.history[1:]) < manager.history[0].put_bytes / 5
    with incckpt.CheckpointManager(place.url, run="other", **options) as manager:
        manager.save(1, state_at(1)).result()
        manager.wait()
        new = (
            1 if place.exclusive else 0
        )  # step 1 of the first run is pruned; its large objects are bases of later ones
        assert manager.history[0].put_objects == new
    with incckpt.CheckpointManager(place.url, keep_last_n=1, **options) as manager:
        target = state_at(0)
        assert manager.restore(target) == 5
        assert_same_state(target, state_at(5))
        manager.save(6, state_at(6)).result()
        assert manager.restore(target, step=6) == 6
        manager.save(7, state_at(7)).result()
        manager.wait()
    assert_same_state(incckpt.load(place.url, **options), state_at(7))
    assert_same_state(
        incckpt.load(f"{place.url}#other@1", keys=["small", "step"], **options),
        {
            "small": state_at(1)["small"],
            "step": 1,
        },
    )
    with open_backend(place.url, place.options) as backend:
        assert (orphans(backend) == set()) == place.exclusive
        assert not list(backend.list("pins/"))
        assert not list(backend.list("gc/"))
    assert ("cannot create exclusively" in caplog.text) != place.exclusive


def test_a_store_behind_a_web_server(tmp_path: Path) -> None:
    with incckpt.CheckpointManager(tmp_path / "exp7") as manager:
        for step in (1, 2):
            manager.save(step, state_at(step), metrics={"loss": step}).result()
    with python_server("http_server", str(tmp_path), "ranges") as port:
        url = f"http://127.0.0.1:{port}/exp7"
        assert_same_state(incckpt.load(url), state_at(2))
        assert_same_state(incckpt.load(f"{url}#@best"), state_at(1))
        with incckpt.CheckpointManager(url, read_only=True) as reader:
            target = state_at(0)
            assert reader.restore(target, step=1) == 1
            assert_same_state(target, state_at(1))
        with pytest.raises(ReadOnlyError, match="can only be read"):
            incckpt.save(state_at(3), url)


def test_two_processes_that_share_nothing_but_the_url(
    s3_server: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    s3fs.S3FileSystem(**s3_server).makedirs(BUCKET, exist_ok=True)
    url = f"s3://{BUCKET}/{uuid.uuid4()}"
    environment = os.environ | {
        "AWS_ACCESS_KEY_ID": s3_server["key"],
        "AWS_SECRET_ACCESS_KEY": s3_server["secret"],
        "AWS_ENDPOINT_URL": s3_server["endpoint_url"],
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    programs = (
        "import incckpt, sys, tests.test_runs_everywhere as t\n"
        "incckpt.save(t.state_at(3), sys.argv[1], metrics={'a': 1})",
        "import incckpt, sys, tests.test_runs_everywhere as t\n"
        "t.assert_same_state(incckpt.load(sys.argv[1] + '#default@best', map_location='cpu'), t.state_at(3))",
    )
    for program in programs:
        folder = tmp_path_factory.mktemp("empty")
        done = run("-c", program, url, folder=folder, environment=environment)
        assert (done.returncode, done.stderr) == (0, "")


# -- S3 through a proxy that breaks requests


@pytest.fixture(scope="module")
def proxy(s3_server: dict[str, Any]) -> Iterator[FaultProxy]:
    with FaultProxy(int(s3_server["endpoint_url"].rpartition(":")[2])) as proxy:
        yield proxy


def broken(proxy: FaultProxy, s3_server: dict[str, Any], path: str, **limits: float) -> S3Backend:
    s3fs.S3FileSystem(**s3_server).makedirs(BUCKET, exist_ok=True)
    options = s3_server | {"endpoint_url": f"http://127.0.0.1:{proxy.port}"}
    return S3Backend(BUCKET, path, options, **limits)


def test_a_tenth_of_all_requests_breaks(proxy: FaultProxy, s3_server: dict[str, Any]) -> None:
    saves, restores = (int(os.environ.get(name, default)) for name, default in (("SAVES", 12), ("RESTORES", 4)))
    proxy.rules = []
    path = str(uuid.uuid4())
    small = {"w": torch.randn(50_000), "v": torch.zeros(9)}
    answers = {500: "InternalError", 502: "BadGateway", 503: "SlowDown", 429: "TooManyRequests"}
    kinds = ("reset", "lose_reply", "cut_upload", "truncate")
    rules = [
        *(Rule("status", times=None, chance=0.0125, status=status, code=code) for status, code in answers.items()),
        *(Rule(do, times=None, chance=0.0125) for do in kinds),
        Rule("hang_download", times=None, chance=0.01, method="GET"),
    ]
    with incckpt.CheckpointManager(patient(broken(proxy, s3_server, path, timeout=2.0)), keep_last_n=3) as manager:
        proxy.rules = rules
        for step in range(1, saves + 1):
            small["w"][step] += 1
            small["v"].fill_(step)
            assert manager.save(step, small).result().step == step
        manager.wait()
        for _ in range(restores):
            with patient(broken(proxy, s3_server, path, timeout=2.0)) as backend:
                assert_same_state(incckpt.load(backend), small)
        assert sum(rule.struck for rule in rules) > saves / 2
        assert saves < 60 or all(rule.struck for rule in rules)
        proxy.rules = []
        assert [checkpoint.step for checkpoint in manager.checkpoints()] == [saves - 2, saves - 1, saves]
        manager.save(saves + 1, small).result()
        manager.wait()
    with broken(proxy, s3_server, path) as backend:
        assert orphans(backend) == set()


def test_an_outage_ends_in_an_error_and_the_next_save_goes_on(
    proxy: FaultProxy, s3_server: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    proxy.rules = []
    backend = CountingBackend(broken(proxy, s3_server, str(uuid.uuid4()), timeout=2.0))
    random.seed(1)
    state = {f"w{i}": torch.randn(300_000) for i in range(6)}
    with incckpt.CheckpointManager(backend, threads=1) as manager:
        manager.save(1, {"x": 1}).result()
        proxy.rules = [Rule("status", method="PUT", target="/objects/", skip=3, times=None, status=503)]
        error = manager.save(2, state).exception()
        assert isinstance(error, BackendError)
        assert "objects/" in str(error)
        proxy.rules = []
        with pytest.raises(SaveError, match="503"):
            manager.save(3, state)
        there = object_keys(backend)
        assert len(there) >= 4
        backend.reset()
        manager.save(3, state).result()
        put = {key for key in backend.keys("put") if key.startswith("objects/")}
        assert len(put) + len(there) <= 6 + 1 + 2, "what had been uploaded was used"
        assert_same_state(incckpt.load(backend), state)


@pytest.mark.parametrize("do", ["hang", "hang_upload", "hang_download"])
def test_a_hang_ends_at_the_deadline(
    proxy: FaultProxy, s3_server: dict[str, Any], do: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    proxy.rules = []
    path = str(uuid.uuid4())
    limits = {"timeout": 0.5, "min_rate": 50 << 20}
    state = {"w": torch.randn(300_000)}
    with incckpt.CheckpointManager(broken(proxy, s3_server, path, **limits)) as manager:
        manager.save(1, state).result()
        if do == "hang_download":
            proxy.rules = [Rule(do, method="GET", target="/objects/", times=None)]
            with (
                broken(proxy, s3_server, path, **limits) as backend,
                pytest.raises(BackendTimeoutError, match="objects/"),
            ):
                incckpt.load(backend)
        else:
            proxy.rules = [Rule(do, method="PUT", target="/objects/", times=None)]
            assert isinstance(manager.save(2, {"w": state["w"] + 1}).exception(), BackendTimeoutError)
            with pytest.raises(SaveError):
                manager.save(3, state)
        proxy.rules = []
        manager.save(4, state).result()
        with broken(proxy, s3_server, path) as backend:
            assert_same_state(incckpt.load(backend), state)
