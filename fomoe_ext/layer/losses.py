"""The losses that balance the load of a layer's experts, each a formula and all of them in one.

Logits here are fp32 [T, C], a column for each of the C experts that may be chosen. `router_loss`
is what a layer uses. Autograd would make a node and a few views for each of its steps, which costs
the host more than the arithmetic; so there the derivatives are written out, operation by operation
as autograd takes them: losses and gradients have the same bits as those of the formulas.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fomoe_ext.ops.schemas import traced

_aten: Any = torch.ops.aten
_log_softmax_backward = _aten._log_softmax_backward_data.default
_log_sigmoid = _aten.log_sigmoid_forward.default
_log_sigmoid_backward = _aten.log_sigmoid_backward.default


def log_scores(logits: Tensor, scoring: str) -> Tensor:
    """Logarithm of the scores (softmax or sigmoid) normalised to sum 1, fp32 [T, C]."""
    if scoring == "sigmoid":
        logits = torch.nn.functional.logsigmoid(logits)
    return logits.log_softmax(dim=-1)


def switch_loss(logits: Tensor, load: Tensor, scoring: str = "softmax") -> Tensor:
    """C * sum_e f_e * P_e, the auxiliary loss of Switch Transformers (arXiv 2101.03961).

    f_e is expert e's share of the slots (`load`, int64 [C], no gradient), P_e the mean over tokens
    of its normalised score (for sigmoid as in DeepSeek-V3, arXiv 2412.19437). Logits fp32 [T, C].
    The value is 1 if load and scores are even, and larger if both favour the same experts.
    """
    mean_score = log_scores(logits, scoring).exp().mean(dim=0)
    return (mean_score * _share(load)).sum() * logits.shape[1]


def _share(load: Tensor) -> Tensor:
    return load / load.sum().clamp_min(1)


def entropy_loss(logits: Tensor) -> Tensor:
    """Negative entropy (nats) of the mean over tokens of softmax(logits), logits fp32 [T, C].

    The regulariser of sigma-MoE (arXiv 2310.10837), with the mean taken in log space. The value is
    -log(C) if tokens are spread evenly over the experts, and 0 if all choose the same one.
    """
    # math.log of the size would make torch.compile specialise on one number of tokens.
    tokens = logits.new_full((), logits.shape[0])
    log_mean = logits.log_softmax(dim=-1).logsumexp(dim=0) - tokens.log()
    return (log_mean.exp() * log_mean).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906), logits fp32 [T, C]."""
    return logits.logsumexp(dim=-1).square().mean()


def wants_loss(balance: str, router_z_loss_coef: float) -> bool:
    """Whether a layer with these options has an auxiliary loss."""
    return balance in ("switch", "entropy") or router_z_loss_coef != 0.0


class LossOptions(NamedTuple):
    """Which losses, as `MoELayer` documents them; coef is `balance_coef`."""

    balance: str
    coef: float
    z_coef: float
    scoring: str


def by_formulas(logits: Tensor, load: Tensor, options: LossOptions) -> Tensor:
    """The sum of the losses, each times its coefficient, by the formulas above; at least one."""
    losses = []
    if options.balance == "switch":
        losses.append(options.coef * switch_loss(logits, load, options.scoring))
    elif options.balance == "entropy":
        losses.append(options.coef * entropy_loss(logits))
    if options.z_coef:
        losses.append(options.z_coef * z_loss(logits))
    return losses[0] if len(losses) == 1 else losses[0] + losses[1]


def router_loss(logits: Tensor, load: Tensor, options: LossOptions) -> Tensor:
    """`by_formulas` to the bit, in fewer operations. T >= 1."""
    if traced() or type(logits) is not Tensor:  # a subclass, e.g. a fake tensor, has its own ways
        return by_formulas(logits, load, options)
    return _RouterLoss.apply(logits, load, options)


@lru_cache(maxsize=256)
def _number(value: float) -> Tensor:
    """As fp32 on the CPU, which goes with tensors of any device. Of a number that is no tensor
    torch makes one at each use, and then another one of the right dtype."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=torch.float32, device="cpu")


class _RouterLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, load: Tensor, options: LossOptions) -> Tensor:
        ctx.options = options
        kept: list[Tensor] = [logits, load]
        losses = []
        if options.balance == "switch":
            given = logits
            if options.scoring == "sigmoid":
                given, buffer = _log_sigmoid(logits)
                kept.append(buffer)
            log_score = given.log_softmax(dim=-1)
            score, share = log_score.exp(), _share(load)
            loss = (score.mean(dim=0) * share).sum()
            losses.append(loss.mul_(_number(logits.shape[1])).mul_(_number(options.coef)))
            kept += log_score, score, share
        elif options.balance == "entropy":
            log_score = logits.log_softmax(dim=-1)
            tokens = logits.new_full((), logits.shape[0])
            log_sum = log_score.logsumexp(dim=0)
            log_mean = log_sum - tokens.log_()
            mean = log_mean.exp()
            losses.append((mean * log_mean).sum().mul_(_number(options.coef)))
            kept += log_score, log_sum, log_mean, mean
        if options.z_coef:
            log_sum = logits.logsumexp(dim=-1)
            losses.append(log_sum.square().mean().mul_(_number(options.z_coef)))
            kept.append(log_sum)
        ctx.save_for_backward(*kept)
        return losses[0] if len(losses) == 1 else losses[0].add_(losses[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        logits, load, *kept = ctx.saved_tensors
        options: LossOptions = ctx.options
        if torch.is_grad_enabled():  # create_graph: the formulas have derivatives of any order
            again = by_formulas(logits, load, options)
            (found,) = torch.autograd.grad(again, logits, grad, create_graph=True)
            return found, None, None
        of_z = (
            _z_grad(grad * _number(options.z_coef), logits, kept.pop()) if options.z_coef else None
        )
        if options.balance == "switch":
            found = _switch_grad(grad * _number(options.coef), logits, options.scoring, kept)
        elif options.balance == "entropy":
            found = _entropy_grad(grad * _number(options.coef), logits, *kept)
        else:
            return of_z, None, None
        return found if of_z is None else found.add_(of_z), None, None


def _switch_grad(grad: Tensor, logits: Tensor, scoring: str, kept: list[Tensor]) -> Tensor:
    *buffer, log_score, score, share = kept
    of_mean = (share * grad.mul_(_number(logits.shape[1]))).div_(_number(logits.shape[0]))
    found = _log_softmax_backward(score * of_mean, log_score, 1, torch.float32)
    return _log_sigmoid_backward(found, logits, *buffer) if scoring == "sigmoid" else found


def _entropy_grad(
    grad: Tensor, logits: Tensor, log_score: Tensor, log_sum: Tensor, log_mean: Tensor, mean: Tensor
) -> Tensor:
    of_log_mean = (log_mean * grad).mul_(mean).add_(mean * grad)
    of_score = (log_score - log_sum).exp_().mul_(of_log_mean)
    return _log_softmax_backward(of_score, log_score, 1, torch.float32)


def _z_grad(grad: Tensor, logits: Tensor, log_sum: Tensor) -> Tensor:
    of_sum = (log_sum + log_sum).mul_(grad.div_(_number(logits.shape[0])))
    return (logits - log_sum.unsqueeze(1)).exp_().mul_(of_sum.unsqueeze(1))
