"""Table 6: how much faster a layer and a whole training step are when experts are absent.

Slots of absent experts are skipped (router_scope "global"), as in the paper's figure 11: 1.16x with
half of the experts resident and 1.43x with none. The fractions are timed in turn in every repeat,
so that a slower machine affects all of them alike; figures are medians.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from fomoe_ext.config.model import ModelConfig
from fomoe_ext.files.atomic import write_text
from fomoe_ext.plan import cost as plan_cost
from fomoe_ext.report.tables import ReportTable
from fomoe_ext.report.units import human_count

RESULT = Path(__file__).resolve().parents[1] / "results" / "study" / "throughput.json"
SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)
PAPER = {0.5: 1.16, 0.0: 1.43}
MODEL = ModelConfig(
    hidden_size=256, num_layers=4, num_heads=4, num_experts=16, intermediate_size=256, top_k=4
)
SEQUENCES = {"cpu": 4, "cuda": 64}


def expert_share(model: ModelConfig) -> float:
    """Fraction of a training step's FLOPs that are in experts (`plan.cost.flops_per_token`)."""
    flops = plan_cost.flops_per_token(model)
    return flops.experts / flops.forward


def _steps(device: str) -> dict[str, dict[float, Callable[[], None]]]:
    """The calls to time, by kind ("layer" or "step") and fraction of the experts resident."""
    import torch

    from fomoe_ext import MoELayer
    from fomoe_ext.config.inner import InnerConfig
    from fomoe_ext.model.language import LanguageModel
    from fomoe_ext.train.job import make_optimizer

    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else None
    tokens = torch.randint(256, (SEQUENCES[device], MODEL.seq_len + 1), device=device)
    made: dict[str, dict[float, Callable[[], None]]] = {"layer": {}, "step": {}}
    for share in SHARES:
        resident = range(round(share * MODEL.num_experts))
        model = LanguageModel(MODEL, None, seed=1, device=device)
        for index, block in enumerate(model.blocks):
            block.moe = MoELayer(
                MODEL.hidden_size,
                MODEL.intermediate_size,
                MODEL.num_experts,
                MODEL.top_k,
                resident_experts=list(resident),
                layer_index=index,
                seed=1,
                device=device,
            )
        optimizer = make_optimizer(model, InnerConfig())
        x = torch.randn(tokens[:, 1:].numel(), MODEL.hidden_size, device=device)
        x.requires_grad_()
        weight = torch.randn_like(x)

        def layer(moe: Any = model.blocks[0].moe, x: Any = x, weight: Any = weight) -> None:
            with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
                y = moe(x)
            y.backward(weight.to(y.dtype))
            x.grad = None

        def step(model: Any = model, optimizer: Any = optimizer) -> None:
            with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
                loss = model.loss(tokens).total
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        made["layer"][share], made["step"][share] = layer, step
    return made


def measure(repeats: int, device: str = "cpu") -> dict[str, Any]:
    """Seconds of every repeat, by kind and fraction resident."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    result: dict[str, dict[str, list[float]]] = {}
    for kind, by_share in _steps(device).items():
        seconds: dict[str, list[float]] = {str(share): [] for share in by_share}
        for repeat in range(repeats + 2):
            for share, run in by_share.items():
                wait()
                start = time.perf_counter()
                run()
                wait()
                if repeat >= 2:  # the first two warm up
                    seconds[str(share)].append(time.perf_counter() - start)
        result[kind] = seconds
    return {"seconds": result, "tokens": SEQUENCES[device] * MODEL.seq_len, "device": device}


def measure_sizes(device: str) -> dict[str, Any]:
    """Steps of the paper's 13.3B and 1.8B shapes (on the CPU: of a tiny one), by
    `bench.gpu.training`, and the rate of a large dense product in FLOP/s."""
    import common
    import torch

    from bench.gpu import measured, training

    steps = []
    for size in training.SIZES[device]:
        for share in training.SHARES:
            steps.append(training.measure(size, share, device))
            measured.release_memory()
    rate = common.dense_rate(torch.bfloat16 if device == "cuda" else torch.float32)
    return {"steps": steps, "dense_rate": rate, "device": device}


def run(
    repeats: int, facts: Mapping[str, Any], path: Path = RESULT, *, sizes: bool = False
) -> None:
    """Measures on a GPU if there is one, else on the CPU, and writes the result to `path`.

    `sizes`: also `measure_sizes`, as on a GPU in any case.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {**measure(repeats, device), "machine": dict(facts)}
    if sizes or device == "cuda":
        kept["sizes"] = measure_sizes(device)
    write_text(path, json.dumps(kept, indent=1) + "\n")


