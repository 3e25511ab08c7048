"""Sites that take fewer local steps: how many, the weight of their deltas, the data they skip."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from outer_model import (
    EXPERTS,
    SmallModel,
    assert_same_bits,
    contributors,
    cyclic_placement,
    give_gradients,
    pieces,
)
from sites import pool
from small_job import SMALL

from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.data.sequences import open_data
from fomoe_ext.outer import OuterSync
from fomoe_ext.outer.averaging import Averaging
from fomoe_ext.outer.layout import Piece
from fomoe_ext.outer.options import OuterOptions
from fomoe_ext.report.runs import job_config
from fomoe_ext.train.pace import Pace, steps_of_round

SITES = 3


# ---- how many steps ------------------------------------------------------------------------------


def test_steps_by_pace() -> None:
    assert steps_of_round([1.0, 2.0, 4.0], 16) == [16, 8, 4]
    assert steps_of_round([3.0, 1.0, 100.0], 4) == [1, 4, 1]
    assert steps_of_round([1.0, 1.02, 1.3], 10) == [10, 10, 8]
    assert steps_of_round([0.0, 2.0, 1.0], 8) == [8, 4, 8]  # a site of unknown pace takes all steps
    assert steps_of_round([0.0, 0.0], 8) == [8, 8]
    with pytest.raises(ValueError, match="got nan for site 1"):
        steps_of_round([1.0, float("nan")], 8)


def test_pace_is_smoothed() -> None:
    pace = Pace()
    pace.took(0, 5.0)
    assert pace.seconds == 0.0
    pace.took(4, 8.0)
    assert pace.seconds == 2.0
    pace.took(2, 8.0)
    assert pace.seconds == 3.0
    pace.took(0, 100.0)
    assert pace.seconds == 3.0


# ---- what deltas weigh ---------------------------------------------------------------------------


def meet(
    site: int, num_sites: int, options: dict[str, Any], trained: tuple[float, ...], mean: str
) -> dict[str, Any]:
    placement = cyclic_placement(num_sites, 2)
    model = SmallModel(placement, site, balance="bias")
    inner = torch.optim.AdamW(model.parameters(), lr=0.01 * (site + 1))
    sync = OuterSync(
        model, placement, site, OuterOptions(site_mean=mean, **options), inner_optimizer=inner
    )
    before = pieces(model)
    give_gradients(model, site, 0)
    inner.step()
    for layer in model.layers:
        layer.router.selection_bias += 0.1 * (site + 1)
    moments = {
        m: pieces(model, lambda p, m=m: inner.state[p][m]) for m in ("exp_avg", "exp_avg_sq")
    }
    local, predicted = pieces(model), sync.predicted_bytes()
    report = sync.step(tokens=trained[site])
    return {
        "before": before,
        "local": local,
        "after": pieces(model),
        "moments": moments,
        "moments after": {m: pieces(model, lambda p, m=m: inner.state[p][m]) for m in moments},
        "bias": [layer.router.selection_bias.clone() for layer in model.layers],
        "bytes": (report.bytes_sent, predicted),
    }


def weighted(answers: list[dict[str, Any]], of: Any, sites: Any, trained: Any) -> torch.Tensor:
    """sum t_s x_s / sum t_s in fp64; where nobody has trained, the plain mean."""
    weights = {s: trained[s] if any(trained[m] for m in sites) else 1.0 for s in sites}
    return sum(weights[s] * of(answers[s]).double() for s in sites) / sum(weights.values())


@pytest.mark.parametrize("trained", [(64.0, 8.0, 24.0), (0.0, 40.0, 0.0)])
@pytest.mark.parametrize("optimizer", ["diloco", "fedavg", "local-adamw"])
def test_values_weigh_by_tokens(optimizer: str, trained: tuple[float, ...]) -> None:
    """Dense parameters, router rows, experts, moments and biases against fp64, also of experts that
    no site has trained."""
    lr = {"diloco": 1 + 0.2}.get(optimizer, 1.0)
    answers = pool().run(SITES, meet, {"optimizer": optimizer}, trained, "tokens")
    placement, nothing = (
        cyclic_placement(SITES, 2),
        0,
    )
    for key in sorted({key for a in answers for key in a["after"]}, key=repr):
        sites = contributors(key, placement)
        if not any(trained[s] for s in sites):
            nothing += 1
        mean = weighted(answers, lambda a, k=key: a["before"][k] - a["local"][k], sites, trained)
        for site in sites:
            wanted = answers[site]["before"][key].double() - lr * mean
            assert float((answers[site]["after"][key].double() - wanted).abs().max()) < 2e-6, key
        for moment in answers[0]["moments"] if optimizer == "local-adamw" else ():
            mean = weighted(answers, lambda a, k=key, m=moment: a["moments"][m][k], sites, trained)
            for site in sites:
                got = answers[site]["moments after"][moment][key].double()
                assert float((got - mean).abs().max()) < 2e-6, (moment, key)
    assert (nothing > 10) == (0.0 in trained)
    bias = sum(t * 0.1 * (s + 1) for s, t in enumerate(trained)) / sum(trained)
    for answer in answers:
        sent, predicted = answer["bytes"]
        assert sent == predicted > 0
        for row in answer["bias"]:
            assert row.tolist() == pytest.approx([bias] * EXPERTS, rel=1e-5)
    assert_same_bits([answer["after"] for answer in answers], placement, "global")


@pytest.mark.parametrize("codec", ["fp32", "int4", "topk"])
def test_even_tokens_give_the_bits_of_equal_weights(codec: str) -> None:
    options = {"optimizer": "diloco", "codec": codec}
    equal = pool().run(SITES, meet, options, (24.0,) * 3, "equal")
    tokens = pool().run(SITES, meet, options, (24.0,) * 3, "tokens")
    for one, other in zip(equal, tokens, strict=True):
        assert all(torch.equal(one["after"][key], other["after"][key]) for key in one["after"])
        assert other["bytes"][0] == one["bytes"][0] + 8 * (SITES - 1)


def test_weights_of_a_piece() -> None:
    dense = Piece("d", torch.empty(1), None, (0, 1, 2), (0, 1, 2))
    expert = Piece("e", torch.empty(1), None, (0, 2), (0, 2), (0, 4))
    alone = Piece("a", torch.empty(1), None, (1,), (1,), (0, 5))
    averaging = Averaging(trained=[30.0, 10.0, 20.0])
    assert [averaging.weight(dense, s) for s in range(3)] == [1.5, 0.5, 1.0]
    assert averaging.divisor(dense) == 3.0
    assert [averaging.weight(expert, s) for s in range(3)] == [1.2, 0.0, 0.8]
    assert averaging.weight(alone, 1) == averaging.divisor(alone) == 1.0
    routed = Averaging({(0, 4): [7.0, 0.0, 2.0]}, trained=[30.0, 10.0, 20.0])
    assert [routed.weight(expert, s) for s in (0, 2)] == [7.0, 2.0]  # its own tokens count
    assert routed.divisor(expert) == 9.0 and routed.weight(dense, 1) == 0.5
    nobody = Averaging(trained=[0.0, 10.0, 0.0])
    assert nobody.weight(expert, 0) == 1.0 and nobody.divisor(expert) == 2.0
    assert [nobody.weight(dense, s) for s in range(3)] == [0.0, 3.0, 0.0]


def without_tokens(site: int, num_sites: int) -> list[str]:
    model = SmallModel(cyclic_placement(1, 1), 0)
    sync = OuterSync(
        model,
        cyclic_placement(1, 1),
        0,
        OuterOptions(site_mean="tokens"),
    )
    messages = []
    for tokens in (None, -1.0, float("nan")):
        with pytest.raises(
            ValueError, match="tokens must be >= 0 with site_mean = tokens"
        ) as error:
            sync.step(tokens)
        messages.append(str(error.value))
    return messages


def test_tokens_must_be_given() -> None:
    assert len(set(pool().run(1, without_tokens)[0])) == 3


@pytest.mark.parametrize("flags", ["--optimizer ddp", "--fragments 2", "--overlap 1"])
def test_options_that_exclude_uneven_steps_are_refused(flags: str, capsys: Any) -> None:
    with pytest.raises((ValueError, SystemExit)) as caught:
        job_config(["--uneven-steps", *flags.split()])
    box = capsys.readouterr().err.translate({ord("\u2502"): " "})
    message = " ".join((str(caught.value) + box).split())
    assert "inner.uneven_steps needs outer.fragments = 1" in message


def test_site_mean_tokens_with_ddp_is_refused() -> None:
    with pytest.raises(ValueError, match="site_mean = tokens needs fragments = 1, overlap = 0"):
        OuterOptions(site_mean="tokens", optimizer="ddp")


# ---- whole jobs ----------------------------------------------------------------------------------

SECONDS = (0.010, 0.031, 0.020)
"""What a local step takes each site, by the clock that the tests give it."""


def run_job(
    site: int, num_sites: int, arguments: list[str], stop_at: tuple[int, int, int], resume: str
) -> dict[str, Any]:
    """A job whose clock advances only with local steps. `stop_at`: (site, round, step) at which
    that site is asked to stop, so that it does not finish the round."""
    from fomoe_ext.launch.world import StopRequest, World
    from fomoe_ext.train.job_report import model_hash
    from fomoe_ext.train.site import TrainingSite
    from fomoe_ext.train.trainer import Trainer

    config = job_config(arguments)
    files = config.data
    data = open_data(files.data, config.model.seq_len, cache_dir=files.cache_dir)
    world = World(site, num_sites)
    resumed = Path(resume) if resume else None
    job = TrainingSite(config, world, data, torch.device("cpu"), resumed)
    job.steps.clock = lambda: job.tally.steps * SECONDS[site]  # type: ignore[method-assign]
    stop, rates, rounds, windows = StopRequest(), [], [], []
    local_step, meet = job.steps.step, job.meetings.meet

    def step() -> torch.Tensor:
        start = job.batches.position + site * config.inner.batch_size
        windows.extend(range(start, start + config.inner.batch_size))
        result = local_step()
        rates.append(job.optimizer.param_groups[0]["lr"])
        if stop_at == (site, job.round + 1, job.steps_in_round):
            stop.asked = True
        return result

    def met() -> float:
        rounds.append((job.steps_in_round, job.progress.tokens))
        return meet()

    job.steps.step, job.meetings.meet = step, met  # type: ignore[method-assign]
    stopped = Trainer(job, stop, None).train()
    return {
        "stopped": stopped,
        "rounds": rounds,
        "rates": rates,
        "windows": windows,
        "position": job.batches.position,
        "tally": job.tally.state_dict(),
        "sent": job.bytes_sent,
        "hash": model_hash(job),
        "steps_in_round": job.steps_in_round,
        "step": job.step,
    }


@pytest.fixture
def arguments(text, tmp_path):
    """A job of three sites that differ in speed."""
    open_data([str(text / "*.py")], 32, cache_dir=text / "cache")  # encoded once, for all sites
    return [
        *SMALL,
        *shlex.split(
            "--local-steps 6 --rounds 5 --eval-rounds 0 --num-experts 9 --codec int8 --sites 3 "
            "--replication 2 --inner-lr 0.01 --warmup-steps 12"
        ),
        *("--run-dir", str(tmp_path / "run"), "--data", str(text / "*.py")),
        *("--cache-dir", str(text / "cache")),
    ]


NOBODY = (-1, 0, 0)


def test_slower_sites_take_fewer_steps(arguments: list[str]) -> None:
    """From the second round on. Steps and tokens are counted, bytes are as predicted."""
    even = pool().run(SITES, run_job, arguments, NOBODY, "")
    uneven = pool().run(SITES, run_job, [*arguments, "--uneven-steps"], NOBODY, "")
    assert {steps for answer in even for steps, _ in answer["rounds"]} == {6}
    due = [6, 2, 3]
    for site, answer in enumerate(uneven):
        assert [steps for steps, _ in answer["rounds"]] == [6, *[due[site]] * 4]
        assert [tokens for _, tokens in answer["rounds"]] == [
            steps * 2 * 32 for steps, _ in answer["rounds"]
        ]
        tally = answer["tally"]
        assert tally["steps"] == 6 + 4 * due[site] and tally["tokens"] == tally["steps"] * 2 * 32
        assert answer["sent"] == tally["planned_bytes"] > 0 and tally["agreements"] in (0, 5)
        assert answer["step"] == 30
    for site, answer in enumerate(even):
        # The time, by the test's clock, that the fastest site waits for the slowest in a round.
        of_all = [max(steps[r][0] * SECONDS[s] for s, steps in _rounds(even)) for r in range(5)]
        assert of_all == [6 * SECONDS[1]] * 5 and answer["tally"]["steps"] == 30
        now = [max(steps[r][0] * SECONDS[s] for s, steps in _rounds(uneven)) for r in range(5)]
        assert all(seconds < 1.1 * 6 * SECONDS[0] for seconds in now[1:]), site
    assert len({answer["hash"] for answer in uneven}) == 1
    assert uneven[0]["hash"] != even[0]["hash"]


def _rounds(answers: list[dict[str, Any]]) -> Any:
    return [(site, answer["rounds"]) for site, answer in enumerate(answers)]


def test_the_schedule_and_the_data_are_those_of_the_round(arguments: list[str]) -> None:
    """Slower sites have the learning rates of the others. No window is trained on twice, and all
    sites continue at the same position."""
    answers = pool().run(SITES, run_job, [*arguments, "--uneven-steps"], NOBODY, "")
    peak, warmup = 0.01, 12
    for site, due in enumerate((6, 2, 3)):
        rates = answers[site]["rates"]
        first = [peak * (step + 1) / warmup for step in range(6)]
        second = [peak * (6 + k * 6 // due + 1) / warmup for k in range(due)]
        assert rates[: 6 + due] == pytest.approx(first + second)
    windows = [window for answer in answers for window in answer["windows"]]
    assert len(set(windows)) == len(windows) == sum(a["tally"]["steps"] for a in answers) * 2
    assert {answer["position"] for answer in answers} == {5 * 6 * SITES * 2}
    per_round = SITES * 2 * 6
    for site, due in enumerate((6, 2, 3)):
        for number in range(1, 5):
            first = number * per_round + site * 2
            mine = [w for w in answers[site]["windows"] if w // per_round == number]
            assert mine == [first + k * SITES * 2 + i for k in range(due) for i in (0, 1)]


@pytest.mark.parametrize("when", ["between rounds", "in a round"])
def test_resuming_gives_the_same_bits(arguments: list[str], tmp_path: Path, when: str) -> None:
    """Also from the middle of a round in which one site is done with its fewer steps and another
    has steps left."""
    flags = [*arguments, "--uneven-steps"]
    whole = pool().run(SITES, run_job, flags, NOBODY, "")
    again = [*flags, "--run-dir", str(tmp_path / "again")]
    stop_at = (0, 3, 6) if when == "between rounds" else (0, 3, 4)
    stopped = pool().run(SITES, run_job, again, stop_at, "")
    assert all(answer["stopped"] for answer in stopped)
    (path,) = ckpt.list_checkpoints(tmp_path / "again" / "checkpoints")
    if when == "in a round":
        assert [answer["steps_in_round"] for answer in stopped] == [4, 2, 3]
        assert ckpt.steps_of(path) == 2 * 6 + 4
    else:
        assert ckpt.steps_of(path) == 3 * 6
    resumed = pool().run(SITES, run_job, again, NOBODY, str(path))
    for site, (one, first, second) in enumerate(zip(whole, stopped, resumed, strict=True)):
        assert not second["stopped"] and one["hash"] == second["hash"], site
        assert first["windows"] + second["windows"] == one["windows"]
        assert first["rates"] + second["rates"] == one["rates"]
        for what in ("steps", "tokens", "rows", "slots"):
            assert second["tally"][what] == one["tally"][what], what
        assert second["sent"] == second["tally"]["planned_bytes"]
    shutil.rmtree(tmp_path / "again")


def test_skipped_batches_are_checked(text) -> None:
    data = open_data([str(text / "*.py")], 32, cache_dir=text / "cache")
    batches = data.train_batches(2, site=1, num_sites=3)
    with pytest.raises(ValueError, match="batches must be at least 0, got -1"):
        batches.skip(-1)
    other = data.train_batches(2, site=1, num_sites=3)
    for _ in range(2):
        next(other)
    batches.skip(2)
    assert torch.equal(next(batches), next(other))
