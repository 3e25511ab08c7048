"""Peaks of memory of the experts: as `fomoe plan` knows them, and below the composition's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import common
import expert_cases as cases
import expert_work as work
import experts_memory
import pytest
import torch
from kernel_device import Device

from fomoe_ext import ops
from fomoe_ext.activations import activation_id
from fomoe_ext.plan.experts import contract_comes_first, experts_peak, forward_moments

pytestmark = pytest.mark.usefixtures("one_thread")
MODELS = {
    "gated": work.Model("gated", 96, 64, 4, 2),
    "bias": work.Model("bias", 64, 96, 4, 2, "clamped_swiglu", bias=True),
    "not gated": work.Model("not gated", 128, 32, 8, 4, "silu"),
}


def test_the_peak_is_what_is_held_at_once() -> None:
    def run() -> torch.Tensor:
        first = torch.empty(1 << 18)  # 1 MiB
        second = torch.empty(1 << 19)
        del first
        third = torch.empty(1 << 17)
        del second
        return third

    assert experts_memory.counted_peak(run, "cpu") == 3 << 20


def through_ops(device: Device, i: cases.Inputs, frees: bool) -> Callable[[], Any]:
    """Both passes by the device's ops themselves, as autograd calls them."""
    number = activation_id(i.model.activation)
    weights = (i.expand_weight, i.expand_bias, i.contract_weight, i.contract_bias)
    plain = [t if t is None else t.detach() for t in (i.x, i.weights, *weights)]

    def run() -> Any:
        table = device.op("compact")(i.experts, i.resident_index, i.model.experts, ops.TILE_ROWS)
        arguments = (*plain[:2], *table, *plain[2:])
        y, preact = device.op("moe_experts")(*arguments, number, True)
        needed = (True, True, True, None, None, preact if frees else None)
        return y, device.op("moe_experts_backward")(i.grad_y, *arguments, preact, number, *needed)

    return run


@pytest.mark.parametrize("frees", [True, False], ids=["freed", "kept"])
@pytest.mark.parametrize("tokens", [32, 512])
@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
def test_the_plan_knows_the_peak(
    device: Device, model: work.Model, tokens: int, frees: bool
) -> None:
    inputs = cases.make_inputs(model, tokens, "balanced", device.tensors, torch.float32)
    run = through_ops(device, inputs, frees)
    run()
    kind = "cpu" if device.name == "cpu" else "cuda"
    call = experts_memory.planned(model, tokens, torch.float32, kind, frees_preact=frees)
    if device.name == "cpu":  # it is given a schedule here, too
        call = replace(call, gpu=True)
    counted = experts_memory.counted_peak(run, device.tensors)
    assert counted == pytest.approx(experts_peak(call), rel=0.03)


def test_both_orders_are_among_these_cases() -> None:
    first = {
        contract_comes_first(experts_memory.planned(model, tokens, torch.float32, "cpu"))
        for model in MODELS.values()
        for tokens in (32, 512)
    }
    assert first == {True, False}


@pytest.mark.parametrize("model", work.MODELS, ids=lambda model: model.name)
def test_six_models_stay_below_the_composition(model: work.Model) -> None:
    small = experts_memory.scaled(model, 32)
    peaks = experts_memory.measure(small, 4096 // 32, torch.float32, "cpu")
    assert peaks.ours == pytest.approx(peaks.planned, rel=0.03)
    assert peaks.ours - peaks.weight_grads <= 0.6 * (peaks.composed - peaks.weight_grads)
    assert peaks.totals <= 0.6 * peaks.composed
    assert peaks.ours <= 0.8 * peaks.composed or peaks.weight_grads > 0.7 * peaks.composed


def test_what_a_call_without_gradients_holds() -> None:
    """No pre-activations: an evaluation."""
    model = MODELS["gated"]
    inputs = cases.make_inputs(model, 512, "balanced", "cpu", torch.float32)
    run = cases.with_mode(cases.our_experts, inputs, False)
    run()
    call = experts_memory.planned(model, 512, torch.float32, "cpu")
    wanted = max(forward_moments(call).values()) - call.preact
    assert experts_memory.counted_peak(run, "cpu") == pytest.approx(wanted, rel=0.03)


def test_partly_resident_experts() -> None:
    """On the CPU temporaries have as many lines as there are rows."""
    model = MODELS["gated"]
    inputs = cases.make_inputs(model, 512, "balanced", "cpu", torch.float32).part(2)
    run = cases.with_mode(cases.our_experts, inputs, True)
    run()
    call = experts_memory.planned(model, 512, torch.float32, "cpu", rows=inputs.rows)
    call = replace(call, residents=2)
    assert inputs.rows == call.slots // 2
    peak = experts_memory.counted_peak(run, "cpu")
    assert peak == pytest.approx(experts_peak(call), rel=0.03)


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    experts_memory.main(["--scale", "64", "--tokens", "4096", "--markdown"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + len(work.MODELS)
    for model, line in zip(work.MODELS, lines[2:], strict=True):
        name, tokens, *figures = [cell.strip() for cell in line.strip("|").split("|")]
        assert (name, tokens) == (model.name, "4096")
        assert all(0 < float(figure) < 100 for figure in figures)


def test_the_peak_on_a_gpu_is_torch_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "peak_bytes", lambda run: 7)
    assert experts_memory.counted_peak(lambda: None, "cuda") == 7
