"""Test-time adaptation on a client: its images, its copy of the network, nothing kept."""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import RecordDict
from torch import Tensor

from fednorm.adaptation import Adaptation
from fednorm.adaptation._scoring import Adapted, made_adaptations, refined
from fednorm.data.domain import Client
from fednorm.federation.replies import EXTRA
from fednorm.federation.wire import arrays_of, config_of, unpack
from fednorm.federation.workbench import Workbench

ADAPTATION, LEARNING = "adaptation", "learning"
"""Settings of a message: which of ``evaluate.adaptation``, from 0; which round of its learning, from 0."""


def scores(bench: Workbench, client: Client, content: RecordDict) -> dict[str, float]:
    """Return the accuracy of the workbench's model while it adapts itself to a client's images.

    Args:
        bench: Its model holds the trained network, and is left as it is.
        client: The client.
        content: The message.
    """
    how, knowledge = _asked(bench, content)
    split = client.validation if bench.config.evaluate.split == "validation" else client.test
    accuracy = Adapted(how, bench.model, knowledge).accuracy(split, bench.config.seed, "client", client.partition_id)
    return {"num-examples": len(split), "accuracy": accuracy}


def refine(bench: Workbench, client: Client, content: RecordDict) -> dict[str, Tensor]:
    """Return what a training client makes of what an adaptation knows, on its images held back, or trained on."""
    how, knowledge = _asked(bench, content)
    split = client.validation if len(client.validation) else client.train
    names = ("client", client.partition_id, LEARNING, int(str(config_of(content)[LEARNING])))
    return refined(how, bench.model, knowledge, split, bench.config.seed, *names)


def _asked(bench: Workbench, content: RecordDict) -> tuple[Adaptation, Mapping[str, Tensor]]:
    number = int(str(config_of(content)[ADAPTATION]))
    knowledge = unpack(arrays_of(content, EXTRA)) if EXTRA in content else {}
    return made_adaptations(bench.config.evaluate)[number], {key: t.clone() for key, t in knowledge.items()}
