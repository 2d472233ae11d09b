"""The errors fednorm raises: each says what was expected, what came, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FedNormError(Exception):
    """Base of every error that a user can cause and mend; the command line shows it without a traceback."""


class ConfigError(FedNormError, ValueError):
    """A configuration that cannot be run: an unknown key, a value out of range, settings that contradict each other."""


class UnknownNameError(FedNormError, LookupError):
    """A name that is not registered; the message lists the nearest valid ones."""


class DataError(FedNormError, ValueError):
    """Data that is missing, unreadable, or unfit for what was asked of it."""


class RoleError(FedNormError, ValueError):
    """A tensor without a declared role, or a set of roles that would silently do nothing."""


class AggregationError(FedNormError, RuntimeError):
    """A round that cannot be aggregated: every client failed, or their replies do not fit together."""


class DivergedError(AggregationError, ArithmeticError):
    """A training whose numbers are no numbers any more; what was finished before stays in its record."""


class IncompleteError(AggregationError):
    """A federation of which too few clients sent something usable; its finished rounds stay in its record."""


class RecordError(FedNormError, OSError):
    """A run's record that cannot be written or read."""


class DamageWarning(UserWarning):
    """A damaged file of a record that its run does without: it goes on from what was whole before."""


class StudyError(FedNormError, RuntimeError):
    """A study of which runs failed; those that finished are in its folder."""


def canonical(name: str) -> str:
    """Return ``name`` in the spelling the registries use: lower case, dashes read as underscores."""
    return name.strip().lower().replace("-", "_")


def unknown_name(what: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """Build the error for an unregistered name.

    Args:
        what: The kind of thing asked for, e.g. ``"strategy"``.
        name: The name that was given.
        known: Every valid name.

    Returns:
        An error whose message offers the nearest valid names first.
    """
    names = sorted(known)
    name = name if len(name) <= 80 else f"{name[:80]}..."
    near = difflib.get_close_matches(canonical(name), names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return UnknownNameError(f"There is no {what} named {name!r}.{hint} Known: {', '.join(names)}.")
