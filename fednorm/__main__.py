"""``python -m fednorm``: the command line."""

from __future__ import annotations

from fednorm.cli.app import main

if __name__ == "__main__":
    main()
