"""Scripts in processes of their own, for what ends a process or may hang it."""

from __future__ import annotations

import subprocess
import sys
from textwrap import dedent

HANGS = 120  # seconds until a process counts as hung


def run_script(script: str, *arguments: object, status: int = 0) -> str:
    """Run a script that begins with the usual imports, to its end with `status`; return what it printed."""
    start = "import atexit, os, signal, sys, threading, torch, incckpt\nM, d = incckpt.CheckpointManager, sys.argv[1]\n"
    command = [sys.executable, "-c", start + dedent(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS, check=False)
    assert done.returncode == status, done.stderr
    return done.stdout
