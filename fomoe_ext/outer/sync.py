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
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fomoe_ext.layer.mesh import SiteRanks
from fomoe_ext.outer import beginning, reshuffle, turns
from fomoe_ext.outer import optimizer as opt
from fomoe_ext.outer.driver import Driver, Pending
from fomoe_ext.outer.flight import InFlight
from fomoe_ext.outer.gradients import Gradients
from fomoe_ext.outer.groups import SiteGroups
from fomoe_ext.outer.jobs import Feedback
from fomoe_ext.outer.layout import Fragments, Layout, check_model, parameter_pieces
from fomoe_ext.outer.log import MeetingLog
from fomoe_ext.outer.model_layout import ModelLayout
from fomoe_ext.outer.options import OuterOptions
from fomoe_ext.outer.reports import ReshuffleReport, RoundReport
from fomoe_ext.outer.routed import TokenCounts
from fomoe_ext.outer.site import Site, connect
from fomoe_ext.outer.staged import Staged
from fomoe_ext.outer.stale import StaleCopies, check_stale, wanted_by_all
from fomoe_ext.outer.state import OuterState
from fomoe_ext.outer.state_dict import Resumable
from fomoe_ext.outer.step_count import StepCount
from fomoe_ext.outer.steps import StepWatch
from fomoe_ext.outer.warmup import ArrivalWarmup
from fomoe_ext.placement.placement import Placement
from fomoe_ext.placement.stale import Wanted

_T = TypeVar("_T")


