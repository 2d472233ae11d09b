"""``fednorm export``: a run's final model as a file that plain PyTorch reads."""

from __future__ import annotations

import warnings
from pathlib import Path

from fednorm.cli.console import err, out, print_json
from fednorm.export import export


def run_export(run: Path, *, to: Path, client: int | None, as_json: bool) -> None:
    """Write the model, and say what it is."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        written = export(run, to, client)
    for warning in caught:
        if warning.category is UserWarning:
            err().print(f"warning: {warning.message}", markup=False, soft_wrap=True)
    if as_json:
        return print_json(written)
    whose = "" if client is None else f", client {client}'s"
    out().print(
        f"{written['file']}: {written['model']} with norm {written['norm']}{whose}; images (N, 3, "
        f"{written['image_size']}, {written['image_size']}) in [-1, 1] to {written['num_classes']} logits",
        markup=False,
        soft_wrap=True,
    )
    return None
