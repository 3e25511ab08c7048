"""Inputs for expert layers of any size, and what the benchmarks run on them: each grouped GEMM, the
experts and the layer, ours and rivals.

All of it runs on any device: the tests use the CPU and tiny sizes, the benchmarks a GPU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import expert_work as work
import rivals
import torch
from expert_work import Load, Model
from rivals import Products
from torch import Tensor, nn

from fomoe_ext import MoELayer, ops
from fomoe_ext.activations import activation_id

Outputs = tuple[Tensor, ...]
_ops = torch.ops.fomoe


# ---- routing -------------------------------------------------------------------------------------


def balanced_experts(model: Model, tokens: int, generator: torch.Generator) -> Tensor:
    """int32 [T, K]: each expert equally often, in random order, at most once per token."""
    per_round = model.experts // model.top_k  # tokens that choose every expert once
    if model.experts % model.top_k:
        raise ValueError(f"top_k must be a divisor of {model.experts} experts, got {model.top_k}")
    rounds = -(-tokens // per_round)
    keys = torch.rand(rounds, model.experts, generator=generator, device=generator.device)
    return keys.argsort(1).view(-1, model.top_k)[:tokens].int().contiguous()


def zipf_experts(model: Model, tokens: int, generator: torch.Generator) -> Tensor:
    """int32 [T, K]: K different experts per token, drawn with a popularity that falls as rank^-1.2.
    Ranks are assigned at random, so that any set of experts has some popular ones.
    """
    device = generator.device
    ranks = torch.randperm(model.experts, generator=generator, device=device)
    popularity = torch.tensor(work.zipf_popularity(model.experts), device=device)[ranks]
    noise = torch.rand(tokens, model.experts, generator=generator, device=device)
    # Exponential race: arrival times with these rates; the first K are chosen.
    arrivals = -noise.clamp_min(1e-20).log() / popularity
    return arrivals.topk(model.top_k, dim=1, largest=False).indices.int()


def fit_selection_bias(scores: Tensor, wanted: Tensor, top_k: int, steps: int = 200) -> Tensor:
    """A bias [E] with which the top-k of the scores [T, E], in 0 .. 1, choose each expert about as
    often as `wanted` [E] says.
    """
    bias = torch.zeros_like(wanted, dtype=torch.float32)
    target = wanted.float().clamp_min(1).log()
    for step in range(steps):
        chosen = (scores + bias).topk(top_k, dim=1).indices.flatten()
        load = torch.zeros_like(bias).index_add_(0, chosen, torch.ones_like(chosen).float())
        bias += 0.2 * 0.98**step * (target - load.clamp_min(1).log())
    return bias


# ---- a layer -------------------------------------------------------------------------------------


@dataclass
class Inputs:
    """Inputs of moe_experts and the row table. The first R of the model's experts are resident."""

    model: Model
    x: Tensor  # [T, D]
    weights: Tensor  # fp32 [T, K]
    experts: Tensor  # int32 [T, K]
    expand_weight: Tensor  # [R, G*N, D]
    contract_weight: Tensor  # [R, D, N]
    expand_bias: Tensor | None
    contract_bias: Tensor | None
    grad_y: Tensor
    resident_index: Tensor = field(init=False)
    table: ops.RowTable = field(init=False)
    load: Load = field(init=False)

    def __post_init__(self) -> None:
        residents = self.expand_weight.shape[0]
        index = torch.arange(self.model.experts, dtype=torch.int32)
        self.resident_index = index.masked_fill(index >= residents, -1).to(self.x.device)
        tile_rows = ops.TILE_ROWS if self.x.is_cuda else 0
        self.table = ops.compact(self.experts, self.resident_index, residents, tile_rows)
        offsets = self.table.offsets.tolist()
        groups = tuple(end - begin for begin, end in itertools.pairwise(offsets))
        touched = int((self.table.row_of_slot >= 0).any(1).sum())
        self.load = Load(self.x.shape[0], self.experts.numel(), groups, touched)

    @property
    def rows(self) -> int:
        return self.load.rows

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors that need gradients."""
        every = (self.x, self.weights, *self.parameters)
        return [tensor for tensor in every if tensor is not None]

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        return self.expand_weight, self.contract_weight, self.expand_bias, self.contract_bias

    def part(self, parts: int) -> Inputs:
        """The same inputs with only the first 1 / `parts` of the experts resident, as views."""
        count = self.expand_weight.shape[0] // parts
        first = lambda t: None if t is None else t.detach()[:count].requires_grad_()
        names = ("expand_weight", "contract_weight", "expand_bias", "contract_bias")
        return replace(self, **{name: first(getattr(self, name)) for name in names})


def make_inputs(
    model: Model,
    tokens: int,
    routing: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Inputs:
    """Random tokens of unit variance and weights of deviation 1/sqrt(fan-in), from a seed."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*sizes: int, scale: float = 1.0) -> Tensor:
        made = torch.empty(sizes, device=device, dtype=dtype)
        return made.normal_(0, scale, generator=generator)

    route = {"balanced": balanced_experts, "zipf": zipf_experts}[routing]
    d, n, e = model.hidden, model.expert, model.experts
    biases = (draw(e, model.wide), draw(e, d)) if model.bias else (None, None)
    made = Inputs(
        model=model,
        x=draw(tokens, d),
        weights=torch.rand(tokens, model.top_k, generator=generator, device=device),
        experts=route(model, tokens, generator),
        expand_weight=draw(e, model.wide, d, scale=d**-0.5),
        contract_weight=draw(e, d, n, scale=n**-0.5),
        expand_bias=biases[0],
        contract_bias=biases[1],
        grad_y=draw(tokens, d),
    )
    for leaf in made.leaves:
        leaf.requires_grad_()
    return made


