"""A job of `run_jobs` that sums a vector, and the vectors of sites."""

from __future__ import annotations

from typing import Any

import torch
from outer_model import noise
from torch import Tensor

from fomoe_ext.outer.codec import get_codec


class VectorJob:
    """A job that sums a vector and marks what it has read and written."""

    def __init__(self, group: Any, codec: str, vector: Tensor, summed: bool = True) -> None:
        self.group, self.codec, self.summed = group, get_codec(codec), summed
        self.vector, self.numel = vector, vector.numel()
        self.device, self.seed, self.share_error = vector.device, 0, None
        self.result = torch.full_like(vector, float("nan"))
        self.reads, self.writes = torch.zeros(self.numel), torch.zeros(self.numel)

    def position(self, element: int) -> int:
        return element

    def encode(self, start: int, stop: int, payload: Tensor) -> None:
        payload.copy_(self.codec.encode(self.vector[start:stop]))
        self.reads[start:stop] += 1

    def values(self, start: int, stop: int) -> Tensor:
        self.reads[start:stop] += 1
        return self.vector[start:stop].clone()

    def write(self, start: int, stop: int, total: Tensor) -> None:
        assert total.shape == (stop - start,)
        self.result[start:stop] = total
        self.writes[start:stop] += 1


def contribution(owners: tuple[int, ...], site: int, numel: int) -> Tensor:
    return noise(("vector", owners, site), numel)
