"""`OuterSyncCallback`: sites that meet while each runs its own `transformers.Trainer`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_model
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fomoe_ext.files.atomic import replace_file
from fomoe_ext.files.states import read_state, write_state
from fomoe_ext.files.tensors import INDEX, SINGLE
from fomoe_ext.hf.converted import layers
from fomoe_ext.launch.messages import gather_objects
from fomoe_ext.outer.errors import MeetingError
from fomoe_ext.outer.options import OuterOptions
from fomoe_ext.outer.reports import RoundReport
from fomoe_ext.outer.sync import OuterSync
from fomoe_ext.placement.placement import Placement

STATE_FILE = "outer_sync.safetensors"
_SHOWN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")


@contextmanager
def one_process() -> Iterator[None]:
    """Hides torchrun's variables from the environment while the context is open.

    Otherwise a Trainer would treat all sites as one data-parallel world and average gradients at
    every step. Create its TrainingArguments inside, after torch.distributed is initialised.
    """
    hidden = {name: os.environ.pop(name) for name in _SHOWN if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _refusal(args: TrainingArguments, state: TrainerState, staggered: bool, steps: int) -> str:
    """Why sites cannot train with these arguments of a Trainer, or "". steps: local steps of a
    round."""
    if args.load_best_model_at_end:
        return (
            "load_best_model_at_end must be False: each site would load its own best model, from "
            "a different step"
        )
    if "EarlyStoppingCallback" in state.stateful_callbacks:
        return "EarlyStoppingCallback must not be used: each site would stop at a different step"
    if args.auto_find_batch_size:
        return "auto_find_batch_size must be False: one site could restart without the others"
    if args.world_size > 1:
        return (
            "TrainingArguments must be created inside one_process(), got arguments for "
            f"{args.world_size} processes: the Trainer would average the sites' different models"
        )
    if args.n_gpu > 1:
        return f"a Trainer must use one GPU, got {args.n_gpu}: set CUDA_VISIBLE_DEVICES"
    for name in ("fsdp", "deepspeed"):
        if getattr(args, name, None):
            return f"{name} must not be used: it shards the parameters of a site"
    if staggered and state.max_steps % steps:
        return (
            f"max_steps must be a multiple of local_steps = {steps} with fragments or overlap, got "
            f"{state.max_steps}: the sites would not meet after the last steps"
        )
    return ""


class OuterSyncCallback(TrainerCallback):
    """Calls `OuterSync.step` after every `local_steps` optimizer steps and at the end of training.

    sync: the `OuterSync`, once training has begun. reports: of all rounds so far.
    Checkpoints of the Trainer contain the state of `sync` in an additional file. To resume, pass
    the folder both here (`resume_from`) and to `train(resume_from_checkpoint=folder)`.

    All sites must take the same steps. Arguments that would break this raise an error when training
    begins: load_best_model_at_end, early stopping, auto_find_batch_size, different numbers of
    steps, a Trainer of several processes. If a site stops before the others, the next meeting
    raises an error that names it.
    """

    def __init__(
        self,
        placement: Placement,
        site: int,
        options: OuterOptions,
        *,
        resume_from: str | Path | None = None,
    ) -> None:
        """placement, site, options: as for `OuterSync`. `options.local_steps`, the number of
        optimizer steps of a round, must be given.

        resume_from: a checkpoint folder of the Trainer, written at a step at which the sites met.
        Raises ValueError for options without local_steps or with site_mean "tokens" (a Trainer does
        not count tokens), and for a folder without the state of an `OuterSync`.
        """
        if options.local_steps is None:
            raise ValueError("local_steps must be at least 1, got None")
        if options.site_mean != "equal":
            raise ValueError(f"site_mean must be 'equal' here, got {options.site_mean!r}")
        self.placement, self.site, self.local_steps = placement, site, options.local_steps
        self.options = options
        self.sync: OuterSync | None = None
        self.reports: list[RoundReport] = []
        self._state: Any = None
        if resume_from is not None:
            path = Path(resume_from) / STATE_FILE
            if not path.is_file():
                raise ValueError(f"resume_from must be a folder with {STATE_FILE}, got {path}")
            self._state = read_state(path)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Creates the `OuterSync`. Raises ValueError or MeetingError if the sites cannot train
        together."""
        self._require_alike(args, state)
        if self.sync is not None:
            self.sync.close()
        optimizer = given["optimizer"]
        self.sync = OuterSync(
            given["model"],
            self.placement,
            self.site,
            self.options,
            inner_optimizer=getattr(optimizer, "optimizer", optimizer),
        )
        if self._state is not None:
            self.sync.load_state_dict(self._state)
            self._state = None  # a second call of `train` starts without it
        elsewhere = args.save_strategy == "steps" and args.save_steps % self.local_steps
        if elsewhere and args.save_steps < state.max_steps:
            warnings.warn(
                f"save_steps should be a multiple of local_steps = {self.local_steps}, got "
                f"{args.save_steps}: checkpoints of other steps cannot be resumed",
                stacklevel=2,
            )

    def _require_alike(self, args: TrainingArguments, state: TrainerState) -> None:
        """Raises on all sites unless they can train with the same steps."""
        problem = _refusal(args, state, self.options.staggered, self.local_steps)
        stored = 0 if self._state is None else int(self._state["steps"])
        if not problem and stored != state.global_step:
            problem = (
                "resume_from must be the checkpoint that the Trainer resumes, got one of step "
                f"{stored}; the Trainer begins at step {state.global_step}"
            )
        if not problem and stored % self.local_steps:
            problem = (
                "resume_from must be of a step at which sites met, a multiple of local_steps = "
                f"{self.local_steps}, got {stored}"
            )
        facts = {"max_steps": state.max_steps, "first step": state.global_step}
        if self.options.overlap:  # a checkpoint applies the fragments in flight
            facts["save_steps"] = f"{args.save_strategy} {args.save_steps}"
        told = self._tell((problem, facts))
        if problem:
            raise ValueError(problem)
        for site, (text, theirs) in enumerate(told):
            if text:
                raise MeetingError(f"site {site}: {text}")
            for name, value in theirs.items():
                if facts[name] != value:
                    raise MeetingError(
                        f"all sites must have the same {name}: site {self.site} has {facts[name]}, "
                        f"site {site} {value}"
                    )

    def _tell(self, value: Any) -> list[Any]:
        """The values of all sites; a collective."""
        sites = self.placement.num_sites
        return gather_objects(value, sites) if dist.is_initialized() else [value] * sites

    def _meet(self, state: TrainerState, ends: bool = False) -> None:
        """Meets the other sites, if all have taken the same steps. If training `ends`, sites meet
        only if they have taken steps since the last meeting."""
        told = self._tell((ends, state.global_step))
        if len(set(told)) > 1:
            words = [
                f"site {site} {'has ended training' if ended else 'meets'} after step {step}"
                for site, (ended, step) in enumerate(told)
            ]
            raise MeetingError(f"all sites must take the same steps: {', '.join(words)}")
        assert self.sync is not None
        if not ends or state.global_step % self.local_steps:
            self.reports.append(self.sync.step())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """After an optimizer step: updates selection biases and, at the end of a round, meets."""
        assert self.sync is not None
        for layer in layers(given["model"]):
            layer.update_selection_bias()
        self.sync.after_step()
        if state.global_step % self.local_steps == 0:
            self._meet(state)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Writes the state of `sync` into the checkpoint. It also writes the weights, because each
        site has its own and transformers saves only those of rank 0."""
        assert self.sync is not None
        self.sync.finish()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not any((folder / name).exists() for name in (SINGLE, INDEX)):
            with replace_file(folder / SINGLE) as temporary:
                save_model(given["model"], str(temporary))
        write_state(folder / STATE_FILE, self.sync.state_dict())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Meets once more if steps were taken since the last meeting, so that all sites end with
        the same model. Raises MeetingError, and leaves every site its own model, if sites have
        taken different steps or, with fragments or overlap, if the number of steps is not a
        multiple of local_steps."""
        assert self.sync is not None
        if not self.sync.options.staggered:
            self._meet(state, ends=True)
        self.sync.finish()
        if self.sync.options.staggered and state.global_step % self.local_steps:
            raise MeetingError(
                f"training ended after step {state.global_step}, which is not a multiple of "
                f"local_steps = {self.local_steps}: with fragments or overlap sites have not met "
                "after the last steps, and each has its own model"
            )
        if self.sync.options.apart:
            self.sync.copy_anchor_to_model()
