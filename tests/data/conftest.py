"""What tests of the data share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fomoe_ext.data.sequences import TextData, open_data


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., TextData]:
    """`open_data` with a cache folder of the test's own and sequences of 16 tokens."""

    def call(*paths: Any, seq_len: int = 16, **options: Any) -> TextData:
        options.setdefault("cache_dir", tmp_path / "cache")
        return open_data([str(path) for path in paths], seq_len, **options)

    return call