def our_experts(inputs: Inputs, **totals: Tensor) -> Tensor:
    """compact, expand, contract, combine. `totals`: those of `ops.moe_experts`."""
    i = inputs
    table = ops.compact(i.experts, i.resident_index, i.expand_weight.shape[0])
    return ops.moe_experts(
        i.x,
        i.weights,
        table,
        i.expand_weight,
        i.contract_weight,
        i.model.activation,
        expand_bias=i.expand_bias,
        contract_bias=i.contract_bias,
        **totals,
    )


def torch_experts(inputs: Inputs, layer: rivals.Layer = rivals.grouped_mm_experts) -> Tensor:
    i = inputs
    return layer(
        i.x,
        i.weights,
        i.experts,
        i.resident_index,
        i.expand_weight,
        i.contract_weight,
        i.model.activation,
        i.expand_bias,
        i.contract_bias,
    )


def compiled_experts(inputs: Inputs) -> Callable[[Inputs], Tensor]:
    """grouped_mm_experts under torch.compile. Raises `rivals.Absent` on the CPU."""
    if not inputs.x.is_cuda:
        raise rivals.Absent("it is measured on a GPU only")
    torch.compiler.reset()  # versions of earlier cases count against a limit
    layer = torch.compile(rivals.grouped_mm_experts, dynamic=False, fullgraph=True)
    return lambda inputs: torch_experts(inputs, layer)


def other_experts(inputs: Inputs, name: str) -> Callable[[Inputs], Tensor]:
    """A layer of `rivals.OTHERS` with these weights. Raises `rivals.Absent`."""
    i = inputs
    weights = (i.resident_index, i.expand_weight, i.contract_weight, i.model.activation)
    run = rivals.OTHERS[name](*weights, i.model.bias)
    return lambda inputs: run(inputs.x, inputs.weights, inputs.experts)


def with_gradients(layer: Callable[[Inputs], Tensor], inputs: Inputs) -> Outputs:
    """y and the gradients of all leaves."""
    y = layer(inputs)
    return y, *torch.autograd.grad(y, inputs.leaves, inputs.grad_y)


def with_mode(
    layer: Callable[[Inputs], Tensor], inputs: Inputs, backward: bool
) -> Callable[[], tuple[Tensor, ...]]:
    """A call of the layer: forward alone, or with all gradients."""
    if backward:
        return lambda: with_gradients(layer, inputs)

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (layer(inputs),)

    return forward


