"""Drop-in loss modules: from logits to the loss."""

from torch import Tensor, nn

from rlloss.config import LossConfig
from rlloss.losses import PolicyLoss, policy_loss
from rlloss.ops import token_stats


class GRPOLoss(nn.Module):
    """The loss of `config` from logits: `token_stats` and `policy_loss`, which have the full description.

    Rows that carry no gradient (masked, clipped, of low entropy, advantage 0) are not read in the backward.
    """

    def __init__(self, config: LossConfig | None = None):
        super().__init__()
        self.config = LossConfig() if config is None else config

    def extra_repr(self) -> str:
        return repr(self.config)

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        advantage: Tensor,
        *,
        mask: Tensor,
        old_logp: Tensor | None = None,
        ref_logp: Tensor | None = None,
        sampler_ratio: Tensor | None = None,
        sampler_logp: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        cutoff: Tensor | float | None = None,
        denominator: Tensor | float | None = None,
    ) -> PolicyLoss:
        """logits `[B, T, V]`, target and mask (bool) `[B, T]`, advantage `[B]` or `[B, T]` -> `PolicyLoss`."""
        stats = token_stats(
            logits,
            target,
            mask=mask,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            outputs=("logp", "entropy"),
            entropy_grad=self.config.entropy_coef != 0.0,
        )
        assert stats.logp is not None
        return policy_loss(
            stats.logp,
            advantage,
            mask,
            config=self.config,
            old_logp=old_logp,
            ref_logp=ref_logp,
            sampler_ratio=sampler_ratio,
            sampler_logp=sampler_logp,
            entropy=stats.entropy,
            cutoff=cutoff,
            denominator=denominator,
        )
