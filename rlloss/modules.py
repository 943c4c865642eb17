"""Drop-in loss modules: from logits to the loss."""

from torch import Tensor, nn

from rlloss import checks
from rlloss.config import LossConfig
from rlloss.losses import PolicyLoss, policy_loss
from rlloss.ops import token_stats
from rlloss.single_launch import single_launch_loss, why_two_launches, worthwhile


class GRPOLoss(nn.Module):
    """The loss of `config` from logits: `token_stats` and `policy_loss`, which have the full description.

    Rows that carry no gradient (masked, clipped, of low entropy, advantage 0) are not read in the backward. Where the
    Triton kernels run, the losses that clip and "cispo" take one launch between the two passes over the logits.

    Args:
        config: `LossConfig()` if None.
        inplace_grad: write the gradient over the logits in the backward, as `token_stats` does, with its conditions.
        single_launch: let the forward write the gradient too, while a row is in the cache; the loss and the gradient
            are the same. It takes settings by which a token's coefficient depends on no other token: a ratio per
            token, no off-policy mask, top_entropy_quantile=1 or a `cutoff`; eager Triton. The gradient is held until
            the backward. It pays where the incoming gradient is 1, and costs where it is not: rather than dividing
            the loss by a number of micro-batches, put that into the `denominator`. None: where the settings allow it
            and the rows in flight fit the GPU's cache. True: an error where the settings forbid it.
    """

    def __init__(
        self, config: LossConfig | None = None, *, inplace_grad: bool = False, single_launch: bool | None = None
    ):
        super().__init__()
        self.config = LossConfig() if config is None else config
        self.inplace_grad = inplace_grad
        self.single_launch = single_launch
        checks.require(
            not (inplace_grad and single_launch), "single_launch", True,
            "None or False with inplace_grad=True, which writes in the backward",
        )  # fmt: skip

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
        config = self.config
        given = {
            "old_logp": old_logp, "ref_logp": ref_logp, "sampler_ratio": sampler_ratio, "sampler_logp": sampler_logp,
            "cutoff": cutoff, "denominator": denominator,
        }  # fmt: skip
        scaling = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}

        reason = "single_launch=False" if self.single_launch is False else None
        if self.inplace_grad:
            reason = "inplace_grad=True"
        reason = reason or why_two_launches(logits, config, cutoff, denominator)
        if reason is None and (self.single_launch or worthwhile(logits)):
            return single_launch_loss(logits, target, advantage, mask, config=config, **scaling, given=given)
        checks.require(not self.single_launch, "single_launch", True, f"None or False with {reason}")
        stats = token_stats(
            logits,
            target,
            mask=mask,
            **scaling,
            outputs=("logp", "entropy"),
            entropy_grad=config.entropy_coef != 0.0,
            inplace_grad=self.inplace_grad,
        )
        assert stats.logp is not None
        return policy_loss(stats.logp, advantage, mask, config=config, entropy=stats.entropy, **given)
