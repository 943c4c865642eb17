"""This module is `rlloss.kernels.entropy_temperature` in plain torch."""

import math

import torch
from torch import Tensor

from rlloss.torch_kernels import rows as of_logits
from rlloss.torch_kernels.token_stats_forward import token_stats_forward


def temperature_of(
    rule: str, constants: tuple[float, float, float], least: float, entropy: Tensor, candidates: Tensor | None
) -> Tensor:
    """Return the temperature of each row, shaped like entropy. candidates counts logits above -inf, for "dynatemp"."""
    a, b, c = constants
    if rule == "two_level":
        chosen = torch.where(entropy > c, torch.full_like(entropy, a), b)
        found = torch.where(entropy.isnan(), entropy, chosen)
    elif rule == "edt":
        # If rounding made an entropy negative, its temperature would have no bound.
        found = torch.where(entropy <= 0, 0.0, a * torch.exp2(b / entropy)).clamp(min=c)
    else:
        assert candidates is not None
        n = candidates.to(entropy.dtype)
        # entropy - entropy is 0, or NaN for a NaN.
        share = torch.where(n > 1, entropy / n.clamp(min=2).log(), entropy - entropy).clamp(0.0, 1.0)
        found = a + b * share**c
    return torch.where(found < least, 0.0, found)


def entropy_temperature(
    logits: Tensor,
    mask: Tensor | None,
    out: Tensor | None,
    rule: str,
    constants: tuple[float, float, float],
    least: float,
) -> tuple[Tensor, Tensor]:
    """See `rlloss.kernels.entropy_temperature.entropy_temperature`."""
    N, V = logits.shape
    target = torch.zeros(N, dtype=torch.int64, device=logits.device)
    entropy = token_stats_forward(logits, target, mask, (1.0, None, 1.0))[1]
    candidates = torch.ones_like(target)
    step = max(1, of_logits.TILE_ENTRIES // V)
    if mask is None:
        parts = [slice(start, start + step) for start in range(0, N, step)]
    else:
        parts = mask.nonzero().squeeze(-1).split(step)
    if rule == "dynatemp":
        for rows in parts:
            candidates[rows] = (logits[rows] > -math.inf).sum(-1)
    temperature = temperature_of(rule, constants, least, entropy, candidates)
    if mask is not None:
        temperature = torch.where(mask, temperature, 1.0)
    if out is None:
        return temperature, entropy
    greedy = temperature == 0
    inverse = torch.where(greedy, 1.0, temperature).reciprocal()
    for rows in parts:
        tile = logits[rows].to(entropy.dtype)
        scaled = tile * inverse[rows].unsqueeze(-1)
        if greedy[rows].any():
            dropped = greedy[rows].unsqueeze(-1) & (tile < tile.amax(-1, keepdim=True))
            scaled = torch.where(dropped, -math.inf, scaled)
        out[rows] = scaled.to(out.dtype)
    return temperature, entropy
