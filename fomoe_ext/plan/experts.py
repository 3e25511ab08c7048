"""What the experts of one layer hold in memory while a step goes through them. Needs no torch.

The allocations of `compact` and `moe_experts` (csrc/ops/moe_experts_passes.h) in their
order, in bytes beside what was there before: input, weights, gradient of the output.
"""

from __future__ import annotations

from dataclasses import dataclass

TILE_ROWS = 128
"""Rows of a tile of the CUDA kernels, as in csrc/kernels.h."""
PART_COLUMNS = 64
"""Columns of a partial sum of a combine weight's gradient on CUDA."""
INT_BYTES = FLOAT_BYTES = 4


@dataclass(frozen=True)
class ExpertsCall:
    """Sizes of one call of the experts of a layer.

    rows: slots whose expert is resident; None = all. gates: 2 for gated activations, else 1.
    element: bytes of one, 2 for bf16. gpu: whether the CUDA kernels run: they have a tile schedule
    and partial sums, and room for all slots. totals: gradients of the weights are added to sums
    that exist already (`main_grad`). frees_preact: the backward pass is the last one
    (no `retain_graph`, and not compiled).
    """

    tokens: int
    top_k: int
    hidden: int
    intermediate: int
    residents: int
    gates: int = 2
    rows: int | None = None
    element: int = 2
    bias: bool = False
    gpu: bool = True
    totals: bool = False
    frees_preact: bool = True

    @property
    def slots(self) -> int:
        """Of all tokens, skipped or not."""
        return self.tokens * self.top_k

    @property
    def row_room(self) -> int:
        """Rows of a temporary: a GPU's host does not know how many there are."""
        return self.slots if self.gpu or self.rows is None else self.rows

    @property
    def table(self) -> int:
        """Bytes of the row table."""
        entries = 3 * self.slots + self.residents + 1
        if self.gpu:
            entries += 2 * (self.slots // TILE_ROWS + self.residents)
        return INT_BYTES * entries

    @property
    def preact(self) -> int:
        """Bytes of the saved pre-activations [S, G*N]."""
        return self.element * self.slots * self.gates * self.intermediate

    @property
    def act(self) -> int:
        """Bytes of act and of scaled_act [S, N]."""
        return self.element * self.row_room * self.intermediate

    @property
    def row_bytes(self) -> int:
        """Bytes of rows [S, D] before they are combined."""
        return self.element * self.row_room * self.hidden

    @property
    def token_bytes(self) -> int:
        """Bytes of y and of the gradient of x [T, D]."""
        return self.element * self.tokens * self.hidden

    @property
    def contract_grad(self) -> int:
        """Bytes of the contract weight's gradient [R, D, N]; 0 with totals."""
        if self.totals:
            return 0
        return self.element * self.residents * self.hidden * self.intermediate

    @property
    def expand_grad(self) -> int:
        """Bytes of the expand weight's gradient [R, G*N, D]; 0 with totals."""
        return self.gates * self.contract_grad

    @property
    def kept(self) -> int:
        """Bytes between the passes: the output too."""
        return self.table + self.preact + self.token_bytes


def forward_moments(call: ExpertsCall) -> dict[str, int]:
    """Bytes alive while each kernel of the forward pass runs, by its name, in order."""
    held = call.table + call.preact
    return {
        "expand": held + call.act,
        "contract": held + call.act + call.row_bytes,
        "combine": held + call.row_bytes + call.token_bytes,
    }


def backward_moments(call: ExpertsCall) -> dict[str, int]:
    """Bytes alive while each kernel of the backward pass runs, by its name, in order."""
    grad_preact = (
        0 if call.frees_preact else call.element * call.row_room * (call.gates * call.intermediate)
    )
    small = FLOAT_BYTES * call.slots  # gradients of combine weights
    if call.bias:
        small += call.element * call.residents * call.hidden
    held = call.kept + grad_preact + small
    parts = FLOAT_BYTES * call.slots * -(-call.intermediate // PART_COLUMNS) if call.gpu else 0
    moments = {"contract_backward": held + call.act + parts}
    first = contract_comes_first(call)
    if first:
        held += call.contract_grad
        moments["contract_weight_grad"] = held + call.act
    else:
        held += call.act
    moments["grouped_rows"] = held + call.row_bytes
    held += call.token_bytes
    moments["combine"] = held + call.row_bytes
    held += call.expand_grad
    if call.bias:
        held += call.element * call.residents * call.gates * call.intermediate
    moments["expand_weight_grad"] = held
    if not first:
        freed = call.preact if call.frees_preact else grad_preact
        moments["contract_weight_grad"] = held - freed + call.contract_grad
    return moments


def contract_comes_first(call: ExpertsCall) -> bool:
    """Whether the contract weight's gradient is the first one, as BackwardPeaks says."""
    preact = call.element * call.row_room * call.gates * call.intermediate
    tokens, rows = call.token_bytes, call.row_bytes
    first = preact + call.contract_grad + max(call.act, rows + tokens, tokens + call.expand_grad)
    last = max(preact + rows, preact + call.expand_grad, call.expand_grad + call.contract_grad)
    return first <= call.act + tokens + last


def experts_peak(call: ExpertsCall) -> int:
    """The most bytes at once, of forward and backward together, gradients of weights included."""
    return max(*forward_moments(call).values(), *backward_moments(call).values())
