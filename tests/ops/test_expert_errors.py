"""Error messages of the expert verbs for bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expert_inputs import SIZES, Inputs, make, op_arguments
from torch import Tensor

from fomoe_ext import ops

pytestmark = pytest.mark.usefixtures("one_thread")


def changed_table(inputs: Inputs, **changes: Any) -> ops.RowTable:
    """A copy of the row table with some entries overwritten: name=(position, value)."""
    copies = {name: tensor.clone() for name, tensor in inputs.table._asdict().items()}
    for name, (position, value) in changes.items():
        copies[name].view(-1)[position] = value
    return ops.RowTable(**copies)


BAD = [
    ("x", lambda i: i.x[0], r"x must have shape \[\*, \*\], got \[37\]"),
    ("x", lambda i: i.x[:, :30], "expand_weight must have shape"),
    (
        "x",
        lambda i: i.x.double(),
        "x must have dtype float32 or bfloat16 or float16.*, got float64",
    ),
    ("x", lambda i: i.x.long(), "x must have dtype .*, got int64"),
    ("x", lambda i: i.x[:50], "weights must have shape"),
    ("x", lambda i: i.x.bfloat16(), "expand_weight must have dtype bfloat16 like x, got float32"),
    ("weights", lambda i: i.weights.half(), "weights must have dtype float32.*, got float16"),
    (
        "weights",
        lambda i: i.weights[:, :2],
        r"token_of_row must have tokens \* top_k = 106 entries, got 159",
    ),
    ("weights", lambda i: i.weights[0], r"weights must have shape .*, got \[3\]"),
    (
        "expand_weight",
        lambda i: i.expand_weight[:, :41],
        "expand_weight must have an even .* for swiglu, which is gated",
    ),
    ("expand_weight", lambda i: i.expand_weight[0], "expand_weight must have shape"),
    (
        "expand_weight",
        lambda i: i.expand_weight.bfloat16(),
        "expand_weight must have dtype .*, got bfloat16",
    ),
    ("expand_weight", lambda i: i.expand_weight[:2], "contract_weight must have shape"),
    ("contract_weight", lambda i: i.contract_weight[:, :, :5], "contract_weight must have shape"),
    (
        "contract_weight",
        lambda i: i.contract_weight.half(),
        "contract_weight must have dtype .*, got float16",
    ),
    ("activation", lambda i: "tanh", "activation must be one of swiglu, .*, got 'tanh'"),
    (
        "table",
        lambda i: changed_table(i, offsets=(0, 1)),
        "offsets must start at 0, got 1",
    ),
    ("table", lambda i: changed_table(i, offsets=(1, 1000)), "offsets must not decrease, got 1000"),
    ("table", lambda i: changed_table(i, offsets=(3, 160)), "offsets must end at 159 .*, got 160"),
    (
        "table",
        lambda i: changed_table(i, token_of_row=(2, 53)),
        "token_of_row must .*, got 53 at row 2",
    ),
    (
        "table",
        lambda i: changed_table(i, token_of_row=(2, -1)),
        "token_of_row must .*, got -1 at row 2",
    ),
    (
        "table",
        lambda i: changed_table(i, slot_of_row=(0, 159)),
        "slot_of_row must .*, got 159 at row 0",
    ),
    (
        "table",
        lambda i: changed_table(i, row_of_slot=(7, 159)),
        "row_of_slot must .*, got 159 at slot 7",
    ),
    (
        "table",
        lambda i: changed_table(i, row_of_slot=(7, -2)),
        "row_of_slot must .*, got -2 at slot 7",
    ),
    (
        "table",
        lambda i: i.table._replace(offsets=i.table.offsets.long()),
        "offsets must have dtype int32.*, got int64",
    ),
    (
        "table",
        lambda i: i.table._replace(token_of_row=i.table.token_of_row.float()),
        "token_of_row must have dtype .*, got float32",
    ),
    ("table", lambda i: i.table._replace(offsets=i.table.offsets[:3]), "offsets must have shape"),
    (
        "table",
        lambda i: i.table._replace(tiles=i.table.tiles.long()),
        "tiles must have dtype .*, got int64",
    ),
    ("table", lambda i: i.table._replace(tiles=i.table.offsets), "tiles must have shape"),
    (
        "table",
        lambda i: i.table._replace(slot_of_row=i.table.slot_of_row[:9]),
        "slot_of_row must have",
    ),
    (
        "table",
        lambda i: i.table._replace(row_of_slot=i.table.row_of_slot[:9]),
        "row_of_slot must have",
    ),
]


@pytest.mark.parametrize("argument, change, message", BAD, ids=[f"{b[0]}: {b[2]}" for b in BAD])
def test_bad_input_of_moe_experts(
    argument: str, change: Callable[[Inputs], Any], message: str
) -> None:
    inputs = make(SIZES["odd"])
    arguments = inputs._asdict() | {"activation": "swiglu"}
    ops.moe_experts(**arguments)
    arguments[argument] = change(inputs)
    with pytest.raises(ValueError, match=message):
        ops.moe_experts(**arguments)


def test_bad_input_of_single_verbs() -> None:
    inputs = make(SIZES["odd"])
    x, table = inputs.x, inputs.table
    act = torch.zeros(table.token_of_row.shape[0], 21)
    wrong = [
        (lambda: ops.expand(x[0], inputs.expand_weight, table), "x must have shape"),
        (
            lambda: ops.expand(x.int(), inputs.expand_weight, table),
            "x must have dtype .*, got int32",
        ),
        (lambda: ops.expand(x, inputs.expand_weight[:2], table), "offsets must have shape"),
        (
            lambda: ops.expand(x, inputs.expand_weight.half(), table),
            "expand_weight must have dtype",
        ),
        (lambda: ops.expand(x[:40], inputs.expand_weight, table), "row_of_slot must have shape"),
        (
            lambda: ops.expand(x, inputs.expand_weight, table, "relu"),
            r"activation must be one of swiglu, .*, got 'relu'",
        ),
        (lambda: ops.contract(act[0], inputs.contract_weight, table), "act must have shape"),
        (lambda: ops.contract(act.double(), inputs.contract_weight, table), "act must have dtype"),
        (lambda: ops.contract(act[:9], inputs.contract_weight, table), "offsets must end at"),
        (lambda: ops.contract(act, inputs.contract_weight[0], table), "contract_weight must have"),
        (lambda: ops.contract(act, inputs.contract_weight[:1], table), "offsets must have shape"),
        (lambda: ops.is_gated("relu"), r"activation must be one of swiglu, .*, got 'relu'"),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()


def test_bad_input_of_backward_ops() -> None:
    inputs = make(SIZES["odd"])
    arguments = op_arguments(inputs, "swiglu", grad=False)

    def call(name: str, at: int, change: Callable[[Tensor], Any]) -> None:
        op, given = arguments[name]
        op(*given[:at], change(given[at]), *given[at + 1 :])

    wrong = [
        ("moe_experts_backward", 0, lambda t: t[:, :5].contiguous(), "grad_y must have shape"),
        ("moe_experts_backward", 0, lambda t: t.half(), "grad_y must have dtype .*, got float16"),
        ("moe_experts_backward", 0, lambda t: t.T.contiguous().T, "grad_y must be contiguous"),
        ("moe_experts_backward", 12, lambda t: t[:4], "preact must have shape"),
        (
            "moe_experts_backward",
            12,
            lambda t: t.double(),
            "preact must have dtype .*, got float64",
        ),
        (
            "moe_experts_backward",
            13,
            lambda t: 6,
            "activation must be the number of one of swiglu, .*, got 6",
        ),
        (
            "contract_backward",
            0,
            lambda t: t[:, :5].contiguous(),
            "contract_weight must have shape",
        ),
        ("contract_backward", 3, lambda t: t[:, :5].contiguous(), "preact must have shape"),
        ("contract_backward", 4, lambda t: t[:3], "weights must have shape"),
        ("contract_backward", 5, lambda t: t.long(), "token_of_row must have dtype .*, got int64"),
        ("grouped_rows", 0, lambda t: t[0], "rows must have shape"),
        ("grouped_rows", 1, lambda t: t[:, :3].contiguous(), "weight must have shape"),
        ("grouped_rows", 2, lambda t: t[:2], "offsets must have shape"),
        ("grouped_rows", 3, lambda t: t.long(), "tiles must have dtype int32.*, got int64"),
        ("grouped_rows", 3, lambda t: t.view(-1), "tiles must have shape"),
        ("weight_grad", 0, lambda t: t[0], "left must have shape"),
        (
            "weight_grad",
            0,
            lambda t: t[:5],
            "offsets must end at|left must have at least .* rows, got 5",
        ),
        ("weight_grad", 1, lambda t: t.half(), "right must have dtype .*, got float16"),
        ("weight_grad", 1, lambda t: t[:5], "right_index must be in"),
        ("weight_grad", 4, lambda t: t[:0], "offsets must have residents \\+ 1 entries, got none"),
        ("activation_backward", 0, lambda t: t[0], "grad_act must have shape"),
        ("activation_backward", 1, lambda t: t[:, :9].contiguous(), "preact must have shape"),
        (
            "activation_backward",
            2,
            lambda t: t[:0],
            "offsets must have residents \\+ 1 entries, got none",
        ),
        ("activation_backward", 3, lambda t: -1, "activation must .*, got -1"),
    ]
    for name, at, change, message in wrong:
        with pytest.raises(ValueError, match=message):
            call(name, at, change)


def test_backward_without_saved_pre_activations_is_an_error() -> None:
    inputs = make(SIZES["odd"])
    for name in ("expand", "moe_experts"):
        op, arguments = op_arguments(inputs, "swiglu", grad=True)[name]
        y, _ = op(*arguments[:-1], False)
        with pytest.raises(RuntimeError, match="save_preact must be True"):
            y.sum().backward()
