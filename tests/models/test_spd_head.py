"""GBWBN and the head it stands in: against formulas of SciPy's matrix functions, with no eigenbasis of ours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

import fednorm
from fednorm.cards import NORMS
from fednorm.errors import ConfigError, DataError
from fednorm.federation.plan import norm_plan
from fednorm.models import make_model
from fednorm.models.spd_head import CovariancePooling, LogEuclidean
from fednorm.norms._bures_wasserstein import BuresWassersteinNorm, exponential, geodesic, logarithm, power
from fednorm.roles import RoleRule

Matrix = np.ndarray[Any, np.dtype[np.float64]]


def drawn(n: int = 6, size: int = 4, seed: int = 0) -> Tensor:
    """Return positive definite matrices (n, size, size)."""
    rows = torch.randn(n, size, size + 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows @ rows.mT / (size + 3) + 0.1 * torch.eye(size, dtype=torch.float64)


def filled(layer: BuresWassersteinNorm, seed: int = 3) -> BuresWassersteinNorm:
    """Give the layer's learned tensors values of their own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


# What the paper writes, in SciPy ------------------------------------------------------------------------------------


def to(matrix: Matrix, exponent: float) -> Matrix:
    return scipy.linalg.fractional_matrix_power(matrix, exponent).real


def log_at(point: Matrix, x: Matrix) -> Matrix:
    cross = scipy.linalg.sqrtm(point @ x).real
    return cross + cross.T - 2 * point


def exp_at(point: Matrix, tangent: Matrix) -> Matrix:
    solved = scipy.linalg.solve_continuous_lyapunov(point, tangent)
    return point + tangent + solved @ point @ solved


def transported(tangent: Matrix, start: Matrix, end: Matrix) -> Matrix:
    """Between points that commute: one of them is the identity."""
    other = end if np.allclose(start, np.eye(len(start))) else start
    values, vectors = np.linalg.eigh(other)
    p, q = (values, np.ones_like(values)) if other is start else (np.ones_like(values), values)
    factors = np.sqrt((q[:, None] + q) / (p[:, None] + p))
    return vectors @ (factors * (vectors.T @ tangent @ vectors)) @ vectors.T


def by_hand(layer: BuresWassersteinNorm, batch: Tensor) -> tuple[Matrix, Matrix, float]:
    """Return the output, the batch's mean and its variance."""
    sym = [(w + w.mT).detach().numpy() / 2 for w in (layer.log_metric, layer.log_shift)]
    metric, shift = (scipy.linalg.expm(w) for w in sym)
    theta, eye = layer.theta, np.eye(layer.size)
    inside, outside = to(metric, -0.5), to(metric, 0.5)
    xs = [inside @ to(x, theta) @ inside for x in batch.numpy()]
    end = inside @ to(shift, theta) @ inside
    a = np.mean(xs, 0)
    middle = np.mean([to(to(a, 0.5) @ x @ to(a, 0.5), 0.5) for x in xs], 0)
    mean = to(a, -0.5) @ middle @ middle @ to(a, -0.5)
    var = float(np.mean([np.trace(x + eye - 2 * to(x, 0.5)) for x in xs])) / theta**2
    outputs = []
    for x in xs:
        centred = exp_at(eye, transported(log_at(mean, x), mean, eye))
        scaled = exp_at(eye, layer.scale.item() / np.sqrt(var + layer.eps) * log_at(eye, centred))
        shifted = exp_at(end, transported(log_at(eye, scaled), eye, end))
        outputs.append(to(outside @ shifted @ outside, 1 / theta))
    return np.stack(outputs), mean, var


@pytest.mark.parametrize("theta", [1.0, 0.5])
def test_the_layer_is_the_papers_formula(theta: float) -> None:
    layer, batch = filled(BuresWassersteinNorm(4, theta=theta)), drawn()
    before = exponential(layer.log_running_mean)
    output, mean, var = by_hand(layer, batch)
    assert np.allclose(layer(batch).detach().numpy(), output, rtol=1e-9, atol=1e-10)
    moved = geodesic(before, torch.from_numpy(mean), 0.1)
    assert torch.allclose(exponential(layer.log_running_mean), moved, rtol=1e-9)
    assert layer.running_var.item() == pytest.approx(0.9 + 0.1 * var, rel=1e-10)


