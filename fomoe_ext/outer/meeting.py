"""Meeting: one meeting of the sites for a fragment of the model, step by step.

    check      looks for problems at this site: values that are NaN or infinite, missing moments
    announce   all sites exchange their problems, and the numbers they need of each other
    encode     this site's values become payloads
    exchange   payloads are sent, summed, and sums are sent back (`fomoe_ext.outer.reduce`)
    apply      the outer step: changes anchor, parameters, moments and biases
    verify     all holders must have the same bits (`fomoe_ext.outer.agreement`)

`driver.Driver` takes these steps without interruption, bucket by bucket. `staged.Staged` applies
nothing before everything has arrived at all sites. `flight.InFlight` encodes first, announces and
exchanges during local steps, and applies and verifies after a later one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fomoe_ext.outer import optimizer as opt
from fomoe_ext.outer.agreement import Agreement, Held
from fomoe_ext.outer.announce import bad_tensor, meeting_name, require_good
from fomoe_ext.outer.averaging import Averaging, Treatment
from fomoe_ext.outer.census import Census
from fomoe_ext.outer.codec import Codec, get_codec
from fomoe_ext.outer.inner_state import reset_bad_state
from fomoe_ext.outer.jobs import DeltaJob, EqualiseJob, MeanJob, ShiftJob, random_seed
from fomoe_ext.outer.layout import Layout, Piece
from fomoe_ext.outer.reduce import Bucket, Job, buckets_of
from fomoe_ext.outer.routed import TokenCounts
from fomoe_ext.outer.state import OuterState
from fomoe_ext.outer.step_count import StepCount
from fomoe_ext.outer.turns import experts_of, keep_shares, layouts_of_turn
from fomoe_ext.placement import wire


class Meeting:
    """The meeting of one fragment of the model (with one fragment: of all of it)."""

    def __init__(
        self,
        state: OuterState,
        counts: TokenCounts,
        steps: StepCount,
        completed: int,
        fragment: int,
    ) -> None:
        """`completed`: rounds so far."""
        layout, site = state.layout, state.layout.site
        self._state, self._layout, self._site = state, layout, site
        self._counts, self._steps, self._completed = counts, steps, completed
        self.fragment = fragment
        due = wire.moments_due(completed + 1, site.options.moment_periods)
        names = zip(opt.MOMENTS, site.options.resolved_moment_codecs, due, strict=True)
        self._moments = {
            name: get_codec(codec, site.options.rounding)
            for name, codec, wanted in names
            if wanted and site.rule.name == "local-adamw"
        }
        self._indices = layout.indices(fragment)
        self._layouts = [layout.layouts[i] for i in self._indices]
        self._bias_layouts = [la for la in layout.bias_layouts if la.fragment == fragment]
        self._census = Census(site, counts, self._layouts)
        self._deltas: list[DeltaJob] = []
        self._means: list[MeanJob] = []
        self._biases: list[MeanJob] = []
        self._pulled: dict[str, dict[int, Tensor]] = {}
        """With several ranks: moments of this rank's pieces."""

    @property
    def treatment(self) -> Treatment:
        """What was done to the sites' deltas."""
        return self._census.treatment

    def tell_times(self, times: Sequence[float]) -> None:
        """With overlap "auto": what this site will tell of its times (`outer.overlap`)."""
        self._census.times = tuple(times)

    @property
    def told_times(self) -> list[list[float]]:
        """What all sites have told of theirs; empty with a given overlap."""
        return self._census.told_times

    # ----------------------------------------------------------------------------------- check

    def check(self) -> str:
        """The problem of this site, or an empty string. From here on the layout's pieces have
        values (`ModelLayout.hold`)."""
        site, clips = self._site, self._site.options.clip_delta > 0
        self._layout.hold(self.fragment)
        problem = self._layout.members.change()
        if site.rule.name == "ddp":
            problem = problem or self._steps.unreduced()
        problem = problem or self._uncounted()
        if problem and site.ranks.size == 1:
            return problem
        if clips:
            self._census.square = site.ranks.sum_(self._squared_norm())
        elif not problem:
            problem = bad_tensor(self._layouts, "the value", lambda piece: piece.tensor)
        return self._check_moments(problem) if self._moments else problem

    def _check_moments(self, problem: str) -> str:
        """`problem`, or one with the inner optimizer's moments."""
        site, lane, clips = self._site, self._layout.lane, self._site.options.clip_delta > 0
        assert site.inner_optimizer is not None
        trained = [(n, p) for n, p in site.model.named_parameters() if p.requires_grad]
        problem = problem or self._steps.other_optimizer(trained, site.inner_optimizer)
        missing = opt.missing_moments(site.inner_optimizer, trained)
        missing = site.ranks.first(missing)
        if missing:
            return (
                problem or f"inner_optimizer has no moments of {missing}: no step was taken with it"
            )
        for moment in self._moments:
            if lane is not None:
                self._pulled[moment] = lane.pull(self.fragment, self._state_of(moment))
            bad = bad_tensor(self._layouts, moment, self._moment_of(moment))
            if not clips:
                problem = problem or bad
            elif site.ranks.first(bad):
                self._census.square.fill_(math.nan)
        return problem

    def _uncounted(self) -> str:
        """Names an expert that was trained without tokens being counted: with expert_mean "tokens"
        the weight of its delta would be 0, and its training lost."""
        site, counts = self._site, self._counts
        if site.options.expert_mean != "tokens" or site.ranks.size > 1:
            return ""
        for i, layout in zip(self._indices, self._layouts, strict=True):
            for piece, place in layout.slices():
                if piece.expert is None or counts.counted[piece.expert[0]]:
                    continue
                layer = piece.expert[0]
                before = self._state.anchors[i][place].to(piece.tensor.dtype)
                here = list(site.moe_layers[layer].site_experts)
                if not counts.tokens[layer, here].any() and not before.equal(piece.values()):
                    return (
                        f"{piece.key} was trained, but no tokens were counted: train in mode "
                        "train(), with gradients"
                    )
        return ""

    def _squared_norm(self) -> Tensor:
        """Squared norm of this rank's part of the site's delta, without experts, fp64; NaN if any
        value of the site, also of experts, is not finite."""
        squares = [torch.zeros((), dtype=torch.float64)]
        for i, layout in zip(self._indices, self._layouts, strict=True):
            for piece, place in layout.slices():
                if self._site.index not in piece.contributors:
                    continue
                values = piece.values()
                anchor = self._state.anchors[i][place].to(values.dtype)
                square = (anchor.float() - values.float()).double().square().sum()
                # Experts add 0, or NaN.
                squares.append(square if piece.expert is None else square * 0.0)
        return torch.stack([square.to(squares[-1].device) for square in squares]).sum().cpu()

    # -------------------------------------------------------------------------------- announce

    def announce(self, problem: str) -> int:
        """Exchanges problems and numbers with all sites; returns the bytes sent.

        Raises MeetingError at all sites when one has a problem, or all would be left out.
        """
        name = meeting_name(self._layout.placement, self._completed, self.fragment)
        sent = require_good(self._site, name, problem) + self._census.gather()
        self._hand_out()
        return sent

    def _hand_out(self) -> None:
        """Sets the averaging of the jobs, after the numbers of all sites are known."""
        of_deltas, of_rest = self._census.of_deltas, self._census.of_rest
        if of_deltas is None or of_rest is None:
            return
        for job in self._deltas:
            job.averaging = of_deltas
        for mean in self._means:
            mean.averaging = of_rest
        for bias in self._biases:
            # They move by fixed steps, so they are finite; and all owners need the same.
            bias.averaging = replace(of_rest, someone=True)

    # ----------------------------------------------------------------- encode, exchange, apply

    def buckets(self) -> list[Bucket]:
        """The buckets to encode, exchange and apply. With overlap made before `announce`, otherwise
        after it."""
        return buckets_of(self._jobs(), self._site.options.bucket_bytes)

    def _jobs(self) -> list[Job]:
        site, options = self._site, self._site.options
        if options.expert_turns > 1:
            self._layouts = layouts_of_turn(
                self._layouts, options, self._completed + 1, self._counts.met, self._census.routed
            )
        fp32, tensor_of = get_codec("fp32"), lambda piece: piece.tensor
        if site.rule.name == "ddp":
            jobs: list[Job] = [
                EqualiseJob(layout, site.index, fp32, tensor_of)
                for layout in self._layouts
                if layout.group.size > 1
            ]
        else:
            self._make_deltas()
            jobs = list(self._deltas)
        for moment, codec in self._moments.items():
            self._means += self._mean_jobs(self._layouts, codec, self._moment_of(moment), moment)
        jobs += self._means
        if options.overlap:
            shifted = [la for la in self._bias_layouts if la.group.size > 1]
            return jobs + [ShiftJob(la, site.index, fp32, tensor_of) for la in shifted]
        self._biases = self._mean_jobs(self._bias_layouts, fp32, tensor_of, "bias")
        self._hand_out()
        return [*jobs, *self._biases]

    def _make_deltas(self) -> None:
        site, options, state = self._site, self._site.options, self._state
        self._deltas = [
            DeltaJob(
                layout,
                site.index,
                site.codec,
                site.rule,
                state.anchors[i],
                state.momenta[i] if state.momenta else None,
                feedback=state.feedback[i],
                seed=self._seed("delta", layout),
                alpha=options.alpha,
            )
            for i, layout in zip(self._indices, self._layouts, strict=True)
            if layout.numel
        ]
        for job in self._deltas:
            job.averaging = Averaging(rescale=options.rescale)
        if options.overlap and self._census.wanted:
            self._census.suppose()  # the numbers of the others arrive with their problems
            self._hand_out()

    def _mean_jobs(
        self,
        layouts: Sequence[Layout],
        codec: Codec,
        tensor_of: Callable[[Piece], Tensor],
        what: str,
    ) -> list[MeanJob]:
        return [
            MeanJob(la, self._site.index, codec, tensor_of, seed=self._seed(what, la))
            for la in layouts
            if la.group.size > 1
        ]

    def _seed(self, what: str, layout: Layout) -> int:
        site = self._site
        return random_seed(site.options.seed, self._completed, what, layout.name, site.index)

    def _state_of(self, moment: str) -> Callable[[Tensor], Tensor]:
        assert self._site.inner_optimizer is not None
        state = self._site.inner_optimizer.state
        return lambda parameter: state[parameter][moment]

    def _moment_of(self, moment: str) -> Callable[[Piece], Tensor]:
        if self._layout.lane is not None:
            return self._layout.lane.views(self._pulled[moment])
        of_parameter = self._state_of(moment)
        return lambda piece: of_parameter(piece.tensor)

    def forget_tokens(self) -> None:
        """Resets the token counts that this meeting has used."""
        layouts = [la for la in self._layout.site_layouts if la.fragment == self.fragment]
        if self._site.options.expert_turns > 1:
            layouts = self._layouts
        experts = {expert for layout in layouts for expert in experts_of(layout)}
        self._counts.forget(experts, self._completed + 1)

    def give_back(self) -> None:
        """Ends the application. With several ranks: writes parameters, moments and biases back to
        the ranks that hold them. With expert_turns: adds errors of sums to the site's own error.
        If this site was left out: resets inner moments that are not finite."""
        site, lane = self._site, self._layout.lane
        self._layout.give_back(self.fragment)
        if lane is not None:
            for moment, flats in self._pulled.items():
                lane.push(self.fragment, flats, self._state_of(moment))
            self._pulled = {}
        if site.options.expert_turns > 1:
            for i, layout in zip(self._indices, self._layouts, strict=True):
                keep_shares(layout, self._state.feedback[i], site.options.bucket_bytes)
        if site.index in self.treatment.left_out and site.inner_optimizer is not None:
            reset_bad_state(site.inner_optimizer)

    # ---------------------------------------------------------------------------------- verify

    def agreement(self) -> Agreement:
        """Hashes of what this site now holds of everything exchanged; not yet compared."""
        state, overlap, held = self._state, self._site.options.overlap, []
        for i, layout in zip(self._indices, self._layouts, strict=True):
            for piece, place in layout.slices():
                tensors = [] if overlap else [piece.values()]
                tensors += [a[i][place] for a in (state.anchors, state.momenta) if a]
                held.append(Held(piece.key, piece.owners, tuple(tensors)))
        if not overlap:
            for layout in self._bias_layouts:
                held += [Held(p.key, p.owners, (p.values(),)) for p in layout.pieces]
        return Agreement(self._site.groups, held, self._site.ranks)
