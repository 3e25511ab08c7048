"""Checkpoints of transformers: one site reads its experts, all sites write one model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

pytest.importorskip("transformers")

from hf_models import EXPERTS, FAMILIES, blocks, make_model, relative_error, text
from sites import pool

from fomoe_ext import OuterOptions, OuterSync, Placement, hf
from fomoe_ext.hf.converted import converted_layers

LAYERS_OF = {"qwen3_moe": 2, "deepseek_v3": 2}
SITES = 2


def placement_of(family: str, replication: int = 1, sites: int = SITES) -> Placement:
    return Placement.random(
        num_sites=sites,
        num_experts=EXPERTS,
        num_layers=LAYERS_OF.get(family, 3),
        replication=replication,
        seed=5,
    )


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def saved(family: str, folder: Path, shard: str = "5GB", **given: Any) -> Any:
    model = make_model(family, **given)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


# ---- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["5GB", "40KB"])
def test_a_site_reads_its_own_experts_only(family, tmp_path, shard):
    whole = saved(family, tmp_path, shard)
    assert (tmp_path / "model.safetensors").exists() == (shard == "5GB")
    experts = sum(p.nbytes for n, p in whole.named_parameters() if ".experts." in n)
    total = sum(t.nbytes for t in whole.state_dict().values())
    placement = placement_of(family, sites=4)
    loaded, info = hf.from_pretrained_resident(tmp_path, placement, 3, output_loading_info=True)
    read = total - experts * 3 // 4  # to the byte
    assert info == {"bytes_read": read, "bytes_total": total, "unexpected_keys": []}
    allocated = sum(p.nbytes for p in loaded.parameters())
    assert allocated == sum(p.nbytes for p in whole.parameters()) - experts * 3 // 4
    hf.convert(whole, placement, 3)
    assert not loaded.training
    wanted = dict(whole.named_parameters()) | dict(whole.named_buffers())
    found = dict(loaded.named_parameters()) | dict(loaded.named_buffers())
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    loaded.set_attn_implementation("eager")
    assert torch.equal(loaded(text()).logits, whole(text()).logits)


def test_options_and_dtypes(tmp_path):
    saved("olmoe", tmp_path)
    placement = placement_of("olmoe")
    loaded = hf.from_pretrained_resident(
        tmp_path, placement, 1, dtype=torch.bfloat16, router_scope="resident", balance="switch"
    )
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert {layer.balance for layer in hf.layers(loaded)} == {"switch"}
    loaded(text())
    assert {float(layer.stats.skipped_share) for layer in hf.layers(loaded)} == {0.0}


def test_tied_embeddings_stay_tied(tmp_path):
    whole = saved("olmoe", tmp_path, tie_word_embeddings=True)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  not a dict
    loaded = hf.from_pretrained_resident(
        tmp_path, Placement.cyclic(num_sites=1, num_experts=EXPERTS, num_layers=3, replication=1), 0
    )
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert relative_error(loaded(text()).logits, whole(text()).logits) <= 1e-5


def test_files_that_cannot_be_read_are_named(tmp_path):
    placement = placement_of("olmoe")
    with pytest.raises(ValueError, match=r"folder must be a folder on this machine .*, got some/h"):
        hf.from_pretrained_resident("some/hub-model", placement, 0)
    with pytest.raises(ValueError, match=r"folder must have model.safetensors or"):
        hf.from_pretrained_resident(tmp_path, placement, 0)
    saved("olmoe", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 16}))
    with pytest.raises(ValueError, match=r"expand_weight of expert \d of model.layers.0.mlp must"):
        hf.from_pretrained_resident(tmp_path, placement, 0)
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    longer = Placement.cyclic(num_sites=2, num_experts=EXPERTS, num_layers=4, replication=1)
    with pytest.raises(ValueError, match=r"has no tensor model.layers.3.mlp.experts.0.gate_pr"):
        hf.from_pretrained_resident(tmp_path, longer, 0)


def test_a_left_over_index_is_not_followed(tmp_path):
    """Like transformers, we read the single file if there is one."""
    saved("olmoe", tmp_path, shard="40KB", seed=3)
    whole = saved("olmoe", tmp_path / "new")
    (tmp_path / "new/model.safetensors").rename(tmp_path / "model.safetensors")
    found = hf.from_pretrained_resident(
        tmp_path, Placement.cyclic(num_sites=1, num_experts=EXPERTS, num_layers=3, replication=1), 0
    )
    assert torch.equal(found.lm_head.weight, whole.lm_head.weight)


# ---- writing -------------------------------------------------------------------------------------


def train(site: int, num_sites: int, family: str, folder: str, scope: str) -> dict[str, Any]:
    """Two rounds of two local steps from a checkpoint, then one model of all sites."""
    placement = placement_of(family, sites=num_sites)
    balance = "bias" if family == "deepseek_v3" else "switch"  # has a place for it
    loaded = hf.from_pretrained_resident(
        f"{folder}/start", placement, site, router_scope=scope, balance=balance
    )
    model = loaded.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sync = OuterSync(model, placement, site, OuterOptions(codec="int8"), inner_optimizer=optimizer)
    for step in range(4):
        tokens = text(seed=10 * step + site)
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for layer in hf.layers(model):
            layer.update_selection_bias()
        if step % 2:
            sync.step()
    sync.verify()
    hf.save_merged(model, f"{folder}/merged", placement, site, max_shard_bytes=60_000)
    return {
        "experts": [
            {e: [w.clone() for w in layer.experts.expert_weights(e)] for e in ids}
            for _, layer in converted_layers(model)
            if (ids := layer.experts.resident_experts)
        ],
        "others": {
            name: value.detach().clone()
            for name, value in model.state_dict().items()
            if ".experts." not in name
        },
    }


@pytest.mark.parametrize("scope", ["global", "resident"])
def test_sites_train_and_plain_transformers_loads_what_they_trained(family, scope, tmp_path):
    from transformers import AutoModelForCausalLM

    saved(family, tmp_path / "start")
    found = pool().run(SITES, train, family, str(tmp_path), scope)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    expected = hf.convert(AutoModelForCausalLM.from_pretrained(tmp_path / "start"))
    placement = placement_of(family)
    start = {n: v.clone() for n, v in expected.state_dict().items()}
    tensors = expected.state_dict()
    with torch.no_grad():
        for name, value in found[0]["others"].items():
            tensors[name].copy_(value)
        for number, (path, layer) in enumerate(converted_layers(expected)):
            for expert in range(EXPERTS):
                owner = placement.owners(number, expert)[0]
                for part, values in zip(
                    layer.experts.expert_weights(expert),
                    found[owner]["experts"][number][expert],
                    strict=True,
                ):
                    part.copy_(values)
                if scope == "resident":
                    for part in (*layer.router.parts, "selection_bias"):
                        name = f"{path}.router.{part}"
                        tensors[name][expert] = found[owner]["others"][name][expert]
    assert any(not torch.equal(v, start[n]) for n, v in tensors.items() if ".experts." in n)
    hf.restore(expected)
    wanted, read = expected.state_dict(), merged.state_dict()
    assert read.keys() == wanted.keys()
    for name, value in wanted.items():
        if "e_score" in name or not name.endswith("selection_bias"):
            assert torch.equal(read[name], value), name
    assert blocks(merged) and torch.equal(merged(text()).logits, expected(text()).logits)


def write_twice(site: int, num_sites: int, folder: str) -> list[str]:
    placement = placement_of("olmoe")
    model = hf.convert(make_model("olmoe"), placement, site)
    errors = []
    other = Placement.cyclic(num_sites=2, num_experts=EXPERTS, num_layers=3, replication=1)
    for target, where in ((placement, "full"), (other, "new"), (placement, "full/precious/in")):
        try:
            hf.save_merged(model, f"{folder}/{where}", target, site)
        except (ValueError, OSError, RuntimeError) as error:
            errors.append(f"{type(error).__name__} {error}")
    return errors


def test_errors_of_writing_are_raised_at_all_sites(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("kept")
    for site, said in enumerate(pool().run(SITES, write_twice, str(tmp_path))):
        full, other, below_a_file = said
        told = "RuntimeError site 0 could not write" if site else "NotADirectoryError"
        assert below_a_file.startswith(told) and "Not a directory" in below_a_file
        assert full.startswith("FileExistsError") and "must be new or empty" in full
        assert "must hold the experts that the placement gives site" in other
    assert [p.name for p in tmp_path.iterdir()] == ["full"]
    assert (tmp_path / "full" / "precious").read_text() == "kept"


def test_a_site_alone_cannot_write_for_two(tmp_path):
    model, placement = make_model("olmoe"), placement_of("olmoe")
    hf.convert(model, placement, 0)
    with pytest.raises(RuntimeError, match=r"must have 2 processes, one per site .*, got 1"):
        hf.save_merged(model, tmp_path / "model", placement, 0)


def test_one_site_needs_no_others(tmp_path):
    from transformers import AutoModelForCausalLM

    model = make_model("gpt_oss")
    wanted: Tensor = model(text()).logits
    hf.convert(model)
    hf.save_merged(
        model,
        tmp_path / "model",
        Placement.cyclic(num_sites=1, num_experts=EXPERTS, num_layers=3, replication=1),
        0,
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    assert relative_error(merged(text()).logits, wanted) <= 1e-5
