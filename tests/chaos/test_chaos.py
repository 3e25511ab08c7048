"""Faults in every phase of a job of real processes: it ends, and nothing is lost that need not be.

The whole table is `pytest tests/chaos --slow`; without --slow a part of it that takes minutes.
"""

from __future__ import annotations

import time
from functools import lru_cache
from pathlib import Path

import pytest
from chaos_jobs import NUM_SITES, ChaosJob, Outcome, run, run_undisturbed

torchft = pytest.importorskip("torchft", reason="the extra `fault` is not installed")

PHASES = ("local", "notes", "encode", "reduce", "gather", "apply", "checkpoint")
ROUND = 4
"""In which most faults happen; a checkpoint begins after it."""
LOSS_NOISE = 0.06
"""Nats per token: jobs of 8 rounds that differ in their seed differ as much (soak.py prints it)."""
VICTIM = 2
EVERY = ["--checkpoint-rounds", "2"]


def flags(replication: int) -> list[str]:
    """With a single holder the state of experts is kept on one more site."""
    shadows = ["--shadow-experts"] if replication == 1 else []
    return ["--replication", str(replication), *EVERY, *shadows]


@lru_cache(maxsize=2)
def undisturbed(replication: int, folder: Path) -> Outcome:
    outcome = run_undisturbed(folder / f"calm-{replication}", flags(replication))
    assert outcome.codes == {site: [0] for site in range(NUM_SITES)}, outcome.log
    assert outcome.story == []
    for site in outcome.report["sites"]:
        assert (site["memory"]["shadow_copies"] > 0) == (replication == 1)
    return outcome


@pytest.fixture(scope="session")
def calm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("calm")


def check(outcome: Outcome, calm: Outcome, replication: int) -> None:
    """What must hold after any fault that the job survives."""
    assert outcome.report is not None, outcome.log
    assert outcome.left == []
    run_, sites = outcome.report["run"], outcome.report["sites"]
    assert run_["rounds"] == calm.report["run"]["rounds"]
    # Hashes of all holders are compared after each meeting but one that broke off in between.
    assert run_["agreements"] >= run_["rounds"] - 1
    assert abs(outcome.loss - calm.loss) < LOSS_NOISE, (outcome.loss, calm.loss)
    for site in sites:
        assert site["bytes_sent"] == site["planned"]["bytes"]
    for event in outcome.story:
        for entry in event["restored"]:
            assert replication == 1, "no expert may lose all holders at once"
            assert event["step"] - entry["from_step"] <= run_["local_steps"]


def survive(
    tmp_path: Path, calm_folder: Path, fault: str, replication: int, restarts: int = 0
) -> Outcome:
    calm = undisturbed(replication, calm_folder)
    outcome = run_undisturbed(tmp_path, flags(replication), fault, restarts)
    check(outcome, calm, replication)
    return outcome


def ended(outcome: Outcome, but: int) -> None:
    """All sites but one came to the end of the job in their first process."""
    assert {s: c for s, c in outcome.codes.items() if s != but} == {
        s: [0] for s in range(NUM_SITES) if s != but
    }, outcome.log


KILLS = [(phase, replication) for phase in PHASES for replication in (1, 2)]


@pytest.mark.parametrize(("phase", "replication"), KILLS)
def test_a_killed_site_is_survived(
    tmp_path: Path, calm_folder: Path, phase: str, replication: int
) -> None:
    fault = f"kill {VICTIM} at {ROUND} {phase}"
    outcome = survive(tmp_path, calm_folder, fault, replication)
    ended(outcome, but=VICTIM)
    assert outcome.codes[VICTIM] == [137]
    assert [list(event["lost"]) for event in outcome.story if event["lost"]] == [[str(VICTIM)]]
    assert outcome.report["run"]["sites"] == NUM_SITES - 1
    lost = next(e for e in outcome.story if e["lost"])
    assert lost["lost"][str(VICTIM)] == "its process has ended"
    assert bool(lost["restored"]) == (replication == 1)


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


STOPS = [
    (phase, r) if (phase, r) in (("local", 2), ("gather", 1)) else slow(phase, r)
    for phase in PHASES
    for r in (1, 2)
]


