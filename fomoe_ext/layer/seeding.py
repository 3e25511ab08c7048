"""Initial weights that depend on nothing but their name: the same bits on every site and device."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def stable_generator(seed: int, *name: str | int) -> torch.Generator:
    """A CPU generator whose stream depends on (seed, name) alone, in any process on any machine.

    `name` says what is drawn, e.g. ("expert", layer, expert). Python's hash() would not do: it
    differs from process to process.
    """
    digest = hashlib.blake2b(repr((seed, *name)).encode(), digest_size=8).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "little") >> 1)


@torch.no_grad()
def fill_normal_(tensor: Tensor, std: float, seed: int, *name: str | int) -> Tensor:
    """Fills `tensor` (any float dtype, any device) with about normal values of deviation `std`.

    The values are drawn in fp32 on the CPU and depend on (seed, name) and the shape alone. A meta
    tensor is left as it is. Each value is the sum of four uniform ones, cut off at 3.46 deviations:
    torch.randn in fp32 gives other bits on CPUs with other vector units, torch.rand does not.
    """
    if tensor.is_meta:
        return tensor
    generator = stable_generator(seed, *name)
    total = torch.full(tensor.shape, -2.0, dtype=torch.float32, device="cpu")
    for _ in range(4):
        total += torch.rand(tensor.shape, generator=generator, dtype=torch.float32, device="cpu")
    return tensor.copy_(total.mul_(std * 3.0**0.5))
