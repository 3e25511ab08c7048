"""What a site does in a job: local steps, meetings, checkpoints, validation, its counts.

With several ranks a site's batch is shared among them, experts by the mesh and all else by FSDP;
this is then one rank, all of a site go through the same calls, and the first speaks for it.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fomoe_ext.checkpoint.reader import GlobalModelReader, load_global_model, load_tensors
from fomoe_ext.checkpoint.resume import fill_copies, load_into
from fomoe_ext.checkpoint.writer import CheckpointWriter
from fomoe_ext.config.job import TrainConfig
from fomoe_ext.config.links import parse_link
from fomoe_ext.data.sequences import TextData
from fomoe_ext.fault.shadows import Shadows
from fomoe_ext.launch import inject
from fomoe_ext.launch.messages import gather_objects
from fomoe_ext.launch.world import StopRequest, World, with_others
from fomoe_ext.layer.assemble import local_tensors
from fomoe_ext.layer.dense import average_experts, shard_dense
from fomoe_ext.layer.mesh import local_tensor, make_mesh
from fomoe_ext.layer.routing_probe import RoutingProbe, figures, pack, unpack
from fomoe_ext.model.evaluate import Validation, evaluate
from fomoe_ext.model.language import LanguageModel
from fomoe_ext.outer import OuterSync, RoundReport, SiteGroups
from fomoe_ext.outer.averaging import Treatment
from fomoe_ext.outer.groups import Handle
from fomoe_ext.placement.coactivation import is_small
from fomoe_ext.placement.placement import Placement
from fomoe_ext.plan import traffic as plan
from fomoe_ext.plan.traffic import RoundNote
from fomoe_ext.report.runs import CHECKPOINTS
from fomoe_ext.train.job import (
    find_state,
    job_identity,
    learning_rate,
    make_optimizer,
    outer_options,
)
from fomoe_ext.train.pace import Pace, steps_of_round
from fomoe_ext.train.saving import Checkpoints
from fomoe_ext.train.tally import Tally, build_report, of_site, site_part


class TrainingSite:
    """A site of a job (one of its ranks), from its start or from a checkpoint to the report."""

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        data: TextData,
        device: torch.device,
        resume: Path | None,
        late: bool = False,
    ) -> None:
        """`config` is resolved; `resume` is a checkpoint. All processes must make theirs at once;
        a `late` one has no model before `fomoe_ext.fault.reform` has made one.

        Raises CheckpointError for a checkpoint of another job.
        """
        self.config, self.world, self.data, self.device = config, world, data, device
        self.run_dir = config.run.run_dir or Path(".")
        self.started = time.perf_counter()
        self.rounds, self.local_steps = config.run.resolved_rounds, config.run.local_steps
        self.autocast = torch.bfloat16 if config.run.dtype == "bfloat16" else None
        resumed = None if resume is None else find_state(resume, config, world.site)
        self.late = late
        """Whether this site knows nothing of the model yet, or not enough."""
        self.shadows = Shadows()
        self.story: list[dict[str, Any]] = []
        """What happened to the sites, for the report."""
        self.mesh: DeviceMesh | None = None
        if world.ranks > 1:
            with with_others("the mesh", world.site):
                self.mesh = make_mesh(
                    world.num_sites, world.ranks, config.sites.replicas, device.type
                )
        self.model: LanguageModel
        self.optimizer: torch.optim.Optimizer
        self.sync: OuterSync
        if not late:
            placement = plan.job_placement(config) if resumed is None else resumed.placement
            groups = self.make_groups(world)
            self.model, self.optimizer, self.sync = self.make(world, placement, groups, resume)
        self.batches = data.train_batches(
            world.number, config.sites.sites, config.inner.batch_size, config.run.seed
        )
        self.tally = Tally()
        self.steps_in_round = 0
        self.steps_due = self.local_steps
        """Local steps that this site takes in the round."""
        self._steps_due_next = self.local_steps
        self._spoilt = False
        """Whether no more steps can be taken in the round: parameters are not finite."""
        self.pace, self.clock = Pace(), time.perf_counter
        self._round_tokens = 0
        self._round_loss = torch.zeros((), dtype=torch.float64, device=device)
        self._round_rows = torch.zeros((), dtype=torch.int64, device=device)
        self._round_slots = 0
        self._notes: tuple[Handle, Tensor] | None = None
        self._probe = self._make_probe() if config.run.probe_tokens else None
        self.routing: dict[str, Any] | None = None
        """`routing_probe.figures` of the last meeting, where there is a probe."""
        self.notes: list[str] = []
        """What the user is to be told of the start."""
        self.resumed = resume is not None
        self.changes: dict[str, tuple[Any, Any]] = {}
        """What of the run's configuration is another since the job goes on (`config_effects`)."""
        if resumed is not None:
            assert resume is not None
            load_into(self, resumed, partial(load_tensors, resume))
            if self.sync.copies is not None:
                with GlobalModelReader(resume) as reader:
                    fill_copies(self, resumed, reader.tensor)
            if not resumed.same:
                self.notes.append(
                    f"counts begin anew: the checkpoint is of {resumed.num_sites} sites, or of "
                    "another placement"
                )
        self._before_s = self.tally.wall_s
        self.checkpoints = Checkpoints(
            self,
            CheckpointWriter(self.run_dir / CHECKPOINTS, config.run.keep_checkpoints),
            self.local_steps,
            job_identity(config) | {"tokenizer": data.tokenizer},
        )

    def make_groups(self, world: World) -> SiteGroups:
        """The connections of all sites; a collective."""
        outer, link = self.config.outer, self.config.sites.link
        with with_others("connecting the sites", world.site):
            return SiteGroups(
                world.num_sites,
                world.site,
                outer.timeout_s,
                link=None if link is None else parse_link(link),
                rank=world.rank,
                ranks=world.ranks,
            )

    def make(
        self,
        world: World,
        placement: Placement,
        groups: SiteGroups,
        resume: Path | None = None,
        arriving: bool = False,
    ) -> tuple[LanguageModel, torch.optim.Optimizer, OuterSync]:
        """A model of what a site holds by a placement, its optimizer and outer sync; a collective.

        `resume`: a checkpoint with the weights. `arriving`: see `OuterSync`.
        """
        config = self.config
        model = LanguageModel(
            config.model,
            placement,
            world.site,
            config.run.seed,
            mesh=self.mesh,
            rank_experts=plan.rank_experts(config, placement, world.site),
            stale_experts=[
                of_sites[world.site] for of_sites in plan.wanted_copies(config, placement)
            ],
            device=self.device,
        )
        if world.ranks > 1:
            shard_dense(model, model.blocks, world.num_sites, world.ranks)
        if resume is not None:
            load_global_model(resume, model)
        optimizer = make_optimizer(model, config.inner)
        with with_others("the first meeting", world.site):
            sync = OuterSync(
                model,
                placement,
                world.site,
                inner_optimizer=optimizer,
                groups=groups,
                mesh=self.mesh,
                arriving=arriving,
                **outer_options(config),
            )
        return model, optimizer, sync

    # ------------------------------------------------------------------------------ local steps

    @property
    def round(self) -> int:
        """Rounds completed."""
        return self.sync.round

    @property
    def step(self) -> int:
        """Local steps of all rounds so far, with its own of the one under way: the same at all
        sites between rounds, also where some have taken fewer."""
        return self.round * self.local_steps + self.steps_in_round

    @property
    def bytes_sent(self) -> int:
        """Bytes this process has sent so far to other sites in meetings, for moved experts and in
        notes."""
        return self.sync.bytes_sent + self.tally.note_bytes

    @property
    def link(self) -> str:
        """The link that meetings go over, in words."""
        return self.sync.groups.link_words

    @property
    def placement(self) -> Placement:
        """The placement in force."""
        return self.sync.placement

    def _local_step(self) -> Tensor:
        """One optimizer step on this site's next batch; returns the cross entropy, detached."""
        inner, ddp = self.config.inner, self.config.outer.optimizer == "ddp"
        tokens = self._share(next(self.batches)).to(self.device)
        with torch.autocast(
            self.device.type, dtype=self.autocast, enabled=self.autocast is not None
        ):
            loss = self.model.loss(tokens)
        loss.total.backward()
        self.checkpoints.settle()
        if self.mesh is not None:
            average_experts(self.model, self.mesh)
        if ddp:
            self.sync.reduce_gradients()
        if inner.grad_clip:
            self.sync.clip_grad_norm(inner.grad_clip)
        # Who takes fewer steps goes as far along the schedule in a round as the others.
        step = self.round * self.local_steps
        step += self.steps_in_round * self.local_steps // self.steps_due
        lr = learning_rate(inner, step, self.rounds * self.local_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self._count(tokens, loss.cross_entropy.detach())
        self.sync.after_step()
        self.optimizer.zero_grad()
        return loss.cross_entropy.detach()

    def _share(self, batch: Tensor) -> Tensor:
        """This rank's sequences of the site's batch."""
        return batch.chunk(self.world.ranks)[self.world.rank]

    @torch.no_grad()
    def _count(self, tokens: Tensor, loss: Tensor) -> None:
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.tally.gradient_bytes = sum(local_tensor(grad).nbytes for grad in grads)
        self.tally.steps += 1
        self.steps_in_round += 1
        count = tokens[:, 1:].numel()
        self.tally.tokens += count
        self._round_tokens += count
        self._round_loss += loss
        layers = self.model.moe_layers()
        # A site's ranks move its selection biases together.
        loads = self.sync.ranks.sum_(torch.stack([layer.load_since_update for layer in layers]))
        for layer, load in zip(layers, loads, strict=True):
            assert layer.stats is not None
            self._round_rows += layer.stats.rows
            residents = len(layer.site_experts)
            chosen = layer.top_k if layer.router_scope == "global" else min(layer.top_k, residents)
            self._round_slots += count * chosen
            layer.update_selection_bias(load)

    def take_local_steps(self, stop: StopRequest, after_step: Callable[[Tensor], None]) -> None:
        """The round's remaining local steps, cut short when this site is asked to stop.

        Where a step can be a meeting (ddp, fragments, overlap) all sites take all of them.
        `after_step` gets the cross entropy of every step, nats per token, as a scalar.
        """
        outer = self.config.outer
        all_of_them = outer.optimizer == "ddp" or outer.staggered
        before, begun = self.steps_in_round, self.clock()
        while self._steps_left and (all_of_them or not self._asked(stop)):
            position = self.batches.position
            try:
                after_step(self._local_step())
            except ValueError:  # routers on the CPU refuse NaN
                if not self._can_be_left_out():
                    raise
                self._spoilt, self.batches.position = True, position
                self.optimizer.zero_grad()
            inject.point("local")
        self.pace.took(self.steps_in_round - before, self.clock() - begun)

    @property
    def _steps_left(self) -> int:
        """Local steps that this site has yet to take before the meeting."""
        return 0 if self._spoilt else self.steps_due - self.steps_in_round

    def _can_be_left_out(self) -> bool:
        """Whether parameters here are not finite, and the meeting will go without this site."""
        if not self.config.outer.clip_delta or self.world.ranks > 1:
            return False
        return not all(bool(p.detach().isfinite().all()) for p in self.model.parameters())

    def _asked(self, stop: StopRequest) -> bool:
        """Whether any rank of this site was asked to stop."""
        if self.world.ranks == 1:
            return stop.asked
        return bool(self.sync.ranks.sum_(torch.tensor(int(stop.asked), device=self.device)))

    def exchange_notes(self, stop: bool, knocks: bool = False) -> list[RoundNote]:
        """Tells all sites how the round went here, and returns the notes of all.

        With overlap nobody waits: these are the notes of the round before (after the first round
        this site's own, which asks nobody to stop).
        """
        ranks = self.sync.ranks
        with with_others(f"the notes of round {self.round + 1}", self.world.site):
            parts = ranks.gather((stop, self.round_counts(), self.pace.seconds))
            loss, rows, slots = of_site([counts for _, counts, _ in parts])
            note = RoundNote(
                stop=float(any(asked for asked, _, _ in parts)),
                steps=self.step,
                loss=loss,
                rows=rows,
                slots=slots,
                knocks=float(knocks),
                taken=self.steps_in_round,
                left=self._steps_left,
                pace=max(seconds for _, _, seconds in parts),
            )
            told = ranks.tell(lambda: self._swap_notes(note))
        notes = [RoundNote(*numbers) for numbers in told]
        if self.config.inner.uneven_steps:
            due = steps_of_round([note.pace for note in notes], self.local_steps)
            self._steps_due_next = due[self.world.site]
        return notes

    def _swap_notes(self, note: RoundNote) -> list[RoundNote]:
        handle, notes, sent = self.sync.groups.gather_numbers(
            torch.tensor(note, dtype=torch.float64)
        )
        if self.config.outer.overlap and handle is not None:
            self.tally.note_bytes += sent
            before, self._notes = self._notes, (handle, notes)
            if before is None:
                return [note._replace(stop=0.0)]
            handle, notes = before
            sent = 0
        if handle is not None:
            handle.wait()
        self.tally.note_bytes += sent
        return [RoundNote(*numbers) for numbers in notes.tolist()]

    def round_counts(self) -> tuple[float, int, int]:
        """Sum of this rank's losses, rows and slots of the round so far."""
        return float(self._round_loss), int(self._round_rows), self._round_slots

    def set_round_counts(self, counts: tuple[float, int, int]) -> None:
        """Goes on from what `round_counts` said."""
        self._round_loss.fill_(counts[0])
        self._round_rows.fill_(counts[1])
        self._round_slots = counts[2]

    def uneven_state(self) -> dict[str, float]:
        """What of its steps is this site's own: those due, tokens of the round, the pace."""
        return {
            "due": self.steps_due,
            "tokens": self._round_tokens * self.world.ranks,
            "pace": self.pace.seconds,
        }

    def set_uneven_state(self, state: Mapping[str, float]) -> None:
        """Goes on from what `uneven_state` said. Raises ValueError for steps that no site takes."""
        due = int(state["due"])
        if not 1 <= due <= self.local_steps:
            raise ValueError(f"steps due must be in [1, {self.local_steps}], got {due}")
        if self.config.inner.uneven_steps:
            self.steps_due = self._steps_due_next = due
        self._round_tokens = int(state["tokens"]) // self.world.ranks
        self.pace = Pace(float(state["pace"]))

    # --------------------------------------------------------------------------------- meetings

    def meet(self) -> float:
        """The meeting, and a reshuffle where one is due.

        Returns the seconds it took; with ddp those of all reductions of the round.
        """
        self.checkpoints.settle()
        if self._probe is not None:
            with self._validating():
                self._probe.before_meeting()
        seconds = self.after_meeting(self.placement, self.sync.step(self._round_tokens))
        if self.config.fault.shadow_experts:
            seconds += self._refresh_shadows()
        every = self.config.sites.reshuffle_rounds
        if every and self.round % every == 0 and self.round < self.rounds:
            old = self.placement
            new = plan.job_placement(self.config, self.round // every)
            moved = self.sync.reshuffle(
                new,
                warmup_steps=self.config.sites.resolved_warmup,
                moments=self.config.sites.reshuffle_moments,
            )
            self.tally.moved_bytes += moved.bytes_sent
            self.tally.planned_bytes += plan.moved_bytes(self.config, old, new, self.world.site)
            seconds += moved.seconds
        if self._probe is not None:
            with self._validating(), with_others("the routing probe", self.world.site):
                mine = pack(self._probe.after_meeting())
                parts = gather_objects(mine, self.world.processes)[:: self.world.ranks]
                self.routing = figures([*map(unpack, parts)], self.config.model.num_experts)
        return seconds

    def _refresh_shadows(self) -> float:
        """Brings shadow copies up to the last meeting; the seconds it took."""
        start = time.perf_counter()
        with self.sync.meeting("the refresh of shadow copies"):
            self.sync.sent(self.shadows.refresh(self.sync))
        self.tally.planned_bytes += plan.shadow_bytes(self.config, self.placement, self.world.site)
        return time.perf_counter() - start

    def after_meeting(self, placement: Placement, outcome: RoundReport) -> float:
        """Counts what a meeting of `placement` was; returns the seconds it took."""
        self._tell_of(outcome)
        self.tally.rows += int(self._round_rows)
        self.tally.slots += self._round_slots
        if self.world.rank == 0:
            self.tally.planned_bytes += plan.meeting_bytes(
                self.config, placement, self.world.site, self.round
            )
        # What slower sites have not taken of the round's data is taken by nobody, so that all go on
        # from the same place in the stream.
        self.batches.skip(self.local_steps - self.steps_in_round)
        self.steps_in_round, self.steps_due = 0, self._steps_due_next
        self._spoilt = False
        self._round_slots, self._round_tokens = 0, 0
        self._round_loss.zero_()
        self._round_rows.zero_()
        return outcome.seconds

    def _make_probe(self) -> RoutingProbe:
        model = self.config.model
        windows = max(1, self.config.run.probe_tokens // model.seq_len)
        batch = next(iter(self.data.val_batches(windows, 0, 1, max_tokens=windows * model.seq_len)))
        tokens = batch[:, :-1].to(self.device)
        return RoutingProbe(self.model, self.model.moe_layers(), tokens)

    @contextmanager
    def _validating(self) -> Iterator[None]:
        """What goes on inside counts as validation: it is no part of training."""
        start = time.perf_counter()
        yield
        self.tally.validation_s += time.perf_counter() - start

    def _tell_of(self, outcome: RoundReport) -> None:
        self.tally.exchange_s += outcome.exchange_s
        self.tally.healed += len(outcome.healed)
        self._tell_of_treatment(outcome.treatment)
        if outcome.healed and self.world.rank == 0:
            print(
                f"site {self.world.site}: restored from the majority after round {self.round}: "
                f"{', '.join(outcome.healed)}",
                file=sys.stderr,
                flush=True,
            )

    def _tell_of_treatment(self, treatment: Treatment) -> None:
        site = self.world.site
        if site in treatment.left_out:
            self.tally.left_out += 1
            if self.world.rank == 0:
                print(
                    f"site {self.world.number}: what it had after round {self.round} was NaN or "
                    "infinite: left out, it goes on with what the others have agreed on",
                    file=sys.stderr,
                    flush=True,
                )
        elif treatment.factors and treatment.factors[site] < 1:
            self.tally.clipped += 1
            self.tally.least_factor = min(self.tally.least_factor, treatment.factors[site])

    def finish(self) -> None:
        """Takes in what is under way, after the last round; a collective."""
        self.checkpoints.settle()
        outcome = self.sync.finish()
        self.tally.meeting_s += outcome.seconds
        self._tell_of(outcome)

    @contextmanager
    def global_model(self) -> Iterator[dict[str, Tensor] | None]:
        """Inside, the model is that of the last meeting; gives this site's where that differs."""
        if not (self.steps_in_round or self.config.outer.apart):
            yield None
            return
        local = {name: value.clone() for name, value in local_tensors(self.model).items()}
        self.sync.copy_anchor_to_model()
        yield local
        self._restore(local)

    def _counts_pairs(self) -> bool:
        model = self.config.model
        return self.config.run.coactivation or is_small(model.num_layers, model.num_experts)

    @torch.no_grad()
    def validate(self, max_tokens: int) -> Validation:
        """Validation of the global model, counted; a collective."""
        what = f"the validation after round {self.round}"
        with self.global_model(), with_others(what, self.world.site):
            result = evaluate(
                self.model,
                self.data,
                self.placement,
                self.world.site,
                max_tokens=max_tokens,
                autocast=self.autocast,
                ranks=self.sync.ranks,
                coactivation=self._counts_pairs(),
            )
        self.tally.validation_s += result.seconds
        self.tally.validation_bytes += result.bytes_sent
        if self.tally.first_validation is None:
            self.tally.first_validation = {
                "round": self.round,
                "loss": result.loss,
                "bits_per_byte": result.bits_per_byte,
            }
        return result

    # ------------------------------------------------------------------------------ checkpoints

    def counts(self) -> tuple[dict[str, Any], tuple[float, int, int]]:
        """What this rank has counted, since the job began and in the round."""
        self.tally.wall_s = self._before_s + time.perf_counter() - self.started
        return self.tally.state_dict(), self.round_counts()

    def progress_state(
        self, counts: Sequence[tuple[dict[str, Any], tuple[float, int, int]]]
    ) -> dict[str, Any]:
        """How far this site is, for a checkpoint; `counts` are those of its ranks."""
        return {
            "data": self.batches.state_dict(),
            "tally": Tally.of_ranks([Tally.from_state(tally) for tally, _ in counts]).state_dict(),
            "steps_in_round": self.steps_in_round,
            "uneven": self.uneven_state(),
            "round_counts": of_site([of_round for _, of_round in counts]),
        }

    def load_progress_state(self, state: Mapping[str, Any], same: bool) -> None:
        """Goes on from `progress_state`; counts begin anew unless it is of the `same` sites.

        The outer sync has its round already. Raises ValueError for what is no such state.
        """
        self.batches.load_state_dict(state["data"])
        tally = Tally.from_state(state["tally"])
        loss, rows, slots = state["round_counts"]
        if not same:
            self.tally = Tally(steps=tally.steps, from_round=self.round, from_step=tally.steps)
            return
        # Sums of a site are its first rank's from here on.
        leads = self.world.rank == 0
        self.tally = tally if leads else tally.without_counts()
        self.steps_in_round = state["steps_in_round"]
        if "uneven" in state:  # not in checkpoints of earlier versions
            self.set_uneven_state(state["uneven"])
        self.set_round_counts((loss, rows, slots) if leads else (loss, 0, 0))

    @torch.no_grad()
    def _restore(self, tensors: dict[str, Tensor]) -> None:
        for name, target in local_tensors(self.model).items():
            target.copy_(tensors[name])

    # ----------------------------------------------------------------------------------- report

    def memory(self) -> dict[str, int]:
        """Bytes of this process's tensors by the parts of `plan_memory.SiteMemory`."""
        states = self.optimizer.state.values()
        tensors = [v for state in states for v in state.values() if isinstance(v, Tensor)]
        anchor, outer_state, error_feedback = self.sync.state_bytes()
        return {
            "parameters": sum(local_tensor(p).nbytes for p in self.model.parameters()),
            "gradients": self.tally.gradient_bytes,
            "inner_state": sum(local_tensor(t).nbytes for t in tensors if t.dim()),
            "anchor": anchor,
            "outer_state": outer_state,
            "error_feedback": error_feedback,
            "stale_copies": 0 if self.sync.copies is None else self.sync.copies.nbytes,
            "shadow_copies": self.shadows.nbytes,
        }

    def model_hash(self) -> str:
        """SHA-256 over the parameters' bits of the whole model; a collective."""
        everyone = gather_objects(self.sync.hashes(), self.world.processes)
        digests = {name: digest for hashes in everyone for name, digest in hashes.items()}
        return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()

    def report(self, validation: Validation) -> dict[str, Any]:
        """The report, the same on all sites; a collective."""
        self.tally.wall_s = self._before_s + time.perf_counter() - self.started
        self.tally.bytes_sent = self.bytes_sent
        self.tally.agreements = self.sync.agreements
        shown = {
            "loss": validation.loss,
            "bits_per_byte": validation.bits_per_byte,
            "tokens": validation.tokens,
            "load": validation.load.tolist(),
        }
        if validation.coactivation is not None:
            shown["coactivation"] = validation.coactivation.tolist()
        with with_others("the report", self.world.site):
            own = self.sync.ranks.gather((self.tally.state_dict(), self.memory()))
            tally = Tally.of_ranks([Tally.from_state(state) for state, _ in own])
            memory = {part: sum(m[part] for _, m in own) for part in own[0][1]}
            mine = site_part(self.world.site, tally, memory, self.config, self.round)
            mine["rank_memory"] = max(sum(m.values()) for _, m in own)
            parts = gather_objects(mine, self.world.processes)[:: self.world.ranks]
            model_hash = self.model_hash()
        return build_report(
            self.config,
            self.placement,
            parts,
            shown,
            rounds=self.round,
            data=self.data.description,
            model_hash=model_hash,
            link=self.link,
            routing=self.routing,
            story=self.story,
        )
