"""mini_imagenet: mini-ImageNet as one domain. Vinyals et al., https://arxiv.org/abs/1606.04080."""

from __future__ import annotations

from fednorm.data.benchmarks import Benchmark, one_domain

SPEC = Benchmark(
    name="mini_imagenet",
    summary="mini-ImageNet (100 classes, 500 training and 100 test images each) as one domain, for streams",
    note="Made by fednorm data prepare mini_imagenet. Of each class the first sixth is tested on, as in online "
    "continual learning; it is no few-shot split.",
    sizes={"mini_imagenet": (100, {"": (50_000, 10_000)})},
    load=one_domain("mini_imagenet", "mini-ImageNet"),
)
