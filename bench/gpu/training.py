"""Training steps of the paper's models with all, half, a quarter and none of the experts resident:
seconds of a step, of the host, of the GPU's kernels, and of a step replayed from a CUDA graph.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch

from bench.gpu import measured
from bench.gpu.measured import Results
from fomoe_ext.config.inner import InnerConfig
from fomoe_ext.config.job import preset_config
from fomoe_ext.config.model import ModelConfig
from fomoe_ext.layer.moe import MoELayer
from fomoe_ext.model.language import LanguageModel
from fomoe_ext.plan.cost import flops_per_token
from fomoe_ext.train.captured import CapturedStep, StepResult
from fomoe_ext.train.job import make_optimizer

SHARES = (1.0, 0.5, 0.25, 0.0)
STEPS, WARM_UP, GRAPH_WARM_UP = 5, 2, 4


class Sized(NamedTuple):
    """A model of the paper with fewer layers, and the number of sequences per step."""

    preset: str
    layers: int
    sequences: int
    seq_len: int = 2048
    vocabulary: int = 32000

    @property
    def config(self) -> ModelConfig:
        return dataclasses.replace(
            preset_config(self.preset).model,
            vocab_size=self.vocabulary,
            num_layers=self.layers,
            seq_len=self.seq_len,
            router_scope="global",
        )


SIZES: dict[str, Sequence[Sized]] = {
    "cuda": (Sized("13.3b", 12, 8), Sized("1.8b", 128, 4)),
    "cpu": (Sized("tiny", 2, 2, seq_len=32, vocabulary=256),),
}


def make_model(config: ModelConfig, share: float, device: str) -> LanguageModel:
    """The model with only the first experts of every layer resident."""
    model = LanguageModel(config, None, seed=1, device=device)
    if share == 1:
        return model
    resident = range(round(share * config.num_experts))
    for index, block in enumerate(model.blocks):
        block.moe = MoELayer(
            config.hidden_size,
            config.intermediate_size,
            config.num_experts,
            config.top_k,
            activation=config.activation,
            resident_experts=list(resident),
            layer_index=index,
            seed=1,
            device=device,
        )
    return model


def timed(step: Callable[[], None], device: str) -> tuple[float, float]:
    """Seconds until the step was done, and until the host had launched all of it."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    step()
    asked = time.perf_counter()
    wait()
    return time.perf_counter() - start, asked - start


def largest_kernels(step: Callable[[], None], device: str) -> dict[str, Any]:
    """Seconds of all kernels of a step, and of the longest ones, by torch's profiler."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    if device == "cpu":
        return {"gpu_seconds": None, "largest": {}}
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    # Annotated ranges contain kernels and must not be counted too.
    kernels = [
        event
        for event in seen.key_averages()
        if event.device_type == DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.key.startswith(("Optimizer.", "ProfilerStep"))
    ]
    times = {event.key: event.self_device_time_total / 1e6 for event in kernels}
    largest = sorted(times.items(), key=lambda item: -item[1])[:12]
    return {"gpu_seconds": sum(times.values()), "largest": {k[:100]: v for k, v in largest}}


def measure(size: Sized, share: float, device: str) -> dict[str, Any]:
    """Seconds of a step: eager, the host's part of that, and replayed from a CUDA graph."""
    config = size.config
    tokens = torch.randint(size.vocabulary, (size.sequences, size.seq_len + 1), device=device)
    model = make_model(config, share, device)
    optimizer = make_optimizer(model, InnerConfig())
    lr = InnerConfig().inner_lr

    def compute(tokens: torch.Tensor) -> StepResult:
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model.loss(tokens)
        loss.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        rows = [layer.stats.rows for layer in model.moe_layers() if layer.stats is not None]
        return StepResult(loss.cross_entropy.detach(), None, torch.stack(rows).sum())

    def step() -> None:
        compute(tokens)

    for _ in range(WARM_UP):
        step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    measures = [timed(step, device) for _ in range(STEPS)]
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    kernels = largest_kernels(step, device)
    graph = CapturedStep(compute, optimizer, torch.device(device))
    for _ in range(GRAPH_WARM_UP):
        graph(tokens, lr)
    replays = [timed(lambda: graph(tokens, lr), device) for _ in range(STEPS)]
    loss = float(graph(tokens, lr).loss)
    return {
        "seconds": median(done for done, _ in measures),
        "host_seconds": median(asked for _, asked in measures),
        "graph_seconds": median(done for done, _ in replays),
        "captured": graph.captured,
        "tokens": size.sequences * size.seq_len,
        "layers": size.layers,
        "preset": size.preset,
        "resident": share,
        "flops": step_flops(config, share) * size.sequences * size.seq_len,
        "peak_bytes": peak,
        "loss": loss,
        **kernels,
    }


def step_flops(config: ModelConfig, share: float) -> float:
    """Floating-point operations of forward and backward per token, without those of skipped slots:
    three times a forward pass (`plan.cost.flops_per_token`)."""
    whole = flops_per_token(config)
    return 3 * (whole.forward - (1 - share) * whole.experts)


def main() -> int:
    given = measured.arguments(__doc__)
    results, device, done = Results(given.out, given.budget), given.device, 0
    torch.manual_seed(0)
    for size in SIZES[device]:
        for share in SHARES:
            what = f"{size.preset} with {share:g} resident"
            if not results.enough(what):
                continue
            with results.guarded(what):
                result = measure(size, share, device)
                if not math.isfinite(result["loss"]):
                    results.wrong.append(f"{what}: the loss is {result['loss']}")
                results.add(f"training[{size.preset} {share:g}]", result)
                done += 1
            measured.release_memory()
    return results.finish(f"{done} kinds of steps measured")


if __name__ == "__main__":
    sys.exit(main())
