"""Camelyon17-WILDS: patches of lymph nodes from five hospitals, with tumour or without. Koh et al., WILDS, ICML 2021.

https://arxiv.org/abs/2012.07421, of the slides of Bandi et al., 2018. ``metadata.csv`` has a line for each patch; its
column ``center`` is the hospital, and its column ``split`` is 0 for training and 1 for the images that WILDS holds back
at the same hospital. WILDS trains on hospitals 0, 3 and 4, selects on 1 and tests on 2, on all images of each: the
benchmark does the same with ``data.held_out``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fednorm.data.partition import train_and_test
from fednorm.data.prepare.files import Files
from fednorm.data.prepare.recipe import Archive, Images, Recipe, Row, Wanted
from fednorm.errors import DataError

CLASSES = ("normal", "tumor")
COLUMNS = ("patient", "node", "x_coord", "y_coord", "tumor", "center", "split")
DOMAINS = tuple(f"hospital_{center}" for center in range(5))


def _images(files: Files, wanted: Wanted) -> Iterator[Images]:
    root = files.root("metadata.csv")
    patches: dict[str, list[tuple[str, int, bool]]] = {domain: [] for domain in wanted.of_domains(DOMAINS)}
    for number, line in files.table("metadata.csv", COLUMNS, root):
        domain, patch = _patch(files, number, line)
        if domain in patches:
            patches[domain].append(patch)
    notes: list[str] = []
    for domain, own in patches.items():
        if not own:
            raise DataError(f"{files.place}: metadata.csv has no patch of {domain}")
        if len({held for _, _, held in own}) == 1:  # no official images to test on at this hospital
            _, test = train_and_test(domain, np.array([label for _, label, _ in own]), 0)
            tested = set(test.tolist())
            patches[domain] = [(path, label, row in tested) for row, (path, label, _) in enumerate(own)]
            notes.append(f"{domain} has no split of its own: 80/20, stratified by class, by split seed 0.")

    def rows() -> Iterator[Row]:
        for domain, own in patches.items():
            for path, label, held in own:
                yield Row(root + path, label, "test" if held else "train", domain)

    yield Images("camelyon17", CLASSES, rows(), tuple(notes))


def _patch(files: Files, number: int, line: Sequence[str]) -> tuple[str, tuple[str, int, bool]]:
    """Return a line's hospital, and the patch: its path, its class, and whether it is held back."""
    try:
        patient, node, x, y, tumor, center, split = line
        where = f"patient_{int(patient):03d}_node_{int(node)}"
        path = f"patches/{where}/patch_{where}_x_{int(x)}_y_{int(y)}.png"
        return f"hospital_{int(center)}", (path, int(tumor), int(split) != 0)
    except ValueError as error:
        raise DataError(f"{files.place}: metadata.csv, line {number} is not of whole numbers ({error})") from error


RECIPE = Recipe(
    name="camelyon17",
    title="Camelyon17-WILDS",
    source="https://wilds.stanford.edu/datasets/#camelyon17",
    archives=(Archive("camelyon17_v1.0.tar.gz"),),
    images=_images,
    folders=("camelyon17",),
    layout="camelyon17_v1.0/metadata.csv and camelyon17_v1.0/patches/patient_*/patch_*.png",
    has_domains=True,
)