class _Of(Generic[_T]):
    """What one of OuterSync's parts keeps, read (and a number set) at OuterSync as well."""

    def __init__(self, part: str, name: str) -> None:
        self._part, self._name = part, name

    def __get__(self, sync: OuterSync | None, owner: type[OuterSync]) -> _T:
        if sync is None:
            return self  # type: ignore[return-value]
        found: _T = getattr(getattr(sync, self._part), self._name)
        return found

    def __set__(self, sync: OuterSync, value: _T) -> None:
        setattr(getattr(sync, self._part), self._name, value)


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

    Its parts, each of which keeps what it is named for: layout (`ModelLayout`: what travels with
    whom), state (`OuterState`: anchor, momentum, error feedback), counts (`TokenCounts`), log
    (`MeetingLog`: rounds and bytes), copies (`StaleCopies`, or None), watch (`StepWatch`: sees the
    steps of optimizers), warmup (`ArrivalWarmup`, with an inner_optimizer).
    """

    round: _Of[int] = _Of("log", "round")
    """Rounds completed."""
    bytes_sent: _Of[int] = _Of("log", "bytes_sent")
    """Bytes this site has sent in all meetings and reshuffles."""
    lost_bytes: _Of[int] = _Of("log", "lost_bytes")
    """With `staged`: bytes sent in meetings that broke off."""
    agreements: _Of[int] = _Of("log", "agreements")
    """Meetings after which all holders were found to hold the same bits."""
    steps: _Of[int] = _Of("_steps", "taken")
    """Local steps taken, as far as they were seen or `after_step` was called."""
    reductions: _Of[int] = _Of("_steps", "reductions")
    """How often gradients were reduced."""
    tokens: _Of[Tensor] = _Of("counts", "tokens")
    """Tokens routed to each expert [L, E] since its last meeting, where they are counted."""
    placement: _Of[Placement] = _Of("layout", "placement")
    layouts: _Of[list[Layout]] = _Of("layout", "layouts")
    anchors: _Of[list[Tensor]] = _Of("state", "anchors")
    momenta: _Of[list[Tensor]] = _Of("state", "momenta")
    feedback: _Of[list[Feedback]] = _Of("state", "feedback")
    pending: _Of[Pending | None] = _Of("_driver", "pending")
    """With `staged`: a meeting that is neither applied nor taken back."""
    under_way: _Of[bool] = _Of("watch", "under_way")
    """Whether a fragment is under way, or due: `finish` must be called."""

    def __init__(
        self,
        model: nn.Module,
        placement: Placement,
        site: int,
        options: OuterOptions | None = None,
        *,
        inner_optimizer: torch.optim.Optimizer | None = None,
        groups: SiteGroups | None = None,
        timeout_s: float | None = None,
        mesh: DeviceMesh | None = None,
        arriving: bool = False,
    ) -> None:
        """Meets the other sites; all must call it with the same options and placement.

        Args:
            model: its `MoELayer`s, in order of appearance, hold the placement's experts of `site`.
            placement, site: who holds what, and which site this is (its rank).
            options: how sites meet; None = `OuterOptions()`.
            inner_optimizer: that of the local steps; "local-adamw" and `reshuffle` need it.
            groups: connections to be shared with another OuterSync; None = new ones.
            timeout_s: seconds after which an exchange over new connections fails; None =
                `options.timeout_s`.
            mesh: of sites of several ranks (`mesh.make_mesh`), that of the model's layers.
            arriving: of a job under way: nothing is compared, and all state is left to be filled
                (`fomoe_ext.outer.belongings`); only connections are made.

        Raises ValueError or TypeError naming the argument, RuntimeError when torch.distributed is
        not ready, and MeetingError when sites differ in arguments or initial parameters.
        """
        self.options = OuterOptions() if options is None else options
        if not isinstance(self.options, OuterOptions):
            raise TypeError(f"options must be OuterOptions, got {type(options).__name__}")
        self.ranks, self.site = SiteRanks(mesh, placement.num_sites, site), site
        timeout_s = self.options.timeout_s if timeout_s is None else timeout_s
        self.groups = connect(groups, self.ranks, timeout_s)
        self.model, self.inner_optimizer = model, inner_optimizer
        problem: Exception | None = None
        try:
            me = Site(model, inner_optimizer, self.ranks, self.groups, self.options)
            fragments = _check(me, placement)
        except (ValueError, TypeError) as error:
            problem = error
        if not arriving:
            arguments = {} if problem else beginning.arguments_of(me, placement)
            beginning.agree_on_arguments(self.ranks, arguments, problem)
        elif problem is not None:
            raise problem
        self._assemble(me, placement, fragments, () if arriving else wanted_by_all(me))
        if not arriving:
            self.state.fill()
            self.verify()

    def _assemble(
        self, me: Site, placement: Placement, fragments: Fragments, copied: Wanted
    ) -> None:
        """Makes the parts. `copied`: the frozen copies that all sites keep."""
        self.rule, self.codec, self.moe_layers = me.rule, me.codec, me.moe_layers
        self.log, self.counts = MeetingLog(me), TokenCounts(me.moe_layers)
        self._steps = StepCount(me.options.local_steps if me.options.staggered else None)
        self.warmup: ArrivalWarmup | None = None
        if me.inner_optimizer is not None:
            self.warmup = ArrivalWarmup(me.inner_optimizer, me.moe_layers)
        self.copies: StaleCopies | None = None
        if any(experts for layer in copied for experts in layer):
            self.copies = StaleCopies(me, placement, self.log, copied)
        self.layout = ModelLayout(me, fragments, placement, copied)
        self.state = OuterState(self.layout)
        self._gradients = Gradients(self.state, self._steps, self.log)
        drive = InFlight if me.options.overlap else Staged if me.options.staged else Driver
        self._driver = drive(self.state, self.counts, self._steps, self.log, self.copies)
        self.watch = StepWatch(self.state, self._steps, self.counts, self._gradients, self._driver)
        self._resumable = Resumable(self.state, self.counts, self._steps, self.log, self.warmup)

    def close(self) -> None:
        """Steps of optimizers are of no more concern, for a model that trains on without meetings.
        A later OuterSync of the same model closes this one."""
        self.watch.close()

    def disconnect(self) -> None:
        """Whatever still refers to this is not to keep its connections, or be the last to."""
        del self.groups
        self.layout.disconnect()

    # ----------------------------------------------------------------------------------- meetings

    def meeting(self, what: str) -> AbstractContextManager[None]:
        """Measures a meeting, and makes a failure in it final."""
        return self.log.meeting(what)

    def sent(self, count: int) -> None:
        """Counts bytes that were sent."""
        self.log.sent(count)

    def after_step(self) -> None:
        """May be called after every local step; must be, where no optimizer of torch.optim's kind
        takes it, with fragments, overlap, expert_mean "tokens" or expert_turns in the order of
        tokens.

        Counts the tokens routed to each expert; sends and takes in the fragments that are due.
        Raises MeetingError as `step`, and where `step` was not called at the end of a round.
        """
        self.watch.asked()

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
            self.counts.trained = float(tokens)
        self.watch.catch_up()
        with self.meeting("the meeting"):
            self._driver.hold_round()
        self._driver.compare()
        return self.log.report_round()

    def settle(self, apply: bool) -> RoundReport | None:
        """After MeetingLost: applies the pending meeting, or takes it back (`staged`).

        Returns the report of a meeting that was applied now. To be applied where any site has
        applied it: then all have got everything. Raises ValueError where not all has arrived here.
        """
        return self.log.report_round() if self._driver.settle(apply) and apply else None

    @torch.no_grad()
    def refresh_copies(self) -> None:
        """Makes frozen copies of absent experts those of their holders now; a collective.

        `step` does so. Call it after weights were loaded: copies are in no state dict. Raises
        MeetingError as `step`.
        """
        with self.meeting("the refresh of copies"):
            self._driver.refresh_copies()

    @torch.no_grad()
    def finish(self) -> RoundReport:
        """Takes in all fragments that are under way, whenever they were due; a collective.

        Returns what came together since the last report. Raises MeetingError as `step`.
        """
        self.watch.take_in()
        return self.log.report()

    def reduce_gradients(self) -> None:
        """Before an optimizer step, with "ddp": every gradient becomes the mean over its sites.

        A parameter without a gradient counts as one of zeros. Raises RuntimeError for another
        outer optimizer, MeetingError on all sites, with nothing sent or changed, when a gradient
        is NaN or infinite.
        """
        self._gradients.reduce()

    def clip_grad_norm(self, max_norm: float) -> float:
        """Scales gradients so that their norm is at most `max_norm`; returns the norm before.

        With "ddp", after `reduce_gradients`, it is the norm over the whole model, every expert
        counted once, and the same for all sites (each holds other experts, and scaling by norms of
        their own would drive them apart); a collective. Else it is this site's own norm and no
        other site is asked. Raises ValueError unless max_norm > 0.
        """
        return self._gradients.clip(max_norm)

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
        reshuffle.check(self.layout, new, warmup_steps, moments, self.copies is not None)
        assert self.warmup is not None
        self.watch.take_in()
        return reshuffle.reshuffle(
            self.state, self._steps, self.log, self.warmup, new, warmup_steps, moments
        )

    def hashes(self) -> dict[str, str]:
        """SHA-256 of what all its holders hold alike, by name of a fragment and owner set.

        With fragments, overlap or expert_turns that is the anchor, else the parameters.
        """
        return beginning.digests(self.state)

    def verify(self) -> None:
        """Raises MeetingError unless all owners hold the same bits. True after `step`."""
        beginning.verify(self.state, self.under_way)

    @torch.no_grad()
    def copy_anchor_to_model(self) -> None:
        """Sets the parameters to the anchor, i.e. drops all local steps since the last `step`."""
        self.state.copy_anchor_to_model()

    # ---------------------------------------------------------------------------------- questions

    def predicted_bytes(self, local_steps: int = 1, clip: bool = False) -> int:
        """Bytes that this site, all its ranks, will send in the coming round (`wire.round_bytes`).

        `local_steps` and `clip` say how often "ddp" will reduce and whether it clips. With overlap
        they are counted when they arrive, part of them in the round after.
        """
        round_index = self.round + 1
        copied = 0 if self.copies is None else self.copies.predicted_bytes(round_index)
        return copied + self.layout.predicted_bytes(round_index, local_steps, clip)

    def state_bytes(self) -> tuple[int, int, int]:
        """Bytes of anchor, of outer momentum and of error feedback in this process."""
        return self.state.nbytes

    # ----------------------------------------------------------------------------------- resuming

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of this site: tensors (not copied), numbers and strings only.

        Call `finish` before: raises RuntimeError while a fragment is under way.
        """
        if self.under_way:
            raise RuntimeError("call finish before state_dict: a fragment is under way")
        self.watch.catch_up()
        return self._resumable.state_dict()

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`; the model's parameters are not touched.

        Raises ValueError, with nothing changed, for a state of another optimizer, placement (make
        the OuterSync with `Placement.from_dict(state["placement"])`), model, outer momentum, codec
        or fragments.
        """
        self._resumable.load_state_dict(state)


def _check(me: Site, placement: Placement) -> Fragments:
    """Refuses a model, or an optimizer, that cannot meet so: ValueError or TypeError."""
    model, options, ranks = me.model, me.options, me.ranks
    if options.optimizer == "local-adamw":
        opt.check_adamw(me.inner_optimizer)
    check_model(model, placement, me.index, ranks.expert_ranks)
    opt.check_holds(me.inner_optimizer, model)
    check_stale(model, options, ranks.size)
    pieces = parameter_pieces(model, placement, me.index, options.router_mean)
    turns.check_experts(pieces, options, ranks.size)
    return Fragments(pieces, options.fragments)
