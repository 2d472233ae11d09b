"""The errors fednorm raises: each says what was expected, what came, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


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


MOST_SUGGESTED = 5
"""Names that an error suggests at most."""

FEW = 8
"""Names that an error lists where nothing is near: more are a list of their own."""


def unknown_name(what: str, name: str, known: Iterable[str], listed: str = "") -> UnknownNameError:
    """Build the error for an unregistered name.

    Args:
        what: The kind of thing asked for, e.g. ``"strategy"``.
        name: The name that was given.
        known: Every valid name.
        listed: What shows all of them, e.g. ``"fednorm list strategies"``; empty where nothing does. An object in a
            file of the working directory may stand for one of them too.

    Returns:
        An error whose message offers the nearest valid names, and where all are.
    """
    if listed and name.isidentifier() and Path(f"{name}.py").is_file():
        here = f"{name}.py is a file of this folder: an object in it is {name}:OBJECT, e.g. {name}:SPEC."
        return UnknownNameError(f"There is no {what} named {name!r}. {here}")
    names = sorted(known)
    name = name if len(name) <= 80 else f"{name[:80]}..."
    near = suggestions(name, names)
    *others, last = [repr(n) for n in near] or [""]
    hint = f" Did you mean {', '.join(others)}{' or ' if others else ''}{last}?" if near else ""
    if listed:
        everything = f" All {len(names)}: {listed}."
    else:
        shown = names if len(names) <= FEW or not near else []
        everything = f" Known: {', '.join(shown)}." if shown else ""
    return UnknownNameError(f"There is no {what} named {name!r}.{hint}{everything}")


def suggestions(name: str, known: Iterable[str]) -> list[str]:
    """Return the valid names nearest to a wrong one, at most five, the nearest first.

    A name is near that is spelled much alike, whose initials were given (``bn`` for ``batch_norm``), or that holds
    what was given or is held by it (``renorm``).

    Args:
        name: The name that was given.
        known: Every valid name.
    """
    word, names = canonical(name), sorted(known)
    alike = difflib.get_close_matches(word, names, n=MOST_SUGGESTED, cutoff=0.5)
    initials = [n for n in names if word and word == "".join(part[:1] for part in n.split("_"))]
    within = [n for n in names if len(word) > 2 and (word in n or (len(n) > 3 and n in word))]
    return list(dict.fromkeys([*initials, *alike[:2], *within, *alike[2:]]))[:MOST_SUGGESTED]
