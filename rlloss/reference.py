"""The formulas, as one would write them on paper. Slow, never tuned: the oracle that everything else is tested against.

Run it in fp64; its gradients are autograd's own.
"""

import torch
from torch import Tensor


def token_stats(
    logits: Tensor, target: Tensor, temperature: float | Tensor = 1.0, softcap: float | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [..., V], target [...] -> (log-probability of the target, entropy in nats, log-sum-exp), each [...]."""
    z = logits * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * torch.where(p > 0, log_p, 0.0)).sum(-1)
    logp = log_p.gather(-1, target[..., None]).squeeze(-1)
    return logp, entropy, z.logsumexp(-1)


def kl(logp: Tensor, ref_logp: Tensor, estimator: str = "k3") -> Tensor:
    """Estimators of KL(policy || reference) at the sampled token, http://joschu.net/blog/kl-approx.html."""
    d = ref_logp - logp
    return {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - d - 1}[estimator]


def ratio(logp: Tensor, old_logp: Tensor, mask: Tensor, level: str = "token") -> Tensor:
    """pi / pi_old at each token [B, T], or the geometric mean over a sequence [B, 1] (GSPO, 2507.18071 Eq. 7)."""
    log_ratio = logp - old_logp
    if level == "sequence":
        log_ratio = torch.where(mask, log_ratio, 0.0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return log_ratio.exp()


def clip_surrogate(ratio: Tensor, advantage: Tensor, low: float, high: float, delta: float | None = None) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A), with r <= delta in the first term (2505.07291)."""
    clipped = ratio.clamp(1 - low, 1 + high)
    if delta is not None:
        ratio = ratio.clamp(max=delta)
    return -torch.min(ratio * advantage, clipped * advantage)


def top_entropy(entropy: Tensor, mask: Tensor, rho: float) -> Tensor:
    """Tokens at or above the (1 - rho) quantile of the entropies that count (2506.01939 Eq. 6)."""
    return mask & (entropy >= entropy[mask].quantile(1 - rho))


def aggregate(loss: Tensor, mask: Tensor, loss_type: str, max_completion_length: int | None = None) -> Tensor:
    """One number from the losses [B, T] of the tokens that count."""
    total = torch.where(mask, loss, 0.0).sum(-1)
    if loss_type == "grpo":  # 2402.03300: mean over each sequence, then over sequences
        return (total / mask.sum(-1).clamp(min=1)).mean()
    if loss_type in ("bnpo", "dapo"):  # 2503.14476: mean over all tokens
        return total.sum() / mask.sum().clamp(min=1)
    if loss_type == "dr_grpo":  # 2503.20783: a constant
        assert max_completion_length is not None
        return total.sum() / (mask.shape[0] * max_completion_length)
    raise ValueError(f"loss_type: found {loss_type!r}")
