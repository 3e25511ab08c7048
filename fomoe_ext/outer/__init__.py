"""The meeting of sites: encode -> reduce -> decode -> apply."""

from __future__ import annotations

from fomoe_ext.outer.codec import Bf16Codec, Codec, Fp32Codec, get_codec
from fomoe_ext.outer.reduce import SiteGroups
from fomoe_ext.outer.sync import MeetingError, OuterSync, ReshuffleReport, RoundReport

__all__ = [
    "Bf16Codec",
    "Codec",
    "Fp32Codec",
    "MeetingError",
    "OuterSync",
    "ReshuffleReport",
    "RoundReport",
    "SiteGroups",
    "get_codec",
]
