"""``convert``: a network's normalization replaced, and ``declare``: what cannot be found out about a class."""

from __future__ import annotations

from fednorm.conversion.declaration import declare
from fednorm.conversion.replacement import convert, convert_with_report
from fednorm.conversion.report import ConversionReport

__all__ = ["ConversionReport", "convert", "convert_with_report", "declare"]
