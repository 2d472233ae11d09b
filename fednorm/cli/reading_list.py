"""The papers of the project's reading list, normalization and re-scaling, that have no place in an image classifier."""

from __future__ import annotations

from dataclasses import dataclass

from fednorm.cards import Citation


@dataclass(frozen=True)
class NotApplicable:
    """A paper of the reading list, or a part of one, that fednorm does not have.

    Attributes:
        name: What it is called.
        citation: The paper.
        why: Why it has no place here; one line.
    """

    name: str
    citation: Citation
    why: str


NOT_APPLICABLE: tuple[NotApplicable, ...] = (
    NotApplicable(
        "GMRT HI stacking",
        Citation(
            title="GMRT observation of neutral atomic hydrogen gas in the COSMOS field at z ~ 0.37",
            authors="Rhee et al.",
            year=2016,
            arxiv="1605.02006",
        ),
        "Radio astronomy: what is normalized is a survey's volume, and there is no network.",
    ),
    NotApplicable(
        "VacancySBERT",
        Citation(title="VacancySBERT", authors="", year=2023, arxiv="2307.16638"),
        "Matches job titles and skills as texts: normalizing a title is a search, not a layer.",
    ),
    NotApplicable(
        "SonicMaster",
        Citation(title="SonicMaster", authors="", year=2025, arxiv="2508.03448"),
        "Generates restored music by flow matching: no classifier, and no normalization of its own.",
    ),
    NotApplicable(
        "dual-latent invertible rescaling",
        Citation(title="Dual latent variables in invertible networks", authors="", year=2022, arxiv="2207.11844"),
        "Rescales images, in pixels, by an invertible network; it is judged by PSNR and has no layer for a classifier.",
    ),
    NotApplicable(
        "STARFlow",
        Citation(title="STARFlow", authors="", year=2025, arxiv="2506.06276"),
        "A normalizing flow that generates images: to normalize is to model a density; its layers use ordinary norms.",
    ),
    NotApplicable(
        "ShiftQuant",
        Citation(
            title="Towards Accurate and Efficient Sub-8-Bit Integer Training", authors="", year=2024, arxiv="2411.10948"
        ),
        "Its integer arithmetic quantizes gradients and needs integer kernels; of the paper the L1 layers alone apply.",
    ),
)
"""In the order of the reading list."""
