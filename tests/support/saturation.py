"""Rows whose target leads all other entries by a margin, and their exact statistics and gradient."""

from typing import NamedTuple

import torch
from torch import Tensor

MARGINS = (10.0, 12.0, 17.0, 20.0, 30.0, 40.0, 60.0)  # in nats
# The exponent of an entry at 60 nats is 87 in log2 units and rounded twice: 2 * 87 ln 2 * 6e-8 = 7e-6.
CLOSE = 1e-5


class Saturated(NamedTuple):
    """logits [7, V], with every value exact in bf16, and target [7], one row a margin."""

    logits: Tensor
    target: Tensor


class Exact(NamedTuple):
    """In fp64: logp, entropy [7]; the gradients of the sum of logp and of the sum of entropy [7, V]."""

    logp: Tensor
    entropy: Tensor
    grad: Tensor
    entropy_grad: Tensor


def saturated(V: int, seed: int = 0) -> Saturated:
    g = torch.Generator().manual_seed(seed)
    logits = -torch.randint(0, 17, (len(MARGINS), V), generator=g) / 4.0
    target = torch.randint(0, V, (len(MARGINS),), generator=g)
    nearest = (target + 1 + torch.randint(0, V - 1, target.shape, generator=g)) % V
    logits[torch.arange(len(target)), nearest] = 0.0
    logits[torch.arange(len(target)), target] = torch.tensor(MARGINS)
    return Saturated(logits, target)


def exact(logits: Tensor, target: Tensor) -> Exact:
    """Sums over the others alone, so that nothing is lost beside the target's 1."""
    logits, place = logits.double(), target.unsqueeze(-1)
    lead = logits.gather(-1, place) - logits
    ratio = torch.exp(-lead).scatter(-1, place, 0.0)  # p_v / p_target
    rest, spread = ratio.sum(-1, keepdim=True), (ratio * lead).sum(-1, keepdim=True)
    p = ratio / (1 + rest)
    entropy = torch.log1p(rest) + spread / (1 + rest)
    log_p = -lead - torch.log1p(rest)
    grad = (-p).scatter(-1, place, rest / (1 + rest))
    of_target = -(spread / (1 + rest)) / (1 + rest)  # log p + entropy of the target
    entropy_grad = (-p * (log_p + entropy)).scatter(-1, place, of_target)
    return Exact(-torch.log1p(rest).squeeze(-1), entropy.squeeze(-1), grad, entropy_grad)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).abs() / expected.abs()).max().item()
