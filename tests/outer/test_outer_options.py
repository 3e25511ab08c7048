"""OuterOptions: one declaration and one default for the library and for jobs."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from typing import Any

import pytest
from outer_model import SmallModel, cyclic_placement

import fomoe_ext
from fomoe_ext.config.io import parse_args
from fomoe_ext.config.outer import OuterConfig
from fomoe_ext.outer import OuterOptions, OuterSync
from fomoe_ext.train.job import outer_options

OWN = {"local_steps", "site_mean", "staged", "seed"}


def test_shared_options_are_declared_once() -> None:
    assert set(vars(OuterOptions)["__annotations__"]) - {"SECTION"} == OWN
    shared = {f.name: f.default for f in dataclasses.fields(OuterConfig)}
    assert {f.name: f.default for f in dataclasses.fields(OuterOptions)}.items() >= shared.items()


@pytest.mark.parametrize(
    ("optimizer", "momentum"),
    [("diloco", 0.2), ("fedavg", 0.0), ("local-adamw", 0.0), ("ddp", 0.0)],
)
def test_jobs_and_the_library_have_the_same_defaults(optimizer: str, momentum: float) -> None:
    for kind in (OuterConfig, OuterOptions):
        options = kind(optimizer=optimizer)
        assert (options.resolved_lr, options.resolved_momentum) == (1.0, momentum)
    placement = cyclic_placement(1, 1)
    sync = OuterSync(SmallModel(placement, 0), placement, 0, OuterOptions(optimizer="fedavg"))
    assert (sync.options.resolved_lr, sync.options.resolved_momentum) == (1.0, 0.0)


def test_every_option_of_a_job_reaches_its_meetings() -> None:
    """Flags set options to other values than their defaults; all reach OuterOptions."""
    flags = (
        "--outer-lr 0.7 --outer-momentum 0.9 --codec int4-128 --rounding stochastic "
        "--no-error-feedback --router-mean all --expert-mean tokens --clip-delta 3 --rescale "
        "--moment-periods 3 6 --moment-codecs int8 bf16 --stale-codec int4 --stale-period 2 "
        "--overlap-alpha 0.25 --turn-order numbered --on-mismatch heal --bucket-bytes 4096 "
        "--in-flight 3 --timeout-s 7 --seed 5 --local-steps 6 --uneven-steps"
    )
    config = parse_args(flags.split())
    options = outer_options(config)
    for field in dataclasses.fields(OuterConfig):
        assert getattr(options, field.name) == getattr(config.outer, field.name), field.name
    unchanged = {"optimizer", "fragments", "overlap", "expert_turns", "staged"}
    for field in dataclasses.fields(OuterOptions):
        changed = getattr(options, field.name) != field.default
        assert changed == (field.name not in unchanged), field.name
    assert (options.seed, options.local_steps, options.site_mean) == (5, 6, "tokens")
    assert outer_options(parse_args(["--membership", "torchft"])).staged


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"codec": "zip"}, ValueError, "codec must be one of fp32, bf16, int8, "),
    ({"outer_lr": -1.0}, ValueError, "outer_lr must be finite and at least 0"),
    ({"outer_momentum": 1.0}, ValueError, "outer_momentum must be in [0, 1), got 1.0"),
    ({"rescale": 1}, TypeError, "rescale must be True or False, got 1"),
    ({"bucket_bytes": 3}, ValueError, "bucket_bytes must be 0 or at least 4, got 3"),
    ({"timeout_s": 0.0}, ValueError, "timeout_s must be > 0, got 0.0"),
    ({"expert_turns": 2, "overlap": 1}, ValueError, "expert_turns > 1 needs optimizer diloco"),
    ({"clip_delta": 2.0, "fragments": 2}, ValueError, "clip_delta needs {at}fragments = 1, {at}ov"),
    ({"expert_mean": "tokens", "optimizer": "ddp"}, ValueError, "expert_mean = tokens needs {at}o"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD)
def test_a_job_names_the_section_and_the_library_the_option(
    options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as of_job:
        OuterConfig(**options)
    assert str(of_job.value).startswith("outer." + message.format(at="outer."))
    with pytest.raises(kind) as of_library:
        OuterOptions(local_steps=8, **options)
    assert str(of_library.value).startswith(message.format(at=""))


def test_outer_sync_shows_its_options() -> None:
    signature = inspect.signature(OuterSync)
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds
    assert list(signature.parameters)[:4] == ["model", "placement", "site", "options"]
    placement = cyclic_placement(1, 1)
    for wrong in (OuterConfig(), {"codec": "int8"}):
        with pytest.raises(TypeError, match="options must be OuterOptions, got"):
            OuterSync(SmallModel(placement, 0), placement, 0, wrong)  # type: ignore[arg-type]


def test_the_package_alone_needs_no_torch() -> None:
    code = "import sys, fomoe_ext; dir(fomoe_ext); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_that_a_script_needs_are_at_hand() -> None:
    for name in ("MeetingError", "MeetingLost", "OuterOptions", "RoundReport", "make_mesh"):
        assert name in fomoe_ext.__all__ and name in dir(fomoe_ext)
    assert issubclass(fomoe_ext.MeetingLost, fomoe_ext.MeetingError)
    assert fomoe_ext.OuterOptions is OuterOptions
    assert all(getattr(fomoe_ext, name) is not None for name in fomoe_ext.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Oops'"):
        getattr(fomoe_ext, "Oops")  # noqa: B009
