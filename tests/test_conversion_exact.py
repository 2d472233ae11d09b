"""``convert(..., exact=True)``: pre-norm transformers stay the same function; what cannot is refused with its path."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from fednorm.conversion import convert, convert_with_report
from fednorm.errors import ConfigError
from fednorm.federation.plan import norm_plan
from fednorm.norms import spec_of
from fednorm.norms._zero_mean import ZeroMeanLinear
from fednorm.roles import Kind, Role, RoleRule


def torchvision_vit(**options: Any) -> nn.Module:
    sizes = {"image_size": 16, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    return torchvision.models.VisionTransformer(**sizes, num_classes=5, **options)


def timm_vit(**options: Any) -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
    return timm.models.VisionTransformer(**sizes, **options)


def encoder(*, dropout: float = 0.0, last: bool = True, **options: Any) -> nn.TransformerEncoder:
    options = {"norm_first": True, "batch_first": True, **options}
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=dropout, **options)
    norm = nn.LayerNorm(16) if last else None
    return nn.TransformerEncoder(layer, 2, norm=norm, enable_nested_tensor=False)  # PyTorch warns that it cannot be


def convnext() -> nn.Module:
    kind = torchvision.models.convnext
    return kind.ConvNeXt([kind.CNBlockConfig(8, 16, 1), kind.CNBlockConfig(16, None, 2)], num_classes=5)


class Own(nn.Module):
    """A user's: learned positions that nothing but an addition sees, blocks that are called by keyword, no dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(7, 16)
        self.positions = nn.Parameter(torch.randn(1, 5, 16))
        self.blocks = nn.ModuleList(encoder().layers)
        self.norm = nn.LayerNorm(16, eps=1e-3, bias=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.positions
        for block in self.blocks:
            x = block(src=x)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


IMAGES = (3, 3, 16, 16)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "torchvision": (torchvision_vit, IMAGES),
    "torchvision with dropout": (lambda: torchvision_vit(dropout=0.3), IMAGES),
    "timm": (timm_vit, IMAGES),
    "timm, layer scale": (lambda: timm_vit(init_values=0.1), IMAGES),
    "timm, average pooling": (lambda: timm_vit(global_pool="avg", class_token=False), IMAGES),
    "timm, a norm before the blocks": (lambda: timm_vit(pre_norm=True), IMAGES),
    "timm, norms of queries and keys": (lambda: timm_vit(qk_norm=True), IMAGES),
    "timm with dropout": (lambda: timm_vit(proj_drop_rate=0.2, drop_path_rate=0.2, pos_drop_rate=0.1), IMAGES),
    "nn.TransformerEncoder": (encoder, (3, 5, 16)),
    "nn.TransformerEncoder with dropout": (lambda: encoder(dropout=0.1, activation="gelu"), (3, 5, 16)),
    "nn.TransformerEncoder, batch second": (lambda: encoder(batch_first=False), (5, 3, 16)),
    "one's own": (Own, (3, 5, 7)),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    """Return a network of float64 with every parameter away from where it begins, and an input."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = make().double()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model, torch.randn(shape, dtype=torch.float64)


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output, and the gradients of the input and every parameter."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(3)
    y: Tensor = model(x)
    torch.manual_seed(4)
    (y * torch.randn_like(y)).sum().backward()
    assert x.grad is not None
    return y.detach(), {"": x.grad} | {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


@pytest.mark.few(4)
@pytest.mark.parametrize("norm", ["rms_norm", "crms_norm"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_stay(name: str, norm: str) -> None:
    model, x = made(name)
    before = copy.deepcopy(model.state_dict())
    converted, report = convert_with_report(model, norm, exact=True)
    assert [type(m) for m in model.modules()] == [type(m) for m in made(name)[0].modules()], "the given one is left"
    left = [spec.name for m in converted.modules() if (spec := spec_of(m)) and spec.normalizes]
    assert left.count(norm) == len(report.layers) > 4
    assert left.count("layer_norm") == len(report.left) == (4 if "queries" in name else 0)
    for training in (True, False):
        y, grads = step(model.train(training), x)
        ours, our_grads = step(converted.train(training), x)
        torch.testing.assert_close(ours, y, rtol=0, atol=1e-10)
        assert list(our_grads) == list(grads)
        for key, grad in grads.items():
            torch.testing.assert_close(our_grads[key], grad, rtol=0, atol=1e-10, msg=key)
    with torch.no_grad():  # PyTorch's fused paths
        torch.testing.assert_close(converted(x), model(x), rtol=0, atol=1e-10)
    assert all(torch.equal(value, before[key]) for key, value in converted.state_dict().items())


@pytest.mark.parametrize("name", ["torchvision", "timm", "nn.TransformerEncoder"])
def test_the_mean_is_taken_off_the_weights_where_nothing_stands_between(name: str) -> None:
    """What an entrance of the stream takes off is not taken off before it, and no narrower stream is cut twice."""
    model, _ = made(name)
    converted, report = convert_with_report(model, "crms_norm", exact=True)
    kinds = [path for path, module in converted.named_modules() if type(module) is ZeroMeanLinear]
    hooked = [path for path, m in converted.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    wanted = {
        "torchvision": ([f"encoder.layers.encoder_layer_{i}.mlp.3" for i in (0, 1)],
                        ["encoder.dropout", *(f"encoder.layers.encoder_layer_{i}.self_attention" for i in (0, 1))]),
        "timm": ([f"blocks.{i}.{part}" for i in (0, 1) for part in ("attn.proj", "mlp.fc2")], ["pos_drop"]),
        "nn.TransformerEncoder": ([f"layers.{i}.linear2" for i in (0, 1)],
                                  ["", *(f"layers.{i}.self_attn" for i in (0, 1))]),
    }  # fmt: skip
    assert (kinds, hooked) == wanted[name]
    assert report.notes[0].startswith("The function is the same. The mean over the features is taken off at: ")
    assert all((path or "the model itself") in report.notes[0] for path in (*kinds, *hooked))


def test_training_and_averaging_stay_equal_in_all_three_forms() -> None:
    """Recentring is linear: three forms of two clients' networks, trained and averaged, stay one function."""
    model, x = made("torchvision")
    forms = [model, convert(model, "rms_norm", exact=True), convert(model, "crms_norm", exact=True)]
    averages = []
    for form in forms:
        clients = [copy.deepcopy(form) for _ in range(2)]
        for number, client in enumerate(clients):
            optimizer = torch.optim.AdamW(client.parameters(), lr=1e-2, weight_decay=0.1)
            torch.manual_seed(number)
            for _ in range(3):
                images, labels = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.randint(5, (4,))
                optimizer.zero_grad()
                nn.functional.cross_entropy(client(images), labels).backward()
                optimizer.step()
        states = [client.state_dict() for client in clients]
        form.load_state_dict({key: (states[0][key] + states[1][key]) / 2 for key in states[0]})
        averages.append(form.eval()(x))
    torch.testing.assert_close(averages[1], averages[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(averages[2], averages[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", ["rms_norm", "crms_norm"])
def test_what_surrounds_the_layers_stays(norm: str) -> None:
    model = torchvision_vit().eval()
    model.encoder.ln.requires_grad_(False)  # type: ignore[union-attr]
    converted = convert(model, norm, exact=True)
    x = torch.randn(IMAGES)
    assert [(k, p.requires_grad) for k, p in converted.named_parameters()] == [
        (k, p.requires_grad) for k, p in model.named_parameters()
    ]
    torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-5)
    y = converted(x)
    for clone in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert torch.equal(clone(x), y)
    rule = RoleRule({Kind.SCALE: Role.LOCAL, Kind.SHIFT: Role.LOCAL}, why="a test")
    plans = [norm_plan(network, rule) for network in (model, converted)]
    assert [(e.key, e.kind, e.role) for e in plans[0].entries] == [(e.key, e.kind, e.role) for e in plans[1].entries]


def test_random_numbers_of_the_caller_are_left_alone() -> None:
    torch.manual_seed(5)
    first = torch.rand(1)
    model = timm_vit()
    torch.manual_seed(5)
    convert(model, "rms_norm", exact=True)
    assert torch.equal(torch.rand(1), first)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "post-norm": (lambda: encoder(norm_first=False), r"Layer 'layers\.0\.norm1' \(LayerNorm\) cannot .*post-norm"),
    "post-norm, no last norm": (lambda: encoder(norm_first=False, last=False), r"'layers\.0\.norm1.*norm_first=True"),
    "no last norm": (lambda: encoder(last=False), r"'layers\.0\.norm1' .* norm=nn\.LayerNorm\(d\)"),
    "a layer alone": (lambda: nn.TransformerEncoderLayer(16, 2, norm_first=True), "'norm1' .* without exact=True"),
    "a CNN": (torchvision.models.resnet18, r"this ResNet has none over the last axis; .* 'bn1' \(BatchNorm2d\)"),
    "a CNN without norms": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), "has none over the last axis. Convert without"),
    "ConvNeXt": (convnext, r"'features\.1\.0\.block\.2' \(LayerNorm\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_stay_the_same_is_refused_with_the_path_and_the_remedy(name: str) -> None:
    make, words = REFUSED[name]
    with pytest.raises(ConfigError, match=words):
        convert(make(), "rms_norm", exact=True)


@pytest.mark.parametrize(
    ("norm", "options", "words"),
    [
        ("group_norm", {}, "which rms_norm and crms_norm can do; got GroupNorm"),
        ("rms_norm", {"eps": 1e-3}, "give no option of the norm beside it"),
        (
            "rms_norm",
            {"example_inputs": torch.zeros(2, 5, 3)},
            "The model does not run on example_inputs: RuntimeError",
        ),
    ],
)
def test_what_does_not_go_with_exact_is_refused(norm: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        convert(encoder(), norm, exact=True, **options)


def test_an_input_that_cannot_be_guessed_is_asked_for() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder()

        def forward(self, one: Tensor, two: Tensor) -> Tensor:
            y: Tensor = self.encoder(one + two)
            return y

    with pytest.raises(ConfigError, match=r"Show one: convert.*example_inputs=batch"):
        convert(Two(), "rms_norm", exact=True)
    model, inputs = Two().eval(), [torch.randn(2, 5, 16), torch.randn(2, 5, 16)]
    converted = convert(model, "crms_norm", exact=True, example_inputs=inputs)
    torch.testing.assert_close(converted(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


def test_a_narrower_stream_takes_no_other_norm_and_the_full_one_does() -> None:
    model = timm_vit()
    assert convert_with_report(convert(model, "rms_norm", exact=True), "group_norm")[1].layers
    with pytest.raises(ConfigError, match=r"'blocks\.0\.norm1' \(TokenCRMSNorm\)"):
        convert(convert(model, "crms_norm", exact=True), "group_norm")
