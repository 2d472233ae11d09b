"""The scaling of a stream's images (``data.normalize``)."""

from __future__ import annotations

import dataclasses

from fednorm.data.normalize import FIXED, measured, notes, scaled
from fednorm.data.scaling import Scaling
from fednorm.streams.stream import Stream

PARTS = ("train", "validation", "test")


def normalized_stream(stream: Stream, how: str) -> Stream:
    """Return the stream with every split scaled as ``data.normalize`` says.

    What is measured is measured over the training images of all experiences, those to come included, as a data set's
    published mean and std are. Experiences have a domain in common unless the scenario says otherwise: in a stream of
    one data set's classes there is one domain, and ``domain`` is ``global``.

    Args:
        stream: The stream.
        how: ``half``, ``none``, ``global`` or ``domain``.
    """
    if how == "half":
        return stream
    scalings: dict[str, Scaling] = {}
    for domain in dict.fromkeys(experience.domain for experience in stream):
        of = [experience.train for experience in stream if how == "global" or experience.domain == domain]
        scalings[domain] = FIXED[how] if how in FIXED else measured(of)
    experiences = []
    for experience in stream:
        splits = {part: scaled(getattr(experience, part), scalings[experience.domain]) for part in PARTS}
        experiences.append(dataclasses.replace(experience, **splits))
    extra = notes(how, "experiences")
    return dataclasses.replace(stream, experiences=tuple(experiences), notes=(*stream.notes, *extra))
