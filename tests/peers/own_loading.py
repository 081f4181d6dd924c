"""Modules, optimizers and other objects that save and load in ways of their own, as people write them.

The docstring of each is its name in the table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["MODULES", "OBJECTS", "OPTIMIZERS"]


class _Swapping(nn.Module):
    """load_state_dict swaps two entries."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.a - 2 * self.b)

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        return super().load_state_dict({"a": state_dict["b"], "b": state_dict["a"]}, *args, **kwargs)


class _Blending(nn.Module):
    """_load_from_state_dict blends what it loads with what it has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        with torch.no_grad():
            self.weight.copy_((self.weight + state_dict[f"{prefix}weight"]) / 2)


class _Growing(nn.Module):
    """_load_from_state_dict resizes a buffer to what it loads."""

    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 4)
        self.register_buffer("seen", torch.zeros(0, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = torch.cat([self.seen, x[:1].detach()])
        result: torch.Tensor = self.inner(x + self.seen.mean(0))
        return result

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.seen = torch.empty_like(state_dict[f"{prefix}seen"])
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Replacing(nn.Module):
    """_load_from_state_dict keeps the loaded tensor itself."""

    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 4)
        self.register_buffer("table", torch.randn(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(x) * self.table.sum()
        return result

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.table = state_dict[f"{prefix}table"]
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Packing(nn.Module):
    """state_dict packs two parameters as one, and load_state_dict unpacks them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.a + x @ self.b

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {"packed": torch.cat([self.a.detach(), self.b.detach()])}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        with torch.no_grad():
            self.a.copy_(state_dict["packed"][:6])
            self.b.copy_(state_dict["packed"][6:])


class _Saving(nn.Module):
    """_save_to_state_dict saves less than there is, and load_state_dict is lenient."""

    def __init__(self) -> None:
        super().__init__()
        self.kept, self.derived = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.zeros(4), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.kept + self.derived

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}kept"] = self.kept if keep_vars else self.kept.detach()

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(state_dict, strict=False, assign=assign)


