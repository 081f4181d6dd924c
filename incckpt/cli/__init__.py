"""The command `incckpt`: prints what the library finds out, and does what it is told."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line of this process, and exit."""
    try:
        from incckpt.cli.app import run
    except ModuleNotFoundError as error:
        if error.name not in ("click", "rich"):
            raise
        print(
            f'incckpt: error: the command needs the package {error.name}: pip install "incckpt[cli]"', file=sys.stderr
        )
        sys.exit(7)
    sys.exit(run(sys.argv[1:]))
