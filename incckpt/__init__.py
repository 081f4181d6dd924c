"""Incremental checkpoints for PyTorch, stored content-addressed at a URL.

`save` and `load` stand in for ``torch.save`` and ``torch.load``; a `CheckpointManager` saves in the background of a
training loop, restores in place and prunes by policy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from incckpt import errors
from incckpt.errors import IncckptError

if TYPE_CHECKING:
    from incckpt.api import load, save
    from incckpt.collection import collect
    from incckpt.copying import Copied, CopyResult, copy
    from incckpt.inspection.description import Description, describe
    from incckpt.inspection.diagnosis import Diagnosis, Finding, diagnose
    from incckpt.inspection.difference import Difference, TensorDifference, ValueDifference, diff
    from incckpt.inspection.listing import list_checkpoints, list_runs
    from incckpt.inspection.usage import Usage, usage
    from incckpt.manager import CheckpointManager
    from incckpt.preemption.notices import Notice
    from incckpt.preemption.preemption import Preemption
    from incckpt.pruning import PruningPlan, prune
    from incckpt.recovery import inventory, recover
    from incckpt.reporting.report import write_report
    from incckpt.retention import KeepAll, KeepBest, KeepEvery, KeepLast
    from incckpt.run.cadence import Cadence
    from incckpt.run.checkpoint import Checkpoint
    from incckpt.run.inventory import Inventory, InventoryItem
    from incckpt.run.progress import Progress
    from incckpt.run.recovery import RecoveryPlan
    from incckpt.run.report import SaveReport
    from incckpt.run.verify import Verified, VerifyResult, verify
    from incckpt.state.rng import RngState
    from incckpt.store.plan import CollectionPlan
    from incckpt.tiers.local import LocalTier

__version__ = "0.2.0.dev0"

__all__ = [
    "Cadence",
    "Checkpoint",
    "CheckpointManager",
    "CollectionPlan",
    "Copied",
    "CopyResult",
    "Description",
    "Diagnosis",
    "Difference",
    "Finding",
    "IncckptError",
    "Inventory",
    "InventoryItem",
    "KeepAll",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "LocalTier",
    "Notice",
    "Preemption",
    "Progress",
    "PruningPlan",
    "RecoveryPlan",
    "RngState",
    "SaveReport",
    "TensorDifference",
    "Usage",
    "ValueDifference",
    "Verified",
    "VerifyResult",
    "__version__",
    "collect",
    "copy",
    "describe",
    "diagnose",
    "diff",
    "errors",
    "inventory",
    "list_checkpoints",
    "list_runs",
    "load",
    "prune",
    "recover",
    "save",
    "usage",
    "verify",
    "write_report",
]

# What is public, by module. Modules are imported when a name of theirs is first used: `incckpt --help` and programs
# that only catch errors need not wait for torch.
_HOMES = {
    "api": ("load", "save"),
    "collection": ("collect",),
    "copying": ("Copied", "CopyResult", "copy"),
    "inspection.description": ("Description", "describe"),
    "inspection.diagnosis": ("Diagnosis", "Finding", "diagnose"),
    "inspection.difference": ("Difference", "TensorDifference", "ValueDifference", "diff"),
    "inspection.listing": ("list_checkpoints", "list_runs"),
    "inspection.usage": ("Usage", "usage"),
    "manager": ("CheckpointManager",),
    "recovery": ("inventory", "recover"),
    "reporting.report": ("write_report",),
    "preemption.notices": ("Notice",),
    "preemption.preemption": ("Preemption",),
    "pruning": ("PruningPlan", "prune"),
    "retention": ("KeepAll", "KeepBest", "KeepEvery", "KeepLast"),
    "run.cadence": ("Cadence",),
    "run.checkpoint": ("Checkpoint",),
    "run.inventory": ("Inventory", "InventoryItem"),
    "run.progress": ("Progress",),
    "run.recovery": ("RecoveryPlan",),
    "run.report": ("SaveReport",),
    "run.verify": ("Verified", "VerifyResult", "verify"),
    "state.rng": ("RngState",),
    "store.plan": ("CollectionPlan",),
    "tiers.local": ("LocalTier",),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'incckpt' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"incckpt.{module}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
