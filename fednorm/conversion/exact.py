"""``convert(model, "rms_norm", exact=True)``: a pre-norm transformer without layer normalization, the same function.

Jiang, Gu, Zhu, Pan. Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers. NeurIPS
2023. https://arxiv.org/abs/2305.14858

Where only layer normalizations read a residual stream its mean over the features does not matter. It is taken off all
that enters the stream (:mod:`fednorm.conversion.residual_stream` finds where), and each layer normalization becomes an
RMS normalization, with its own eps, scale and shift:

    LN(x) = RMS(x - mean(x)) = RMS(x)        for x with zero mean

With ``crms_norm`` the stream is one feature narrower: the last one, minus the sum of the others, is not stored.

Outputs and gradients are those of the given network, up to rounding, in training as in evaluation, dropout included.
Every parameter is kept, by name and shape, and the means of weights are taken off within the forward pass, so that
training, averaging and state dicts go on as if nothing had happened. The paper changes the weights once in place, for
inference, and reparameterizes for training as here; it also absorbs scale and shift of a norm into the next layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn

from fednorm.conversion.layout import Example
from fednorm.conversion.report import ConversionReport, Left
from fednorm.conversion.residual_stream import Part, Search, Tap, Trial
from fednorm.conversion.surroundings import Surroundings, copy_of, named, own_tensors
from fednorm.errors import ConfigError
from fednorm.norms import recognition_of
from fednorm.norms._zero_mean import (
    TokenCRMSNorm,
    TokenRMSNorm,
    ZeroMeanConv2d,
    ZeroMeanInput,
    ZeroMeanLinear,
    ZeroMeanOutput,
)
from fednorm.norms.crms_norm import CRMSNorm
from fednorm.norms.rms_norm import RMSNorm
from fednorm.recognition.layers import eps_name
from fednorm.spec import Norm

ELSEWHERE = "it does not normalize the residual stream, and stays layer normalization"
_IMAGE_SIZES = (32, 28, 64, 96, 224, 256, 384)


def rewrite(model: nn.Module, norm: Norm, example: Example | None) -> tuple[nn.Module, ConversionReport]:
    """Return a copy of a pre-norm transformer that computes the same by RMS or CRMS normalization.

    Args:
        model: The network; it is not changed.
        norm: ``rms_norm`` or ``crms_norm``, without options.
        example: An input; None for one that is made by the look of the network.

    Returns:
        The copy and the report.

    Raises:
        ConfigError: The method or its options are others; the network has no layer normalization, needs an example, or
            is not of a build in which the rewrite is exact. The message names a layer.
    """
    shorten = _shortens(norm)
    layers = dict(_layer_norms(model))
    if not layers:
        raise ConfigError(_without(model))
    features = Counter(width for _, width in layers.values()).most_common(1)[0][0]
    trial = _trial(copy_of(model), example, features)
    stream = [path for path, (_, width) in layers.items() if width == features and path in trial.plain.inputs]
    left = [path for path in layers if path not in stream]
    search = Search(trial, stream)
    rest = search.find() + [path for path in left if not _in_a_head(path, layers[path][1], trial, stream)]
    if rest:
        raise ConfigError(_reads_the_mean(rest[0], layers[rest[0]][0], norm))
    _require_equal(trial, search.taps, stream, norm)
    converted = copy_of(model)
    _take_means_off(converted, search.taps, shorten=shorten)
    _replace_norms(converted, stream, shorten=shorten)
    report = ConversionReport(norm, layers=stream)
    report.left += [Left(path, type(layers[path][0]).__name__, ELSEWHERE) for path in left]
    places = ", ".join(f"{tap.path or 'the model itself'} ({tap.part})" for tap in search.taps)
    report.notes.append(f"The function is the same. The mean over the features is taken off at: {places}.")
    return converted, report


def _in_a_head(path: str, width: int, trial: Trial, stream: list[str]) -> bool:
    """Return whether a layer normalization is of attention heads: queries or keys, of a part of the stream's width."""
    axes = trial.plain.axes
    return trial.features % width == 0 and axes.get(path, 0) > max(axes[one] for one in stream)


def _shortens(norm: Norm) -> bool:
    if type(norm) not in (RMSNorm, CRMSNorm):
        raise ConfigError(
            f"exact=True keeps the function of a pre-norm transformer, which rms_norm and crms_norm can do; got "
            f"{type(norm).__name__}. Convert without it to let the norm change the function."
        )
    if norm != type(norm)():
        raise ConfigError("exact=True keeps every layer's own eps and axes: give no option of the norm beside it.")
    return type(norm) is CRMSNorm


def _layer_norms(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, int]]]:
    """Yield the path, the layer and the width of every layer normalization over the last axis alone."""
    for path, module in model.named_modules():
        known = recognition_of(module)
        if known is None or known.spec is None or known.spec.name != "layer_norm":
            continue
        plain = known.activation is None and not known.fused and set(own_tensors(module)) <= {"weight", "bias"}
        if known.channels_last and known.channels is not None and plain and not known.offset:
            yield path, (module, known.channels)


def _without(model: nn.Module) -> str:
    norms = [(p, m) for p, m in model.named_modules() if (k := recognition_of(m)) and k.spec and k.spec.normalizes]
    what = f"; its first normalization layer is {named(*norms[0])}" if norms else ""
    return (
        "exact=True replaces the layer normalizations of a transformer that normalizes before its branches, and this "
        f"{type(model).__name__} has none over the last axis{what}. Convert without exact=True: another method is then "
        "another function."
    )


