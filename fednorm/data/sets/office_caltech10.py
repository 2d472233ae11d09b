"""office_caltech10: four domains of ten classes. Gong, Shi, Sha, Grauman, CVPR 2012."""

from __future__ import annotations

from fednorm.data.benchmarks import Benchmark, Loaded, Reader, loaded, with_domains


def _office(reader: Reader) -> Loaded:
    source = with_domains(reader, reader.read("office_caltech10"))
    note = "Office-Caltech-10: the train/test split is the folder's own, not that of FedBN's files."
    return loaded("Office-Caltech-10", [source], source.split_domains(reader.wanted(())), (note,))


SPEC = Benchmark(
    name="office_caltech10",
    summary="Office-Caltech-10: amazon, caltech10, dslr, webcam; ten classes",
    note="webcam and dslr show the same objects from several views.",
    sizes={
        "office_caltech10": (
            10,
            {"amazon": (766, 192), "caltech10": (898, 225), "dslr": (125, 32), "webcam": (236, 59)},  # as FedBN splits
        )
    },
    load=_office,
)
