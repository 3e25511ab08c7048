"""The meeting of sites: check, announce, encode, exchange, apply, verify (`meeting`).

`sync.OuterSync` is the face of the folder, and no module below it knows it: they are handed the
parts that they need. It may import layer, placement, launch and ops; it must not know of the
language model, of checkpoints, of `fomoe train`, or of sites that come and go.
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
