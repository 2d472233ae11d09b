"""FedRDN: its statistics, its draws and a client's training, written out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fednorm.config import resolve
from fednorm.data.normalize import measured_by_image, normalized
from fednorm.errors import ConfigError
from fednorm.federation.simulate import simulate
from fednorm.rng import torch_stream
from strategies.fedrdn import MEANS, STDS, Drawn

RATE = 0.05


def statistics(client: Any) -> tuple[list[float], list[float]]:
    """Return the mean and std that the paper's client sends, in loops over images and channels."""
    images = client.train.batch(torch.arange(len(client.train)))[0].double() / 255
    means, stds = [], []
    for c in range(3):
        of_images = [(i[c].sum() / 16, ((i[c] - i[c].sum() / 16) ** 2).sum() / 15) for i in images]
        means.append(float(sum(m for m, _ in of_images) / len(images)))
        stds.append(float(sum(v**0.5 for _, v in of_images) / len(images)))
    return means, stds


def site_of(make_site: Any, **options: Any) -> Any:
    return make_site("fedrdn", options=options, model={"name": "mlp", "width": 8})


def test_every_client_is_asked_once_and_told_of_all_by_partition_id(make_site: Any) -> None:
    site = site_of(make_site)
    asked: list[str] = []
    send = site.grid.send_and_receive

    def counting(messages: Any, **more: Any) -> Any:
        listed = list(messages)
        asked.extend(message.metadata.message_type for message in listed)
        return send(listed, **more)

    site.grid.send_and_receive = counting
    arrays = site.strategy.initial_arrays(site.bench.model)
    site.strategy.start(site.grid, arrays, num_rounds=2, evaluate_every=2)
    assert asked.count("query.measure") == 3
    assert site.strategy.report.rejected == []
    right = [statistics(client) for client in site.bench.federation.clients]
    sent = site.strategy.client_config()
    for place, key in enumerate((MEANS, STDS)):
        expected = [value for client in right for value in client[place]]
        assert sent[key] == pytest.approx(expected, rel=1e-12)
    for client, (mean, std) in zip(site.bench.federation.clients, right, strict=True):
        for split in (client.train, client.test):  # what it is tested with
            assert split.scaling.mean[0] == pytest.approx(mean, rel=1e-12)
            assert split.scaling.std[0] == pytest.approx(std, rel=1e-12)


@pytest.mark.parametrize("draw", ["image", "batch"])
def test_a_clients_training_is_that_on_images_scaled_by_hand(draw: str, make_site: Any) -> None:
    site = site_of(make_site, draw=draw)
    clients = site.bench.federation.clients
    table = [statistics(client) for client in clients]
    means, stds = (torch.tensor([row[place] for row in table]) for place in range(2))
    arrays = site.strategy.initial_arrays(site.bench.model)
    model = copy.deepcopy(site.bench.model)
    config = {MEANS: means.double().flatten().tolist(), STDS: stds.double().flatten().tolist()}
    trained = site.train(1, 1, arrays, **config)
    rows = torch_stream(1, "client", 1, "round", 1, "batches")
    drawn = torch_stream(1, "client", 1, "round", 1, "fedrdn")
    pairs = set()
    for batch in torch.randperm(8, generator=rows).split(4):
        images, labels = clients[1].train.batch(batch)
        wanted = 4 if draw == "image" else 1
        i = torch.randint(3, (wanted,), generator=drawn).expand(4)
        j = torch.randint(3, (wanted,), generator=drawn).expand(4)
        pairs |= set(zip(i.tolist(), j.tolist(), strict=True))
        scaled = torch.stack(
            [(x / 255 - means[a].view(3, 1, 1)) / stds[b].view(3, 1, 1) for x, a, b in zip(images, i, j, strict=True)]
        )
        functional.cross_entropy(model(scaled), labels).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad
                parameter.grad = None
    assert any(a != b for a, b in pairs)  # a mean and a std of two clients
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(trained[key], tensor, rtol=1e-5, atol=1e-6)
    own = site.train(1, 1, arrays)  # nobody's statistics came: the client's own
    assert not torch.equal(own["fc1.weight"], trained["fc1.weight"])


def test_images_of_other_types_are_left_as_they_are() -> None:
    ready = torch.rand(2, 3, 4, 4)
    assert Drawn(((0.5,),), ((0.5,),))(ready) is ready


def test_statistics_of_one_colour_and_of_nobody(make_site: Any) -> None:
    federation = make_site(sizes=((6, 4), (0, 4), (5, 4)), held_out=0).bench.federation
    scaled = normalized(federation, "client")
    both = measured_by_image([federation.clients[0].train, federation.clients[2].train])
    assert scaled.clients[1].test.scaling == both  # it has no training images
    assert scaled.notes == ("Images are normalized by the mean and std of their own client's training images.",)
    flat: Tensor = torch.full((3, 3, 4, 4), 51, dtype=torch.uint8)
    split = type(federation.clients[0].train)(flat, torch.zeros(3, dtype=torch.long), torch.arange(3))
    assert measured_by_image([split]).std == ((1.0, 1.0, 1.0),)


def test_roles_of_fedbn_keep_normalization_layers(make_site: Any) -> None:
    site = make_site("fedrdn", options={"roles": "fedbn"})
    assert site.strategy.plan.local == make_site("fedbn").strategy.plan.local


def test_what_it_cannot_do_is_refused(make_site: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.normalize is 'domain'\. Leave"):
        make_site("fedrdn", data={"normalize": "domain"})
    for options in ({"roles": "silobn"}, {"draw": "epoch"}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            make_site("fedrdn", options=options)
    grid = {
        "kind": "federated_continual",
        "scenario": {"num_experiences": 2, "train_per_experience": 16, "test_per_experience": 8},
        "model": {"width": 4},
        "strategy": {"name": "fedrdn"},
    }
    with pytest.raises(ConfigError, match="on streams change with every"):
        simulate(resolve(grid), runs=None)


def test_a_run_of_it_is_the_same_twice() -> None:
    small = {
        "data": {"train_per_client": 12, "test_per_domain": 8},
        "model": {"name": "mlp", "width": 4},
        "train": {"batch_size": 4},
        "rounds": {"num_rounds": 2},
        "strategy": {"name": "fedrdn"},
    }
    one, two = (simulate(resolve(small), runs=None) for _ in range(2))
    assert one["rounds"][-1]["mean"] == two["rounds"][-1]["mean"]
