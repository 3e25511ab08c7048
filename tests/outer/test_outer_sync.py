"""OuterSync equals training in one process; equal bits at all sites; values and bytes sent."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from outer_model import (
    EXPERTS,
    HIDDEN,
    LAYERS,
    SIZE,
    SmallModel,
    assert_same_bits,
    bits,
    contributors,
    cyclic_placement,
    give_gradients,
    mean,
    noise,
    pieces,
)
from sites import pool
from torch import Tensor, nn

from fomoe_ext.outer import OuterOptions, OuterSync, SiteGroups
from fomoe_ext.outer.optimizer import MOMENTS
from fomoe_ext.placement import Placement, wire

Pieces = dict[tuple[Any, ...], Tensor]
BUCKET_BYTES = 4 * 787  # several buckets, and none that ends with a piece


def place(num_sites: int, replication: int) -> Placement:
    return cyclic_placement(num_sites, replication)


# ----------------------------------------------------------------------------- equal to one process


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    labels = (batch[:, 0] > 0).long() + (batch[:, 1] > 0).long()
    return nn.functional.cross_entropy(model(batch), labels)


def batch_of(site: int, step: int) -> Tensor:
    return noise(("batch", site, step), 6, HIDDEN)


def make_inner(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.1)
    return torch.optim.AdamW(model.parameters(), lr=0.02, betas=(0.9, 0.95))


def train_on_sites(
    site: int, num_sites: int, optimizer: str, inner_kind: str, steps: int, clip: float
) -> list[Pieces]:
    placement = place(num_sites, num_sites)
    model = SmallModel(placement, site)
    inner = make_inner(model, inner_kind)
    sync = OuterSync(
        model, placement, site, OuterOptions(optimizer=optimizer), inner_optimizer=inner
    )
    result = []
    for step in range(steps):
        inner.zero_grad()
        loss(model, batch_of(site, step)).backward()
        if optimizer == "ddp":
            sync.reduce_gradients()
        if clip:
            sync.clip_grad_norm_(clip)
        inner.step()
        sync.step()
        result.append(pieces(model))
    return result


def train_joined(num_sites: int, inner_kind: str, steps: int, clip: float) -> list[Pieces]:
    model = SmallModel(place(1, 1), 0)
    inner = make_inner(model, inner_kind)
    result = []
    for step in range(steps):
        inner.zero_grad()
        batches = [batch_of(site, step) for site in range(num_sites)]
        loss(model, torch.cat(batches)).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        inner.step()
        result.append(pieces(model))
    return result


@pytest.mark.parametrize(
    ("optimizer", "inner_kind", "clip"),
    [("fedavg", "sgd", 0.0), ("ddp", "sgd", 0.0), ("ddp", "adamw", 0.1)],
)
@pytest.mark.parametrize("num_sites", [2, 3, 4])
def test_sites_equal_one_process_on_the_joined_batch(
    num_sites: int, optimizer: str, inner_kind: str, clip: float
) -> None:
    """With replication = sites and one local step, to the rounding of fp32 sums."""
    steps = 3
    answers = pool().run(num_sites, train_on_sites, optimizer, inner_kind, steps, clip)
    joined = train_joined(num_sites, inner_kind, steps, clip)
    start = pieces(SmallModel(place(1, 1), 0))
    # AdamW divides by the square root of squared gradients: small gradients amplify rounding.
    room = 2e-6 if inner_kind == "sgd" else 2e-4
    for step in range(steps):
        for key, wanted in joined[step].items():
            got = answers[0][step][key]
            assert torch.allclose(got, wanted, rtol=1e-5, atol=room), (step, key)
    moved = sum(not torch.allclose(joined[-1][k], start[k], atol=10 * room) for k in start)
    assert moved > 0.8 * len(start)  # else the comparison would prove nothing


# ----------------------------------------------------------------------- an outer step by reference


def nesterov_round(site: int, num_sites: int, rounds: int) -> tuple[Pieces, list[Pieces], Pieces]:
    placement = place(num_sites, 2)
    model = SmallModel(placement, site)
    start = pieces(model)
    sync = OuterSync(
        model,
        placement,
        site,
        OuterOptions(outer_lr=0.7, outer_momentum=0.9, bucket_bytes=BUCKET_BYTES),
    )
    locals_ = []
    for step in range(rounds):
        give_gradients(model, site, step)
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        locals_.append(pieces(model))
        sync.step()
    return start, locals_, pieces(model)


def reference_nesterov(
    key: Any, answers: list[Any], placement: Placement, lr: float = 0.7, momentum: float = 0.9
) -> Tensor:
    """DiLoCo's outer step, one tensor, all sites at once, in fp32."""
    sites = contributors(key, placement)
    anchor = answers[sites[0]][0][key].clone()
    velocity = torch.zeros_like(anchor)
    for step in range(len(answers[0][1])):
        delta = torch.zeros_like(anchor)
        for site in sites:
            delta = delta + (anchor - answers[site][1][step][key])
        delta = delta / len(sites)
        velocity = momentum * velocity + delta
        anchor = anchor - lr * (delta + momentum * velocity)
    return anchor


