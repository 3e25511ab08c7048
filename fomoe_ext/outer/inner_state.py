"""The inner optimizer's state of experts, which moves with them.

A stack of experts [R, ..] has a row per expert, and so does most optimizer state: moments of the
same shape, and Adafactor's statistics over one of an expert's two dimensions. Counters belong to
the stack as a whole. Any other state is refused by name: if it were moved wrongly or left behind,
an expert would be trained with the history of another one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fomoe_ext.layer.mesh import is_sharded, local_tensor

_ZEROED = frozenset(
    (
        "exp_avg",
        "exp_avg_sq",
        "max_exp_avg_sq",
        "exp_inf",
        "momentum_buffer",
        "square_avg",
        "grad_avg",
        "acc_delta",
        "variance",
    )
)
"""State of the parameter's shape that starts at zero and may be zero at any step."""
_COUNTERS = frozenset(("step", "mu_product", "eta", "mu", "RMS"))
_COPIES = frozenset(("ax", "z", "p0", "master", "master_param", "param_copy"))
"""Averages or copies of the weights, which cannot start at zero for an expert that arrives."""
_FACTORS = ("row_var", "col_var", "exp_avg_sq_row", "exp_avg_sq_col")


def _factor_shape(name: str, shape: torch.Size) -> list[int] | None:
    """The shape of a statistic of Adafactor (torch.optim's or transformers') for a parameter of
    this shape; None if it does not have a row per row of the parameter. Adafactor factors the last
    two dimensions, so the column statistic of a matrix [R, n] covers all its rows."""
    if len(shape) < 2 or ("col" in name and len(shape) == 2 and shape[0] > 1):
        return None
    return {
        "row_var": [*shape[:-1], 1],
        "col_var": [*shape[:-2], 1, shape[-1]],
        "exp_avg_sq_row": [*shape[:-1]],
        "exp_avg_sq_col": [*shape[:-2], shape[-1]],
    }[name]


def _has_rows(name: str, found: torch.Size, shape: torch.Size) -> bool:
    """Whether state of this shape has a row per row of the parameter, without ambiguity."""
    if name in _FACTORS:
        return list(found) == _factor_shape(name, shape)
    rows, rest = shape[0], list(shape[1:])
    if not found or found[0] != rows:
        return False
    if len(found) == len(shape):
        return all(n in (1, wanted) for n, wanted in zip(found[1:], rest, strict=True))
    # Some dimensions are reduced; if one of those had R elements, it could be the one that is left.
    left = iter(rest)
    return rows not in rest and all(n in left for n in found[1:])


def _is_number(name: str, value: Any) -> bool:
    """Whether state is a single number for the whole parameter, or empty."""
    if isinstance(value, Tensor):
        return value.dim() == 0 or (value.numel() == 1 and name in _COUNTERS)
    return value is None or isinstance(value, (bool, int, float))


def _is_plain(value: Any) -> bool:
    """Whether a value is a plain tensor, not a quantised one."""
    plain = type(value) in (Tensor, nn.Parameter) or (
        isinstance(value, Tensor) and is_sharded(value)
    )
    return plain and value.is_floating_point() and value.dtype.itemsize >= 2


def problem_with_rows(
    optimizer: torch.optim.Optimizer, parameters: Sequence[tuple[str, Tensor]]
) -> str:
    """Says why rows of these parameters cannot move with their optimizer state, or is empty."""
    kind = type(optimizer).__name__
    for other in optimizer.state:
        if not isinstance(other, Tensor):
            return f"inner_optimizer {kind} keeps state of {other!r}, which is no parameter"
    if isinstance(optimizer, torch.optim.LBFGS):
        return f"inner_optimizer {kind} keeps state of all parameters together"
    for name, parameter in parameters:
        for what, value in optimizer.state.get(parameter, {}).items():
            if _is_number(what, value):
                continue
            if not _is_plain(value):
                text = getattr(value, "dtype", type(value).__name__)
                return f"{what} ({text}) of {name} in inner_optimizer {kind} is not understood"
            if not _has_rows(what, value.shape, parameter.shape):
                return (
                    f"{what} {list(value.shape)} of {name} {list(parameter.shape)} in "
                    f"inner_optimizer {kind} cannot be told apart by rows"
                )
            if what in _COPIES or (what not in _ZEROED and _is_near(value, parameter)):
                return f"{what} of {name} in inner_optimizer {kind} is a copy of the weights"
    return ""


@torch.no_grad()
def move_state_rows(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, sources: Sequence[int | None]
) -> None:
    """Row i of all of a parameter's state becomes its old row sources[i], or initial for None.

    Counters stay. `problem_with_rows` must have returned an empty string.
    """
    for what, value in optimizer.state.get(parameter, {}).items():
        if _is_number(what, value):
            continue
        old, first = value.clone(), _first_value(optimizer, parameter, what)
        for row, source in enumerate(sources):
            if source is None:
                value[row].fill_(first)
            else:
                value[row].copy_(old[source])


def _first_value(optimizer: torch.optim.Optimizer, parameter: Tensor, what: str) -> float:
    """The value with which an optimizer initialises its state."""
    options = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    if what == "sum":  # Adagrad
        return float(options.get("initial_accumulator_value", 0.0))
    return float(options["lr"]) if what == "step_size" else 0.0  # Rprop


def _is_near(value: Tensor, parameter: Tensor) -> bool:
    """Whether state is close to the parameter itself."""
    if value.shape != parameter.shape:
        return False
    size = parameter.detach().float().norm()
    return bool(size > 0) and bool((value.float() - parameter.detach().float()).norm() < size / 2)


def shaped_state(
    optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, Tensor]] = ()
) -> Iterator[tuple[Tensor, str, Tensor]]:
    """(parameter, name, tensor) of all state but `step`: tensors of their parameter's shape, which
    can be stored or sent with its elements.

    Raises ValueError naming any other state.
    """
    names = {id(parameter): name for name, parameter in named}
    for parameter, state in optimizer.state.items():
        name = names.get(id(parameter), "a parameter")
        for what, value in state.items():
            if what == "step" or value is None:
                continue
            if not _is_plain(value) or value.shape != parameter.shape:
                raise ValueError(
                    f"inner_optimizer must keep steps and tensors of its parameters' shapes alone, "
                    f"but {type(optimizer).__name__} keeps {what} of {name}"
                )
            yield parameter, what, value


@torch.no_grad()
def reset_bad_state(optimizer: torch.optim.Optimizer) -> int:
    """Resets the inner optimizer's state of each parameter where any of it is NaN or infinite.
    Returns the number of such parameters.

    Tensors of the parameter's shape are zeroed, and counters stay. If there is other state, or
    state that does not start at zero, all state of the parameter is deleted, so that the optimizer
    initialises it again.
    """
    bad = []
    for parameter, state in optimizer.state.items():
        tensors = [v for v in state.values() if isinstance(v, Tensor) and v.is_floating_point()]
        if not all(bool(local_tensor(tensor).isfinite().all()) for tensor in tensors):
            bad.append(parameter)
    for parameter in bad:
        state = optimizer.state[parameter]
        kept = {what: value for what, value in state.items() if not _is_number(what, value)}
        if all(
            what in _ZEROED and _is_plain(v) and v.shape == parameter.shape
            for what, v in kept.items()
        ):
            for value in kept.values():
                local_tensor(value).zero_()
        else:
            del optimizer.state[parameter]
    return len(bad)
