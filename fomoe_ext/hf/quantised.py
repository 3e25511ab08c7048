"""The weights of a checkpoint as plain floats: quantised ones are worked out, or refused by name.

Known are two formats whose files say all that it takes. Blocks of FP8 (DeepSeek-V3, Qwen3-MoE-FP8):
`NAME` F8_E4M3 [m, n] beside `NAME_scale_inv` [ceil(m / a), ceil(n / b)], where config.json has the
blocks' size [a, b]; the value is the product. MXFP4 (gpt-oss; the OCP's microscaling formats 1.0):
`NAME_blocks` uint8 [..., m, n / 32, 16], two e2m1 values per byte, the low one first, beside
`NAME_scales` uint8 [..., m, n / 32]; the value is e2m1 * 2^(scale - 127), of the transposed matrix.
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
    """Rows and columns of FP8 blocks that a configuration names; None = it names none.

    `config`: transformers'. Raises ValueError for any other way of quantising than the known two.
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
            f"quantization_config has quant_method {method!r}, which is not known here (fp8 in "
            f"blocks and mxfp4 are): {_HOW}"
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
                f"quantization_config: {name} must be {wanted}, got {options[name]!r}: {_HOW}"
            )
    size = options.get("weight_block_size")
    whole = isinstance(size, (list, tuple)) and len(size) == 2
    if not whole or not all(type(n) is int and n > 0 for n in size):
        raise ValueError(
            f"quantization_config: weight_block_size must be two numbers, got {size!r}: {_HOW}"
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
            f"{name}{_SCALE_OF} must hold a float per block of {block[0]}x{block[1]}, "
            f"{wanted} for {list(values.shape)}, the file has {scales.dtype} {list(scales.shape)}"
        )
    scales = scales.float().repeat_interleave(block[0], -2)[..., :rows, :]
    return values.float() * scales.repeat_interleave(block[1], -1)[..., :columns]


def from_mxfp4(blocks: Tensor, scales: Tensor, name: str) -> Tensor:
    """uint8 [..., m, n / 32, 16] and [..., m, n / 32] -> fp32 [..., n, m].

    Raises ValueError, naming the tensor, for other shapes or dtypes and for a scale that stands for
    NaN.
    """
    bytes_alone = blocks.dtype == scales.dtype == torch.uint8
    if not bytes_alone or blocks.dim() < 3 or blocks.shape != (*scales.shape, 16):
        raise ValueError(
            f"{name}{_BLOCKS} must be uint8 [..., m, n / 32, 16] and {name}{_SCALES} uint8 "
            f"[..., m, n / 32], the file has {blocks.dtype} {list(blocks.shape)} and "
            f"{scales.dtype} {list(scales.shape)}"
        )
    if (scales == 255).any():
        raise ValueError(f"{name}{_SCALES} has a scale of 255, which stands for NaN")
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    pairs = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    values = torch.ldexp(table[pairs.int()], (scales.int() - 127)[..., None])
    return values.flatten(-2).transpose(-1, -2)


class Weights:
    """A folder's tensors by the names that models give them, as plain floats on the CPU."""

    def __init__(self, files: TensorFiles, block: tuple[int, int] | None) -> None:
        """block: as of `block_size`."""
        self.files, self.block = files, block

    def has(self, name: str) -> bool:
        """Whether there is such a tensor, quantised or not."""
        return self.files.has(name) or self.files.has(name + _BLOCKS)

    def read(self, name: str, row: int | None = None) -> Tensor:
        """A tensor, or one row of it; no other row is read then.

        Raises ValueError for one that is not there, or quantised in a way that is not known.
        """
        if not self.files.has(name) and self.files.has(name + _BLOCKS):
            blocks = self.files.read(name + _BLOCKS, row)
            return from_mxfp4(blocks, self.files.read(name + _SCALES, row), name)
        values = self.files.read(name, row)
        scale = name + _SCALE_OF
        if values.dtype in _PLAIN:
            if self.files.has(scale):
                raise ValueError(f"{name} is {values.dtype} and has a {scale} all the same")
            return values
        if values.dtype != torch.float8_e4m3fn:
            raise ValueError(f"{name} is stored as {values.dtype}, which is no float: {_HOW}")
        if self.block is None or not self.files.has(scale):
            missing = "quantization_config of config.json" if self.block is None else "file"
            lacks = "method fp8" if self.block is None else f"tensor {scale}"
            raise ValueError(
                f"{name} is stored as {values.dtype}, and the {missing} has no {lacks} that says "
                f"what it means: {_HOW}"
            )
        return from_fp8_blocks(values, self.files.read(scale, row), self.block, name)

    def require_only(self, names: Iterable[str], ignored: Iterable[str] = ()) -> None:
        """ValueError for a file with tensors that stand for none of the names.

        ignored: names of tensors that may be there.
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
                f"{self.files.folder} has tensors that the model of its config.json has not: "
                f"{', '.join(unknown[:3])}{more}. If it is quantised, {_HOW}"
            )
