"""What meetings and reshuffles tell of themselves."""

from __future__ import annotations

from typing import NamedTuple

from fomoe_ext.outer.averaging import UNTREATED, Treatment


class RoundReport(NamedTuple):
    """What the meetings of a round cost this site.

    round: counts from 1. bytes_sent and seconds: of `step`, of fragments that arrived since the
    last one and, with "ddp", of all `reduce_gradients` and `clip_grad_norm_`; seconds that the site
    waited, for others too. moments: how many of the two AdamW moments were averaged. exchange_s:
    seconds from the start of exchanges to their end, of which all but `seconds` were hidden behind
    local steps. healed: pieces that had to be restored from the majority. treatment: with
    `clip_delta`, which sites' deltas were scaled down or left out.
    """

    round: int
    bytes_sent: int
    seconds: float
    moments: int
    exchange_s: float
    healed: tuple[str, ...]
    treatment: Treatment = UNTREATED


class ReshuffleReport(NamedTuple):
    """What a reshuffle did: experts that arrived here, as (layer, expert); bytes sent; seconds."""

    arrived: tuple[tuple[int, int], ...]
    bytes_sent: int
    seconds: float
