"""Quantised checkpoints of transformers: dequantised if the format is fully known, else refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("transformers")

from hf_models import EXPERTS, make_model, relative_error, text

from fomoe_ext import Placement, hf
from fomoe_ext.hf.quantised import from_fp8_blocks, from_mxfp4

LAYERS_OF = {"qwen3_moe": 2, "deepseek_v3": 2}
BLOCK = (8, 4)
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [*BLOCK],
}
Tensors = dict[str, Tensor]


def one_site(family: str) -> Placement:
    return Placement.cyclic(
        num_sites=1, num_experts=EXPERTS, num_layers=LAYERS_OF.get(family, 3), replication=1
    )


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 blocks as in DeepSeek-V3's files, with a scale each."""
    rows, columns = weight.shape
    blocks = weight.float().view(rows // BLOCK[0], BLOCK[0], columns // BLOCK[1], BLOCK[1])
    scales = blocks.abs().amax(dim=(1, 3)) / 448
    values = (blocks / scales[:, None, :, None]).view(rows, columns)
    return values.to(torch.float8_e4m3fn), scales


def write(
    folder: Path, family: str, change: Callable[[Tensors], None], config: Any = None, **changes: Any
) -> None:
    """Writes a model's folder with changed tensors and the given quantization config."""
    make_model(family, **changes).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        written = json.loads((folder / "config.json").read_text())
        written["quantization_config"] = config
        (folder / "config.json").write_text(json.dumps(written))


def to_fp8(tensors: Tensors) -> None:
    for name in [n for n in tensors if "_proj" in n and n.endswith("weight")]:
        tensors[name], tensors[f"{name}_scale_inv"] = quantised(tensors[name])


def read(folder: Path, family: str, placement: Placement | None = None) -> tuple[Any, Any]:
    """A site's model, and the loading info."""
    return hf.from_pretrained_resident(
        folder, placement or one_site(family), 0, dtype=torch.float32, output_loading_info=True
    )


# ---- what is dequantised -------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_fp8_blocks_are_dequantised_as_by_transformers(tmp_path, family):
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    write(tmp_path, family, to_fp8, FP8)
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    loaded, whole_info = read(tmp_path, family)
    hf.restore(loaded)
    found = loaded.state_dict()
    assert found.keys() == wanted.state_dict().keys()
    for name, value in wanted.state_dict().items():
        assert torch.equal(found[name], value), name
    exact = make_model(family).state_dict()
    name = next(n for n in found if n.endswith("mlp.experts.gate_up_proj"))
    assert 0 < relative_error(found[name], exact[name]) < 0.05
    # A site reads its own experts, and save_merged writes them unquantised.
    placement = Placement.cyclic(
        num_sites=2, num_experts=EXPERTS, num_layers=LAYERS_OF[family], replication=1
    )
    half, info = read(tmp_path, family, placement)
    assert info["bytes_read"] < 0.8 * whole_info["bytes_read"]
    hf.convert(wanted, placement, 0)
    assert torch.equal(half(text()).logits, wanted(text()).logits)


def test_what_was_quantised_is_written_plain(tmp_path):
    from transformers import AutoModelForCausalLM

    write(tmp_path / "in", "qwen3_moe", to_fp8, FP8)
    model, _ = read(tmp_path / "in", "qwen3_moe")
    hf.save_merged(model, tmp_path / "out", one_site("qwen3_moe"), 0)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    hf.restore(model)
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in again.state_dict().items())


