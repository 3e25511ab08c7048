"""The weights of a checkpoint as plain floats; two quantised formats are dequantised.

FP8 blocks (DeepSeek-V3, Qwen3-MoE-FP8): `NAME` F8_E4M3 [m, n] and `NAME_scale_inv`
[ceil(m / a), ceil(n / b)], with the block size [a, b] in config.json; the value is the product.
MXFP4 (gpt-oss; OCP microscaling formats 1.0): `NAME_blocks` uint8 [..., m, n / 32, 16], two e2m1
values per byte, low nibble first, and `NAME_scales` uint8 [..., m, n / 32]; the value is
e2m1 * 2^(scale - 127), of the transposed matrix.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fomoe_ext.files.tensors import TensorFiles

_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SCALE_DTYPES = (*_PLAIN, getattr(torch, "float8_e8m0fnu", torch.float32))
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SCALE_OF = "_scale_inv"
_BLOCKS, _SCALES = "_blocks", "_scales"
_HOW = "dequantise it with the library that wrote it and save it as bfloat16"


def block_size(config: Any) -> tuple[int, int] | None:
    """Rows and columns of the FP8 blocks according to a transformers configuration; None = no FP8.

    Raises ValueError for a quantisation other than the two supported formats.
    """
    given = getattr(config, "quantization_config", None)
    if given is None:
        return None
    options = given if isinstance(given, dict) else given.to_dict()
    method = getattr(options.get("quant_method"), "value", options.get("quant_method"))
    if method == "mxfp4":
        return None
    if method != "fp8":
        raise ValueError(
            f"quant_method of quantization_config must be 'fp8' (in blocks) or 'mxfp4', got "
            f"{method!r}: {_HOW}"
        )
    for name, known in (
        ("fmt", (None, "e4m3")),
        ("activation_scheme", (None, "dynamic")),
        ("scale_fmt", (None, "float", "ue8m0")),
        ("expert_dtype", (None, "fp8")),
    ):
        if options.get(name) not in known:
            wanted = " or ".join(repr(value) for value in known if value is not None)
            raise ValueError(
                f"{name} of quantization_config must be {wanted}, got {options[name]!r}: {_HOW}"
            )
    size = options.get("weight_block_size")
    whole = isinstance(size, (list, tuple)) and len(size) == 2
    if not whole or not all(type(n) is int and n > 0 for n in size):
        raise ValueError(
            f"weight_block_size of quantization_config must be two numbers, got {size!r}: {_HOW}"
        )
    return size[0], size[1]


def from_fp8_blocks(values: Tensor, scales: Tensor, block: tuple[int, int], name: str) -> Tensor:
    """F8_E4M3 [..., m, n] and the scales of its blocks [..., ceil(m / a), ceil(n / b)] -> fp32.

    Raises ValueError, naming the tensor, for scales of another shape or dtype.
    """
    rows, columns = values.shape[-2:] if values.dim() >= 2 else (0, 0)
    wanted = [*values.shape[:-2], -(-rows // block[0]), -(-columns // block[1])]
    if values.dim() < 2 or list(scales.shape) != wanted or scales.dtype not in _SCALE_DTYPES:
        raise ValueError(
            f"{name}{_SCALE_OF} must be floats of shape {wanted}, one per {block[0]}x{block[1]} "
            f"block of {list(values.shape)}, got {scales.dtype} {list(scales.shape)}"
        )
    scales = scales.float().repeat_interleave(block[0], -2)[..., :rows, :]
    return values.float() * scales.repeat_interleave(block[1], -1)[..., :columns]


def from_mxfp4(blocks: Tensor, scales: Tensor, name: str) -> Tensor:
    """uint8 [..., m, n / 32, 16] and [..., m, n / 32] -> fp32 [..., n, m].

    Raises ValueError, naming the tensor, for other shapes or dtypes and for a scale of 255, which
    means NaN.
    """
    bytes_alone = blocks.dtype == scales.dtype == torch.uint8
    if not bytes_alone or blocks.dim() < 3 or blocks.shape != (*scales.shape, 16):
        raise ValueError(
            f"{name}{_BLOCKS} must be uint8 [..., m, n / 32, 16] and {name}{_SCALES} uint8 "
            f"[..., m, n / 32], got {blocks.dtype} {list(blocks.shape)} and "
            f"{scales.dtype} {list(scales.shape)}"
        )
    if (scales == 255).any():
        raise ValueError(f"{name}{_SCALES} must not have the scale 255, which means NaN")
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    pairs = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    values = torch.ldexp(table[pairs.int()], (scales.int() - 127)[..., None])
    return values.flatten(-2).transpose(-1, -2)


class Weights:
    """A folder's tensors as plain floats on the CPU, by their names in the model."""

    def __init__(self, files: TensorFiles, block: tuple[int, int] | None) -> None:
        """block: as of `block_size`."""
        self.files, self.block = files, block

    def has(self, name: str) -> bool:
        """Whether there is such a tensor, quantised or not."""
        return self.files.has(name) or self.files.has(name + _BLOCKS)

    def read(self, name: str, row: int | None = None) -> Tensor:
        """A tensor or, without reading the others, one row of it.

        Raises ValueError for a tensor that does not exist or is quantised in an unsupported way.
        """
        if not self.files.has(name) and self.files.has(name + _BLOCKS):
            blocks = self.files.read(name + _BLOCKS, row)
            return from_mxfp4(blocks, self.files.read(name + _SCALES, row), name)
        values = self.files.read(name, row)
        scale = name + _SCALE_OF
        if values.dtype in _PLAIN:
            if self.files.has(scale):
                raise ValueError(f"{scale} must not exist, because {name} is {values.dtype}")
            return values
        if values.dtype != torch.float8_e4m3fn:
            raise ValueError(f"{name} must be stored as floats, got {values.dtype}: {_HOW}")
        if self.block is None or not self.files.has(scale):
            missing = (
                "config.json has no quantization_config with quant_method fp8"
                if self.block is None
                else f"there is no tensor {scale}"
            )
            raise ValueError(
                f"{name} is stored as {values.dtype} without its scales: {missing}. {_HOW}"
            )
        return from_fp8_blocks(values, self.files.read(scale, row), self.block, name)

    def require_only(self, names: Iterable[str], ignored: Iterable[str] = ()) -> None:
        """ValueError for a folder with tensors that belong to none of the names.

        ignored: names of tensors that may exist in addition.
        """
        known = {*ignored}
        for name in names:
            if self.files.has(name):
                known |= {name, name + _SCALE_OF}
            else:
                known |= {name + _BLOCKS, name + _SCALES}
        if unknown := sorted(set(self.files.names()) - known):
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            raise ValueError(
                f"{self.files.folder} has tensors that the model of its config.json lacks: "
                f"{', '.join(unknown[:3])}{more}. If it is quantised, {_HOW}"
            )