@pytest.mark.parametrize(("phase", "replication"), STOPS)
def test_a_stopped_site_is_left_behind(
    tmp_path: Path, calm_folder: Path, phase: str, replication: int
) -> None:
    """Its connections stay open and it says nothing; when it wakes up, the job may have ended."""
    fault = f"stop {VICTIM} at {ROUND} {phase} for 12"
    outcome = survive(tmp_path, calm_folder, fault, replication)
    ended(outcome, but=VICTIM)
    assert outcome.codes[VICTIM] == [0]
    lost = [event["lost"] for event in outcome.story if event["lost"]]
    assert lost and list(lost[0]) == [str(VICTIM)]


CUTS = [
    (phase, r) if (phase, r) in (("encode", 2), ("local", 1)) else slow(phase, r)
    for phase in PHASES
    for r in (1, 2)
]


@pytest.mark.parametrize(("phase", "replication"), CUTS)
def test_a_site_whose_connections_break(
    tmp_path: Path, calm_folder: Path, phase: str, replication: int
) -> None:
    """It can connect again, and does, as a member or anew."""
    fault = f"cut {VICTIM} at {ROUND} {phase}"
    outcome = survive(tmp_path, calm_folder, fault, replication, restarts=1)
    ended(outcome, but=VICTIM)
    assert outcome.story


SLOW = [("local", 2), slow("local", 1), slow("notes", 1), slow("notes", 2)]


@pytest.mark.parametrize(("phase", "replication"), SLOW)
def test_a_late_site_is_not_waited_for(
    tmp_path: Path, calm_folder: Path, phase: str, replication: int
) -> None:
    """It lives and says so, but does not come: the others go on after a few round's times."""
    fault = f"slow {VICTIM} at {ROUND} {phase} for 14"
    outcome = survive(tmp_path, calm_folder, fault, replication)
    ended(outcome, but=VICTIM)
    lost = [event["lost"] for event in outcome.story if event["lost"]]
    assert lost == [{str(VICTIM): "it was late"}]


@pytest.mark.parametrize("replication", [1, 2])
def test_a_damaged_payload_is_refused_and_sent_again(
    tmp_path: Path, calm_folder: Path, replication: int
) -> None:
    calm = undisturbed(replication, calm_folder)
    outcome = survive(tmp_path, calm_folder, f"corrupt {VICTIM} at {ROUND} reduce", replication)
    ended(outcome, but=-1)
    (event,) = outcome.story
    assert event["meeting"] == "rolled back" and not event["lost"]
    assert "damaged on the way" in event["reason"]
    # Nobody was lost and nothing was applied: it is the undisturbed job, to the bit.
    assert outcome.report["run"]["model_hash"] == calm.report["run"]["model_hash"]


@pytest.mark.parametrize("replication", [1, 2])
def test_a_full_disk_costs_a_checkpoint_and_nothing_else(
    tmp_path: Path, calm_folder: Path, replication: int
) -> None:
    calm = undisturbed(replication, calm_folder)
    outcome = survive(tmp_path, calm_folder, f"full {VICTIM} at {ROUND} checkpoint", replication)
    ended(outcome, but=-1)
    assert outcome.story == []
    assert outcome.report["run"]["model_hash"] == calm.report["run"]["model_hash"]
    assert max(site["checkpoints_failed"] for site in outcome.report["sites"]) == 1
    assert "No space left on device" in outcome.log


@pytest.mark.parametrize("replication", [1, 2])
def test_a_lost_site_that_is_started_again_takes_part_again(
    tmp_path: Path, calm_folder: Path, replication: int
) -> None:
    calm = undisturbed(replication, calm_folder)
    more = [*flags(replication), "--rounds", "16"]
    outcome = run_undisturbed(tmp_path, more, f"kill {VICTIM} at 3 gather", restarts=1)
    ended(outcome, but=VICTIM)
    assert outcome.codes[VICTIM] == [137, 0]
    lost, joined = outcome.story
    assert list(lost["lost"]) == [str(VICTIM)] and joined["joined"] == [VICTIM]
    assert outcome.report["run"]["sites"] == NUM_SITES
    assert outcome.loss < calm.loss  # twice the rounds
    # Where it came back it holds as many experts as the others.
    held = {site["memory"]["parameters"] for site in outcome.report["sites"]}
    assert len(held) == 1


def test_the_first_site_can_be_lost_too(tmp_path: Path, calm_folder: Path) -> None:
    """It speaks to the user and writes the report; the next one goes on with that."""
    outcome = survive(tmp_path, calm_folder, f"kill 0 at {ROUND} reduce", 2)
    ended(outcome, but=0)
    rounds = [line for line in outcome.log.splitlines() if line.startswith("round ")]
    assert len({line.split()[1] for line in rounds if "loss" in line}) == 8