def _reads_the_mean(path: str, layer: nn.Module, norm: Norm) -> str:
    method = "crms_norm" if isinstance(norm, CRMSNorm) else "rms_norm"
    return (
        f"Layer {named(path, layer)} cannot become {method} exactly: the mean over the features of its input cannot be "
        "taken off before it, because something else than layer normalization reads it, as in a network that "
        "normalizes after its branches (post-norm), or whose stream goes on without a last norm. Build the network "
        "pre-norm with a last norm (nn.TransformerEncoderLayer(norm_first=True), nn.TransformerEncoder(..., "
        f"norm=nn.LayerNorm(d))), or convert without exact=True: convert(model, {method!r})."
    )


def _trial(model: nn.Module, example: Example | None, features: int) -> Trial:
    """Return a copy to try on, with the example or the first of the usual inputs that it takes.

    Raises:
        ConfigError: It takes none.
    """
    _call_layers(model)
    errors: list[Exception] = []
    for inputs in _guesses(model, features) if example is None else (example,):
        try:
            trial = Trial(model, inputs, features)
        except Exception as error:  # a foreign forward pass may refuse an input in any way it likes
            errors.append(error)
            continue
        if trial.plain.outputs.numel() and bool(trial.plain.outputs.isfinite().all()):
            return trial
    if example is not None and errors:
        raise ConfigError(f"The model does not run on example_inputs: {type(errors[0]).__name__}: {errors[0]}")
    raise ConfigError(
        "exact=True runs the network, and no input that it takes could be guessed. Show one: convert(model, ..., "
        "exact=True, example_inputs=batch)."
    )


def _call_layers(model: nn.Module) -> None:
    """Make PyTorch's transformer layers call their parts, which their fused path reads."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _guesses(model: nn.Module, features: int) -> Iterator[Example]:
    """Yield inputs of the usual kinds: images, tokens, features."""
    draw = torch.Generator().manual_seed(0)
    convolution = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if convolution is not None:
        for size in dict.fromkeys([*_said_sizes(model), *_IMAGE_SIZES]):
            yield torch.randn(1, convolution.in_channels, size, size, generator=draw)
    table = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    if table is not None:
        yield torch.arange(5).view(1, 5) % table.num_embeddings
    linear = next((m.in_features for m in model.modules() if isinstance(m, nn.Linear)), features)
    for width in dict.fromkeys([linear, features]):
        yield torch.randn(1, 5, width, generator=draw)


def _said_sizes(model: nn.Module) -> Iterator[int]:
    for module in model.modules():
        for name in ("image_size", "img_size", "input_size"):
            size = getattr(module, name, None)
            size = size[-1] if isinstance(size, tuple | list) and size else size
            if isinstance(size, int) and not isinstance(size, bool):
                yield size


def _take_means_off(model: nn.Module, taps: list[Tap], *, shorten: bool) -> None:
    for tap in taps:
        module = model.get_submodule(tap.path)
        if tap.part is Part.INPUT:
            module.register_forward_pre_hook(ZeroMeanInput(shorten), with_kwargs=True)
        elif tap.part is Part.OUTPUT:
            module.register_forward_hook(ZeroMeanOutput(shorten))
        else:
            # The class alone changes: hooks, shared tensors and references to the layer stay.
            module.__class__ = ZeroMeanLinear if isinstance(module, nn.Linear) else ZeroMeanConv2d
            vars(module)["shorten"] = shorten


def _replace_norms(model: nn.Module, paths: list[str], *, shorten: bool) -> None:
    """Put RMS or CRMS normalization in the place of layer normalizations, with their parameters."""
    around = Surroundings(model)
    done: dict[int, nn.Module] = {}
    for path in paths:
        parent_path, _, name = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        old = parent._modules[name]
        assert old is not None
        if id(old) not in done:
            features = recognition_of(old)
            eps = getattr(old, eps_name(old) or "eps", 1e-5)
            width = features.channels if features is not None and features.channels is not None else 1
            new: nn.Module = TokenCRMSNorm(width, eps=eps) if shorten else TokenRMSNorm(width, eps=eps)
            for key in ("weight", "bias"):
                new.register_parameter(key, own_tensors(old).get(key))  # type: ignore[arg-type]
            around.adopt(old, new, new, path, (model, parent))
            done[id(old)] = new
        parent._modules[name] = done[id(old)]
    around.finish(model)


def _require_equal(trial: Trial, taps: list[Tap], stream: list[str], norm: Norm) -> None:
    """Rewrite the copy that was tried on, and require that its output stays.

    Raises:
        ConfigError: It does not, or cannot be run.
    """
    shorten = isinstance(norm, CRMSNorm)
    first = trial.modules[stream[0]]
    _take_means_off(trial.model, taps, shorten=shorten)
    _replace_norms(trial.model, stream, shorten=shorten)
    try:
        ours = trial.run().outputs
    except Exception as error:  # a foreign forward pass may depend on the width of the stream in any way it likes
        raise ConfigError(
            f"The network does not run with a stream that is one feature narrower ({type(error).__name__}: {error}). "
            'Convert it to "rms_norm", which keeps the width.'
        ) from error
    if not torch.allclose(ours, trial.plain.outputs, rtol=1e-9, atol=1e-9):
        raise ConfigError(_reads_the_mean(stream[0], first, norm))
