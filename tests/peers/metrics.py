"""Metrics of torchmetrics: every class that one of a few constructors makes and one of a few kinds of input suits."""

from __future__ import annotations

import functools
import importlib
import inspect
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torchmetrics
from torchmetrics import wrappers

from tests.peers.protocol import App, Case

__all__ = ["metrics"]

PACKAGES = (
    "aggregation", "audio", "classification", "clustering", "detection", "image", "nominal", "regression", "retrieval",
    "segmentation", "shape", "text",
)  # fmt: skip
NUMBER = 5
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "more", "dog", "run", "past", "it"]

Inputs = Callable[[], tuple[Any, ...]]


def _sentence() -> str:
    return " ".join(random.choices(WORDS, k=8))


def _labels() -> torch.Tensor:
    return torch.randint(0, NUMBER, (16,))


def _boxes() -> list[dict[str, torch.Tensor]]:
    corners = torch.rand(3, 2) * 50
    return [
        {"boxes": torch.cat([corners, corners + 20], 1), "scores": torch.rand(3), "labels": torch.randint(0, 2, (3,))}
    ]


INPUTS: dict[str, Inputs] = {  # the large ones last: a metric that compares all pixels with all takes gigabytes
    "scores": lambda: (torch.rand(16), torch.randint(0, 2, (16,))),
    "class scores": lambda: (torch.rand(16, NUMBER).softmax(1), _labels()),
    "label scores": lambda: (torch.rand(16, NUMBER), torch.randint(0, 2, (16, NUMBER))),
    "retrieval": lambda: (torch.rand(16), torch.randint(0, 2, (16,)), torch.arange(16) // 4),
    "groups": lambda: (torch.rand(16), torch.randint(0, 2, (16,)), torch.arange(16) % 2),
    "values": lambda: (torch.rand(16) + 0.1, torch.rand(16) + 0.1),
    "one value": lambda: (torch.rand(7),),
    "rows": lambda: (torch.rand(16, NUMBER).softmax(1), torch.rand(16, NUMBER).softmax(1)),
    "labels": lambda: (_labels(), _labels()),
    "data and labels": lambda: (torch.rand(16, 3), _labels()),
    "ratings": lambda: (torch.randint(0, 10, (16, NUMBER)),),
    "signals": lambda: (torch.randn(2, 400), torch.randn(2, 400)),
    "sources": lambda: (torch.randn(2, 2, 400), torch.randn(2, 2, 400)),
    "spectra": lambda: (torch.randn(2, 2, 20, 2), torch.randn(2, 2, 20, 2)),
    "masks": lambda: (torch.randint(0, 2, (2, NUMBER, 16, 16)), torch.randint(0, 2, (2, NUMBER, 16, 16))),
    "panoptic": lambda: (torch.randint(0, 2, (2, 8, 8, 2)), torch.randint(0, 2, (2, 8, 8, 2))),
    "point clouds": lambda: (torch.randn(2, 10, 3), torch.randn(2, 10, 3)),
    "tokens": lambda: (torch.randn(2, 8, NUMBER), torch.randint(0, NUMBER, (2, 8))),
    "ensembles": lambda: (torch.randn(8, 4), torch.randn(8)),
    "boxes": lambda: (_boxes(), _boxes()),
    "images": lambda: (torch.rand(2, 3, 48, 48), torch.rand(2, 3, 48, 48)),
    "grey images": lambda: (torch.rand(2, 1, 48, 48), torch.rand(2, 1, 48, 48)),
    "fused images": lambda: (
        torch.rand(2, 3, 32, 32),
        {"ms": torch.rand(2, 3, 16, 16), "pan": torch.rand(2, 3, 32, 32)},
    ),
    "one image": lambda: (torch.rand(2, 3, 48, 48),),
    "sentences": lambda: ([_sentence() for _ in range(3)], [_sentence() for _ in range(3)]),
    "references": lambda: ([_sentence() for _ in range(3)], [[_sentence(), _sentence()] for _ in range(3)]),
    "answers": lambda: (
        [{"prediction_text": _sentence(), "id": "a"}],
        [{"answers": {"answer_start": [0], "text": [_sentence()]}, "id": "a"}],
    ),
    "large images": lambda: (torch.rand(2, 3, 180, 180), torch.rand(2, 3, 180, 180)),
}

ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"num_classes": NUMBER},
    {"num_labels": NUMBER},
    {"num_groups": 2},
    {"num_classes": NUMBER, "input_format": "index"},
    {"num_outputs": NUMBER},
    {"min_recall": 0.5, "num_classes": NUMBER},
    {"min_recall": 0.5, "num_labels": NUMBER},
    {"min_recall": 0.5},
    {"min_precision": 0.5, "num_classes": NUMBER},
    {"min_precision": 0.5, "num_labels": NUMBER},
    {"min_precision": 0.5},
    {"min_sensitivity": 0.5, "num_classes": NUMBER},
    {"min_sensitivity": 0.5, "num_labels": NUMBER},
    {"min_sensitivity": 0.5},
    {"min_specificity": 0.5, "num_classes": NUMBER},
    {"min_specificity": 0.5, "num_labels": NUMBER},
    {"min_specificity": 0.5},
    {"beta": 2.0, "num_classes": NUMBER},
    {"beta": 2.0, "num_labels": NUMBER},
    {"beta": 2.0},
    {"p": 3},
    {"data_range": 1.0},
    {"threshold": 0.5},
    {"things": {0}, "stuffs": {1}},
    {"metric_func": torchmetrics.functional.audio.scale_invariant_signal_noise_ratio},
]


