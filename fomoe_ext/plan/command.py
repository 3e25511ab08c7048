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
"""10^12 operations per second, bf16 without sparsity, of the SXM kinds: NVIDIA's data sheets."""
_UNITS = {
    unit: size
    for power, letter in enumerate(("", "k", "m", "g", "t"))
    for unit, size in ((f"{letter}b", 1000**power), (f"{letter}ib", 1024**power))
}
_READ_WITH_HF = ("seq_len", "router_scope", "skipped_mass")
"""Of the model's options, those that a config.json does not say."""


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """Options of plans alone; every other flag is one of `fomoe train`.

    `--link` is the planned link here: 1gbit,50ms unless given; without a latency, 50 ms.
    """

    hf_config: Path | None = None
    """config.json of a transformers model (or its folder), whose sizes are planned with: Mixtral,
    Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V3, gpt-oss. Steps are then those of the preset 54m."""
    gpu_peak: str = "h100"
    """Peak of a rank's GPU in TFLOP/s, or a100, h100, h200, b200 (bf16, dense)."""
    mfu: float = 0.4
    """Share of the peak that training reaches."""
    fit: str | None = None
    """Memory such as 80GB or 79GiB (of a rank): find the fastest replication and codec that fit."""
    plot: Path | None = None
    """File .svg or .png: cost against replication, utilization against bandwidth."""
    json: bool = False
    """Print one JSON object instead of tables."""

    def __post_init__(self) -> None:
        parse_gpu(self.gpu_peak)
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu must be in (0, 1], got {self.mfu}")
        if self.fit is not None:
            parse_memory(self.fit)

    def flops_per_s(self, config: TrainConfig) -> float:
        """What a site of a job reaches in training."""
        return parse_gpu(self.gpu_peak) * self.mfu * config.sites.ranks_per_site


def parse_gpu(text: str) -> float:
    """Operations per second of a GPU: a name of `GPUS`, or a number of TFLOP/s.

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
    """Bytes of a size such as 80GB (powers of 1000) or 79GiB (of 1024). Raises ValueError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]+)", text.strip().lower())
    if match is None or match[2] not in _UNITS or not float(match[1]):
        raise ValueError(
            f"fit must be a size in B, kB, MB, GB, TB or KiB, MiB, GiB, TiB, such as 80GB, got "
            f"{text!r}"
        )
    return int(float(match[1]) * _UNITS[match[2]])


def planned_link(config: TrainConfig) -> Link:
    """The job's link, or the default one; without a latency it has the default one."""
    text = config.sites.link or DEFAULT_LINK
    return parse_link(text if "," in text else f"{text},{DEFAULT_LATENCY}")


def planned_job(options: PlanOptions, arguments: Sequence[str]) -> tuple[TrainConfig, str]:
    """The job that the flags of `fomoe train` ask for, and the name of its model.

    With `hf_config` the model is the one of that file: of the model's flags only those in
    `_READ_WITH_HF` go with it. Raises ValueError for others, and as `read_hf_config` and
    `parse_job`.
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
            raise ValueError(f"--{flag} does not go with --hf-config, which says it")
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
    # The cost model takes either kind of model.
    job: Any = dataclasses.replace(config, model=sizes)  # type: ignore[arg-type]
    path = options.hf_config
    return job, str(path.parent if path.name == "config.json" else path)


def main(arguments: Sequence[str]) -> int:
    """`fomoe plan [flags]`; returns the exit code: 1 where nothing fits.

    Raises ValueError and OSError for bad values and files; SystemExit as `parse_job`.
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
