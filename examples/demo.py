"""Train, be killed in the middle of a save, resume, and end up where an undisturbed run does, bit for bit.

    make demo

Three runs of `train_gpt.py`'s training: one that is killed with SIGKILL, one that resumes it, and one, for comparison,
that is not disturbed and saves with ``torch.save``. All that is printed at the end was measured.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from train_gpt import Training

import incckpt

HERE = Path(__file__).resolve().parent
RULE = "-" * 78


class DemoError(Exception):
    """What the demo shows did not happen."""


def say(text: str) -> None:
    """Print a heading."""
    print(f"\n{RULE}\n{text}\n{RULE}", flush=True)


def stop(process: subprocess.Popen[bytes]) -> bool:
    """Stop a child; return whether it stands still now, and not because it has ended."""
    process.send_signal(signal.SIGSTOP)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        return True
    process.returncode = os.waitstatus_to_exitcode(status)
    return False


class Child:
    """Training in a process of its own."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.store: Path = options.folder / "store"
        self.log: Path = options.folder / "losses.txt"
        self.command = [sys.executable, str(HERE / "train_gpt.py"), "--store", str(self.store), "--log", str(self.log)]
        for name in ("steps", "every", "width", "depth"):
            self.command += [f"--{name}", str(getattr(options, name))]

    def train(self) -> None:
        """Train to the end."""
        subprocess.run(self.command, check=True)

    def train_and_kill(self, after: int) -> str | None:
        """Train, and kill the process in the middle of a save beyond step `after`.

        It is stopped for a look at the store: when objects of the save are there and its ref is not, it is killed.

        Returns
        -------
        str or None
            The name of the ref that the killed save was about to create; ``None`` if training came to its end.
        """
        process = subprocess.Popen(self.command)
        try:
            while process.poll() is None:
                for name in self.being_saved():
                    if int(name.split("-")[1]) > after and stop(process):
                        if self.objects_of(name) and not self.committed(name):
                            return name
                        process.send_signal(signal.SIGCONT)
                time.sleep(0.0005)
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            raise DemoError(f"training ended with status {process.returncode}")
        return None

    def being_saved(self) -> list[str]:
        """Return the names of the refs that saves in flight have announced: their pins."""
        folder = self.store / "pins" / "default"
        return [path.name for path in folder.iterdir() if path.name[0] != "."] if folder.exists() else []

    def committed(self, name: str) -> bool:
        """Whether the checkpoint exists: whether its ref does."""
        return (self.store / "refs" / "default" / name).exists()

    def objects_of(self, name: str) -> int:
        """Return how many objects this save has put; their names end with its nonce."""
        nonce = name.split("-")[2]
        return sum(1 for kind in ("objects", "deltas") for _ in (self.store / kind).glob(f"*/*.{nonce}"))

    def losses(self) -> dict[int, list[str]]:
        """Return all losses logged for each step, as hexadecimal floats; a step trained again has several."""
        found: dict[int, list[str]] = {}
        for line in self.log.read_text().splitlines():
            step, loss, _ = line.split()
            found.setdefault(int(step), []).append(loss)
        return found

    def waited(self) -> list[float]:
        """Return the seconds that training waited for each save."""
        lines = [line.split() for line in self.log.read_text().splitlines()]
        return [float(seconds) for _, _, seconds in lines if float(seconds)]


def undisturbed(options: argparse.Namespace) -> tuple[dict[int, str], dict[int, int], list[float]]:
    """Train in this process, with ``torch.save``; return losses and file sizes by step, and each save's seconds."""
    training = Training(options.steps, options.width, options.depth)
    path = options.folder / "torch.save.pt"
    losses, sizes, seconds = {}, {}, []
    for step in range(1, options.steps + 1):
        losses[step] = training.step().hex()
        if step % options.every == 0:
            started = time.perf_counter()
            torch.save({name: part.state_dict() for name, part in training.app.items()}, path)
            seconds.append(time.perf_counter() - started)
            sizes[step] = path.stat().st_size
    return losses, sizes, seconds


