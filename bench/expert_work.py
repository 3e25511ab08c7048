"""FLOPs, bytes and memory of the expert layers of real models, by arithmetic.

Letters: T tokens, K slots per token, D hidden size, N intermediate size, G = 2 for gated
activations and else 1. Elements have 2 bytes. The benchmarks and the prediction share this file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

ELEMENT = 2  # bytes of bf16
TILE_ROWS = 128


@dataclass(frozen=True)
class Model:
    """Sizes of one MoE layer of a published model."""

    name: str
    hidden: int
    expert: int
    experts: int
    top_k: int
    activation: str = "swiglu"
    bias: bool = False

    @property
    def gates(self) -> int:
        return 2 if self.activation.endswith(("swiglu", "geglu")) else 1

    @property
    def wide(self) -> int:
        """G*N: width of the pre-activations."""
        return self.gates * self.expert

    @property
    def expert_elements(self) -> int:
        """Elements of one expert's two weights."""
        return (self.wide + self.expert) * self.hidden


MODELS = (
    Model("OLMoE", 2048, 1024, 64, 8),
    Model("Qwen3-30B-A3B", 2048, 768, 128, 8),
    Model("Mixtral-8x7B", 4096, 14336, 8, 2),
    Model("DeepSeek-V3", 7168, 2048, 256, 8),
    Model("gpt-oss-20b", 2880, 2880, 32, 4, "clamped_swiglu", bias=True),
    Model("FoMoE-13B", 2048, 128, 64, 16, "silu"),  # the paper's
)
TOKENS = (4096, 16384, 65536)
ROUTINGS = ("balanced", "zipf")
PARTS = {"all": 1, "half": 2, "quarter": 4}  # one in so many experts is resident
ZIPF_EXPONENT = 1.2


@dataclass(frozen=True)
class Load:
    """A site's work after routing: `groups`, the number of rows of each resident expert; `touched`,
    the number of tokens with at least one row."""

    tokens: int
    slots: int
    groups: tuple[int, ...]
    touched: int

    @cached_property
    def rows(self) -> int:
        return sum(self.groups)


# ---- routing -------------------------------------------------------------------------------------


def zipf_popularity(experts: int) -> list[float]:
    """Probabilities that fall as rank^-1.2."""
    weights = [(rank + 1) ** -ZIPF_EXPONENT for rank in range(experts)]
    return [weight / sum(weights) for weight in weights]


def chosen_shares(popularity: Sequence[float], top_k: int) -> list[float]:
    """The fraction of tokens that choose each expert, if a token draws `top_k` different ones.

    It is 1 - exp(-rate * popularity), with the rate at which the fractions sum to `top_k`: as if
    experts arrived at random times and a token took the first `top_k` of them.
    """
    low, high = 0.0, 1.0
    shares = lambda rate: [-math.expm1(-rate * p) for p in popularity]
    while sum(shares(high)) < top_k:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(shares(middle)) < top_k else (low, middle)
    return shares(high)


