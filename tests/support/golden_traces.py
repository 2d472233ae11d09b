"""What the tests of golden traces share: where the traces lie, reading one, and writing it again with changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def read(name: str) -> dict[str, Any]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def written(path: Path, arrays: dict[str, Any]) -> Path:
    np.savez(path, **arrays)
    return path


def with_hparams(arrays: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {**arrays, "hparams": np.array(json.dumps({**json.loads(str(arrays["hparams"])), **values}))}