@pytest.mark.parametrize("num_sites", [2, 3, 4])
def test_nesterov_equals_the_reference_bit_for_bit(num_sites: int) -> None:
    answers = pool().run(num_sites, nesterov_round, 3)
    placement = place(num_sites, 2)
    for site in range(num_sites):
        for key, got in answers[site][2].items():
            assert bits(got) == bits(reference_nesterov(key, answers, placement)), (site, key)


def test_the_reference_is_torchs_nesterov() -> None:
    anchor = nn.Parameter(noise("anchor", 5))
    locals_ = [{"x": noise(("local", step), 5)} for step in range(3)]
    answers = [({"x": anchor.detach().clone()}, locals_, None)]
    sgd = torch.optim.SGD([anchor], lr=0.7, momentum=0.9, nesterov=True)

    class Alone:
        num_sites = 1

        @staticmethod
        def owners(layer: Any, expert: Any) -> tuple[int]:
            return (0,)

    for local in locals_:
        anchor.grad = anchor.detach() - local["x"]
        sgd.step()
    key = ("dense", "x")
    renamed = [({key: a["x"]}, [{key: y["x"]} for y in b], c) for a, b, c in answers]
    assert torch.allclose(reference_nesterov(key, renamed, Alone), anchor, atol=1e-6)  # type: ignore[arg-type]


# ------------------------------------------------------------------ equal bits, right values, bytes


class Case(NamedTuple):
    """One way to train."""

    optimizer: str
    codec: str
    router_mean: str = "holders"
    moment_periods: tuple[int, int] = (1, 1)


CASES = (
    Case("diloco", "fp32"),
    Case("diloco", "bf16"),
    Case("fedavg", "bf16", router_mean="all"),
    Case("local-adamw", "fp32", moment_periods=(1, 2)),
    Case("local-adamw", "bf16"),
    Case("ddp", "fp32"),
    Case("ddp", "bf16"),
)
ROUNDS = 2


class Round(NamedTuple):
    """What one site saw in one round; a moment's pieces before and after the meeting."""

    before: Pieces
    local: Pieces
    after: Pieces
    moments: dict[str, tuple[Pieces, Pieces]]
    gradients: tuple[Pieces, Pieces]
    counted: int
    predicted: int


def train_all_cases(
    site: int, num_sites: int, replication: int, scope: str
) -> list[tuple[list[Round], dict[Any, str]]]:
    placement = place(num_sites, replication)
    groups = SiteGroups(num_sites, site, timeout_s=20)
    return [train_case(site, placement, scope, case, groups) for case in CASES]


def train_case(
    site: int, placement: Placement, scope: str, case: Case, groups: SiteGroups
) -> tuple[list[Round], dict[Any, str]]:
    model = SmallModel(placement, site, scope, expert_bias=True)
    inner = torch.optim.AdamW(model.parameters(), lr=0.05)
    sync = OuterSync(
        model,
        placement,
        site,
        OuterOptions(
            optimizer=case.optimizer,
            outer_lr=0.7 if case.optimizer == "diloco" else None,
            outer_momentum=0.9 if case.optimizer == "diloco" else None,
            codec=case.codec,
            router_mean=case.router_mean,
            moment_periods=case.moment_periods,
            bucket_bytes=BUCKET_BYTES,
        ),
        inner_optimizer=inner,
        groups=groups,
    )
    ddp = case.optimizer == "ddp"
    rounds = []
    for index in range(ROUNDS):
        before = pieces(model)
        predicted = sync.predicted_bytes(local_steps=2, clip=ddp)
        for step in range(2):
            give_gradients(model, site, 10 * index + step)
            raw = pieces(model, lambda p: p.grad)
            if ddp:
                sync.reduce_gradients()
            reduced = pieces(model, lambda p: p.grad)
            if ddp:
                sync.clip_grad_norm_(0.5)
            inner.step()
        states = {m: pieces(model, lambda p, m=m: inner.state[p][m]) for m in MOMENTS}
        local = pieces(model)
        report = sync.step()
        assert report.round == index + 1 and report.seconds > 0
        moments = {m: (states[m], pieces(model, lambda p, m=m: inner.state[p][m])) for m in MOMENTS}
        after = pieces(model)
        rounds.append(
            Round(before, local, after, moments, (raw, reduced), report.bytes_sent, predicted)
        )
        sync.verify()
    assert sync.bytes_sent == sum(r.counted for r in rounds)
    return rounds, sync.hashes()


