"""What the tests of jobs of several ranks a site share."""

from __future__ import annotations

from pathlib import Path

import pytest
import rank_jobs

from fomoe_ext.data.sequences import open_data


@pytest.fixture(scope="module")
def rank_flags(text: Path) -> list[str]:
    """Flags of a small job of two sites, but for its run folder and the ranks of a site."""
    open_data([str(text / "*.py")], 32, cache_dir=text / "cache")  # encoded once, for all
    return [*rank_jobs.SMALL, "--data", str(text / "*.py"), "--cache-dir", str(text / "cache")]
