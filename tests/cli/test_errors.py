"""Errors: one line, with the remedy and an exit code for each class; nothing secret in them."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import incckpt
from incckpt import errors
from incckpt.cli.errors import EXIT_CODES, Exit, code_of, message_of
from tests.cli.conftest import Command


def all_errors() -> list[type[BaseException]]:
    return [value for _, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, errors.IncckptError)]


@pytest.mark.parametrize("kind", all_errors())
def test_every_error_of_the_library_has_a_documented_code_and_one_line(kind: type[BaseException]) -> None:
    error = kind("what happened\nwhat to do")
    assert code_of(error) in EXIT_CODES
    assert code_of(error) != 0
    assert message_of(error) == "what happened what to do"


def test_what_python_calls_an_option_is_told_as_the_option(command: Command, store: str, tmp_path: Path) -> None:
    (tmp_path / "there.pt").touch()
    assert (
        "there.pt exists; give another target, or --overwrite\n" in command("export", store, tmp_path / "there.pt").err
    )
    assert "give --format, one of pt" in command("export", store, tmp_path / "there").err


def test_what_to_do_is_a_command(command: Command, store: str) -> None:
    shutil.copytree(Path(store, "runs"), Path(store).parent / "kept")
    shutil.rmtree(Path(store, "runs"))
    place = Path(store).as_uri()
    for done in (command("list", store), command("info", store)):
        assert f"see what 'incckpt recover {place}#default' would make" in done.err
    assert f"'incckpt recover {place}#default'" in command("recover", store).out
    shutil.copytree(Path(store).parent / "kept", Path(store, "runs"))
    ref = next(Path(store, "refs", "default").iterdir())
    ref.write_bytes(ref.read_bytes()[:-2])
    assert f"delete it: 'incckpt rm {place}#default@{int(ref.name.split('-')[1])}'" in command("gc", store).err


@pytest.mark.slow
@pytest.mark.parametrize("line", ["export {store} {place}/state.pt", "report {store} -o {place}/report.html"])
def test_a_file_that_cannot_be_written_is_no_bug(command: Command, store: str, tmp_path: Path, line: str) -> None:
    for place, code in (("/proc", Exit.USAGE), (str(tmp_path / "file"), Exit.USAGE)):
        (tmp_path / "file").touch()
        done = command(*line.format(store=store, place=place).split())
        assert done.code == code
        assert done.err.startswith(f"incckpt: error: {place}")
        assert "bug" not in done.err
        assert done.err.count("\n") == 1
    full = command(*line.format(store=store, place=tmp_path / ("a" * 300)).split())
    assert (full.code, "bug" in full.err) == (Exit.OTHER, False)


def test_a_more_special_class_is_not_hidden_by_its_base() -> None:
    """`KeyNotFoundError` is an `OSError` of the backend; `StoreReplacedError` a missing store; and so on."""
    assert code_of(errors.BackendPermissionError("no")) == Exit.REFUSED
    assert code_of(errors.BackendTimeoutError("no")) == Exit.BACKEND
    assert code_of(errors.MissingObjectError("no")) == Exit.DAMAGED
    assert code_of(errors.StoreReplacedError("no")) == Exit.NOT_FOUND
    assert code_of(errors.MissingExtraError("no")) == Exit.MISSING_EXTRA
    assert code_of(KeyError("no")) == Exit.OTHER


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["list"], Exit.USAGE, "Missing argument 'URL'; see 'incckpt list --help'"),
        (["lst", "x"], Exit.USAGE, "No such command 'lst'"),
        (["list", "--jsn", "x"], Exit.USAGE, "No such option"),
        (["list", "s3:/bucket"], Exit.USAGE, "two slashes"),
        (["list", "x#default@3"], Exit.USAGE, "leave out '@3'"),
        (["list", "x#a/b"], Exit.USAGE, "not a run name"),
        (["list", "-o", "endpoint", "x"], Exit.USAGE, "NAME=VALUE"),
        (["list", "missing"], Exit.NOT_FOUND, "there is no incckpt store"),
        (["info", "missing#@best"], Exit.NOT_FOUND, "there is no incckpt store"),
    ],
)
def test_what_is_not_usable(
    command: Command, arguments: list[str], code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = command(*arguments)
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith("incckpt: error: ")
    assert says in done.err
    assert done.err.count("\n") == 1
    done = command(*arguments, "--json")
    told = json.loads(done.err)
    assert (done.code, done.out, told["code"]) == (code, "", code)
    assert says in told["message"]


def test_a_bug_is_one_line_and_a_traceback_with_debug(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(incckpt, "list_checkpoints", broken)
    done = command("list", "x")
    assert (done.code, done.err.count("\n")) == (Exit.OTHER, 1)
    assert "ZeroDivisionError: a bug" in done.err
    assert "--debug" in done.err
    for arguments in (["list", "x", "--debug"], ["--debug", "list", "x"]):
        assert "Traceback" in command(*arguments).err


def test_ctrl_c(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(incckpt, "list_checkpoints", interrupted)
    done = command("list", "x")
    assert (done.code, done.err) == (130, "\nincckpt: error: interrupted\n")  # after the terminal's ^C


SECRETS = ("hunter2", "s3cr3t", "AKIAEXAMPLE")


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["list", "http://user:hunter2@127.0.0.1:1/store"], marks=pytest.mark.slow),
        pytest.param(["info", "http://127.0.0.1:1/store?token=s3cr3t"], marks=pytest.mark.slow),
        ["list", "ftp:/user:hunter2@host/store"],
        ["list", "missing", "-o", "secret=s3cr3t", "-o", "key=AKIAEXAMPLE"],
        ["list", "s3://user:hunter2@bucket/store#no run"],
    ],
)
def test_credentials_are_never_printed(
    command: Command, arguments: list[str], monkeypatch: pytest.MonkeyPatch, impatient: None, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)

    for flags in ([], ["--json"]):
        done = command(*arguments, *flags)
        assert done.code not in (0, Exit.OTHER)
        assert not [secret for secret in SECRETS if secret in done.out + done.err]


def run_python(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(incckpt.__file__).parents[1])}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, **options)  # type: ignore[call-overload, no-any-return]


@pytest.mark.slow
def test_help_needs_neither_torch_nor_a_network() -> None:
    program = (
        "import sys\nfrom incckpt.cli.app import command, run\n"
        "assert run(['--help']) == 0\n"
        "for name in command.list_commands(None): assert run([name, '--help']) == 0, name\n"
        "heavy = {'torch', 'numpy', 'aiohttp', 's3fs', 'botocore'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = run_python("-c", program)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Exit codes" in done.stdout


@pytest.mark.slow
def test_without_the_extra_it_says_what_to_install() -> None:
    program = "import sys; sys.modules['click'] = None; import incckpt.cli; incckpt.cli.main()"
    done = run_python("-c", program)
    assert done.returncode == Exit.MISSING_EXTRA
    assert done.stderr == 'incckpt: error: the command needs the package click: pip install "incckpt[cli]"\n'


@pytest.mark.slow
def test_as_a_module_with_a_reader_that_goes_away(store: str) -> None:
    done = run_python("-m", "incckpt", "list", store, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(json.loads(done.stdout)["checkpoints"]) == 4
    environment = os.environ | {"PYTHONPATH": str(Path(incckpt.__file__).parents[1])}
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        done_alone = subprocess.run(
            [sys.executable, "-m", "incckpt", "list", store],
            stdout=pipe,
            stderr=subprocess.PIPE,
            env=environment,
            check=False,
        )
    assert (done_alone.returncode, done_alone.stderr) == (0, b"")