def test_a_geodesic_ends_where_it_should_and_divides_the_distance() -> None:
    start, end = drawn(2)

    def distance(a: Tensor, b: Tensor) -> float:
        return float(np.trace((a + b).numpy() - 2 * scipy.linalg.sqrtm((a @ b).numpy()).real)) ** 0.5

    assert torch.allclose(geodesic(start, end, 0.0), start)
    assert torch.allclose(geodesic(start, end, 1.0), end)
    assert distance(start, geodesic(start, end, 0.3)) == pytest.approx(0.3 * distance(start, end), rel=1e-8)


def test_matrix_functions_and_their_derivatives_where_eigenvalues_are_equal_too() -> None:
    x = drawn(3)
    for ours, theirs in ((logarithm, scipy.linalg.logm), (exponential, scipy.linalg.expm)):
        assert np.allclose(ours(x).numpy(), np.stack([theirs(one) for one in x.numpy()]))
    assert torch.allclose(power(power(x, 0.5), 2.0), x)
    for function in (logarithm, exponential, lambda a: power(a, 0.5)):
        for point in (x[0], torch.eye(4, dtype=torch.float64), torch.diag(torch.tensor([1.0, 1, 2, 2]).double())):
            assert torch.autograd.gradcheck(lambda a, f=function: f((a + a.mT) / 2), (point.requires_grad_(),))


def test_the_gradient_with_running_statistics_is_the_derivative() -> None:
    layer = filled(BuresWassersteinNorm(3))
    layer(drawn(5, 3, seed=1))
    layer.eval()

    def output(x: Tensor, *_: Tensor) -> Tensor:
        return layer((x + x.mT) / 2)

    assert torch.autograd.gradcheck(output, (drawn(2, 3).requires_grad_(), *layer.parameters()))


def test_a_first_step_is_finite_and_what_comes_out_is_centred() -> None:
    layer, batch = BuresWassersteinNorm(4), drawn(64)
    output = layer(batch)
    output.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    _, mean, _ = by_hand(BuresWassersteinNorm(4), output.detach())
    assert np.allclose(mean, np.eye(4), atol=0.05)
    assert torch.linalg.eigvalsh(output.detach()).min() > 0


def test_bad_input_is_refused() -> None:
    layer = BuresWassersteinNorm(4)
    with pytest.raises(DataError, match=r"\(N, 4, 4\) in float64"):
        layer(drawn().float())
    with pytest.raises(ValueError, match="more than 1 value"):
        layer(drawn(1))
    with pytest.raises(ConfigError, match="theta"):
        BuresWassersteinNorm(4, theta=0)
    for options in ({"channels": 1}, {"spd_norm": 2}, {"theta": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            make_model("spd_head", NORMS["batch_norm"].made(), num_classes=3, options=options)


# The head -----------------------------------------------------------------------------------------------------------


def test_pooling_and_vectors() -> None:
    features = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    matrices = CovariancePooling()(features)
    for one, rows in zip(matrices, features.double().flatten(2), strict=True):
        assert np.allclose(one, np.cov(rows.numpy(), bias=True) + 1e-4 * np.eye(3))
    vectors = LogEuclidean()(matrices)
    assert vectors.shape == (2, 6)
    assert vectors.dtype == torch.float32
    assert torch.allclose(vectors.norm(dim=1).double(), logarithm(matrices).flatten(1).norm(dim=1))


def test_the_plan_knows_every_tensor_and_what_strategies_do_with_it() -> None:
    model = make_model("spd_head", NORMS["group_norm"].made(), num_classes=3, width=8)
    kinds = {e.key: e.kind.value for e in norm_plan(model, RoleRule()).entries if e.key.startswith("spd_norm")}
    assert kinds == {
        "spd_norm.log_metric": "scale",
        "spd_norm.log_shift": "shift",
        "spd_norm.scale": "scale",
        "spd_norm.log_running_mean": "mean",
        "spd_norm.running_var": "quadratic",
    }


@pytest.mark.few(1)
@pytest.mark.parametrize("strategy", ["fedavg", "fedbn"])
def test_it_trains_in_a_federation(strategy: str, tmp_path: Any) -> None:
    result = fednorm.federated(
        strategy=strategy,
        rounds=2,
        runs=tmp_path,
        config={
            "model": {"name": "spd_head", "width": 8, "channels": 4},
            "data": {"train_per_client": 16, "test_per_domain": 10},
        },
    )
    assert len(result.rounds) == 2
    assert all(not line.get("rejected") for line in result.rounds)


def test_without_the_norm_it_is_the_control() -> None:
    model = make_model("spd_head", NORMS["batch_norm"].made(), num_classes=3, width=8, options={"spd_norm": False})
    assert not any(isinstance(m, BuresWassersteinNorm) for m in model.modules())
    assert isinstance(model.get_submodule("fc"), nn.Linear)
