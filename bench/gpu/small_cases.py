"""Runs every kernel with every tile once, on inputs small enough for compute-sanitizer.

Sizes are close to those of tiles, some experts get no tokens, and half are not resident. Results
are compared roughly with the CPU's; the exact comparison is in tests/.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

import common
import expert_cases as cases
import outer_cases
import torch
from expert_work import Model
from torch import Tensor

from bench.gpu import measured
from bench.gpu.measured import Results
from fomoe_ext import _C, ops
from fomoe_ext.outer.codec import Codec, hash_bits

MODELS = (
    Model("gated", 136, 72, 8, 2),
    Model("biases", 64, 136, 4, 2, "clamped_swiglu", bias=True),
    Model("plain", 72, 264, 8, 4, "silu"),
)
TOKENS, NUMEL = 130, 4096 + 77
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LIMIT = 3e-2  # relative error that rounding to 16 bits may cause


def tensors_in(found: object) -> list[Tensor]:
    """The float tensors in nested tuples, in order."""
    if isinstance(found, Tensor):
        return [found.detach()] if found.is_floating_point() else []
    if isinstance(found, Sequence) and not isinstance(found, str):
        return [tensor for part in found for tensor in tensors_in(part)]
    return []


class Compared:
    """Runs functions on the device and on the CPU and compares their float outputs."""

    def __init__(self, device: str, results: Results) -> None:
        self.device, self.results, self.done = device, results, 0

    def run(self, what: str, make: Callable[[str], object]) -> None:
        if not self.results.enough(what):
            return
        got = tensors_in(make(self.device))
        if self.device == "cuda":
            torch.cuda.synchronize()
        os.environ["FOMOE_EXPERTS_TILE"] = ""
        wanted = tensors_in(make("cpu"))
        self.done += 1
        if len(got) != len(wanted):
            self.results.wrong.append(f"{what} must have {len(wanted)} outputs, got {len(got)}")
        for mine, theirs in zip(got, wanted, strict=False):
            if theirs.numel() and float(theirs.float().square().sum()):
                error = common.normalised_error(mine.cpu(), theirs)
                if not error < LIMIT:
                    self.results.wrong.append(f"{what} ({error:.1e})")


def inputs_of(model: Model, dtype: torch.dtype, device: str, parts: int) -> cases.Inputs:
    """Random inputs, drawn on the CPU so that they are equal on every device."""
    made = cases.make_inputs(model, TOKENS, "zipf", "cpu", dtype)
    names = ("x", "weights", "experts", "expand_weight", "contract_weight")
    names += ("expand_bias", "contract_bias", "grad_y")
    on = lambda t: None if t is None else t.detach().to(device)
    there = cases.Inputs(model, **{name: on(getattr(made, name)) for name in names})
    for leaf in there.leaves:
        leaf.requires_grad_()
    return there.part(parts) if parts > 1 else there


def check_experts(compared: Compared, dtype: torch.dtype) -> None:
    """The layer with gradients, then each grouped GEMM by itself."""
    for tile in (str(tile["name"]) for tile in _C.expert_tiles()):
        for model, parts in zip(MODELS, (1, 2, 2), strict=True):

            def layer(device: str, model: Model = model, parts: int = parts) -> object:
                return cases.with_gradients(
                    cases.our_experts, inputs_of(model, dtype, device, parts)
                )

            def products(device: str, model: Model = model, parts: int = parts) -> object:
                verbs = cases.Verbs(inputs_of(model, dtype, device, parts))
                return [verbs.our_rows(name) for name in verbs.names]

            what = f"{tile} {model.name} {common.dtype_name(dtype)}"
            for name, make in (("layer", layer), ("products", products)):
                os.environ["FOMOE_EXPERTS_TILE"] = tile
                compared.run(f"{name} {what}", make)


def check_tokens(compared: Compared, dtype: torch.dtype) -> None:
    """route, compact, gather, combine and their gradients; bias gradients, one accumulated."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *sizes: torch.randn(*sizes, generator=generator)
    tokens, experts, top_k, hidden = TOKENS, 64, 8, 136
    logits, bias, x = draw(tokens, experts), 0.01 * draw(experts), draw(tokens, hidden)
    resident = torch.full((experts,), -1, dtype=torch.int32)
    resident[::2] = torch.arange(experts // 2, dtype=torch.int32)

    def run(device: str) -> object:
        there = logits.to(device).requires_grad_()
        weights, chosen, _ = ops.route(
            there,
            top_k,
            selection_bias=bias.to(device),
            renormalize=True,
            return_statistics=True,
        )
        table = ops.compact(chosen, resident.to(device), experts // 2, ops.TILE_ROWS)
        tokens_there = x.to(device, dtype).requires_grad_()
        y = ops.combine(ops.gather(tokens_there, table), weights, table)
        grads = torch.autograd.grad(y.float().square().sum(), (there, tokens_there))
        return y, weights, grads

    compared.run(f"token kernels {common.dtype_name(dtype)}", run)


def check_codecs(compared: Compared) -> None:
    """Every verb of every codec, and the hash of its result."""
    for name in outer_cases.CODECS:
        for verb in outer_cases.VERBS:

            def run(device: str, name: str = name, verb: str = verb) -> object:
                made = outer_cases.Work.make(Codec(name), NUMEL, "cpu")
                error = None if made.error is None else made.error.to(device)
                moved = (made.anchor, made.local)
                work = outer_cases.Work(
                    made.codec, *(t.to(device) for t in moved), error, made.given.to(device)
                )
                found = work.ours(verb)()
                hash_bits([work.anchor])
                return [found.float(), *([] if error is None else [error])]

            compared.run(f"codec {name} {verb}", run)


def main() -> int:
    given = measured.arguments(__doc__)
    compared = Compared(given.device, Results(given.out, given.budget))
    for dtype in DTYPES if given.device == "cuda" else DTYPES[:1]:
        check_tokens(compared, dtype)
        check_experts(compared, dtype)
    check_codecs(compared)
    return compared.results.finish(f"{compared.done} small cases")


if __name__ == "__main__":
    sys.exit(main())
