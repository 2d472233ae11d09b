"""Import paths: ``package.module:attribute`` becomes an object, and whatever fails on the way a sentence."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

from fednorm.errors import ConfigError


def import_object(path: str, noun: str) -> Any:
    """Return what an import path names: ``package.module:attribute``, or ``package.module`` for its ``SPEC``.

    Modules are found as Python finds them, and in the working directory after all other places.

    Raises:
        ConfigError: The module does not exist or raises when it is imported, or it has no such attribute.
    """
    module_name, _, attribute = path.partition(":")
    working_directory = os.getcwd()
    if working_directory not in sys.path and "" not in sys.path:
        sys.path.append(working_directory)
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ConfigError(
                f"There is no module {error.name!r}, which {noun} {path!r} names. An import path is "
                "package.module:attribute, of a package that is installed or stands in the working directory."
            ) from error
        raise ConfigError(f"Importing {module_name!r} for {noun} {path!r} failed: {error}. Install it.") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"Importing {module_name!r} for {noun} {path!r} raised {type(error).__name__}: {error}. Mend the module; "
            f"python -c 'import {module_name}' shows where."
        ) from error
    found: Any = module
    for part in (attribute or "SPEC").split("."):
        if not hasattr(found, part):
            has = ", ".join(name for name in vars(module) if not name.startswith("_")) or "nothing"
            asked = f"{part!r}, which" if attribute else "'SPEC', the card that an import path without ':'; to it"
            raise ConfigError(f"Module {module_name!r} has no {asked} {noun} {path!r} names. It has: {has[:300]}.")
        found = getattr(found, part)
    return found
