"""OuterSync: the meetings of the sites that train one model.

Dense parameters are averaged over all sites, each expert over the sites that hold it. With
router_scope "resident" a router row is averaged with its expert. With "global" every site has all
rows; each is averaged over the sites that hold its expert or a copy of it, because it gets a
gradient at no other site and a mean over all of them would shrink its delta. (router_mean "all"
averages over all sites regardless.) `fomoe_ext.outer.optimizer` says what is averaged and what is
done with the mean. Frozen copies of absent experts (`MoELayer`'s stale_experts) are refreshed at
the end of a meeting.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fomoe_ext.checks import an_instance, an_int
from fomoe_ext.layer.mesh import SiteRanks
from fomoe_ext.outer import beginning, reshuffle, turns
from fomoe_ext.outer import optimizer as opt
from fomoe_ext.outer.driver import Driver, Pending
from fomoe_ext.outer.flight import InFlight
from fomoe_ext.outer.gradients import Gradients
from fomoe_ext.outer.groups import SiteGroups
from fomoe_ext.outer.layout import Fragments, check_model, parameter_pieces
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


# Long: the methods are short, their docstrings are what users read.
class OuterSync:
    """Keeps the models of all sites one model: sites meet and average what they have learned.

    Every site makes an OuterSync with the same options and calls `step` after the local steps of
    each round. The training loop needs nothing else, as hooks see the steps of optimizers:

        with OuterSync(model, placement, site, OuterOptions(codec="int8")) as sync:
            for index, batch in enumerate(batches, start=1):
                loss(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
                if index % 16 == 0:
                    sync.step()

    After `step` all sites hold the same bits of the dense parameters, and the holders of an expert
    the same bits of it, which is verified with hashes. (With fragments, overlap or expert_turns
    that holds for the anchor: the fp32 values that the sites agreed on last.) Methods are
    collective, i.e. all sites must call them in the same order, unless they say otherwise.

    With optimizer "ddp" gradients are averaged before every optimizer step, over the same sites as
    the parameters; `step` then only removes rounding differences. Clip gradients with
    `clip_grad_norm_`, as torch's function would clip them before they are averaged.

    With `fragments` or `overlap` parts of the model meet during the round. Then call `finish`
    before the model is used for anything but local steps; leaving the `with` block does so too.
    Optimizers that are not based on torch.optim.Optimizer have no hooks: call `after_step` after
    each of their steps.

    A meeting refuses, by name, a parameter that was frozen, unfrozen, replaced, added or removed
    since the OuterSync was made. Make a new one after such a change; it takes over from this one.

    Memory at a site: an fp32 anchor of the parameters it holds (not with "ddp"); with outer
    momentum the same again; with a lossy codec and error_feedback the same again, and a share of
    the sums.

    Attributes: options, placement, site, model and inner_optimizer as given; groups (connections,
    which another OuterSync may share; until `close`). The parts, for checkpoints and recovery:
    layout (`ModelLayout`), state (`OuterState`: anchor, momentum, error feedback), counts
    (`TokenCounts`), step_count (`StepCount`), log (`MeetingLog`), copies (`StaleCopies`, or None),
    warmup (`ArrivalWarmup`, with an inner_optimizer), watch (`StepWatch`), overlap (`OverlapTimes`:
    the steps of overlap in force, and with "auto" the reason why so many).
    """

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
        """Connects to the other sites and compares arguments and initial parameters; a collective.

        Args:
            model: its `MoELayer`s, in order of appearance, hold the placement's experts of `site`.
            placement, site: which site holds which expert, and the number of this site (its rank
                in torch.distributed).
            options: how sites meet; None = `OuterOptions()`.
            inner_optimizer: the optimizer of the local steps; required by "local-adamw" and
                `reshuffle`.
            groups: connections of another OuterSync; None = new ones, which `close` frees.
            timeout_s: seconds after which an exchange over new connections fails; None =
                `options.timeout_s`.
            mesh: for sites of several ranks the mesh of the model's layers (`make_mesh`).
            arriving: the site joins a running job: nothing is compared, and the caller fills the
                state (`fomoe_ext.outer.belongings`).

        Raises ValueError or TypeError naming the argument, RuntimeError when torch.distributed is
        not initialised, and MeetingError when sites differ in arguments or initial parameters.
        """
        self.options = OuterOptions() if options is None else options
        _check_types(model, placement, site, self.options, groups)
        self.ranks, self.site = SiteRanks(mesh, placement.num_sites, site), site
        timeout_s = self.options.timeout_s if timeout_s is None else timeout_s
        self.groups = connect(groups, self.ranks, timeout_s)
        self._own_groups = None if groups is not None else self.groups
        self.model, self.inner_optimizer = model, inner_optimizer
        problem: Exception | None = None
        try:
            me = Site(model, inner_optimizer, self.ranks, self.groups, self.options)
            fragments = _check(me, placement)
            me.options = self.options = self.options.with_buckets_for(model)
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
        self.log, self.counts = MeetingLog(me), TokenCounts(me.moe_layers)
        self.step_count = StepCount(me.options.local_steps if me.options.staggered else None)
        self.warmup: ArrivalWarmup | None = None
        if me.inner_optimizer is not None:
            self.warmup = ArrivalWarmup(me.inner_optimizer, me.moe_layers)
        self.copies: StaleCopies | None = None
        if any(experts for layer in copied for experts in layer):
            self.copies = StaleCopies(me, placement, self.log, copied)
        self.layout = ModelLayout(me, fragments, placement, copied)
        self.state = OuterState(self.layout)
        steps = self.step_count
        self._gradients = Gradients(self.state, steps, self.log)
        drive = InFlight if me.options.overlap else Staged if me.options.staged else Driver
        self._driver = drive(self.state, self.counts, steps, self.log, self.copies)
        self.watch = StepWatch(self.state, steps, self.counts, self._gradients, self._driver)
        self.overlap = self._driver.times
        self._resumable = Resumable(
            self.state, self.counts, steps, self.log, self.warmup, self.overlap
        )

    # ---------------------------------------------------------------------------------- its end

    def close(self) -> None:
        """Frees what this object made: hooks, its thread, connections unless they were given.

        No collective. The model can then train on without meetings; methods that meet, and those
        that read or write what sites have in common, raise MeetingError. Warns of parts of the
        model that are on their way and were not taken in with `finish`, and waits for their
        exchanges. May be called twice.
        """
        self._close(wait=True)

    def _close(self, wait: bool) -> None:
        """`wait`: until exchanges that are under way have ended."""
        self.watch.close()
        if self.log.closed:
            return
        self.log.closed = True
        self._driver.close(wait)
        del self.groups
        self.layout.disconnect()
        if self._own_groups is not None:
            self._own_groups.close(wait)

    def __enter__(self) -> OuterSync:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """`finish`, where anything is under way, and `close`. After an exception only `close`,
        which then waits for nothing: other sites may never answer."""
        try:
            if kind is None and not self.log.closed and self.under_way:
                self.finish()
        except BaseException:
            self._close(wait=False)
            raise
        self._close(wait=kind is None)

    # ----------------------------------------------------------------------------------- meetings

    def after_step(self) -> None:
        """Counts a local step; no collective unless part of the model is due.

        Needed only after steps that hooks cannot see (of an optimizer that is not based on
        torch.optim.Optimizer), with fragments, overlap, expert_mean "tokens" or expert_turns in an
        order by tokens. Harmless otherwise. Counts the tokens routed to each expert; sends and
        takes in the fragments that are due. Raises MeetingError as `step`, and where `step` was
        not called at the end of a round.
        """
        self.watch.asked()

    @torch.no_grad()
    def step(self, tokens: float | None = None) -> RoundReport:
        """The meeting at the end of a round; changes the parameters in place.

        `tokens`: required with site_mean "tokens", the number of tokens that this rank has trained
        on since the last meeting; otherwise ignored.

        Raises ValueError when `tokens` is missing or negative. Raises MeetingError

        * at all sites, with nothing sent or changed, when a parameter or moment is NaN or infinite
          (with `clip_delta`: at every site), a moment is missing, or a site is in another round;
        * naming the site, with the model in an undefined state, when one is lost (with `staged`:
          MeetingLost, with nothing changed);
        * naming the tensors, when holders do not end with the same bits.
        """
        if self.options.site_mean == "tokens":
            if tokens is None or not 0 <= tokens < math.inf:
                raise ValueError(f"tokens must be >= 0 with site_mean = tokens, got {tokens}")
            self.counts.trained = float(tokens)
        self.watch.catch_up()
        with self.log.meeting("the meeting"):
            self._driver.hold_round()
        self._driver.compare()
        return self.log.report_round()

    def end_pending(self, commit: bool) -> RoundReport | None:
        """After MeetingLost: commits the pending meeting, or rolls it back; no collective.

        Commit where any site has committed: then everything has arrived at all of them. Returns
        the report of a meeting that was committed now. Raises ValueError where part of it has not
        arrived here.
        """
        ended = self._driver.end_pending(commit)
        return self.log.report_round() if ended and commit else None

    @torch.no_grad()
    def refresh_copies(self) -> None:
        """Overwrites the frozen copies of absent experts with the values of their holders.

        `step` does so in its turn. Call it after loading weights, as copies are in no state dict.
        Raises MeetingError as `step`.
        """
        with self.log.meeting("the refresh of copies"):
            self._driver.refresh_copies()

    @torch.no_grad()
    def finish(self) -> RoundReport:
        """Takes in all fragments that are under way, even if they are due later.

        The report counts what happened since the last one. Raises MeetingError as `step`.
        """
        self.watch.take_in()
        return self.log.report()

    def reduce_gradients(self) -> None:
        """With "ddp", before an optimizer step: replaces every gradient by its mean over the sites.

        Only needed where gradients are used before the step; the step does it otherwise. A missing
        gradient counts as zeros. Raises RuntimeError for another outer optimizer, and MeetingError
        at all sites, with nothing sent or changed, when a gradient is NaN or infinite.
        """
        self._gradients.reduce()

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scales gradients in place so that their norm is at most `max_norm`, as
        `torch.nn.utils.clip_grad_norm_` does; returns the norm before, a 0-dim tensor.

        With "ddp" the norm is that of the averaged gradients of the whole model, each expert
        counted once, and equal at all sites (norms of their own would scale them differently); a
        collective, which averages the gradients first where that was not done. Otherwise it is the
        norm of this site's gradients, and only the ranks of the site take part. Raises ValueError
        unless max_norm > 0.
        """
        return self._gradients.clip(max_norm)

    def reshuffle(
        self,
        new: Placement,
        *,
        warmup_steps: int = 0,
        moments: Literal["reset", "carry"] = "reset",
    ) -> ReshuffleReport:
        """Moves experts to the sites where the placement `new` has them. Call it after a `step`.

        A site receives an expert from one of its holders, with the expert's outer momentum (with
        router_scope "resident" also its router row and selection bias). Its error feedback starts
        from zero. So do its moments in the inner optimizer with `moments` "reset"; with "carry"
        AdamW's moments are sent along in fp32. (The optimizer's step count is per tensor and
        stays.) The learning rate of a moved expert rises over `warmup_steps` steps
        (`ArrivalWarmup`); with "carry" 0 will do. Gradients of experts are dropped; fragments
        under way are taken in before.

        Raises ValueError, with nothing changed, for a placement of other sizes, without
        `inner_optimizer` ("carry": AdamW), or for warmup_steps < 0; MeetingError when sites differ
        in `new` or `moments`, when there are no moments yet to carry, or when a site is lost.
        """
        reshuffle.check(self.layout, new, warmup_steps, moments, self.copies is not None)
        assert self.warmup is not None
        self.watch.take_in()
        return reshuffle.reshuffle(
            self.state, self.step_count, self.log, self.warmup, new, warmup_steps, moments
        )

    def verify(self) -> None:
        """Raises MeetingError unless all holders have the same bits; they do after `step`. Also
        after `close`, when nothing can be compared."""
        self.log.require_open("verify has nothing to compare")
        beginning.verify(self.state, self.under_way)

    # ---------------------------------------------------------------- of this site: no collectives

    @property
    def round(self) -> int:
        """Rounds completed."""
        return self.log.round

    @property
    def steps(self) -> int:
        """Local steps taken."""
        return self.step_count.taken

    @property
    def bytes_sent(self) -> int:
        """Bytes this site has sent in all meetings and reshuffles."""
        return self.log.bytes_sent

    @property
    def agreements(self) -> int:
        """Meetings after which all holders were found to have the same bits."""
        return self.log.agreements

    @property
    def placement(self) -> Placement:
        """Which site holds which expert, after the last reshuffle."""
        return self.layout.placement

    @property
    def under_way(self) -> bool:
        """Whether a fragment is under way or due: `finish` must be called."""
        return self.watch.under_way

    @property
    def pending(self) -> Pending | None:
        """With `staged`: a meeting that is neither committed nor rolled back (`end_pending`)."""
        return self._driver.pending

    def hashes(self) -> dict[str, str]:
        """SHA-256 of what all holders have alike, by name of a fragment and owner set.

        With fragments, overlap or expert_turns of the anchor, otherwise of the parameters. All
        ranks of the site must call it. Raises MeetingError after `close`.
        """
        self.log.require_open("hashes has nothing to hash")
        return beginning.digests(self.state)

    @torch.no_grad()
    def copy_anchor_to_model(self) -> None:
        """Sets the parameters to the anchor, which drops all local steps since the last `step`. All
        ranks of the site must call it. Raises MeetingError after `close`."""
        self.log.require_open("copy_anchor_to_model has no anchor")
        self.state.copy_anchor_to_model()

    def predicted_bytes(self, local_steps: int = 1, clip: bool = False) -> int:
        """Bytes that this site, all its ranks, will send in the coming round (`wire.round_bytes`).

        `local_steps` and `clip`: how often "ddp" will average gradients, and whether it clips them.
        With overlap some of these bytes are counted in the next round, in which they arrive.
        """
        round_index = self.round + 1
        copied = 0 if self.copies is None else self.copies.predicted_bytes(round_index)
        return copied + self.layout.predicted_bytes(round_index, local_steps, clip)

    def state_bytes(self) -> tuple[int, int, int]:
        """Bytes of anchor, outer momentum and error feedback in this process."""
        return self.state.nbytes

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of this site: tensors (not copied), numbers and strings.

        Raises RuntimeError while a fragment is under way (call `finish` before), or when closed.
        """
        if self.log.closed:
            raise RuntimeError("call state_dict before close: this OuterSync is closed")
        if self.under_way:
            raise RuntimeError("call finish before state_dict: a fragment is under way")
        self.watch.catch_up()
        return self._resumable.state_dict()

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a `state_dict`; does not touch the model's parameters.

        Raises ValueError, with nothing changed, for a state of another optimizer, placement (make
        the OuterSync with `Placement.from_dict(state["placement"])`), model, outer momentum, codec
        or fragments.
        """
        self._resumable.load_state_dict(state)


def _check_types(
    model: Any, placement: Any, site: Any, options: Any, groups: SiteGroups | None
) -> None:
    """Raises TypeError, naming the argument of `OuterSync`, for one of another type."""
    an_instance(nn.Module, model=model)
    an_instance(Placement, placement=placement)
    an_int(site=site)
    if not isinstance(options, OuterOptions):
        raise TypeError(f"options must be OuterOptions, got {type(options).__name__}")
    if groups is not None:
        an_instance(SiteGroups, groups=groups)


def _check(me: Site, placement: Placement) -> Fragments:
    """Raises ValueError or TypeError for a model or an optimizer that cannot meet like this."""
    model, options, ranks = me.model, me.options, me.ranks
    if options.optimizer == "local-adamw":
        opt.check_adamw(me.inner_optimizer)
    check_model(model, placement, me.index, ranks.expert_ranks)
    opt.check_holds(me.inner_optimizer, model)
    check_stale(model, options, ranks.size)
    pieces = parameter_pieces(model, placement, me.index, options.router_mean)
    turns.check_experts(pieces, options, ranks.size)
    return Fragments(pieces, options.fragments)
