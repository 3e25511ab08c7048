"""Closing an OuterSync frees what it made, without waiting for the other sites."""

from __future__ import annotations

import gc
import inspect
import os
import textwrap
import threading
import time
from typing import Any

import pytest
import torch
from outer_model import HIDDEN, SmallModel, cyclic_placement, give_gradients, noise
from sites import pool
from torch.optim.optimizer import _global_optimizer_post_hooks as HOOKS

from fomoe_ext.outer import MeetingError, OuterOptions, OuterSync, SiteGroups
from fomoe_ext.placement import Placement


def place(num_sites: int) -> Placement:
    return cyclic_placement(num_sites, min(2, num_sites))


def made(site: int, num_sites: int, groups: SiteGroups | None = None, **options: Any) -> Any:
    model = SmallModel(place(num_sites), site)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    chosen = OuterOptions(**options)
    sync = OuterSync(
        model, place(num_sites), site, chosen, inner_optimizer=inner, groups=groups, timeout_s=20
    )
    return model, inner, sync


def threads() -> int:
    """The number of threads of this process, including those of C++."""
    return len(os.listdir("/proc/self/task"))


def threads_but(many: int) -> int:
    """The number of threads, after waiting for ending ones until at most `many` are left."""
    for _ in range(100):
        if threads() <= many:
            break
        time.sleep(0.02)
    return threads()


OVERLAP = {"fragments": 2, "overlap": 1, "local_steps": 2}


def rounds(model: SmallModel, inner: Any, sync: OuterSync, site: int) -> None:
    for step in range(4):
        give_gradients(model, site, step)
        inner.step()
        if step % 2:
            sync.step()


def whole_life(site: int, num_sites: int, options: dict[str, Any]) -> dict[str, Any]:
    torch.distributed.barrier()
    rounds(*made(site, num_sites), site)  # starts the threads that torch keeps for good
    gc.collect()
    hooks, before = len(HOOKS), threads_but(0)
    model, inner, sync = made(site, num_sites, **options)
    within, exchanging = threads(), 0
    with sync as entered:
        assert entered is sync
        rounds(model, inner, sync, site)
        within = threads()
        exchanging = sum("fomoe-exchange" in t.name for t in threading.enumerate())
    after, python = threads_but(before), [t.name for t in threading.enumerate()]
    sync.close()
    refused = []
    for call in (
        sync.step,
        sync.finish,
        sync.refresh_copies,
        sync.verify,
        sync.hashes,
        sync.copy_anchor_to_model,
        sync.state_dict,
    ):
        with pytest.raises(RuntimeError, match="this OuterSync is closed") as caught:
            call()
        refused.append(type(caught.value))
    give_gradients(model, site, 9)
    inner.step()  # training goes on without hooks
    return {
        "threads": (before, within, after),
        "exchanging": exchanging,
        "python": [name for name in python if "fomoe" in name],
        "hooks": (hooks, len(HOOKS)),
        "numbers": (sync.round, sync.steps, sync.bytes_sent > 0, sync.under_way),
        "refused": refused,
    }


@pytest.mark.parametrize("options", [{}, OVERLAP], ids=["plain", "overlap"])
def test_after_close_threads_connections_and_hooks_are_gone(options: dict[str, Any]) -> None:
    for answer in pool().run(3, whole_life, options):
        before, within, after = answer["threads"]
        assert within > before + 10, "connections have threads of their own"
        assert after <= before
        assert answer["exchanging"] == (1 if options else 0)
        assert answer["python"] == []
        assert answer["hooks"][0] == answer["hooks"][1]
        assert answer["numbers"] == (2, 4, True, False)
        assert answer["refused"] == [MeetingError] * 6 + [RuntimeError]


def given_groups(site: int, num_sites: int) -> int:
    groups = SiteGroups(num_sites, site, 20)
    with made(site, num_sites, groups)[2] as first:
        first.step()
    second = made(site, num_sites, groups)[2]
    second.step()
    groups.close()
    groups.close()
    with pytest.raises(KeyError, match="no group of the sites"):
        groups.group(groups.everyone)
    return second.round


def test_connections_that_were_given_stay_open() -> None:
    assert pool().run(2, given_groups) == [1, 1]


def leave_by_error(site: int, num_sites: int) -> tuple[float, int, bool]:
    """Site 0 leaves by an error while a fragment is being exchanged, and no site answers."""
    model, inner, sync = made(site, num_sites, **OVERLAP)
    start, told = time.perf_counter(), ""
    if site == 0:
        with pytest.raises(ZeroDivisionError), sync:
            give_gradients(model, site, 0)
            inner.step()
            sync.after_step()
            assert sync.under_way
            raise ZeroDivisionError
        told = "left"
    seconds = time.perf_counter() - start
    torch.distributed.barrier()
    sync.close()
    return seconds, sync.round, bool(told)


def test_an_error_inside_starts_no_exchange_and_waits_for_nobody() -> None:
    (seconds, number, left), _ = pool().run(2, leave_by_error)
    assert left and number == 0
    assert seconds < 15, "less than the 20 s after which an exchange fails"


def lose(site: int, num_sites: int) -> int:
    model, inner, sync = made(site, num_sites, **OVERLAP)
    give_gradients(model, site, 0)
    inner.step()
    sync.after_step()
    with pytest.warns(UserWarning, match="finish was not called"):
        sync.close()
    return sync.round


def test_close_warns_of_what_is_lost() -> None:
    assert pool().run(2, lose) == [0, 0]


def test_the_loop_of_the_docstring_runs() -> None:
    """The docstring's loop as it is: it calls only `step`, and optimizer steps are counted."""
    text = inspect.getdoc(OuterSync) or ""
    begin = text.index("    with OuterSync")
    code = textwrap.dedent(text[begin : text.index("After `step`")])
    model = SmallModel(place(1), 0)
    names: dict[str, Any] = {
        "OuterSync": OuterSync,
        "OuterOptions": OuterOptions,
        "model": model,
        "placement": place(1),
        "site": 0,
        "optimizer": torch.optim.SGD(model.parameters(), lr=1e-3),
        "batches": [noise(("batch", step), 8, HIDDEN) for step in range(32)],
        "loss": lambda model, batch: model(batch).square().mean(),
    }
    exec(code, names)
    assert (names["sync"].round, names["sync"].steps) == (2, 32)
    assert names["sync"].log.closed
