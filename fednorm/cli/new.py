"""``fednorm new``: a commented file of a method of one's own, which keeps its family's contract as it is."""

from __future__ import annotations

import keyword
from importlib.resources import files
from pathlib import Path

from fednorm.cli.console import out
from fednorm.config import choose
from fednorm.errors import ConfigError
from fednorm.report.files import write_whole

KINDS = ("norm", "strategy", "learner", "scenario", "data", "model", "adaptation")
"""What a file can be written of."""


def run_new(what: str, name: str, folder: Path) -> None:
    """Write ``NAME.py`` into a folder.

    Args:
        what: One of :data:`KINDS`.
        name: The method's name, and that of its file: a Python identifier in lower case.
        folder: Where to; made where it is not there.

    Raises:
        ConfigError: There is no such kind, the name is no module's, or the file is there already.
        RecordError: The file cannot be written.
    """
    choose("what", what, KINDS)
    stem = name.strip().replace("-", "_")
    if not stem.isidentifier() or keyword.iskeyword(stem) or stem != stem.lower():
        raise ConfigError(
            f"A method's name is a file's and a module's: letters, digits and '_', lower case; got {name!r}."
        )
    path = folder / f"{stem}.py"
    if path.exists():
        raise ConfigError(f"{path} is there already. Choose another name, or remove it.")
    kind = "".join(part.capitalize() for part in stem.split("_"))
    template = (files("fednorm") / "templates" / f"{what}.txt").read_text(encoding="utf-8")
    write_whole(path, template.format(name=stem, module=stem, kind=kind, layer=f"{kind}Layer"))
    out().print(f"{path}\nIts head says how to check it and how to run it, from {folder.resolve()}.", markup=False)
