"""Saves through a proxy that turns one answer in a hundred into a wrong one.

Writers of one store on an S3 or GCS server save, prune, restart and collect, while the proxy answers with a web page,
with nothing, with half of the answer, or with an answer of before. No checkpoint that was announced may be lost, and no
tensor wrong. An error is no loss: the writer starts again.

    python -m tests.lying_soak --saves 10000 --seconds 10800
    python -m tests.lying_soak --service gcs    # takes a third of the time: the client and the server are lighter
    python -m tests.lying_soak --each 300       # a new store after 300 saves: a restart reads all tombstones
    python -m tests.lying_soak --endpoint http://127.0.0.1:8055    # a real server: tests/servers/ceph-up.sh FOLDER 8055
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import s3fs
import torch

import incckpt
from incckpt.backends.base import Backend
from incckpt.backends.retry import RetryBackend
from incckpt.backends.s3 import S3Backend
from incckpt.errors import IncckptError, SupersededError
from incckpt.store.gc import Collector
from incckpt.store.store import Store
from tests.servers.fault_proxy import FaultProxy, Rule
from tests.servers.processes import python_server
from tests.stores import needed_keys, object_keys

KINDS = ("page", "blank", "shorten", "truncate", "stale")
KEEP_LAST = 2
BUCKET = "soak"


class Service(NamedTuple):
    """A kind of server.

    Attributes
    ----------
    module
        The server that is started, of `tests.servers`.
    make_bucket
        Makes a bucket, given the server's port.
    backend
        Returns a backend of the store in it, given the port of the server or a proxy.
    """

    module: str
    make_bucket: Callable[[int], None]
    backend: Callable[[int], Backend]


def s3_options(port: int) -> dict[str, Any]:
    """Return s3fs options."""
    return {"key": "test", "secret": "testtest", "endpoint_url": f"http://127.0.0.1:{port}"}


def make_gcs_bucket(port: int) -> None:
    """Make a bucket on a GCS server."""
    data = json.dumps({"name": BUCKET}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/storage/v1/b?project=test", data)
    with urllib.request.urlopen(request, timeout=30):
        pass


def gcs_backend(port: int) -> Backend:
    """Return a backend on a GCS server."""
    from incckpt.backends.gcs import GCSBackend

    return GCSBackend(BUCKET, "store", {"token": "anon", "endpoint_url": f"http://127.0.0.1:{port}"})


SERVICES = {
    "s3": Service(
        "s3_server",
        lambda port: s3fs.S3FileSystem(**s3_options(port), skip_instance_cache=True).mkdir(BUCKET),
        lambda port: S3Backend(BUCKET, "store", s3_options(port)),
    ),
    "gcs": Service("gcs_server", make_gcs_bucket, gcs_backend),
}


def state_at(run: str, step: int) -> dict[str, torch.Tensor]:
    """Return a state: a part that all runs share, content that comes back, and one that changes a little."""
    changing = torch.linspace(1, 2, 1000) * (1 + sum(run.encode()))
    changing[: 1 + step % 7] = step
    return {"frozen": torch.full((2000,), 0.5), "returning": torch.full((500,), float(step % 3)), "changing": changing}


def matches(state: dict[str, torch.Tensor], run: str, step: int) -> bool:
    """Say whether a state is that of a run at a step."""
    return all(torch.equal(state[name], value) for name, value in state_at(run, step).items())


class LyingSoak:
    """One soak.

    Parameters
    ----------
    port, service
        Of the server, and its kind.
    chance
        Of an answer to be wrong.
    runs, session
        How many saves in all, and in one go before a writer restarts.

    Attributes
    ----------
    counts
        What has happened.
    """

    def __init__(
        self, port: int, seed: int, *, service: Service, chance: float, runs: int = 2, session: int = 25
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self._port = port
        self._service = service
        self._seed = seed
        self._chance = chance
        self._runs = [f"run{index}" for index in range(runs)]
        self._session = session
        self._announced: dict[str, int] = {}
        self._lock = threading.Lock()
        self._wrong: list[str] = []

    def run(self, saves: int, seconds: float) -> dict[str, Any]:
        """Save until so many saves are announced, or time is up; check everything and return the figures.

        Raises
        ------
        AssertionError
            If a checkpoint was lost, or a tensor is wrong.
        """
        self._service.make_bucket(self._port)
        started = time.monotonic()
        with FaultProxy(self._port, seed=self._seed) as proxy:
            rules = [Rule(kind, times=None, chance=self._chance / len(KINDS)) for kind in KINDS]
            proxy.rules = rules
            threads = [
                threading.Thread(target=self._write, args=(proxy, run, saves // len(self._runs), started + seconds))
                for run in self._runs
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(60)
                    print(dict(self.counts), file=sys.stderr, flush=True)
            self._tally(proxy)
            lies = {rule.do: rule.struck for rule in rules}
        assert not self._wrong, self._wrong
        with self._service.backend(self._port) as backend:
            for run, step in self._announced.items():
                with incckpt.CheckpointManager(backend, run=run, read_only=True, threads=1) as reader:
                    steps = [checkpoint.step for checkpoint in reader.checkpoints()]
                    assert max(steps, default=0) >= step, f"{run}: {step} was announced, and there are {steps}"
                    for there in steps:
                        assert matches(reader.load(there), run, there), (run, there)
            missing = needed_keys(backend) - object_keys(backend)
            assert not missing, f"needed, and missing: {missing}"
        return {
            "saves": self.counts["saved"],
            "seconds": round(time.monotonic() - started),
            **self.counts,
            "lies": lies,
            "errors": dict(self.errors),
        }

    def _write(self, proxy: FaultProxy, run: str, saves: int, until: float) -> None:
        try:
            with RetryBackend(self._service.backend(proxy.port), first_wait=0.01) as backend:
                done = 0
                while done < saves and time.monotonic() < until:
                    self._tally(proxy)
                    try:
                        done += self._train(backend, run, min(self._session, saves - done))
                    except IncckptError as error:
                        with self._lock:
                            self.errors[type(error).__name__] += 1
        except BaseException as error:
            with self._lock:
                self._wrong.append(f"{run}: {error!r}")
            raise

    def _train(self, backend: Backend, run: str, saves: int) -> int:
        """Restore, save, and at times collect; return how many saves were announced."""
        target = state_at(run, 0)
        last = self._announced.get(run, 0)
        done = 0
        manager = incckpt.CheckpointManager(backend, run=run, keep_last_n=KEEP_LAST, threads=1)
        try:
            step = manager.restore(target)
            if step is None and last:
                raise AssertionError(f"the run passed for empty, and step {last} had been announced")
            if step is not None and not matches(target, run, step):
                raise AssertionError(f"step {step} came back wrong")
            if step is not None and step < last:
                self._count("restored an earlier one")  # a listing was short: the save that follows has to be refused
            for at in range((step or 0) + 1, (step or 0) + 1 + saves):
                manager.save(at, state_at(run, at)).result()
                if at <= last:
                    raise AssertionError(f"step {at} was saved again, though {last} had been announced")
                self._announced[run] = at
                done += 1
                self._count("saved")
        except SupersededError:
            self._count("refused")
        finally:
            try:
                manager.close()
            except IncckptError:
                pass  # counted already: it is told again
        if done:
            with Store(backend) as store:
                collector = Collector(store)
                collector.sweep(min_age=0)
                self._count("swept")
        return done

    def _tally(self, proxy: FaultProxy) -> None:
        """Count the requests that went by, and let go of them."""
        seen, proxy.seen = proxy.seen, []
        with self._lock:
            self.counts["requests"] += len(seen)

    def _count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1


def main() -> None:
    """Run a soak and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=10_000)
    parser.add_argument("--each", type=int, help="begin a new store, and print figures, after so many; default: never")
    parser.add_argument("--seconds", type=float, default=3600, help="stop after so many")
    parser.add_argument("--chance", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30), help="of the first store")
    parser.add_argument("--service", choices=SERVICES, default="s3")
    parser.add_argument("--endpoint", help="a server on loopback (S3: keys test and testtest); default: our own")
    arguments = parser.parse_args()
    if arguments.endpoint and arguments.each:
        parser.error("--each needs a server of its own for each store")
    logging.disable(logging.ERROR)
    service = SERVICES[arguments.service]
    given = urlsplit(arguments.endpoint or "").port
    until = time.monotonic() + arguments.seconds
    saved, seed = 0, arguments.seed
    while saved < arguments.saves and time.monotonic() < until:
        with nullcontext(given) if given else python_server(service.module) as port:
            soak = LyingSoak(port, seed, service=service, chance=arguments.chance)
            most = min(arguments.each or arguments.saves, arguments.saves - saved)
            figures = soak.run(most, until - time.monotonic())
        print(json.dumps(figures | {"service": arguments.service, "seed": seed}), flush=True)
        saved, seed = saved + figures["saves"], seed + 1


if __name__ == "__main__":
    main()
