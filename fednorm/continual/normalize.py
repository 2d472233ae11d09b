"""The scaling of a stream's images (``data.normalize``)."""

from __future__ import annotations

import dataclasses

from fednorm.continual.stream import Stream
from fednorm.data.normalize import FIXED, measured, notes, scaled
from fednorm.data.scaling import Scaling


def normalized_stream(stream: Stream, how: str) -> Stream:
    """Return the stream with every split scaled as ``data.normalize`` says.

    What is measured is measured over the training images of all experiences, those to come included, as a data set's
    published mean and std are. A domain is what experiences share whose images lie in one array: of a stream of one
    data set's classes there is one, and ``domain`` is ``global``.

    Args:
        stream: The stream.
        how: ``half``, ``none``, ``global`` or ``domain``.
    """
    if how == "half":
        return stream
    domains: dict[int, Scaling] = {}
    if how in FIXED:
        domains = {e.train.images.data_ptr(): FIXED[how] for e in stream}
    elif how == "global":
        of_all = measured(experience.train for experience in stream)
        domains = {e.train.images.data_ptr(): of_all for e in stream}
    else:
        for array in dict.fromkeys(e.train.images.data_ptr() for e in stream):
            domains[array] = measured(e.train for e in stream if e.train.images.data_ptr() == array)
    experiences = []
    for experience in stream:
        scaling = domains[experience.train.images.data_ptr()]
        splits = {name: scaled(getattr(experience, name), scaling) for name in ("train", "validation", "test")}
        experiences.append(dataclasses.replace(experience, **splits))
    extra = notes(how, "experiences")
    return dataclasses.replace(stream, experiences=tuple(experiences), notes=(*stream.notes, *extra))
