"""Validation of the global model during a job."""

from __future__ import annotations

import torch

from fomoe_ext.launch.world import with_others
from fomoe_ext.model.evaluate import Validation, evaluate
from fomoe_ext.placement.coactivation import is_small
from fomoe_ext.train.state import SiteState


@torch.no_grad()
def validate(site: SiteState, max_tokens: int) -> Validation:
    """Validation of the global model, counted; a collective."""
    model, tally = site.config.model, site.tally
    what = f"the validation after round {site.round}"
    explained = site.course.explained(site.round, None)
    with explained, site.global_model(), with_others(what, site.world.site):
        result = evaluate(
            site.model,
            site.data,
            site.placement,
            site.world.site,
            max_tokens=max_tokens,
            autocast=site.autocast,
            ranks=site.sync.ranks,
            coactivation=site.config.run.coactivation
            or is_small(model.num_layers, model.num_experts),
        )
    tally.validation_s += result.seconds
    tally.validation_bytes += result.bytes_sent
    if tally.first_validation is None:
        tally.first_validation = {
            "round": site.round,
            "loss": result.loss,
            "bits_per_byte": result.bits_per_byte,
        }
    return result
