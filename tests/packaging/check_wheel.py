"""Check a wheel as a user meets it: ``python tests/packaging/check_wheel.py dist/incckpt-….whl``.

The wheel is installed into a new virtual environment and used from an empty folder, with nothing on the path but that
environment: no compiler, and no other file of this repository. Prints what it found; fails with what is wrong.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
import venv
import zipfile
from pathlib import Path

MOST_BYTES = 3 << 20
CLOUD = {"adlfs", "aiobotocore", "aiohttp", "azure-storage-blob", "boto3", "botocore", "gcsfs", "google-auth", "s3fs"}
EXTENSIONS = {
    "incckpt/backends/_files",
    "incckpt/codec/_planes",
    "incckpt/staging/_detect",
    "incckpt/state/_packing",
}

USE = Path(__file__).with_name("use_wheel.py").resolve()


def check_contents(wheel: Path) -> None:
    """Fail if the wheel is large, or has too little or too much in it."""
    size = wheel.stat().st_size
    names = zipfile.ZipFile(wheel).namelist()
    print(f"{wheel.name}: {size / 1e6:.2f} MB, {len(names)} files")
    assert size < MOST_BYTES, f"{size} bytes; at most {MOST_BYTES}"
    built = {name.partition(".")[0] for name in names if name.endswith((".so", ".pyd")) and ".libs/" not in name}
    assert built == EXTENSIONS, built ^ EXTENSIONS
    needed = {"incckpt/py.typed", "incckpt/reporting/template.html", "incckpt/reporting/report.css"}
    assert needed <= set(names), needed - set(names)
    others = {
        name.partition("/")[0] for name in names if not name.startswith(("incckpt/", "incckpt-", "incckpt.libs/"))
    }
    assert not others, others


def check_use(wheel: Path, constraints: Path) -> None:
    """Install the wheel where there is nothing else, and use it."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder, "venv")
        venv.create(home, with_pip=True)
        python = home / "bin" / "python"
        install: list[str | Path] = [
            python,
            "-m",
            "pip",
            "install",
            "--disable-pip-version-check",
            "--quiet",
            "--only-binary",
            ":all:",
        ]
        subprocess.run([*install, "--constraint", constraints, wheel], check=True)
        assert shutil.which("cc", path=python.parent) is None
        empty = Path(folder, "empty")
        empty.mkdir()
        done = subprocess.run(
            [python, "-I", "-W", "error", USE],
            cwd=empty,
            env={"PATH": str(home / "bin")},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert done.returncode == 0, "the installed wheel does not work"
        installed = set(done.stdout.split())
        assert installed.isdisjoint(CLOUD), installed & CLOUD
        print(f"installed and used without a compiler; {len(installed)} packages, no cloud library among them")


def main() -> None:
    """Check the wheels named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("--constraints", type=Path, default=Path("constraints.txt"))
    parser.add_argument("--contents-only", action="store_true", help="for a wheel of another platform")
    options = parser.parse_args()
    for wheel in options.wheels:
        check_contents(wheel)
        if not options.contents_only:
            check_use(wheel.resolve(), options.constraints.resolve())


if __name__ == "__main__":
    main()
