"""Rivals: the experts of an MoE layer in plain torch, and by other packages.

All get the same routing, weights and resident experts as `fomoe_ext.ops.moe_experts`, and drop
skipped slots before they compute anything. Letters as in fomoe_ext/layer/moe.py.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


def activate(preact: Tensor, activation: str) -> Tensor:
    """act [rows, N] from preact [rows, G*N]; activation: a name in `fomoe_ext.ops.ACTIVATIONS`."""
    if activation == "clamped_swiglu":
        gate, up = preact.chunk(2, dim=-1)
        gate = gate.clamp(max=7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up.clamp(-7.0, 7.0) + 1)
    if activation in ("swiglu", "geglu"):
        gate, up = preact.chunk(2, dim=-1)
        return up * (F.silu(gate) if activation == "swiglu" else F.gelu(gate, approximate="tanh"))
    if activation == "relu2":
        return F.relu(preact).square()
    return F.silu(preact) if activation == "silu" else F.gelu(preact, approximate="tanh")


# ---- grouped products ----------------------------------------------------------------------------


class Products(Protocol):
    """GEMMs over rows that are grouped by expert; `ends` int32 [R]: where each group ends."""

    def rows(self, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        """rows [rows, in] times the weight of their group, [R, in, out] -> [rows, out]."""
        ...

    def weights(self, left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
        """left [rows, L], right [rows, C] -> [R, L, C]: for each group left^T times right."""
        ...


class LoopProducts:
    """torch.matmul, one expert after the other. Results are compared with this."""

    def rows(self, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return torch.cat([rows[b:e] @ weight[i] for i, (b, e) in enumerate(self._groups(ends))])

    def weights(self, left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
        return torch.stack([left[b:e].T @ right[b:e] for b, e in self._groups(ends)])

    @staticmethod
    def _groups(ends: Tensor) -> list[tuple[int, int]]:
        return list(itertools.pairwise([0, *ends.tolist()]))


class GroupedMM:
    """torch.nn.functional.grouped_mm."""

    def rows(self, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return F.grouped_mm(rows, weight, offs=ends)

    def weights(self, left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
        return F.grouped_mm(left.T, right, offs=ends)


# ---- whole layers --------------------------------------------------------------------------------


def loop_experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    resident_index: Tensor,
    expand_weight: Tensor,
    contract_weight: Tensor,
    activation: str = "swiglu",
    expand_bias: Tensor | None = None,
    contract_bias: Tensor | None = None,
) -> Tensor:
    """A loop over experts, as in the eager MoE blocks of transformers.

    x [T, D], weights fp32 [T, K], experts int32 [T, K], resident_index int32 [E], expand_weight
    [R, G*N, D], contract_weight [R, D, N], biases [R, G*N] and [R, D] or None -> y [T, D] of x's
    dtype.
    """
    y = torch.zeros_like(x)
    rows = resident_index[experts.long()]
    with torch.no_grad():
        hit = torch.bincount(rows[rows >= 0], minlength=expand_weight.shape[0]).nonzero().flatten()
    # unbind, because the gradient of indexing one expert is as large as the whole weight.
    of_each = lambda t: [None] * expand_weight.shape[0] if t is None else t.unbind(0)
    expand, expand_biases = of_each(expand_weight), of_each(expand_bias)
    contract, contract_biases = of_each(contract_weight), of_each(contract_bias)
    for resident in hit.tolist():
        token, slot = torch.where(rows == resident)
        preact = F.linear(x[token], expand[resident], expand_biases[resident])
        act = activate(preact, activation)
        out = F.linear(act, contract[resident], contract_biases[resident])
        y.index_add_(0, token, out * weights[token, slot, None].to(x.dtype))
    return y


def grouped_mm_experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    resident_index: Tensor,
    expand_weight: Tensor,
    contract_weight: Tensor,
    activation: str = "swiglu",
    expand_bias: Tensor | None = None,
    contract_bias: Tensor | None = None,
) -> Tensor:
    """Sort the slots by expert, gather, two `torch.nn.functional.grouped_mm`, weighted sum.

    Arguments and result as `loop_experts`. If all experts are resident, nothing waits for the
    device, and rows are put back into the order of slots and summed. Else it waits for the number
    of rows, so that skipped slots cost nothing, and sums rows with index_add_.
    """
    residents = expand_weight.shape[0]
    complete = residents == resident_index.shape[0]
    with torch.no_grad():
        rows = resident_index[experts.long()].flatten()
        if complete:
            order = torch.argsort(rows, stable=True)
        else:
            kept = torch.nonzero(rows >= 0).flatten()
            order = kept[torch.argsort(rows[kept], stable=True)]
        resident = rows[order]
        each = torch.arange(residents, dtype=resident.dtype, device=rows.device)
        ends = torch.searchsorted(resident, each, right=True).to(torch.int32)
        token = order // experts.shape[1]
    preact = F.grouped_mm(x.index_select(0, token), expand_weight.transpose(1, 2), offs=ends)
    if expand_bias is not None:
        preact = preact + expand_bias.index_select(0, resident)
    act = activate(preact, activation)
    out = F.grouped_mm(act, contract_weight.transpose(1, 2), offs=ends)
    if contract_bias is not None:
        out = out + contract_bias.index_select(0, resident)
    out = out * weights.flatten().index_select(0, order).unsqueeze(1).to(x.dtype)
    if not complete:
        return torch.zeros_like(x).index_add_(0, token, out)
    with torch.no_grad():
        row_of_slot = torch.empty_like(order)
        row_of_slot[order] = torch.arange(order.shape[0], device=order.device)
    return out.index_select(0, row_of_slot).view(*experts.shape, -1).sum(1)


def routed(
    layer: Callable[..., Tensor], router_weight: Tensor, selection_bias: Tensor, top_k: int
) -> Callable[..., Tensor]:
    """`layer` with a router like MoELayer's: sigmoid scores, a selection bias, top-k.

    The returned function takes x, then the arguments of `layer` after `experts`.
    """

    def run(x: Tensor, *arguments: Any) -> Tensor:
        scores = F.linear(x.float(), router_weight.float()).sigmoid()
        experts = (scores.detach() + selection_bias).topk(top_k, dim=1).indices
        return layer(x, scores.gather(1, experts), experts.int(), *arguments)

    return run


# ---- other packages ------------------------------------------------------------------------------

Layer = Callable[..., Tensor]


class Absent(Exception):
    """A rival cannot be measured here; the message says why."""


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # other packages may raise anything
        raise Absent(f"{name} cannot be imported: {type(error).__name__}: {error}"[:200]) from error


def _all_resident_swiglu(resident_index: Tensor, residents: int, activation: str, bias: bool):
    if activation != "swiglu" or bias:
        raise Absent("it only supports SwiGLU without biases")
    if residents != resident_index.shape[0]:
        raise Absent("it needs all experts to be resident")


def transformers_experts(
    resident_index: Tensor,
    expand_weight: Tensor,
    contract_weight: Tensor,
    activation: str,
    bias: bool,
) -> Layer:
    """The eager expert loop of transformers (that of Mixtral) with these weights.

    The returned function takes x, weights, experts. Raises `Absent`.
    """
    residents, hidden, expert = contract_weight.shape
    _all_resident_swiglu(resident_index, residents, activation, bias)
    experts_class = getattr(
        _module("transformers.models.mixtral.modeling_mixtral"), "MixtralExperts", None
    )
    if experts_class is None:
        raise Absent("transformers must be 5.0 or later, got a version without MixtralExperts")
    config = SimpleNamespace(
        num_local_experts=residents,
        hidden_size=hidden,
        intermediate_size=expert,
        hidden_act="silu",
        _experts_implementation="eager",
    )
    with torch.device("meta"):
        block = experts_class(config)
    block.gate_up_proj = torch.nn.Parameter(expand_weight)
    block.down_proj = torch.nn.Parameter(contract_weight)
    parameters = {"gate_up_proj": expand_weight, "down_proj": contract_weight}

    def run(x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        arguments = (x, experts.long(), weights.to(x.dtype))
        return torch.func.functional_call(block, parameters, arguments)

    return run


def liger_experts(
    resident_index: Tensor,
    expand_weight: Tensor,
    contract_weight: Tensor,
    activation: str,
    bias: bool,
) -> Layer:
    """Liger-Kernel's fused MoE in Triton. Arguments and result as `transformers_experts`."""
    _all_resident_swiglu(resident_index, contract_weight.shape[0], activation, bias)
    if not expand_weight.is_cuda:
        raise Absent("it runs on a GPU only")
    function = getattr(_module("liger_kernel.ops.fused_moe"), "LigerFusedMoEFunction", None)
    if function is None:
        raise Absent("the installed liger_kernel has no LigerFusedMoEFunction")
    return lambda x, weights, experts: function.apply(
        x, expand_weight, contract_weight, experts, weights
    )


