"""One meeting: what is asked before it, what is sent, and the proof that all agree after it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fomoe_ext.outer import optimizer as opt
from fomoe_ext.outer.agreement import Agreement, Held
from fomoe_ext.outer.averaging import UNTREATED, Averaging, treat
from fomoe_ext.outer.codec import Codec, get_codec
from fomoe_ext.outer.groups import share_statuses
from fomoe_ext.outer.inner_state import reset_bad_state
from fomoe_ext.outer.jobs import DeltaJob, EqualiseJob, MeanJob, ShiftJob
from fomoe_ext.outer.layout import Layout, Piece
from fomoe_ext.outer.options import MeetingError
from fomoe_ext.outer.reduce import Job
from fomoe_ext.outer.turns import experts_of, keep_shares, layouts_of_turn
from fomoe_ext.placement import wire

if TYPE_CHECKING:
    from fomoe_ext.outer.sync import OuterSync


def random_seed(*name: object) -> int:
    """A seed of 63 bits that depends on the name alone."""
    digest = hashlib.blake2b(repr(name).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are. (The sum is quick and tells most often, but it can overflow.)"""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def bad_tensor(
    layouts: Sequence[Layout], what: str, tensor_of: Callable[[Piece], Tensor | None]
) -> str:
    """Names the first piece with NaN or infinite values, or is empty."""
    good: set[int] = set()
    for layout in layouts:
        for piece in layout.pieces:
            tensor = tensor_of(piece)
            if tensor is None or id(piece.tensor) in good:
                continue
            if is_finite(tensor):
                good.add(id(piece.tensor))
            elif not is_finite(piece.part_of(tensor)):
                return f"{what} of {piece.key} is NaN or infinite"
    return ""


def meeting_name(sync: OuterSync, fragment: int = 0) -> str:
    """The coming meeting: its round and fragment, and a hash of the placement."""
    digest = hashlib.blake2b(repr(sync.placement.owners_of).encode(), digest_size=4).hexdigest()
    return f"{sync.round + 1}.{fragment} {digest}"


def require_good(sync: OuterSync, name: str, problem: str) -> int:
    """Raises MeetingError on all sites when one has a problem, or meets for something else.

    Nothing has been changed then. `name`: see `meeting_name`. Returns the bytes sent.
    """
    group, ranks = sync.groups.group(sync.groups.everyone), sync.ranks
    problem = ranks.first(problem, "background")
    texts, sent = ranks.tell(lambda: share_statuses(group, f"{name} {problem}"), "background")
    if problem:
        texts[sync.site] = f"{name} {problem}"  # all of it: what travels may be cut short
    number, placement = name.split()
    problems = []
    for site, text in enumerate(texts):
        meeting, theirs, words = [*text.split(" ", 2), "", ""][:3]
        if words:
            problems.append(f"site {site}: {words}")
        elif f"{meeting} {theirs}" != name:
            what = "has another placement" if theirs != placement else f"is in meeting {meeting}"
            problems.append(f"site {site} {what}, site {sync.site} is in meeting {number}")
    if problems:
        raise MeetingError(f"nothing was sent or changed: {'; '.join(problems)}")
    return sent if ranks.leads else 0


def _plain(counts: Tensor, sent: int) -> tuple[list[list[float]], int]:
    """What `SiteGroup.gather_now` returns, as a message to the other ranks has it."""
    return counts.tolist(), sent


