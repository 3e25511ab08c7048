"""Validation of the global model, of which no site holds all experts.

All sites run their own validation batches in lockstep. At every MoE layer the holders broadcast all
experts, a few at a time, into one buffer. Every site computes the rows of its tokens that chose
these experts and adds them up, always in the same order. The result is that of a full replica, up
to the order of additions, with memory for a few experts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fomoe_ext import ops
from fomoe_ext.data.sequences import TextData
from fomoe_ext.launch.messages import gather_objects
from fomoe_ext.launch.waiting import wait_for
from fomoe_ext.layer.assemble import (
    NamedLayer,
    global_router_tensors,
    local_tensors,
    named_moe_layers,
    responsible_site,
)
from fomoe_ext.layer.balance import expert_load
from fomoe_ext.layer.mesh import SiteRanks, put_whole
from fomoe_ext.model.language import LanguageModel
from fomoe_ext.placement.placement import Placement

_LOGIT_BYTES = 64 << 20
_MOST_WINDOWS = 64
_PAIR_TOKENS = 1 << 14


class Validation(NamedTuple):
    """Result of a validation; the same on all sites, except for bytes_sent and seconds.

    loss: nats per token. bits_per_byte: of the text. tokens: predicted tokens. load: slots by layer
    and expert, int64 [L, E]. bytes_sent: by this site; a broadcast counts once per receiving site.
    coactivation: number of tokens that chose both of two experts, int64 [L, E, E], or None unless
    asked for.
    """

    loss: float
    bits_per_byte: float
    tokens: int
    load: Tensor
    bytes_sent: int
    seconds: float
    coactivation: Tensor | None = None


class ExpertStream:
    """Computes an MoE layer of the global model with experts that their holders broadcast.

    Besides a site's own experts, at most `buffer_bytes` of weights (at least one expert) are in
    memory.
    """

    def __init__(
        self,
        placement: Placement,
        site: int,
        buffer_bytes: int = 32 << 20,
        ranks: SiteRanks | None = None,
        holders: Sequence[Sequence[Mapping[int, int]]] | None = None,
        coactivation: bool = False,
    ) -> None:
        """holders: for each site and layer, the rank that holds each expert; None = rank 0.
        coactivation: count which experts are chosen by the same token.
        """
        self.placement, self.site, self.buffer_bytes = placement, site, buffer_bytes
        self.ranks, self._holders = ranks or SiteRanks(), holders
        self.bytes_sent = 0
        self.load = torch.zeros(placement.num_layers, placement.num_experts, dtype=torch.int64)
        self.coactivation: Tensor | None = None
        if coactivation:
            self.coactivation = self.load.new_zeros(*self.load.shape, placement.num_experts)

    def forward(self, named: NamedLayer, x: Tensor) -> Tensor:
        """x [..., D] -> the output of the layer with all experts. A collective of all sites."""
        layer = named.layer
        tokens = x.reshape(-1, layer.hidden_size).contiguous()
        weights, chosen = layer.router.choose(layer.router.logits(tokens), None, layer.top_k)
        self.load[named.index] += expert_load(chosen, layer.num_experts).cpu()
        if self.coactivation is not None:
            self.coactivation[named.index] += pair_counts(chosen, layer.num_experts).cpu()
        if torch.is_autocast_enabled(x.device.type):
            inputs = tokens.to(torch.get_autocast_dtype(x.device.type))
        else:
            inputs = tokens
        y = torch.zeros_like(inputs)
        for experts, parts in self._experts(named):
            index = torch.full((layer.num_experts,), -1, dtype=torch.int32)
            index[experts] = torch.arange(len(experts), dtype=torch.int32)
            table = ops.compact(chosen, index.to(x.device), len(experts))
            y += ops.moe_experts(
                inputs,
                weights,
                table,
                activation=layer.experts.activation,
                **{name: part.to(inputs.dtype) for name, part in parts.items()},
            )
        if layer.shared_expert is not None:
            y = y + layer.shared_expert(tokens)
        return y.view(x.shape)

    def _experts(self, named: NamedLayer) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """All experts of the layer in chunks: ids, and `Experts.parts` [C, ...] by name."""
        experts = named.layer.experts
        shapes = {name: experts.part(name).shape[1:] for name in experts.parts}
        one = sum(shape.numel() for shape in shapes.values()) * experts.expand_weight.element_size()
        size = max(1, min(self.placement.num_experts, self.buffer_bytes // one))
        everywhere = self.placement.all_resident
        senders = [self._sender(named.index, e, everywhere) for e in range(experts.num_experts)]
        me = self.site, self.ranks.rank
        order = sorted(range(experts.num_experts), key=lambda e: (senders[e], e))
        new = experts.expand_weight.new_empty
        buffers = {name: new(size, *shape) for name, shape in shapes.items()}
        for start in range(0, len(order), size):
            ids = order[start : start + size]
            chunk = {name: buffer[: len(ids)] for name, buffer in buffers.items()}
            for row, expert in enumerate(ids):
                if senders[expert] == me:
                    sources = experts.expert_weights(expert)
                    for target, source in zip(chunk.values(), sources, strict=True):
                        target[row].copy_(source)
            self._broadcast([senders[e] for e in ids], everywhere, *chunk.values())
            yield ids, chunk

    def _sender(self, layer: int, expert: int, everywhere: bool) -> tuple[int, int]:
        """The site and rank that broadcast an expert; every site itself if all sites hold all."""
        site = self.site if everywhere else responsible_site(self.placement, layer, expert)
        return site, 0 if self._holders is None else self._holders[site][layer][expert]

    def _broadcast(
        self, senders: list[tuple[int, int]], everywhere: bool, *buffers: Tensor
    ) -> None:
        """Sends the rows of the buffers from their senders (ascending) to all sites and ranks."""
        for sender in sorted(set(senders)):
            first, count = senders.index(sender), senders.count(sender)
            site, rank = sender
            for buffer in buffers:
                rows = buffer[first : first + count]
                if not everywhere and rank == self.ranks.rank:
                    across = self.ranks.across
                    wait_for(dist.broadcast(rows, group=across, group_src=site, async_op=True))
                    if site == self.site:
                        self.bytes_sent += rows.nbytes * (self.placement.num_sites - 1)
                self.ranks.broadcast_(rows, rank)


def pair_counts(chosen: Tensor, num_experts: int) -> Tensor:
    """The number of tokens that chose both of two experts, int64 [E, E]; on the diagonal those that
    chose the one. chosen: int32 [T, K], distinct in each row.
    """
    counts = torch.zeros(num_experts, num_experts, dtype=torch.int64, device=chosen.device)
    for some in chosen.long().split(_PAIR_TOKENS):
        # Counts below 2^24 are exact in fp32.
        hot = torch.zeros(some.shape[0], num_experts, device=chosen.device).scatter_(1, some, 1.0)
        with torch.autocast(chosen.device.type, enabled=False):
            counts += (hot.T @ hot).long()
    return counts


@contextmanager
def global_experts(
    model: LanguageModel,
    placement: Placement,
    site: int,
    buffer_bytes: int = 32 << 20,
    ranks: SiteRanks | None = None,
    coactivation: bool = False,
) -> Iterator[ExpertStream]:
    """A context in which the model's forward is that of the global model, for inference. All
    processes must run the same number of passes in it.

    The routers have the rows of the global model meanwhile, also with router_scope "resident". The
    layers' `stats` and `aux_loss` stay as they were.
    """
    layers = named_moe_layers(model)
    ranks = ranks or SiteRanks(None, placement.num_sites, site)
    holders = None if ranks.size == 1 else _holders(layers, ranks)
    stream = ExpertStream(placement, site, buffer_bytes, ranks, holders, coactivation)
    own = local_tensors(model)
    routers = global_router_tensors(model, placement, site, own, ranks.rank)
    saved = {key: own[key].clone() for key in routers}
    try:
        for key, value in routers.items():
            put_whole(own[key], value)
        for named in layers:
            named.layer.forward = partial(stream.forward, named)  # type: ignore[method-assign]
        yield stream
    finally:
        for named in layers:
            named.layer.__dict__.pop("forward", None)
        for key, value in saved.items():
            own[key].copy_(value)


def _holders(layers: Sequence[NamedLayer], ranks: SiteRanks) -> list[list[dict[int, int]]]:
    """For each site and layer, the first rank of the site that holds each expert; a collective."""
    mine = [named.layer.experts.resident_experts for named in layers]
    everyone = gather_objects(mine, ranks.num_sites * ranks.size)
    result: list[list[dict[int, int]]] = []
    for site in range(ranks.num_sites):
        of_site = everyone[site * ranks.size : (site + 1) * ranks.size]
        first = [
            {e: rank for rank in reversed(range(ranks.size)) for e in of_site[rank][layer]}
            for layer in range(len(layers))
        ]
        result.append(first)
    return result


def _sum_over_processes(values: list[Tensor], processes: int) -> None:
    for value in values if processes > 1 else ():
        wait_for(dist.all_reduce(value, async_op=True))


def validation_batch_size(model: LanguageModel) -> int:
    """Windows per validation batch for which the logits take at most 64 MiB."""
    config = model.config
    one = 4 * config.vocab_size * config.seq_len
    return max(1, min(_MOST_WINDOWS, _LOGIT_BYTES // one))


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    data: TextData,
    placement: Placement,
    site: int,
    *,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    autocast: torch.dtype | None = None,
    buffer_bytes: int = 32 << 20,
    ranks: SiteRanks | None = None,
    coactivation: bool = False,
) -> Validation:
    """Cross entropy of the global model on the validation text; a collective of all processes.

    `max_tokens` limits the tokens of all sites together (None = all), `batch_size` is in windows
    per process (None = `validation_batch_size`), `autocast` is the dtype of matrix products,
    `ranks` are those of this site (None = one), `coactivation` says whether to count which experts
    are chosen by the same token.
    """
    start = time.perf_counter()
    ranks, device = ranks or SiteRanks(None, placement.num_sites, site), model.embedding.device
    process, processes = site * ranks.size + ranks.rank, placement.num_sites * ranks.size
    size = batch_size or validation_batch_size(model)
    share = data.val_batches(size, site=process, num_sites=processes, max_tokens=max_tokens)
    batches = list(share)
    most = torch.tensor(len(batches))
    if processes > 1:
        wait_for(dist.all_reduce(most, dist.ReduceOp.MAX, async_op=True))
    # A site without text left takes part with a dummy token that is not counted.
    idle = [torch.zeros(1, 2, dtype=torch.int64)] * (int(most) - len(batches))
    totals = torch.zeros(2, dtype=torch.float64)
    training = model.training
    model.eval()
    try:
        with global_experts(model, placement, site, buffer_bytes, ranks, coactivation) as stream:
            for batch in batches:
                nats = _nats(model, batch.to(device), autocast)
                totals += torch.tensor([nats, batch[:, 1:].numel()], dtype=torch.float64)
            counts = [stream.load.clone()]
            if stream.coactivation is not None:
                counts.append(stream.coactivation.clone())
            for batch in idle:
                _nats(model, batch.to(device), autocast)
    finally:
        model.train(training)
    _sum_over_processes([totals, *counts], processes)
    loss = float(totals[0] / totals[1])
    return Validation(
        loss=loss,
        bits_per_byte=data.bits_per_byte(loss),
        tokens=int(totals[1]),
        load=counts[0],
        bytes_sent=stream.bytes_sent,
        seconds=time.perf_counter() - start,
        coactivation=counts[1] if coactivation else None,
    )


def _nats(model: LanguageModel, tokens: Tensor, autocast: torch.dtype | None) -> float:
    """Sum of the cross entropy over all predicted tokens of [B, L + 1], in nats."""
    enabled = autocast is not None
    with torch.autocast(tokens.device.type, dtype=autocast, enabled=enabled):
        logits = model(tokens[:, :-1])
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
    )
    return float(losses.double().sum())
