"""A small MoELayer, tokens for it, and its definition: every expert on every token, in fp64."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fomoe_ext.layer.moe import MoELayer

# Normalised error allowed: two roundings of the storage type.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def make(**changes: Any) -> MoELayer:
    """A small layer of uneven sizes."""
    options: dict[str, Any] = {
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_experts": 6,
        "top_k": 3,
    }
    return MoELayer(**(options | {"seed": 7, "layer_index": 1} | changes))


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def normalised_error(got: Tensor, wanted: Tensor) -> float:
    """RMS of the difference over the RMS of the wanted values."""
    assert got.shape == wanted.shape
    got, wanted = got.detach().double(), wanted.detach().double()
    return ((got - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


def activate(preact: Tensor, activation: str) -> Tensor:
    if activation == "clamped_swiglu":
        gate, up = preact.chunk(2, dim=-1)
        gate, up = gate.clamp(max=7), up.clamp(-7, 7)
        return (up + 1) * gate * torch.sigmoid(gate * 1.702)
    if activation in ("swiglu", "geglu"):
        gate, up = preact.chunk(2, dim=-1)
        return (F.silu(gate) if activation == "swiglu" else F.gelu(gate, approximate="tanh")) * up
    if activation == "relu2":
        return F.relu(preact) ** 2
    return F.silu(preact) if activation == "silu" else F.gelu(preact, approximate="tanh")


def dense_layer(layer: MoELayer, x: Tensor, params: dict[str, Tensor], logits: Tensor) -> Tensor:
    """The layer's definition with every expert computed on every token, in the dtype of `params`.

    The choice is that of `logits` (the layer's own fp32 ones, as rounding could change it); the
    combine weights are of logits in the precision of everything else.
    """
    router, experts, residents = layer.router, layer.experts, layer.experts.resident_experts
    own = x @ params["router.weight"].T
    barred = torch.zeros(router.num_experts, dtype=torch.bool)
    if layer.router_scope == "resident":
        barred = torch.tensor([e not in residents for e in range(router.num_experts)])

    def score(z: Tensor) -> Tensor:
        z = z.masked_fill(barred, float("-inf"))
        return z.sigmoid() if router.scoring == "sigmoid" else z.softmax(dim=-1)

    choice = (score(logits) + router.selection_bias).masked_fill(barred, -1.0)
    top_k = min(router.top_k, len(residents)) if layer.router_scope == "resident" else router.top_k
    chosen = choice.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    gates = score(own).gather(1, chosen)
    if router.renormalize:
        gates = gates / gates.sum(dim=-1, keepdim=True)
    gates = torch.zeros_like(own).scatter(1, chosen, gates * router.scale)
    y = torch.zeros_like(x)
    for row, expert in enumerate(residents):
        preact = x @ params["experts.expand_weight"][row].T
        if experts.expand_bias is not None:
            preact = preact + params["experts.expand_bias"][row]
        out = activate(preact, experts.activation) @ params["experts.contract_weight"][row].T
        if experts.contract_bias is not None:
            out = out + params["experts.contract_bias"][row]
        y = y + gates[:, expert, None] * out
    if layer.shared_expert is not None:
        act = activate(x @ params["shared_expert.expand.weight"].T, experts.activation)
        y = y + act @ params["shared_expert.contract.weight"].T
    return y


def check_against_dense(layer: MoELayer, x: Tensor) -> None:
    """Forward and all gradients of the layer within rounding of the fp64 definition."""
    x = x.clone().requires_grad_()
    grad_y = tokens(*x.shape, seed=99, dtype=x.dtype)
    y = layer(x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    y.backward(grad_y)
    params = {n: p.detach().double().requires_grad_() for n, p in layer.named_parameters()}
    exact_x = x.detach().double().requires_grad_()
    with torch.no_grad():
        logits = layer.router.logits(x.reshape(-1, x.shape[-1]))
    wanted = dense_layer(layer, exact_x.reshape(-1, x.shape[-1]), params, logits).view(x.shape)
    wanted.backward(grad_y.double())
    limit = TOLERANCE[x.dtype]
    assert normalised_error(y, wanted) < limit
    assert normalised_error(x.grad, exact_x.grad) < limit
    for name, parameter in layer.named_parameters():
        exact = params[name].grad
        exact = torch.zeros_like(params[name]) if exact is None else exact
        assert normalised_error(parameter.grad, exact) < limit, name