def test_two_at_once_and_another_while_the_rest_forms_anew(
    tmp_path: Path, calm_folder: Path
) -> None:
    faults = f"kill 1 at {ROUND} local, kill 2 at {ROUND} reform"
    outcome = run_undisturbed(tmp_path, ["--replication", "3", *EVERY], faults)
    assert outcome.codes == {0: [0], 1: [137], 2: [137], 3: [0]}, outcome.log
    assert outcome.report["run"]["sites"] == 2
    assert all(not event["restored"] for event in outcome.story)
    assert abs(outcome.loss - undisturbed(2, calm_folder).loss) < 2 * LOSS_NOISE


def test_below_the_quorum_the_job_ends_and_can_be_resumed(tmp_path: Path) -> None:
    faults = f"kill 1 at {ROUND + 1} local, kill 2 at {ROUND + 1} local"
    outcome = run(tmp_path, [*flags(2), "--quorum", "3"], faults)
    assert outcome.report is None
    assert outcome.codes[0] == outcome.codes[3] == [75]
    assert "quorum is 3" in outcome.log or "no quorum of 3" in outcome.log
    again = run(tmp_path / "again", [*flags(2), "--resume", "auto"], run_dir=tmp_path / "run")
    assert again.codes == {site: [0] for site in range(NUM_SITES)}, again.log
    assert "resumed from" in again.log
    assert again.report["run"]["rounds"] == 8


def test_a_torn_checkpoint_is_passed_over(tmp_path: Path) -> None:
    """All are killed; the newest checkpoint is torn: the one before it is resumed."""
    faults = ",".join(f"kill {site} at 7 local" for site in range(NUM_SITES))
    outcome = run(tmp_path, flags(2), faults)
    assert outcome.codes == {site: [137] for site in range(NUM_SITES)}
    found = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert len(found) >= 2, outcome.log
    shard = max(found[-1].glob("model-*.safetensors"), key=lambda p: p.stat().st_size)
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size // 2)
    again = run(tmp_path / "again", [*flags(2), "--resume", "auto"], run_dir=tmp_path / "run")
    assert again.codes == {site: [0] for site in range(NUM_SITES)}, again.log
    assert found[-1].name in again.log and f"resumed from {found[-2]}" in again.log


def test_without_its_lighthouse_a_job_goes_on_while_nothing_happens(
    tmp_path: Path, calm_folder: Path
) -> None:
    calm = undisturbed(2, calm_folder)
    with ChaosJob(tmp_path, flags(2)) as job:
        while "round    2/8" not in job.log():
            time.sleep(0.02)
        job.kill_lighthouse()
        outcome = job.wait()
    ended(outcome, but=-1)
    assert "the lighthouse does not answer" in outcome.log
    assert outcome.report["run"]["model_hash"] == calm.report["run"]["model_hash"]


def test_an_outsider_without_the_secret_is_not_let_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It finds none of the run's keys."""
    from fomoe_ext.fault.membership import TorchftMembership

    monkeypatch.setenv("FOMOE_SECRET", "a secret of the run, long enough")
    with ChaosJob(tmp_path, flags(2)) as job:
        monkeypatch.setenv("FOMOE_SECRET", "another secret, as long as that")
        monkeypatch.setattr("fomoe_ext.fault.membership._KEY_S", 1.0)
        with pytest.raises(ConnectionError, match="is no lighthouse of this job"):
            TorchftMembership(job.address, 1, NUM_SITES, quorum=1, silent_s=1.0)
        outcome = job.wait()
    assert outcome.codes == {site: [0] for site in range(NUM_SITES)}, outcome.log


def test_one_after_the_other_until_two_are_left(tmp_path: Path, calm_folder: Path) -> None:
    """Right after a loss not all that are left hold every expert, and they can validate."""
    faults = "kill 1 at 3 local, kill 2 at 5 local"
    outcome = run_undisturbed(tmp_path, ["--replication", "2", "--eval-rounds", "1"], faults)
    assert outcome.codes == {0: [0], 1: [137], 2: [137], 3: [0]}, outcome.log
    assert [sorted(event["lost"]) for event in outcome.story if event["lost"]] == [["1"], ["2"]]
    assert abs(outcome.loss - undisturbed(2, calm_folder).loss) < 2 * LOSS_NOISE
