"""Which runs a cohort can carry out: what has a stacked form, and a trial that the stack computes what a client does.

Strategies, effects and optimizers act by code of their own, and are known by their types. Of layers only those are
known that take moments from the batch; of all else in a network, a stranger's too, a trial tells: one step of two
clients, stacked and padded and each alone, must have the same gradients.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from fednorm.federation.cohort.batches import Images
from fednorm.federation.cohort.effects import ADJUST
from fednorm.federation.cohort.layers import TWINS
from fednorm.federation.cohort.network import StackedNetwork, Tensors
from fednorm.federation.cohort.optimizers import MAKERS
from fednorm.federation.local import Local
from fednorm.norms import spec_of
from fednorm.optim.projection import WeightProjection
from fednorm.roles import Role
from fednorm.spec import HookedLayer

if TYPE_CHECKING:
    from fednorm.federation.workbench import Workbench

ROWS = 8
"""Most images of a trial's batch."""

TOLERANCE = 0.02
"""How far a trial's gradient may be from the client's, as a share of its own largest entry: rounding alone makes some
thousandths of it where a batch of few images is normalized, another formula makes tenths."""

ROUNDING = 1e-5
"""As a share of the largest entry of all gradients, or of a buffer: what is smaller is rounding itself."""


def refusal(bench: Workbench) -> str:
    """Return why a run's clients cannot train as a cohort, a clause; empty where they can."""
    return next(_reasons(bench), "") or trial(bench)


def _reasons(bench: Workbench) -> Iterator[str]:
    config, trainee = bench.config, bench.trainee
    train = config.train
    if train.private_noise:
        yield "private training (train.private_noise) takes the gradients of single images"
    if config.amp != "none" or config.compile:
        yield "a cohort computes in single precision without torch.compile (amp none, compile false)"
    if train.optimizer not in MAKERS:
        yield f"optimizer {train.optimizer} has no stacked form; {', '.join(MAKERS)} have one"
    elif not train.reset_optimizer and (train.momentum or train.optimizer != "sgd"):
        yield "train.reset_optimizer is false, and a cohort's optimizer begins anew with every round"
    for effect in (*trainee.adjust, *trainee.after):
        if type(effect) in ADJUST or (type(effect) is WeightProjection and not effect.counts):
            continue
        every = " after every several updates" if type(effect) is WeightProjection else ""
        yield f"{type(effect).__name__}{every} has no stacked form"
    yield from _of_local(bench.strategy.local, config.strategy.name)
    yield from _of_layers(bench)


def _of_local(local: type[Local], strategy: str) -> Iterator[str]:
    """Yield what a strategy's client side does that has no stacked form."""
    line = local.__mro__
    stacked = next(place for place, kind in enumerate(line) if "stacked" in vars(kind))
    for name in ("begin", "loss", "adjust", "end"):
        place = next(place for place, kind in enumerate(line) if name in vars(kind))
        if line[place] is not Local and (place < stacked or local.stacked is None):
            yield (
                f"clients of strategy {strategy} do something of their own in training ({local.__name__}.{name}), "
                "which has no stacked form"
            )
            return


def _of_layers(bench: Workbench) -> Iterator[str]:
    """Yield the layers that a network's functional form cannot be made of."""
    for path, module in bench.model.named_modules():
        if isinstance(module, HookedLayer):
            yield f"layer {path} ({type(module).__name__}) takes part in the training step beside its forward pass"
        spec = spec_of(module)
        coupled = spec is not None and getattr(module, "batch_coupled", spec.batch_coupled)
        if coupled and type(module) not in TWINS:
            kind = type(module).__name__
            yield f"layer {path} ({kind}) takes moments from the batch, and has no form for padded batches"