def expected_load(model: Model, tokens: int, routing: str, parts: int = 1) -> Load:
    """The expected load if every `parts`-th expert, by popularity, is resident.

    The number of tokens without a row is exact for balanced routing. For Zipf it is approximated as
    if experts were chosen independently of each other.
    """
    if routing == "balanced":
        shares = [model.top_k / model.experts] * model.experts
    elif routing == "zipf":
        shares = chosen_shares(zipf_popularity(model.experts), model.top_k)
    else:
        raise ValueError(f"routing must be one of {', '.join(ROUTINGS)}, got {routing!r}")
    resident = shares[parts // 2 :: parts]
    groups = tuple(round(tokens * share) for share in resident)
    others = model.experts - len(resident)
    untouched = math.comb(others, model.top_k) / math.comb(model.experts, model.top_k)
    if routing == "zipf" and others:
        untouched = math.prod(1 - share for share in resident)
    return Load(tokens, tokens * model.top_k, groups, round(tokens * (1 - untouched)))


# ---- kernels -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """FLOPs, and the bytes if each operand is read once and each result written once."""

    name: str
    flops: int
    bytes: int


@dataclass(frozen=True)
class Gemm(Kernel):
    """A grouped GEMM. If it computes rows, it sums over `length`. If it computes gradients of
    weights (`makes_weights`), its result has `length` rows for each expert, and it sums over the
    expert's rows. `verb`: its name in the table of tiles.
    """

    verb: str
    columns: int
    length: int
    epilogue: str
    makes_weights: bool = False

    @property
    def terms(self) -> int:
        """Length of the sums, for the table of tiles; 0 if it depends on the routing."""
        return 0 if self.makes_weights else self.length


def gemms(model: Model, load: Load, training: bool = True) -> dict[str, Gemm]:
    """The six grouped GEMMs of a layer, forward first. Without `training` expand stores no
    pre-activations.
    """
    d, n, wide, rows = model.hidden, model.expert, model.wide, load.rows
    residents = sum(1 for group in load.groups if group)  # others' weights are not read
    expand_weight, contract_weight = residents * wide * d, residents * n * d
    grads_of = len(load.groups)  # gradients of experts without rows are written too
    touched = load.touched * d

    def gemm(
        name: str,
        columns: int,
        length: int,
        elements: int,
        epilogue: str = "StoreRows",
        verb: str = "",
    ) -> Gemm:
        flops, moved = 2 * rows * columns * length, ELEMENT * elements
        makes_weights = verb == "weight_grad"
        return Gemm(name, flops, moved, verb or name, columns, length, epilogue, makes_weights)

    kept = rows * wide if training else 0
    expanded = touched + expand_weight + kept + rows * n
    contracted_back = touched + contract_weight + 2 * rows * wide + rows * n
    expand_grad = touched + rows * wide + grads_of * wide * d
    contract_grad = touched + rows * n + grads_of * n * d
    products = (
        gemm("expand", wide, d, expanded, "Activate" if training else "ActivateOnly"),
        gemm("contract", d, n, rows * n + contract_weight + rows * d),
        gemm("contract_backward", n, d, contracted_back, "ActivateBackward"),
        gemm("grouped_rows", d, wide, rows * wide + expand_weight + rows * d),
        gemm("expand_weight_grad", d, wide, expand_grad, verb="weight_grad"),
        gemm("contract_weight_grad", n, d, contract_grad, verb="weight_grad"),
    )
    return {product.name: product for product in products}


def sums(model: Model, load: Load) -> Kernel:
    """combine, or the same sum without weights in the backward pass."""
    moved = ELEMENT * model.hidden * (load.rows + load.tokens) + 8 * load.slots
    return Kernel("combine", 2 * load.rows * model.hidden, moved)


def experts_kernels(model: Model, load: Load, backward: bool) -> list[Kernel]:
    """The kernels of moe_experts, in the order in which they run."""
    of = gemms(model, load, training=backward)
    forward = [of["expand"], of["contract"], sums(model, load)]
    if not backward:
        return forward
    biases = []
    if model.bias:
        moved = ELEMENT * (model.hidden * load.touched + model.wide * load.rows)
        biases = [Kernel("bias_grad", load.rows * (model.hidden + model.wide), moved)]
    names = ("contract_backward", "contract_weight_grad", "expand_weight_grad", "grouped_rows")
    return [*forward, *(of[name] for name in names), *biases, sums(model, load)]


def router_kernels(model: Model, load: Load) -> list[Kernel]:
    """The kernels that MoELayer adds to moe_experts, forward and backward."""
    t, d, e = load.tokens, model.hidden, model.experts
    tokens, weight, logits = ELEMENT * t * d, ELEMENT * e * d, 4 * t * e
    product = 2 * t * d * e
    return [
        Kernel("logits", product, tokens + weight + logits),
        Kernel("route", t * e, logits + 8 * load.slots),
        Kernel("compact", 0, 4 * load.slots + 12 * load.rows),
        Kernel("route_backward", t * e, 2 * logits + 8 * load.slots),
        Kernel("logits_backward", 2 * product, 2 * (tokens + weight + logits)),
    ]


@dataclass(frozen=True)
class Floors:
    """Lower bounds in seconds: for all FLOPs, for all bytes, and the sum over the kernels of the
    larger of both."""

    compute: float
    memory: float
    kernels: float

    @property
    def larger(self) -> float:
        return max(self.compute, self.memory)


def floors(kernels: Iterable[Kernel], flops_per_second: float, bytes_per_second: float) -> Floors:
    kernels = list(kernels)
    compute = [kernel.flops / flops_per_second for kernel in kernels]
    memory = [kernel.bytes / bytes_per_second for kernel in kernels]
    return Floors(sum(compute), sum(memory), sum(map(max, compute, memory)))


# ---- memory --------------------------------------------------------------------------------------


def kept_elements(model: Model) -> dict[str, int]:
    """Elements per slot that a layer saves for its backward, besides inputs and index tables.

    Ours saves the pre-activations. grouped_mm with torch ops saves gathered tokens,
    pre-activations, the activation's own saved tensors, activations and rows.
    """
    inside = {"swiglu": 1, "geglu": 1, "clamped_swiglu": 4}.get(model.activation, 0) * model.expert
    composed = model.hidden + model.wide + inside + model.expert + model.hidden
    return {"ours": model.wide, "grouped_mm": composed}


def needed_bytes(model: Model, tokens: int) -> int:
    """Upper estimate of the device memory that a benchmark of the whole layer needs.

    It counts weights, their gradients twice (an eager pass, and a CUDA graph's memory), inputs and
    gradients of tokens. For ours and for grouped_mm, which are held at the same time, it counts the
    rows and twice what is saved for the backward.
    """
    kept, slots = kept_elements(model), tokens * model.top_k
    layers = sum(2 * elements + model.hidden for elements in kept.values()) * slots
    weights = 3 * model.experts * model.expert_elements
    return ELEMENT * (weights + layers + 8 * tokens * model.hidden)
