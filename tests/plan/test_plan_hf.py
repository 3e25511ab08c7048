"""Sizes read from config.json of transformers' models, against the models themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fomoe_ext import cli
from fomoe_ext.placement import wire
from fomoe_ext.plan import memory as plan_memory
from fomoe_ext.plan import traffic as plan
from fomoe_ext.plan.hf import FAMILIES, read_hf_config

pytest.importorskip("transformers")
from hf_models import EXPERTS, LAYERS, TOP_K, WIDTH, make_config
from hf_models import FAMILIES as NAMES

VARIANTS = {
    "mixtral": [{}, {"tie_word_embeddings": True, "head_dim": 16}, {"sliding_window": 5}],
    "qwen2_moe": [{}, {"qkv_bias": False, "decoder_sparse_step": 2, "tie_word_embeddings": True}],
    "qwen3_moe": [{}, {"attention_bias": True, "mlp_only_layers": []}],
    "olmoe": [{}, {"attention_bias": True, "num_key_value_heads": 4}],
    "deepseek_v3": [{}, {"q_lora_rank": None, "attention_bias": True, "first_k_dense_replace": 0}],
    "gpt_oss": [{}, {"attention_bias": False, "layer_types": ["sliding_attention"] * LAYERS}],
}
CASES = [(family, changes) for family, found in VARIANTS.items() for changes in found]


def counted(family: str, changes: dict) -> tuple[int, int, int]:
    """Dense, expert and router parameters of the model itself, on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    from fomoe_ext.hf.families import family_of

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make_config(family, **changes))
    experts = routers = 0
    for _, block in model.named_modules():
        kind = family_of(block)
        if kind is not None:
            experts += sum(p.numel() for p in block.get_submodule("experts").parameters())
            routers += sum(p.numel() for p in block.get_submodule(kind.router).parameters())
    total = sum(parameter.numel() for parameter in model.parameters())  # tied ones once
    return total - experts - routers, experts, routers


def test_families_are_those_of_the_conversion():
    assert set(FAMILIES) == set(NAMES) == set(VARIANTS)


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_parameters_are_those_of_the_model(family, changes, tmp_path):
    make_config(family, **changes).save_pretrained(tmp_path)
    sizes = read_hf_config(tmp_path, 16)
    assert tuple(sizes.counts) == counted(family, changes)
    assert (sizes.num_experts, sizes.top_k, sizes.hidden_size) == (EXPERTS, TOP_K, WIDTH)
    moe_layers = sizes.num_layers
    in_blocks = moe_layers * (sizes.block + EXPERTS * (sizes.expert + sizes.router_row))
    if moe_layers == LAYERS:  # what is left is embedding, head and the last norm
        heads = 1 if changes.get("tie_word_embeddings") else 2
        assert sizes.counts.total - in_blocks == heads * 64 * WIDTH + WIDTH
    shares = [plan_memory._dense_share(sizes, rank, 3) for rank in range(3)]
    assert sum(shares) == sizes.counts.dense + sizes.counts.router


def test_published_sizes(tmp_path):
    """Mixtral 8x7B: 46.7B parameters; its experts are 45.1B of them."""
    mixtral = {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
    }
    (tmp_path / "config.json").write_text(json.dumps(mixtral))
    sizes = read_hf_config(tmp_path / "config.json", 2048)
    assert sizes.counts.total == 46_702_792_704
    assert sizes.counts.sparse == 32 * 8 * 3 * 4096 * 14336