def check_values(case: Case, rounds: list[list[Round]], placement: Placement, scope: str) -> None:
    """Every piece of every site is the mean over the right sites, in fp64."""
    rounding = {"fp32": 2**-21, "bf16": 2**-7}[case.codec]
    everything = {key for site in rounds for key in site[0].after}
    velocity = dict.fromkeys(everything, 0.0)
    for index in range(ROUNDS):
        local = [site[index].local for site in rounds]
        for key in everything:
            mean_of = case.router_mean if scope == "global" else "holders"
            sites = contributors(key, placement, mean_of)
            holders = [s for s in range(len(rounds)) if key in rounds[s][index].after]
            if key[0] == "router" and scope == "resident":
                holders = list(sites)
            if case.optimizer == "ddp":
                values, wanted = [site[index].gradients[0] for site in rounds], None
                got = [rounds[s][index].gradients[1][key] for s in holders]
                wanted = mean(values, key, sites)
                size = max(v[key].abs().max() for v in values if key in v)
            else:
                anchor = rounds[sites[0]][index].before[key].double()
                delta = anchor - mean(local, key, sites)
                size = max((anchor - local[s][key].double()).abs().max() for s in sites)
                got = [rounds[s][index].after[key] for s in holders]
                wanted = anchor - delta
                if case.optimizer == "diloco":
                    velocity[key] = 0.9 * velocity[key] + delta
                    wanted = anchor - 0.7 * (delta + 0.9 * velocity[key])
                    size = size * (index + 2)
            room = rounding * float(size) + 2**-21 * float(wanted.abs().max())
            for value in got:
                assert float((value.double() - wanted).abs().max()) <= room, (case, index, key)


def check_moments(case: Case, rounds: list[list[Round]], placement: Placement, scope: str) -> None:
    """Moments are averaged like parameters in the rounds they are due, else left alone."""
    for index in range(ROUNDS):
        for moment, period in zip(MOMENTS, case.moment_periods, strict=True):
            local = [site[index].moments[moment][0] for site in rounds]
            due = case.optimizer == "local-adamw" and (index + 1) % period == 0
            for site, mine in enumerate(rounds):
                for key, got in mine[index].moments[moment][1].items():
                    sites = contributors(key, placement)
                    bystander = key[0] == "router" and scope == "resident" and site not in sites
                    if not due or bystander:
                        assert bits(got) == bits(local[site][key]), (case, index, moment, key)
                        continue
                    wanted = mean(local, key, sites)
                    room = {"fp32": 2**-21, "bf16": 2**-7}[case.codec]
                    error = (got.double() - wanted).abs().max()
                    assert error <= room * max(local[s][key].abs().max() for s in sites)


WORLDS = [
    (sites, replication, scope)
    for sites in (2, 3, 4)
    for replication in range(1, sites + 1)
    for scope in ("global", "resident")
]


