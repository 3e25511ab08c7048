"""The meeting of sites: encode -> reduce -> decode -> apply."""

from __future__ import annotations

from fomoe_ext.outer.codec import Codec, get_codec
from fomoe_ext.outer.groups import SiteGroups
from fomoe_ext.outer.options import MeetingError, OuterOptions
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
