"""fednorm: what should a network's normalization do when its data is not one distribution?

import fednorm
model = fednorm.convert(torchvision.models.resnet18(num_classes=10), norm="sws")
result = fednorm.federated(strategy="fedbn", data="digits_mini", rounds=10, seed=0)
result = fednorm.continual(scenario="split_digits", learner="er_ace", norm="adab2n", online=True, seed=0)
runs = fednorm.compare("study.toml", jobs=2)
runs = fednorm.load("runs/study")
network = fednorm.load_model("runs/RUN", client=3)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fednorm.api import compare, continual, federated, load
    from fednorm.conversion import convert, declare
    from fednorm.export import load_model
    from fednorm.inspection.model import check
    from fednorm.recognition.tensor_kinds import declare_tensors

__all__ = [
    "__version__",
    "check",
    "compare",
    "continual",
    "convert",
    "declare",
    "declare_tensors",
    "federated",
    "load",
    "load_model",
]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that ``import fednorm`` stays quick."""
    from importlib import import_module

    homes = {
        "check": "fednorm.inspection.model",
        "convert": "fednorm.conversion",
        "declare": "fednorm.conversion",
        "declare_tensors": "fednorm.recognition.tensor_kinds",
        "load_model": "fednorm.export",
    } | dict.fromkeys(("compare", "continual", "federated", "load"), "fednorm.api")
    if name not in homes:
        raise AttributeError(f"module 'fednorm' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(import_module(homes[name]), name)
