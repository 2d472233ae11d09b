"""Official archives into the Parquet layout that fednorm reads: ``fednorm data prepare NAME SRC DIR``.

One file a data set says what its archives are called, what stands in them, and which images are for training; the rest
is common: :mod:`~fednorm.data.prepare.files` looks into folders and archives without unpacking them,
:mod:`~fednorm.data.prepare.writing` writes a data set whole or not at all.
"""

from __future__ import annotations

from fednorm.data.prepare.preparing import RECIPES, prepare
from fednorm.data.prepare.recipe import Archive, Images, Recipe
from fednorm.data.prepare.writing import Written

__all__ = ["RECIPES", "Archive", "Images", "Recipe", "Written", "prepare"]
