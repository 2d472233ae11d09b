"""From a configuration file, options and ``--set`` to one configuration: the later overrides the earlier."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fednorm.config import ONLINE, RunConfig, merge, override, read_config, require_online, resolve


def nested(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted keys as nested dictionaries, without those that are None."""
    values: dict[str, Any] = {}
    for key, value in flags.items():
        if value is not None:
            for part in reversed(key.split(".")):
                value = {part: value}
            values = merge(values, value)
    return values


def names(written: str, default: Iterable[str]) -> list[str]:
    """Return the names between the commas of an option, or the default where there is none."""
    return [name.strip() for name in written.split(",") if name.strip()] or list(default)


def collect_values(config: Path | None, flags: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Return what the user wrote, as nested dictionaries.

    Args:
        config: A TOML file, if any.
        flags: Dotted keys with the values of options; None where an option was not given.
        settings: ``section.key=value`` each.

    Raises:
        ConfigError: The file cannot be read, or a setting has no ``=``.
    """
    values = read_config(config) if config else {}
    values = merge(values, nested(flags))
    for setting in settings:
        values = merge(values, override(setting))
    return values


def collect(config: Path | None, flags: Mapping[str, Any], settings: Sequence[str]) -> RunConfig:
    """Return the configuration of a federated run; arguments are those of :func:`collect_values`.

    Where a scenario, a learner or a grid is named, each client learns on a stream of its own.

    Raises:
        FedNormError: A key or a value is wrong.
    """
    values = collect_values(config, flags, settings)
    own_streams = any(section in values for section in ("scenario", "learner", "grid"))
    if "kind" not in values and own_streams:
        values = {"kind": "federated_continual", **values}
    kind = values.get("kind", "federated")
    return resolve(values, only="federated_continual" if kind == "federated_continual" else "federated")


def collect_continual(
    config: Path | None, flags: Mapping[str, Any], settings: Sequence[str], *, online: bool
) -> RunConfig:
    """Return the configuration of a run from a file, options and ``--set``; the later overrides the earlier.

    Raises:
        FedNormError: A key or a value is wrong, or ``--online`` was given with more than one epoch.
    """
    values = merge({"kind": "continual", "train": ONLINE if online else {}}, collect_values(config, flags, settings))
    resolved = resolve(values, only="continual")
    return require_online(resolved) if online else resolved