@pytest.mark.parametrize("family", NAMES)
def test_flops_are_twice_the_matrices_and_what_attention_takes(family, tmp_path):
    """Counted by torch for a forward pass of the dense attention and all chosen experts."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    config = make_config(family)
    config._attn_implementation, config._experts_implementation = "eager", "eager"
    config.save_pretrained(tmp_path)
    length = 24
    model = AutoModelForCausalLM.from_config(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(length)[None] + 3)
    sizes = read_hf_config(tmp_path, length)
    from fomoe_ext.plan.cost import flops_per_token

    flops = flops_per_token(sizes)
    # Eager attention computes the whole square; a sequence of 24 has (24 + 1) / 2 on average.
    whole = flops.forward + sizes.attention_scores * (2 * length / (length + 1) - 1)
    assert counter.get_total_flops() / length == pytest.approx(whole, rel=2e-3)


def test_a_sliding_window_attends_to_less(tmp_path):
    make_config("mixtral", sliding_window=4).save_pretrained(tmp_path)
    near = read_hf_config(tmp_path, 10)
    make_config("mixtral").save_pretrained(tmp_path)
    far = read_hf_config(tmp_path, 10)
    seen = [min(t + 1, 4) for t in range(10)]
    assert near.attention_scores / far.attention_scores == pytest.approx(sum(seen) / 55)


@pytest.mark.parametrize("family", NAMES)
def test_a_plan_of_a_transformers_model(family, tmp_path, capsys):
    make_config(family).save_pretrained(tmp_path)
    flags = ["--hf-config", str(tmp_path), "--sites", "4", "--replication", "2", "--seq-len", "8"]
    assert cli.main(["plan", "--json", *flags, "--codec", "int8"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["parameters"]["total"] == sum(counted(family, {}))
    assert planned["model"] == str(tmp_path) and planned["local_steps"] == 32
    assert planned["tokens_per_round"] == 8 * 16 * 32
    ratio = planned["jobs"]["full replica"]["memory"] / planned["jobs"]["FoMoE"]["memory"]
    assert 1 < ratio < 2


@pytest.mark.parametrize("family", NAMES)
def test_bytes_are_those_that_the_converted_model_sends(family, tmp_path):
    """The pieces that `OuterSync` lays out for a converted model, by owner group."""
    import torch
    from transformers import AutoModelForCausalLM

    from fomoe_ext import hf
    from fomoe_ext.outer.layout import parameter_pieces
    from fomoe_ext.placement import Placement

    config = make_config(family)
    config.save_pretrained(tmp_path)
    sizes = read_hf_config(tmp_path, 8)
    placement = Placement.cyclic(
        num_sites=4, num_experts=EXPERTS, num_layers=sizes.num_layers, replication=2
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    hf.convert(model, placement, 1)
    laid: dict[tuple[int, ...], int] = {}
    for piece in parameter_pieces(model, placement, 1, "all"):
        laid[piece.owners] = laid.get(piece.owners, 0) + piece.numel
    (planned,) = wire.group_elements(placement, 1, plan.model_sizes(sizes))
    assert planned.parameters == laid


def write(path: Path, values: dict) -> Path:
    path.write_text(json.dumps(values, default=str))
    return path


def test_bad_configurations(tmp_path, capsys):
    path = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_hf_config(tmp_path, 8)
    for text, error in (
        ("{", "hf_config must be a JSON file, got "),
        ("[]", "must hold a JSON object"),
        ('{"model_type": "llama"}', "model_type must be one of mixtral, qwen2_moe, .*'llama'"),
        ('{"model_type": "olmoe"}', "hidden_size must be a whole number > 0, got None"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=error):
            read_hf_config(tmp_path, 8)
    good = {**make_config("qwen3_moe").to_dict(), "model_type": "qwen3_moe"}
    for name in ("num_experts", "num_local_experts"):  # as published files have it, and newer ones
        both = {**good, "num_experts": None, "num_local_experts": None, name: 12}
        assert read_hf_config(write(path, both), 8).num_experts == 12
    for key, value, error in (
        ("num_experts", "8", "num_experts must be a whole number"),
        ("num_local_experts", None, "num_local_experts must be a whole number > 0, got None"),
        ("num_experts_per_tok", 9, "num_experts_per_tok must be at most the 8"),
        ("attention_bias", 1, "attention_bias must be true or false"),
        ("mlp_only_layers", [0, 1, 2], "at least one of the 3 layers must have experts, got none"),
        ("mlp_only_layers", 1, "mlp_only_layers must be a list"),
    ):
        write(path, {**good, key: value})
        with pytest.raises(ValueError, match=error):
            read_hf_config(tmp_path, 8)
    write(path, good)
    assert cli.main(["plan", "--hf-config", str(path), "--num-experts", "4"]) == 2
    assert "--num-experts must not be given with --hf-config" in capsys.readouterr().err
    assert cli.main(["plan", "--hf-config", str(tmp_path / "none.json")]) == 2
    gpt_oss = {**make_config("gpt_oss").to_dict(), "model_type": "gpt_oss", "layer_types": ["x"]}
    write(path, gpt_oss)
    with pytest.raises(ValueError, match="layer_types must have 3 entries, got 1"):
        read_hf_config(tmp_path, 8)
