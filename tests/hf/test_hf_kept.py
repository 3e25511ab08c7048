"""Saved models: plain transformers loads them, or saving names what the format cannot store."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

pytest.importorskip("transformers")

from hf_models import EXPERTS, FAMILIES, make_model, relative_error, text
from sites import pool

from fomoe_ext import Placement, hf
from fomoe_ext.hf.convert import ConvertOptions
from fomoe_ext.hf.converted import converted_layers
from fomoe_ext.layer.moe import TRAINING_OPTIONS, MoELayer

ALL = Placement.cyclic(num_sites=1, num_experts=EXPERTS, num_layers=3, replication=1)
WITHOUT_PLACE = [name for name in FAMILIES if name != "deepseek_v3"]


def all_of(family: str) -> Placement:
    return Placement.cyclic(
        num_sites=1,
        num_experts=EXPERTS,
        num_layers={"qwen3_moe": 2, "deepseek_v3": 2}.get(family, 3),
        replication=1,
    )


def loaded(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **options)


def all_ways(model: nn.Module, folder: Path, family: str) -> list[tuple[str, Any]]:
    """Tries every way back to the original format. Returns the error message of each."""
    return [
        ("save_merged", lambda: hf.save_merged(model, folder, all_of(family), 0)),
        ("save_pretrained", lambda: hf.save_pretrained(model, folder)),
        ("restore", lambda: hf.restore(model)),
    ]


# ---- what a format has no place for --------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:balance=:UserWarning")
@pytest.mark.parametrize("family", WITHOUT_PLACE)
def test_a_selection_bias_without_a_place_is_refused(tmp_path, family):
    model = hf.convert(make_model(family), balance="bias")
    bias = hf.layers(model)[1].router.selection_bias
    for _, way in all_ways(hf.convert(make_model(family)), tmp_path / "zero", family)[:1]:
        way()  # zeros need no place
    bias[0] = 1
    for _, way in all_ways(model, tmp_path / "out", family):
        with pytest.raises(ValueError, match=rf"selection bias .* files of {family} cannot store"):
            way()
    assert converted_layers(model) and not (tmp_path / "out").exists()
    bias.zero_()
    hf.restore(model)


def test_a_conversion_warns_before_the_training():
    with pytest.warns(UserWarning, match="files of mixtral cannot store a selection bias"):
        hf.convert(make_model("mixtral"), balance="bias")


@pytest.mark.parametrize("way", ["merged", "pretrained", "restored"])
def test_a_selection_bias_with_a_place_is_kept_to_the_bit(tmp_path, way):
    model = hf.convert(make_model("deepseek_v3", dtype=torch.bfloat16), balance="bias")
    bias = 1 + torch.arange(EXPERTS) / 4096  # more than bfloat16 holds
    for layer in hf.layers(model):
        layer.router.selection_bias.copy_(bias)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    if way == "merged":
        hf.save_merged(model, tmp_path / "m", all_of("deepseek_v3"), 0)
    elif way == "pretrained":
        hf.save_pretrained(model, tmp_path / "m")
    found = hf.restore(model) if way == "restored" else loaded(tmp_path / "m")
    assert torch.equal(found.state_dict()[name], bias)


def test_changes_that_the_configuration_does_not_record_are_refused(tmp_path):
    def top_k(model: Any) -> None:
        hf.layers(model)[1].top_k = 2

    def scale(model: Any) -> None:
        hf.layers(model)[0].router.scale = 2.0

    def config(model: Any) -> None:
        model.config.num_experts_per_tok = 2

    def adapter(model: Any) -> None:
        hf.layers(model)[0].experts.adapter = nn.Linear(2, 2)

    for change, message in (
        (top_k, r"top_k of model\.layers\.1\.mlp must be 3, .*got 2"),
        (scale, r"router_scale of model\.layers\.0\.mlp must be .*got 2\.0"),
        (config, r"top_k of .* must be 2, .*got 3"),
        (adapter, r"has parameters that .* cannot store: experts\.adapter\.weight"),
    ):
        model = hf.convert(make_model("mixtral"))
        change(model)
        for _, way in all_ways(model, tmp_path / "out", "mixtral"):
            with pytest.raises(ValueError, match=message):
                way()
    for option in (
        "router_scale",
        "router_num_groups",
        "router_bias",
        "expert_bias",
        "shared_expert_intermediate_size",
        "mesh",
    ):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}', options are"):
            hf.convert(make_model("mixtral"), **{option: 2})
    assert not (tmp_path / "out").exists()


def test_options_of_a_conversion_are_those_of_the_layer():
    hints = get_type_hints(MoELayer.__init__)
    found = get_type_hints(ConvertOptions)
    assert found == {name: hints[name] for name in (*TRAINING_OPTIONS, "seed")}


def test_blocks_with_more_in_them_are_not_converted():
    model = make_model("olmoe")
    model.model.layers[1].mlp.experts.register_parameter("gate_up_proj_scale", nn.Parameter())
    with pytest.raises(ValueError, match=r"layers\.1\.mlp: .* got experts\.gate_up_proj_scale"):
        hf.convert(model)
    assert not converted_layers(model)


def test_a_replaced_shared_expert_is_written(tmp_path):
    model = make_model("deepseek_v3")
    hf.convert(model)
    layer = hf.layers(model)[0]
    layer.shared_expert = copy.deepcopy(layer.shared_expert)
    with torch.no_grad():
        layer.shared_expert.up_proj.weight.mul_(3)
    wanted = model(text()).logits
    hf.save_merged(model, tmp_path / "m", all_of("deepseek_v3"), 0)
    assert relative_error(loaded(tmp_path / "m")(text()).logits, wanted) <= 1e-5
    assert relative_error(hf.restore(model)(text()).logits, wanted) <= 1e-5


@pytest.mark.filterwarnings("ignore:balance=:UserWarning")
def one_has_a_bias(site: int, num_sites: int, folder: str) -> str:
    placement = Placement.cyclic(num_sites=2, num_experts=EXPERTS, num_layers=3, replication=1)
    model = hf.convert(make_model("olmoe"), placement, site)
    if site == 1:
        hf.layers(model)[2].router.selection_bias[5] = 0.5
    try:
        hf.save_merged(model, f"{folder}/out", placement, site)
    except ValueError as error:
        return str(error)
    return "written"


def test_all_sites_hear_of_a_bias_that_cannot_be_stored(tmp_path):
    said = pool().run(2, one_has_a_bias, str(tmp_path))
    assert said[0] == f"site 1: {said[1]}" and "cannot store" in said[1]
    assert list(tmp_path.iterdir()) == []


# ---- models saved by their own save_pretrained ---------------------------------------------------


def test_save_pretrained_writes_the_original_format(tmp_path):
    model = make_model("mixtral")
    wanted = model(text()).logits
    hf.convert(model)
    for one, name in ((model, "a"), (copy.deepcopy(model), "b")):
        one.save_pretrained(tmp_path / name)
        assert relative_error(loaded(tmp_path / name)(text()).logits, wanted) <= 1e-5
    assert len(converted_layers(model)) == 3
    again = pickle.loads(pickle.dumps(model))
    again.save_pretrained(tmp_path / "d")
    assert relative_error(loaded(tmp_path / "d")(text()).logits, wanted) <= 1e-5
    hf.restore(model)
    assert "save_pretrained" not in vars(model) and not model._forward_hooks


def test_a_sites_part_is_not_taken_for_a_model(tmp_path):
    """A site's tensors are saved, and transformers refuses to load the folder as a model."""
    model = hf.convert(make_model("olmoe"), resident=[1, 2])
    with pytest.warns(UserWarning, match="needs all 8 experts"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="fomoe_converted_olmoe"):
        loaded(tmp_path)
    again = hf.convert(make_model("olmoe", seed=3), resident=[1, 2])
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(again(text()).logits, model(text()).logits)


