"""Sites that come and go: waits, scripts, secrets, options. Whole jobs are in tests/chaos."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fomoe_ext.config.fault import FaultConfig
from fomoe_ext.config.job import preset_config
from fomoe_ext.fault import lighthouse, secret
from fomoe_ext.fault.membership import read_current
from fomoe_ext.launch import inject
from fomoe_ext.launch.inject import Fault
from fomoe_ext.launch.waiting import GivenUp, wait_for, watched
from fomoe_ext.placement import wire
from fomoe_ext.plan.memory import job_memory


class _Work:
    def __init__(self, looks: int) -> None:
        self.looks, self.waited = looks, False

    def is_completed(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def wait(self) -> None:
        self.waited = True


def test_a_wait_is_given_up_when_the_watch_says_so() -> None:
    work = _Work(10**9)
    reasons = iter(["", "", "site 3 is silent"])
    with watched(lambda: next(reasons)), pytest.raises(GivenUp, match="site 3 is silent"):
        wait_for(work)
    assert not work.waited
    work = _Work(3)
    with watched(lambda: ""):
        wait_for(work)
    assert work.waited
    work = _Work(10**9)
    wait_for(work)  # without a watch the wait is that of the work itself
    assert work.waited


def test_scripts_of_faults() -> None:
    script = "kill 2 at 3 reduce, stop 1 at 4 local for 2.5\nfull 0 at 1 checkpoint\n"
    faults = inject.parse(script)
    assert faults == [
        Fault("kill", 2, 3, "reduce"),
        Fault("stop", 1, 4, "local", 2.5),
        Fault("full", 0, 1, "checkpoint"),
    ]
    assert inject.parse(", ".join(map(str, faults))) == faults
    for bad in ("kill 2", "burn 2 at 3 local", "kill 2 at 3 tea", "stop 1 at 2 local during 3"):
        with pytest.raises(ValueError, match=f"fault {bad!r}"):
            inject.parse(bad)


def test_a_secret_changes_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FOMOE_SECRET", raising=False)
    open_ = secret.keyed("member", 1)
    monkeypatch.setenv("FOMOE_SECRET", "long enough to be a secret")
    assert secret.keyed("member", 1) != open_
    assert secret.matches(secret.keyed("member", 1), "member", 1)
    assert not secret.matches(open_, "member", 1)
    assert not secret.matches(secret.keyed("member", 2), "member", 1)
    monkeypatch.setenv("FOMOE_SECRET", "short")
    with pytest.raises(ValueError, match="at least 16 characters, got 5"):
        secret.own_secret()


def test_other_interfaces_than_loopback_need_a_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FOMOE_SECRET", raising=False)
    for host in ("127.0.0.1", "::1", "localhost"):
        lighthouse.require_secret(host)
    for host in ("0.0.0.0", "192.168.1.5", "lighthouse.example"):
        with pytest.raises(ValueError, match="FOMOE_SECRET"):
            lighthouse.require_secret(host)
    monkeypatch.setenv("FOMOE_SECRET", "long enough to be a secret")
    lighthouse.require_secret("0.0.0.0")
    monkeypatch.delenv("FOMOE_SECRET")
    pytest.importorskip("torchft")
    assert lighthouse.main(["--bind", "0.0.0.0:0"]) == 2
    assert "FOMOE_SECRET" in capsys.readouterr().err


def test_a_corrupt_membership_record_is_refused() -> None:
    assert read_current(b'{"name": "1.2.1-1", "members": [0, 3]}', 4) == ("1.2.1-1", (0, 3))
    for raw in (
        b"",
        b"[]",
        b'{"name": "1.2"}',
        b'{"name": "", "members": [0]}',
        b'{"name": "1.2", "members": [4]}',
        b'{"name": "1.2", "members": [true]}',
        b'{"name": "1.2", "members": "0"}',
        b'{"name": "' + b"1" * (1 << 20) + b'", "members": [0]}',
    ):
        with pytest.raises(ValueError) as caught:
            read_current(raw, 4)
        assert "membership record in the store is corrupt" in str(caught.value)


def test_options_that_exclude_membership_are_named() -> None:
    config = preset_config("tiny")
    fault = FaultConfig(membership="torchft")
    dataclasses.replace(config, fault=fault)
    for section, changes, wanted in (
        ("outer", {"optimizer": "ddp"}, "not ddp"),
        ("outer", {"fragments": 2}, r"fragments = 1 \(got 2\)"),
        ("sites", {"ranks_per_site": 2}, "ranks_per_site = 1"),
        ("run", {"probe_tokens": 64}, "probe_tokens = 0"),
    ):
        part = dataclasses.replace(getattr(config, section), **changes)
        with pytest.raises(ValueError, match=f"membership = torchft needs .*{wanted}"):
            dataclasses.replace(config, fault=fault, **{section: part})
    with pytest.raises(ValueError, match=r"quorum must be at most sites\.sites = 4, got 5"):
        dataclasses.replace(config, fault=FaultConfig(membership="torchft", quorum=5))


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"quorum": 0}, "quorum"),
        ({"silent_s": 0.0}, "silent_s"),
        ({"grace": -1.0}, "grace"),
        ({"restarts": 2}, "restarts need"),
        ({"shadow_experts": True}, "shadow_experts needs"),
        ({"lighthouse": "a:1"}, "lighthouse"),
    ],
)
def test_bad_fault_options(changes: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        FaultConfig(**changes)


def test_the_plan_counts_what_a_tolerant_job_sends() -> None:
    from fomoe_ext.plan import traffic as plan

    config = preset_config("tiny")
    tolerant = dataclasses.replace(
        config, fault=FaultConfig(membership="torchft", shadow_experts=True)
    )
    placement = plan.job_placement(config)
    more = plan.meeting_bytes(tolerant, placement, 0) - plan.meeting_bytes(config, placement, 0)
    assert more == 3 * wire.COMMIT_BYTES
    assert plan.shadow_bytes(config, placement, 0) == 0
    assert plan.shadow_bytes(tolerant, placement, 0) > 0
    kept = [job_memory(c, placement, 0) for c in (config, tolerant)]
    assert kept[0].shadow_copies == 0
    assert kept[1].total - kept[0].total == kept[1].shadow_copies > 0
