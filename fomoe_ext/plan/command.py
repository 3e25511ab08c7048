"""`fomoe plan`: what a job would cost, before anything is trained. Needs no torch."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fomoe_ext.config.effects import without_effect
from fomoe_ext.config.io import flag_value
from fomoe_ext.config.job import TrainConfig
from fomoe_ext.config.links import parse_link
from fomoe_ext.config.model import ModelConfig
from fomoe_ext.config.vocabulary import vocabulary_notes
from fomoe_ext.placement.wire import Link
from fomoe_ext.plan.args import parse_job, parse_options
from fomoe_ext.plan.jobs import compared_costs

DEFAULT_LINK = "1gbit"
DEFAULT_LATENCY = "50ms"
GPUS = {"a100": 312.0, "h100": 989.0, "h200": 989.0, "b200": 2250.0}
"""Peak TFLOP/s of the SXM models in bf16 without sparsity, from NVIDIA's data sheets."""
_UNITS = {
    unit: size
    for power, letter in enumerate(("", "k", "m", "g", "t"))
    for unit, size in ((f"{letter}b", 1000**power), (f"{letter}ib", 1024**power))
}
_READ_WITH_HF = ("seq_len", "router_scope", "skipped_mass")
"""Options of the model that may be given with --hf-config: a config.json does not have them."""


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """Estimate what a training job costs, before it is trained.

    All flags of `fomoe train` (listed below) describe the job. `--link` is the link between sites
    that the plan assumes: 1gbit,50ms by default. A link without a latency gets 50 ms.
    """

    hf_config: Path | None = None
    """Plan for the transformers model of this config.json (or of the folder that holds it):
    Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V3 or gpt-oss. Steps and batches are those of the
    preset 54m, unless --preset or --config is given."""
    gpu_peak: str = "h100"
    """Peak of each rank's GPU: a number of TFLOP/s, or a100, h100, h200, b200 (bf16, dense)."""
    mfu: float = 0.4
    """Model FLOPs utilization: the share of the peak that training reaches, above 0 and up to 1."""
    fit: str | None = None
    """Memory of a rank, such as 80GB or 79GiB: choose the fastest replication and codec that fit
    into it."""
    plot: Path | None = None
    """Draw cost against replication and utilization against bandwidth into this .svg or .png
    file."""
    json: bool = False
    """Print one JSON object instead of tables."""

    def __post_init__(self) -> None:
        parse_gpu(self.gpu_peak)
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu must be in (0, 1], got {self.mfu}")
        if self.fit is not None:
            parse_memory(self.fit)

    def flops_per_s(self, config: TrainConfig) -> float:
        """FLOP/s that a site of the job reaches in training."""
        return parse_gpu(self.gpu_peak) * self.mfu * config.sites.ranks_per_site


def parse_gpu(text: str) -> float:
    """Peak FLOP/s of a GPU, from its name in `GPUS` or a number of TFLOP/s.

    Raises ValueError for anything else.
    """
    try:
        peak = GPUS[text.lower()] if text.lower() in GPUS else float(text)
    except ValueError:
        peak = 0.0
    if not 0 < peak < float("inf"):
        raise ValueError(
            f"gpu_peak must be a number of TFLOP/s or one of {', '.join(GPUS)}, got {text!r}"
        )
    return peak * 1e12


def parse_memory(text: str) -> int:
    """Number of bytes of a size such as 80GB (powers of 1000) or 79GiB (powers of 1024).

    Raises ValueError for any other text.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]+)", text.strip().lower())
    if match is None or match[2] not in _UNITS or not float(match[1]):
        raise ValueError(
            f"fit must be a size in B, kB, MB, GB, TB or KiB, MiB, GiB, TiB, such as 80GB, got "
            f"{text!r}"
        )
    return int(float(match[1]) * _UNITS[match[2]])


def planned_link(config: TrainConfig) -> Link:
    """The job's link. A missing link or latency is replaced by the default one."""
    text = config.sites.link or DEFAULT_LINK
    return parse_link(text if "," in text else f"{text},{DEFAULT_LATENCY}")