def test_extra_modules_are_kept_with_a_warning(tmp_path):
    model = hf.convert(make_model("olmoe"))
    model.extra = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="does not read: .*unexpected .*extra.weight"):
        model.save_pretrained(tmp_path / "more")
    assert load_file(tmp_path / "more/model.safetensors").keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match="fomoe_converted_olmoe"):
        loaded(tmp_path / "more")


@pytest.mark.parametrize("resident", [None, [1, 2]])
def test_a_trainers_checkpoint_has_the_names_that_it_reads_again(tmp_path, resident):
    """In Mixtral's files blocks have another name, under which a Trainer would not find them."""
    model = hf.convert(make_model("mixtral"), resident=resident)
    model.save_pretrained(tmp_path / "checkpoint-20", state_dict=None, is_main_process=True)
    tensors = load_file(tmp_path / "checkpoint-20/model.safetensors")
    assert tensors.keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match="fomoe_converted_mixtral"):
        loaded(tmp_path / "checkpoint-20")


# ---- wrappers ------------------------------------------------------------------------------------


def compiled_inside(model: Any) -> Any:
    model.model.layers[0].mlp = torch.compile(model.model.layers[0].mlp)
    model.model.layers[1] = torch.compile(model.model.layers[1])
    model.model.embed_tokens = torch.compile(model.model.embed_tokens)
    return torch.compile(model)


