"""`completion`: its scripts in real shells, on a terminal, key by key."""

from __future__ import annotations

import os
import pty
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs
from click.shell_completion import BashComplete

import incckpt
from incckpt.cli.app import command as cli
from tests.cli.conftest import Command

PATIENCE = 60.0  # seconds
START = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
    "fish": ["fish", "--no-config", "-i"],
}
LOAD = {
    "bash": "source {script}",
    "zsh": "autoload -U compinit; compinit -D -u; source {script}",
    "fish": "source {script}",
}


class Shell:
    """A shell on a terminal."""

    def __init__(self, kind: str, folder: Path) -> None:
        environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder), "TERM": "dumb"}
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "XDG_CONFIG_HOME": str(folder)}
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            os.chdir(folder)
            os.execvpe(START[kind][0], START[kind], environment)
        self.seen = ""

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self._terminal, keys.encode())

    def wait_for(self, path: Path) -> str:
        """Return a file's text once it is there and complete: ends with an empty line."""
        until = time.monotonic() + PATIENCE
        while not (path.exists() and path.read_text().endswith("\n\n")):
            assert time.monotonic() < until, f"the shell shows {self.seen!r}"
            if select.select([self._terminal], [], [], 0.05)[0]:
                self.seen += os.read(self._terminal, 1 << 16).decode(errors="replace")
        text = path.read_text()
        path.unlink()
        return text

    def close(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._terminal)


@pytest.fixture(params=list(START))
def shell(request: pytest.FixtureRequest, command: Command, tmp_path: Path) -> Iterator[Shell]:
    """Return a shell that completes `incckpt`, which only writes its arguments down, and a store of two runs."""
    if shutil.which(request.param) is None:
        pytest.skip(f"there is no {request.param} here")
    program = tmp_path / "incckpt"
    program.write_text(
        f'#!/bin/sh\n[ -n "$_INCCKPT_COMPLETE" ] && exec {shlex.quote(sys.executable)} -m incckpt "$@"\n'
        'printf "%s\\n" "$@" "" >arguments\n'
    )
    program.chmod(0o755)
    (tmp_path / "script").write_text(command("completion", request.param).out)
    with incckpt.CheckpointManager(tmp_path / "sweep") as manager:
        for step in (7, 120):
            manager.save(step, {"x": step})
    incckpt.save({"x": 1}, tmp_path / "sweep", run="lr3e-4", step=5)
    found = Shell(request.param, tmp_path)
    found.type(LOAD[request.param].format(script=tmp_path / "script") + "\n")
    found.type("incckpt ready\n")
    found.wait_for(tmp_path / "arguments")
    yield found
    found.close()


@pytest.mark.slow
def test_urls_are_completed_as_they_are_typed(shell: Shell, tmp_path: Path) -> None:
    for keys, expected in (
        ("ver\tsw\t#lr\t@5\t", ["verify", "sweep/#lr3e-4@5"]),
        (f"info file://{tmp_path}/sw\t#def\t@12\t", ["info", f"file://{tmp_path}/sweep#default@120"]),
        ("diff sweep#@7 @la\t", ["diff", "sweep#@7", "@latest"]),
        ("verify sweep --lev\tha\t", ["verify", "sweep", "--level", "hashes"]),
    ):
        shell.type(f"incckpt {keys}\n")
        assert shell.wait_for(tmp_path / "arguments").split() == expected


@pytest.mark.server
@pytest.mark.slow
def test_buckets_folders_runs_and_steps_on_s3(s3_server: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("incckpt.cli.urls._PATIENCE", 100.0)
    options = {name: s3_server[name] for name in ("key", "secret", "endpoint_url")}
    s3fs.S3FileSystem(**options).makedirs("completed/sweeps", exist_ok=True)
    incckpt.save({"x": 1}, "s3://completed/sweeps/one#lr3e-4", step=5, storage_options=options)
    given = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    one = "s3://completed/sweeps/one"
    for typed, expected in {
        "s3://comp": ["s3://completed", "s3://completed/"],
        "s3://completed/s": ["s3://completed/sweeps", "s3://completed/sweeps/"],
        f"{one}#": [f"{one}#lr3e-4", f"{one}#lr3e-4@"],
        f"{one}#lr3e-4@": [f"{one}#lr3e-4@{step}" for step in ("latest", "best", "5")],
    }.items():
        found = BashComplete(cli, {}, "incckpt", "_INCCKPT_COMPLETE").get_completions(["info", *given], typed)
        assert [item.value for item in found] == expected


@pytest.mark.slow
@pytest.mark.parametrize("place", ["s3://bucket/runs#", "nothing#", "s3:/a#b"])
def test_nothing_where_there_is_none_and_soon(place: str) -> None:
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    asked = {"_INCCKPT_COMPLETE": "bash_complete", "COMP_WORDS": f"incckpt list {place}", "COMP_CWORD": "9999"}
    with socket.socket() as silent:  # it listens, and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        where = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        done = subprocess.run(
            [sys.executable, "-m", "incckpt"], env=os.environ | path | asked | where, capture_output=True, check=False
        )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, b"", b"")


@pytest.mark.parametrize("shell_kind", ["bash", "zsh", "fish"])
def test_a_script_that_its_shell_takes(command: Command, shell_kind: str, tmp_path: Path) -> None:
    done = command("completion", shell_kind)
    assert (done.code, done.err) == (0, "")
    assert f"_INCCKPT_COMPLETE={shell_kind}_complete" in done.out
    if shutil.which(shell_kind):
        (tmp_path / "script").write_text(done.out)
        checked = subprocess.run([shell_kind, "-n", tmp_path / "script"], capture_output=True, text=True, check=False)
        assert (checked.returncode, checked.stderr) == (0, "")
