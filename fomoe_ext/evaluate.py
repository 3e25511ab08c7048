"""Validation of the global model, of which no site holds all experts.

All sites go through their own validation batches in lockstep. At every MoE layer the experts come
by: a few at a time are broadcast from a holder into one buffer, every site computes the rows of its
own tokens that chose them and adds them up, always in the same order. So the result is that of a
full replica (up to the order of additions), with memory for a few experts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fomoe_ext import ops
from fomoe_ext.assemble import (
    NamedLayer,
    global_router_tensors,
    local_tensors,
    named_moe_layers,
    responsible_site,
)
from fomoe_ext.balance import expert_load
from fomoe_ext.data import TextData
from fomoe_ext.model import LanguageModel
from fomoe_ext.placement import Placement

_LOGIT_BYTES = 64 << 20
_MOST_WINDOWS = 64


class Validation(NamedTuple):
    """Result of a validation, equal on all sites but for the bytes.

    loss: nats per token. bits_per_byte: of text. tokens: predicted. load: slots per layer and
    expert, int64 [L, E]. bytes_sent: by this site; a broadcast's payload counts once per receiver.
    """

    loss: float
    bits_per_byte: float
    tokens: int
    load: Tensor
    bytes_sent: int
    seconds: float


class ExpertStream:
    """Computes an MoE layer of the global model by letting all experts of the layer come by.

    Besides a site's own experts at most `buffer_bytes` of weights (at least one expert) are held.
    """

    def __init__(self, placement: Placement, site: int, buffer_bytes: int = 32 << 20) -> None:
        self.placement, self.site, self.buffer_bytes = placement, site, buffer_bytes
        self.bytes_sent = 0
        self.load = torch.zeros(placement.num_layers, placement.num_experts, dtype=torch.int64)

    def forward(self, named: NamedLayer, x: Tensor) -> Tensor:
        """x [..., D] -> the layer's output with every expert present. A collective of all sites."""
        layer = named.layer
        tokens = x.reshape(-1, layer.hidden_size).contiguous()
        weights, chosen = layer.router.choose(layer.router.logits(tokens), None, layer.top_k)
        self.load[named.index] += expert_load(chosen, layer.num_experts).cpu()
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
        senders = [
            responsible_site(self.placement, named.index, e) for e in range(experts.num_experts)
        ]
        order = sorted(range(experts.num_experts), key=lambda e: (senders[e], e))
        new = experts.expand_weight.new_empty
        buffers = {name: new(size, *shape) for name, shape in shapes.items()}
        for start in range(0, len(order), size):
            ids = order[start : start + size]
            chunk = {name: buffer[: len(ids)] for name, buffer in buffers.items()}
            everywhere = self.placement.replication == self.placement.num_sites
            for row, expert in enumerate(ids):
                if everywhere or senders[expert] == self.site:
                    sources = experts.expert_weights(expert)
                    for target, source in zip(chunk.values(), sources, strict=True):
                        target[row].copy_(source)
            if not everywhere:
                self._broadcast([senders[e] for e in ids], *chunk.values())
            yield ids, chunk

    def _broadcast(self, senders: list[int], *buffers: Tensor) -> None:
        """Send the rows of the buffers from their senders (ascending) to all sites."""
        for sender in sorted(set(senders)):
            first, count = senders.index(sender), senders.count(sender)
            for buffer in buffers:
                rows = buffer[first : first + count]
                dist.broadcast(rows, src=sender)
                if sender == self.site:
                    self.bytes_sent += rows.nbytes * (self.placement.num_sites - 1)


@contextmanager
def global_experts(
    model: LanguageModel, placement: Placement, site: int, buffer_bytes: int = 32 << 20
) -> Iterator[ExpertStream]:
    """Inside, the model's forward is that of the global model; all sites must call it in lockstep.

    The routers hold the global rows meanwhile, also with router_scope "resident". Only for
    inference: the layers' `stats` and `aux_loss` are left as they were.
    """
    layers = named_moe_layers(model)
    stream = ExpertStream(placement, site, buffer_bytes)
    own = local_tensors(model)
    routers = global_router_tensors(model, placement, site, own)
    saved = {key: own[key].clone() for key in routers}
    try:
        for key, value in routers.items():
            own[key].copy_(value)
        for named in layers:
            named.layer.forward = partial(stream.forward, named)  # type: ignore[method-assign]
        yield stream
    finally:
        for named in layers:
            named.layer.__dict__.pop("forward", None)
        for key, value in saved.items():
            own[key].copy_(value)


def _sum_over_sites(values: list[Tensor], num_sites: int) -> None:
    for value in values if num_sites > 1 else ():
        dist.all_reduce(value)


def validation_batch_size(model: LanguageModel) -> int:
    """Windows per validation batch such that the logits stay below 64 MiB."""
    config = model.config
    one = 4 * config.vocab_size * config.seq_len
    return max(1, min(_MOST_WINDOWS, _LOGIT_BYTES // one))


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    data: TextData,
    placement: Placement,
    site: int = 0,
    *,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    autocast: torch.dtype | None = None,
    buffer_bytes: int = 32 << 20,
) -> Validation:
    """Cross entropy of the global model on the validation text; a collective of all sites.

    `max_tokens` limits the tokens of all sites together (None = all), `batch_size` is in windows
    per site (None = `validation_batch_size`), `autocast` is the dtype of matrix products.
    """
    start = time.perf_counter()
    num_sites, device = placement.num_sites, model.embedding.device
    batches = list(
        data.val_batches(
            batch_size or validation_batch_size(model), site, num_sites, max_tokens=max_tokens
        )
    )
    most = torch.tensor(len(batches))
    if num_sites > 1:
        dist.all_reduce(most, dist.ReduceOp.MAX)
    # A site that has run out of text still takes part, with a token that does not count.
    idle = [torch.zeros(1, 2, dtype=torch.int64)] * (int(most) - len(batches))
    totals = torch.zeros(2, dtype=torch.float64)
    training = model.training
    model.eval()
    try:
        with global_experts(model, placement, site, buffer_bytes) as stream:
            for batch in batches:
                nats = _nats(model, batch.to(device), autocast)
                totals += torch.tensor([nats, batch[:, 1:].numel()], dtype=torch.float64)
            own_load = stream.load.clone()
            for batch in idle:
                _nats(model, batch.to(device), autocast)
    finally:
        model.train(training)
    _sum_over_sites([totals, own_load], num_sites)
    loss = float(totals[0] / totals[1])
    return Validation(
        loss=loss,
        bits_per_byte=data.bits_per_byte(loss),
        tokens=int(totals[1]),
        load=own_load,
        bytes_sent=stream.bytes_sent,
        seconds=time.perf_counter() - start,
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
