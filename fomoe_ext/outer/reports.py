"""The reports that meetings and reshuffles return."""

from __future__ import annotations

from typing import NamedTuple

from fomoe_ext.outer.averaging import UNTREATED, Treatment


class RoundReport(NamedTuple):
    """What the meetings of a round cost this site.

    round: number of the round, from 1. bytes_sent: bytes sent by `step`, by fragments that arrived
    since the last report and, with "ddp", by all averages and clippings of gradients. seconds: time
    that local steps were held up by these, including waiting for other sites. exchange_s: seconds
    from the start of exchanges to their end; what exceeds `seconds` was hidden behind local steps.
    moments: how many of the two AdamW moments were averaged. healed: names of the pieces that were
    restored from the majority. treatment: with `clip_delta`, the sites whose deltas were scaled
    down or left out.
    """

    round: int
    bytes_sent: int
    seconds: float
    moments: int
    exchange_s: float
    healed: tuple[str, ...]
    treatment: Treatment = UNTREATED


class ReshuffleReport(NamedTuple):
    """What a reshuffle did: the experts (layer, expert) that arrived at this site, the bytes that
    it sent, and the seconds it took."""

    arrived: tuple[tuple[int, int], ...]
    bytes_sent: int
    seconds: float
