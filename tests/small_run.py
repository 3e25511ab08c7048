"""For tests of `fomoe export` and `fomoe eval`: a finished run of two sites, and checkpoints of
models that were never trained.
"""

from __future__ import annotations

import atexit
import dataclasses
import os
import shlex
import shutil
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import forked
import torch

from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.checkpoint.writer import save_checkpoint
from fomoe_ext.config.io import save_config
from fomoe_ext.config.job import TrainConfig
from fomoe_ext.config.model import ModelConfig
from fomoe_ext.layer.assemble import local_tensors, own_global_tensors
from fomoe_ext.model.language import LanguageModel
from fomoe_ext.placement import Placement

FLAGS = shlex.split("""
--hidden-size 16 --num-layers 2 --num-heads 2 --num-experts 8 --intermediate-size 8 --top-k 2
--seq-len 32 --batch-size 2 --local-steps 4 --rounds 6 --eval-rounds 0 --eval-tokens 256
--checkpoint-rounds 3 --threads 1 --warmup-steps 2 --sites 2 --replication 1 --no-tensorboard
--router-scope global --codec fp32
""")


@lru_cache(maxsize=1)
def finished_run() -> Path:
    """The folder of a run with two checkpoints, made once per test process. Not to be changed."""
    folder = tempfile.TemporaryDirectory(prefix="fomoe-test-")
    atexit.register(folder.cleanup)
    text, run = Path(folder.name) / "text", Path(folder.name) / "run"
    text.mkdir()
    for module in ("argparse", "ast", "calendar", "cmd", "copy", "csv"):
        shutil.copy(sys.modules["os"].__file__.replace("os.py", f"{module}.py"), text)
    where = [
        "--data",
        str(text / "*.py"),
        "--cache-dir",
        str(text / "cache"),
        "--run-dir",
        str(run),
    ]
    result = forked.train(*FLAGS, *where, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
    return run


def tiny_config(**changes: Any) -> ModelConfig:
    """A small model; `changes` are fields of ModelConfig."""
    sizes: dict[str, Any] = {
        "vocab_size": 256,
        "seq_len": 24,
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "num_experts": 8,
        "intermediate_size": 8,
    }
    return ModelConfig(**(sizes | changes))


@torch.no_grad()
def random_model(config: ModelConfig) -> LanguageModel:
    """A model none of whose tensors is zero or one everywhere, in eval mode."""
    model = LanguageModel(config, seed=5)
    noise = torch.Generator().manual_seed(6)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and (tensor.dim() == 1 or name.endswith("bias")):
            tensor += 0.2 * torch.randn(tensor.shape, generator=noise)
    return model.eval()


def untrained_run(
    folder: Path,
    model: LanguageModel,
    *,
    config: TrainConfig | None = None,
    state: dict[str, Any] | None = None,
    meta: dict[str, Any] | None = None,
) -> Path:
    """A run folder with one checkpoint of the model, as one site would write it, or (without a
    TrainConfig) the checkpoint's own folder. `meta`: what else its manifest says.
    """
    sizes = model.config
    whole = Placement.cyclic(
        num_sites=1, num_experts=sizes.num_experts, num_layers=sizes.num_layers, replication=1
    )
    path = save_checkpoint(
        folder / "checkpoints",
        ckpt.checkpoint_name(8),
        own_global_tensors(model, whole, 0, local_tensors(model)),
        state or {},
        site=0,
        num_sites=1,
        round=2,
        meta={"model": dataclasses.asdict(sizes)} | (meta or {}),
    )
    if config is None:
        return path
    save_config(dataclasses.replace(config, model=sizes), folder / "config.toml")
    return folder


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference over the largest magnitude of the reference."""
    difference = (value.double() - reference.double()).abs().max()
    return float(difference / reference.double().abs().max())
