"""MoE blocks of transformers' models become `MoELayer`s and blocks again."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from new_process import environment
from torch import Tensor, nn

pytest.importorskip("transformers")

from hf_models import (
    EXPERTS,
    FAMILIES,
    TOP_K,
    WIDTH,
    blocks,
    make_model,
    relative_error,
    text,
)

from fomoe_ext import MoELayer, Placement, hf
from fomoe_ext.hf.converted import ConvertedMoE, converted_layers
from fomoe_ext.hf.families import PARTS, Family, InterleavedExperts, softmax_options

FEW = (1, 2, 5)


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def run(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and gradients by the original names, of a converted model or an original."""
    model.zero_grad()
    output = model(text(), labels=text())
    output.loss.backward()
    if converted_layers(model):
        hf.restore(model)
    return output.logits.detach(), gradients(model)


# ---- the same numbers ----------------------------------------------------------------------------


def test_outputs_and_all_gradients_are_those_of_the_blocks(family):
    model = make_model(family)
    wanted, wanted_gradients = run(copy.deepcopy(model))
    assert len(blocks(model)) >= 2
    hf.convert(model)
    assert blocks(model) == [] and len(converted_layers(model)) >= 2
    found, found_gradients = run(model)
    assert relative_error(found, wanted) <= 1e-5
    assert found_gradients.keys() == wanted_gradients.keys() > set()
    assert any("experts" in name for name in found_gradients)
    for name, wanted_gradient in wanted_gradients.items():
        assert relative_error(found_gradients[name], wanted_gradient) <= 1e-5, name


def test_bf16_blocks_are_no_worse_than_eager_ones(family):
    """Against fp64, of the same weights and inputs: outputs, gradients of input and experts."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 96, WIDTH, generator=generator).bfloat16()
    upstream = torch.randn(1, 96, WIDTH, generator=generator).bfloat16()

    def results(block: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        given = x.to(dtype).requires_grad_()
        y = block(given)
        y = y[0] if isinstance(y, tuple) else y
        y.backward(upstream.to(dtype))
        weights = [p.grad for n, p in block.named_parameters() if n.startswith("experts.")]
        return [y.detach(), given.grad, *(w.flatten(1) for w in weights)]

    model = make_model(family, dtype=torch.bfloat16)
    (_, eager), *_ = blocks(model)
    exact = results(copy.deepcopy(eager).double(), torch.float64)
    plain = results(eager, torch.bfloat16)
    hf.convert(model)
    (_, layer), *_ = converted_layers(model)
    ours = results(layer, torch.bfloat16)
    if family == "gpt_oss":  # the original stores its elements in another order
        layout, parts = InterleavedExperts(), layer.experts.parts
        shapes = [layer.experts.part(part).shape for part in parts]
        stacks = [g.view(s) for g, s in zip(ours[2:], shapes, strict=True)]
        names = [PARTS[part] for part in parts]
        theirs = {
            name: torch.stack([layout.to_theirs(part, row) for row in stack]).flatten(1)
            for part, name, stack in zip(parts, names, stacks, strict=True)
        }
        order = [
            n.rpartition(".")[2] for n, _ in eager.named_parameters() if n.startswith("experts.")
        ]
        ours[2:] = [theirs[name] for name in order]
    elif layer.experts.parts[0] == "expand_weight":
        assert next(n for n, _ in eager.named_parameters() if n.startswith("experts.")).endswith(
            "up_proj"
        )
    for mine, theirs_, wanted in zip(ours, plain, exact, strict=True):
        assert relative_error(mine, wanted) <= 1.02 * relative_error(theirs_, wanted)


def test_greedy_generation_gives_the_same_tokens(family):
    model = make_model(family)
    prompt = text(2, 5)
    given = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    wanted = model.generate(prompt, **given)
    assert wanted.shape[1] > 6
    hf.convert(model)
    assert torch.equal(model.generate(prompt, **given), wanted)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"])
def test_router_logits_are_recorded(name):
    """transformers' own balancing loss still works."""
    model = make_model(name)
    asked = {"labels": text(), "output_router_logits": True}
    wanted = model(text(), **asked)
    hf.convert(model)
    found = model(text(), **asked)
    assert len(found.router_logits) == len(wanted.router_logits) > 0
    for mine, theirs in zip(found.router_logits, wanted.router_logits, strict=True):
        assert relative_error(mine, theirs) <= 1e-5
    assert found.aux_loss.item() == pytest.approx(wanted.aux_loss.item(), rel=1e-5)
    hf.restore(model)  # hooks are kept
    again = model(text(), **asked)
    assert len(again.router_logits) == len(wanted.router_logits)