@pytest.mark.parametrize(("num_sites", "replication", "scope"), [(1, 1, "global"), *WORLDS])
def test_same_bits_right_values_and_counted_bytes(
    num_sites: int, replication: int, scope: str
) -> None:
    answers = pool().run(num_sites, train_all_cases, replication, scope)
    placement = place(num_sites, replication)
    model = SmallModel(placement, 0, scope, expert_bias=True)
    experts = model.layers[0].experts
    sizes = wire.Sizes(
        outside=model.first.numel() + 1,
        block=0,
        expert=sum(part[0].numel() for part in experts.parameters()),
        router_row=HIDDEN,
    )
    for index, case in enumerate(CASES):
        rounds = [site[index][0] for site in answers]
        hashes = [site[index][1] for site in answers]
        for name in {name for site in hashes for name in site}:
            owners = [int(site) for site in name.removeprefix("0:").split("-")]
            assert len({hashes[site][name] for site in owners}) == 1
        for round_index in range(ROUNDS):
            after = [site[round_index].after for site in rounds]
            compared = assert_same_bits(after, placement, scope)
            assert compared >= (2 if num_sites > 1 else 0)
            changed = sum(
                bits(after[0][k]) != bits(rounds[0][round_index].before[k]) for k in after[0]
            )
            assert changed > 0.5 * len(after[0])
            for site in range(num_sites):
                counted = rounds[site][round_index].counted
                assert counted == rounds[site][round_index].predicted
                elements = wire.group_elements(placement, site, sizes, router_scope=scope)
                assert counted == wire.round_bytes(
                    elements,
                    num_sites,
                    optimizer=case.optimizer,
                    codec=case.codec,
                    bucket_bytes=BUCKET_BYTES,
                    local_steps=2,
                    clip=case.optimizer == "ddp",
                    round_index=round_index + 1,
                    moment_periods=case.moment_periods,
                    moment_codecs=("fp32", "fp32") if case.codec == "fp32" else ("bf16", "bf16"),
                )
        check_values(case, rounds, placement, scope)
        check_moments(case, rounds, placement, scope)


def test_bytes_by_hand() -> None:
    """One bucket per group: dense 22 over 4 sites, and 6 owner sets of 2 of the 4."""
    sizes = wire.Sizes(outside=12, block=10, expert=105, router_row=7)
    placement = Placement.from_table([[[0, 1], [2, 3]]], 4)
    elements = wire.group_elements(placement, 0, sizes)
    assert [e.parameters for e in elements] == [{(0, 1, 2, 3): 22 + 2 * 7, (0, 1): 105}]
    sent = wire.round_bytes(elements, 4, optimizer="fedavg", codec="bf16")
    # Behind every payload, and at the end for each group, 8 bytes of hash.
    dense, expert, hashes = 2 * 3 * (9 * 2 + 8), 2 * 1 * (53 * 2 + 8), 3 * 8 + 1 * 8
    assert sent == dense + expert + 3 * 128 + hashes
    sent = wire.round_bytes(elements, 4, optimizer="ddp", codec="fp32", local_steps=5, clip=True)
    step = 2 * 3 * (9 * 4 + 8) + 2 * 1 * (53 * 4 + 8) + 3 * (128 + 8)
    assert sent == 5 * step + 3 * 128 + 3 * (9 * 4 + 8) + 1 * (53 * 4 + 8) + hashes
    # int8: a byte per value and two per block of 64.
    sent = wire.round_bytes(elements, 4, optimizer="fedavg", codec="int8")
    assert sent == 2 * 3 * (9 + 2 + 8) + 2 * 1 * (53 + 2 + 8) + 3 * 128 + hashes
    elements = wire.group_elements(placement, 0, sizes, router_scope="resident")
    assert elements[0].parameters == {(0, 1, 2, 3): 22, (0, 1): 105 + 7}


# ------------------------------------------------------------------------------------------- memory


def memory_of(site: int, num_sites: int, replication: int) -> dict[str, int]:
    """Bytes that the site has allocated for experts and their optimizer state."""
    placement = place(num_sites, replication)
    model = SmallModel(placement, site)
    inner = torch.optim.AdamW(model.parameters())
    sync = OuterSync(model, placement, site, inner_optimizer=inner)
    give_gradients(model, site, 0)
    inner.step()
    sync.step()
    experts = [p for layer in model.layers for p in layer.experts.parameters()]
    moments = [inner.state[p][m] for p in experts for m in MOMENTS]
    anchor, momentum, feedback = sync.state_bytes()
    assert feedback == 0  # fp32 loses nothing
    other = 4 * sum(p.numel() for p in model.parameters() if not any(p is q for q in experts))
    return {
        "weights": sum(p.untyped_storage().nbytes() for p in experts),
        "moments": sum(m.untyped_storage().nbytes() for m in moments),
        "anchor": anchor - other,
        "momentum": momentum - other,
    }


def test_memory_falls_with_replication() -> None:
    whole = LAYERS * EXPERTS * (2 * SIZE * HIDDEN + HIDDEN * SIZE) * 4
    for replication in (1, 2, 4):
        for got in pool().run(4, memory_of, replication):
            held = whole * replication // 4
            assert got == {
                "weights": held,
                "moments": 2 * held,
                "anchor": held,
                "momentum": held,
            }
