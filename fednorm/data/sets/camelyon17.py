"""camelyon17: patches of lymph nodes from five hospitals. Koh et al., WILDS, https://arxiv.org/abs/2012.07421."""

from __future__ import annotations

from dataclasses import replace

import torch

from fednorm.data.benchmarks import Benchmark, Loaded, Reader, several_domains

NOTE = "{} is tested on all of its images, as WILDS tests hospitals that nobody trains on."

_read = several_domains("camelyon17", "Camelyon17")


def _camelyon17(reader: Reader) -> Loaded:
    loaded, held_out = _read(reader), reader.config.held_out
    domains = tuple(
        replace(domain, test=replace(domain.test, index=torch.cat([domain.train.index, domain.test.index])))
        if domain.name == held_out
        else domain
        for domain in loaded.domains
    )
    notes = (*loaded.notes, NOTE.format(held_out)) if held_out in {domain.name for domain in domains} else loaded.notes
    return replace(loaded, domains=domains, notes=notes)


SPEC = Benchmark(
    name="camelyon17",
    summary="Camelyon17-WILDS: patches with and without tumour, from hospital_0 to hospital_4",
    note="Made by fednorm data prepare camelyon17. WILDS trains on hospitals 0, 3, 4, selects on 1 and tests on 2: set "
    "data.domains and data.held_out.",
    sizes={
        "camelyon17": (
            2,
            {
                "hospital_0": (53_425, 6_011),
                "hospital_1": (27_923, 6_981),
                "hospital_2": (68_043, 17_011),
                "hospital_3": (116_959, 12_879),
                "hospital_4": (132_052, 14_670),
            },
        )
    },
    load=_camelyon17,
)