@dataclass
class WholeLayers:
    """MoELayer with the inputs' weights, and the same layer made of torch ops. `router`: arguments
    for `rivals.routed`.
    """

    ours: MoELayer
    router: tuple[Tensor, Tensor, int]
    theirs: rivals.Layer
    inputs: Inputs

    @property
    def leaves(self) -> list[Tensor]:
        every = (self.inputs.x, self.ours.router.weight, *self.ours.experts.parameters())
        return list(every)

    def run_ours(self) -> Outputs:
        return self._gradients(self.ours(self.inputs.x))

    def run_theirs(self) -> Outputs:
        e = self.ours.experts
        parameters = (e.expand_weight, e.contract_weight, e.activation)
        biases = (e.expand_bias, e.contract_bias)
        return self._gradients(
            self.theirs(self.inputs.x, self.inputs.resident_index, *parameters, *biases)
        )

    def _gradients(self, y: Tensor) -> Outputs:
        return y, *torch.autograd.grad(y, self.leaves, self.inputs.grad_y)


def make_layers(inputs: Inputs) -> WholeLayers:
    """Layers whose router chooses each expert about as often as the inputs' routing does. They
    share the inputs' weights, so that no second copy is needed.
    """
    model, device = inputs.model, inputs.x.device
    residents = inputs.expand_weight.shape[0]
    layer = MoELayer(
        model.hidden,
        model.expert,
        model.experts,
        model.top_k,
        activation=model.activation,
        expert_bias=model.bias,
        resident_experts=range(residents),
        device="meta",
        dtype=inputs.x.dtype,
    )
    layer.router.to_empty(device=device)
    layer.router.reset_parameters()
    layer.load_since_update = torch.zeros_like(layer.load_since_update, device=device)
    experts = layer.experts
    for name in experts.parts:
        setattr(experts, name, nn.Parameter(getattr(inputs, name).detach()))
    with torch.no_grad():
        scores = layer.router.logits(inputs.x).sigmoid()
        wanted = torch.bincount(inputs.experts.flatten(), minlength=model.experts)
        bias = fit_selection_bias(scores, wanted, model.top_k)
        layer.router.selection_bias.copy_(bias)
    router = (layer.router.weight, bias, model.top_k)
    return WholeLayers(layer, router, rivals.routed(rivals.grouped_mm_experts, *router), inputs)


# ---- verbs ---------------------------------------------------------------------------------------