def checkpointed(model: Any) -> Any:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model.model.layers[1] = checkpoint_wrapper(model.model.layers[1])
    return model


WRAPPERS = {
    "compile": torch.compile,
    "module": nn.DataParallel,
    "both": lambda model: torch.compile(nn.DataParallel(torch.compile(model))),
    "average": torch.optim.swa_utils.AveragedModel,
    "inside": compiled_inside,
    "checkpointed": checkpointed,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_files_have_the_names_that_transformers_reads(tmp_path, wrap):
    model = make_model("mixtral")
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    wrapped = wrap(hf.convert(model))
    hf.save_merged(wrapped, tmp_path / "merged", ALL, 0)
    hf.save_pretrained(wrapped, tmp_path / "whole")
    for name in ("merged", "whole"):
        found = loaded(tmp_path / name).state_dict()
        assert all(torch.equal(found[key], value) for key, value in wanted.items())
    names = [set(load_file(tmp_path / n / "model.safetensors")) for n in ("merged", "whole")]
    assert names[0] == names[1]


def test_conversions_of_wrapped_models():
    wanted = make_model("olmoe")(text()).logits
    compiled = hf.convert(torch.compile(make_model("olmoe")))
    assert len(hf.layers(compiled)) == 3
    hf.restore(compiled)
    assert torch.equal(compiled._orig_mod(text()).logits, wanted)
    # A compiled block is replaced as a whole: its wrapper would go on calling the block.
    model = make_model("gpt_oss")
    expected, layers = model(text()).logits, model.model.layers
    layers[0].mlp = torch.compile(layers[0].mlp, backend="eager")
    hf.convert(model)
    assert relative_error(model(text()).logits, expected) <= 1e-5
    layers[1].mlp = torch.compile(layers[1].mlp, backend="eager")
    assert relative_error(model(text()).logits, expected) <= 1e-5
    assert torch.equal(hf.restore(model)(text()).logits, expected)
    for way in (hf.convert, hf.restore):
        with pytest.raises(ValueError, match="must not be wrapped, got a DataParallel around a"):
            way(nn.DataParallel(hf.restore(hf.convert(make_model("olmoe")))))


def test_tensors_of_other_names_are_refused(tmp_path):
    def more(model: Any) -> None:
        model.extra = nn.Linear(2, 2)

    def fewer(model: Any) -> None:
        model.model.norm = nn.Identity()

    def parametrized(model: Any) -> None:
        nn.utils.parametrizations.weight_norm(model.lm_head)

    def adapted(model: Any) -> None:
        peft = pytest.importorskip("peft")
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model)

    def other_shape(model: Any) -> None:
        model.lm_head = nn.Linear(32, 70, bias=False)

    def integers(model: Any) -> None:
        head = (9 * model.lm_head.weight.detach()).to(torch.int8)
        model.lm_head.weight = nn.Parameter(head, requires_grad=False)

    for change, message in (
        (more, "got unexpected extra.bias, extra.weight"),
        (fewer, "missing model.norm.weight"),
        (parametrized, "missing lm_head.weight"),
        (adapted, "lora_A.default.weight"),
        (other_shape, r"lm_head.weight must be floats of shape \[64, 32\]"),
        (integers, r"lm_head.weight must be floats .* got torch.int8"),
    ):
        model = hf.convert(make_model("olmoe"))
        change(model)
        for _, way in all_ways(model, tmp_path / "out", "olmoe")[:2]:
            with pytest.raises(ValueError, match=message):
                way()
    assert not (tmp_path / "out").exists()


