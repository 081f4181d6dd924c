"""The page: a history as JSON inside a template, with style and scripts inline."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import time
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from incckpt.reporting import heatmap
from incckpt.reporting.components import Component
from incckpt.reporting.heatmap import HeatMap, Mover
from incckpt.reporting.history import Branch, Column, History
from incckpt.run.checkpoint import Checkpoint
from incckpt.store.document import Json, encode_float

__all__ = ["render"]

_SCRIPTS = ("base.js", "charts.js", "heatmap.js", "page.js")
_MOST_METRICS = 48
_MOST_PROBLEMS = 20
_MOST_FROZEN = 200
_MOST_BRANCHES = 200
_MOST_NAME = 512  # characters


def render(history: History) -> str:
    """Return the page, complete: it loads nothing."""
    style, script = _asset("report.css"), "\n".join(map(_asset, _SCRIPTS))
    script = f'(() => {{\n"use strict";\n{script}}})();'
    policy = (
        f"default-src 'none'; img-src data:; style-src {_allowed(style)}; script-src {_allowed(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    values = {
        "policy": html.escape(policy),
        "title": html.escape(f"{history.run} – incckpt report"),
        "style": style,
        "run": html.escape(history.run),
        "url": html.escape(history.url),
        "footer": html.escape(f"Made by incckpt, {made}. Sizes are in powers of 1000."),
        "data": _inline_json(_data(history)),
        "script": script,
    }
    # One pass: what is put in is not looked at again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], _asset("template.html"))


def _asset(name: str) -> str:
    return files("incckpt.reporting").joinpath(name).read_text(encoding="utf-8")


def _allowed(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _inline_json(data: Json) -> str:
    """Return JSON that ends no element, whatever its strings hold."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _data(history: History) -> dict[str, Json]:
    names = list(dict.fromkeys(name for column in history.columns for name in column.checkpoint.metrics))
    shown = names[:_MOST_METRICS]
    groups = _groups(history.columns, history.heat_map.merged)
    checkpoints = [column.checkpoint for column in history.columns]
    return {
        "checkpoints": len(history.columns),
        "merged": history.heat_map.merged,
        "columns": _columns(groups, shown),
        "metrics": [_cut(name) for name in shown],
        "hidden_metrics": len(names) - len(shown),
        "totals": {
            "full": sum(checkpoint.nbytes for checkpoint in checkpoints),
            "stored": sum(column.new_bytes or 0 for column in history.columns),
        },
        "attempts": _attempts(checkpoints),
        "branches": [_branch(branch, shown) for branch in history.branches[:_MOST_BRANCHES]],
        "hidden_branches": max(0, len(history.branches) - _MOST_BRANCHES),
        "components": [_component(component) for component in history.components],
        "heat": _heat(history.heat_map),
        "problems": [_cut(problem) for problem in history.problems[:_MOST_PROBLEMS]],
        "hidden_problems": max(0, len(history.problems) - _MOST_PROBLEMS),
    }


def _groups(columns: Sequence[Column], merged: int) -> list[Sequence[Column]]:
    """Return the checkpoints that each column of the page stands for."""
    return [columns[start : start + merged] for start in range(0, len(columns), merged)]


def _columns(groups: Sequence[Sequence[Column]], metrics: Sequence[str]) -> dict[str, Json]:
    """Return what is known of the checkpoints, by column: of several, sums of bytes, and the longest wait."""
    last = [group[-1].checkpoint for group in groups]
    waits = [max((column.blocked or {} for column in group), key=_total) for group in groups]
    return {
        "step": [checkpoint.step for checkpoint in last],
        "attempt": [checkpoint.attempt for checkpoint in last],
        "time": [round(checkpoint.time, 1) for checkpoint in last],
        "full": [sum(column.checkpoint.nbytes for column in group) for group in groups],
        "written": [sum(column.checkpoint.written for column in group) for group in groups],
        "stored": [sum(column.new_bytes or 0 for column in group) for group in groups],
        "blocked": {
            phase: [None if not wait else round(wait.get(phase, 0.0), 6) for wait in waits]
            for phase in ("wait", "flatten", "stage")
        },
        "since": [group[-1].since for group in groups],
        "metrics": [_metric(last, name) for name in metrics],
    }


def _total(blocked: Mapping[str, float]) -> float:
    return sum(blocked.values())


def _metric(checkpoints: Sequence[Checkpoint], name: str) -> list[Json]:
    return [
        encode_float(checkpoint.metrics[name]) if name in checkpoint.metrics else None for checkpoint in checkpoints
    ]


def _attempts(checkpoints: Sequence[Checkpoint]) -> list[Json]:
    """Return ``[attempt, first step, last step, checkpoints]`` of each stretch that one attempt wrote."""
    stretches: list[list[int]] = []
    for checkpoint in checkpoints:
        if not stretches or stretches[-1][0] != checkpoint.attempt:
            stretches.append([checkpoint.attempt, checkpoint.step, checkpoint.step, 0])
        stretches[-1][2] = checkpoint.step
        stretches[-1][3] += 1
    return stretches


def _branch(branch: Branch, metrics: Sequence[str]) -> dict[str, Json]:
    shown = list(branch.checkpoints)
    thinned = shown[:: -(-len(shown) // heatmap.MOST_COLUMNS) or 1]
    if shown and thinned[-1] is not shown[-1]:
        thinned.append(shown[-1])
    return {
        "attempt": branch.attempt,
        "parent": branch.parent,
        "count": len(shown),
        "step": [checkpoint.step for checkpoint in thinned],
        "metrics": [_metric(thinned, name) for name in metrics],
        "written": sum(checkpoint.written for checkpoint in shown),
    }


def _component(component: Component) -> dict[str, Json]:
    found: dict[str, Any] = {
        "name": None if component.name is None else _cut(component.name),
        "tensors": component.tensors,
        "bytes": component.nbytes,
        "stored": round(component.stored),
        "dtypes": [_cut(dtype) for dtype, _ in component.dtypes.most_common(4)],
        "others": component.others,
        "parts": [_component(part) for part in component.parts],
    }
    return found


def _heat(heat_map: HeatMap) -> dict[str, Json]:
    return {
        "rows": [_cut(name) for name in heat_map.rows],
        "cells": base64.b64encode(heat_map.cells.tobytes()).decode(),
        "lowest": heatmap.LOWEST,
        "highest": heatmap.HIGHEST,
        "depth": heat_map.depth,
        "tensors": heat_map.tensors,
        "jumped": [_mover(mover) for mover in heat_map.jumped],
        "learning": [_mover(mover) for mover in heat_map.learning],
        "frozen": [_cut(name) for name in heat_map.frozen[:_MOST_FROZEN]],
        "frozen_count": len(heat_map.frozen),
    }


def _mover(mover: Mover) -> list[Json]:
    return [
        _cut(mover.name),
        float(f"{mover.relative:.3g}"),
        None if mover.usual is None else float(f"{mover.usual:.3g}"),
    ]


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_NAME else f"{text[: _MOST_NAME // 2]}…{text[-_MOST_NAME // 2 :]}"
