"""Fixtures of all tests: a tiny data set made by hand, and full-physics events where they exist."""
import os
from pathlib import Path

import pytest

from iceaggr.testing import write_tiny


@pytest.fixture
def tiny_dataset(tmp_path):
    "Folder of a data set with training files 2, 3 and 10 of 8, 6 and 7 events."
    return write_tiny(tmp_path / "tiny")


def folder_of(variable, what):
    "The folder that an environment variable names; tests that need it are skipped where it is not set."
    root = os.environ.get(variable)
    if not root: pytest.skip(f"{variable} is not set: no {what} to test on")
    return Path(root)


@pytest.fixture(scope="session")
def graphnet_root():
    "Folder of GraphNeT's own test files."
    return folder_of("ICEAGGR_GRAPHNET", "files of GraphNeT")


@pytest.fixture(scope="session")
def ppc_root():
    "Folder of the full-physics events."
    return folder_of("ICEAGGR_PPC", "full-physics events")
