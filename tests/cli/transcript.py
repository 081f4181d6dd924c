"""`docs/cli.md`: the command as a new user would try it, run for real and written down.

``python -m tests.cli.transcript`` writes the page; a test checks that the commands still say what it says.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import s3fs
import torch

import incckpt
from incckpt.cli.app import run, verbs
from incckpt.cli.errors import EXIT_CODES
from incckpt.codec import objects as codec
from incckpt.store.objects import ObjectKey
from incckpt.store.refs import Ref, RefName
from incckpt.store.store import Store
from tests.servers.fault_proxy import FaultProxy, Rule
from tests.servers.processes import python_server

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"

HEAD = """# Command line

`pip install "incckpt[cli]"` brings the command `incckpt`; `python -m incckpt` is the same.

{verbs}

A URL is a store, a run in it or a checkpoint, as everywhere ([URLs](index.md#urls)): `s3://bucket/store`, `…#run`,
`…#run@500`, `…@latest`, `…@best`. What a file system needs besides (an endpoint, a profile) is taken from where its own
tools take it, the `AWS_…` variables, say; or given with `-o name=value`. Credentials are never printed.

Every verb takes `--json`, which prints one JSON document on standard output: the fields of what the library returns
([reference](api/inspection.md)). Errors go to standard error as one line with the remedy, with `--json` as a JSON
object; `--debug` adds the traceback. Progress is shown if standard error is a terminal.

`incckpt completion bash` (`zsh`, `fish`) prints a script that completes verbs, options and URLs in the shell: folders
and buckets, after `#` the runs of the store, after `@` a run's steps. Its `--help` says where it goes.

{codes}

What follows was run, and is checked by a test.
"""


@dataclass
class Section:
    """A heading, a sentence or two, and commands."""

    title: str
    text: str
    commands: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


SECTIONS = [
    Section("A first look", "`runs` is a store on disk: five checkpoints of a run, and one of another.", [
        "incckpt list runs",
        "incckpt info runs#default@best --tensors",
        "incckpt stats runs",
        "incckpt du runs",
        "incckpt blobs runs --limit 4",
        "incckpt diff runs#default@1 @5",
        "incckpt verify runs",
        "incckpt list runs#other --json",
    ]),
    Section("S3", "The same on S3. A copy moves only what is missing; a second one moves nothing.", [
        "incckpt doctor s3://demo/runs",
        "incckpt copy runs s3://demo/runs",
        "incckpt copy runs s3://demo/runs",
        "incckpt list s3://demo/runs",
        "incckpt info s3://demo/runs#@2",
        "incckpt diff runs#@5 s3://demo/runs#@5",
        "incckpt verify s3://demo/runs --level sizes",
        "incckpt prune s3://demo/runs --keep-last 2 --no-dry-run",
        "incckpt rm s3://demo/runs#other@10 --yes",
        "incckpt gc s3://demo/runs",
        "incckpt du s3://demo/runs",
    ]),
    Section("Tidying up", "`prune` and `gc` only plan, unless they are told otherwise.", [
        "incckpt prune runs --keep-last 1 --keep-best 1 --metric loss",
        "incckpt prune runs --keep-last 1 --keep-best 1 --metric loss --no-dry-run",
        "incckpt rm runs#other@10",
        "incckpt rm runs#other@10 --yes",
        "incckpt gc runs --min-age 0",
        "incckpt list runs",
    ]),
    Section("Files of other programs", "", [
        "incckpt export runs#@5 model.pt",
        "incckpt import model.pt runs#imported@5",
        "incckpt import missing.pt runs#imported",
    ]),
    Section("An empty store, and none", "", [
        "incckpt list empty",
        "incckpt list empty#default",
        "incckpt info empty",
        "incckpt verify empty",
        "incckpt stats empty",
        "incckpt gc empty",
        "incckpt copy empty elsewhere",
        "incckpt list nothing",
        "incckpt info s3://demo/nothing",
        "incckpt copy nothing runs",
        "incckpt rm nothing#default@1 --yes",
        "incckpt prune nothing --keep-last 1",
        "incckpt list s3://no-such-bucket/runs",
        "incckpt doctor nothing",
        "incckpt list runs#defualt",
        "incckpt info runs#default@7",
        "incckpt list s3:/demo/runs",
        "incckpt lst runs",
    ]),
    Section("500 checkpoints", "", [
        "incckpt list big | tail -n 3",
        "incckpt stats big",
        "incckpt du big | tail -n 4",
        "incckpt info big#@250",
        "incckpt diff big#@1 @500",
        "incckpt verify big --level list",
        "incckpt prune big --keep-every 100",
    ]),
    Section("A damaged store", "In one copy of `runs` a byte of an object was flipped; another has lost `runs/`.", [
        "incckpt verify flipped",
        "incckpt copy flipped#default elsewhere",
        "incckpt list lost",
        "incckpt recover lost",
        "incckpt recover lost --no-dry-run",
        "incckpt list lost",
    ]),
    Section("Without permission", "The server refuses everything, or all that writes.", [
        "incckpt list s3://demo/runs",
        "incckpt doctor s3://demo/runs",
    ], {"AWS_ENDPOINT_URL": "refuses everything"}),
    Section("", "", [
        "incckpt list s3://demo/runs",
        "incckpt rm s3://demo/runs#@5 --yes",
        "incckpt copy runs s3://demo/refused",
        "incckpt doctor s3://demo/runs",
    ], {"AWS_ENDPOINT_URL": "refuses writes"}),
]  # fmt: skip


def state_at(step: int, size: int = 200_000) -> dict[str, object]:
    """Return a state: a tensor that changes a little, a frozen one, a small one, a value."""
    weight = torch.linspace(-1, 1, size)
    weight[: 10 * step] += 0.5
    return {
        "model": {"weight": weight, "frozen": torch.arange(size) % 7, "bias": torch.full((8,), float(step))},
        "step": step,
    }


def make_stores(folder: Path) -> None:
    """Make what the commands are tried on."""
    with incckpt.CheckpointManager(folder / "runs") as manager:
        for step, loss in zip(range(1, 6), (0.9, 0.5, 0.2, 0.3, 0.4), strict=True):
            manager.save(step, state_at(step), metrics={"loss": loss})
    incckpt.save(state_at(5), folder / "runs", run="other", step=10)
    incckpt.save({"x": 1}, folder / "empty", step=1)
    with incckpt.CheckpointManager(folder / "empty") as manager:
        manager.delete(1)
    for name in ("flipped", "lost"):
        shutil.copytree(folder / "runs", folder / name)
    damaged = max((folder / "flipped" / "objects").rglob("*.*"), key=lambda path: path.stat().st_size)
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    shutil.rmtree(folder / "lost" / "runs")
    make_big_store(folder / "big", 500)


def make_big_store(folder: Path, count: int) -> None:
    """Make a store of many checkpoints: a few are saved, and written down again under other steps."""
    with incckpt.CheckpointManager(folder) as manager:
        for step in range(1, 4):
            manager.save(step, state_at(step, 5000))
    with Store.open(str(folder)) as store:
        run = store.run("default")
        originals = [run.read(name) for name in run.lineage().live]
        for step in range(4, count + 1):
            ref = originals[step % 3]
            assert isinstance(ref, Ref)
            name = RefName.new(ref.name.attempt, step)
            document = replace(store.manifest(ref), step=step, nonce=name.nonce).to_json()
            digest = codec.digest(document)
            key, data = ObjectKey(digest.identity.hex(), name.nonce), codec.encode_document(document, digest=digest)
            written = replace(ref, name=name, manifest=str(key), manifest_size=len(data), written=len(data))
            for path, content in ((folder / str(key), data), (folder / run.ref_key(name), written.to_json())):
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)


def output_of(line: str, folder: Path) -> str:
    """Run a command line, which may end in ``| tail``; return what a terminal shows."""
    command, _, pipe = line.partition(" | ")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(folder):
        code = run(shlex.split(command)[1:])
    text = out.getvalue()
    if pipe:
        text = "".join(text.splitlines(keepends=True)[-int(pipe.split()[-1]) :])
    text = err.getvalue() + text
    text = text.replace(str(folder), "/data")
    text = re.sub(r"127\.0\.0\.1:\d+", "server", text)
    if text and not text.endswith("\n"):
        text += "\n"
    return text + (f"[exit code {code}]\n" if code else "")


@contextlib.contextmanager
def places(endpoint: str) -> Iterator[dict[str, str]]:
    """Give the endpoints by name: the server itself, and proxies that refuse."""
    port = int(endpoint.rpartition(":")[2])
    with FaultProxy(port) as all_refused, FaultProxy(port) as writes_refused:
        body = "<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        refuse = {"times": None, "status": 403, "body": body}
        all_refused.rules = [Rule("status", **refuse)]  # type: ignore[arg-type]
        writes_refused.rules = [Rule("status", method="PUT|POST|DELETE", **refuse)]  # type: ignore[arg-type]
        yield {
            "": endpoint,
            "refuses everything": f"http://127.0.0.1:{all_refused.port}",
            "refuses writes": f"http://127.0.0.1:{writes_refused.port}",
        }


def transcript(endpoint: str) -> str:
    """Return the page, made by running everything against an S3 server."""
    table = "| verb | what |\n| --- | --- |\n" + "\n".join(f"| `{name}` | {text} |" for name, text in verbs().items())
    rows = "\n".join(f"| {code} | {text} |" for code, text in EXIT_CODES.items())
    codes = f"| exit code | meaning |\n| --- | --- |\n{rows}"
    page = [HEAD.format(verbs=table, codes=codes)]
    credentials = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "testtest", "AWS_DEFAULT_REGION": "us-east-1"}
    with tempfile.TemporaryDirectory() as name, places(endpoint) as endpoints:
        folder = Path(name).resolve()
        make_stores(folder)
        s3fs.S3FileSystem(key="test", secret="testtest", endpoint_url=endpoint).makedirs("demo", exist_ok=True)
        for section in SECTIONS:
            where = {"AWS_ENDPOINT_URL": endpoints[section.environment.get("AWS_ENDPOINT_URL", "")]}
            if section.title:
                page.append(f"## {section.title}\n")
            if section.text:
                page.append(f"{section.text}\n")
            with mock.patch.dict(os.environ, credentials | where):
                shown = "\n".join(f"$ {line}\n{output_of(line, folder)}" for line in section.commands)
            page.append(f"```text\n{shown}```\n")
    return "\n".join(page)


def comparable(page: str) -> str:
    """Return a page without what differs from one run to the next: times, nonces, sizes, durations, alignment."""
    page = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME", page)
    page = re.sub(r'"time": [0-9.]+', '"time": TIME', page)
    page = re.sub(r"[0-9a-f]{2}/[0-9a-f]{9,62}…?\.([0-9a-f]{32}\.)?[0-9a-f]{16}", "OBJECT", page)
    page = re.sub(r"\b[0-9a-f]{32}\b", "PROBE", page)
    page = re.sub(r"\b[0-9a-f]{16}\b", "NONCE", page)
    page = re.sub(r"\b[0-9.]+ (B|KB|MB|GB|bytes)\b", "SIZE", page)
    page = re.sub(r"[0-9.]+ times less", "N times less", page)
    page = re.sub(r"[0-9.]+ (ms|s|min|seconds|minutes|hours|days)\b", "DURATION", page)
    page = re.sub(r'"(written|nbytes)": \d+', r'"\1": N', page)
    page = re.sub(r"makes \d+ requests: [a-z0-9, ]+", "makes N requests", page)  # a look more or less
    return re.sub(r"\s+", " ", page)


def main() -> None:
    """Write the page."""
    with python_server("s3_server") as port:
        PAGE.write_text(transcript(f"http://127.0.0.1:{port}"))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
