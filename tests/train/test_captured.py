"""A local step as a CUDA graph (`--cuda-graph`): the same training as without one.

On the CPU the same path runs uncaptured; on a GPU, where there is one, it is captured.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_job import finish, train
from torch import Tensor

from fomoe_ext.config.model import ModelConfig
from fomoe_ext.data.sequences import open_data
from fomoe_ext.model.language import LanguageModel, optimizer_groups
from fomoe_ext.report.runs import job_config
from fomoe_ext.train.captured import CapturedStep, StepResult, places

SIZES = {
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "num_experts": 4,
    "intermediate_size": 8,
    "top_k": 2,
    "seq_len": 16,
    "vocab_size": 50,
    "balance": "bias",
}
STEPS = 8


@pytest.fixture(params=["cpu", "cuda"])
def place(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device(request.param)


class _Training:
    """A model and its optimizer, and a step as `LocalSteps` takes it."""

    def __init__(self, place: torch.device) -> None:
        self.model = LanguageModel(ModelConfig(**SIZES), device=place)
        groups = optimizer_groups(self.model, 0.1)
        self.optimizer = torch.optim.AdamW(groups, lr=1.0, fused=True)

    def compute(self, tokens: Tensor) -> StepResult:
        loss = self.model.loss(tokens)
        loss.total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.optimizer.step()
        rows = []
        for layer in self.model.moe_layers():
            assert layer.stats is not None
            rows.append(layer.stats.rows)
            layer.update_selection_bias()
        self.optimizer.zero_grad()
        return StepResult(loss.cross_entropy.detach(), norm, torch.stack(rows).sum())

    def parameters(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()]).cpu()


def _inputs(seed: int) -> list[tuple[Tensor, float]]:
    generator = torch.Generator().manual_seed(seed)
    shape = (3, SIZES["seq_len"] + 1)
    batches = [torch.randint(0, 50, shape, generator=generator) for _ in range(STEPS)]
    return [(batch, 0.01 * (1 + step)) for step, batch in enumerate(batches)]


def test_steps_are_those_of_a_loop(place: torch.device) -> None:
    """Other tokens and another learning rate in every step."""
    plain, captured = _Training(place), _Training(place)
    step = CapturedStep(captured.compute, captured.optimizer, place)
    for tokens, lr in _inputs(seed=5):
        for group in plain.optimizer.param_groups:
            group["lr"] = lr
        wanted, found = plain.compute(tokens.to(place)), step(tokens, lr)
        for name in StepResult._fields:
            torch.testing.assert_close(getattr(found, name), getattr(wanted, name))
    assert step.captured == (place.type == "cuda")
    if place.type == "cpu":
        assert captured.parameters().equal(plain.parameters())
    torch.testing.assert_close(captured.parameters(), plain.parameters())
    biases = [
        torch.stack([layer.router.selection_bias for layer in training.model.moe_layers()])
        for training in (plain, captured)
    ]
    assert biases[0].equal(biases[1]) and biases[0].count_nonzero()


def test_a_learning_rate_that_does_not_arrive_is_seen(place: torch.device) -> None:
    """The comparison above is no empty one."""
    one, other = _Training(place), _Training(place)
    steps = [CapturedStep(t.compute, t.optimizer, place) for t in (one, other)]
    for tokens, lr in _inputs(seed=5):
        steps[0](tokens, lr)
        steps[1](tokens, 0.01)
    assert (one.parameters() - other.parameters()).abs().max() > 1e-3


def test_another_shape_is_refused(place: torch.device) -> None:
    training = _Training(place)
    step = CapturedStep(training.compute, training.optimizer, place)
    (tokens, lr), *_ = _inputs(seed=1)
    step(tokens, lr)
    before = training.parameters()
    with pytest.raises(ValueError, match=r"tokens must have shape \[3, 17\].*got \[2, 17\]"):
        step(tokens[:2], lr)
    assert training.parameters().equal(before)


def test_places_change_with_memory_and_not_with_values() -> None:
    training = _Training(torch.device("cpu"))
    (tokens, _), *_ = _inputs(seed=1)
    before = places(training.model, training.optimizer)
    training.compute(tokens)
    with_moments = places(training.model, training.optimizer)
    assert with_moments != before
    training.compute(tokens)
    assert places(training.model, training.optimizer) == with_moments
    for state in training.optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].clone()
        break
    moved = places(training.model, training.optimizer)
    assert moved != with_moments
    router = training.model.moe_layers()[0].router
    router.selection_bias = router.selection_bias.clone()
    assert places(training.model, training.optimizer) != moved


JOBS = {
    "plain": "",
    "selection bias, no clipping": "--balance bias --grad-clip 0",
    "fragments and overlap": "--fragments 2 --overlap 1",
    "experts move and warm up": "--replication 1 --placement random --reshuffle-rounds 1 "
    "--reshuffle-warmup 2",
    "moments are averaged": "--optimizer local-adamw",
    "a checkpoint in every round": "--checkpoint-rounds 1",
}


@pytest.mark.parametrize("changes", JOBS.values(), ids=JOBS)
def test_a_job_is_the_same_job(flags: list[str], tmp_path: Path, text: Path, changes: str) -> None:
    open_data([str(text / "*.py")], 32, cache_dir=text / "cache")  # encoded once, for both jobs
    reports = []
    for name, more in (("plain", []), ("captured", ["--cuda-graph"])):
        run = tmp_path / name
        result = train(*flags, *changes.split(), *more, "--run-dir", str(run))
        reports.append(finish(run, result))
    hashes = {report["run"]["model_hash"] for report in reports}
    losses = {report["validation"]["loss"] for report in reports}
    assert len(hashes) == len(losses) == 1


def test_a_resumed_job_is_the_same_job(flags: list[str], tmp_path: Path) -> None:
    """Also where the checkpoint was written without the option."""
    same = [*flags, "--eval-rounds", "0", "--schedule", "constant"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    wanted = finish(whole, train(*same, "--cuda-graph", "--rounds", "4", "--run-dir", str(whole)))
    first = [*same, "--rounds", "2", "--checkpoint-rounds", "2", "--run-dir", str(parts)]
    finish(parts, train(*first))
    line = [*same, "--cuda-graph", "--rounds", "4", "--resume", "auto", "--run-dir", str(parts)]
    again = finish(parts, train(*line))
    assert again["run"]["model_hash"] == wanted["run"]["model_hash"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ("--ranks-per-site 2", "sites.ranks_per_site = 1"),
        ("--optimizer ddp", "an outer.optimizer that is not ddp"),
        ("--inner-optimizer sgd", "inner.inner_optimizer = adamw"),
        ("--expert-mean tokens", "outer.expert_mean = equal"),
        ("--expert-turns 2", "outer.turn_order = numbered if outer.expert_turns > 1"),
    ],
)
def test_what_a_graph_cannot_contain_is_named(
    changes: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        job_config(["--cuda-graph", *changes.split()])
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "run.cuda_graph needs" in said and named in said
    job_config(changes.split())
