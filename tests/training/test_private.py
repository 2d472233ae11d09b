"""Private training: gradients of single images, clipping and noise by the formula, the accountant, what is refused."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from torch.nn import functional

import fednorm
from fednorm.config import TrainConfig, resolve
from fednorm.errors import ConfigError
from fednorm.federation.deployment.server import check_deployed
from fednorm.federation.local import Phase, drawn_rows
from fednorm.federation.workbench import Workbench, workbench_of
from fednorm.report.captions import warnings_of
from fednorm.training.private import PrivateStep, epsilon, single_gradients

SMALL = {"data": {"train_per_client": 20, "test_per_domain": 8, "domains": ["scans", "photo"]}, "model": {"width": 4}}


def opacus() -> None:
    pytest.importorskip("opacus", reason="the extra private (opacus) is not installed")


def bench(norm: str = "group_norm", **train: Any) -> Workbench:
    return workbench_of(resolve({**SMALL, "norm": {"name": norm}, "train": train}))


def batch(count: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 28, 28, generator=generator), torch.arange(count) % 10


@pytest.mark.parametrize("norm", ["group_norm", "layer_norm", "sws", "ws_group_norm", "none"])
def test_the_gradient_of_each_image_is_that_of_the_network_on_it_alone(norm: str) -> None:
    made = bench(norm)
    model, (images, labels) = made.model.train().double(), batch()
    images = images.double()
    gradients, losses, logits = single_gradients(model, functional.cross_entropy, images, labels)
    for number in range(len(images)):
        model.zero_grad()
        out = model(images[number : number + 1])
        loss = functional.cross_entropy(out, labels[number : number + 1])
        loss.backward()
        assert torch.allclose(losses[number], loss)
        assert torch.allclose(logits[number], out[0])
        for key, parameter in model.named_parameters():
            assert torch.allclose(gradients[key][number], parameter.grad, atol=1e-10), (norm, key)


def test_a_step_is_the_mean_of_clipped_gradients() -> None:
    opacus()
    made = bench(private_noise=1e-12, private_clip=0.5, batch_size=4, learning_rate=0.1)
    trainee, (images, labels) = made.trainee, batch(3)
    gradients, _, _ = single_gradients(trainee.model, trainee.loss, images, labels)
    lengths = [math.sqrt(sum(float(g[i].square().sum()) for g in gradients.values())) for i in range(3)]
    assert max(lengths) > 0.5
    before = {key: p.detach().clone() for key, p in trainee.model.named_parameters()}
    seen = {}

    def look() -> None:
        seen.update({key: p.grad.clone() for key, p in trainee.model.named_parameters()})

    step = PrivateStep(trainee, 20, torch.Generator().manual_seed(1), adjust=[look], after=(), loss=trainee.loss)
    step(images, labels)
    for key, parameter in trainee.model.named_parameters():
        clipped = sum(gradients[key][i] * min(1, 0.5 / lengths[i]) for i in range(3))
        assert torch.allclose(seen[key], clipped / 4, atol=1e-6), key  # q n = 4, whatever was drawn
        assert torch.allclose(parameter, before[key] - 0.1 * seen[key], atol=1e-7)


def test_an_empty_batch_is_noise_alone_of_the_formula_s_size() -> None:
    opacus()
    trainee = bench(private_noise=2.0, private_clip=0.5, batch_size=4).trainee
    noises: list[torch.Tensor] = []
    images, labels = batch(0)

    def look() -> None:
        noises.append(torch.cat([p.grad.flatten() for p in trainee.model.parameters()]))

    for seed in (1, 1, 2):
        step = PrivateStep(trainee, 20, torch.Generator().manual_seed(seed), adjust=[look], loss=trainee.loss)
        loss, logits = step(images, labels)
    assert (float(loss), tuple(logits.shape)) == (0.0, (0, 10))
    assert float(noises[0].std()) == pytest.approx(2.0 * 0.5 / 4, rel=0.03)
    assert torch.equal(noises[0], noises[1])
    assert not torch.equal(noises[0], noises[2])


def test_every_image_is_drawn_with_one_probability() -> None:
    train = TrainConfig(batch_size=5, local_epochs=400)
    drawn = list(drawn_rows(torch.Generator().manual_seed(0), 20, train, Phase()))
    assert len(drawn) == 400 * 4
    often = torch.bincount(torch.cat(drawn), minlength=20) / len(drawn)
    assert often.tolist() == pytest.approx([0.25] * 20, abs=0.04)
    assert {len(rows) for rows in drawn} >= {2, 3, 4, 5, 6, 7, 8}
    assert all(len(rows.unique()) == len(rows) for rows in drawn)


def renyi_epsilon(noise: float, rate: float, steps: int, delta: float) -> float:
    """Mironov, Talwar, Zhang 2019, at whole orders; the conversion of Balle et al. 2020."""
    best = math.inf
    for order in range(2, 64):
        terms = [
            math.lgamma(order + 1) - math.lgamma(k + 1) - math.lgamma(order - k + 1)
            + (order - k) * math.log1p(-rate) + k * math.log(rate) + (k * k - k) / (2 * noise**2)
            for k in range(order + 1)
        ]  # fmt: skip
        top = max(terms)
        renyi = steps * (top + math.log(sum(math.exp(term - top) for term in terms))) / (order - 1)
        told = renyi - (math.log(delta) + math.log(order)) / (order - 1) + math.log((order - 1) / order)
        best = min(best, told)
    return best


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "delta"), [(1.0, 0.01, 1000, 1e-5), (1.1, 0.004, 10_000, 1e-5), (2.0, 0.2, 100, 1e-4)]
)
def test_epsilon_is_that_of_the_sampled_gaussian(noise: float, rate: float, steps: int, delta: float) -> None:
    opacus()
    told, whole = epsilon(noise, rate, steps, delta), renyi_epsilon(noise, rate, steps, delta)
    assert 0.97 * whole <= told <= whole + 1e-9  # orders between whole ones can only be better
    assert epsilon(noise, rate, 0, delta) == 0


def test_a_federation_s_result_says_what_each_client_has_spent() -> None:
    opacus()
    values = {**SMALL, "train": {"private_noise": 1.0, "batch_size": 5, "local_epochs": 1}}
    values["rounds"] = {"fraction": 0.5}
    result = fednorm.federated(strategy="fedavg", norm="group_norm", rounds=3, config=values)
    asked = [client for line in result["rounds"] for client in line["sampled"]]
    privacy = result["privacy"]
    assert {one["client"]: one["steps"] for one in privacy["clients"]} == {c: 4 * asked.count(c) for c in set(asked)}
    assert privacy["epsilon"] == max(epsilon(1.0, 0.25, 4 * asked.count(c), 1e-5) for c in set(asked))
    assert (privacy["delta"], privacy["max_grad_norm"], privacy["noise_multiplier"]) == (1e-5, 1.0, 1.0)
    assert "Images are protected, not clients" in privacy["note"]
    (told,) = warnings_of({"a": [result]})
    assert told == (
        f"Private training, a: epsilon {privacy['epsilon']:.3g} at most at delta 1e-05 for an image (noise 1, "
        "gradients of 1 at most); simulated, with noise of the run's seed."
    )
    again = fednorm.federated(strategy="fedavg", norm="group_norm", rounds=3, config=values)
    assert again["final"] == result["final"]
    values["train"] = {"private_noise": 2.0, "batch_size": 5}
    other = fednorm.federated(strategy="fedavg", norm="group_norm", rounds=3, config=values)
    assert other["privacy"]["epsilon"] < privacy["epsilon"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"norm": {"name": "batch_norm"}}, r"norm 'batch_norm' has none: .* group_norm, .*layer_norm, .*sws"),
        ({"strategy": {"name": "fedbn"}, "norm": {"name": "batch_renorm"}}, "norm 'batch_renorm' has none"),
        ({"strategy": {"name": "scaffold"}}, r"Clients of strategy scaffold do more .*\(\w+\.\w+\)"),
        ({"strategy": {"name": "ditto"}}, "Clients of strategy ditto do more with their images"),
        ({"train": {"redo_every": 5}}, "ReDo resets units by what the images make of them"),
        ({"amp": "bf16"}, "computes in single precision"),
        ({"engine": "cohort"}, "takes the gradients of single images"),
    ],
)  # fmt: skip
def test_what_would_not_be_private_is_refused(values: dict[str, Any], message: str) -> None:
    opacus()
    config = {**SMALL, "norm": {"name": "group_norm"}, **values}
    config["train"] = {"private_noise": 1.0, **values.get("train", {})}
    with pytest.raises(ConfigError, match=message):
        fednorm.federated(rounds=1, strategy=values.get("strategy", {}).get("name", "fedavg"), config=config)


def test_sites_are_not_given_noise_that_the_server_knows() -> None:
    config = resolve({"train": {"private_noise": 1.0}, "data": {"domains": ["a", "b"]}})
    with pytest.raises(ConfigError, match="the server knows and could take away again"):
        check_deployed(config)


def test_without_opacus_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus", None)
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    with pytest.raises(ConfigError, match=r'pip install "fednorm\[private\]"'):
        bench(private_noise=1.0)


def test_a_run_without_noise_has_the_name_it_had() -> None:
    assert resolve({}).hash == resolve({"train": {"private_noise": 0.0}}).hash == "76ce0c3de10c"
    assert resolve({"train": {"private_noise": 1.0}}).hash != resolve({}).hash
