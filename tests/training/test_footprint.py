from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from scipy.stats import binom
from torch import Tensor, nn

from fednorm import memory
from fednorm.cards import NORMS
from fednorm.config import resolve
from fednorm.errors import ConfigError
from fednorm.training import footprint as module
from fednorm.training.footprint import Footprint, footprint, largest_draw, require_footprint


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    module._measured.cache_clear()
    yield
    module._measured.cache_clear()


def measured(model: str, norm: str, size: int = 32, width: int = 4) -> Footprint:
    made = NORMS[norm].made({}).for_stream(num_tasks=2, batch_ratio=1)
    return footprint(model, made, num_classes=10, image_size=size, width=width)


def test_what_an_mlp_takes() -> None:
    hidden, inputs = 4, 3 * 8 * 8
    takes = measured("mlp", "none", size=8)
    assert takes.parameters == (inputs + 1) * hidden + 3 * (hidden + 1) * hidden + (hidden + 1) * 10
    assert takes.state == 4 * takes.parameters
    assert takes.largest == 4 * inputs  # the flattened image


@pytest.mark.parametrize(("model", "norm"), [("digits_cnn", "batch_norm"), ("resnet18", "sws"), ("vit", "layer_norm")])
def test_values_make_no_difference(model: str, norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = measured(model, norm)
    monkeypatch.setattr(module, "TRIED_BYTES", 0)
    module._measured.cache_clear()
    assert measured(model, norm) == tried


def test_a_layer_that_needs_values_is_measured_with_all_after_it() -> None:
    assert measured("digits_cnn", "batch_norm_corrected").kept == measured("digits_cnn", "batch_norm").kept


def test_no_global_generator_is_touched() -> None:
    before = torch.random.get_rng_state()
    measured("digits_cnn", "batch_norm")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_building_is_stopped_before_it_takes_too_much() -> None:
    with pytest.raises(module._TooLargeError), module._Limit("cpu"):
        torch.empty(module.TRIED_BYTES // 4 + 1)  # not written to: it takes nothing yet
    with module._Limit("cpu"):
        tensor = torch.empty(module.TRIED_BYTES // 8)
        for _ in range(9):
            tensor = tensor.view(-1, 2).flatten().detach()  # the same memory again
    with module._Limit("meta"):
        torch.empty(2**40, device="meta")


def test_a_wide_layer_on_large_images_is_not_run() -> None:
    class Wide(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            pytest.fail(f"it was run on {input.shape}")

    with pytest.raises(module._TooLargeError):
        module._outputs(Wide(1, 64), 1024, "cpu")


@pytest.mark.parametrize(("private", "batch"), [(0.0, 0), (1.0, 32), (1.0, 64), (1.0, 200)])
def test_private_training_has_the_gradient_of_every_image(
    private: float, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An mlp on 8 x 8 pixels; of 64 images a batch of 32 in the mean has seldom more than 32 + 4 sqrt(32 / 2) = 48."""
    width, inputs = 2000, 3 * 8 * 8
    parameters = (inputs + 1) * width + 3 * (width + 1) * width + (width + 1) * 10
    drawn = {0: 64, 32: 48, 64: 64, 200: 64}[batch]
    values = {"model": {"name": "mlp", "width": width}, "norm": {"name": "none"}}
    config = resolve({**values, "train": {"batch_size": batch or 64, "private_noise": private}})
    norm = config.norm.card.made({})
    one = footprint("mlp", norm, num_classes=10, image_size=8, width=width).kept + 4 * inputs
    needed = 5 * 4 * parameters + drawn * (one + (4 * parameters if private else 0))
    sizes = {"num_classes": 10, "image_size": 8, "copies": 5, "train_images": 64, "test_images": 8}
    monkeypatch.setattr(memory, "free_memory", lambda: needed)
    require_footprint(config, norm, **sizes)
    if not private:
        return
    monkeypatch.setattr(memory, "free_memory", lambda: needed - 1)
    words = (
        rf"mlp of width 2,000 on {drawn} images .* gradient of its {parameters:,} parameters for each .*GiB of memory"
    )
    with pytest.raises(ConfigError, match=words + r".*Lower train\.batch_size"):
        require_footprint(config, norm, **sizes)


@pytest.mark.parametrize(("batch", "count"), [(1, 40), (16, 64), (32, 743), (256, 5000)])
def test_hardly_a_draw_is_larger(batch: int, count: int) -> None:
    more = float(binom.sf(largest_draw(batch, count), count, batch / count))
    assert more < 1e-3
    assert largest_draw(batch, batch - 1) == batch - 1
    assert largest_draw(batch, 0) == 0