def test_checkpointing_and_autocast(family):
    model = hf.convert(make_model(family)).train()
    plain = copy.deepcopy(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    wanted, wanted_gradients = run(plain)
    found, found_gradients = run(model)
    assert torch.equal(found, wanted)
    for name, gradient in wanted_gradients.items():
        assert torch.equal(found_gradients[name], gradient), name
    with torch.autocast("cpu", torch.bfloat16):
        output = hf.convert(plain)(text(), labels=text())
    assert 0 < relative_error(output.logits.float(), wanted) < 0.3


# ---- residents -----------------------------------------------------------------------------------


def test_absent_experts_add_nothing(family):
    model = make_model(family)
    expected = copy.deepcopy(model)
    for _, block in blocks(expected):
        for part, name in PARTS.items():
            stack = getattr(block.experts, name, None)
            if part.startswith("contract") and stack is not None:
                absent = [e for e in range(EXPERTS) if e not in FEW]
                stack.data[absent] = 0
    hf.convert(model, resident=FEW)
    for _, layer in converted_layers(model):
        assert layer.experts.expand_weight.shape[0] == len(FEW)
    output = model(text())
    assert relative_error(output.logits, expected(text()).logits) <= 1e-5
    _, layer = converted_layers(model)[0]
    assert 0 < float(layer.stats.skipped_share) < 1
    with pytest.raises(ValueError, match=rf"restore needs all {EXPERTS} experts .* \(1, 2, 5\)"):
        hf.restore(model)
    with pytest.raises(ValueError, match="save_merged"):
        hf.save_pretrained(model, "/nowhere")


def test_a_placement_says_who_holds_what_in_each_layer():
    placement = Placement.random(
        num_sites=2, num_experts=EXPERTS, num_layers=3, replication=1, seed=3
    )
    model = hf.convert(make_model("olmoe"), placement, 1, router_scope="resident")
    for number, (_, layer) in enumerate(converted_layers(model)):
        assert layer.experts.resident_experts == placement.resident(number, 1)
        assert layer.router_scope == "resident" and layer.layer_index == number
    model(text())
    assert float(converted_layers(model)[0][1].stats.skipped_share) == 0


# ---- the way back --------------------------------------------------------------------------------


def test_restoring_gives_the_state_dict_back_bit_for_bit(family):
    model = make_model(family, dtype=torch.bfloat16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    types = [(path, type(m)) for path, m in model.named_modules()]
    wanted = model(text()).logits
    hf.restore(hf.convert(model))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(after[key].dtype == before[key].dtype for key in before)
    assert [(path, type(m)) for path, m in model.named_modules()] == types
    assert torch.equal(model(text()).logits, wanted)


def test_restored_blocks_have_the_trained_weights(family):
    model, expected = make_model(family).train(), make_model(family).train()
    hf.convert(model)
    for one in (model, expected):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.5)
        one(text(), labels=text()).loss.backward()
        optimizer.step()
    hf.restore(model)
    start = make_model(family).state_dict()
    for key, value in expected.state_dict().items():
        moved = (value - start[key]).float().norm()
        distance = (model.state_dict()[key] - value).float().norm()
        assert distance <= 1e-4 * moved + 1e-6 * value.float().norm(), key
    assert all(m.training for m in model.modules())


def test_saving_keeps_the_model_converted(family, tmp_path):
    from transformers import AutoModelForCausalLM

    model = make_model(family)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    original = tmp_path / "original"
    model.save_pretrained(original)
    hf.convert(model)
    parameters = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    hf.save_pretrained(model, tmp_path / "ours")
    found = {name: (id(p), p) for name, p in model.named_parameters()}
    assert {n: i for n, (i, _) in found.items()} == {n: i for n, (i, _) in parameters.items()}
    assert all(torch.equal(p, parameters[name][1]) for name, (_, p) in found.items())
    files = [sorted(p.name for p in f.iterdir()) for f in (original, tmp_path / "ours")]
    assert files[0] == files[1]
    same = [(f / "model.safetensors").read_bytes() for f in (original, tmp_path / "ours")]
    assert same[0] == same[1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(v, before[key]) for key, v in loaded.state_dict().items())


def test_a_failed_save_leaves_the_model_converted(tmp_path):
    model = hf.convert(make_model("gpt_oss"))
    wanted = model(text()).logits
    model.save_pretrained = None
    with pytest.raises(TypeError, match="not callable"):
        hf.save_pretrained(model, tmp_path / "out")
    assert blocks(model) == [] and torch.equal(model(text()).logits, wanted)


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "gpt_oss"])
def test_copies_and_pickles(name):
    model = hf.convert(make_model(name))
    wanted = model(text()).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(text()).logits, wanted)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert torch.equal(model(text()).logits, wanted)
        hf.restore(other)
        assert all(not p.any() for p in other.parameters())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = hf.convert(make_model(name, seed=7))
    fresh.load_state_dict(torch.load(file))
    assert torch.equal(fresh(text()).logits, wanted)


