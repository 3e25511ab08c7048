"""OuterSync: the meetings of the sites that train one model.

Dense parameters are averaged over all sites, an expert over its holders. Router rows with
router_scope "global" reach all sites and are averaged over the expert's holders (a row gets its
gradient there alone; a mean over all sites would shrink it by replication / num_sites) or, with
router_mean "all", over all sites; with "resident" they travel with their expert. What is averaged,
and by which rule, is said in `fomoe_ext.outer.optimizer`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fomoe_ext import wire
from fomoe_ext.checks import at_least, finite, one_of
from fomoe_ext.outer import optimizer as opt
from fomoe_ext.outer.codec import Codec, get_codec
from fomoe_ext.outer.jobs import DeltaJob, EqualiseJob, MeanJob
from fomoe_ext.outer.layout import (
    Layout,
    Piece,
    bias_pieces,
    check_model,
    find_moe_layers,
    make_layouts,
    parameter_pieces,
)
from fomoe_ext.outer.reduce import (
    Job,
    SiteGroups,
    gather_objects,
    run_jobs,
    share_statuses,
    sum_floats,
)
from fomoe_ext.placement import Owners, Placement


class MeetingError(RuntimeError):
    """A meeting that did not come about, or broke off."""


class RoundReport(NamedTuple):
    """What the meetings of a round cost this site.

    round: counts from 1. bytes_sent and seconds: of `step` and, with "ddp", of all
    `reduce_gradients` and `clip_grad_norm` since the last one; seconds include waiting for others.
    moments: how many of the two AdamW moments were averaged.
    """

    round: int
    bytes_sent: int
    seconds: float
    moments: int


class ReshuffleReport(NamedTuple):
    """What a reshuffle did: experts that arrived here, as (layer, expert); bytes sent; seconds."""

    arrived: tuple[tuple[int, int], ...]
    bytes_sent: int
    seconds: float


class OuterSync:
    """Keeps the models of all sites one model; every method but the plain questions is collective.

    With "diloco", "fedavg" and "local-adamw" call `step` after the local steps of a round. With
    "ddp" call `reduce_gradients` before every optimizer step, `clip_grad_norm` in place of torch's,
    and `step` at the end of a round, which then only removes differences of rounding. Gradients are
    averaged like parameters: dense ones over all sites, an expert's over its holders, as if their
    batches were all there is. With replication = sites that is the gradient of the joined batch.

    After a `step` all sites hold the same bits of dense parameters and all holders the same bits of
    an expert. A site's memory: an fp32 anchor of what it holds (not with "ddp") and, with outer
    momentum, as much again.
    """

    def __init__(
        self,
        model: nn.Module,
        placement: Placement,
        site: int,
        *,
        optimizer: Literal["diloco", "fedavg", "local-adamw", "ddp"] = "diloco",
        outer_lr: float | None = None,
        outer_momentum: float | None = None,
        codec: str | Codec = "fp32",
        inner_optimizer: torch.optim.Optimizer | None = None,
        router_mean: Literal["holders", "all"] = "holders",
        moment_periods: Sequence[int] = (1, 1),
        bucket_bytes: int = 1 << 22,
        groups: SiteGroups | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        """Meets the other sites; all must call it with the same arguments but model and site.

        Args:
            model: its `MoELayer`s, in order of appearance, hold the placement's experts of `site`.
            placement, site: who holds what, and which site this is (its rank).
            optimizer: see `fomoe_ext.outer.optimizer`.
            outer_lr, outer_momentum: None = 0.7 and 0.9 for diloco, 1 and 0 for the others.
            codec: "fp32" or "bf16", for deltas, moments and gradients.
            inner_optimizer: that of the local steps; "local-adamw" and `reshuffle` need it.
            router_mean: over which sites a router row is averaged, with router_scope "global".
            moment_periods: rounds between two averages of the first and of the second moment.
            bucket_bytes: fp32 bytes that travel at once.
            groups: process groups to be shared with another OuterSync; None = new ones.
            timeout_s: seconds after which a collective of new groups fails.

        Raises ValueError or TypeError naming the argument, RuntimeError when torch.distributed is
        not ready, and MeetingError when sites differ in arguments or initial parameters.
        """
        self.groups = groups or SiteGroups(placement.num_sites, site, timeout_s)
        if (self.groups.num_sites, self.groups.site) != (placement.num_sites, site):
            raise ValueError(
                f"groups must be of site {site} of {placement.num_sites}, got those of site "
                f"{self.groups.site} of {self.groups.num_sites}"
            )
        problem: Exception | None = None
        self.moment_periods = (1, 1)
        try:
            self.rule = opt.OuterRule.make(optimizer, outer_lr, outer_momentum)
            self.codec = get_codec(codec)
            one_of(("holders", "all"), router_mean=router_mean)
            self.moment_periods = _two_periods(moment_periods)
            wire.bucket_elements(bucket_bytes)
            if optimizer == "local-adamw":
                opt.check_adamw(inner_optimizer)
            check_model(model, placement, site)
        except (ValueError, TypeError) as error:
            problem = error
        self.model, self.placement, self.site = model, placement, site
        self.inner_optimizer, self.router_mean = inner_optimizer, router_mean
        self.bucket_bytes = bucket_bytes
        self.round = 0
        """Rounds completed."""
        self.bytes_sent = 0
        """Bytes this site has sent in all meetings and reshuffles."""
        self._broken = ""
        self._round_bytes, self._round_seconds = 0, 0.0
        self._agree_on_arguments(problem)
        self.warmup: opt.ArrivalWarmup | None = None
        if inner_optimizer is not None:
            layers = [layer for _, layer in find_moe_layers(model)]
            self.warmup = opt.ArrivalWarmup(inner_optimizer, layers)
        self.adopt_placement(placement)
        self._fill_anchor()
        self.verify()

    # ------------------------------------------------------------------------------- agreement

    def _agree_on_arguments(self, problem: Exception | None) -> None:
        """Raises this site's problem; MeetingError for another site's, or when arguments differ."""
        mine: dict[str, Any] = {"problem": str(problem or "")}
        if problem is None:
            shapes = [(n, p.shape, p.requires_grad) for n, p in self.model.named_parameters()]
            mine |= {
                "placement": self.placement.to_dict(),
                "optimizer, outer_lr and outer_momentum": str(self.rule),
                "codec": self.codec.name,
                "router_mean": self.router_mean,
                "moment_periods": self.moment_periods,
                "bucket_bytes": self.bucket_bytes,
                "parameters": hashlib.sha256(repr(shapes).encode()).hexdigest(),
            }
        everyone = gather_objects(mine, self.placement.num_sites)
        if problem is not None:
            raise problem
        for site, other in enumerate(everyone):
            if other["problem"]:
                raise MeetingError(f"site {site}: {other['problem']}")
            differing = [name for name in mine if mine[name] != other[name]]
            if differing:
                raise MeetingError(
                    f"all sites must have the same {differing[0]}; site {self.site} and site "
                    f"{site} differ"
                )

    def hashes(self) -> dict[Owners, str]:
        """SHA-256 of the parameters' bits by owner set, for the sets this site is in."""
        result = {}
        for layout in self.layouts:
            digest = hashlib.sha256()
            for piece in layout.pieces:
                values = piece.values().cpu().contiguous()
                digest.update(values.view(torch.uint8).numpy())
            result[layout.group.owners] = digest.hexdigest()
        return result

    def verify(self) -> None:
        """Raises MeetingError unless all owners hold the same bits. True after `step`."""
        everyone = gather_objects(self.hashes(), self.placement.num_sites)
        for first, mine in enumerate(everyone):
            for owners, digest in mine.items():
                differing = [site for site in owners if everyone[site].get(owners) != digest]
                if differing:
                    raise MeetingError(
                        f"the sites {owners} must hold the same bits of what they share, but site "
                        f"{differing[0]} differs from site {first} (another seed, or not the same "
                        "checkpoint?)"
                    )

    # ---------------------------------------------------------------------------------- layout

    def adopt_placement(self, placement: Placement) -> None:
        """Lays out the pieces for a placement that the model's resident experts are already of."""
        self.placement = placement
        pieces = parameter_pieces(self.model, placement, self.site, self.router_mean)
        biases = bias_pieces(self.model, placement, self.site)
        self.groups.create(placement.owner_sets())
        self.layouts = make_layouts(pieces, self.groups)
        self.bias_layouts = make_layouts(biases, self.groups)
        self.anchors: list[Tensor] = []
        self.momenta: list[Tensor] = []

    def _fill_anchor(self) -> None:
        """The anchor is what the parameters are; the momentum is zero. "ddp" has neither."""
        if self.rule.name == "ddp":
            return
        for layout in self.layouts:
            device = layout.pieces[0].tensor.device
            anchor = torch.empty(layout.numel, dtype=torch.float32, device=device)
            for piece, place in layout.slices():
                anchor[place].copy_(piece.values())
            self.anchors.append(anchor)
            if self.rule.momentum:
                self.momenta.append(torch.zeros_like(anchor))

    # --------------------------------------------------------------------------------- meetings

    @contextmanager
    def _meeting(self, what: str) -> Iterator[None]:
        """Measures a meeting, and makes a failure in it final."""
        if self._broken:
            raise MeetingError(f"this OuterSync cannot go on: {self._broken}; resume a checkpoint")
        start = time.perf_counter()
        try:
            yield
        except MeetingError:
            raise
        except RuntimeError as error:
            self._broken = f"{what} after round {self.round} broke off at site {self.site}: {error}"
            raise MeetingError(self._broken) from error
        finally:
            self._round_seconds += time.perf_counter() - start

    def _sent(self, count: int) -> None:
        self.bytes_sent += count
        self._round_bytes += count

    def _require_good(self, problem: str) -> None:
        """Raises MeetingError on all sites when one has a problem; before anything is changed."""
        texts, sent = share_statuses(self.groups.group(self.groups.everyone), problem)
        self._sent(sent)
        problems = [f"site {site}: {text}" for site, text in enumerate(texts) if text]
        if problems:
            raise MeetingError(f"nothing was sent or changed: {'; '.join(problems)}")

    def _bad_tensor(self, what: str, tensor_of: Callable[[Piece], Tensor | None]) -> str:
        """Names the first piece with NaN or infinite values, or is empty."""
        good: set[int] = set()
        for layout in self.layouts:
            for piece in layout.pieces:
                tensor = tensor_of(piece)
                if tensor is None or id(piece.tensor) in good:
                    continue
                if _is_finite(tensor):
                    good.add(id(piece.tensor))
                elif not _is_finite(piece.part_of(tensor)):
                    return f"{what} of {piece.key} is NaN or infinite"
        return ""

    @torch.no_grad()
    def step(self) -> RoundReport:
        """The meeting at the end of a round, after the local steps; parameters change in place.

        Raises MeetingError on all sites, with nothing sent or changed, when a parameter or moment
        is NaN or infinite or a moment is missing; and, with the model in an undefined state, when a
        site is lost.
        """
        with self._meeting("the meeting"):
            due = [
                (self.round + 1) % period == 0 and self.rule.name == "local-adamw"
                for period in self.moment_periods
            ]
            moments = [name for name, wanted in zip(opt.MOMENTS, due, strict=True) if wanted]
            self._require_good(self._problem_before_step(moments))
            jobs: list[Job] = []
            if self.rule.name == "ddp":
                fp32 = get_codec("fp32")
                jobs += [
                    EqualiseJob(layout, self.site, fp32, lambda piece: piece.tensor)
                    for layout in self.layouts
                    if layout.group.size > 1
                ]
            else:
                jobs += [
                    DeltaJob(
                        layout,
                        self.site,
                        self.codec,
                        self.rule,
                        anchor,
                        self.momenta[i] if self.momenta else None,
                    )
                    for i, (layout, anchor) in enumerate(
                        zip(self.layouts, self.anchors, strict=True)
                    )
                ]
            for moment in moments:
                jobs += self._mean_jobs(self.layouts, self.codec, self._moment_of(moment))
            fp32, bias_of = get_codec("fp32"), lambda piece: piece.tensor
            jobs += self._mean_jobs(self.bias_layouts, fp32, bias_of)
            self._sent(run_jobs(jobs, self.bucket_bytes))
            self.round += 1
        report = RoundReport(self.round, self._round_bytes, self._round_seconds, len(moments))
        self._round_bytes, self._round_seconds = 0, 0.0
        return report

    def _problem_before_step(self, moments: Sequence[str]) -> str:
        problem = self._bad_tensor("the value", lambda piece: piece.tensor)
        if problem or not moments:
            return problem
        assert self.inner_optimizer is not None
        trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        missing = opt.missing_moments(self.inner_optimizer, trained)
        if missing:
            return f"inner_optimizer has no moments of {missing}: no step was taken with it"
        for moment in moments:
            problem = problem or self._bad_tensor(moment, self._moment_of(moment))
        return problem

    def _moment_of(self, moment: str) -> Callable[[Piece], Tensor]:
        assert self.inner_optimizer is not None
        state = self.inner_optimizer.state
        return lambda piece: state[piece.tensor][moment]

    def _mean_jobs(
        self, layouts: Sequence[Layout], codec: Codec, tensor_of: Callable[[Piece], Tensor]
    ) -> list[Job]:
        return [
            MeanJob(layout, self.site, codec, tensor_of)
            for layout in layouts
            if layout.group.size > 1
        ]

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Before an optimizer step, with "ddp": every gradient becomes the mean over its sites.

        A parameter without a gradient counts as one of zeros. Raises RuntimeError for another
        outer optimizer, MeetingError on all sites, with nothing sent or changed, when a gradient
        is NaN or infinite.
        """
        self._require_ddp("reduce_gradients")
        for layout in self.layouts:
            for piece in layout.pieces:
                parameter = piece.tensor
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                elif not parameter.grad.is_contiguous():
                    parameter.grad = parameter.grad.contiguous()
        with self._meeting("the reduction of gradients"):
            self._require_good(self._bad_tensor("gradient", lambda piece: piece.tensor.grad))
            jobs = self._mean_jobs(self.layouts, self.codec, lambda piece: piece.tensor.grad)
            self._sent(run_jobs(jobs, self.bucket_bytes))

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> float:
        """Scales gradients so that their norm is at most `max_norm`; returns the norm before.

        With "ddp", after `reduce_gradients`, it is the norm over the whole model, every expert
        counted once, and the same for all sites (each holds other experts, and scaling by norms of
        their own would drive them apart); a collective. Else it is this site's own norm and no
        other site is asked. Raises ValueError unless max_norm > 0.
        """
        finite(0.0, max_norm=max_norm)
        if max_norm == 0:
            raise ValueError(f"max_norm must be > 0, got {max_norm}")
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if self.rule.name != "ddp":
            return float(nn.utils.clip_grad_norm_(parameters, max_norm))
        with self._meeting("the clipping of gradients"):
            own = sum(
                float(piece.part_of(piece.tensor.grad).double().square().sum())
                for layout in self.layouts
                if layout.group.rank == 0  # one holder speaks for the group
                for piece in layout.pieces
            )
            total, sent = sum_floats(self.groups.group(self.groups.everyone), own)
            self._sent(sent)
        norm = total**0.5
        nn.utils.clip_grads_with_norm_(parameters, max_norm, torch.tensor(norm))
        return norm

    def _require_ddp(self, what: str) -> None:
        if self.rule.name != "ddp":
            raise RuntimeError(f"{what} is for optimizer 'ddp', this is {self.rule.name!r}")

    def reshuffle(self, new: Placement, *, warmup_steps: int = 0) -> ReshuffleReport:
        """Brings a new placement into force: experts move, right after a `step`.

        A moved expert comes from a holder, with its outer momentum (and router row and selection
        bias with router_scope "resident"). Its inner optimizer state starts from zero and its
        learning rate rises over `warmup_steps` steps (`ArrivalWarmup`). Gradients of experts are
        dropped. Raises ValueError, with nothing changed, for a placement of other sizes, without
        `inner_optimizer`, or for warmup_steps < 0; MeetingError when sites differ about `new` or
        one is lost.
        """
        from fomoe_ext.outer.reshuffle import move_experts

        at_least(0, warmup_steps=warmup_steps)
        if self.inner_optimizer is None or self.warmup is None:
            raise ValueError("reshuffle needs the inner_optimizer, whose state moves with experts")
        self.placement.transfers(new)  # refuses other sizes
        for path, layer in find_moe_layers(self.model):
            if not all(p.requires_grad for p in layer.experts.parameters()):
                raise ValueError(f"reshuffle cannot move the frozen experts of {path}")
        before = self._round_bytes, self._round_seconds
        with self._meeting("the reshuffle"):
            digest = hashlib.sha256(repr(new.owners_of).encode()).hexdigest()
            texts, sent = share_statuses(self.groups.group(self.groups.everyone), digest)
            if len(set(texts)) > 1:
                raise MeetingError("all sites must pass the same placement to reshuffle")
            arrived, moved = move_experts(self, new)
            self._sent(sent + moved)
            self.warmup.start(arrived, warmup_steps)
        report = ReshuffleReport(
            arrived, self._round_bytes - before[0], self._round_seconds - before[1]
        )
        self._round_bytes, self._round_seconds = before
        return report

    # -------------------------------------------------------------------------------- questions

    def elements(self) -> wire.GroupElements:
        """Elements this site shares with each owner group."""
        return wire.GroupElements(
            {layout.group.owners: layout.numel for layout in self.layouts},
            {layout.group.owners: layout.numel for layout in self.bias_layouts},
        )

    def predicted_bytes(self, local_steps: int = 1, clip: bool = False) -> int:
        """Bytes that this site will send in the coming round (`wire.round_bytes`).

        `local_steps` and `clip` say how often "ddp" will reduce and whether it clips.
        """
        return wire.round_bytes(
            self.elements(),
            self.placement.num_sites,
            optimizer=self.rule.name,
            codec=self.codec.name,
            bucket_bytes=self.bucket_bytes,
            local_steps=local_steps,
            clip=clip,
            round_index=self.round + 1,
            moment_periods=self.moment_periods,
        )

    def state_bytes(self) -> tuple[int, int]:
        """Bytes of anchor and of outer momentum on this site."""
        return sum(a.nbytes for a in self.anchors), sum(m.nbytes for m in self.momenta)

    @torch.no_grad()
    def copy_anchor_to_model(self) -> None:
        """Sets the parameters to the anchor, i.e. drops all local steps since the last `step`."""
        for layout, anchor in zip(self.layouts, self.anchors, strict=False):
            for piece, place in layout.slices():
                piece.values().copy_(anchor[place])

    # --------------------------------------------------------------------------------- resuming

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of this site: tensors (not copied), numbers and strings only."""
        names = ["-".join(map(str, layout.group.owners)) for layout in self.layouts]
        warming = self.warmup.progress if self.warmup else {}
        return {
            "round": self.round,
            "bytes_sent": self.bytes_sent,
            "optimizer": self.rule.name,
            "placement": self.placement.to_dict(),
            "anchor": dict(zip(names, self.anchors, strict=False)),
            "momentum": dict(zip(names, self.momenta, strict=False)),
            "warmup": [[*key, *steps] for key, steps in warming.items()],
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`; the model's parameters are not touched.

        Raises ValueError, with nothing changed, for a state of another optimizer, placement (make
        the OuterSync with `Placement.from_dict(state["placement"])`), model or outer momentum.
        """
        try:
            given = state["optimizer"]
            placement = Placement.from_dict(state["placement"])
            stored = {"anchor": state["anchor"], "momentum": state["momentum"]}
            round_index, sent = int(state["round"]), int(state["bytes_sent"])
            warming = {(a, b): (c, d) for a, b, c, d in state["warmup"]}
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"state must be as OuterSync.state_dict makes it ({error!r})"
            ) from None
        if given != self.rule.name:
            raise ValueError(f"state is of optimizer {given!r}, this is {self.rule.name!r}")
        if placement != self.placement:
            raise ValueError("state is of another placement than this OuterSync")
        mine = self.state_dict()
        for what, tensors in stored.items():
            wanted = {name: tuple(t.shape) for name, t in mine[what].items()}
            found = {name: tuple(t.shape) for name, t in tensors.items()}
            if wanted != found:
                raise ValueError(
                    f"state has an outer {what} of the sizes {found}, this model wants {wanted}"
                )
        for what, tensors in stored.items():
            for name, tensor in tensors.items():
                mine[what][name].copy_(tensor)
        self.round, self.bytes_sent = round_index, sent
        if self.warmup is not None:
            self.warmup.progress = warming


def _two_periods(periods: Sequence[int]) -> tuple[int, int]:
    if len(periods) != 2:
        raise ValueError(f"moment_periods must be two numbers of rounds, got {periods!r}")
    first, second = periods
    at_least(1, first_moment_period=first, second_moment_period=second)
    return first, second


def _is_finite(tensor: Tensor) -> bool:
    # The sum is quick and tells most often; it can overflow, so only then look at every element.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
