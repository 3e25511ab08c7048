"""route against its definition in float64: choices, weights, gradients, bits, errors."""

from __future__ import annotations

import pytest
import reference
import torch

from fomoe_ext import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCORINGS = ["sigmoid", "softmax"]


def make_logits(tokens, experts, dtype, seed=0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(tokens, experts, generator=generator)).to(dtype)


def check_choice(experts, scores, bias, allowed, num_groups, groups_kept, top_k):
    """The kernel chooses the experts of the definition. Where they differ, the choice scores must
    be equal up to fp32 rounding.
    """
    choice = scores if bias is None else scores + bias.double()
    wanted = reference.choose(choice, top_k, allowed, num_groups, groups_kept)
    assert torch.equal(experts < 0, wanted < 0)
    differ = (experts != wanted).nonzero()
    for t, k in differ.tolist():
        got, want = choice[t, experts[t, k]], choice[t, wanted[t, k]]
        assert abs(got - want) < 1e-6, (t, k, got, want)
    assert len(differ) <= 0.001 * experts.numel() + 1
    for row in experts.tolist():
        chosen = [e for e in row if e >= 0]
        assert len(set(chosen)) == len(chosen)


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "tokens, experts, top_k, num_groups, groups_kept",
    [
        (1, 1, 1, 1, 1),
        (7, 2, 2, 1, 1),
        (33, 5, 2, 1, 1),
        (64, 17, 4, 1, 1),
        (50, 64, 8, 1, 1),
        (20, 100, 100, 1, 1),
        (40, 24, 4, 6, 2),
        (31, 64, 6, 8, 3),
        (16, 8, 3, 8, 3),  # groups of one expert
        (0, 16, 4, 1, 1),
    ],
)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
def test_matches_definition(
    scoring, dtype, tokens, experts, top_k, num_groups, groups_kept, biased, renormalize
):
    logits = make_logits(tokens, experts, dtype, seed=tokens + experts)
    bias = None
    if biased:
        bias = torch.randn(experts, generator=torch.Generator().manual_seed(1)) * 0.3
    weights, chosen = ops.route(
        logits,
        top_k,
        scoring=scoring,
        selection_bias=bias,
        num_groups=num_groups,
        groups_kept=groups_kept,
        renormalize=renormalize,
        scale=1.7,
    )
    assert weights.shape == chosen.shape == (tokens, top_k)
    assert weights.dtype == torch.float32 and chosen.dtype == torch.int32
    scores = reference.scores_of(logits.double(), scoring, None)
    check_choice(chosen, scores, bias, None, num_groups, groups_kept, top_k)
    wanted = reference.route_weights(
        logits.double(), chosen, scoring=scoring, renormalize=renormalize, scale=1.7
    )
    torch.testing.assert_close(weights.double(), wanted, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("num_allowed", [0, 1, 3, 9, 16])
@pytest.mark.parametrize("num_groups", [1, 4])
def test_allowed(scoring, num_allowed, num_groups):
    """Only allowed experts are chosen; too few leave slots empty; softmax is over the allowed."""
    logits = make_logits(40, 16, torch.float32, seed=3)
    allowed = torch.zeros(16, dtype=torch.bool)
    allowed[torch.randperm(16, generator=torch.Generator().manual_seed(4))[:num_allowed]] = True
    weights, chosen = ops.route(
        logits, 4, scoring=scoring, allowed=allowed, num_groups=num_groups, groups_kept=num_groups
    )
    assert ((chosen >= 0).sum(1) == min(4, num_allowed)).all()
    assert (weights[chosen < 0] == 0).all()
    if num_allowed == 0:
        return
    assert allowed[chosen[chosen >= 0].long()].all()
    scores = reference.scores_of(logits.double(), scoring, allowed)
    check_choice(chosen, scores, None, allowed, num_groups, num_groups, 4)
    wanted = reference.route_weights(logits.double(), chosen, scoring=scoring, allowed=allowed)
    torch.testing.assert_close(weights.double(), wanted, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("experts, top_k", [(5, 5), (40, 7), (64, 64)])
def test_ties_go_to_the_lower_index(scoring, experts, top_k):
    """Few distinct values, many ties."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randint(0, 3, (50, experts), generator=generator).float()
    _, chosen = ops.route(logits, top_k, scoring=scoring)
    order = torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :top_k]
    assert torch.equal(chosen.long(), order)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_large_logits(scoring):
    """Neither overflow nor a loss of the order among ordinary values."""
    logits = torch.tensor([[-1e30, 80.0, -80.0, 3.0], [1e4, -1e4, 0.0, 1.0]])
    weights, chosen = ops.route(logits, 4, scoring=scoring)
    assert torch.isfinite(weights).all() and (weights >= 0).all()
    assert chosen[0].tolist()[:2] == [1, 3] and chosen[1].tolist()[0] == 0
    minus_infinity = torch.tensor([[-torch.inf, 1.0, 0.0]])
    assert ops.route(minus_infinity, 2, scoring=scoring)[1].tolist() == [[1, 2]]


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("restricted", [False, True])
def test_gradient(scoring, dtype, renormalize, restricted):
    logits = make_logits(37, 21, dtype, seed=6).requires_grad_()
    allowed = None
    if restricted:
        allowed = torch.rand(21, generator=torch.Generator().manual_seed(7)) < 0.3
        assert 0 < allowed.sum() < 8
    weights, chosen = ops.route(
        logits, 8, scoring=scoring, allowed=allowed, renormalize=renormalize, scale=0.6
    )
    grad = torch.randn(37, 8, generator=torch.Generator().manual_seed(8))
    weights.backward(grad)

    exact = logits.detach().double().requires_grad_()
    wanted = reference.route_weights(
        exact, chosen, scoring=scoring, allowed=allowed, renormalize=renormalize, scale=0.6
    )
    wanted.backward(grad.double())
    rtol, atol = {
        torch.float32: (1e-5, 1e-6),
        torch.bfloat16: (2**-8, 1e-6),
        torch.float16: (2**-10, 1e-6),
    }[dtype]
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=rtol, atol=atol)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_reference_gradient(scoring):
    """The reference that the gradient is compared with, against finite differences."""
    logits = make_logits(5, 6, torch.float64, seed=9).requires_grad_()
    experts = torch.tensor([[0, 3, 5], [1, 2, 4], [5, 4, -1], [2, 0, 1], [3, -1, -1]])
    run = lambda x: reference.route_weights(x, experts, scoring=scoring, renormalize=True)
    assert torch.autograd.gradcheck(run, logits)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_saturated_sigmoid_has_a_gradient(scoring):
    """1 - s is not computed as a difference: s rounds to 1 in fp32 long before its slope is 0."""
    logits = torch.tensor([[25.0, -30.0, 0.0]]).requires_grad_()
    weights, chosen = ops.route(logits, 3, scoring=scoring)
    weights.backward(torch.tensor([[1.0, 2.0, 3.0]]))
    exact = logits.detach().double().requires_grad_()
    reference.route_weights(exact, chosen, scoring=scoring).backward(
        torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    )
    if scoring == "sigmoid":
        torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=0)
    else:
        torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_same_bits_for_any_number_of_threads(scoring):
    logits = make_logits(3001, 48, torch.bfloat16, seed=10)
    grad = torch.randn(3001, 6, generator=torch.Generator().manual_seed(11))
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaf = logits.clone().requires_grad_()
            weights, chosen = ops.route(leaf, 6, scoring=scoring, renormalize=True)
            weights.backward(grad)
            results.append((weights.detach(), chosen, leaf.grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(scoring, dtype):
    logits = make_logits(9, 12, dtype, seed=12).requires_grad_()
    bias = torch.linspace(-0.1, 0.1, 12)
    allowed = torch.arange(12) != 3
    number = ops.SCORINGS[scoring]
    torch.library.opcheck(
        torch.ops.fomoe.route, (logits, 3, number, bias, allowed, 4, 2, True, 1.5, True)
    )
    torch.library.opcheck(
        torch.ops.fomoe.route, (logits, 3, number, None, None, 1, 1, False, 1.0, False)
    )
    _, chosen = ops.route(logits.detach(), 3, scoring=scoring)
    torch.library.opcheck(
        torch.ops.fomoe.route_backward,
        (torch.randn(9, 3), logits.detach(), chosen, None, number, True, 1.5),
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logits": torch.zeros(4)}, r"logits must have shape \[\*, \*\], got \[4\]"),
        (
            {"logits": torch.zeros(2, 8, dtype=torch.float64)},
            "logits must have dtype .*, got float64",
        ),
        ({"logits": torch.zeros(2, 8, dtype=torch.int32)}, "logits must have dtype .*, got int32"),
        ({"logits": torch.zeros(2, 0)}, "logits.shape\\[1\\] \\(experts\\) must be in 1"),
        ({"logits": torch.full((2, 8), torch.nan)}, "logits must be finite, got NaN"),
        (
            {"logits": torch.full((2, 8), torch.inf), "scoring": "softmax"},
            "logits must be finite, got NaN",
        ),
        ({"top_k": 0}, r"top_k must be in 1 .. 8.*, got 0"),
        ({"top_k": 9}, r"top_k must be in 1 .. 8.*, got 9"),
        ({"top_k": 5, "num_groups": 2}, "top_k must be at most 4.*, got 5"),
        ({"scoring": "relu"}, "scoring must be one of softmax, sigmoid, got 'relu'"),
        ({"selection_bias": torch.zeros(7)}, r"selection_bias must have shape \[8\], got \[7\]"),
        (
            {"selection_bias": torch.zeros(8).bfloat16()},
            "selection_bias must have dtype .*, got bfloat16",
        ),
        (
            {"selection_bias": torch.full((8,), torch.nan)},
            "selection_bias must be finite, got nan at expert 0",
        ),
        ({"allowed": torch.ones(9, dtype=torch.bool)}, r"allowed must have shape \[8\], got \[9\]"),
        ({"allowed": torch.ones(8)}, "allowed must have dtype bool or uint8.*, got float32"),
        ({"num_groups": 3}, "num_groups must be a divisor of the 8.*, got 3"),
        ({"num_groups": 0}, "num_groups must .*, got 0"),
        ({"num_groups": 2, "groups_kept": 3}, "groups_kept must be in 1 .. 2.*, got 3"),
        ({"scale": float("nan")}, "scale must .*, got nan"),
    ],
)
def test_bad_input(change, message):
    arguments = {"logits": torch.zeros(2, 8), "top_k": 2, **change}
    with pytest.raises(ValueError, match=message):
        ops.route(**arguments)


def test_logits_that_are_no_tensor() -> None:
    with pytest.raises(TypeError, match="logits must be a Tensor, got list"):
        ops.route([[1.0, 2.0]], top_k=1)


def test_one_nan_anywhere_is_found():
    for position in (0, 7, 8, 18, 3 * 19 - 1):
        logits = torch.zeros(3, 19)
        logits.view(-1)[position] = torch.nan
        for scoring in SCORINGS:
            with pytest.raises(ValueError, match="logits must be finite, got NaN"):
                ops.route(logits, 2, scoring=scoring)


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_statistics(scoring, restricted, biased):
    """Load, score sums and entropy against fp64; asking for them changes nothing else."""
    logits = make_logits(300, 20, torch.float32, seed=13)
    allowed = torch.arange(20) % 3 != 0 if restricted else None
    bias = torch.linspace(-0.2, 0.2, 20) if biased else None
    options = {"scoring": scoring, "allowed": allowed, "selection_bias": bias}
    weights, experts, statistics = ops.route(logits, 3, return_statistics=True, **options)
    plain = ops.route(logits, 3, **options)
    assert torch.equal(weights, plain[0]) and torch.equal(experts, plain[1])

    scores = reference.scores_of(logits.double(), scoring, allowed)
    if allowed is not None:
        scores = scores * allowed
    assert torch.equal(statistics.load, torch.bincount(experts.flatten().long(), minlength=20))
    assert statistics.load.dtype == torch.int64
    # Each score is rounded to 2^-24.
    torch.testing.assert_close(statistics.score_sum, scores.sum(0), rtol=0, atol=300 * 2.0**-23)
    share = scores / scores.sum(1, keepdim=True)
    entropy = -torch.special.xlogy(share, share).sum()
    torch.testing.assert_close(statistics.entropy_sum, entropy, rtol=1e-6, atol=0)


def test_statistics_of_extreme_logits():
    """A certain choice has zero entropy; tiny scores neither overflow nor become NaN."""
    logits = torch.tensor([[100.0, -100.0, -torch.inf, -3e38]])
    for scoring in SCORINGS:
        _, _, statistics = ops.route(logits, 2, scoring=scoring, return_statistics=True)
        assert statistics.entropy_sum == pytest.approx(0.0, abs=1e-6)
        assert statistics.score_sum.tolist() == [1.0, 0.0, 0.0, 0.0]
    none = torch.zeros(4, dtype=torch.bool)
    _, _, statistics = ops.route(logits, 2, allowed=none, return_statistics=True)
    assert statistics.load.sum() == 0 and statistics.entropy_sum == 0


@pytest.mark.parametrize("scoring", SCORINGS)
def test_scores_that_round_to_the_same_number_do_not_tie(scoring):
    """sigmoid(20) and sigmoid(30) are both 1 in fp32; without a bias the larger logit wins."""
    logits = torch.tensor([[20.0, 30.0, -200.0, -150.0]])
    assert ops.route(logits, 4, scoring=scoring)[1].tolist() == [[1, 0, 3, 2]]
