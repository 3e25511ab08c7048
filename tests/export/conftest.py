"""What tests of the export share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """The global model of a finished run, and what transformers loads of its export."""
    from exported_model import global_model, load, write  # here: needs transformers
    from small_run import finished_run

    from fomoe_ext.checkpoint import manifest as ckpt

    out = write(finished_run(), tmp_path_factory.mktemp("trained") / "out")
    newest = ckpt.list_checkpoints(finished_run() / "checkpoints")[-1]
    return global_model(newest), load(out), out
