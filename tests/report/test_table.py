"""The table itself: Markdown, a terminal of any width, and text that looks like markup."""

from __future__ import annotations

import io
import re
from functools import partial

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fednorm.config import resolve
from fednorm.federation.simulate import simulate
from fednorm.report._common import Table, interval, percent
from fednorm.report.latex import CHARACTERS, escaped
from fednorm.report.numbers import fixed
from fednorm.report.table import accuracy_table

SMALL = {
    "data": {"image_size": 8, "train_per_client": 8, "test_per_domain": 4},
    "model": {"width": 4},
    "rounds": {"num_rounds": 1},
}
COLUMNS = ("method", "average accuracy", "forgetting (max − last)", "seconds")
ROWS = (
    ("er_ace + batch_norm (passes=separate)", "54.1 ± 1.2", "25.0 ± 0.3", "34"),
    ("er + none", "4.1", "–", "7"),
)


def shown(table: Table, width: int) -> list[str]:
    """Return the lines of a terminal so many characters wide."""
    console = Console(file=io.StringIO(), width=width, force_terminal=False, highlight=False)
    console.print(table.rich())
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_markdown_keeps_its_columns() -> None:
    table = Table("A | title", ("name", "a|b"), (("x | y", "1"),), ("A note | too.",))
    assert table.markdown() == ("**A | title**\n\n| name | a\\|b |\n| --- | ---: |\n| x \\| y | 1 |\n\nA note | too.")


def test_what_looks_like_markup_is_shown_as_it_is() -> None:
    table = Table("[b]T[/b]", ("[red]n", "[/x]"), (("[i]1", "[bold]2"),), ("[/] [dim]N",))
    text = "\n".join(shown(table, 60))
    for part in ("[b]T[/b]", "[red]n", "[/x]", "[i]1", "[bold]2", "[/] [dim]N"):
        assert part in text


def test_a_table_that_fits_stands_in_one_part() -> None:
    lines = shown(Table("Title", COLUMNS, ROWS, ("One note.", "Another.")), 100)
    assert lines[0] == "Title"
    assert lines[1] == "method                                 average accuracy  forgetting (max − last)  seconds"
    assert set(lines[2]) == {"─"}
    assert lines[3:] == [
        "er_ace + batch_norm (passes=separate)        54.1 ± 1.2               25.0 ± 0.3       34",
        "er + none                                           4.1                        –        7",
        "One note.",
        "Another.",
    ]


def test_a_narrow_terminal_gets_parts_and_whole_numbers() -> None:
    lines = shown(Table("A title that is longer than it is wide", COLUMNS, ROWS, ("A note.",)), 36)
    assert max(map(len, lines)) <= 36
    text = "\n".join(lines)
    for number in ("54.1 ± 1.2", "25.0 ± 0.3", "seconds", "forgetting"):
        assert number in text
    assert text.count("er + none") == 3  # a part for each number: the names' longest word takes half of it
    assert lines[-1] == "A note."


def test_a_terminal_too_narrow_for_anything_still_ends() -> None:
    lines = shown(Table("T", COLUMNS, ROWS), 5)
    assert max(map(len, lines)) <= 5


def test_numbers_as_text() -> None:
    assert percent([0.5, None, float("nan")]) == "50.0 (n = 1)"
    assert percent([None]) == percent([]) == percent([float("inf")]) == "–"
    assert interval([1.0, 2.0], partial(fixed, places=2)) == "1.50 ± 0.71"


def test_latex_is_a_float_of_booktabs() -> None:
    rows = (("er_ace & [x]", "54.1 ± 1.2"), ("[b]", "−0.5 [-1.0, +2.5]"), ("c-1", "1.5e-06 → 2e+10"))
    table = Table("T_1 (%): a", ("name", "a|b"), rows, ("One note.", "See #2."))
    assert (
        table.latex()
        == r"""% Needs \usepackage{booktabs} in the preamble.
\begin{table}[htbp]
  \centering
  \caption{T\_1 (\%): a. One note. See \#2.}
  \label{tab:t-1-a}
  \begin{tabular}{lr}
    \toprule
    name & a\textbar{}b \\
    \midrule
    er\_ace \& [x] & 54.1 $\pm$ 1.2 \\
    {}[b] & $-$0.5 [$-$1.0, +2.5] \\
    c-1 & 1.5$\times 10^{-6}$ $\rightarrow$ 2$\times 10^{10}$ \\
    \bottomrule
  \end{tabular}
\end{table}
"""
    )


COMMANDS = {latex: character for character, latex in CHARACTERS.items()}
TOKENS = re.compile(r"\$[^$]*\$|\\text\w+\{\}|\\\w+\{\}|\\.|\{\}|.", re.DOTALL)


def read_back(latex: str) -> str:
    """Return the characters that LaTeX would set: commands resolved, no active or special character of its own left."""
    text = ""
    for token in TOKENS.findall(latex):
        if token in COMMANDS:
            text += COMMANDS[token]
        elif token != "{}":
            assert token not in set("\\{}$&#%_^~"), f"LaTeX would read {token!r} as a command"
            text += token
    return text


@given(st.text(alphabet=st.one_of(st.sampled_from([*CHARACTERS, *"ab-' "]), st.characters(categories=["L", "N", "P"]))))
def test_latex_shows_any_text_as_it_is(text: str) -> None:
    expected = re.sub(r"\s*[\r\n]+\s*", " ", text).replace("”", '"')  # both are set as one glyph
    latex = escaped(text)
    assert read_back(latex).replace("”", '"') == expected
    assert "--" not in latex
    assert "''" not in latex  # neither is set as one dash or quotation mark


def test_latex_has_no_line_breaks_or_control_characters() -> None:
    assert escaped("a\n\n b\x00c\x1b[0m\\input{x}") == r"a bc[0m\textbackslash{}input\{x\}"


def test_a_federated_caption_tells_what_is_not_at_its_default() -> None:
    values = {"train": {"optimizer": "adamw", "augment": "crop,rotate", "label_smoothing": 0.1}}
    result = simulate(resolve({**SMALL, **values}), runs=None)
    (told,) = [note for note in accuracy_table([result]).notes if note.startswith("Settings")]
    assert told == "Settings: fedavg: lr 0.01, optimizer adamw, label_smoothing 0.1, augment crop,rotate."