def test_conversion_takes_no_second_copy(tmp_path):
    """Peak memory before and after the conversion of models that are almost only experts."""
    code = """
        import sys, torch
        from hf_models import make_config
        from transformers import AutoModelForCausalLM
        from fomoe_ext import hf

        def memory(kind):
            line, = [l for l in open("/proc/self/status") if l.startswith(kind)]
            return 1024 * int(line.split()[1])

        name, resident = sys.argv[1], eval(sys.argv[2])
        changes = dict(hidden_size=512, intermediate_size=256, num_hidden_layers=24)
        changes["layer_types"] = ["full_attention"] * 24
        model = AutoModelForCausalLM.from_config(make_config(name, **changes))
        size = sum(p.nbytes for p in model.parameters())
        open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
        before = memory("VmRSS")
        hf.convert(model, resident=resident)
        print(size, memory("VmHWM") - before, memory("VmRSS") - before)
    """
    for name, resident in (("olmoe", None), ("gpt_oss", None), ("gpt_oss", [1, 5])):
        command = [sys.executable, "-P", "-c", textwrap.dedent(code), name, repr(resident)]
        result = subprocess.run(
            command, env=environment(), capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 0, result.stderr
        size, peak, kept = map(int, result.stdout.split())
        assert size > 300e6 and peak <= 0.1 * size, name
        assert resident is None or kept < -0.6 * size  # the memory of absent experts is freed


# ---- other models --------------------------------------------------------------------------------


def test_a_model_is_converted_once():
    model = hf.convert(make_model("olmoe"))
    with pytest.raises(ValueError, match="converted already"):
        hf.convert(model)


def test_unknown_models_name_the_known_families():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"mixtral \(MixtralSparseMoeBlock\).*gpt_oss.*register"):
        hf.convert(model)
    with pytest.raises(TypeError, match="model must be a Module, got NoneType"):
        hf.convert(None)
    with pytest.raises(ValueError, match=r"must have been converted by .*, got Sequential"):
        hf.restore(model)
    with pytest.raises(ValueError, match="must have been converted"):
        hf.save_pretrained(model, "/nowhere")


