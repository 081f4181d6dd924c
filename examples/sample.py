"""Let a trained model write: all it takes is the URL of the checkpoints, on whatever machine this is.

    python examples/sample.py checkpoints               # the latest; or s3://bucket/gpt
    python examples/sample.py checkpoints#@60           # that of step 60; #@best, the one with the lowest loss

Only the model is fetched, neither optimizer nor anything else, and nothing is written: training may go on meanwhile.
"""

from __future__ import annotations

import argparse

import torch
from train_gpt import CONTEXT, GPT

import incckpt


def main() -> None:
    """Load and sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--length", type=int, default=300, help="bytes to write")
    options = parser.parse_args()

    weights = incckpt.load(options.url, keys="model.*", map_location="cpu")["model"]
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    model = GPT(weights["norm.weight"].numel(), depth)
    model.load_state_dict(weights)
    model.eval()

    generator = torch.Generator().manual_seed(1)
    text = torch.tensor([list(b"def ")])
    with torch.no_grad():
        for _ in range(options.length):
            odds = torch.softmax(model(text[:, -CONTEXT:])[0, -1] / 0.7, 0)
            text = torch.cat([text, torch.multinomial(odds, 1, generator=generator)[None]], 1)
    print(bytes(text[0].tolist()).decode("utf-8", "replace"))


if __name__ == "__main__":
    main()