def planned_job(options: PlanOptions, arguments: Sequence[str]) -> tuple[TrainConfig, str]:
    """The job that the flags of `fomoe train` describe, and the name of its model.

    With `hf_config` the sizes of the model come from that file, and of the model's flags only those
    in `_READ_WITH_HF` may be given. Raises ValueError for others, and what `read_hf_config` and
    `parse_job` raise.
    """
    if options.hf_config is None:
        config = parse_job(arguments)
        return config, config.preset
    from fomoe_ext.plan.hf import read_hf_config

    rest = list(arguments)
    given = {arg.partition("=")[0].removeprefix("--").removeprefix("no-") for arg in rest}
    for field in dataclasses.fields(ModelConfig):
        flag = field.name.replace("_", "-")
        if field.name not in _READ_WITH_HF and given & {flag, field.name}:
            raise ValueError(f"--{flag} must not be given with --hf-config, which sets it")
    if not given & {"preset", "config"}:
        rest += ["--preset", "54m"]
    sizes = read_hf_config(options.hf_config, 1)
    for name, value in (
        ("num-experts", sizes.num_experts),
        ("num-layers", sizes.num_layers),
        ("top-k", sizes.top_k),
        ("router-num-groups", 1),
        ("router-groups-kept", 1),
    ):
        rest += [f"--{name}", str(value)]
    config = parse_job(rest)
    model = config.model
    sizes = read_hf_config(options.hf_config, model.seq_len, model.router_scope)
    # The cost model accepts a ModelConfig or ModelSizes.
    job: Any = dataclasses.replace(config, model=sizes)  # type: ignore[arg-type]
    path = options.hf_config
    return job, str(path.parent if path.name == "config.json" else path)


def main(arguments: Sequence[str]) -> int:
    """`fomoe plan [flags]`; returns the exit code: 1 if nothing fits into the memory of --fit.

    Raises ValueError and OSError for bad values and files, and SystemExit as `parse_job` does.
    """
    options, rest = parse_options(PlanOptions, arguments)
    config, name = planned_job(options, rest)
    if options.hf_config is None:
        idle = without_effect(config, rest, flag_value(rest, "--config"))
        for line in [*idle, *vocabulary_notes(config)]:
            print(f"fomoe plan: {line}", file=sys.stderr)
    return _show(config, name, options)


def _show(config: TrainConfig, name: str, options: PlanOptions) -> int:
    from rich.console import Console

    from fomoe_ext.plan.report import make_plan, plan_tables
    from fomoe_ext.report.tables import print_tables

    link, speed = planned_link(config), options.flops_per_s(config)
    if options.plot is not None:
        from fomoe_ext.plan.plot import check_plot, draw_plan

        check_plot(options.plot)
    told: dict[str, Any] = {}
    tables = []
    failure = ""
    if options.fit is not None:
        from fomoe_ext.plan.fit import cheapest, fit_candidates, fit_dict, fit_table, no_fit

        memory = parse_memory(options.fit)
        candidates = fit_candidates(config, memory, link, speed)
        told["fit"] = fit_dict(candidates, memory)
        tables.append(fit_table(candidates, memory))
        choice = cheapest(candidates)
        if choice is None:
            failure = no_fit(candidates, memory)
        else:
            config = choice.config
    if not failure:
        costs = dict(compared_costs(config, link, speed))
        planned = make_plan(config, link, speed, name=name, costs=costs)
        told |= planned
        tables += plan_tables(planned)
        if options.plot is not None:
            draw_plan(options.plot, config, costs, link, speed)
    if options.json:
        print(json.dumps(told, indent=1))
    else:
        print_tables(tables, Console(file=sys.stdout))
    if failure:
        print(f"fomoe plan: {failure}", file=sys.stderr)
    return 1 if failure else 0