@pytest.mark.parametrize(
    ("name", "changes", "options", "message"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}, {}, "router_jitter_noise must be 0"),
        ("olmoe", {"hidden_act": "relu"}, {}, "hidden_act must be one of silu, .*, got 'relu'"),
        ("olmoe", {}, {"resident": [0, 8]}, r"mlp: resident_experts must be in 0\.\.7"),
        ("olmoe", {}, {"router_scope": "some"}, "router_scope must be one of"),
        ("olmoe", {}, {"top": 2}, "unexpected keyword argument 'top'"),
        (
            "olmoe",
            {},
            {
                "placement": Placement.cyclic(
                    num_sites=2, num_experts=8, num_layers=2, replication=1
                ),
                "site": 0,
            },
            "for the model's 3 MoE layers",
        ),
        (
            "olmoe",
            {},
            {
                "placement": Placement.cyclic(
                    num_sites=2, num_experts=4, num_layers=3, replication=1
                ),
                "site": 0,
            },
            "for the 8 experts of model.l",
        ),
        (
            "olmoe",
            {},
            {
                "placement": Placement.cyclic(
                    num_sites=2, num_experts=16, num_layers=3, replication=1
                ),
                "site": 0,
            },
            "for the 8 experts of model.l.*, got 16",
        ),
        ("olmoe", {}, {"placement": 0, "site": 0}, "placement must be a Placement, got int"),
        (
            "olmoe",
            {},
            {
                "placement": Placement.cyclic(
                    num_sites=2, num_experts=8, num_layers=3, replication=1
                ),
                "resident": [0],
            },
            "placement and resident must not be given together",
        ),
        (
            "olmoe",
            {},
            {
                "placement": Placement.cyclic(
                    num_sites=2, num_experts=8, num_layers=3, replication=1
                )
            },
            r"site must be given with a placement: the number of this site, in \[0, 2\)",
        ),
        ("olmoe", {}, {"site": 1}, "site must be given with a placement, got site = 1 without"),
    ],
)
def test_bad_conversions_change_nothing(name, changes, options, message):
    model = make_model(name, **changes)
    before = model.state_dict()
    with pytest.raises((ValueError, TypeError), match=message):
        hf.convert(model, **options)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(after[key].data_ptr() == before[key].data_ptr() for key in before)


@pytest.fixture
def own_family() -> Iterator[None]:
    known = dict(hf.families.__globals__["_families"])
    yield
    hf.families.__globals__["_families"].clear()
    hf.families.__globals__["_families"].update(known)


def test_a_family_can_be_added(own_family):
    """A user's own block, with another name for its router."""

    class OwnExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(4, 12, 8))
            self.down_proj = nn.Parameter(torch.randn(4, 8, 6))

    class OwnBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts, self.chooser = OwnExperts(), nn.Linear(8, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            weights = self.chooser(x).softmax(-1)
            y = torch.zeros_like(x)
            for e in range(4):
                gate, up = (x @ self.experts.gate_up_proj[e].T).chunk(2, -1)
                out = (nn.functional.silu(gate) * up) @ self.experts.down_proj[e].T
                y += weights[:, e : e + 1] * out
            return y

    class OwnModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace(num_experts_per_tok=4, hidden_act="silu")
            self.block = OwnBlock()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x)

    hf.register(Family("own", "OwnBlock", lambda b, c: softmax_options(c, False), router="chooser"))
    torch.manual_seed(0)
    model, x = OwnModel(), torch.randn(9, 8)
    wanted = model(x)
    hf.convert(model)
    assert isinstance(model.block, MoELayer) and isinstance(model.block, ConvertedMoE)
    assert relative_error(model(x), wanted) <= 1e-5
    assert torch.equal(hf.restore(model)(x), wanted)


def test_converted_layers_have_the_layers_interface(family):
    """Balancing, statistics and resident experts work on converted layers."""
    model = hf.convert(make_model(family), balance="bias", balance_bias_rate=0.5).train()
    _, layer = converted_layers(model)[0]
    assert layer.top_k == TOP_K
    before = layer.router.selection_bias.clone()
    model(text())
    assert int(layer.stats.load.sum()) == text().numel() * TOP_K
    layer.update_selection_bias()
    assert not torch.equal(layer.router.selection_bias, before)
