"""Meetings of sites under `transformers.Trainer`: every site runs a Trainer of its own."""

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
    """Inside, the environment does not say that this process is one of several.

    A Trainer would otherwise join the sites to a data-parallel world, with an exchange at every
    step. Make its TrainingArguments inside, after torch.distributed has been initialised.
    """
    hidden = {name: os.environ.pop(name) for name in _SHOWN if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _refusal(args: TrainingArguments, state: TrainerState, staggered: bool, steps: int) -> str:
    """What of a Trainer's arguments would part the sites, or change weights that they share, or an
    empty string. `steps`: local steps of a round."""
    if args.load_best_model_at_end:
        return (
            "load_best_model_at_end must be False: every site would load the one that is best for "
            "itself, of its own step"
        )
    if "EarlyStoppingCallback" in state.stateful_callbacks:
        return "EarlyStoppingCallback: every site would stop at a step of its own"
    if args.auto_find_batch_size:
        return "auto_find_batch_size must be False: one site would begin anew without the others"
    if args.world_size > 1:
        return (
            f"TrainingArguments must be made inside one_process(), they are of {args.world_size} "
            "processes: the Trainer would make one model of the sites' different ones"
        )
    if args.n_gpu > 1:
        return f"a site's Trainer must use one GPU, got {args.n_gpu} (CUDA_VISIBLE_DEVICES)"
    for name in ("fsdp", "deepspeed"):
        if getattr(args, name, None):
            return f"{name} must not be used: it takes the site's parameters apart"
    if staggered and state.max_steps % steps:
        return (
            f"max_steps must be a multiple of local_steps = {steps} with fragments or overlap, got "
            f"{state.max_steps}: the last steps would never meet"
        )
    return ""


class OuterSyncCallback(TrainerCallback):
    """Lets the sites meet after every `options.local_steps` optimizer steps, and at the end.

    `sync` is the `OuterSync`, from the start of training; `reports` those of its rounds. A
    checkpoint of the Trainer gets a file more, the state of the meetings; after
    `train(resume_from_checkpoint=folder)` training goes on with it.

    All sites must take the same steps. What would part them is refused when training begins:
    load_best_model_at_end, early stopping, auto_find_batch_size, other numbers of steps, a Trainer
    that joins several processes. A site that stops before the others is named at the next meeting.
    """

    def __init__(
        self,
        placement: Placement,
        site: int,
        options: OuterOptions,
        *,
        resume_from: str | Path | None = None,
    ) -> None:
        """placement, site, options: of `OuterSync`; `options.local_steps` must be given, the number
        of optimizer steps of a round.

        resume_from: the Trainer's checkpoint folder that training will go on from, of a step at
        which sites met. Raises ValueError for options without local_steps or with site_mean
        "tokens" (a Trainer does not count them), or a folder without the state of meetings.
        """
        if options.local_steps is None:
            raise ValueError("local_steps must be at least 1, got None")
        if options.site_mean != "equal":
            raise ValueError(f"site_mean must be equal here, got {options.site_mean!r}")
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
        """Meets the other sites. Raises ValueError or MeetingError for what would part them."""
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
            self._state = None  # another `train` begins anew
        elsewhere = args.save_strategy == "steps" and args.save_steps % self.local_steps
        if elsewhere and args.save_steps < state.max_steps:
            warnings.warn(
                f"checkpoints of steps that are no multiple of local_steps = {self.local_steps} "
                f"cannot be resumed: save_steps is {args.save_steps}",
                stacklevel=2,
            )

    def _require_alike(self, args: TrainingArguments, state: TrainerState) -> None:
        """Raises, on all sites, unless training can begin here and everywhere alike."""
        problem = _refusal(args, state, self.options.staggered, self.local_steps)
        stored = 0 if self._state is None else int(self._state["steps"])
        if not problem and stored != state.global_step:
            problem = (
                f"resume_from must be what training goes on from: the Trainer begins at step "
                f"{state.global_step}, the meetings at {stored}"
            )
        if not problem and stored % self.local_steps:
            problem = (
                f"resume_from must be of a step at which sites met, a multiple of local_steps = "
                f"{self.local_steps}, got {stored}"
            )
        facts = {"max_steps": state.max_steps, "first step": state.global_step}
        if self.options.overlap:  # fragments are taken in for a checkpoint
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
        """What all sites say; a collective."""
        sites = self.placement.num_sites
        return gather_objects(value, sites) if dist.is_initialized() else [value] * sites

    def _meet(self, state: TrainerState, ends: bool = False) -> None:
        """A meeting, with others that have taken the same steps; where training `ends` it is one
        only if there have been steps since the last."""
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
        """After an optimizer step: one step of bias balancing; a meeting where it is due."""
        assert self.sync is not None
        for layer in layers(given["model"]):
            layer.update_selection_bias()
        self.sync.after_step()
        if state.global_step % self.local_steps == 0:
            self._meet(state)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Writes the state of the meetings into the checkpoint; and the weights, which transformers
        leaves to rank 0 of torch.distributed, but every site has its own."""
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
        """A last meeting, if there have been steps since one, so that all sites end with one
        model. Raises MeetingError where sites have taken different steps, and with fragments or
        overlap where steps are no multiple of local_steps; then every site keeps its own model."""
        assert self.sync is not None
        if not self.sync.options.staggered:
            self._meet(state, ends=True)
        self.sync.finish()
        if self.sync.options.staggered and state.global_step % self.local_steps:
            raise MeetingError(
                f"training ended after step {state.global_step}, which is no multiple of "
                f"local_steps = {self.local_steps}: with fragments or overlap the last steps have "
                "not met, every site has a model of its own"
            )
        if self.sync.options.apart:
            self.sync.copy_anchor_to_model()
