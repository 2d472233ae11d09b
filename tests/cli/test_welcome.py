"""What fednorm says by itself: its jobs, its version; and how the demo ends, from a record of it."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

import fednorm
from fednorm.cli.app import app
from fednorm.cli.demo import short_table
from fednorm.cli.welcome import JOBS
from fednorm.records.results import load
from fednorm.report.comparison import comparisons

DEMO = Path(__file__).resolve().parents[2] / ".records/demo.json"


def test_without_a_word_it_says_what_it_does() -> None:
    done = CliRunner().invoke(app, [])
    assert done.exit_code == 0
    for job, line, _ in JOBS:
        assert job in done.stdout
        assert line in done.stdout
        assert line.split()[1] in {command.name or command.callback.__name__ for command in app.registered_commands}


def test_the_version() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.stdout) == (0, f"fednorm {fednorm.__version__}\n")


def test_the_demo_ends_in_one_short_table_a_world() -> None:
    federated, stream, labels = (short_table(each) for each in comparisons(load([DEMO]).results))
    assert federated.columns == ("strategy", "mean accuracy", "to fedavg")
    assert federated.rows[:2] == (("fedavg", "85.0", ""), ("fedbn", "91.9", "+6.8"))
    assert ("adab2n", "48.6", "−8.3") in stream.rows
    assert ("nap", "89.0", "+66.0") in labels.rows
    assert all(len(line) <= 80 for table in (federated, stream, labels) for line in (table.title, *table.notes))
