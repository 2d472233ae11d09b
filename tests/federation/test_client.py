"""The client: what it trains on, keeps and evaluates with; and that no client leaves a trace in another."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fednorm.data.domain import pixels
from fednorm.errors import ConfigError, DataError
from fednorm.federation.client import fit, reestimate_on, score
from fednorm.federation.wire import pack, unpack
from fednorm.roles import LEARNED, STATISTICS, Role

State = dict[str, Tensor]
GROUP_NORM = {"name": "group_norm", "num_groups": 2}
TWICE = {"train": {"local_epochs": 2}}


def equal(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def batches_of(site: Any, pid: int, server_round: int) -> list[Tensor]:
    """Return the batches that a client's training feeds to the model."""
    seen: list[Tensor] = []
    hook = site.bench.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    fit(site.bench, site.bench.federation.clients[pid], server_round=server_round)
    hook.remove()
    return seen


# Batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "sizes"), [({"name": "batch_norm"}, [4, 4]), (GROUP_NORM, [4, 4, 1]), ({"name": "sws"}, [4, 4, 1])]
)
def test_a_last_batch_of_one_is_dropped_where_layers_estimate_from_the_batch(
    norm: dict[str, Any], sizes: list[int], make_site: Any
) -> None:
    site = make_site(norm=norm, train={"local_epochs": 2})
    assert [len(batch) for batch in batches_of(site, 0, 1)] == sizes * 2
    assert [len(batch) for batch in batches_of(site, 1, 1)] == [4, 4] * 2


