"""Buckets whose size is chosen for the model: the same at all sites, and what the plan says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from outer_model import give_gradients
from planned_job import config_of
from sites import pool

from fomoe_ext.config.job import TrainConfig
from fomoe_ext.model.language import LanguageModel
from fomoe_ext.outer import OuterSync, SiteGroups
from fomoe_ext.outer.layout import trained_elements
from fomoe_ext.placement import buckets
from fomoe_ext.plan import traffic as plan
from fomoe_ext.plan.memory import job_memory
from fomoe_ext.plan.sizes import sizes_of
from fomoe_ext.train.job import outer_options

SMALL = {"SMALLEST": 1 << 10, "_BYTES_UNDER_WAY": 1 << 15}
"""So that a model of the tests is a large one."""


def job(codec: str, router_scope: str, **outer: Any) -> TrainConfig:
    return config_of(
        model={
            "vocab_size": 256,
            "hidden_size": 32,
            "num_heads": 2,
            "num_experts": 6,
            "router_scope": router_scope,
        },
        sites={"sites": 3, "replication": 2},
        run={"seed": 3},
        outer={"codec": codec, "in_flight": 2, **outer},
    )


def meet(site: int, num_sites: int, config: TrainConfig) -> tuple[Any, ...]:
    """Bytes of buckets, sent and predicted, and of error feedback; of a round at a site."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(buckets, name, value)
        placement = plan.job_placement(config)
        model = LanguageModel(config.model, placement, site, config.run.seed)
        assert trained_elements(model) == sizes_of(config.model).counts.total
        inner = torch.optim.AdamW(model.parameters(), lr=1e-3)
        groups = SiteGroups(num_sites, site, 20)
        options = outer_options(config)
        sync = OuterSync(model, placement, site, options, inner_optimizer=inner, groups=groups)
        give_gradients(model, site, 0)
        inner.step()
        sync.after_step()
        predicted = sync.predicted_bytes()
        sync.step()
        notes = (num_sites - 1) * plan.NOTE_BYTES
        return (
            sync.options.bucket_bytes,
            plan.bucket_bytes(config),
            (sync.bytes_sent, predicted, plan.meeting_bytes(config, placement, site) - notes),
            (sync.state_bytes()[2], job_memory(config, placement, site).error_feedback),
        )


@pytest.mark.parametrize("scope", ["global", "resident"])
@pytest.mark.parametrize(
    ("codec", "outer"),
    [("int4", {}), ("topk", {}), ("int2", {"optimizer": "local-adamw"})],
)
def test_sites_and_plan_choose_alike(codec: str, outer: dict[str, Any], scope: str) -> None:
    config = job(codec, scope, **outer)
    answers = pool().run(3, meet, config)
    sizes = {size for answer in answers for size in answer[:2]}
    assert len(sizes) == 1 and min(sizes) > SMALL["SMALLEST"]
    for *_, sent, feedback in answers:
        assert len(set(sent)) == 1 and len(set(feedback)) == 1 and feedback[0]


def test_a_given_size_is_kept() -> None:
    config = job("int4", "global", bucket_bytes=4000)
    assert all(answer[:2] == (4000, 4000) for answer in pool().run(3, meet, config))
