"""A layer whose experts are sharded over ranks: a pass on one rank, and the same in one process."""

from __future__ import annotations

from typing import Any

import torch
from small_layer import make, normalised_error, tokens
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fomoe_ext.layer.dispatch import average_dense, average_replicas
from fomoe_ext.layer.moe import MoELayer

HIDDEN = 24
# fp32: another order of summation. bf16: rounding of outputs and gradients.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
Options = dict[str, Any]


def mesh_of(*shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("replica", "expert")[-len(shape) :])


def parts(sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Tokens of each rank."""
    return [tokens(size, HIDDEN, seed=rank, dtype=dtype) for rank, size in enumerate(sizes)]


def own_loss(y: Tensor, rank: int) -> Tensor:
    """The loss of a rank: different on each, 0 without tokens."""
    return (y.float() * tokens(*y.shape, seed=100 + rank)).sum()


def gradients(layer: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}


def on_a_rank(
    rank: int, ranks: int, sizes: tuple[int, ...], options: Options, shape: tuple[int, ...]
) -> dict[str, Any]:
    """Forward and backward of one rank's tokens; dense gradients averaged as DDP would."""
    # Uninitialised memory is filled with NaN: none of it may reach a result.
    torch.use_deterministic_algorithms(True)
    mesh = mesh_of(*shape)
    layer = make(mesh=mesh, **options)
    assert layer.dispatch is not None
    x = parts(sizes, options.get("dtype", torch.float32))[rank].requires_grad_()
    y = layer(x)
    own_loss(y, rank).backward()
    average_dense(layer, mesh)
    if "replica" in mesh.mesh_dim_names:
        average_replicas(layer, mesh)
    torch.use_deterministic_algorithms(False)
    return {
        "y": y.detach().float(),
        "x.grad": x.grad.float(),
        "gradients": {name: grad.float() for name, grad in gradients(layer).items()},
        "experts": layer.experts.resident_experts,
        "site_experts": layer.site_experts,
        "stats": layer.stats,
        "bytes_sent": layer.dispatch.bytes_sent,
        "rank": mesh.get_local_rank("expert"),
    }


def alone(sizes: tuple[int, ...], options: Options) -> tuple[MoELayer, Tensor, list[Tensor]]:
    """One process on the tokens of all ranks, with the mean of their losses. Returns the layer, the
    gradient of x times the number of ranks, and y by rank.
    """
    layer = make(**options)
    x = torch.cat(parts(sizes, options.get("dtype", torch.float32))).requires_grad_()
    ys = layer(x).split(sizes)
    sum(own_loss(y, rank) for rank, y in enumerate(ys)).div(len(sizes)).backward()
    return layer, x.grad * len(sizes), [y.detach() for y in ys]


def assert_as_alone(
    answers: list[dict[str, Any]], sizes: tuple[int, ...], options: Options
) -> None:
    layer, x_grad, ys = alone(sizes, options)
    limit = TOLERANCE[options.get("dtype", torch.float32)]
    wanted = gradients(layer)
    site = layer.experts.resident_experts
    for answer, y, grad in zip(answers, ys, x_grad.split(sizes), strict=True):
        assert answer["site_experts"] == site
        assert normalised_error(answer["y"], y) < limit
        assert normalised_error(answer["x.grad"], grad) < limit
        assert answer["gradients"].keys() == wanted.keys()
        rows = [site.index(expert) for expert in answer["experts"]]
        for name, got in answer["gradients"].items():
            whole = wanted[name]
            if name.startswith("experts."):
                whole = whole[rows]
            assert normalised_error(got, whole) < limit, name


def message(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