def test_reported_numbers_are_those_of_the_images_seen(make_site: Any) -> None:
    site = make_site(train={"learning_rate": 1e-30, "local_epochs": 2})
    client = site.bench.federation.clients[0]
    site.bench.model.train()
    before = site.bench.read(site.bench.model.state_dict())
    batches: list[Tensor] = []
    hook = site.bench.model.register_forward_pre_hook(lambda _, args: batches.append(args[0].clone()))
    metrics = fit(site.bench, client, server_round=1)
    hook.remove()
    where = {pixels(client.train.images[i : i + 1]).numpy().tobytes(): i for i in range(len(client.train.images))}
    site.bench.write(before)
    losses, hits = [], []
    for batch in batches:
        labels = client.train.labels[[where[image[None].numpy().tobytes()] for image in batch]]
        logits = site.bench.model(batch).double()
        losses.append(functional.cross_entropy(logits, labels, reduction="none"))
        hits.append((logits.argmax(1) == labels).double())
    assert metrics["num-examples"] == 9
    assert len(torch.cat(losses)) == 16
    assert metrics["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(torch.cat(hits).mean().item())


def test_batches_depend_on_seed_client_and_round_and_on_nothing_global(make_site: Any) -> None:
    def batches(pid: int = 1, server_round: int = 1, seed: int = 1, disturb: int = 0) -> bytes:
        torch.manual_seed(disturb)
        np.random.seed(disturb)  # noqa: NPY002 - the global generator is what must not matter
        random.seed(disturb)
        site = make_site(norm=GROUP_NORM, seed=seed)
        return b"".join(batch.numpy().tobytes() for batch in batches_of(site, pid, server_round))

    first = batches()
    assert batches(disturb=5) == first
    assert len({first, batches(server_round=2), batches(seed=2), batches(pid=0)}) == 4


def test_an_epoch_is_every_image_once_and_epochs_differ(make_site: Any) -> None:
    site = make_site(norm=GROUP_NORM, train={"local_epochs": 2})
    batches = batches_of(site, 0, 1)
    images, _ = site.bench.federation.clients[0].train.batch(torch.arange(9))
    everything = sorted(image.numpy().tobytes() for image in pixels(images))
    epochs = [[image.numpy().tobytes() for batch in half for image in batch] for half in (batches[:3], batches[3:])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == everything
    assert epochs[0] != epochs[1]


def test_unfit_batches_are_refused_before_training(make_site: Any) -> None:
    with pytest.raises(ConfigError, match=r"train\.batch_size is 1"):
        make_site(train={"batch_size": 1})
    with pytest.raises(DataError, match=r"Client 1 \(domain 'domain1'\) has one training image"):
        make_site(sizes=((4, 4), (1, 4)))
    assert make_site(sizes=((4, 4), (1, 4)), norm=GROUP_NORM, train={"batch_size": 1}).train(1, 1)


# Global state -----------------------------------------------------------------------------------------------------


def with_dropout(site: Any) -> Any:
    site.bench.model.act4 = nn.Sequential(nn.ReLU(), nn.Dropout(0.5))
    return site


def test_pytorchs_generator_is_left_as_it_was_even_with_dropout(make_site: Any) -> None:
    site = with_dropout(make_site("fedbn"))
    torch.manual_seed(11)
    before = torch.get_rng_state()
    site.train(0, 1)
    site.evaluate(0)
    site.evaluate(1)
    site.evaluate(0, mode="reestimated", images=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_draws_from_the_clients_own_stream(make_site: Any) -> None:
    def trained(disturb: int, server_round: int = 1) -> State:
        torch.manual_seed(disturb)
        return with_dropout(make_site()).train(0, server_round)

    assert equal(trained(0), trained(1))
    assert not equal(trained(0), make_site().train(0, 1))


def test_batches_do_not_depend_on_what_the_model_draws(make_site: Any) -> None:
    plain, drawing = (batches_of(site, 0, 1) for site in (make_site(**TWICE), with_dropout(make_site(**TWICE))))
    assert len(plain) == 4
    assert all(torch.equal(a, b) for a, b in zip(plain, drawing, strict=True))


# What a client keeps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "kinds"),
    [("fedbn", STATISTICS | {"scale", "shift"}), ("silobn", STATISTICS), ("fedavg", set()), ("fedwon", set())],
)
def test_a_client_keeps_its_local_tensors_and_nothing_else(strategy: str, kinds: set[str], make_site: Any) -> None:
    site = make_site(strategy)
    assert site.kept(0) == {}
    site.evaluate(0)
    assert site.kept(0) == {}
    reply = site.train(0, 1)
    entries = site.bench.plan.entries
    assert list(site.kept(0)) == [entry.key for entry in entries if entry.kind in kinds]
    assert list(reply) == [entry.key for entry in entries if entry.role is Role.SHARED]
    after = site.bench.model.state_dict()
    assert all(torch.equal(tensor, after[key]) for key, tensor in {**site.kept(0), **reply}.items())
    kept = site.kept(0)
    site.evaluate(0)
    site.evaluate(0, mode="reestimated", images=4)
    assert equal(site.kept(0), kept)


def test_local_tensors_survive_rounds_without_the_client(make_site: Any) -> None:
    site = make_site("fedbn", rounds={"fraction": 0.34})
    states: dict[int, dict[int, State]] = {}
    sampled: dict[int, tuple[int, ...]] = {}

    def on_round(report: Any, _: Any) -> None:
        sampled[report.server_round] = report.sampled
        states[report.server_round] = {pid: site.kept(pid) for pid in range(3)}

    site.strategy.start(site.grid, site.strategy.initial_arrays(site.bench.model), num_rounds=8, on_round=on_round)
    assert {len(pids) for pids in sampled.values()} == {1}
    returns = 0
    for current in range(2, 9):
        for pid in range(3):
            before, after = states[current - 1][pid], states[current][pid]
            assert equal(before, after) == (pid not in sampled[current])
            returns += bool(before) and pid in sampled[current] and pid not in sampled[current - 1]
    assert returns > 0


def test_a_returning_client_trains_on_from_its_own_tensors(make_site: Any) -> None:
    site = make_site("fedbn")
    site.train(0, 1)
    own = site.kept(0)
    seen: State = {}
    hook = site.bench.model.register_forward_pre_hook(
        lambda *_: seen.update(site.bench.read(site.bench.model.state_dict())) if not seen else None
    )
    arrays = site.strategy.initial_arrays(site.bench.model)
    site.train(1, 2)
    seen.clear()
    site.train(0, 5, arrays)
    hook.remove()
    assert equal(seen, {key: {**own, **unpack(arrays)}[key] for key in seen})


@pytest.mark.parametrize("strategy", ["fedbn", "silobn"])
def test_a_training_that_diverged_leaves_the_clients_tensors_as_they_were(strategy: str, make_site: Any) -> None:
    site = make_site(strategy)
    good = pack(site.train(0, 1))
    kept = site.kept(0)
    bad = unpack(good)
    bad["conv1.weight"] = torch.full_like(bad["conv1.weight"], torch.nan)
    assert site.train(0, 2, pack(bad))["fc3.weight"].isnan().any()
    assert equal(site.kept(0), kept)
    site.train(0, 3, good)
    assert not equal(site.kept(0), kept)


@pytest.mark.parametrize("strategy", ["fedbn", "silobn"])
def test_each_client_goes_on_with_its_own_counter(strategy: str, make_site: Any) -> None:
    site = make_site(strategy, train={"batch_size": 2})
    site.strategy.start(site.grid, site.strategy.initial_arrays(site.bench.model), num_rounds=2)
    kept = [site.kept(pid).items() for pid in range(3)]
    counters = [{int(tensor) for key, tensor in own if key.endswith("num_batches_tracked")} for own in kept]
    assert counters == [{2 * 4}, {2 * 4}, {2 * 2}]  # 9, 8 and 5 images in batches of two, none of one


def test_fedavgs_counters_are_the_first_clients(make_site: Any) -> None:
    site = make_site("fedavg", train={"batch_size": 2})
    result = site.strategy.start(site.grid, site.strategy.initial_arrays(site.bench.model), num_rounds=2)
    assert {int(unpack(result.arrays)[key]) for key in site.bench.plan.counters} == {8}


# Evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["fedbn", "silobn"])
def test_a_client_that_never_trained_estimates_its_statistics_on_its_training_images(
    strategy: str, make_site: Any
) -> None:
    site, other = make_site(strategy), make_site(strategy)
    arrays = pack(site.train(0, 1))
    evaluated = site.evaluate(1, arrays)
    client = other.bench.federation.clients[1]
    other.bench.write({**other.bench.read(other.bench.model.state_dict()), **unpack(arrays)})
    wrong = score(other.bench, client.test)
    reestimate_on(other.bench, client.train, 8)
    assert evaluated == score(other.bench, client.test)
    assert evaluated["loss"] != wrong["loss"]
    assert site.kept(1) == {}
    assert evaluated["num-examples"] == 6


def test_under_fedavg_every_client_evaluates_the_servers_model(make_site: Any) -> None:
    site, other = make_site(), make_site()
    arrays = pack(site.train(0, 1))
    other.bench.write(unpack(arrays))
    assert site.evaluate(2, arrays) == score(other.bench, other.bench.federation.clients[2].test)


def test_an_evaluation_under_given_tensors_uses_those_and_not_the_clients_own(make_site: Any) -> None:
    site, other = make_site("fedbn"), make_site("fedbn")
    shared = site.train(0, 1)
    site.train(1, 1)
    given = {**shared, **site.kept(0)}
    other.bench.write(given)
    expected = score(other.bench, other.bench.federation.clients[1].test)
    assert site.evaluate(1, pack(given), mode="given") == expected
    assert site.evaluate(1, pack(shared))["loss"] != expected["loss"]


def test_a_held_out_client_estimates_nothing(make_site: Any) -> None:
    site, other = make_site("fedbn", held_out=1), make_site("fedbn", held_out=1)
    assert site.evaluate(2) == score(other.bench, other.bench.federation.clients[2].test)


def test_evaluating_nothing_gives_zeros(make_site: Any) -> None:
    site = make_site(sizes=((8, 0), (8, 3)))
    assert site.evaluate(0) == {"num-examples": 0, "loss": 0.0, "accuracy": 0.0}


def test_scores_do_not_depend_on_the_size_of_evaluation_batches(make_site: Any) -> None:
    one, many = make_site(evaluate={"batch_size": 1}).evaluate(1), make_site(evaluate={"batch_size": 64}).evaluate(1)
    assert one["accuracy"] == many["accuracy"]
    assert one["loss"] == pytest.approx(many["loss"], rel=1e-6)


@pytest.mark.parametrize("count", [4, 6, 8, 100])
def test_reestimated_statistics_are_the_batches_mean_moments(count: int, make_site: Any) -> None:
    site = make_site(evaluate={"batch_size": 4})
    client, model = site.bench.federation.clients[1], site.bench.model
    with torch.no_grad():
        model.norm1.running_mean.fill_(7)
        model.norm1.num_batches_tracked.fill_(5)
    momenta = [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    conv = model.conv1
    images = client.train.images[client.train.index[:count]].double() / 127.5 - 1
    maps = functional.conv2d(images, conv.weight.double(), conv.bias.double(), padding=2)
    parts = [batch.transpose(0, 1).flatten(1) for batch in maps.tensor_split(-(-len(maps) // 4))]
    mean = torch.stack([part.mean(1) for part in parts]).mean(0)
    var = torch.stack([part.var(1, unbiased=True) for part in parts]).mean(0)
    reestimate_on(site.bench, client.train, count)
    torch.testing.assert_close(model.norm1.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.norm1.running_var.double(), var, rtol=1e-5, atol=1e-6)
    assert [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)] == momenta


def test_reestimation_measures_without_dropout_and_changes_nothing_learned(make_site: Any) -> None:
    plain, site = make_site(), with_dropout(make_site())
    learned = [key for key, entry in site.bench.plan.by_key.items() if entry.kind in LEARNED]
    before = site.bench.read(learned)
    for each in (plain, site):
        reestimate_on(each.bench, each.bench.federation.clients[1].train, 8)
    assert equal(site.bench.read(learned), before)
    assert equal(site.bench.read(site.bench.statistics), plain.bench.read(plain.bench.statistics))


# Nothing leaks ----------------------------------------------------------------------------------------------------


@pytest.mark.few(2)
@pytest.mark.parametrize("strategy", ["fedavg", "fedbn", "fedwon", "silobn"])
def test_clients_in_turn_equal_each_client_alone(strategy: str, make_site: Any) -> None:
    def turns(site: Any, order: list[int]) -> dict[int, list[Any]]:
        initial = {pid: site.strategy.initial_arrays(site.bench.model) for pid in range(2)}
        log: dict[int, list[Any]] = {0: [], 1: []}
        for server_round in (1, 2, 3):
            for pid in order:
                log[pid].append(site.evaluate(pid, initial[pid], mode="reestimated", images=4))
                reply = site.train(pid, server_round, initial[pid])
                initial[pid] = pack(reply)
                log[pid] += [reply, site.kept(pid), site.evaluate(pid, initial[pid])]
        return log

    train = {"momentum": 0.9, "weight_decay": 0.01}
    together = turns(make_site(strategy, train=train), [0, 1])
    for pid in range(2):
        alone = turns(make_site(strategy, train=train), [pid])[pid]
        assert len(alone) == len(together[pid]) == 12
        for a, b in zip(alone, together[pid], strict=True):
            assert equal(a, b) if all(isinstance(v, Tensor) for v in a.values()) else a == b


# The proximal term ------------------------------------------------------------------------------------------------


def test_the_proximal_term_is_over_shared_learned_tensors(make_site: Any) -> None:
    for strategy, left_out in (("fedbn", LEARNED - {"weight"}), ("silobn", set()), ("fedprox", set())):
        site = make_site(strategy)
        named = dict(site.bench.model.named_parameters())
        wanted = [p for key, p in named.items() if site.bench.plan.by_key[key].kind not in left_out]
        shared = site.bench.turn(site.bench.federation.clients[0], 1).shared
        assert [id(p) for p in shared.values()] == [id(p) for p in wanted]
        assert len(wanted) == len(named) - (10 if strategy == "fedbn" else 0)


@pytest.mark.parametrize("local", ["", "norm*"])
def test_training_with_mu_is_gradient_descent_on_the_penalised_loss(local: str, make_site: Any) -> None:
    mu, rate = 3.0, 0.05
    where_local = {"local": local} if local else {}
    site, other = (make_site("fedprox", options={"mu": 0.5, **where_local}) for _ in range(2))
    batches = batches_of(make_site("fedavg"), 1, 1)
    client, model = other.bench.federation.clients[1], other.bench.model
    where = {pixels(client.train.images[i : i + 1]).numpy().tobytes(): i for i in range(len(client.train.images))}
    anchors = {key: p.detach().clone() for key, p in model.named_parameters()}
    model.train()
    for batch in batches:
        labels = client.train.labels[[where[image[None].numpy().tobytes()] for image in batch]]
        loss = functional.cross_entropy(model(batch), labels)
        for key, parameter in model.named_parameters():
            if other.bench.plan.by_key[key].role is Role.SHARED:
                loss = loss + mu / 2 * (parameter - anchors[key]).square().sum()
        for parameter, gradient in zip(
            model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            parameter.data -= rate * gradient
    site.train(1, 1, **{"proximal-mu": mu})
    ours, plain = site.bench.model.state_dict(), make_site("fedavg").train(1, 1)
    # The term is added to the loss here and to the gradient there: kinds of CPU round the two apart.
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours["fc3.weight"], plain["fc3.weight"], rtol=1e-4, atol=1e-5)


def test_mu_of_zero_trains_as_fedavg_to_the_last_bit(make_site: Any) -> None:
    def final(strategy: str, **options: Any) -> State:
        site = make_site(strategy, options=options)
        result = site.strategy.start(site.grid, site.strategy.initial_arrays(site.bench.model), num_rounds=2)
        return unpack(result.arrays)

    assert equal(final("fedprox", mu=0.0), final("fedavg"))
    assert not equal(final("fedprox", mu=0.1), final("fedavg"))
