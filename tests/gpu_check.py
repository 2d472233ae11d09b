"""Both worlds on this machine's device, held against the CPU: curves within a tolerance, and what each does a second.

    python tests/gpu_check.py                  # the device that auto finds
    python tests/gpu_check.py --device cuda:1 --amp bf16 --compile
    python tests/gpu_check.py --device cpu     # against itself: exactly the same

It ends with 1 where a curve is off, and prints one JSON document. Accuracies are shares of a few hundred images, and
sums in another order end in other last bits, so that a few images may be scored otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import fednorm
from fednorm.config import merge, resolve
from fednorm.errors import FedNormError

FEDERATED: dict[str, Any] = {
    "data": {"train_per_client": 200, "test_per_domain": 100},
    "train": {"learning_rate": 0.02},
}
CONTINUAL: dict[str, Any] = {
    "scenario": {"train_per_experience": 200, "test_per_experience": 100},
    "train": {"epochs": 1, "augment": "crop_flip"},
}
TOLERANCE = {"loss": 0.1, "accuracy": 0.1}
"""Greatest differences: of a training loss as a share of the CPU's, and of an accuracy, averaged over a curve."""


def federated(machine: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Return the curve of a federation, and the clients that it trained in a second."""
    began = time.perf_counter()
    result = fednorm.federated(strategy="fedbn", rounds=rounds, config=merge(FEDERATED, machine))
    trained = sum(len(line["sampled"]) for line in result["rounds"])
    return {
        "loss": [line["train_loss"] for line in result["rounds"]],
        "accuracy": [line["mean"] for line in result["rounds"] if "mean" in line],
        "clients_per_second": trained / (time.perf_counter() - began),
    }


def continual(machine: dict[str, Any], experiences: int) -> dict[str, Any]:
    """Return the curve of a stream, and the steps that it took in a second."""
    began = time.perf_counter()
    config = merge(CONTINUAL, {"scenario": {"num_experiences": experiences}, **machine})
    result = fednorm.continual(learner="er_ace", config=config)
    return {
        "loss": [line["train_loss"] for line in result["experiences"]],
        "accuracy": [line["train_accuracy"] for line in result["experiences"]],
        "steps_per_second": result["steps"] / (time.perf_counter() - began),
    }


def differences(here: dict[str, Any], there: dict[str, Any]) -> dict[str, float]:
    """Return how far two curves are apart, by what :data:`TOLERANCE` names."""
    loss = [abs(a - b) / max(abs(a), 1e-9) for a, b in zip(here["loss"], there["loss"], strict=True)]
    accuracy = [abs(a - b) for a, b in zip(here["accuracy"], there["accuracy"], strict=True)]
    return {"loss": sum(loss) / len(loss), "accuracy": sum(accuracy) / len(accuracy)}


def check(machine: dict[str, Any], *, rounds: int = 5, experiences: int = 5) -> dict[str, Any]:
    """Return both worlds' curves on the CPU and on a device, and whether they are alike.

    Raises:
        FedNormError: The device is not there, or cannot do what is asked of it.
    """
    document: dict[str, Any] = {"machine": machine, "alike": True}
    for name, run, length in (("federated", federated, rounds), ("continual", continual, experiences)):
        run(machine, 1 if name == "federated" else 2)  # a device's first kernels take seconds
        here, there = run({"device": "cpu"}, length), run(machine, length)
        apart = differences(here, there)
        alike = all(apart[key] <= TOLERANCE[key] for key in TOLERANCE)
        document[name] = {"cpu": here, "device": there, "apart": apart}
        document["alike"] = document["alike"] and alike
    return document


def main(arguments: Sequence[str] | None = None) -> int:
    """Check a device, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", default="none")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--experiences", type=int, default=5)
    chosen = parser.parse_args(arguments)
    try:
        config = resolve({"device": chosen.device, "amp": chosen.amp, "compile": chosen.compile})
        machine = {"device": config.device, "amp": config.amp, "compile": config.compile}
        document = check(machine, rounds=chosen.rounds, experiences=chosen.experiences)
    except FedNormError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(json.dumps(document, indent=1) + "\n")
    return 0 if document["alike"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
