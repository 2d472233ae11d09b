r"""Tables in LaTeX: booktabs rules, and text that means in LaTeX what it says.

Every character that LaTeX reads as a command is written so that it shows itself, and so are the mathematical symbols of
our tables, for which pdfLaTeX has no glyphs in text. Other letters stay as they are: LaTeX reads UTF-8.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

CHARACTERS: Mapping[str, str] = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedblright{}",
    "`": r"\textasciigrave{}",
    "–": r"\textendash{}",
    "—": r"\textemdash{}",
    "“": r"\textquotedblleft{}",
    "”": r"\textquotedblright{}",
    "…": r"\ldots{}",
    "\N{NO-BREAK SPACE}": "~",
    "\N{NARROW NO-BREAK SPACE}": r"\,",
    "±": r"$\pm$",
    "−": "$-$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "→": r"$\rightarrow$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "≈": r"$\approx$",
    "Δ": r"$\Delta$",
    "²": r"$^{2}$",
    "†": r"\dag{}",
    "α": r"$\alpha$",
    "β": r"$\beta$",
    "γ": r"$\gamma$",
    "ε": r"$\varepsilon$",
    "κ": r"$\kappa$",
    "λ": r"$\lambda$",
    "μ": r"$\mu$",
    "σ": r"$\sigma$",
    "τ": r"$\tau$",
}
"""What LaTeX is given for a character."""

PACKAGE = r"% Needs \usepackage{booktabs} in the preamble."

_TRANSLATION = str.maketrans(dict(CHARACTERS))


def escaped(text: str) -> str:
    """Return text as LaTeX that shows it; line breaks become spaces, other control characters are left out."""
    plain = "".join(c for c in re.sub(r"\s*[\r\n]+\s*", " ", text) if c.isprintable() or c in CHARACTERS)
    return re.sub(r"(?<=-)-|(?<=')'", r"{}\g<0>", plain.translate(_TRANSLATION))  # no dash or quote of two


def label_of(title: str) -> str:
    r"""Return what ``\ref`` calls a table of this title: its letters and numbers, joined by dashes."""
    return f"tab:{'-'.join(re.findall('[a-z0-9]+', title.lower()))}"


def float_of(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """Return a table float.

    Args:
        title: The first sentence of the caption.
        columns: Heads; the first column is set flush left, the others, numbers, flush right.
        rows: The cells, as plain text.
        notes: More sentences of the caption.
    """
    caption = " ".join(escaped(text) for text in (f"{title.rstrip('.')}.", *notes))
    return "\n".join(
        [
            PACKAGE,
            r"\begin{table}[htbp]",
            r"  \centering",
            rf"  \caption{{{caption}}}",
            rf"  \label{{{label_of(title)}}}",
            rf"  \begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}",
            r"    \toprule",
            _row(columns),
            r"    \midrule",
            *map(_row, rows),
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _row(cells: Sequence[str]) -> str:
    r"""Return one line of the body; an opening bracket would be read as an option of the ``\\`` before it."""
    texts = [escaped(cells[0]), *map(_number, cells[1:])]
    if texts[0].startswith(("[", "*")):
        texts[0] = f"{{}}{texts[0]}"
    return f"    {' & '.join(texts)} \\\\"


def _number(cell: str) -> str:
    """Return a cell that may hold numbers: with minus signs for hyphens, and powers of ten for exponents."""
    signed = re.sub(r"(?<![\w.])-(?=\d)", "−", cell)
    power = r"$\\times 10^{\g<sign>\g<digits>}$"
    return re.sub(r"(?<=\d)e(?P<sign>-?)\+?0*(?P<digits>\d+)\b", power, escaped(signed))