def show_losses(disturbed: dict[int, list[str]], reference: dict[int, str], killed_at: int) -> None:
    """Compare the losses, bit for bit.

    Raises
    ------
    DemoError
        At the first that differs.
    """
    print("  step   killed and resumed     never disturbed")
    shown = {1, *range(len(reference) // 5, len(reference) + 1, max(1, len(reference) // 5)), killed_at, len(reference)}
    for step, loss in reference.items():
        if disturbed.get(step) is None or any(other != loss for other in disturbed[step]):
            raise DemoError(f"step {step}: the losses are {disturbed.get(step)} and {loss}")
        if step in shown:
            print(f"{step:6}   {disturbed[step][-1]:<20}   {loss:<20}   {float.fromhex(loss):.4f}")
    again = sum(len(each) > 1 for each in disturbed.values())
    print(
        f"All {len(reference)} losses are identical to the last bit; {again} steps were trained twice, to the same one."
    )


def show_checkpoints(store: Path, sizes: dict[int, int]) -> None:
    """Print what each checkpoint took, beside what torch.save took for the same step."""
    print("  step     loss       state   incckpt wrote   torch.save wrote")
    with incckpt.CheckpointManager(store, read_only=True) as manager:
        checkpoints = manager.checkpoints()
    for one in checkpoints:
        numbers = f"{one.nbytes / 1e6:6.2f} MB   {one.written / 1e6:10.2f} MB   {sizes[one.step] / 1e6:13.2f} MB"
        print(f"{one.step:6}   {one.metrics['loss']:.4f}   {numbers}")
    written, whole = sum(one.written for one in checkpoints), sum(sizes.values())
    print(f"{'all':>6}   {written / 1e6:33.2f} MB   {whole / 1e6:13.2f} MB   ({written / whole:.0%})")
    print("(Training from scratch changes every weight and both moments of Adam in every step: the hardest case.)")


def show_waiting(incremental: list[float], whole: list[float]) -> None:
    """Print how long training waited for the saves."""
    print("Training waited, per save      median        max")
    for name, seconds in (("incckpt", incremental), ("torch.save", whole)):
        print(f"  {name:<26}{statistics.median(seconds) * 1e3:7.1f} ms {max(seconds) * 1e3:7.1f} ms")


def main() -> None:
    """Run the three acts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=HERE.parent / ".demo", help="for the store, replaced if there")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--depth", type=int, default=2)
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    options.folder.mkdir(parents=True, exist_ok=True)
    child = Child(options)
    shutil.rmtree(child.store, ignore_errors=True)
    child.log.unlink(missing_ok=True)
    started = time.perf_counter()

    say("1  A small GPT learns the Python standard library, and is killed while saving (kill -9).")
    name = child.train_and_kill(options.steps // 2)
    if name is None:
        raise DemoError("every save was committed before the kill came; try again")
    killed_at = int(name.split("-")[1])
    print(f"Killed while saving step {killed_at}. The store has {child.objects_of(name)} of that save's objects and")
    print("the announcement of its ref, but no ref: there is no such checkpoint, and the one before is whole.")

    say("2  A new process resumes.")
    child.train()

    say("3  The same training again, undisturbed, and with torch.save.")
    reference, sizes, seconds = undisturbed(options)
    print(f"{options.steps} steps, {len(sizes)} files.")

    say("4  Is it the same training?")
    show_losses(child.losses(), reference, killed_at)

    say("5  What did it cost?")
    show_checkpoints(child.store, sizes)
    print()
    show_waiting(child.waited(), seconds)

    say("6  Fine-tune the result with low-rank adapters, in a run of its own in the same store.")
    subprocess.run([sys.executable, str(HERE / "finetune_lora.py"), str(child.store)], check=True)
    print(f"\n{time.perf_counter() - started:.0f} seconds. Look around in {options.folder}.")


if __name__ == "__main__":
    try:
        main()
    except DemoError as error:
        sys.exit(f"demo: {error}")
