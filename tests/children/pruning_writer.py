"""Saves to a folder without a pause, keeping only the last checkpoint, until its standard input closes.

Usage: python -m tests.children.pruning_writer FOLDER
"""

from __future__ import annotations

import sys
import threading

import torch

import incckpt


def main() -> None:
    ended = threading.Thread(target=sys.stdin.read, daemon=True)
    ended.start()
    with incckpt.CheckpointManager(sys.argv[1], keep_last_n=1) as manager:
        step = 0
        while ended.is_alive():
            step += 1
            manager.save(step, {"w": torch.full((1000,), step), "step": step}).result()
            if step == 1:
                print("saved", flush=True)
    print(step, flush=True)


if __name__ == "__main__":
    main()
