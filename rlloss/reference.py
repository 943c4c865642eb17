"""This module writes each formula as on paper, and the tests compare all other code with it.

It is slow and never tuned. Run it in fp64. Autograd computes its gradients.
"""

import math

import torch
from torch import Tensor


def token_stats(
    logits: Tensor, target: Tensor, temperature: float | Tensor = 1.0, softcap: float | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (log-probability of the target, entropy in nats, log-sum-exp), each [...], of logits [..., V]."""
    z = logits * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * torch.where(p > 0, log_p, 0.0)).sum(-1)
    logp = log_p.gather(-1, target[..., None]).squeeze(-1)
    return logp, entropy, z.logsumexp(-1)


def kl(logp: Tensor, ref_logp: Tensor, estimator: str = "k3", bound: float = math.inf) -> Tensor:
    """Estimators of KL(policy || reference) at the sampled token, http://joschu.net/blog/kl-approx.html."""
    d = (ref_logp - logp).clamp(-bound, bound)
    return {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - d - 1}[estimator]


def ratio(logp: Tensor, old_logp: Tensor, mask: Tensor, level: str = "token") -> Tensor:
    """Return pi / pi_old per token [B, T], or its geometric mean per sequence [B, 1] (GSPO, 2507.18071 Eq. 7)."""
    log_ratio = logp - old_logp
    if level == "sequence":
        log_ratio = torch.where(mask, log_ratio, 0.0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return log_ratio.exp()


def sampler_ratio(old_logp: Tensor, sampler_logp: Tensor, mask: Tensor, mode: str, low: float, high: float) -> Tensor:
    """Return pi_old / pi_sampler per token [B, T] or per sequence [B, 1].

    "truncate" clamps a ratio outside [low, high]; "mask" sets it to 0. Where both probabilities are 0 the ratio is 1,
    and "mask" sets that to 0 too.
    """
    same = old_logp == sampler_logp  # also where both are -inf
    log_ratio = torch.where(mask & ~same, old_logp - sampler_logp, 0.0)
    impossible = mask & same & (old_logp == -math.inf)
    if mode.startswith("sequence"):
        log_ratio, impossible = log_ratio.sum(-1, keepdim=True), impossible.any(-1, keepdim=True)
    ratio = log_ratio.exp()
    if mode.endswith("truncate"):
        return ratio.clamp(low, high)
    return torch.where((low <= ratio) & (ratio <= high) & ~impossible, ratio, 0.0)


def clip_surrogate(ratio: Tensor, advantage: Tensor, low: float, high: float, delta: float | None = None) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A), where delta caps r in the first term (2505.07291)."""
    clipped = ratio.clamp(1 - low, 1 + high)
    if delta is not None:
        ratio = ratio.clamp(max=delta)
    return -torch.min(ratio * advantage, clipped * advantage)


def cispo(ratio: Tensor, advantage: Tensor, logp: Tensor, cap: float) -> Tensor:
    """-min(r, cap) A log pi, where the capped ratio is a constant (2506.13585 Eq. 4 and 5)."""
    return -ratio.clamp(max=cap).detach() * advantage * logp


def sapo(ratio: Tensor, advantage: Tensor, temperature_pos: float, temperature_neg: float) -> Tensor:
    """-A sigmoid(t (r - 1)) 4 / t, where t depends on the sign of A (2511.20347 Eq. 5 and 6)."""
    gain, loss = ((t * (ratio - 1)).sigmoid() * 4 / t for t in (temperature_pos, temperature_neg))
    return -advantage * torch.where(advantage > 0, gain, loss)


def vespo_log_w(logp: Tensor, old_logp: Tensor, mask: Tensor, sampler_ratio: Tensor | None = None) -> Tensor:
    """Log of the product of a sequence's ratios and sampler ratios, [B, 1] (2602.10693, bounded as in its code)."""
    least, most = math.log(1e-8), 20.0
    log_w = torch.where(mask, (logp - old_logp).clamp(-20.0, 20.0), 0.0).sum(-1, keepdim=True)
    if sampler_ratio is not None:
        counted = mask if sampler_ratio.shape == mask.shape else torch.ones_like(sampler_ratio, dtype=torch.bool)
        log_w = log_w + torch.where(counted, sampler_ratio.log().clamp(least, most), 0.0).sum(-1, keepdim=True)
    return log_w.clamp(least, most)


def vespo(log_w: Tensor, advantage: Tensor, logp: Tensor, gain: tuple, loss: tuple) -> Tensor:
    """-phi A log pi with the constant phi = e^l w^k e^(-l w). (k, l) is gain where A >= 0, else loss (2602.10693)."""
    phi_gain, phi_loss = ((decay + k * log_w - decay * log_w.exp()).exp() for k, decay in (gain, loss))
    return -torch.where(advantage >= 0, phi_gain, phi_loss).detach() * advantage * logp


def covariance(logp: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    """Each token's part of Cov(log pi, A) (2505.22617 Eq. 10), 0 for tokens that do not count."""
    n = mask.sum()
    mean_logp, mean_advantage = ((torch.where(mask, x, 0.0).sum() / n) for x in (logp, advantage.expand_as(logp)))
    return torch.where(mask, (logp - mean_logp) * (advantage - mean_advantage), 0.0)


def kl_cov(ratio: Tensor, advantage: Tensor, picked: Tensor, coef: float, penalty: str) -> Tensor:
    """-r A, plus coef abs(log r) ("abs") or coef (r - 1 - log r) ("k3") for picked tokens (2505.22617 Eq. 13)."""
    divergence = ratio.log().abs() if penalty == "abs" else ratio - 1 - ratio.log()
    return -ratio * advantage + torch.where(picked, coef * divergence, 0.0)


def top_entropy(entropy: Tensor, mask: Tensor, rho: float) -> Tensor:
    """Tokens whose entropy is at or above the (1 - rho) quantile over tokens that count (2506.01939 Eq. 6)."""
    return mask & (entropy >= entropy[mask].quantile(1 - rho))


def aggregate(loss: Tensor, mask: Tensor, over: str, length: int | None = None) -> Tensor:
    """Reduce the losses [B, T] of the tokens that count to one number."""
    total = torch.where(mask, loss, 0.0).sum(-1)
    if over == "sequence means":  # 2402.03300: mean over each sequence, then over sequences
        return (total / mask.sum(-1).clamp(min=1)).mean()
    if over == "tokens":  # 2503.14476: mean over all tokens
        return total.sum() / mask.sum().clamp(min=1)
    if over == "sequences":  # 2602.05261: sum over each sequence, then mean over sequences
        return total.mean()
    if over == "length" and length is not None:  # 2503.20783: a constant
        return total.sum() / (mask.shape[0] * length)
    raise ValueError(f"over: found {over!r}, length: found {length!r}")
