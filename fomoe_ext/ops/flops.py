"""What `torch.utils.flop_counter.FlopCounterMode` counts for the experts' products.

As torch counts: two per multiplication with addition, of matrix products alone. Rows are those that
are computed, the last of the table's `offsets`: skipped slots and absent experts count nothing. On
CUDA that waits for the device. Where there is no value to read (the meta device, fake tensors)
every slot counts, which is the most that there can be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

import fomoe_ext.ops.native  # noqa: F401  (defines the ops)

_Arguments: TypeAlias = dict[str, Any]
_TABLES = ("token_of_row", "left_index", "right_index", "act", "rows", "left")
"""What has an entry per slot; the first that is there."""


def _rows(given: _Arguments) -> int:
    offsets = given["offsets"]
    if not offsets.is_meta and not isinstance(offsets, FakeTensor):
        return int(offsets[-1])
    return next(given[name].shape[0] for name in _TABLES if given.get(name) is not None)


def _elements(*weights: Tensor) -> int:
    """Of an expert's matrices, stacked as [R, A, B]."""
    return sum(weight.shape[1] * weight.shape[2] for weight in weights)


def _of_backward(given: _Arguments) -> int:
    expand, contract = _elements(given["expand_weight"]), _elements(given["contract_weight"])
    # The gradient of the activations is needed for all others.
    times = given["need_x"] + given["need_expand"], 1 + given["need_contract"]
    return times[0] * expand + times[1] * contract


_PER_ROW: dict[str, Callable[[_Arguments], int]] = {
    "expand": lambda given: _elements(given["expand_weight"]),
    "contract": lambda given: _elements(given["contract_weight"]),
    "moe_experts": lambda given: _elements(given["expand_weight"], given["contract_weight"]),
    "moe_experts_backward": _of_backward,
    "contract_backward": lambda given: _elements(given["contract_weight"]),
    "grouped_rows": lambda given: _elements(given["weight"]),
    "weight_grad": lambda given: given["left"].shape[1] * given["right"].shape[1],
    "weight_grad_add": lambda given: given["left"].shape[1] * given["right"].shape[1],
}
"""Multiplications for a row, by op."""


def _register(name: str, per_row: Callable[[_Arguments], int]) -> None:
    op = getattr(torch.ops.fomoe, name)
    names = [argument.name for argument in op.default._schema.arguments]

    def formula(*arguments: Any, out_val: Any = None, **named: Any) -> int:
        given = dict(zip(names, arguments, strict=False)) | named
        return 2 * _rows(given) * per_row(given)

    register_flop_formula(op, get_raw=True)(formula)


for _name, _per_row in _PER_ROW.items():
    _register(_name, _per_row)
