"""The reference model, loaded once."""

from pathlib import Path
from typing import Any

import pytest
from mlx_lm import load
from support import REFERENCE_MODEL


@pytest.fixture(scope="session")
def reference() -> tuple[Any, Path]:
    model, _ = load(str(REFERENCE_MODEL))
    return model, REFERENCE_MODEL
