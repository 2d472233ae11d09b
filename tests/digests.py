"""Digests of a few dozen small runs' final tensors and numbers: what a redesign must not change.

    python tests/digests.py record before.json     # before a change
    python tests/digests.py compare before.json    # after it: names every run whose tensors or numbers differ

What a run did not tell before does not count. Bits depend on the kind of CPU and on PyTorch's version, so the file is
made and compared on one machine and not kept.
``--only NAME`` runs the cases whose name contains it. Every case goes through the public functions alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch

import fednorm
import fednorm.errors
from fednorm.config import merge

SMALL: dict[str, Any] = {
    "data": {"train_per_client": 40, "test_per_domain": 20},
    "model": {"width": 4},
    "train": {"learning_rate": 0.05, "batch_size": 8},
}
STREAM: dict[str, Any] = {
    "model": {"width": 4},
    "train": {"batch_size": 32, "epochs": 1},
    "evaluate": {"probe_images": 16, "train_images": 16},
}


def cases() -> dict[str, dict[str, Any]]:
    """Return the configurations by name."""
    federated: dict[str, dict[str, Any]] = {
        name: {"strategy": name}
        for name in ("fedavg", "fedavgm", "fedadam", "fedyogi", "fedprox", "fedbn", "silobn", "fedwon")
    }
    for name in ("scaffold", "fedper", "fedrep", "fedbabu", "ditto", "local", "fedavg_ft", "centralized"):
        federated[name] = {"strategy": name}
    for norm in (
        "group_norm",
        "layer_norm",
        "instance_norm",
        "rms_norm",
        "adab2n",
        "batch_renorm",
        "switch_norm",
        "none",
    ):
        federated[f"fedavg {norm}"] = {"strategy": "fedavg", "norm": norm}
    for norm in ("adab2n", "continual_norm", "batch_norm_corrected", "task_balanced_norm", "ws_group_norm", "nap"):
        name = "fedavg" if norm in ("ws_group_norm", "nap") else "fedbn"
        federated[f"{name} {norm}"] = {"strategy": name, "norm": norm}
    federated |= {
        "fedbn sampled": {"strategy": "fedbn", "rounds": 3, "config": {"rounds": {"fraction": 0.5}}},
        "fedavg equal": {"strategy": "fedavg", "config": {"rounds": {"weighting": "equal"}}},
        "fedbn dirichlet": {
            "strategy": "fedbn",
            "config": {
                "data": {"clients_per_domain": 2, "partition": "dirichlet", "train_per_client": 30, "validation": 0.2}
            },
        },
        "silobn matrix": {
            "strategy": "silobn",
            "config": {
                "data": {"held_out": "faint"},
                "evaluate": {"kinds": ["own", "averaged", "pooled", "reestimated", "unseen"], "fallback": "pooled"},
            },
        },
        "fedprox momentum agc": {
            "strategy": "fedprox",
            "config": {
                "strategy": {"mu": 0.1},
                "train": {"momentum": 0.9, "weight_decay": 0.001, "agc": 0.1, "local_epochs": 2},
            },
        },
        "fedavg resnet18": {
            "strategy": "fedavg",
            "model": "resnet18",
            "rounds": 1,
            "config": {"data": {"image_size": 16}},
        },
        "fedbn mobilenet": {
            "strategy": "fedbn",
            "model": "mobilenet_v2",
            "rounds": 1,
            "config": {"data": {"image_size": 16}, "model": {"width": 0}},
        },
    }
    streams: dict[str, dict[str, Any]] = {
        name: {"learner": name} for name in ("naive", "joint", "er", "er_ace", "derpp", "lwf", "ewc", "gdumb")
    }
    for norm in (
        "group_norm",
        "adab2n",
        "continual_norm",
        "batch_renorm",
        "switch_norm",
        "nap",
        "sws",
        "batch_norm_corrected",
    ):
        streams[f"er_ace {norm}"] = {"learner": "er_ace", "norm": norm}
    streams |= {
        "er tbbn": {
            "learner": "er",
            "norm": "task_balanced_norm",
            "config": {"learner": {"memory_batch": 32}},
        },
        "naive adam cosine": {
            "learner": "naive",
            "config": {
                "train": {
                    "optimizer": "adam",
                    "schedule": "cosine",
                    "warmup_steps": 3,
                    "epochs": 2,
                    "reset_optimizer": True,
                }
            },
        },
        "naive adamw linear crop": {
            "learner": "naive",
            "config": {
                "train": {
                    "optimizer": "adamw",
                    "schedule": "linear",
                    "schedule_over": "experience",
                    "augment": "crop_flip",
                }
            },
        },
        "naive plasticity": {
            "learner": "naive",
            "norm": "none",
            "scenario": "random_labels",
            "config": {
                "train": {"l2_init": 0.01, "shrink": 0.8, "perturb": 0.1, "redo_every": 3, "agc": 0.1},
                "scenario": {"train_per_experience": 40, "num_experiences": 3},
            },
        },
        "nap random labels": {
            "learner": "naive",
            "norm": "nap",
            "scenario": "random_labels",
            "config": {"scenario": {"train_per_experience": 40, "num_experiences": 3}, "train": {"epochs": 2}},
        },
        "permuted pixels": {
            "learner": "er",
            "scenario": "permuted_pixels",
            "config": {"scenario": {"train_per_experience": 40, "num_experiences": 3}},
        },
        "permuted labels": {
            "learner": "naive",
            "scenario": "permuted_labels",
            "config": {"scenario": {"train_per_experience": 40, "num_experiences": 3}},
        },
        "domain digits": {"learner": "ewc", "scenario": "domain_digits", "data": "digits_mini"},
    }
    named = {f"federated: {name}": {"_kind": "federated", **case} for name, case in federated.items()}
    return named | {f"continual: {name}": {"_kind": "continual", **case} for name, case in streams.items()}


def run(case: dict[str, Any]) -> dict[str, str]:
    """Run one configuration and return the digests of its final tensors and of its numbers."""
    case = dict(case)
    kind = case.pop("_kind")
    base = SMALL if kind == "federated" else STREAM
    config = merge(base, case.pop("config", {}))
    if kind == "federated":
        case.setdefault("rounds", 2)
    with tempfile.TemporaryDirectory() as folder:
        result: Any = getattr(fednorm, kind)(**case, config=config, runs=folder)
        return {
            "tensors": _tensors(Path(result["run"])),
            "matrix": _plain(_matrix(result)),
            **{f"final.{key}": _plain(value) for key, value in result["final"].items()},
        }


def _matrix(result: Any) -> Any:
    return result["accuracy_matrix"] if result["kind"] == "continual" else result["evaluation"]


def _tensors(folder: Path) -> str:
    from safetensors.torch import load_file

    digest = hashlib.sha256()
    files = (file for file in folder.glob("*.safetensors") if file.name != "further.safetensors")  # to go on from
    for file in sorted(files):
        for key, tensor in sorted(load_file(file).items()):
            digest.update(f"{file.stem}/{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(dtype=__import__("torch").uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _plain(numbers: Any) -> str:
    return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()[:16]


def main(action: str, file: str, *rest: str) -> int:
    """Record or compare; return the exit status."""
    only = rest[rest.index("--only") + 1] if "--only" in rest else ""
    before: dict[str, dict[str, str]] = json.loads(Path(file).read_text()) if action == "compare" else {}
    after: dict[str, Any] = {}
    different = 0
    for name, case in cases().items():
        if only not in name:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                after[name] = run(case)
            except fednorm.errors.FedNormError as error:
                after[name] = {"error": str(error)[:300]}
        if action == "record":
            sys.stdout.write(f"{name} {after[name]}\n")
        elif odd := [key for key, value in before.get(name, {}).items() if after[name].get(key) != value]:
            different += 1
            sys.stdout.write(
                f"{name}: {', '.join(odd)}{': ' + after[name]['error'] if 'error' in after[name] else ''}\n"
            )
    if action == "record":
        Path(file).write_text(json.dumps(after, indent=1))
    else:
        sys.stdout.write(f"{len(after)} runs, {different} of them differ\n")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