def metrics() -> Iterator[Case]:
    """Yield a case for every metric that can be made and fed, and one that says so for every other."""
    for package in PACKAGES:
        module = importlib.import_module(f"torchmetrics.{package}")
        for name in sorted(dir(module)):
            cls = getattr(module, name)
            if not name.startswith("_") and inspect.isclass(cls) and issubclass(cls, torchmetrics.Metric):
                front = cls.__new__ is not torchmetrics.Metric.__new__  # it makes one of the others
                if not front and name not in ("BaseAggregator", "Metric", "Running"):
                    yield _metric(f"{package}.{name}", cls)
    yield from _wrappers()


def _metric(name: str, cls: Any) -> Case:
    return case(name, lambda: cls(**_suitable(cls)[0]), lambda: INPUTS[_suitable(cls)[1]]())


def case(name: str, make: Callable[[], Any], inputs: Inputs) -> Case:
    """Return the case of a metric, all of whose states are saved."""

    def build() -> App:
        metric = make()
        for part in metric.modules():
            if isinstance(part, torchmetrics.Metric):
                part.persistent(True)
        return {"metric": metric}

    def step(app: App, number: int) -> Any:
        app["metric"].update(*inputs())
        return app["metric"].compute()

    return Case("torchmetrics", name, build, step)


@functools.cache
def _suitable(cls: Any) -> tuple[dict[str, Any], str]:
    """Find arguments and inputs for a metric by trying."""
    for arguments in ARGUMENTS:
        try:
            cls(**arguments)
        except Exception:  # noqa: BLE001 -- this is how it is found out what a class takes
            continue
        for inputs, make in INPUTS.items():
            try:
                metric = cls(**arguments)
                metric.update(*make())
                metric.update(*make())
                metric.compute()
            except Exception:  # noqa: BLE001 -- this is how it is found out what a class takes
                continue
            return arguments, inputs
    raise NotImplementedError(f"none of the constructors and inputs here suits {cls.__name__}")


def _wrappers() -> Iterator[Case]:
    classification = torchmetrics.classification
    scores, classes, values, rows = INPUTS["scores"], INPUTS["class scores"], INPUTS["values"], INPUTS["rows"]
    yield case(
        "wrappers.BootStrapper",
        lambda: wrappers.BootStrapper(torchmetrics.MeanSquaredError(), num_bootstraps=4),
        values,
    )
    yield case(
        "wrappers.ClasswiseWrapper",
        lambda: wrappers.ClasswiseWrapper(classification.MulticlassAccuracy(NUMBER, average=None)),
        classes,
    )
    yield case("wrappers.MinMaxMetric", lambda: wrappers.MinMaxMetric(torchmetrics.MeanSquaredError()), values)
    yield case("wrappers.MultioutputWrapper", lambda: wrappers.MultioutputWrapper(torchmetrics.R2Score(), NUMBER), rows)
    yield case("wrappers.Running", lambda: wrappers.Running(torchmetrics.MeanMetric(), 2), INPUTS["one value"])
    yield case(
        "wrappers.BinaryTargetTransformer",
        lambda: wrappers.BinaryTargetTransformer(classification.BinaryAccuracy(), threshold=0),
        scores,
    )
    yield case(
        "wrappers.LambdaInputTransformer",
        lambda: wrappers.LambdaInputTransformer(classification.BinaryAccuracy(), lambda p: 1 - p),
        scores,
    )
    yield case(
        "wrappers.MultitaskWrapper",
        _multitask,
        lambda: ({"a": torch.rand(5), "b": torch.rand(5)}, {"a": torch.rand(5), "b": torch.rand(5)}),
    )
    yield case("MetricCollection", lambda: _collection(compute_groups=True), classes)
    yield case("MetricCollection, no groups", lambda: _collection(compute_groups=False), classes)
    yield case("MetricTracker", _Tracker, values)
    yield case("composition", _Sum, values)


def _multitask() -> Any:
    return wrappers.MultitaskWrapper({"a": torchmetrics.MeanSquaredError(), "b": torchmetrics.MeanAbsoluteError()})


def _collection(compute_groups: bool) -> Any:
    classification = torchmetrics.classification
    members = [
        classification.MulticlassAccuracy(NUMBER),
        classification.MulticlassF1Score(NUMBER),
        classification.MulticlassConfusionMatrix(NUMBER),
        classification.MulticlassAUROC(NUMBER),
    ]
    return torchmetrics.MetricCollection(members, prefix="val/", compute_groups=compute_groups)


class _Tracker(wrappers.MetricTracker):  # type: ignore[misc]
    """A tracker in its first epoch; by hand, too, one has to be at the same epoch to load into it."""

    def __init__(self) -> None:
        super().__init__(torchmetrics.MeanSquaredError())
        self.increment()


class _Sum(torch.nn.Module):
    """Two metrics in a module of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = torchmetrics.MeanSquaredError(), torchmetrics.SpearmanCorrCoef()

    def update(self, *inputs: Any) -> None:
        self.one.update(*inputs)
        self.two.update(*inputs)

    def compute(self) -> Any:
        return [self.one.compute(), self.two.compute()]
