"""``prepare``: the archives of a source folder, checked, then written as Parquet folders."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fednorm.cards import DATA
from fednorm.data.prepare import (
    camelyon17,
    clear10,
    core50,
    digits_five,
    domainnet,
    mini_imagenet,
    officehome,
    tiny_imagenet,
)
from fednorm.data.prepare.files import ARCHIVES, Files, md5_of
from fednorm.data.prepare.recipe import Recipe, archive_paths
from fednorm.data.prepare.writing import Written, staging, write_images
from fednorm.errors import DataError, UnknownNameError, canonical

RECIPES: Mapping[str, Recipe] = {
    module.RECIPE.name: module.RECIPE
    for module in (domainnet, officehome, camelyon17, digits_five, tiny_imagenet, mini_imagenet, core50, clear10)
}
"""The recipes by name."""


def prepare(
    name: str,
    source: Path,
    directory: Path,
    *,
    domains: Sequence[str] = (),
    classes: Sequence[str] = (),
    step: Callable[[int], None] | None = None,
) -> list[Written]:
    """Turn a data set's official archives into Parquet folders.

    Args:
        name: The data set: a key of :data:`RECIPES`, with dashes or underscores.
        source: The folder that holds the archives, as they were downloaded or unpacked; or one archive.
        directory: The folder of data sets, what ``--data-dir`` then names.
        domains: The domains to take, where a data set has several; empty for all.
        classes: The classes to take, or the name of a published choice of them; empty for all.
        step: Is told of images as they are written.

    Returns:
        What was written.

    Raises:
        UnknownNameError: There is no such recipe.
        DataError: An archive is missing, damaged, not the published one or laid out otherwise; a folder is there
            already; or the disk is full. Nothing half-made is kept.
    """
    recipe = find_recipe(name)
    wanted = recipe.wanted(tuple(domains), tuple(classes))
    source, directory = _folder(source), directory.expanduser()
    with staging(directory, recipe.name, recipe.folders) as hidden:
        archives = archive_paths(source, recipe.archives)
        sums = [_checked(path, archive.md5) for path, archive in archives]
        about: dict[str, Any] = {"recipe": recipe.name, "source": recipe.source, "archives": sums}
        if wanted.domains or wanted.classes:
            about["wanted"] = {"domains": wanted.domains, "classes": wanted.classes}
        packed = [path for path, _ in archives if source.is_file() or path.name.lower().endswith(ARCHIVES)]
        with Files(source, packed, hidden) as files:
            try:
                written = [write_images(images, files, hidden, about, step) for images in recipe.images(files, wanted)]
            except DataError as error:
                raise _explained(error, recipe) from error
    return [_moved(one, directory) for one in written]


def find_recipe(name: str) -> Recipe:
    """Return a recipe by its name.

    Raises:
        UnknownNameError: There is none; the message lists all.
    """
    if recipe := RECIPES.get(canonical(name)):
        return recipe
    if canonical(name) in DATA.built_in:
        raise UnknownNameError(
            f"Data set {name!r} needs no preparing: fednorm explain {name} says in what form it is read. There are "
            f"recipes for {', '.join(RECIPES)}."
        )
    near = difflib.get_close_matches(canonical(name), RECIPES, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UnknownNameError(f"No recipe prepares {name!r}.{hint} There are {', '.join(RECIPES)}.")


def _folder(source: Path) -> Path:
    try:
        source = source.expanduser()
        if source.is_dir() or source.is_file():
            return source
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"The source {str(source)[:200]!r} cannot be used: {error}.") from error
    raise DataError(f"The source {source} does not exist. Name the folder that the archives were downloaded to.")


def _checked(path: Path, md5: str) -> dict[str, Any]:
    """Return an archive's name, size and MD5 sum, checked where one is published."""
    own = md5_of(path)
    if md5 and own != md5:
        raise DataError(
            f"{path} has MD5 {own}, and the published archive has {md5}: it is incomplete or another one. Download it "
            "again. What was unpacked from it by other means is taken as it is."
        )
    return {"name": path.name, "bytes": path.stat().st_size, "md5": own, "official": bool(md5)}


def _explained(error: DataError, recipe: Recipe) -> DataError:
    """Return an error with what the source should hold."""
    text = str(error).rstrip(".")
    end = "" if text.endswith("?") else "."
    return error if recipe.source in text else DataError(f"{text}{end} {recipe.expected}")


def _moved(written: Written, directory: Path) -> Written:
    return Written(
        directory / written.folder.name,
        written.train,
        written.test,
        written.classes,
        written.domains,
        written.notes,
    )
