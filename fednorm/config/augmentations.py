"""The names of augmentations, as ``train.augment`` has them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator

from fednorm.config.schema import nearest
from fednorm.errors import ConfigError
from fednorm.limits import shown

NAMES = ("crop", "flip", "rotate", "jitter", "resized_crop")
"""The augmentations, in any order; ``crop_flip`` is crop and flip in one."""


def spelled_out(text: str) -> str:
    """Return names of augmentations as they are compared: in order, joined by commas, ``crop,flip`` as ``crop_flip``.

    Args:
        text: Names separated by commas; ``none``, alone, for no augmentation.

    Raises:
        ConfigError: A name is unknown, is there twice, or ``none`` is not alone.
    """
    names = [name.strip().lower().replace("-", "_") for name in text.split(",")]
    single = [part for name in names for part in (("crop", "flip") if name == "crop_flip" else (name,))]
    known = ("none", *NAMES)
    for name in single:
        if name not in known:
            raise ConfigError(
                f"train.augment is none, or of {', '.join((*NAMES, 'crop_flip'))}, separated by commas; got "
                f"{shown(name)}.{nearest(name, known)}"
            )
    if len(set(single)) < len(single) or ("none" in single and len(single) > 1):
        raise ConfigError(f"train.augment names each augmentation once, and none alone; got {shown(text)}.")
    return f",{','.join(single)},".replace(",crop,flip,", ",crop_flip,").strip(",")


def _spelled(value: Any) -> Any:
    names = ",".join(value) if isinstance(value, list) and all(isinstance(name, str) for name in value) else value
    return spelled_out(names) if isinstance(names, str) else names


Augment = Annotated[str, BeforeValidator(_spelled)]
"""Names of augmentations: one string with commas between, or a list of them."""
