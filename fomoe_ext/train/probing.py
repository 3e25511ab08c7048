"""The routing probe of a job: how stable routing is from meeting to meeting (run.probe_tokens)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from fomoe_ext.launch.messages import gather_objects
from fomoe_ext.launch.world import with_others
from fomoe_ext.layer.routing_probe import RoutingProbe, figures, pack, unpack
from fomoe_ext.train.state import SiteState


class SiteProbe:
    """A site's probe; its time counts as validation, not as training."""

    def __init__(self, site: SiteState) -> None:
        """Takes its tokens from the validation text; they are the same at all sites."""
        self._site = site
        seq_len = site.config.model.seq_len
        windows = max(1, site.config.run.probe_tokens // seq_len)
        batch = next(iter(site.data.val_batches(windows, max_tokens=windows * seq_len)))
        tokens = batch[:, :-1].to(site.device)
        self._probe = RoutingProbe(site.model, site.model.moe_layers(), tokens)

    def before_meeting(self) -> None:
        """Records which experts the site's own model chooses; a collective of its ranks."""
        with self._counted():
            self._probe.before_meeting()

    def after_meeting(self) -> None:
        """Compares with the averaged model; sets `site.routing` to the figures of all sites.

        A collective.
        """
        site = self._site
        with self._counted(), with_others("the routing probe", site.world.site):
            mine = pack(self._probe.after_meeting())
            parts = gather_objects(mine, site.world.processes)[:: site.world.ranks]
            site.routing = figures([*map(unpack, parts)], site.config.model.num_experts)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._site.tally.validation_s += time.perf_counter() - start
