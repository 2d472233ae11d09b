"""What the source of a method's file states of its card, read without importing the file."""

from __future__ import annotations

import ast
from typing import Any


def literal(source: str, card: str, field_name: str, default: Any) -> Any:
    """Return what ``SPEC = CARD(field_name=...)`` of a module's source says.

    Args:
        source: The module's source.
        card: The name of the card's class.
        field_name: Which field.
        default: What the field is where it is not given.

    Raises:
        ValueError: It says it by other means than a literal.
    """
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["SPEC"]:
            call = node.value
            if isinstance(call, ast.Call) and ast.unparse(call.func) == card:
                stated = {keyword.arg: keyword.value for keyword in call.keywords}
                if None not in stated:  # no **of_others
                    return ast.literal_eval(stated[field_name]) if field_name in stated else default
    raise ValueError(f"It states no {field_name} as a literal.")
