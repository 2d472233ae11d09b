"""split_digits: the embedded ``digits_mini`` in five experiences of two digits each, class-incremental.

The Split MNIST of Zenke, Poole, Ganguli. Continual Learning Through Synaptic Intelligence. ICML 2017.
https://arxiv.org/abs/1703.04200, on the small embedded images, so that a demonstration and the tests need no folder.
It is a stand-in: its numbers are not Split MNIST's. Every experience has images of all the domains of ``digits_mini``
(or of those in ``data.domains``).
"""

from __future__ import annotations

from fednorm.cards import Citation
from fednorm.streams.dealing import splits
from fednorm.streams.spec import ScenarioSpec

SPEC = ScenarioSpec(
    name="split_digits",
    summary="The embedded digits in five experiences of two digits each; needs no folder.",
    citation=Citation(
        title="Continual Learning Through Synaptic Intelligence",
        authors="Zenke, Poole, Ganguli",
        year=2017,
        arxiv="1703.04200",
    ),
    make=splits("split_digits", usual=5),
    data=("digits_mini",),
    defaults={"model": {"name": "digits_cnn", "width": 16}},
)
