"""OuterSync: the meetings of the sites that train one model.

Dense parameters are averaged over all sites, an expert over its holders. Router rows with
router_scope "global" reach all sites and are averaged over the expert's holders (a row gets its
gradient there alone, and where a copy is computed; a mean over all sites would shrink it by
replication / num_sites) or, with router_mean "all", over all sites; with "resident" they travel
with their expert. What is averaged, and by which rule, is said in `fomoe_ext.outer.optimizer`.
Frozen copies of absent experts (`MoELayer`'s stale_experts) are refreshed at the end of a meeting.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fomoe_ext.layer.mesh import SiteRanks
from fomoe_ext.outer import agreement, gradients, staged, turns
from fomoe_ext.outer import optimizer as opt
from fomoe_ext.outer.agreement import Agreement
from fomoe_ext.outer.averaging import UNTREATED
from fomoe_ext.outer.codec import get_codec
from fomoe_ext.outer.flight import Background, Flight, warn_of_lost
from fomoe_ext.outer.groups import SiteGroups
from fomoe_ext.outer.jobs import Feedback
from fomoe_ext.outer.layout import (
    Fragments,
    bias_pieces,
    check_model,
    find_moe_layers,
    make_layouts,
    parameter_pieces,
)
from fomoe_ext.outer.meeting import Meeting
from fomoe_ext.outer.members import Members
from fomoe_ext.outer.options import MeetingError, OuterOptions
from fomoe_ext.outer.reduce import buckets_of, exchange, run_jobs
from fomoe_ext.outer.reports import ReshuffleReport, RoundReport
from fomoe_ext.outer.shards import Lane
from fomoe_ext.outer.staged import MeetingLost, Pending
from fomoe_ext.outer.stale import StaleCopies, check_stale, wanted_by_all
from fomoe_ext.outer.steps import StepWatch
from fomoe_ext.placement import stale, wire
from fomoe_ext.placement.placement import Placement


class _Check(NamedTuple):
    """A comparison under way: the local step at which it began, and when it is done."""

    step: int
    compared: Agreement
    done: Future[None]


class OuterSync:
    """Keeps the models of all sites one model; every method but the plain questions is collective.

    Make one, and call its `step` after the local steps of every round. With "ddp" that only removes
    differences of rounding: gradients are averaged before every step of an optimizer that holds
    parameters of the model, unless `reduce_gradients` has just done it; `clip_grad_norm` is to take
    the place of torch's (else clipped gradients are averaged). Gradients are averaged like
    parameters: dense ones over all sites, an expert's over its holders, as if their batches were
    all there is. With replication = sites that is the gradient of the joined batch.

    With `fragments` or `overlap` some parts meet during a round. Steps of optimizers of
    torch.optim's kind are seen; with others `after_step` must be called after each. Call `finish`
    before the model is used for anything but local steps.

    The model must stay what it was: a meeting refuses, by name, parameters that are trained,
    frozen, replaced, new or gone since. Make a new OuterSync then; it takes over from this one.

    After a `step` all sites hold the same bits of dense parameters and all holders the same bits of
    an expert (with fragments, overlap or expert_turns: of the anchor), which they prove to each
    other by hashes.
    A site's memory: an fp32 anchor of what it holds (not with "ddp"), with outer momentum as much
    again, and with a lossy codec and error feedback as much again and a share of the sums.
    """

    def __init__(
        self,
        model: nn.Module,
        placement: Placement,
        site: int,
        *,
        inner_optimizer: torch.optim.Optimizer | None = None,
        groups: SiteGroups | None = None,
        timeout_s: float = 300.0,
        mesh: DeviceMesh | None = None,
        arriving: bool = False,
        **options: Any,
    ) -> None:
        """Meets the other sites; all must call it with the same options and placement.

        Args:
            model: its `MoELayer`s, in order of appearance, hold the placement's experts of `site`.
            placement, site: who holds what, and which site this is (its rank).
            inner_optimizer: that of the local steps; "local-adamw" and `reshuffle` need it.
            groups: connections to be shared with another OuterSync; None = new ones.
            timeout_s: seconds after which an exchange over new connections fails.
            mesh: of sites of several ranks (`mesh.make_mesh`), that of the model's layers.
            arriving: of a job under way: nothing is compared, and all state is left to be filled
                (`fomoe_ext.outer.belongings`); only connections are made.
            options: the fields of `OuterOptions`.

        Raises ValueError or TypeError naming the argument, RuntimeError when torch.distributed is
        not ready, and MeetingError when sites differ in arguments or initial parameters.
        """
        self.ranks = SiteRanks(mesh, placement.num_sites, site)
        rank, ranks = self.ranks.rank, self.ranks.size
        self.groups = groups or SiteGroups(
            placement.num_sites, site, timeout_s, rank=rank, ranks=ranks
        )
        given = self.groups
        if (given.num_sites, given.site) != (placement.num_sites, site):
            raise ValueError(
                f"groups must be of site {site} of {placement.num_sites}, got those of site "
                f"{given.site} of {given.num_sites}"
            )
        if (given.rank, given.ranks) != (rank, ranks):
            raise ValueError(
                f"groups must be of rank {rank} of {ranks} of the site, got those of rank "
                f"{given.rank} of {given.ranks}"
            )
        self.model, self.placement, self.site = model, placement, site
        self.inner_optimizer = inner_optimizer
        problem: Exception | None = None
        try:
            self.options = OuterOptions(**options)
            if self.options.optimizer == "local-adamw":
                opt.check_adamw(inner_optimizer)
            check_model(model, placement, site, self.ranks.expert_ranks)
            opt.check_holds(inner_optimizer, model)
            check_stale(model, self.options, ranks)
            pieces = parameter_pieces(model, placement, site, self.options.router_mean)
            turns.check_experts(pieces, self.options, ranks)
            self._fragments = Fragments(pieces, self.options.fragments)
        except (ValueError, TypeError) as error:
            problem = error
        self.moe_layers = [layer for _, layer in find_moe_layers(model)]
        if not arriving:
            agreement.agree_on_arguments(self, problem)
        elif problem is not None:
            raise problem
        options_ = self.options
        self.rule = opt.OuterRule.make(
            options_.optimizer, options_.outer_lr, options_.outer_momentum
        )
        self.codec = get_codec(options_.codec, options_.rounding)
        self.round = 0
        """Rounds completed."""
        self.bytes_sent = 0
        """Bytes this site has sent in all meetings and reshuffles."""
        self._steps = 0
        self.reductions = 0
        """How often gradients were reduced."""
        self.reduction = gradients.Reduction()
        """With "ddp": the gradients that are the mean now."""
        self._broken = ""
        self.round_bytes, self.round_seconds, self._round_exchange_s = 0, 0.0, 0.0
        self._healed: list[str] = []
        self.agreements = 0
        """Meetings after which all holders were found to hold the same bits."""
        self._background = Background()
        self._flights: list[Flight] = []
        if self.options.overlap:
            weakref.finalize(self, warn_of_lost, self._flights)
        self._meetings: dict[int, Meeting] = {}
        self._checks: list[_Check] = []
        self.pending: Pending | None = None
        """With `staged`: a meeting that is neither applied nor taken back."""
        self.compared: Meeting | None = None
        """With `staged`: what was applied and has not been compared yet."""
        self.lost_bytes = 0
        """With `staged`: bytes sent in meetings that broke off."""
        experts = self.moe_layers[0].num_experts if self.moe_layers else 0
        self.tokens = torch.zeros(len(self.moe_layers), experts, dtype=torch.float64)
        """Tokens routed to each expert [L, E] since its last meeting, where they are counted."""
        self.met = torch.zeros(len(self.moe_layers), experts, dtype=torch.int64)
        """The round in which each expert that this site holds last met, [L, E]; 0 = none yet."""
        self.trained = 0.0
        """Tokens that this rank has trained on in the round, with site_mean "tokens"."""
        self.treatment = UNTREATED
        """Whose deltas the last meeting has scaled down or left out, with `clip_delta`."""
        self.warmup: opt.ArrivalWarmup | None = None
        if inner_optimizer is not None:
            self.warmup = opt.ArrivalWarmup(inner_optimizer, self.moe_layers)
        self._copied = () if arriving else wanted_by_all(self)
        self.copies: StaleCopies | None = None
        if any(experts for layer in self._copied for experts in layer):
            self.copies = StaleCopies(self, self._copied)
        self.adopt_placement(placement)
        self.watch = StepWatch(self)
        """Sees the steps of optimizers."""
        if not arriving:
            self._fill_anchor()
            self.verify()

    @property
    def steps(self) -> int:
        """Local steps taken, as far as they were seen or `after_step` was called."""
        return self._steps

    @steps.setter
    def steps(self, number: int) -> None:
        self._steps = number
        self.watch.steps_set()

    def close(self) -> None:
        """Steps of optimizers are of no more concern, for a model that trains on without meetings.
        A later OuterSync of the same model closes this one."""
        self.watch.close()

    # ------------------------------------------------------------------------------- agreement

    def hashes(self) -> dict[str, str]:
        """SHA-256 of what all its holders hold alike, by name of a fragment and owner set.

        With fragments, overlap or expert_turns that is the anchor, else the parameters.
        """
        return agreement.digests(self)

    def verify(self) -> None:
        """Raises MeetingError unless all owners hold the same bits. True after `step`."""
        agreement.verify(self)

    # ---------------------------------------------------------------------------------- layout

    def adopt_placement(self, placement: Placement) -> None:
        """Lays out the pieces for a placement that the model's resident experts are already of."""
        self.placement = placement
        pieces = parameter_pieces(
            self.model, placement, self.site, self.options.router_mean, self._copied
        )
        biases = bias_pieces(self.model, placement, self.site)
        self.groups.create(placement.owner_sets())
        self.site_layouts = make_layouts(pieces, self.groups, self._fragments)
        self.site_biases = make_layouts(biases, self.groups, self._fragments)
        self.members = Members(self)
        """What takes part, which must stay the same."""
        self.layouts, self.bias_layouts = self.site_layouts, self.site_biases
        self.lane: Lane | None = None
        if self.ranks.size > 1:
            turns = wire.owner_sets(placement)
            self.lane = Lane(
                self.site_layouts, self.site_biases, self.ranks, self.options.bucket_bytes, turns
            )
            self.layouts, self.bias_layouts = self.lane.of_parameters, self.lane.of_biases
        self.anchors: list[Tensor] = []
        self.momenta: list[Tensor] = []
        options = self.options
        self.feedback = [
            Feedback(layout, self.codec, options.bucket_bytes, options.error_feedback)
            for layout in self.layouts
        ]

    def _fill_anchor(self) -> None:
        """The anchor is what the parameters are; the momentum is zero. "ddp" has neither."""
        if self.rule.name == "ddp":
            return
        with self.held():
            for layout in self.layouts:
                device = layout.pieces[0].tensor.device
                anchor = torch.empty(layout.numel, dtype=torch.float32, device=device)
                for piece, place in layout.slices():
                    anchor[place].copy_(piece.values())
                self.anchors.append(anchor)
                if self.rule.momentum:
                    self.momenta.append(torch.zeros_like(anchor))

    @contextmanager
    def held(self, *, wanted: bool = True) -> Iterator[None]:
        """Inside, the pieces have the values of the parameters, also with several ranks."""
        fragments = self.lane.fragments if self.lane is not None and wanted else []
        for fragment in fragments:
            self.lane.hold(fragment)  # type: ignore[union-attr]
        try:
            yield
        finally:
            for fragment in fragments:
                self.lane.release(fragment)  # type: ignore[union-attr]

    # --------------------------------------------------------------------------------- meetings

    @contextmanager
    def meeting(self, what: str) -> Iterator[None]:
        """Measures a meeting, and makes a failure in it final."""
        if self._broken:
            raise MeetingError(f"this OuterSync cannot go on: {self._broken}; resume a checkpoint")
        start = time.perf_counter()
        try:
            yield
        except MeetingError:
            raise
        except RuntimeError as error:
            if self.options.staged:
                text = f"{what} after round {self.round} broke off at site {self.site}: {error}"
                raise MeetingLost(text) from error
            missing = self.groups.missing_sites()
            self._broken = (
                f"{what} after round {self.round} broke off at site {self.site}: "
                f"{missing + ': ' if missing else ''}{error}"
            )
            raise MeetingError(self._broken) from error
        finally:
            self.round_seconds += time.perf_counter() - start

    def sent(self, count: int) -> None:
        """Counts bytes that were sent."""
        self.bytes_sent += count
        self.round_bytes += count

    def after_step(self) -> None:
        """May be called after every local step; must be, where no optimizer of torch.optim's kind
        takes it, with fragments, overlap, expert_mean "tokens" or expert_turns in the order of
        tokens.

        Counts the tokens routed to each expert; sends and takes in the fragments that are due.
        Raises MeetingError as `step`, and where `step` was not called at the end of a round.
        """
        self.watch.asked()

    def meet_parts(self) -> None:
        """Takes in and sends off the fragments that are due after a local step."""
        with self.meeting("a fragment's meeting"):
            self._land(self.steps)
            self._meet_where_due(last=False)

    def count_round(self) -> None:
        """A round is over."""
        self.round += 1
        self.watch.round_over()

    def _meet_where_due(self, last: bool) -> None:
        """Meetings of this step: the last of a round are `step`'s."""
        assert self.options.local_steps is not None
        steps = wire.fragment_steps(self.options.fragments, self.options.local_steps)
        here = self.steps % self.options.local_steps or self.options.local_steps
        if (here == self.options.local_steps) != last:
            return
        for fragment, due in enumerate(steps):
            if due == here:
                self._meet(fragment)

    def _meet(self, fragment: int) -> None:
        """Sends a fragment off and, without overlap, takes it in."""
        # What has just landed is still being compared; to wait for that is to wait for all sites.
        self._look_at_checks(before=self.steps)
        options = self.options
        begun = time.perf_counter()
        meeting = Meeting(self, fragment)
        if self.lane is not None:
            self.lane.hold(fragment)
        problem = meeting.problem()
        if not options.overlap:
            self.sent(meeting.announce(problem))
            jobs = meeting.jobs()
            meeting.forget_tokens()
            self.sent(run_jobs(jobs, options.bucket_bytes, options.in_flight))
            compared = meeting.agreement()
            compared.exchange()
            self._settle(compared)
            meeting.give_back()
            self._round_exchange_s += time.perf_counter() - begun
            return
        buckets = [] if problem else buckets_of(meeting.jobs(), options.bucket_bytes)
        for bucket in buckets:
            bucket.encode()
        if self.lane is not None:
            self.lane.release(fragment)
        meeting.forget_tokens()

        def fly(flight: Flight) -> None:
            flight.bytes_sent += meeting.announce(problem)
            flight.bytes_sent += exchange(buckets, options.in_flight, encode=False, apply=False)

        flight = Flight(fragment, self.steps + options.overlap, buckets)
        flight.start(self._background, fly)
        self._flights.append(flight)
        self._meetings[fragment] = meeting

    def _land(self, step: int | None) -> None:
        """Takes in the fragments that are due at a step, or all of them."""
        while self._flights and (step is None or self._flights[0].due <= step):
            flight = self._flights.pop(0)
            assert flight.arrived is not None
            try:
                flight.arrived.result()
            except MeetingError as error:
                # What has been encoded is not sent again.
                self._broken = str(error)
                raise
            finally:
                self.sent(flight.bytes_sent)
                self._round_exchange_s += flight.exchange_s
            if self.lane is not None:
                self.lane.hold(flight.fragment)
            for bucket in flight.buckets:
                bucket.apply()
            if self.lane is not None:
                self.lane.give_back(flight.fragment)
            compared = self._meetings.pop(flight.fragment).agreement()
            done = self._background.submit(compared.exchange)
            self._checks.append(_Check(self.steps, compared, done))

    def _look_at_checks(self, before: int | None = None) -> None:
        """Settles what is compared in the background: what landed before a step, or all of it.

        At the same steps at all sites: what heals is an exchange too.
        """
        while self._checks and (before is None or self._checks[0].step < before):
            check = self._checks.pop(0)
            check.done.result()
            self._settle(check.compared)

    def _settle(self, compared: Agreement) -> None:
        """Stops, or mends, where holders differ. All of a group do the same."""
        try:
            if compared.differs and self.options.on_mismatch == "heal":
                mend = self._background.submit(compared.heal)  # after what is under way
                self._healed += mend.result()
            compared.require()
            self.agreements += 1
        except MeetingError as error:
            self._broken = str(error)
            raise
        finally:
            self.sent(compared.bytes_sent)

    @torch.no_grad()
    def step(self, tokens: float | None = None) -> RoundReport:
        """The meeting at the end of a round, after the local steps; parameters change in place.

        `tokens`: with site_mean "tokens", how many this rank has trained on since the last meeting;
        else of no matter. Raises ValueError where it is missing or negative, and MeetingError on
        all sites, with nothing sent or changed, when a parameter or moment is NaN or infinite (with
        `clip_delta`: at every site), a moment is missing, or a site is in another round; with the
        model in an undefined state, naming the site, when one is lost; and naming the tensors when
        holders do not end with the same bits.
        """
        if self.options.site_mean == "tokens":
            if tokens is None or not 0 <= tokens < math.inf:
                raise ValueError(f"tokens must be >= 0 with site_mean = tokens, got {tokens}")
            self.trained = float(tokens)
        self.watch.catch_up()
        with self.meeting("the meeting"):
            if self.options.staggered:
                assert self.options.local_steps is not None
                steps, since = self.options.local_steps, self.watch.since
                if since != steps:
                    raise MeetingError(
                        f"step is due every local_steps = {steps} steps, after_step was called (or "
                        f"a step seen) {since} times since the last"
                    )
                self._meet_where_due(last=True)
            elif self.options.staged:
                due = wire.moments_due(self.round + 1, self.options.moment_periods)
                begun = time.perf_counter()
                staged.meet(self)
                self._round_exchange_s += time.perf_counter() - begun
                return self._settled(due)
            else:
                self._meet(0)
                if self.copies is not None and stale.is_due(self.round + 1, self.copies.period):
                    self._refresh(self.copies)
            due = wire.moments_due(self.round + 1, self.options.moment_periods)
            self.count_round()
        return self.report(sum(due) if self.rule.name == "local-adamw" else 0)

    def _settled(self, due: Sequence[bool]) -> RoundReport:
        """The report of a staged meeting that was applied, after its comparison."""
        applied, self.compared = self.compared, None
        assert applied is not None
        with suppress(MeetingLost), self.meeting("the comparison"):  # the next meeting will tell
            compared = applied.agreement()
            compared.exchange()
            self._settle(compared)
        return self.report(sum(due) if self.rule.name == "local-adamw" else 0)

    def settle(self, apply: bool) -> RoundReport | None:
        """After MeetingLost: applies the pending meeting, or takes it back (`staged.settle`).

        Returns the report of a meeting that was applied now. To be applied where any site has
        applied it: then all have got everything.
        """
        due = wire.moments_due(self.round + 1, self.options.moment_periods)
        found = staged.settle(self, apply)
        self.compared = None
        if not (found and apply):
            return None
        return self.report(sum(due) if self.rule.name == "local-adamw" else 0)

    def _refresh(self, copies: StaleCopies) -> None:
        begun = time.perf_counter()
        self.sent(copies.refresh())
        self._round_exchange_s += time.perf_counter() - begun

    @torch.no_grad()
    def refresh_copies(self) -> None:
        """Makes frozen copies of absent experts those of their holders now; a collective.

        `step` does so. Call it after weights were loaded: copies are in no state dict. Raises
        MeetingError as `step`.
        """
        with self.meeting("the refresh of copies"):
            if self.copies is not None:
                self._refresh(self.copies)

    def report(self, moments: int) -> RoundReport:
        """What has come together since the last report, which begins anew."""
        report = RoundReport(
            self.round,
            self.round_bytes,
            self.round_seconds,
            moments,
            self._round_exchange_s,
            tuple(self._healed),
            self.treatment,
        )
        self.treatment = UNTREATED
        self.round_bytes, self.round_seconds, self._round_exchange_s = 0, 0.0, 0.0
        self._healed = []
        return report

    @torch.no_grad()
    def finish(self) -> RoundReport:
        """Takes in all fragments that are under way, whenever they were due; a collective.

        Returns what came together since the last report. Raises MeetingError as `step`.
        """
        self.take_in()
        return self.report(0)

    @property
    def under_way(self) -> bool:
        """Whether a fragment is under way, or due: `finish` must be called."""
        waiting = self.options.staggered and self.watch.waiting
        return bool(self._flights or self._checks or waiting)

    def take_in(self) -> None:
        """Takes in all fragments that are under way; a collective."""
        self.watch.catch_up()
        with self.meeting("the last meeting"):
            self._land(None)
            self._look_at_checks()

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Before an optimizer step, with "ddp": every gradient becomes the mean over its sites.

        A parameter without a gradient counts as one of zeros. Raises RuntimeError for another
        outer optimizer, MeetingError on all sites, with nothing sent or changed, when a gradient
        is NaN or infinite.
        """
        gradients.reduce_gradients(self)

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> float:
        """Scales gradients so that their norm is at most `max_norm`; returns the norm before.

        With "ddp", after `reduce_gradients`, it is the norm over the whole model, every expert
        counted once, and the same for all sites (each holds other experts, and scaling by norms of
        their own would drive them apart); a collective. Else it is this site's own norm and no
        other site is asked. Raises ValueError unless max_norm > 0.
        """
        return gradients.clip_grad_norm(self, max_norm)

    def reshuffle(
        self,
        new: Placement,
        *,
        warmup_steps: int = 0,
        moments: Literal["reset", "carry"] = "reset",
    ) -> ReshuffleReport:
        """Brings a new placement into force: experts move, right after a `step`.

        A moved expert comes from a holder, with its outer momentum (and router row and selection
        bias with router_scope "resident"). Its error feedback starts from zero, and so does with
        `moments` "reset" its inner optimizer state; with "carry" the sender's AdamW moments come
        along in fp32. (The optimizer counts steps per tensor, not per expert: that stays.) Its
        learning rate rises over `warmup_steps` steps (`ArrivalWarmup`), which moments that came
        along do not need. Gradients of experts are dropped; fragments under way are taken in
        before. Raises ValueError, with nothing changed, for a placement of other sizes, without
        `inner_optimizer` ("carry": AdamW), or for warmup_steps < 0; MeetingError when sites differ
        in `new` or `moments`, when there are no moments yet to carry, or a site is lost.
        """
        from fomoe_ext.outer.reshuffle import reshuffle

        return reshuffle(self, new, warmup_steps, moments)

    # -------------------------------------------------------------------------------- questions

    def elements(self) -> tuple[wire.GroupElements, ...]:
        """Elements this site shares with each owner group, by fragment; of all its ranks."""
        result = [wire.GroupElements({}, {}) for _ in range(self.options.fragments)]
        for layout in self.site_layouts:
            result[layout.fragment].parameters[layout.group.owners] = layout.numel
        for layout in self.site_biases:
            result[layout.fragment].biases[layout.group.owners] = layout.numel
        if self.options.expert_turns > 1:  # and one fragment
            of = {la.group.owners: turns.group_experts(la.pieces) for la in self.site_layouts}
            result = [result[0]._replace(experts=of)]
        return tuple(result)

    def predicted_bytes(self, local_steps: int = 1, clip: bool = False) -> int:
        """Bytes that this site, all its ranks, will send in the coming round (`wire.round_bytes`).

        `local_steps` and `clip` say how often "ddp" will reduce and whether it clips. With overlap
        they are counted when they arrive, part of them in the round after.
        """
        options, round_index = self.options, self.round + 1
        copied = 0 if self.copies is None else self.copies.predicted_bytes(round_index)
        return copied + wire.round_bytes(
            self.elements(),
            self.placement.num_sites,
            optimizer=self.rule.name,
            codec=self.codec.name,
            bucket_bytes=options.bucket_bytes,
            local_steps=local_steps,
            clip=clip,
            round_index=round_index,
            moment_periods=options.moment_periods,
            moment_codecs=options.codecs_of_moments,
            counted_experts=self.tokens.numel() if options.counts_tokens else 0,
            numbers=options.site_numbers,
            staged=options.staged,
            expert_turns=options.expert_turns,
        )

    def state_bytes(self) -> tuple[int, int, int]:
        """Bytes of anchor, of outer momentum and of error feedback in this process."""
        return (
            sum(a.nbytes for a in self.anchors),
            sum(m.nbytes for m in self.momenta),
            sum(f.nbytes for f in self.feedback),
        )

    @torch.no_grad()
    def copy_anchor_to_model(self) -> None:
        """Sets the parameters to the anchor, i.e. drops all local steps since the last `step`."""
        if self.lane is not None and self.anchors:
            for fragment in self.lane.fragments:
                self.lane.push(fragment, self.lane.numbered(self.anchors), lambda p: p)
            return
        for layout, anchor in zip(self.layouts, self.anchors, strict=False):
            for piece, place in layout.slices():
                piece.values().copy_(anchor[place])

    # --------------------------------------------------------------------------------- resuming

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of this site: tensors (not copied), numbers and strings only.

        Call `finish` before: raises RuntimeError while a fragment is under way.
        """
        from fomoe_ext.outer.state import state_dict

        if self.under_way:
            raise RuntimeError("call finish before state_dict: a fragment is under way")
        self.watch.catch_up()
        return state_dict(self)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`; the model's parameters are not touched.

        Raises ValueError, with nothing changed, for a state of another optimizer, placement (make
        the OuterSync with `Placement.from_dict(state["placement"])`), model, outer momentum, codec
        or fragments.
        """
        from fomoe_ext.outer.state import load_state_dict

        load_state_dict(self, state)
