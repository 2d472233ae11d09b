from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from fednorm.config import DataConfig
from fednorm.data import load_federation
from fednorm.data.source import stack
from fednorm.errors import ConfigError, DataError
from fednorm.memory import free_memory, require_memory


def test_what_does_not_fit_is_said_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fednorm.memory.free_memory", lambda: 3 << 29)
    require_memory(3 << 29, "This", "Fewer.")
    with pytest.raises(ConfigError, match=r"^This would take 1\.5 GiB of memory; 1\.5 GiB are free here\. Fewer\.$"):
        require_memory((3 << 29) + 1, "This", "Fewer.")
    with pytest.raises(ConfigError, match=r"^This would take 21\.3 PiB of memory"):
        require_memory(24 * 10**15, "This", "Fewer.")
    with pytest.raises(ConfigError, match=r"^This would take more than 100,000,000 EiB of memory"):
        require_memory(10**5000, "This", "Fewer.")


def test_free_memory_is_the_smallest_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert 0 < free_memory() <= psutil.virtual_memory().total
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    used.write_text("345\n")
    monkeypatch.setattr("fednorm.memory._GROUPS", ((str(limit), str(used)),))
    for content, expected in (("12345\n", 12000), ("max\n", None)):
        limit.write_text(content)
        assert free_memory() == expected or (expected is None and free_memory() > 12345)


@pytest.mark.parametrize("size", [10**5, 10**9])
@pytest.mark.parametrize("name", ["digits_mini", "digits"])
def test_a_huge_image_size_says_what_it_would_take(tmp_path: Path, write_folder: Any, name: str, size: int) -> None:
    write_folder(tmp_path, "mnist")
    config = DataConfig(name=name, dir=str(tmp_path), image_size=size)
    words = rf"images of {size} x {size} pixels would take .*iB of memory; .*image_size"
    if name == "digits_mini":  # made with 28 pixels a side
        words = rf"resized to 512 at most; got {size}\. Lower data\.image_size"
    with pytest.raises(DataError, match=words):
        load_federation(config, image_size=28, seed=1)


@pytest.mark.parametrize("count", [2, 4])
def test_more_or_fewer_images_than_announced_are_refused(count: int) -> None:
    images = [Image.fromarray(np.zeros((2, 2), np.uint8))] * 3
    with pytest.raises(DataError, match=f"{count} images were announced and 3 are there"):
        stack(iter(images), count, 2)