class Meeting:
    """The meeting of one fragment of the model (with one fragment: of all of it)."""

    def __init__(self, sync: OuterSync, fragment: int) -> None:
        self.sync, self.fragment, options = sync, fragment, sync.options
        self._name = meeting_name(sync, fragment)
        due = wire.moments_due(sync.round + 1, options.moment_periods)
        names = zip(opt.MOMENTS, options.codecs_of_moments, due, strict=True)
        self.moments = {
            name: get_codec(codec, options.rounding)
            for name, codec, wanted in names
            if wanted and sync.rule.name == "local-adamw"
        }
        self.members = [i for i, la in enumerate(sync.layouts) if la.fragment == fragment]
        self.layouts = [sync.layouts[i] for i in self.members]
        self.bias_layouts = [la for la in sync.bias_layouts if la.fragment == fragment]
        self.deltas: list[DeltaJob] = []
        self._means: list[MeanJob] = []
        self._biases: list[MeanJob] = []
        self._counts: Tensor | None = None
        """What this site tells of itself: tokens routed to experts, those trained on, a norm."""
        self._square = torch.zeros((), dtype=torch.float64)
        self.treatment = UNTREATED
        self._averaging: tuple[Averaging, Averaging] | None = None
        """Of deltas, and of all else; None = as by default."""
        self._told: Tensor | None = None
        """What all sites tell of themselves, fp64 [num_sites, n], once that is known."""
        self._pulled: dict[str, dict[int, Tensor]] = {}

    # ---------------------------------------------------------------------------------- before

    def problem(self) -> str:
        """What speaks against the meeting here, or an empty string."""
        sync, clips = self.sync, self.sync.options.clip_delta > 0
        problem = sync.members.change(sync) or sync.watch.missed() or self._uncounted()
        if problem and sync.ranks.size == 1:
            return problem
        if clips:
            self._square = sync.ranks.sum_(self._squared_norm())
        elif not problem:
            problem = bad_tensor(self.layouts, "the value", lambda piece: piece.tensor)
        if not self.moments:
            return problem
        assert sync.inner_optimizer is not None
        trained = [(n, p) for n, p in sync.model.named_parameters() if p.requires_grad]
        problem = problem or sync.watch.other_optimizer(trained)
        missing = opt.missing_moments(sync.inner_optimizer, trained)
        missing = sync.ranks.first(missing)
        if missing:
            return (
                problem or f"inner_optimizer has no moments of {missing}: no step was taken with it"
            )
        for moment in self.moments:
            if sync.lane is not None:
                self._pulled[moment] = sync.lane.pull(self.fragment, self._state_of(moment))
            bad = bad_tensor(self.layouts, moment, self._moment_of(moment))
            if not clips:
                problem = problem or bad
            elif sync.ranks.first(bad):
                self._square.fill_(math.nan)
        return problem

    def _uncounted(self) -> str:
        """Names an expert that has been trained with no tokens counted: with expert_mean "tokens"
        its delta would weigh nothing, and its training be undone."""
        sync = self.sync
        if sync.options.expert_mean != "tokens" or sync.ranks.size > 1:
            return ""
        for i, layout in zip(self.members, self.layouts, strict=True):
            for piece, place in layout.slices():
                if piece.expert is None or sync.watch.counted[piece.expert[0]]:
                    continue
                layer, before = piece.expert[0], sync.anchors[i][place].to(piece.tensor.dtype)
                here = list(sync.moe_layers[layer].site_experts)
                if not sync.tokens[layer, here].any() and not before.equal(piece.values()):
                    return (
                        f"{piece.key} was trained, but no tokens were counted: train in mode "
                        "train(), with gradients"
                    )
        return ""

    def _squared_norm(self) -> Tensor:
        """Of this rank's part of the site's delta, but for experts', fp64; NaN where anything that
        the site gives is not finite, of experts too."""
        sync, squares = self.sync, [torch.zeros((), dtype=torch.float64)]
        for i, layout in zip(self.members, self.layouts, strict=True):
            for piece, place in layout.slices():
                if sync.site not in piece.contributors:
                    continue
                values = piece.values()
                delta = sync.anchors[i][place].to(values.dtype).float() - values.float()
                square = delta.double().square().sum()
                # That of experts counts as nothing, or as NaN.
                squares.append(square if piece.expert is None else square * 0.0)
        return torch.stack([square.to(squares[-1].device) for square in squares]).sum().cpu()

    def announce(self, problem: str) -> int:
        """Tells all sites how it looks here and hears the same of them; the bytes sent.

        Raises MeetingError on all sites when one has a problem, or all are to be left out.
        """
        sent = require_good(self.sync, self._name, problem)
        if self._counts is None and self._tells:
            self._counts = self._counted()
        if self._counts is not None:
            own, ranks = self._counts, self.sync.ranks
            group = self.sync.groups.group(self.sync.groups.everyone)
            gathered, more = ranks.tell(lambda: _plain(*group.gather_now(own)), "background")
            sent += more if ranks.leads else 0
            self._told = torch.tensor(gathered, dtype=torch.float64)
            self._average_by(self._told)
            if len(self.treatment.left_out) == group.size:
                raise MeetingError(
                    "nothing was changed: the values of every site, or their moments, are NaN or "
                    "infinite"
                )
        return sent

    @property
    def _tells(self) -> bool:
        """Whether sites tell each other numbers."""
        return self.sync.options.counts_tokens or self.sync.options.site_numbers > 0

    def _routed(self, told: Tensor) -> Tensor:
        """The tokens that each site has routed to each expert, [num_sites, L, E]."""
        shape = self.sync.tokens.shape
        return told[:, : shape.numel()].view(-1, *shape)

    def _average_by(self, told: Tensor) -> None:
        """`told` [num_sites, n]: what the sites tell of themselves, as `_counted` has it."""
        options = self.sync.options
        tokens = trained = None
        if options.expert_mean == "tokens":
            counts = self._routed(told)
            experts = {p.expert for la in self.layouts for p in la.pieces if p.expert is not None}
            tokens = {key: counts[:, key[0], key[1]].tolist() for key in experts}
        if options.clip_delta:
            self.treatment = treat(told[:, -1].tolist(), options.clip_delta)
        if options.site_mean == "tokens":
            trained = told[:, told.shape[1] - options.site_numbers].tolist()
            for site, count in enumerate(trained):
                if not 0 <= count < math.inf:
                    raise MeetingError(
                        f"nothing was changed: site {site} says that it has trained on {count} "
                        "tokens"
                    )
        treatment = self.treatment
        unscaled = Averaging(trained=trained, treatment=treatment._replace(factors=()))
        self._averaging = Averaging(tokens, options.rescale, trained, treatment), unscaled
        self._hand_out()

    def _hand_out(self) -> None:
        """Gives the jobs that there are their averaging."""
        if self._averaging is None:
            return
        of_deltas, unscaled = self._averaging
        for job in self.deltas:
            job.averaging = of_deltas
        for mean in self._means:
            mean.averaging = unscaled
        for bias in self._biases:
            # They move by fixed steps, so that they are finite, and all owners need the same.
            bias.averaging = replace(unscaled, someone=True)

    def _counted(self) -> Tensor:
        """What this site tells of itself, fp64 [n]; a collective of its ranks."""
        sync, options = self.sync, self.sync.options
        parts = [sync.tokens.flatten()] if options.counts_tokens else []
        if options.site_mean == "tokens":
            parts.append(torch.tensor([sync.trained], dtype=torch.float64))
        counts = sync.ranks.sum_(torch.cat(parts)) if parts else torch.empty(0, dtype=torch.float64)
        norm = [self._square.sqrt().view(1)] if options.clip_delta else []
        return torch.cat([counts, *norm])

    # ------------------------------------------------------------------------------------ jobs

    def jobs(self) -> list[Job]:
        """What the owner groups have to exchange. With overlap before `announce`, else after."""
        sync = self.sync
        if sync.options.expert_turns > 1:
            routed = None if self._told is None else self._routed(self._told)
            self.layouts = layouts_of_turn(sync, self.layouts, routed)
        fp32, tensor_of = get_codec("fp32"), lambda piece: piece.tensor
        if sync.rule.name == "ddp":
            jobs: list[Job] = [
                EqualiseJob(layout, sync.site, fp32, tensor_of)
                for layout in self.layouts
                if layout.group.size > 1
            ]
        else:
            self._make_deltas()
            jobs = list(self.deltas)
        for moment, codec in self.moments.items():
            self._means += self._mean_jobs(self.layouts, codec, self._moment_of(moment), moment)
        jobs += self._means
        if sync.options.overlap:
            shifted = [la for la in self.bias_layouts if la.group.size > 1]
            return jobs + [ShiftJob(la, sync.site, fp32, tensor_of) for la in shifted]
        self._biases = self._mean_jobs(self.bias_layouts, fp32, tensor_of, "bias")
        self._hand_out()
        return [*jobs, *self._biases]

    def _make_deltas(self) -> None:
        sync, options = self.sync, self.sync.options
        self.deltas = [
            DeltaJob(
                layout,
                sync.site,
                sync.codec,
                sync.rule,
                sync.anchors[i],
                sync.momenta[i] if sync.momenta else None,
                feedback=sync.feedback[i],
                seed=self._seed("delta", layout),
                alpha=options.alpha,
            )
            for i, layout in zip(self.members, self.layouts, strict=True)
            if layout.numel
        ]
        for job in self.deltas:
            job.averaging = Averaging(rescale=options.rescale)
        if options.overlap and self._tells:
            self._counts = self._counted()
            # The others' counts come with their statuses; encoding takes no more than one's own.
            own = torch.zeros(sync.placement.num_sites, len(self._counts), dtype=torch.float64)
            own[sync.site] = self._counts
            self._average_by(own)

    def forget_tokens(self) -> None:
        """The tokens that have been counted for this meeting are not counted for the next one."""
        layouts = [la for la in self.sync.site_layouts if la.fragment == self.fragment]
        if self.sync.options.expert_turns > 1:
            layouts = self.layouts
        for expert in {expert for layout in layouts for expert in experts_of(layout)}:
            self.sync.tokens[expert] = 0
            self.sync.watch.counted[expert[0]] = False
            self.sync.met[expert] = self.sync.round + 1

    def _seed(self, what: str, layout: Layout) -> int:
        sync = self.sync
        return random_seed(sync.options.seed, sync.round, what, layout.name, sync.site)

    def _state_of(self, moment: str) -> Callable[[Tensor], Tensor]:
        assert self.sync.inner_optimizer is not None
        state = self.sync.inner_optimizer.state
        return lambda parameter: state[parameter][moment]

    def _moment_of(self, moment: str) -> Callable[[Piece], Tensor]:
        if self.sync.lane is not None:
            return self.sync.lane.views(self._pulled[moment])
        of_parameter = self._state_of(moment)
        return lambda piece: of_parameter(piece.tensor)

    def _mean_jobs(
        self,
        layouts: Sequence[Layout],
        codec: Codec,
        tensor_of: Callable[[Piece], Tensor],
        what: str,
    ) -> list[MeanJob]:
        return [
            MeanJob(la, self.sync.site, codec, tensor_of, seed=self._seed(what, la))
            for la in layouts
            if la.group.size > 1
        ]

    # ----------------------------------------------------------------------------------- after

    def give_back(self) -> None:
        """With several ranks: their parameters, moments and biases become what was agreed on. With
        turns: what was lost of sums is kept where it belongs. Where this site was left out, inner
        moments that are not finite begin anew."""
        if self.sync.lane is not None:
            self.sync.lane.give_back(self.fragment)
            for moment, flats in self._pulled.items():
                self.sync.lane.push(self.fragment, flats, self._state_of(moment))
            self._pulled = {}
        if self.sync.options.expert_turns > 1:
            for i, layout in zip(self.members, self.layouts, strict=True):
                keep_shares(layout, self.sync.feedback[i], self.sync.options.bucket_bytes)
        self.sync.treatment = self.treatment
        if self.sync.site in self.treatment.left_out and self.sync.inner_optimizer is not None:
            reset_bad_state(self.sync.inner_optimizer)

    def agreement(self) -> Agreement:
        """What this site holds now of all that was exchanged, hashed; not yet compared."""
        sync, held = self.sync, []
        for i, layout in zip(self.members, self.layouts, strict=True):
            for piece, place in layout.slices():
                tensors = [] if sync.options.overlap else [piece.values()]
                tensors += [a[i][place] for a in (sync.anchors, sync.momenta) if a]
                held.append(Held(piece.key, piece.owners, tuple(tensors)))
        if not sync.options.overlap:
            for layout in self.bias_layouts:
                held += [Held(p.key, p.owners, (p.values(),)) for p in layout.pieces]
        return Agreement(sync.groups, held, sync.ranks)