class _Prefixed(nn.Module):
    """a pre-hook for loading renames keys."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 4)
        self.register_load_state_dict_pre_hook(self._strip)
        self.register_state_dict_post_hook(self._add)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(x)
        return result

    @staticmethod
    def _add(module: Any, state: Any, prefix: str, *_: Any) -> None:
        for key in [key for key in state if key.startswith(prefix)]:
            state[f"{prefix}old_{key.removeprefix(prefix)}"] = state.pop(key)

    @staticmethod
    def _strip(module: Any, state: Any, prefix: str, *_: Any) -> None:
        for key in [key for key in state if key.startswith(f"{prefix}old_")]:
            state[prefix + key.removeprefix(f"{prefix}old_")] = state.pop(key)


class _Scaling(nn.Module):
    """hooks scale what is saved, and undo it at loading."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 4)
        self._register_state_dict_hook(self._scale)
        self._register_load_state_dict_pre_hook(self._unscale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(x)
        return result

    @staticmethod
    def _scale(module: Any, state: Any, prefix: str, *_: Any) -> Any:
        for key in [key for key in state if key.startswith(prefix)]:
            state[key] = state[key] * 2
        return state

    @staticmethod
    def _unscale(state: Any, prefix: str, *_: Any) -> None:
        for key in [key for key in state if key.startswith(prefix)]:
            state[key] = state[key] / 2


class _Forgiving(nn.Module):
    """a post-hook forgives missing keys."""

    def __init__(self) -> None:
        super().__init__()
        self.kept, self.left_out = nn.Linear(6, 4), nn.Linear(6, 4).requires_grad_(False)
        nn.init.ones_(self.left_out.weight)
        nn.init.zeros_(self.left_out.bias)
        self.register_state_dict_post_hook(self._leave_out)
        self.register_load_state_dict_post_hook(self._forgive)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.kept(x) + self.left_out(x)
        return result

    @staticmethod
    def _leave_out(module: Any, state: Any, prefix: str, *_: Any) -> None:
        for key in [key for key in state if key.startswith(f"{prefix}left_out")]:
            del state[key]

    @staticmethod
    def _forgive(module: Any, keys: Any) -> None:
        keys.missing_keys[:] = [key for key in keys.missing_keys if "left_out" not in key]


class _Tensor(nn.Module):
    """extra state that is a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = nn.Linear(6, 4), torch.zeros(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + 1
        result: torch.Tensor = self.inner(x) * self.calls.sum()
        return result

    def get_extra_state(self) -> Any:
        return self.calls

    def set_extra_state(self, state: Any) -> None:
        self.calls = state


class _Nested(_Tensor):
    """extra state that is a dict of tensors and numbers, and changes its size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = torch.cat([self.calls, torch.ones(1)])
        result: torch.Tensor = self.inner(x) * self.calls.sum()
        return result

    def get_extra_state(self) -> Any:
        return {
            "calls": self.calls,
            "count": len(self.calls),
            "history": [float(x) for x in self.calls],
            "note": ("a", None),
        }

    def set_extra_state(self, state: Any) -> None:
        assert state["count"] == len(state["calls"]) == len(state["history"])
        assert state["note"] == ("a", None)
        self.calls = state["calls"]


class _Bytes(_Tensor):
    """extra state that is pickled bytes in a tensor, as TransformerEngine's."""

    def get_extra_state(self) -> Any:
        return torch.frombuffer(bytearray(str(self.calls.tolist()).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        self.calls = torch.tensor([float(x) for x in bytes(state.tolist()).decode().strip("[]").split(",")])


class _Versioned(nn.Module):
    """a _version, and _load_from_state_dict that looks at it."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(x)
        return result

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        if local_metadata.get("version") != 2:
            raise RuntimeError(f"saved by version {local_metadata.get('version')}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class _Assigning(nn.Module):
    """load_state_dict assigns in place of copying."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 4).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(x)
        return result

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(state_dict, strict=strict, assign=True)


class _Late(nn.Module):
    """parameters that exist only once something is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 4)
        self.adapters = nn.ModuleDict()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 2 and not self.adapters:
            self.adapters["one"] = nn.Linear(6, 4)
        result: torch.Tensor = self.inner(x)
        for adapter in self.adapters.values():
            result = result + adapter(x)
        return result

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for key in state_dict:
            if key.startswith(f"{prefix}adapters."):
                name = key.removeprefix(f"{prefix}adapters.").split(".")[0]
                if name not in self.adapters:
                    self.adapters[name] = nn.Linear(6, 4)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Renaming(torch.optim.Adam):
    """an optimizer whose state_dict has other names."""

    def state_dict(self) -> Any:
        state = super().state_dict()
        return {"moments": state["state"], "groups": state["param_groups"]}

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict({"state": state_dict["moments"], "param_groups": state_dict["groups"]})


class _Wrapping(torch.optim.SGD):
    """an optimizer whose state_dict holds that of its base."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr=lr, momentum=0.9)
        self.calls = 0

    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        with torch.no_grad():
            for group in self.param_groups:
                group["lr"] = 0.05 / self.calls
        return super().step(closure)

    def state_dict(self) -> Any:
        return {"base": super().state_dict(), "calls": self.calls}

    def load_state_dict(self, state_dict: Any) -> None:
        self.calls = state_dict["calls"]
        super().load_state_dict(state_dict["base"])


class _Emptying(torch.optim.SGD):
    """an optimizer whose load_state_dict empties the dict it is given."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr=lr, momentum=0.9)

    def load_state_dict(self, state_dict: Any) -> None:
        groups, state = state_dict.pop("param_groups"), state_dict.pop("state")
        super().load_state_dict({"param_groups": groups, "state": state})


class _Hooked(torch.optim.Adam):
    """an optimizer with hooks that scale its state when it is saved, and undo that when it is loaded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_state_dict_post_hook(lambda optimizer, state: _scaled(state, 2.0))
        self.register_load_state_dict_pre_hook(lambda optimizer, state: _scaled(state, 0.5))


class _Counting(torch.optim.SGD):
    """an optimizer with a hook after loading that derives what was not saved."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr=lr, momentum=0.9)
        self.norm = 0.0
        self.register_load_state_dict_post_hook(lambda _: self._derive())

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        self._derive()
        with torch.no_grad():
            for group in self.param_groups:
                group["lr"] = 0.05 / (1 + self.norm)
        return result

    def _derive(self) -> None:
        self.norm = float(sum(state["momentum_buffer"].norm() for state in self.state.values()))


def _scaled(state: Any, factor: float) -> Any:
    scaled = {
        number: {key: value * factor if key.startswith("exp") else value for key, value in values.items()}
        for number, values in state["state"].items()
    }
    return {"state": scaled, "param_groups": state["param_groups"]}


class _Sampler:
    """an object that keeps the loaded list and tensor themselves."""

    def __init__(self) -> None:
        self.order, self.weights, self.at = torch.randperm(20).tolist(), torch.rand(20), 0

    def step(self) -> Any:
        self.at += 1
        self.weights[self.order[self.at]] += 1
        self.order[self.at], self.order[0] = self.order[0], self.order[self.at]
        return [self.order[self.at], self.weights]

    def state_dict(self) -> Any:
        return vars(self)

    def load_state_dict(self, state_dict: Any) -> None:
        vars(self).update(state_dict)


class _Buffer:
    """an object whose state grows, and is compressed by its state_dict."""

    def __init__(self) -> None:
        self.rows = [torch.rand(3)]

    def step(self) -> Any:
        self.rows.append(torch.rand(3) + self.rows[-1])
        return self.rows[-1]

    def state_dict(self) -> Any:
        return {"rows": torch.stack(self.rows), "count": len(self.rows)}

    def load_state_dict(self, state_dict: Any) -> None:
        assert len(state_dict["rows"]) == state_dict["count"]
        self.rows = list(state_dict["rows"])


class _Stacked(_Buffer):
    """an object whose state_dict is a tensor."""

    def state_dict(self) -> Any:
        return torch.stack(self.rows)

    def load_state_dict(self, state_dict: Any) -> None:
        self.rows = list(state_dict)


class _List(_Buffer):
    """an object whose state_dict is a list."""

    def state_dict(self) -> Any:
        return [*self.rows, None, "a", (1, 2.5)]

    def load_state_dict(self, state_dict: Any) -> None:
        *self.rows, nothing, letter, pair = state_dict
        assert (nothing, letter, pair) == (None, "a", (1, 2.5))


class _Composite:
    """an object that asks the objects in it."""

    def __init__(self) -> None:
        self.parts: dict[Any, Any] = {"sampler": _Sampler(), 7: _Buffer()}

    def step(self) -> Any:
        return [part.step() for part in self.parts.values()]

    def state_dict(self) -> Any:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: Any) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])


MODULES: tuple[type[nn.Module], ...] = (
    _Swapping,
    _Blending,
    _Growing,
    _Replacing,
    _Packing,
    _Saving,
    _Prefixed,
    _Scaling,
    _Forgiving,
    _Tensor,
    _Nested,
    _Bytes,
    _Versioned,
    _Assigning,
    _Late,
)
OPTIMIZERS: tuple[type[torch.optim.Optimizer], ...] = (_Renaming, _Wrapping, _Emptying, _Hooked, _Counting)
OBJECTS: tuple[Any, ...] = (_Sampler, _Buffer, _Stacked, _List, _Composite)
