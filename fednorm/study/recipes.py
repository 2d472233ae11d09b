"""The studies that ship: ``fednorm/recipes/*.toml``, found by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fednorm.errors import ConfigError, canonical, unknown_name

RECIPES = Path(__file__).parent.parent / "recipes"
INDEX = RECIPES / "index.json"


def recipe_names() -> list[str]:
    """Return the names of the studies that ship, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def outlines() -> list[dict[str, Any]]:
    """Return what a list of the studies says of each, as ``python docs/make.py`` has written it down.

    To count the runs of a study, each is resolved: of all studies that takes seconds, and a list should not.
    """
    rows: list[dict[str, Any]] = json.loads(INDEX.read_text(encoding="utf-8"))
    return rows


def find_study(study: str) -> Path:
    """Return a study's file.

    Args:
        study: A path, or the name of a study that ships, with dashes or underscores.

    Raises:
        ConfigError: A path that is no file.
        UnknownNameError: A name that does not ship.
    """
    path = Path(study)
    if path.suffix == ".toml" or path.is_file():
        if not path.is_file():
            raise ConfigError(
                f"There is no study file {path}. Give a TOML file, or one of {', '.join(recipe_names())}."
            )
        return path
    if canonical(study) not in recipe_names():
        raise unknown_name("study", study, recipe_names(), "fednorm recipes")
    return RECIPES / f"{canonical(study)}.toml"
