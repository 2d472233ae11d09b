"""The list of the studies that ship, for ``fednorm recipes``: their runs are counted here, and not when it is asked."""

from __future__ import annotations

import json
from pathlib import Path

from fednorm.cli.recipes import outline
from fednorm.study.recipes import INDEX, find_study, recipe_names


def index() -> tuple[Path, str]:
    """Return the index's path and what it says."""
    rows = [outline(find_study(name)) for name in recipe_names()]
    return INDEX, json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
