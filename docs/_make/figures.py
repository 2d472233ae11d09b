"""Figures that are drawn while the site is built: what a norm does to two domains, and which package imports which."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from torch import Tensor, nn

from _make.blocks import ROOT
from fednorm.cards import NORMS
from fednorm.rng import torch_seeded
from fednorm.spec import HookedLayer

mpl.use("Agg")

from matplotlib import pyplot as plt

CHANNELS, SIZE, SAMPLES, BATCHES = 16, 8, 64, 20
COLORS = {"domain A": "#3b6fb6", "domain B": "#d9713c"}
STYLE: dict[str, Any] = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "fednorm",
}


def domains(batch: int) -> dict[str, Tensor]:
    """Return a batch of each toy domain, shape (N, C, H, W); the second differs in every channel's mean and spread."""
    generator = torch.Generator().manual_seed(batch)
    shape = (SAMPLES, CHANNELS, SIZE, SIZE)
    shift = torch.linspace(0.5, 2.5, CHANNELS).view(1, -1, 1, 1)
    first, second = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    return {"domain A": first, "domain B": 2 * second + shift}


def norm_block(name: str) -> nn.Module:
    """Return a convolution and the layer of a norm behind it."""
    norm = NORMS[name].made().for_stream(num_tasks=1, batch_ratio=0)
    with torch_seeded(0):
        return nn.Sequential(norm.conv(CHANNELS, CHANNELS, 3, padding=1), norm.layer(CHANNELS, 2))


def norm_figure(name: str, path: Path) -> None:
    """Draw how two domains are distributed before and after a norm, in training and in evaluation."""
    block = norm_block(name)
    for layer in block.modules():
        if isinstance(layer, HookedLayer):
            layer.set_tasks(None, 1)  # all samples are of one task
    both = domains(0)
    shown = {"input": torch.cat(list(both.values()))}
    with torch.no_grad():
        shown["training"] = block.train()(shown["input"])
        for batch in range(1, BATCHES):
            block(torch.cat(list(domains(batch).values())))
        shown["evaluation"] = block.eval()(shown["input"])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(shown), figsize=(7.2, 1.9), layout="constrained")
        for axis, (title, values) in zip(axes, shown.items(), strict=True):
            for domain, part in zip(COLORS, values.chunk(2), strict=True):
                numbers = part.flatten().numpy()
                axis.hist(numbers, bins=60, density=True, histtype="step", color=COLORS[domain], label=domain)
            axis.set(title=title, yticks=[])
        axes[0].legend(frameon=False, fontsize=7)
        save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a figure, the same bytes for the same content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


# The architecture -----------------------------------------------------------------------------------------------------


def packages() -> dict[str, set[str]]:
    """Return what each package or module at the top imports of the others, read from the files."""
    edges: dict[str, set[str]] = {}
    for top in ("fednorm", "strategies", "scenarios"):
        for path in sorted((ROOT / top).rglob("*.py")):
            own = part(".".join(path.relative_to(ROOT).with_suffix("").parts))
            names = (part(name) for name in _imports(path))
            edges.setdefault(own, set()).update(name for name in names if name and name != own)
    return {name: found & edges.keys() for name, found in edges.items() if name}


def part(module: str) -> str:
    """Return the box that a module is drawn in; empty for what is drawn in none."""
    words = module.split(".")
    if words[0] in ("strategies", "scenarios"):
        return words[0]
    if words[0] != "fednorm" or len(words) < 2 or words[1].startswith("__"):
        return ""
    return words[1] if (ROOT / "fednorm" / words[1]).is_dir() or (ROOT / f"fednorm/{words[1]}.py").exists() else ""


def _imports(path: Path) -> Iterable[str]:
    """Yield what a file imports when it is imported: not within functions, not for type checkers alone."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        pending.extend(ast.iter_child_nodes(node))


def rows(edges: dict[str, set[str]]) -> list[list[str]]:
    """Return the packages in rows: each imports its own row's at most in a circle, and those of rows above."""
    depth: dict[str, int] = {}

    def of(name: str, path: tuple[str, ...] = ()) -> int:
        if name in depth:
            return depth[name]
        below = [of(other, (*path, name)) for other in edges[name] if other not in path and other != name]
        found = 1 + max(below, default=-1)
        if not path:
            depth[name] = found
        return found

    for name in sorted(edges):
        of(name)
    return [sorted(n for n, d in depth.items() if d == level) for level in sorted(set(depth.values()))]


def architecture_figure(path: Path) -> None:
    """Draw packages in rows, and a line from each to what it imports."""
    edges = packages()
    levels = rows(edges)
    at = {}
    for y, names in enumerate(levels):
        for i, name in enumerate(names):
            at[name] = ((i + 0.5) / len(names) * 10, -y)
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8, 0.62 * len(levels) + 0.3), layout="constrained")
        for name, others in edges.items():
            for other in sorted(others):
                axis.plot(*zip(at[name], at[other], strict=True), color="#8899aa", linewidth=0.4, alpha=0.55, zorder=1)
        for name, (x, y) in at.items():
            box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": "#33475b", "linewidth": 0.8}
            axis.text(x, y, name, ha="center", va="center", fontsize=7.5, bbox=box, zorder=2)
        axis.set(xlim=(0, 10), ylim=(-len(levels) + 0.4, 0.5))
        axis.axis("off")
        save(figure, path)