def trial(bench: Workbench) -> str:
    """Compute the gradients of a padded batch of two clients as a cohort, and of each batch as the network itself does.

    The workbench's model holds the same tensors before and after.

    Returns:
        What differs, or cannot be computed, a clause; empty where nothing does.
    """
    training = bench.federation.counts.trains.nonzero()[0][:ROWS]
    if not len(training):
        return ""
    client = max((bench.federation.clients[int(pid)] for pid in training), key=lambda client: len(client.train))
    count, least = min(len(client.train), bench.config.train.batch_size, ROWS), 1 + bench.trainee.batch_coupled
    counts = torch.tensor([count, max(count - 1, least)])
    images = Images([client.train] * 2, bench.trainee.device)
    batch, labels = images.read(torch.arange(count + 1).where(torch.arange(count + 1) < counts[:, None], 0))
    network = StackedNetwork(bench.model, bench.plan.keys(Role.CONSTANT))
    before = {key: tensor.clone() for key, tensor in bench.model.state_dict().items()}
    with bench.trainee.trainable.stage(probing=False):
        network.modes_of(bench.model)
        trained = [key for key in network.parameters if key in bench.trainee.trainable.active]
        try:
            found = _stacked(network, network.stack(before, 2), trained, batch, labels, counts.to(batch.device))
        except Exception as error:  # whatever a stranger's network cannot do for several clients at once
            words = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            return f"the network cannot be computed for several clients at once ({type(error).__name__}: {words[:200]})"
        try:
            for number, images_of in enumerate(counts.tolist()):
                bench.write(before)
                alone = _alone(bench, batch[number, :images_of], labels[number, :images_of])
                if key := _differing({key: tensor[number] for key, tensor in found.items()}, alone, set(trained)):
                    return (
                        f"{key} of a padded batch is not what it is of the batch alone, so that something in the "
                        "network looks at other rows than an image's own"
                    )
        finally:
            bench.write(before)
            bench.trainee.optimizer.zero_grad(set_to_none=True)
    return ""


def _stacked(
    network: StackedNetwork, tensors: Tensors, trained: Sequence[str], images: Tensor, labels: Tensor, counts: Tensor
) -> Tensors:
    """Return the gradients of a step by key, and its buffers, of two clients."""
    for key in trained:
        tensors[key].requires_grad_()
    mask = torch.arange(images.shape[1], device=images.device) < counts[:, None]
    logits, made = network.train(tensors, images, mask.to(images.dtype), counts.to(images.dtype))
    losses = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(mask.shape)
    total = (torch.where(mask, losses, 0).sum(1) / counts).sum()
    gradients = torch.autograd.grad(total, [tensors[key] for key in trained], allow_unused=True)
    buffers = {key: tensors[key] for key in network.buffers} | made
    return {key: g for key, g in zip(trained, gradients, strict=True) if g is not None} | buffers


def _alone(bench: Workbench, images: Tensor, labels: Tensor) -> Tensors:
    """Return the gradients of a step by key, and its buffers, of one client."""
    bench.trainee.optimizer.zero_grad(set_to_none=True)
    functional.cross_entropy(bench.model(images), labels).backward()  # type: ignore[no-untyped-call]
    gradients = {key: p.grad.clone() for key, p in bench.model.named_parameters() if p.grad is not None}
    return {key: tensor.clone() for key, tensor in bench.model.named_buffers()} | gradients


def _differing(stacked: Tensors, alone: Tensors, trained: Collection[str]) -> str:
    """Return the key of the first tensor that is not the same, or nothing."""
    most = max((float(alone[key].abs().max()) for key in trained if key in alone), default=0.0)
    for key, one in stacked.items():
        other = alone.get(key)
        if other is None or not other.numel():
            continue
        if not one.is_floating_point():
            if not torch.equal(one, other):
                return key
            continue
        largest = float(other.abs().max())
        off = float((one - other).abs().max())
        if math.isfinite(largest) and not off <= TOLERANCE * largest + ROUNDING * (most if key in trained else largest):
            return f"the gradient of {key}" if key in trained else key
    return ""
