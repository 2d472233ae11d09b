"""domainnet: six domains of 345 classes. Peng et al., ICCV 2019, https://arxiv.org/abs/1812.01754."""

from __future__ import annotations

from fednorm.data.benchmarks import Benchmark, Loaded, Reader, several_domains

NUM_CLASSES = 345

_read = several_domains("domainnet", "DomainNet")


def _domainnet(reader: Reader) -> Loaded:
    loaded = _read(reader)
    notes = list(loaded.notes)
    if loaded.num_classes != NUM_CLASSES:
        notes.append(f"DomainNet with {loaded.num_classes} of its {NUM_CLASSES} classes.")
    return Loaded(loaded.title, loaded.num_classes, loaded.domains, tuple(notes), loaded.class_names)


SPEC = Benchmark(
    name="domainnet",
    summary="DomainNet: clipart, infograph, painting, quickdraw, real, sketch; 345 classes, or a choice of them",
    note="Made by fednorm data prepare domainnet; --classes fedbn takes FedBN's ten classes, in the official split.",
    sizes={
        "domainnet": (
            NUM_CLASSES,
            {
                "clipart": (33_525, 14_604),
                "infograph": (36_023, 15_582),
                "painting": (50_416, 21_850),
                "quickdraw": (120_750, 51_750),
                "real": (120_906, 52_041),
                "sketch": (48_212, 20_916),
            },
        )
    },
    load=_domainnet,
)
