"""The section [run]: length, output folder, device, checkpoints and validation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fomoe_ext.config.limits import at_least


@dataclass(frozen=True)
class RunConfig:
    """Length, seed, output and device of a job."""

    seed: int = 0
    """Seed of the initial weights, the order of the data and random placements."""
    local_steps: int = 16
    """Local steps that every site takes in a round, i.e. between two meetings."""
    rounds: int = 48
    """Number of rounds."""
    steps: int | None = None
    """Total local steps of every site, instead of rounds; rounded up to whole rounds."""
    run_dir: Path | None = None
    """Folder for the output of the run; none = runs/<preset>-<time>."""
    resume: str | None = None
    """Continue from this run folder or checkpoint. auto, or no value: from the newest complete
    checkpoint in run_dir (in the newest run in runs/, if run_dir is not given); if there is none,
    the job starts from step 0."""
    eval_rounds: int = 12
    """Compute the validation loss every so many rounds and at the end; 0 = only at the end."""
    eval_tokens: int = 65536
    """Number of validation tokens; at the end eight times as many are used."""
    probe_tokens: int = 0
    """Number of validation tokens routed before and after every meeting to measure how much routing
    changes (in metrics.jsonl and the report); 0 = none."""
    coactivation: bool = False
    """Write to report.json how often each pair of experts was chosen for the same token, even if
    the table has more than 2^18 entries. Smaller tables are always written."""
    checkpoint_rounds: int = 0
    """Write a checkpoint every so many rounds and at the end; 0 = only at the end."""
    keep_checkpoints: int = 0
    """Keep this many complete checkpoints, the newest; 0 = all."""
    async_checkpoints: bool = True
    """Copy the state to host memory and write checkpoints from there while training continues. The
    memory is reused for the next checkpoint. Without it training waits and needs no such memory."""
    tensorboard: bool = True
    """Also write metrics as TensorBoard events."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto = cuda if there is a GPU, otherwise cpu."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of matrix products; with bfloat16 they run under autocast. Parameters are fp32 in
    both cases."""
    cuda_graph: bool = False
    """Capture a local step as a CUDA graph and replay it, so that the host does not limit small
    layers. Takes the memory of a step's activations for good. On the CPU nothing is captured."""

    def __post_init__(self) -> None:
        at = "run."
        at_least(at, 0, seed=self.seed, eval_rounds=self.eval_rounds)
        at_least(at, 0, checkpoint_rounds=self.checkpoint_rounds, probe_tokens=self.probe_tokens)
        at_least(at, 0, keep_checkpoints=self.keep_checkpoints)
        at_least(at, 1, local_steps=self.local_steps, rounds=self.rounds, steps=self.steps)
        at_least(at, 1, eval_tokens=self.eval_tokens)

    @property
    def resolved_rounds(self) -> int:
        """`rounds`, or the number of rounds that `steps` take."""
        return self.rounds if self.steps is None else -(-self.steps // self.local_steps)
