"""Changes a training site when other sites are lost or join, and describes it for the others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.checkpoint.manifest import CheckpointError
from fomoe_ext.checkpoint.reader import GlobalModelReader
from fomoe_ext.checkpoint.whole import require_whole
from fomoe_ext.fault.site import Formed, Recoverable
from fomoe_ext.layer.assemble import expert_key, named_moe_layers
from fomoe_ext.model.language import LanguageModel
from fomoe_ext.outer.belongings import steps_of
from fomoe_ext.outer.layout import Layout
from fomoe_ext.outer.sync import OuterSync
from fomoe_ext.plan.traffic import NOTE_BYTES
from fomoe_ext.report.runs import CHECKPOINTS
from fomoe_ext.report.tally import Tally

_log = logging.getLogger(__name__)


def progress(site: Recoverable) -> dict[str, Any]:
    """The progress of a site, from which a site that joins late continues."""
    sync = site.sync
    return {
        "steps": steps_of(sync.model, sync.inner_optimizer),
        "step": site.tally.steps,
        "steps_in_round": site.steps_in_round,
        "data": site.batches.state_dict(),
        "counters": {
            "round": sync.round,
            "steps": sync.steps,
            "reductions": sync.step_count.reductions,
        },
        "agreements": sync.agreements,
        "story": site.story,
        "first_validation": site.tally.first_validation,
    }


def end_meeting(site: Recoverable, commit: bool) -> None:
    """Ends an interrupted meeting: commits and counts it, or rolls it back."""
    placement, lost = site.placement, site.sync.pending is not None and not commit
    outcome = site.sync.end_pending(commit)
    if lost:
        # The notes before it will be sent again.
        notes = (site.world.num_sites - 1) * NOTE_BYTES
        site.tally.note_bytes -= notes
        site.sync.log.lost_bytes += notes
    if outcome is not None:
        site.tally.meeting_s += site.after_meeting(placement, outcome)


@torch.no_grad()
def carry_share_errors(
    old: OuterSync, members: Sequence[int], new: OuterSync, new_members: Sequence[int]
) -> None:
    """Keeps the error feedback of encoded sums for pieces that the same sites still share."""
    kept = {
        _key(layout, members): feedback.shares
        for layout, feedback in zip(old.layout.layouts, old.state.feedback, strict=True)
    }
    for layout, feedback in zip(new.layout.layouts, new.state.feedback, strict=True):
        shares = kept.get(_key(layout, new_members))
        if shares is not None and feedback.shares is not None:
            feedback.shares.copy_(shares)


def _key(layout: Layout, members: Sequence[int]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Identifies the pieces and, by their permanent numbers, the sites that share them."""
    owners = tuple(members[site] for site in layout.group.owners)
    return owners, tuple(piece.key for piece in layout.pieces)


@torch.no_grad()
def become(site: Recoverable, formed: Formed) -> None:
    """Gives the site its new model, optimizer, outer sync and place among the sites."""
    old = None if site.late else site.sync
    sync, donor = formed.sync, formed.donor
    counters = donor["counters"]
    sync.log.round, sync.log.agreements = counters["round"], donor["agreements"]
    sync.step_count.taken = counters["steps"]
    sync.step_count.reductions = counters["reductions"]
    if old is not None:
        sync.log.bytes_sent, sync.log.lost_bytes = old.log.bytes_sent, old.log.lost_bytes
        sync.log.agreements = old.log.agreements
        sync.counts.tokens.copy_(old.counts.tokens)
        if sync.warmup is not None and old.warmup is not None:
            residents = [layer.site_experts for layer in sync.layout.site.moe_layers]
            sync.warmup.progress = {
                key: steps
                for key, steps in old.warmup.progress.items()
                if key[1] in residents[key[0]]
            }
    if site.late:
        site.batches.load_state_dict(donor["data"])
        step = donor["step"]
        site.tally = Tally(
            steps=step,
            from_round=sync.round,
            from_step=step,
            first_validation=donor["first_validation"],
        )
        site.steps_in_round = donor["steps_in_round"]
        site.story = list(donor["story"])
    site.world, site.late = formed.world, False
    site.model, site.optimizer, site.sync = formed.model, formed.optimizer, sync
    if old is not None:
        old.close()


@torch.no_grad()
def restore_experts(
    site: Recoverable, model: LanguageModel, experts: Sequence[tuple[int, int]]
) -> int | None:
    """Fills experts of a new model from the newest whole checkpoint on this machine.

    Returns the local step of the checkpoint. Without one it returns None, and the experts keep
    their initial weights. Their optimizer state is zero in both cases.
    """
    folder = site.run_dir / CHECKPOINTS
    for path in reversed(ckpt.list_checkpoints(folder)):
        try:
            _read_experts(site, model, experts, path)
        except CheckpointError as error:
            _log.info("site %d: %s", site.world.number, error)
            continue
        return ckpt.steps_of(path)
    return None


def _read_experts(
    site: Recoverable,
    model: LanguageModel,
    experts: Sequence[tuple[int, int]],
    path: Path,
) -> None:
    require_whole(path)
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    with GlobalModelReader(path) as reader:
        for named in named_moe_layers(model):
            layer = named.layer
            rows = {e: row for row, e in enumerate(layer.experts.resident_experts)}
            for expert in (e for la, e in experts if la == named.index):
                for part in layer.experts.parts:
                    value = reader.tensor(expert_key(named.path, expert, part))
                    found.append((layer.experts.part(part)[rows[expert]], value))
                if layer.router_scope == "resident":
                    for part in layer.router.parts:
                        value = reader.tensor(f"{named.path}.router.{part}")[expert]
                        found.append((layer.router.get_parameter(part)[expert], value))
    for target, value in found:
        target.copy_(value)
