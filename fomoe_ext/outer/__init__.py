"""The meeting of sites: check, announce, encode, exchange, apply, verify (`meeting`).

`sync.OuterSync` is the face of the folder, and no module below it knows it: they are handed the
parts that they need. It may import layer, placement, launch and ops; it must not know of the
language model, of checkpoints, of `fomoe train`, or of sites that come and go.

    who meets        site, members (what takes part), groups (owner groups, connections), options
    what travels     layout, model_layout, shards (of several ranks), turns (experts in turns), jobs
    as bytes         codec, reduce (buckets on their way)
    what is kept     state (anchor, momentum, error feedback), inner_state, state_dict, belongings
    one meeting      meeting: announce and census before, agreement after it; driver holds it at
                     once, staged all or nothing, flight behind local steps (background), how many
                     of them: overlap; errors
    what a mean is   averaging, optimizer, gradients (ddp)
    what is counted  step_count, steps (hooks that see them), routed (tokens), log, reports
    besides          beginning (all alike), reshuffle, warmup (of moved experts), stale (copies)
"""

from __future__ import annotations

from fomoe_ext.outer.codec import Codec, get_codec
from fomoe_ext.outer.errors import MeetingError
from fomoe_ext.outer.groups import SiteGroups
from fomoe_ext.outer.options import OuterOptions
from fomoe_ext.outer.reports import ReshuffleReport, RoundReport
from fomoe_ext.outer.sync import OuterSync

__all__ = [
    "Codec",
    "MeetingError",
    "OuterOptions",
    "OuterSync",
    "ReshuffleReport",
    "RoundReport",
    "SiteGroups",
    "get_codec",
]
