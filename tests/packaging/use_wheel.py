"""Use the incckpt that is installed, in the current folder: save, restore as deltas, verify, and miss what is an extra.

Prints the packages installed beside it.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path

import torch

import incckpt


def main() -> None:
    """Train a layer for three steps into a new folder, and load it back."""
    assert Path(incckpt.__file__).is_relative_to(sys.prefix), incckpt.__file__
    model = torch.nn.Linear(512, 512)
    optimizer = torch.optim.AdamW(model.parameters())
    app = {"model": model, "optimizer": optimizer}
    with tempfile.TemporaryDirectory(dir=".") as run:
        with incckpt.CheckpointManager(run, keep_last_n=2) as manager:
            for step in range(3):
                optimizer.zero_grad()
                loss = model(torch.randn(8, 512)).square().mean()
                loss.backward()
                optimizer.step()
                manager.save(step, app, metrics={"loss": loss.item()})
        restored = incckpt.load(run)
        for name, value in model.state_dict().items():
            assert torch.equal(restored["model"][name], value), name
        assert (Path(run) / "deltas").is_dir(), "nothing was stored as a delta"
        result = incckpt.verify(run)
        assert result, result
    try:
        incckpt.load("s3://bucket/run")
    except incckpt.errors.MissingExtraError as error:
        message = str(error)
    else:
        message = "no cloud library is installed, but S3 works"
    assert "incckpt[s3]" in message, message
    print(*sorted(distribution.name.lower() for distribution in distributions()))


if __name__ == "__main__":
    main()