@dataclass
class Verbs:
    """The six grouped GEMMs of a layer, by our kernels and by any `Products`, from the same inputs.

    If the input of a GEMM is the result of another, it is computed with plain torch. Rows past the
    end are not compared.
    """

    inputs: Inputs
    preact: Tensor = field(init=False)  # [S, G*N]; this and the next three are 0 past the last row
    act: Tensor = field(init=False)
    grad_preact: Tensor = field(init=False)
    scaled_act: Tensor = field(init=False)

    def __post_init__(self) -> None:
        loop, slots = rivals.LoopProducts(), self.inputs.load.slots
        detached = lambda t: None if t is None else t.detach()
        names = ("x", "weights", "expand_weight", "contract_weight", "expand_bias", "contract_bias")
        self.inputs = replace(
            self.inputs, **{name: detached(getattr(self.inputs, name)) for name in names}
        )

        def padded(rows: Tensor) -> Tensor:
            made = rows.new_zeros(slots, rows.shape[1])
            made[: rows.shape[0]] = rows
            return made

        act, preact = self.expand(loop)
        self.act, self.preact = padded(act), padded(preact)
        grad_preact, scaled_act, _ = self.contract_backward(loop)
        self.grad_preact, self.scaled_act = padded(grad_preact), padded(scaled_act)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(work.gemms(self.inputs.model, self.inputs.load))

    # Index tables, of existing rows only.
    @property
    def _tokens(self) -> Tensor:
        return self.inputs.table.token_of_row[: self.inputs.rows]

    @property
    def _ends(self) -> Tensor:
        return self.inputs.table.offsets[1:]

    def _with_bias(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None:
            return rows
        counts = torch.tensor(self.inputs.load.groups, device=rows.device)
        resident = torch.arange(len(counts), device=rows.device)
        return rows + bias[resident.repeat_interleave(counts, output_size=rows.shape[0])]

    # With plain torch and `products`.
    def expand(self, products: Products) -> Outputs:
        """act, preact"""
        i = self.inputs
        x = i.x.index_select(0, self._tokens)
        preact = products.rows(x, i.expand_weight.transpose(1, 2), self._ends)
        preact = self._with_bias(preact, i.expand_bias)
        return rivals.activate(preact, i.model.activation), preact

    def contract(self, products: Products) -> Outputs:
        i = self.inputs
        weight = i.contract_weight.transpose(1, 2)
        rows = products.rows(self.act[: i.rows], weight, self._ends)
        return (self._with_bias(rows, i.contract_bias),)

    def contract_backward(self, products: Products) -> Outputs:
        """grad_preact, scaled_act, grad_weights"""
        i = self.inputs
        slots = i.table.slot_of_row[: i.rows].long()
        grads = i.grad_y.index_select(0, self._tokens)
        g = products.rows(grads, i.contract_weight, self._ends)
        weight = i.weights.flatten()[slots, None]
        with torch.enable_grad():
            preact = self.preact[: i.rows].detach().requires_grad_()
            act = rivals.activate(preact, i.model.activation)
        (grad_preact,) = torch.autograd.grad(act, preact, (weight * g).to(g.dtype))
        dots = (act.detach().float() * g.float()).sum(1)
        if i.contract_bias is not None:
            bias = self._with_bias(torch.zeros_like(grads), i.contract_bias)
            dots = dots + (bias.float() * grads.float()).sum(1)
        grad_weights = torch.zeros_like(i.weights).flatten().index_copy(0, slots, dots)
        scaled_act = (weight * act.detach()).to(g.dtype)
        return grad_preact, scaled_act, grad_weights.view_as(i.weights)

    def grouped_rows(self, products: Products) -> Outputs:
        i = self.inputs
        return (products.rows(self.grad_preact[: i.rows], i.expand_weight, self._ends),)

    def expand_weight_grad(self, products: Products) -> Outputs:
        i = self.inputs
        x = i.x.index_select(0, self._tokens)
        return (products.weights(self.grad_preact[: i.rows], x, self._ends),)

    def contract_weight_grad(self, products: Products) -> Outputs:
        i = self.inputs
        grads = i.grad_y.index_select(0, self._tokens)
        return (products.weights(grads, self.scaled_act[: i.rows], self._ends),)

    def theirs(self, name: str, products: Products) -> Outputs:
        return getattr(self, name)(products)

    # With our kernels.
    def ours(self, name: str) -> Outputs:
        """The same outputs as `theirs`, but with undefined rows past the end."""
        i, t = self.inputs, self.inputs.table
        activation = activation_id(i.model.activation)
        if name == "expand":
            return _ops.expand(
                i.x,
                i.expand_weight,
                i.expand_bias,
                t.token_of_row,
                t.row_of_slot,
                t.offsets,
                t.tiles,
                activation,
                True,
            )
        if name == "contract":
            weights = (i.contract_weight, i.contract_bias)
            return (_ops.contract(self.act, *weights, t.offsets, t.tiles),)
        if name == "contract_backward":
            return _ops.contract_backward(
                i.grad_y,
                i.contract_weight,
                i.contract_bias,
                self.preact,
                i.weights,
                t.token_of_row,
                t.slot_of_row,
                t.offsets,
                t.tiles,
                activation,
            )
        if name == "grouped_rows":
            return (_ops.grouped_rows(self.grad_preact, i.expand_weight, t.offsets, t.tiles),)
        if name == "expand_weight_grad":
            indices = (None, t.token_of_row)
            return (_ops.weight_grad(self.grad_preact, i.x, *indices, t.offsets),)
        indices = (t.token_of_row, None)
        return (_ops.weight_grad(i.grad_y, self.scaled_act, *indices, t.offsets),)

    def our_rows(self, name: str) -> Outputs:
        """`ours` without the rows past the end."""
        slots, rows = self.inputs.load.slots, self.inputs.rows
        cut = lambda t: t[:rows] if t.dim() == 2 and t.shape[0] == slots else t
        return tuple(map(cut, self.ours(name)))

    def dense(self, name: str) -> Callable[[], Tensor]:
        """A dense GEMM of as many FLOPs: all rows times one weight, or one weight gradient of all
        rows.
        """
        i, gemm = self.inputs, work.gemms(self.inputs.model, self.inputs.load)[name]
        draw = lambda *sizes: torch.randn(*sizes, device=i.x.device, dtype=i.x.dtype)
        if gemm.makes_weights:
            left, right = draw(gemm.length, i.rows), draw(i.rows, gemm.columns)
        else:
            left, right = draw(i.rows, gemm.length), draw(gemm.length, gemm.columns)
        assert 2 * math.prod(left.shape) * right.shape[1] == gemm.flops
        return lambda: left @ right