def throughput_table(path: Path = RESULT) -> list[ReportTable]:
    """The table of the recorded result; an empty list if there is none."""
    if not path.exists():
        return []
    kept = json.loads(path.read_text())
    medians = {
        kind: {float(share): median(seconds) for share, seconds in by.items()}
        for kind, by in kept["seconds"].items()
    }
    whole = plan_cost.flops_per_token(MODEL)
    rows = []
    for share in medians["step"]:
        skipped = whole.forward - (1 - share) * whole.experts
        rows.append(
            (
                f"{share:.0%}",
                *(f"{medians[kind][1.0] / medians[kind][share]:.2f}x" for kind in medians),
                human_count(kept["tokens"] / medians["step"][share]),
                f"{whole.forward / skipped:.2f}x",
                f"{PAPER[share]:.2f}x" if share in PAPER else "-",
            )
        )
    machine = kept["machine"]
    return [
        *([sizes_table(kept["sizes"])] if "sizes" in kept else []),
        ReportTable(
            "Speed-up from skipping, forward and backward",
            ("experts resident", "layer", "whole step", "tokens/s", "by FLOPs", "paper"),
            tuple(rows),
            f"{MODEL.num_layers} layers of width {MODEL.hidden_size}, {MODEL.num_experts} experts "
            f"of {MODEL.intermediate_size}, {MODEL.top_k} per token: experts are "
            f"{expert_share(MODEL):.0%} of the FLOPs. {kept['device']}, "
            f"{machine.get('isa', '')} {machine.get('threads', '')} threads. By FLOPs: the cost "
            "model's prediction for the whole step.",
        ),
    ]


def sizes_table(kept: Mapping[str, Any]) -> ReportTable:
    """Whole steps of the paper's sizes, from what `measure_sizes` has recorded."""
    whole: dict[str, float] = {}
    rows = []
    for step in kept["steps"]:
        whole.setdefault(step["preset"], step["graph_seconds"])
        seconds, graph = step["seconds"], step["graph_seconds"]
        floor = step["flops"] / kept["dense_rate"]
        rows.append(
            (
                f"{step['preset']}, {step['layers']} layers",
                f"{step['resident']:.0%}",
                human_count(step["tokens"] / seconds),
                human_count(step["tokens"] / graph),
                f"{whole[step['preset']] / graph:.2f}x",
                f"{floor / graph:.0%}",
                f"{step['host_seconds'] / seconds:.0%}",
                f"{PAPER[step['resident']]:.2f}x" if step["resident"] in PAPER else "-",
            )
        )
    head = ("", "experts resident", "tokens/s", "with --cuda-graph", "speed-up", "of the floor")
    return ReportTable(
        "Whole training steps of the paper's sizes",
        (*head, "host", "paper"),
        tuple(rows),
        f"On {kept['device']}. Speed-up from skipping and share of the floor: with a CUDA graph "
        "(on the CPU the same path, uncaptured). Floor: the FLOPs of a step without skipped slots "
        "at the rate of a large dense product in the same process. Host: the part of an eager step "
        "until the host has launched all of it.",
    )


def speed_up(share: float, kind: str = "step", path: Path = RESULT) -> float | None:
    """Time with all experts resident over time with a fraction `share`; None without a result."""
    if not path.exists():
        return None
    seconds = json.loads(path.read_text())["seconds"][kind]
    return median(seconds["1.0"]) / median(seconds[str(share)])
