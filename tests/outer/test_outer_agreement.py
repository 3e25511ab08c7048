"""Failures between sites: damaged bytes, diverged parameters, different rounds, lost sites."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from typing import Any

import pytest
import torch
from new_process import environment
from outer_model import (
    SmallModel,
    bits,
    cyclic_placement,
    give_gradients,
    pieces,
    random_placement,
)
from sites import pool

from fomoe_ext.outer import MeetingError, OuterOptions, OuterSync, SiteGroups
from fomoe_ext.outer.agreement import Agreement, Held
from fomoe_ext.placement import wire


def make(site: int, num_sites: int, replication: int = 2, **options: Any) -> OuterSync:
    placement = cyclic_placement(num_sites, replication)
    model = SmallModel(placement, site)
    return OuterSync(model, placement, site, OuterOptions(**{"timeout_s": 20, **options}))


def train(sync: OuterSync, site: int, step: int) -> None:
    give_gradients(sync.model, site, step)
    torch.optim.SGD(sync.model.parameters(), lr=0.1).step()
    sync.after_step()


def refused(call: Any) -> str:
    """The message of the MeetingError of a call, "" when there is none."""
    try:
        call()
    except MeetingError as error:
        return str(error)
    return ""


# ------------------------------------------------------------------------------------ damaged bytes


class BadCable:
    """A group's connections that flip one bit of a payload from site 0 on arrival."""

    def __init__(self, handle: Any, received: torch.Tensor, row: int) -> None:
        self._handle, self._received, self._row = handle, received, row

    def wait(self) -> None:
        self._handle.wait()
        self._received[self._row, 3] ^= 16


def flip(site: int, num_sites: int, stage: str, codec: str) -> tuple[str, str]:
    sync = make(site, num_sites, codec=codec, timeout_s=4)  # site 0 waits this long
    everyone = sync.groups.group(sync.groups.everyone)
    real = getattr(everyone, stage)

    def flipped(received: torch.Tensor, sent: torch.Tensor) -> tuple[Any, int]:
        handle, count = real(received, sent)
        if site == 1 and received.dim() == 2 and received.shape[1] != wire.STATUS_BYTES:
            return BadCable(handle, received, 0), count
        return handle, count

    train(sync, site, 0)
    setattr(everyone, stage, flipped)
    first = refused(sync.step)
    return first, refused(sync.step)


@pytest.mark.parametrize(
    ("stage", "codec"),
    # A sparse payload is not scattered.
    [("scatter", "fp32"), ("scatter", "int8"), ("gather", "int8"), ("gather", "topk")],
)
def test_a_flipped_bit_is_seen_and_named(stage: str, codec: str) -> None:
    answers = pool().run(2, flip, stage, codec)
    first, again = answers[1]
    assert "broke off at site 1" in first and "that site 0 sent was damaged on the way" in first
    assert "of the sites (0, 1)" in first
    assert "cannot go on" in again
    assert "broke off at site 0" in answers[0][0] or "cannot go on" in answers[0][1]


# ----------------------------------------------------------------------------------- different bits


def drift(site: int, num_sites: int, mode: str, culprits: tuple[int, ...]) -> Any:
    """At some sites one bit of a dense tensor's anchor changes after a good round."""
    sync = make(site, num_sites, on_mismatch=mode, codec="int8")
    train(sync, site, 0)
    sync.step()
    layout = next(i for i, la in enumerate(sync.layout.layouts) if la.group.size == num_sites)
    if site in culprits:
        sync.state.anchors[layout][2] += 2.0**-10 * (1 + site)
    train(sync, site, 1)
    message, again = "", ""
    healed: tuple[str, ...] = ()
    try:
        healed = sync.step().healed
    except MeetingError as error:
        message, again = str(error), refused(sync.step)
    if not message:
        train(sync, site, 2)
        sync.step()
        sync.verify()
    return message, again, healed, pieces(sync.model)["dense", "first"], sync.agreements


def test_different_bits_stop_the_run_and_are_named() -> None:
    for message, again, *_ in pool().run(3, drift, "stop", (1,)):
        assert message == "sites 1 hold other bits of first than sites 0, 2"
        assert "cannot go on" in again and message in again


def test_the_majority_heals_a_site() -> None:
    good = pool().run(3, drift, "stop", ())
    assert all(answer[2] == () and answer[4] == 3 for answer in good)
    for message, _, healed, values, agreements in pool().run(3, drift, "heal", (1,)):
        assert message == "" and healed == ("first",) and agreements == 3
        assert values.shape == good[0][3].shape
    # Site 1's own delta was measured from its wrong anchor, so that values differ a little.
    healed_values = [a[3] for a in pool().run(3, drift, "heal", (1,))]
    assert all(bits(v) == bits(healed_values[0]) for v in healed_values)
    assert float((healed_values[0] - good[0][3]).abs().max()) < 1e-2


def test_without_a_majority_nobody_is_healed() -> None:
    for message, *_ in pool().run(2, drift, "heal", (1,)):
        assert message == "no majority of the sites 0, 1 holds the same bits of first"