def test_adapters_are_merged_first(tmp_path):
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(hf.convert(make_model("olmoe")), options).eval()
    for _, way in all_ways(model, tmp_path / "out", "olmoe")[:2]:
        with pytest.raises(ValueError, match="must be one of transformers, got a PeftModel"):
            way()
    wanted = model(text()).logits
    hf.save_merged(model.merge_and_unload(), tmp_path / "out", ALL, 0)
    assert relative_error(loaded(tmp_path / "out")(text()).logits, wanted) <= 1e-5


# ---- files beside the weights --------------------------------------------------------------------


def test_the_generation_config_is_kept(tmp_path):
    from transformers import GenerationConfig

    model = make_model("olmoe", dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(
        eos_token_id=[2, 7], do_sample=True, temperature=0.5, top_k=3
    )
    model.save_pretrained(tmp_path / "in")
    found = hf.from_pretrained_resident(tmp_path / "in", ALL, 0)
    hf.save_merged(found, tmp_path / "out", ALL, 0)
    for one in (found, loaded(tmp_path / "out")):
        asked = one.generation_config
        assert (asked.eos_token_id, asked.temperature, asked.top_k) == ([2, 7], 0.5, 3)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["architectures"] == ["OlmoeForCausalLM"] and written["dtype"] == "bfloat16"
    assert loaded(tmp_path / "out").dtype == torch.bfloat16


def test_a_configuration_says_what_dtype_weights_have(tmp_path):
    model = hf.convert(make_model("olmoe", dtype=torch.bfloat16)).float()
    hf.save_merged(model, tmp_path / "out", ALL, 0)
    assert loaded(tmp_path / "out").dtype == torch.float32


def test_a_contradictory_generation_config_is_kept(tmp_path):
    make_model("olmoe").save_pretrained(tmp_path / "in")
    said = {"do_sample": False, "temperature": 0.5, "eos_token_id": [2, 7]}
    (tmp_path / "in/generation_config.json").write_text(json.dumps(said))
    found = hf.from_pretrained_resident(tmp_path / "in", ALL, 0)
    hf.save_merged(found, tmp_path / "out", ALL, 0)
    written = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert said.items() <= ({"do_sample": False} | written).items()


@pytest.mark.parametrize("family", FAMILIES)
def test_dtypes_are_those_of_plain_transformers(tmp_path, family):
    """DeepSeek-V3's router stays fp32, for example."""
    make_model(family).save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        wanted = loaded(tmp_path, dtype=dtype).state_dict()
        found = hf.from_pretrained_resident(tmp_path, all_of(family), 0, dtype=dtype)
        found = hf.restore(found).state_dict()
        for name, value in wanted.items():
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def test_untied_heads_of_a_configuration_that_ties(tmp_path):
    model = make_model("olmoe")
    model.save_pretrained(tmp_path / "in")
    config = json.loads((tmp_path / "in/config.json").read_text())
    (tmp_path / "in/config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.warns(UserWarning, match="have different values for them: they are loaded untied"):
        found = hf.from_pretrained_resident(tmp_path / "in", ALL, 0)
    assert torch.equal(found.lm_head.weight, model.lm_head.weight)
    hf.save_merged(found, tmp_path / "out", ALL, 0)
    again = loaded(tmp_path / "out").state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
    # The same tensor twice, or only the head.
    tensors = load_file(tmp_path / "in/model.safetensors")
    for names in (["lm_head.weight", "model.embed_tokens.weight"], ["lm_head.weight"]):
        one = {n: v for n, v in tensors.items() if "lm_head" not in n and "embed" not in n}
        one |= {name: tensors["lm_head.weight"].clone() for name in names}
        save_file(one, tmp_path / "in/model.safetensors", metadata={"format": "pt"})
        found = hf.from_pretrained_resident(tmp_path / "in", ALL, 0)
        assert found.lm_head.weight is found.model.embed_tokens.weight
        assert torch.equal(found.lm_head.weight, model.lm_head.weight)


def test_heads_tied_against_the_configuration_are_written(tmp_path):
    model = hf.convert(make_model("olmoe"))
    model.lm_head.weight = model.model.embed_tokens.weight
    wanted = model(text()).logits
    hf.save_merged(model, tmp_path / "tied", ALL, 0)
    assert relative_error(loaded(tmp_path / "tied")(text()).logits, wanted) <= 1e-5
    model = hf.convert(make_model("olmoe", tie_word_embeddings=True))
    model.lm_head.weight = nn.Parameter(2 * model.lm_head.weight.detach())
    wanted = model(text()).logits
    hf.save_merged(model, tmp_path / "untied", ALL, 0)
    assert relative_error(loaded(tmp_path / "untied")(text()).logits, wanted) <= 1e-5


# ---- the balance loss ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"balance": "switch"}, {"balance": "entropy"}, {"router_z_loss_coef": 0.1}]
)
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_balance_losses_count_in_the_models_loss(family, options):
    plain = hf.convert(make_model(family)).train()
    model = hf.convert(make_model(family), **options).train()
    wanted = plain(text(), labels=text()).loss
    output = model(text(), labels=text())
    added = sum(float(layer.aux_loss) for layer in hf.layers(model))
    assert abs(added) > 1e-3
    assert output.loss.item() == pytest.approx(float(wanted.detach()) + added, rel=1e-6)
    as_tuple = model(text(), labels=text(), return_dict=False)
    assert as_tuple[0].item() == pytest.approx(output.loss.item(), rel=1e-6)
    # Its gradient counts once, even if the loss is also added by hand.
    grads = []
    for by_hand in (False, True):
        model.zero_grad()
        loss = model(text(), labels=text()).loss
        (loss + by_hand * sum(layer.aux_loss for layer in hf.layers(model))).backward()
        grads.append(hf.layers(model)[0].router.weight.grad.clone())
    plain.zero_grad()
    wanted.backward()
    assert torch.equal(*grads)
    assert relative_error(grads[0], hf.layers(plain)[0].router.weight.grad) > 1e-3
    model.eval(), plain.eval()
    losses = [float(one(text(), labels=text()).loss) for one in (model, plain)]
    assert losses[0] == losses[1]


def test_a_trainers_accumulation_adds_up_to_one_batch():
    """A Trainer sums the losses of micro-batches, and tells them what they are parts of."""
    model = hf.convert(make_model("olmoe"), balance="switch").train()
    labels = text(4)
    labels[1, 5:] = -100
    items = (labels[:, 1:] != -100).sum()
    added, expected = 0.0, 0.0
    for rows in (slice(0, 2), slice(2, 4)):
        given = {"labels": labels[rows], "num_items_in_batch": items}
        own = int((labels[rows, 1:] != -100).sum())
        loss = model(text(4)[rows], **given).loss.item()
        aux = sum(float(layer.aux_loss) for layer in hf.layers(model))
        model.eval()
        added += loss - model(text(4)[rows], **given).loss.item()
        model.train()
        expected += aux * own / int(items)
    assert added == pytest.approx(expected, rel=1e-3)


def test_a_balance_loss_that_checkpointing_loses_is_refused():
    model = hf.convert(make_model("olmoe"), balance="switch").train()
    wanted = model(text(), labels=text()).loss
    wanted.backward()
    gradient = hf.layers(model)[0].router.weight.grad.clone()
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(text(), labels=text()).loss.backward()
    assert torch.equal(hf.layers(model)[0].router.weight.grad, gradient)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match=r"balance loss has no gradient.*use_reentrant"):
        model(text(), labels=text())
