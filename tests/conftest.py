"""Fixtures of all tests: a tiny data set made by hand, and full-physics events where they exist."""
import os
from pathlib import Path

import pytest

from iceaggr.testing import write_tiny


@pytest.fixture
def tiny_dataset(tmp_path):
    "Folder of a data set with training files 2, 3 and 10 of 8, 6 and 7 events."
    return write_tiny(tmp_path / "tiny")


@pytest.fixture(scope="session")
def ppc_root():
    "Folder of the full-physics events."
    root = os.environ.get("ICEAGGR_PPC")
    if not root: pytest.skip("ICEAGGR_PPC is not set: no full-physics events to test on")
    return Path(root)
