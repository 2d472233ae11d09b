"""The smallest Flower app for two importable objects, and values as Flower's TOML files hold them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from fednorm.errors import ConfigError

ConfigValue = str | int | float | bool
"""What Flower lets a run configuration hold."""

_HEADER = "# Written by fednorm for one run; overwritten by the next."


def write_app(folder: Path, serverapp: str, clientapp: str, config: Mapping[str, ConfigValue]) -> Path:
    """Write the smallest Flower app that runs two importable objects, and return its folder.

    The app holds no code: Flower packs and unpacks one ``pyproject.toml``, and the objects are imported from
    where this process imports them, an installed wheel or a checkout.

    Flower checks the references without importing the module itself (its parent packages it does import):
    the object must be bound by a plain assignment at the module's top level, ``app = ServerApp()``, not by an
    annotated one, nor by an import.

    Args:
        folder: A folder of the app's own; made when missing, overwritten when an earlier call wrote it.
        serverapp: The ``ServerApp``, as ``"package.module:name"``.
        clientapp: The ``ClientApp``, likewise.
        config: The run's configuration. ``run_with_flower`` can override these keys and no others.

    Raises:
        ConfigError: When a value is of a type that Flower cannot hold, or the folder holds anything else.
    """
    project = folder / "pyproject.toml"
    strangers = sorted(entry.name for entry in folder.iterdir() if entry != project) if folder.is_dir() else []
    if strangers or (project.is_file() and not project.read_text(encoding="utf-8").startswith(_HEADER)):
        raise ConfigError(
            f"A Flower app is written to a folder of its own, but {folder} already holds "
            f"{', '.join(strangers[:3]) or 'another pyproject.toml'}. Name a new or an empty folder."
        )
    lines = [
        _HEADER,
        "[project]",
        'name = "fednorm-run"',
        'version = "0.0.0"',
        'description = "One run of fednorm"',
        'license = "MIT"',
        "[tool.flwr.app]",
        'publisher = "fednorm"',
        "[tool.flwr.app.components]",
        f"serverapp = {_toml(serverapp, 'serverapp')}",
        f"clientapp = {_toml(clientapp, 'clientapp')}",
        "[tool.flwr.app.config]",
        *toml_lines(config),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    project.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def toml_lines(table: Mapping[str, ConfigValue]) -> list[str]:
    """Return a flat table's lines in TOML.

    Raises:
        ConfigError: When a value is of a type that Flower cannot hold.
    """
    return [f"{_toml(str(key), 'a key')} = {_toml(value, key)}" for key, value in table.items()]


def _toml(value: ConfigValue, name: str) -> str:
    """Return a value in TOML, whose basic strings are JSON's plus an escaped DEL."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, float):
        return repr(float(value))
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return str(int(value))
    raise ConfigError(
        f"Flower's run configuration holds text, booleans, 64-bit integers and floats; {name} is {value!r} "
        f"({type(value).__name__}). Pass structured values as one JSON text."
    )