def compare(site: int, num_sites: int) -> list[Any]:
    """Hashes of tensors with the same owners: equal, swapped, and with zeros of another sign."""
    groups = SiteGroups(num_sites, site, timeout_s=20)
    owners = tuple(range(num_sites))
    one, two = torch.arange(5.0), torch.arange(5.0) + 1
    zero = torch.zeros(3)
    cases = [
        [Held("a", owners, (one,)), Held("b", owners, (two,))],
        [Held("a", owners, (two if site else one,)), Held("b", owners, (one if site else two,))],
        [Held("z", owners, (-zero if site == 1 else zero,)), Held("b", owners, (two,))],
        [Held("p", owners, (one, two) if site else (two, one))],
    ]
    found = []
    for held in cases:
        agreement = Agreement(groups, held)
        agreement.exchange()
        found.append(sorted(key for keys in agreement.differing.values() for key, _ in keys))
    return found


def test_hashes_see_swaps_and_signs() -> None:
    for found in pool().run(2, compare):
        assert found == [[], ["a", "b"], ["z"], ["p"]]


# --------------------------------------------------------------------------------- different rounds


def out_of_step(site: int, num_sites: int) -> tuple[str, str, int]:
    """Site 1 continues from an older round than the others; then site 0 has another placement."""
    sync = make(site, num_sites)
    old = {name: value for name, value in sync.state_dict().items() if name == "round"}
    train(sync, site, 0)
    sync.step()
    if site == 1:
        sync.log.round = old["round"]
    before = pieces(sync.model)
    rounds = refused(sync.step)
    sync.log.round = 1
    placement = sync.placement
    if site == 0:
        sync.layout.placement = random_placement(num_sites, 2, seed=7)
    placements = refused(sync.step)
    sync.layout.placement = placement
    unchanged = all(bits(v) == bits(before[key]) for key, v in pieces(sync.model).items())
    assert unchanged
    return rounds, placements, sync.step().round  # nothing is broken


def test_sites_of_different_rounds_or_placements_do_not_meet() -> None:
    for site, (rounds, placements, after) in enumerate(pool().run(3, out_of_step)):
        assert rounds.startswith("nothing was sent or changed: ")
        if site == 1:
            assert "site 0 is in meeting 2.0, site 1 is in meeting 1.0" in rounds
            assert "site 2 is in meeting 2.0" in rounds
        else:
            assert f"site 1 is in meeting 1.0, site {site} is in meeting 2.0" in rounds
        wrong = [1, 2] if site == 0 else [0]
        assert all(f"site {other} has another placement" in placements for other in wrong)
        assert after == 2


# --------------------------------------------------------------------------------------- lost sites

LOST = """
import os, signal, sys, time, torch, torch.distributed as dist
from datetime import timedelta
from test_outer_agreement import *
site, store, how = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + store, rank=site, world_size=3,
                        timeout=timedelta(seconds=60))
placement = cyclic_placement(3, 2)
model = SmallModel(placement, site)
torch.optim.SGD(model.parameters(), lr=0.0).step()  # imports what takes seconds
options = dict(codec="int8", bucket_bytes=256)
if how == "overlap":
    options |= dict(fragments=2, overlap=1, local_steps=2)
sync = OuterSync(model, placement, site, OuterOptions(**options),
                 timeout_s=5 if how == "silent" else 60)

def end():
    os.kill(os.getpid(), signal.SIGSTOP if how == "silent" else signal.SIGKILL)

if site == 2 and how in ("during", "overlap"):
    group = sync.groups.group(sync.groups.everyone)
    real, calls = group.scatter, []
    def scatter(*arguments):
        calls.append(1)
        if len(calls) == 3:
            end()
        return real(*arguments)
    group.scatter = scatter
messages = []
try:
    for step in range(4):
        if site == 2 and how in ("before", "silent") and step == 2:
            end()
        train(sync, site, step)
        if how != "overlap" or step % 2:
            sync.step()
    sync.finish()
except MeetingError as error:
    messages.append(str(error))
messages.append(refused(sync.step))
print(messages, flush=True)
os._exit(0)
"""


def run_lost(how: str) -> list[str]:
    """The output of the other two sites when site 2 is killed or stopped."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", LOST, str(site), f"{folder}/store", how],
                env=environment(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo"),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for site in range(3)
        ]
        try:
            return [process.communicate(timeout=90)[0] for process in processes[:2]]
        finally:
            for process in processes:
                process.kill()
                process.wait()


@pytest.mark.parametrize("how", ["before", "during", "overlap"])
def test_a_dead_site_is_named_at_once(how: str) -> None:
    for site, output in enumerate(run_lost(how)):
        assert f"broke off at site {site}: site 2 is gone: " in output, output
        assert "cannot go on" in output and "resume a checkpoint" in output, output


def test_a_silent_site_is_named_when_time_is_up() -> None:
    for output in run_lost("silent"):
        assert "no word from site 2: " in output, output
        assert "imed out" in output, output


def test_the_default_timeout_is_at_most_ten_minutes() -> None:
    assert SiteGroups(1, 0).timeout_s <= 600
