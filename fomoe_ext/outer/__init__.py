"""The meeting of sites: check, announce, encode, exchange, apply, verify (`meeting`).

`sync.OuterSync` is the interface of this folder. The modules below it do not import it: they
receive the parts they need. The folder may import layer, config, placement, launch
and ops. It must not know of the language model, checkpoints, `fomoe train`, or
sites that come and go.

    who meets        site, members (tensors), groups (owner groups, connections), options
    what travels     layout, model_layout, shards (of several ranks), turns (experts in turns), jobs
    as bytes         codec, reduce (buckets under way)
    what is kept     state (anchor, momentum, error feedback), inner_state, state_dict, belongings
    one meeting      meeting: announce and census before, agreement after it; driver holds it at
                     once, staged in two phases, flight during local steps (background), how many
                     of them: overlap; errors
    what a mean is   averaging, optimizer, gradients (ddp)
    what is counted  step_count, steps (hooks that see them), routed (tokens), log, reports
    besides          beginning (all alike), reshuffle, warmup (of moved experts), stale (copies)
"""

from __future__ import annotations

from fomoe_ext.outer.codec import Codec, get_codec
from fomoe_ext.outer.errors import MeetingError, MeetingLost
from fomoe_ext.outer.groups import SiteGroups
from fomoe_ext.outer.options import OuterOptions
from fomoe_ext.outer.reports import ReshuffleReport, RoundReport
from fomoe_ext.outer.sync import OuterSync

__all__ = [
    "Codec",
    "MeetingError",
    "MeetingLost",
    "OuterOptions",
    "OuterSync",
    "ReshuffleReport",
    "RoundReport",
    "SiteGroups",
    "get_codec",
]
