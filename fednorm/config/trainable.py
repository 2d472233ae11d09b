"""What of a network is trained, as ``train.trainable`` has it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator

from fednorm.config.schema import nearest
from fednorm.errors import ConfigError
from fednorm.limits import shown

ALL, NORM, HEAD = "all", "norm", "head"


def spelled_out(text: str) -> str:
    """Return what is trained as it is compared: ``all``, ``norm``, ``head`` or ``norm,head``.

    Raises:
        ConfigError: A part is unknown, is there twice, or ``all`` is not alone.
    """
    parts = [part.strip().lower() for part in text.split(",")]
    for part in parts:
        if part not in (ALL, NORM, HEAD):
            raise ConfigError(
                f"train.trainable is all, norm, head, or norm,head; got {shown(part)}."
                f"{nearest(part, (ALL, NORM, HEAD))}"
            )
    if len(set(parts)) < len(parts) or (ALL in parts and len(parts) > 1):
        raise ConfigError(f"train.trainable names each part once, and all alone; got {shown(text)}.")
    return ",".join(part for part in (ALL, NORM, HEAD) if part in parts)


def _spelled(value: Any) -> Any:
    parts = ",".join(value) if isinstance(value, list) and all(isinstance(part, str) for part in value) else value
    return spelled_out(parts) if isinstance(parts, str) else parts


Parts = Annotated[str, BeforeValidator(_spelled)]
"""Parts of a network: one string with commas between, or a list of them."""
