"""`fomoe export`: the folder loads into plain transformers and is the model that was trained."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from exported_model import load, tokens_of, word_tokenizer, write
from small_run import random_model, relative_error, tiny_config, untrained_run

import fomoe_ext.export.exported
from fomoe_ext.export.format import exported_name

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {
    "plain": {},
    "softmax and groups": {
        "router_scoring": "softmax",
        "router_num_groups": 4,
        "router_groups_kept": 2,
        "router_renormalize": True,
        "router_scale": 2.5,
        "activation": "geglu",
    },
    "gpt-oss": {"activation": "clamped_swiglu", "expert_bias": True, "top_k": 4, "norm": "rms"},
    "shared": {
        "shared_expert_intermediate_size": 12,
        "activation": "silu",
        "depth_multiplier": 0.5,
    },
    "resident": {"router_scope": "resident", "activation": "relu2", "rope_base": 500.0},
    "gelu": {"activation": "gelu", "expert_bias": True, "router_num_groups": 2, "vocab_size": 300},
}


@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)
def test_logits_and_loss_are_the_same(tmp_path, changes):
    config = tiny_config(**changes)
    model = random_model(config)
    tokenizer = [] if config.vocab_size == 256 else ["--tokenizer", word_tokenizer(tmp_path, 290)]
    source = untrained_run(tmp_path, model)
    exported = load(write(source, tmp_path / "out", *tokenizer))
    tokens = tokens_of(config, 3, 25)
    with torch.no_grad():
        outputs = exported(tokens[:, :-1])
        assert relative_error(outputs.logits, model(tokens[:, :-1])) <= 1e-5
        loss = exported(tokens, labels=tokens).loss
        assert float(loss) == pytest.approx(float(model.loss(tokens).cross_entropy), rel=1e-5)


def test_a_trained_run_gives_the_same_logits_and_loss(trained):
    model, exported, _ = trained
    tokens = torch.tensor([list(b"def __init__(self, value: int) -")])
    with torch.no_grad():
        assert relative_error(exported(tokens).logits, model(tokens)) <= 1e-5


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradients_are_the_same(tmp_path):
    model = random_model(
        tiny_config(router_renormalize=True, shared_expert_intermediate_size=8, expert_bias=True)
    )
    exported = load(write(untrained_run(tmp_path, model), tmp_path / "out"))
    exported.train()
    exported.gradient_checkpointing_enable()
    tokens = tokens_of(model.config, 4, 24)
    model.loss(tokens).cross_entropy.backward()
    exported(tokens, labels=tokens).loss.backward()
    found = {name: p.grad for name, p in exported.named_parameters() if p.grad is not None}
    compared = 0
    for name, parameter in model.named_parameters():
        if ".experts." not in name:
            assert relative_error(found[exported_name(name)], parameter.grad) <= 1e-5
            compared += 1
    for expert in range(8):
        for part in ("expand_weight", "contract_bias"):
            wanted = model.blocks[1].moe.experts.part(part).grad[expert]
            name = exported_name(f"blocks.1.moe.experts.{expert}.{part}")
            if name in found:
                assert relative_error(found[name], wanted) <= 1e-5
                compared += 1
            else:  # got no token
                assert not wanted.any()
    assert compared > 30


def test_bf16_is_as_close_as_our_own(tmp_path):
    # All experts are chosen for every token: rounding cannot change the choice.
    model = random_model(tiny_config(top_k=8, expert_bias=True, shared_expert_intermediate_size=8))
    out = write(untrained_run(tmp_path, model), tmp_path / "out", "--dtype", "bfloat16")
    exported = load(out)
    assert exported.dtype == torch.bfloat16
    router = exported.model.blocks[0].moe.router
    assert router.selection_bias.dtype == torch.float32
    assert torch.equal(router.selection_bias, model.blocks[0].moe.router.selection_bias)
    fp32 = write(tmp_path / "checkpoints/step-00000008", tmp_path / "fp32")
    again = load(fp32, dtype="bfloat16").state_dict()
    tokens = tokens_of(model.config, 4, 24)
    with torch.no_grad():
        exact = model(tokens)
        own = model.to(torch.bfloat16)(tokens)
        assert relative_error(exported(tokens).logits, exact) <= 1.2 * relative_error(own, exact)
    assert all(torch.equal(again[name], value) for name, value in exported.state_dict().items())


def test_the_exported_code_needs_nothing_of_ours():
    folder = Path(fomoe_ext.export.exported.__file__).parent
    imported = set()
    for name in ("configuration_fomoe.py", "modeling_fomoe.py"):
        for node in ast.walk(ast.parse((folder / name).read_text())):
            if isinstance(node, ast.Import):
                imported.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.partition(".")[0])
    assert imported == {"__future__", "dataclasses", "torch", "transformers", "typing"}
