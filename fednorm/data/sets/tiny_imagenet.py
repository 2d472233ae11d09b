"""tiny_imagenet: Tiny-ImageNet as one domain. Le, Yang, Stanford CS 231N, 2015."""

from __future__ import annotations

from fednorm.data.benchmarks import Benchmark, one_domain

SPEC = Benchmark(
    name="tiny_imagenet",
    summary="Tiny-ImageNet (200 classes, 64 x 64) as one domain, for label skew and streams",
    note="Made by fednorm data prepare tiny_imagenet. Its validation images are tested on: test labels are not public.",
    sizes={"tiny_imagenet": (200, {"": (100_000, 10_000)})},
    load=one_domain("tiny_imagenet", "Tiny-ImageNet"),
)
