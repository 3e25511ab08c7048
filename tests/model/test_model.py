"""The language model: shapes, causality, rotary positions, norms, ties, initial bits, gradients."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_model import SMALL, small, tokens
from torch import Tensor

from fomoe_ext.config.model import ModelConfig, count_parameters, expert_parameters
from fomoe_ext.config.presets import PRESETS
from fomoe_ext.layer.moe import MoELayer
from fomoe_ext.model.language import (
    LanguageModel,
    layer_options,
    optimizer_groups,
    parameter_kinds,
    rope_table,
    rotate,
)
from fomoe_ext.placement import Placement


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().numpy().tobytes()


# ---- against the definition in fp64 --------------------------------------------------------------


def reference_norm(x: Tensor, gain: Tensor, kind: str) -> Tensor:
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain


def reference_rotation(x: Tensor, base: float) -> Tensor:
    """Pair (i, i + S/2) of position p as a complex number, times exp(1j * p * base^(-2i/S))."""
    size = x.shape[-1]
    pairs = torch.complex(x[..., : size // 2], x[..., size // 2 :])
    for position in range(x.shape[-2]):
        for i in range(size // 2):
            angle = position * base ** (-2 * i / size)
            pairs[..., position, i] *= complex(math.cos(angle), math.sin(angle))
    return torch.cat((pairs.real, pairs.imag), dim=-1)


def reference_attention(x: Tensor, p: dict[str, Tensor], config: ModelConfig) -> Tensor:
    heads = []
    q, k, v = (x @ w.T for w in p["attention.qkv_weight"].chunk(3))
    for h in range(config.num_heads):
        part = slice(h * config.head_size, (h + 1) * config.head_size)
        turned = [reference_rotation(t[..., part], config.rope_base) for t in (q, k)]
        scores = turned[0] @ turned[1].transpose(-1, -2) / math.sqrt(config.head_size)
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        heads.append(scores.masked_fill(later, -math.inf).softmax(-1) @ v[..., part])
    return torch.cat(heads, dim=-1) @ p["attention.out_weight"].T


def reference_moe(x: Tensor, p: dict[str, Tensor], config: ModelConfig, ids: tuple) -> Tensor:
    scores = (x @ p["moe.router.weight"].T).sigmoid()
    y = torch.zeros_like(x)
    chosen = scores.topk(config.top_k, dim=-1).indices
    for row, expert in enumerate(ids):
        gate, up = (x @ p["moe.experts.expand_weight"][row].T).chunk(2, dim=-1)
        out = (F.silu(gate) * up) @ p["moe.experts.contract_weight"][row].T
        weight = scores[..., expert] * (chosen == expert).any(-1)
        y += weight.unsqueeze(-1) * out
    return y


def reference_logits(model: LanguageModel, ids: Tensor) -> Tensor:
    """The Peri-LN model of the FoMoE paper in fp64: x + m * norm(F(norm(x))) for every branch F."""
    config = model.config
    state = {n: p.detach().double() for n, p in model.named_parameters()}
    m = config.depth_multiplier
    x = reference_norm(state["embedding"][ids], state["embedding_norm.weight"], config.norm)
    for layer, block in enumerate(model.blocks):
        prefix = f"blocks.{layer}."
        p = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}

        def norm(x: Tensor, name: str, p: dict[str, Tensor] = p) -> Tensor:
            return reference_norm(x, p[f"{name}.weight"], config.norm)

        y = reference_attention(norm(x, "attention_in"), p, config)
        x = x + m * norm(y, "attention_out")
        y = reference_moe(norm(x, "moe_in"), p, config, block.moe.experts.resident_experts)
        x = x + m * norm(y, "moe_out")
    return reference_norm(x, state["final_norm.weight"], config.norm) @ state["embedding"].T


@pytest.mark.parametrize("resident", [False, True], ids=["all", "half"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_against_fp64(norm: str, resident: bool) -> None:
    config = small(norm=norm, depth_multiplier=0.7, rope_base=100.0)
    placement = (
        Placement.cyclic(num_sites=4, num_experts=8, num_layers=2, replication=2)
        if resident
        else None
    )
    model = LanguageModel(config, placement, None if placement is None else 1, seed=5)
    with torch.no_grad():  # gains of 1 would hide a norm that is left out
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.copy_(torch.rand(p.shape, generator=torch.Generator().manual_seed(len(name))))
    ids = tokens(3, 17, seed=1)
    got, wanted = model(ids), reference_logits(model, ids)
    assert got.shape == (3, 17, 50)
    assert (got.double() - wanted).norm() / wanted.norm() < 3e-6
    loss = model.loss(ids).cross_entropy.item()
    picked = wanted[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
    assert loss == pytest.approx(-picked.mean().item(), rel=1e-5)


def test_rotary_positions_are_relative() -> None:
    table = rope_table(64, 8, 10000.0)
    assert table.shape == (2, 64, 4)
    x = torch.randn(2, 3, 64, 8, dtype=torch.float64)
    wanted = reference_rotation(x, 10000.0)
    assert torch.allclose(rotate(x, table.double()), wanted, atol=1e-5)
    assert torch.allclose(rotate(x, table.double()).norm(dim=-1), x.norm(dim=-1), atol=1e-6)
    # <q at p, k at p - 5> does not depend on p.
    q, k = (torch.randn(8, dtype=torch.float64).expand(1, 1, 64, 8) for _ in range(2))
    scores = (rotate(q, table.double()) @ rotate(k, table.double()).transpose(-1, -2))[0, 0]
    diagonal = scores.diagonal(-5)
    assert torch.allclose(diagonal, diagonal[:1].expand(59), atol=1e-5)
    assert scores[:, 0].std() > 0.1


@pytest.mark.parametrize("scope", ["global", "resident"])
def test_a_later_token_changes_no_earlier_logit(scope: str) -> None:
    config = small(router_scope=scope)
    model = LanguageModel(
        config,
        Placement.cyclic(num_sites=4, num_experts=8, num_layers=2, replication=2),
        site=2,
        seed=1,
    )
    ids = tokens(2, 19)
    before = model(ids)
    for place in (1, 7, 18):
        changed = ids.clone()
        changed[:, place] = (changed[:, place] + 1) % 50
        after = model(changed)
        assert torch.equal(before[:, :place], after[:, :place])
        assert not torch.isclose(before[:, place:], after[:, place:]).all(-1).any()
    # Nor does the length of the sequence, up to the order of additions in the attention.
    assert torch.allclose(model(ids[:, :9]), before[:, :9], atol=2e-5)


def test_sequences_of_a_batch_do_not_mix() -> None:
    model = LanguageModel(SMALL, seed=1)
    ids = tokens(4, 12)
    together = model(ids)
    for row in range(4):
        assert torch.allclose(model(ids[row : row + 1])[0], together[row], atol=2e-5)


def test_embeddings_are_tied() -> None:
    model = LanguageModel(SMALL)
    assert sum(p.shape == (50, 24) for p in model.parameters()) == 1
    ids = tokens(1, 6)
    before = model(ids)
    unused = next(i for i in range(50) if i not in ids)
    with torch.no_grad():
        model.embedding[unused] *= 2
    after = model(ids)
    assert torch.equal(after[..., unused], 2 * before[..., unused])
    kept = [i for i in range(50) if i != unused]
    assert torch.equal(after[..., kept], before[..., kept])


def test_skipped_tokens_get_exactly_nothing_from_the_moe() -> None:
    """A norm with a bias, or one that divides by zero, would turn a skipped token into noise."""
    model = LanguageModel(
        small(top_k=1),
        Placement.cyclic(num_sites=4, num_experts=8, num_layers=2, replication=1),
        site=1,
        seed=3,
    )
    block = model.blocks[0]
    x = torch.randn(4, 19, 24, generator=torch.Generator().manual_seed(0))
    y = x + block.attention_out(block.attention(block.attention_in(x), model.rope))
    _, chosen = block.moe.router(block.moe_in(y).flatten(0, 1).detach())
    resident = torch.tensor(block.moe.experts.resident_experts)
    skipped = ~torch.isin(chosen, resident).any(-1).view(4, 19)
    assert 0 < skipped.sum() < 4 * 19
    same = (block(x, model.rope) == y).all(-1)
    assert torch.equal(same, skipped)


# ---- initial weights and resident experts --------------------------------------------------------


@pytest.mark.parametrize("replication", [1, 2, 4])
@pytest.mark.parametrize("shared", [0, 12])
def test_initial_bits_do_not_depend_on_the_placement(replication: int, shared: int) -> None:
    config = small(shared_expert_intermediate_size=shared)
    full = LanguageModel(config, seed=9)
    whole = dict(full.named_parameters())
    for placement in (
        Placement.cyclic(num_sites=4, num_experts=8, num_layers=2, replication=replication),
        Placement.random(
            num_sites=4, num_experts=8, num_layers=2, replication=replication, seed=1, epoch=3
        ),
    ):
        for site in range(4):
            torch.manual_seed(site)  # the global generator must play no part
            model = LanguageModel(config, placement, site, seed=9)
            for kind, named in parameter_kinds(model).items():
                for name, p in named:
                    if kind == "sparse":
                        layer = int(name.split(".")[1])
                        for row, expert in enumerate(placement.resident(layer, site)):
                            assert bits(p[row]) == bits(whole[name][expert])
                    else:
                        assert bits(p) == bits(whole[name])


def test_no_two_weights_start_alike_and_the_seed_counts() -> None:
    model, other = LanguageModel(SMALL, seed=1), LanguageModel(SMALL, seed=2)
    drawn = []
    for one in (model, other):
        for name, p in one.named_parameters():
            if "experts" in name:
                drawn += [bits(row) for row in p]
            elif p.dim() > 1:
                drawn.append(bits(p))
    assert len(set(drawn)) == len(drawn) == 2 * (1 + 2 * (3 + 16))


def test_initial_scale() -> None:
    model = LanguageModel(small(hidden_size=96, intermediate_size=64, vocab_size=300), seed=0)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            assert p.std().item() == pytest.approx(p.shape[-1] ** -0.5, rel=0.05), name
            assert abs(p.mean().item()) < 0.02 * p.shape[-1] ** -0.5 * 5, name
        else:
            assert bool((p == 1).all())
    loss = model.loss(tokens(4, 20, vocab_size=300)).cross_entropy.item()
    assert math.log(300) - 0.3 < loss < math.log(300) + 1.5  # near an undecided guess


@pytest.mark.parametrize(("sites", "replication"), [(4, 1), (4, 2), (4, 3), (2, 1), (4, 4)])
def test_only_resident_experts_are_allocated(sites: int, replication: int) -> None:
    full = parameter_kinds(LanguageModel(SMALL))
    placement = Placement.cyclic(
        num_sites=sites, num_experts=8, num_layers=2, replication=replication
    )
    for site in range(sites):
        model = LanguageModel(SMALL, placement, site)
        kinds = parameter_kinds(model)
        sizes = {k: sum(p.numel() for _, p in named) for k, named in kinds.items()}
        everything = {k: sum(p.numel() for _, p in named) for k, named in full.items()}
        assert sizes["sparse"] * sites == everything["sparse"] * replication
        assert sizes["dense"] == everything["dense"]
        assert sizes["router"] == everything["router"]
        storage = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                   for t in [*model.parameters(), *model.buffers()]}  # fmt: skip
        buffers = sum(b.nbytes for b in model.buffers())
        assert sum(storage.values()) == 4 * sum(sizes.values()) + buffers
        assert buffers < 8 * (SMALL.seq_len * 8 + 2 * 8 * 4)
        for layer, moe in enumerate(model.moe_layers()):
            assert moe.experts.resident_experts == placement.resident(layer, site)


# ---- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        small(activation="silu", shared_expert_intermediate_size=12),
        small(activation="geglu", shared_expert_intermediate_size=5, num_experts=5),
        small(activation="clamped_swiglu", shared_expert_intermediate_size=5, expert_bias=True),
        PRESETS["tiny"][0],
    ],
    ids=["small", "plain", "shared", "biases", "tiny"],
)
def test_counted_parameters_are_the_built_ones(config: ModelConfig) -> None:
    kinds = parameter_kinds(LanguageModel(config, device="meta"))
    counts = count_parameters(config)
    for kind in ("dense", "sparse", "router"):
        assert sum(p.numel() for _, p in kinds[kind]) == getattr(counts, kind)
    assert counts.sparse == config.num_layers * config.num_experts * expert_parameters(config)


@pytest.mark.parametrize(("name", "total"), [("54m", 54.4e6), ("153m", 152.9e6), ("1.8b", 1.82e9)])
def test_paper_presets_build_on_the_meta_device(name: str, total: float) -> None:
    """What torch would allocate; the paper says about 54 and 153 million and 1.8 billion."""
    config = PRESETS[name][0]
    placement = Placement.cyclic(
        num_sites=4,
        num_experts=config.num_experts,
        num_layers=config.num_layers,
        replication=2,
    )
    model = LanguageModel(config, placement, 3, device="meta")
    assert all(p.is_meta for p in model.parameters())
    counts = count_parameters(config)
    allocated = sum(p.numel() for p in model.parameters())
    assert allocated == counts.total - counts.sparse // 2
    assert counts.total == pytest.approx(total, rel=0.001)


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [0, 12])
@pytest.mark.parametrize("balance", ["none", "entropy", "switch"])
@pytest.mark.parametrize("scope", ["global", "resident"])
def test_gradients_reach_every_resident_parameter(scope: str, balance: str, shared: int) -> None:
    config = small(router_scope=scope, balance=balance, shared_expert_intermediate_size=shared)
    placement = Placement.cyclic(num_sites=4, num_experts=8, num_layers=2, replication=2)
    model = LanguageModel(config, placement, site=3, seed=2)
    loss = model.loss(tokens(16, 20))
    assert loss.cross_entropy.shape == loss.aux_loss.shape == ()
    assert (loss.aux_loss.item() != 0) == (balance != "none")
    assert loss.total.item() == pytest.approx((loss.cross_entropy + loss.aux_loss).item())
    loss.total.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        if "experts" in name:
            assert (p.grad.flatten(1).abs().amax(1) > 0).all(), name
        elif "router" not in name:
            assert (p.grad != 0).any(), name
    for layer, moe in enumerate(model.moe_layers()):
        resident = placement.resident(layer, 3)
        others = [e for e in range(8) if e not in resident]
        gradient = moe.router.weight.grad.abs().amax(1)
        assert (gradient[list(resident)] > 0).all()
        if balance == "none":
            assert not gradient[others].any()  # nothing is learnt about experts that are elsewhere


def test_auxiliary_losses_are_summed_over_the_layers() -> None:
    model = LanguageModel(small(balance="switch", balance_coef=0.5), seed=0)
    loss = model.loss(tokens(2, 10))
    assert loss.aux_loss.item() == pytest.approx(sum(m.aux_loss.item() for m in model.moe_layers()))
    assert loss.aux_loss.item() > 2 * 0.5 * 0.9  # one per layer and even routing, times 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns_a_short_text_by_heart(dtype: torch.dtype) -> None:
    model = LanguageModel(small(hidden_size=48, intermediate_size=32), seed=0)
    text = tokens(2, 20, seed=3)
    optimizer = torch.optim.AdamW(optimizer_groups(model, 0.1), lr=1e-2)
    for _ in range(60):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model.loss(text).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_same_input_twice_gives_the_same_bits() -> None:
    results = []
    for _ in range(2):
        model = LanguageModel(
            SMALL,
            Placement.cyclic(num_sites=2, num_experts=8, num_layers=2, replication=1),
            site=0,
            seed=4,
        )
        model.loss(tokens(5, 20)).total.backward()
        results.append([bits(p.grad) for p in model.parameters()])
    assert results[0] == results[1]


def test_optimizer_groups() -> None:
    model = LanguageModel(small(shared_expert_intermediate_size=12, expert_bias=True))
    decayed, plain = optimizer_groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    ids = [id(p) for group in (decayed, plain) for p in group["params"]]
    assert sorted(ids) == sorted(map(id, model.parameters()))
    names = {name for name, p in model.named_parameters() if any(p is q for q in plain["params"])}
    assert {name.rpartition(".")[2] for name in names} == {"weight", "expand_bias", "contract_bias"}
    assert all(p.dim() == 1 for p in plain["params"] if p.shape[0] != SMALL.num_experts)
    model.embedding.requires_grad_(False)
    assert len(optimizer_groups(model)[0]["params"]) == len(decayed["params"]) - 1
    for bad in (-0.1, math.nan):
        with pytest.raises(ValueError, match="weight_decay must be >= 0"):
            optimizer_groups(model, bad)


def test_copies_and_state_dicts() -> None:
    placement = Placement.cyclic(num_sites=4, num_experts=8, num_layers=2, replication=2)
    model = LanguageModel(SMALL, placement, 1, seed=1)
    ids = tokens(2, 10)
    wanted = model(ids)
    model.loss(ids).total.backward()
    assert torch.equal(copy.deepcopy(model)(ids), wanted)
    other = LanguageModel(SMALL, placement, 1, seed=2)
    assert not torch.equal(other(ids), wanted)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids), wanted)
    assert "rope" not in model.state_dict()


def test_lower_precision() -> None:
    model = LanguageModel(SMALL, seed=1, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    ids = tokens(2, 10)
    got, wanted = model(ids), LanguageModel(SMALL, seed=1)(ids)
    assert got.dtype == torch.bfloat16
    assert (got.float() - wanted).norm() / wanted.norm() < 0.2  # rounding may change the choice
    assert model.loss(ids).cross_entropy.dtype == torch.float32


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        ([[1, 2]], TypeError, "int64 tensor, got list"),
        (torch.zeros(2, 3), TypeError, "got torch.float32"),
        (torch.zeros(2, 3, dtype=torch.int32), TypeError, "got torch.int32"),
        (torch.zeros(3, dtype=torch.int64), ValueError, r"B >= 1 and 1 <= L <= 19, got \(3,\)"),
        (torch.zeros(2, 0, dtype=torch.int64), ValueError, r"\(2, 0\)"),
        (torch.zeros(0, 2, dtype=torch.int64), ValueError, r"\(0, 2\)"),
        (torch.zeros(1, 20, dtype=torch.int64), ValueError, r"L <= 19, got \(1, 20\)"),
        (torch.full((1, 3), 50), IndexError, "out of range"),
        (torch.full((1, 3), -1), IndexError, "out of range"),
    ],
)
def test_bad_tokens(bad: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        LanguageModel(SMALL)(bad)


def test_bad_tokens_of_the_loss() -> None:
    model = LanguageModel(SMALL)
    with pytest.raises(ValueError, match=r"\[B, L \+ 1\] with L >= 1, got \(3, 1\)"):
        model.loss(tokens(3, 1))
    with pytest.raises(ValueError, match="<= 20, got"):
        model.loss(tokens(3, 21))
    assert model.loss(tokens(3, 20)).total.isfinite()


def test_nan_weights_are_reported_not_trained_on() -> None:
    model = LanguageModel(SMALL)
    with torch.no_grad():
        model.embedding[3] = math.nan
    with pytest.raises(ValueError, match="logits"):
        model(torch.full((1, 4), 3))


@pytest.mark.parametrize(
    ("placement", "site", "words"),
    [
        (
            Placement.cyclic(num_sites=4, num_experts=8, num_layers=3, replication=2),
            0,
            "model.s 2 layers of 8 experts, got one for 3 layers of 8",
        ),
        (
            Placement.cyclic(num_sites=4, num_experts=16, num_layers=2, replication=2),
            0,
            "model.s 2 layers of 8 experts, got one for 2 layers of 16",
        ),
        (
            Placement.cyclic(num_sites=4, num_experts=8, num_layers=2, replication=2),
            4,
            r"site must be in \[0, 4\), got 4",
        ),
        (
            Placement.cyclic(num_sites=4, num_experts=8, num_layers=2, replication=2),
            -1,
            r"site must be in \[0, 4\), got -1",
        ),
        (
            Placement.cyclic(num_sites=4, num_experts=8, num_layers=2, replication=2),
            None,
            r"site must be in \[0, 4\), got None",
        ),
        (None, 1, "site must be given with a placement, got site = 1 without one"),
    ],
)
def test_bad_placements(placement: Placement | None, site: int | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LanguageModel(SMALL, placement, site)


def test_a_configuration_of_another_kind() -> None:
    with pytest.raises(TypeError, match="ModelConfig, got dict"):
        LanguageModel({"hidden_size": 24})  # type: ignore[arg-type]


def test_layers_get_the_options_of_a_model_by_name() -> None:
    """What a layer has besides is the site's, or only a converted model's (router_bias)."""
    config = ModelConfig(balance="entropy", balance_coef=0.5, top_k=3, router_scale=2.5)
    options = layer_options(config)
    assert {n: options[n] for n in ("balance", "balance_coef", "top_k", "router_scale")} == {
        "balance": "entropy",
        "balance_coef": 0.5,
        "top_k": 3,
        "router_scale": 2.5,
    }
    parameters = set(inspect.signature(MoELayer).parameters)
    of_the_site = {"resident_experts", "stale_experts", "layer_index", "seed", "device", "dtype"}
    assert parameters - options.keys() == of_the_site | {"mesh", "rank_experts", "router_bias"}
    assert options.keys() <= parameters
