"""Whether ``torch.compile`` makes machine code here: on the CPU it needs a C++ compiler."""

from __future__ import annotations

import pytest
import torch

from fednorm import device
from fednorm.errors import ConfigError


def require_compiler() -> None:
    """Skip the test, with the reason, where ``torch.compile`` does not work."""
    try:
        device._require_compiler(torch.device("cpu"))
    except ConfigError as error:
        pytest.skip(str(error))
