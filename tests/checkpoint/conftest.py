"""What tests of checkpoints of several ranks share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from sites import pool
from two_by_two import NAME, save


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A checkpoint of 2 sites of 2 ranks, shared by tests: change a copy (`copied`)."""
    folder = tmp_path_factory.mktemp("saved")
    assert pool().run(4, save, folder) == [NAME] * 4
    return folder / NAME


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    shutil.copytree(saved, tmp_path / NAME)
    return tmp_path / NAME
