"""Initial weights that depend only on a seed and a name: the same bits on every site and device."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def stable_generator(seed: int, *name: str | int) -> torch.Generator:
    """A CPU generator whose stream depends only on (seed, name), in any process on any machine.

    `name` says what is drawn, e.g. ("expert", layer, expert). It is hashed by blake2b, because
    Python's hash() differs between processes.
    """
    digest = hashlib.blake2b(repr((seed, *name)).encode(), digest_size=8).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "little") >> 1)


@torch.no_grad()
def fill_normal_(tensor: Tensor, std: float, seed: int, *name: str | int) -> Tensor:
    """Fills `tensor` (any float dtype, any device) with nearly normal values of deviation `std`.

    The values are drawn in fp32 on the CPU and depend only on (seed, name) and the shape. Each is a
    sum of four uniform ones, so at most 3.46 deviations large: the bits of torch.randn in fp32
    depend on the vector units of the CPU, those of torch.rand do not. A meta tensor is unchanged.
    """
    if tensor.is_meta:
        return tensor
    generator = stable_generator(seed, *name)
    total = torch.full(tensor.shape, -2.0, dtype=torch.float32, device="cpu")
    for _ in range(4):
        total += torch.rand(tensor.shape, generator=generator, dtype=torch.float32, device="cpu")
    return tensor.copy_(total.mul_(std * 3.0**0.5))