@pytest.mark.parametrize("shape", [(8, 4), (17, 9), (3, 2), (2, 16, 5)])
def test_blocks_at_the_edges_are_smaller(shape):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    grid = [*shape[:-2], -(-shape[-2] // BLOCK[0]), -(-shape[-1] // BLOCK[1])]
    scales = torch.rand(grid, generator=generator)
    found = from_fp8_blocks(values, scales, BLOCK, "x")
    for row in range(shape[-2]):
        for column in range(shape[-1]):
            scale = scales[..., row // BLOCK[0], column // BLOCK[1]]
            assert torch.equal(found[..., row, column], values.float()[..., row, column] * scale)


def to_mxfp4(tensors: Tensors) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        blocks = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(118, 127, shape, generator=generator, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}


def test_mxfp4_is_dequantised_as_by_transformers(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    write(tmp_path, "gpt_oss", to_mxfp4, {"quant_method": "mxfp4"}, intermediate_size=32)
    tensors = load_file(tmp_path / "model.safetensors")
    loaded, whole_info = read(tmp_path, "gpt_oss")
    hf.restore(loaded)
    found, compared = loaded.state_dict(), 0
    for name in [n.removesuffix("_blocks") for n in tensors if n.endswith("_blocks")]:
        packed = tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
        wanted = convert_moe_packed_tensors(*packed, dtype=torch.float32)
        assert torch.equal(from_mxfp4(*packed, name), wanted)
        assert torch.equal(found[name], wanted), name
        compared += 1
    assert compared == 6
    placement = Placement.cyclic(num_sites=2, num_experts=EXPERTS, num_layers=3, replication=1)
    half, info = read(tmp_path, "gpt_oss", placement)
    assert info["bytes_read"] < 0.8 * whole_info["bytes_read"]
    hf.convert(loaded, placement, 0)
    assert torch.equal(half(text()).logits, loaded(text()).logits)


# ---- what is refused -----------------------------------------------------------------------------

EXPERT = "model.layers.0.mlp.experts.3.up_proj.weight"
HEAD = "lm_head.weight"
SCALE = f"{EXPERT}_scale_inv"


def put(name: str, value: Callable[[Tensors], Tensor]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = value(tensors)

    return change


def remove_scale(tensors: Tensors) -> None:
    to_fp8(tensors)
    del tensors[SCALE]


def cut_scale(tensors: Tensors) -> None:
    to_fp8(tensors)
    tensors[SCALE] = tensors[SCALE][:-1].clone()


def packed(tensors: Tensors) -> None:
    weight = tensors.pop(EXPERT)
    name = EXPERT.removesuffix(".weight")
    tensors |= {
        f"{name}.weight_packed": torch.zeros(24, 4, dtype=torch.int32),
        f"{name}.weight_scale": weight[:, :1].clone(),
    }


def gptq(tensors: Tensors) -> None:
    name = EXPERT.removesuffix(".weight")
    for part in ("qweight", "qzeros", "g_idx"):
        tensors[f"{name}.{part}"] = torch.zeros(4, 4, dtype=torch.int32)
    del tensors[EXPERT]


REFUSED: dict[str, tuple[Callable[[Tensors], None], Any, str]] = {
    "fp8 and no config": (
        to_fp8,
        None,
        r"float8_e4m3fn without its scales: config.json has no quant",
    ),
    "fp8 without scale": (remove_scale, FP8, rf"no tensor {SCALE}"),
    "scales of another shape": (
        cut_scale,
        FP8,
        r"floats of shape \[3, 8\], one per 8x4 block of \[24, 32",
    ),
    "another block": (
        to_fp8,
        FP8 | {"weight_block_size": [128, 128]},
        r"of shape \[1, 1\], one per 128x128 block",
    ),
    "no block": (
        to_fp8,
        FP8 | {"weight_block_size": None},
        "weight_block_size of .* must be two numb",
    ),
    "fixed activations": (
        to_fp8,
        FP8 | {"activation_scheme": "static"},
        "activation_scheme of .* must",
    ),
    "another fp8": (to_fp8, FP8 | {"fmt": "e5m2"}, "fmt of .* must be 'e4m3', got 'e5m2'"),
    "e5m2": (
        put(HEAD, lambda t: t[HEAD].to(torch.float8_e5m2)),
        FP8,
        "lm_head.weight must be stored as floats, got torch.float8_e5m2",
    ),
    "int8": (
        put(EXPERT, lambda t: (t[EXPERT] * 9).to(torch.int8)),
        None,
        "must be stored as floats, got torch.int8",
    ),
    "int8 and SCB": (
        put(EXPERT.replace("weight", "SCB"), lambda t: t[EXPERT][:, 0].clone()),
        None,
        r"up_proj\.SCB.*quantised",
    ),
    "a plain one with a scale": (
        put(SCALE, lambda t: torch.ones(3, 8)),
        None,
        r"_scale_inv must not exist, because .* is torch\.float32",
    ),
    "packed": (packed, None, r"weight_packed, .*weight_scale\. If it is quantised"),
    "gptq": (
        gptq,
        {"quant_method": "gptq", "bits": 4},
        "quant_method of .* must be .*, got 'gptq'",
    ),
    "gptq, unsaid": (gptq, None, r"g_idx, .*qweight, .*qzeros"),
    "awq": (gptq, {"quant_method": "awq"}, "got 'awq'"),
    "bitsandbytes": (gptq, {"quant_method": "bitsandbytes"}, "got 'bitsandbytes'"),
    "compressed": (packed, {"quant_method": "compressed-tensors"}, "'compressed-tensors'"),
    "one more layer": (
        put("model.layers.3.input_layernorm.weight", lambda t: torch.ones(32)),
        None,
        r"tensors that the model of its config.json lacks: model\.layers\.3\.input",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_other_formats_are_refused_by_name(tmp_path, case):
    change, config, message = case
    write(tmp_path, "olmoe", change, config)
    with pytest.raises(ValueError, match=message):
        read(tmp_path, "olmoe")


@pytest.mark.parametrize("what", ["shape", "nan", "half"])
def test_malformed_mxfp4_is_refused(tmp_path, what):
    def change(tensors: Tensors) -> None:
        to_mxfp4(tensors)
        name = next(n for n in tensors if n.endswith("down_proj_scales"))
        if what == "shape":
            tensors[name] = tensors[name][:, 1:].clone()
        elif what == "nan":
            tensors[name][0, 0, 0] = 255
        else:
            del tensors[name]

    write(tmp_path, "gpt_oss", change, {"quant_method": "mxfp4"}, intermediate_size=32)
    match = {
        "shape": "down_proj_scales uint8",
        "nan": "must not have the scale 255",
        "half": "has no tensor .*down_proj_scales",
    }
    with pytest.raises(ValueError, match=match[what]):
        read(tmp_path, "gpt_oss")


def test_layers_of_multi_token_prediction_are_named_and_skipped(tmp_path):
    """DeepSeek-V3's files have an extra layer for multi-token prediction."""
    extra = put("model.layers.3.eh_proj.weight", lambda t: torch.ones(2, 2))
    write(tmp_path, "deepseek_v3", extra, num_nextn_predict_layers=1)
    with pytest.warns(UserWarning, match=r"model\.layers\.3\.eh_proj\.weight .* are not read"):
        found, info = read(tmp_path, "deepseek_v3")
    assert "model.layers.3.eh_proj.weight" in info["unexpected_keys"]
    wanted = make_model("deepseek_v3")
    assert relative_error(found(text()).logits, wanted(text()).logits) <= 1e-5
