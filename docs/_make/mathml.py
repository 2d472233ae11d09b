"""Formulas as MathML, which browsers set by themselves: no script, no font and no network."""

from __future__ import annotations

from docutils import nodes
from latex2mathml.converter import convert


def mathml(latex: str, *, block: bool) -> str:
    """Return a formula in LaTeX as MathML."""
    return str(convert(latex.strip(), display="block" if block else "inline"))


def visit_math(translator: nodes.NodeVisitor, node: nodes.math) -> None:
    """Write a formula within a line."""
    translator.body.append(mathml(node.astext(), block=False))  # type: ignore[attr-defined]
    raise nodes.SkipNode


def visit_math_block(translator: nodes.NodeVisitor, node: nodes.math_block) -> None:
    """Write a formula in lines of its own: those that an empty line separates are set one under the other."""
    parts = [part for part in node.astext().split("\n\n") if part.strip()]
    translator.body.append("\n".join(mathml(part, block=True) for part in parts))  # type: ignore[attr-defined]
    raise nodes.SkipNode
