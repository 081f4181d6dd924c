"""Incremental checkpoints for PyTorch, stored content-addressed at a URL.

`save` and `load` stand in for ``torch.save`` and ``torch.load``; a `CheckpointManager` saves in the background of a
training loop, restores in place and prunes by policy.
"""

from incckpt import errors
from incckpt.api import load, save
from incckpt.collection import collect
from incckpt.errors import IncckptError
from incckpt.manager import CheckpointManager
from incckpt.retention import KeepAll, KeepBest, KeepEvery, KeepLast
from incckpt.run.checkpoint import Checkpoint
from incckpt.run.report import SaveReport
from incckpt.run.verify import Verified, VerifyResult, verify
from incckpt.state.rng import RngState
from incckpt.store.plan import CollectionPlan

__version__ = "0.2.0.dev0"

__all__ = [
    "Checkpoint",
    "CheckpointManager",
    "CollectionPlan",
    "IncckptError",
    "KeepAll",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "RngState",
    "SaveReport",
    "Verified",
    "VerifyResult",
    "__version__",
    "collect",
    "errors",
    "load",
    "save",
    "verify",
]
