"""4-bit layers of bitsandbytes: a loader for what they save.

``Linear4bit`` saves its weight with what is needed to read it (block maxima, code, layout) and has no method that loads
this again. :func:`make_loadable` gives it one, for ``load_state_dict`` as well as for restores in place.
"""

from __future__ import annotations

from typing import Any

import torch

try:
    import bitsandbytes
    from bitsandbytes.functional import QuantState
except ImportError as error:
    raise ImportError("bitsandbytes is not installed: pip install bitsandbytes") from error

__all__ = ["make_loadable"]


def make_loadable(model: torch.nn.Module) -> torch.nn.Module:
    """Let the 4-bit layers of `model` load what they save, as they are and in place.

    Parameters
    ----------
    model
        With ``bitsandbytes.nn.Linear4bit`` layers, quantised already or not. Calling this twice does no harm.

    Returns
    -------
    model
        The same.

    Examples
    --------
    >>> model = make_loadable(build_quantised_model())  # doctest: +SKIP
    >>> manager.restore({"model": model})  # doctest: +SKIP
    """
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit) and not getattr(module, "_incckpt_loadable", False):
            module.register_load_state_dict_pre_hook(_load_weight)
            module._incckpt_loadable = True
    return model


def _load_weight(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Set the weight and its quantisation from `state`, and take out of that what torch's loader would not expect."""
    stem = f"{prefix}weight."
    stored = {name.removeprefix(stem): state.pop(name) for name in list(state) if name.startswith(stem)}
    if not stored:
        return
    weight = module.weight
    weight.data = state[f"{prefix}weight"].detach().to(weight.device).clone()
    weight.quant_state = QuantState.from_dict(stored, device=weight.device)
    weight.blocksize = weight.quant_state.blocksize
    weight.compress_statistics = weight.quant_state.nested
    weight.quant_type = weight.quant_state.quant_type
    weight.quant_storage = weight.data.dtype
    weight.bnb_quantized = True
    module.quant_state = weight.quant_state