def sonicmoe_layer(
    router_weight: Tensor, expand_weight: Tensor, contract_weight: Tensor, top_k: int
) -> Callable[[Tensor, bool], Tensor]:
    """SonicMoE's layer: softmax of its own logits, top-k, SwiGLU; all experts are resident.

    router_weight [E, D]; expand_weight [E, 2 N, D], gate and up rows alternating; contract_weight
    [E, D, N]. The returned function takes x and is_inference. Raises `Absent`.
    """
    if not expand_weight.is_cuda:
        raise Absent("it runs on a GPU only")
    layer = getattr(_module("sonicmoe.functional"), "moe_TC_softmax_topk_layer", None)
    if layer is None:
        raise Absent("the installed sonicmoe has no moe_TC_softmax_topk_layer")
    swiglu = _module("sonicmoe.enums").ActivationType.SWIGLU
    expand, contract = expand_weight.permute(1, 2, 0), contract_weight.permute(1, 2, 0)

    def run(x: Tensor, inference: bool) -> Tensor:
        stream = torch.cuda.current_stream().cuda_stream
        weights = (router_weight, expand, None, contract, None)
        return layer(x, *weights, top_k, stream, swiglu, inference)[0]

    return run


OTHERS: dict[str, Callable[..., Layer]] = {
    "transformers": transformers_experts,
    "liger": liger_experts,
}
