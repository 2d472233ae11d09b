"""The configuration of a run: typed sections, one form for both kinds, read from TOML and ``section.key=value``."""

from __future__ import annotations

from fednorm.cards import Scalar
from fednorm.config.evaluated import ALL_CLIENTS, SAMPLED_CLIENTS, of_which
from fednorm.config.online import ONLINE, require_online
from fednorm.config.resolve import REFERENCED as SECTION_FAMILIES
from fednorm.config.resolve import VALUES as SECTION_VALUES
from fednorm.config.resolve import checked_options, resolve, with_references
from fednorm.config.run import (
    DEFAULT_NORM,
    IMMATERIAL,
    MACHINE,
    METHOD_OPTIONS,
    METHOD_SWITCHES,
    Choice,
    ModelChoice,
    RunConfig,
    digest,
    kind_of_device,
)
from fednorm.config.schema import Kind, choose, nearest
from fednorm.config.sections import EVALUATIONS, DataConfig, EvaluateConfig, GridConfig, RoundConfig, TrainConfig
from fednorm.config.values import KeyPath, flatten, merge, nest, override, read_config, scalar

__all__ = [
    "ALL_CLIENTS",
    "DEFAULT_NORM",
    "EVALUATIONS",
    "IMMATERIAL",
    "MACHINE",
    "METHOD_OPTIONS",
    "METHOD_SWITCHES",
    "ONLINE",
    "SAMPLED_CLIENTS",
    "SECTION_FAMILIES",
    "SECTION_VALUES",
    "Choice",
    "DataConfig",
    "EvaluateConfig",
    "GridConfig",
    "KeyPath",
    "Kind",
    "ModelChoice",
    "RoundConfig",
    "RunConfig",
    "Scalar",
    "TrainConfig",
    "checked_options",
    "choose",
    "digest",
    "flatten",
    "kind_of_device",
    "merge",
    "nearest",
    "nest",
    "of_which",
    "override",
    "read_config",
    "require_online",
    "resolve",
    "scalar",
    "with_references",
]
