"""The section [run]: how long, where to, on which device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fomoe_ext.config.limits import at_least


@dataclass(frozen=True)
class RunConfig:
    """Length, seed, files and device of the job."""

    seed: int = 0
    """Seed of the initial weights, the order of the data and random placements."""
    local_steps: int = 16
    """Steps every site takes between two meetings."""
    rounds: int = 48
    """Number of rounds."""
    steps: int | None = None
    """Steps of every site in all; sets `rounds` (rounded up) when given."""
    run_dir: Path | None = None
    """Folder of the run; none = runs/<preset>-<time>."""
    resume: str | None = None
    """Run folder or checkpoint to continue. auto or no value: the newest whole checkpoint of
    run_dir, or of the newest run in runs/; where there is none the job begins anew."""
    eval_rounds: int = 12
    """Validate every so many rounds, and at the end; 0 = only at the end."""
    eval_tokens: int = 65536
    """Validation tokens used before the end; at the end eight times as many."""
    probe_tokens: int = 0
    """Validation tokens that all sites route before and after every meeting, to measure how stable
    routing is (metrics.jsonl, report); 0 = none."""
    coactivation: bool = False
    """Tell in report.json how often a token chose both of two experts, also where that is more than
    2^18 numbers."""
    checkpoint_rounds: int = 0
    """Write a checkpoint every so many rounds, and at the end; 0 = only at the end."""
    keep_checkpoints: int = 0
    """Keep so many whole checkpoints, the newest; 0 = all."""
    async_checkpoints: bool = True
    """Write checkpoints while training goes on, from a copy in host memory of what a process
    writes, which is kept for the next; without it training waits, and there is no copy."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = cuda where there is one, else cpu."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: parameters in fp32, matrix products under autocast."""

    def __post_init__(self) -> None:
        at = "run."
        at_least(at, 0, seed=self.seed, eval_rounds=self.eval_rounds)
        at_least(at, 0, checkpoint_rounds=self.checkpoint_rounds, probe_tokens=self.probe_tokens)
        at_least(at, 0, keep_checkpoints=self.keep_checkpoints)
        at_least(at, 1, local_steps=self.local_steps, rounds=self.rounds, steps=self.steps)
        at_least(at, 1, eval_tokens=self.eval_tokens)

    @property
    def resolved_rounds(self) -> int:
        """`rounds`, or the rounds that `steps` take."""
        return self.rounds if self.steps is None else -(-self.steps // self.local_steps)
