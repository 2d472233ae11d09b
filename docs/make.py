"""Write what nobody types: the README's blocks, tables of docs/results, docs/trust and docs/how-to, recipes' index.

    python docs/make.py            # write them
    python docs/make.py --check    # say what is not as it would be written; exit code 1

The site itself is built by ``sphinx-build -W -b html docs docs/_build/html``, which makes its other pages as it goes.
"""

from __future__ import annotations

import sys

from _make import deployment, readme, recipes, results, trust
from _make.blocks import COMMAND, ROOT


def main(arguments: list[str]) -> int:
    """Write or check; return the exit code."""
    stale = []
    for path, text in [
        (readme.README, readme.page()),
        *results.pages(),
        *trust.pages(),
        *deployment.pages(),
        recipes.index(),
    ]:
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(path)
        if "--check" not in arguments:
            path.write_text(text, encoding="utf-8")
    for path in stale:
        sys.stderr.write(f"{path.relative_to(ROOT)}\n")
    if stale and "--check" in arguments:
        sys.stderr.write(f"not what their records and cards say; run: {COMMAND}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
