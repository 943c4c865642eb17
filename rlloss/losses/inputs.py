"""Bundle the arguments of a loss, and check them against each other and against the settings."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlloss import checks
from rlloss.config import LossConfig
from rlloss.loss_types import LOSSES, LossType


class LossInputs(NamedTuple):
    """Arguments of `policy_loss`, where they are described. `check` converts the floats to fp32 or better without
    gradient, and the advantage to `[B, 1]` or `[B, T]`."""

    logp: Tensor
    advantage: Tensor
    mask: Tensor
    config: LossConfig
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    sampler_ratio: Tensor | None = None
    sampler_logp: Tensor | None = None
    entropy: Tensor | None = None
    cutoff: Tensor | float | None = None
    denominator: Tensor | float | None = None
    kept: Tensor | None = None
    selected: Tensor | None = None

    @property
    def loss_type(self) -> LossType:
        return LOSSES[self.config.loss_type]

    @property
    def level(self) -> str:
        """Level of the importance ratio, "token", "sequence" or "product"."""
        return self.loss_type.level or self.config.ratio_level

    @property
    def behavior_logp(self) -> Tensor | None:
        """Log-probabilities under the policy that sampled, if known; None stands for the current policy."""
        return self.old_logp if self.sampler_logp is None else self.sampler_logp


# Makes `LossInputs` from log-probabilities and entropies, which are not computed yet.
AwaitingLogp = Callable[..., LossInputs]


def check(given: LossInputs) -> LossInputs:
    """Return the converted arguments (see `LossInputs`). Raise if one does not fit; the error names it."""
    (
        logp, advantage, mask, config, old_logp, ref_logp, sampler_ratio, sampler_logp, entropy, cutoff, denominator,
        kept, selected,
    ) = given  # fmt: skip
    checks.of_type("config", config, LossConfig, "a LossConfig")
    check_scalars(cutoff, denominator)
    checks.tokens(logp, advantage, mask)
    B, T = logp.shape
    for name, x in (
        ("old_logp", old_logp), ("ref_logp", ref_logp), ("sampler_logp", sampler_logp), ("entropy", entropy),
    ):  # fmt: skip
        if x is not None:
            checks.floating(name, x)
            checks.same_shape(name, x, logp.shape, "like logp")
            checks.same_device(name, x, logp, "logp")
    if sampler_ratio is not None:
        checks.floating("sampler_ratio", sampler_ratio)
        if tuple(sampler_ratio.shape) not in ((B, 1), (B, T)):
            shape = f"shape {tuple(sampler_ratio.shape)}"
            checks.fail("sampler_ratio", shape, f"[B, 1] = ({B}, 1) or [B, T] = ({B}, {T})")
        checks.same_device("sampler_ratio", sampler_ratio, logp, "logp")
    for name, x in (
        ("advantage", advantage), ("old_logp", old_logp), ("ref_logp", ref_logp), ("sampler_ratio", sampler_ratio),
        ("sampler_logp", sampler_logp), ("cutoff", cutoff), ("denominator", denominator),
    ):  # fmt: skip
        if isinstance(x, Tensor):
            checks.constant(name, x)
    if ref_logp is None and config.beta != 0.0:
        checks.fail("ref_logp", None, f"a tensor with beta={config.beta}")
    checks.require(ref_logp is None or config.beta != 0.0, "ref_logp", "a tensor", "None with beta=0.0")
    checks.require(
        sampler_logp is None or config.off_policy_threshold is not None, "sampler_logp", "a tensor",
        "None with off_policy_threshold=None, where it has no effect",
    )  # fmt: skip
    needs_entropy = (config.top_entropy_quantile < 1.0 and kept is None) or config.entropy_coef != 0.0
    if entropy is None and needs_entropy:
        settings = f"top_entropy_quantile={config.top_entropy_quantile}, entropy_coef={config.entropy_coef}"
        checks.fail("entropy", None, f"a [B, T] tensor with {settings}")
    bonus = config.entropy_coef != 0.0 and logp.requires_grad and torch.is_grad_enabled()
    if bonus and entropy is not None and not entropy.requires_grad:
        checks.fail(
            "entropy", "a tensor without gradient", f"one with gradient with entropy_coef={config.entropy_coef}"
        )
    checks.require(
        cutoff is None or (config.top_entropy_quantile < 1.0 and not config.exact_k), "cutoff", cutoff,
        "None with top_entropy_quantile=1.0 or exact_k, where it has no effect",
    )  # fmt: skip
    for name, x in (("kept", kept), ("selected", selected)):
        if x is not None:
            checks.boolean(name, x)
            checks.same_shape(name, x, logp.shape, "like logp")
            checks.same_device(name, x, logp, "logp")
    checks.require(
        kept is None or (config.top_entropy_quantile < 1.0 and cutoff is None), "kept", "a tensor",
        "None with top_entropy_quantile=1.0 or a cutoff, where it has no effect",
    )  # fmt: skip
    given_elsewhere = LOSSES[config.loss_type].picks is not None and config.covariance.scope == "generation"
    checks.require(
        selected is None or given_elsewhere, "selected", "a tensor",
        "None: it is read by 'clip_cov' and 'kl_cov' with covariance.scope='generation'",
    )  # fmt: skip
    checks.require(
        selected is not None or not given_elsewhere, "selected", None,
        "a [B, T] tensor with covariance.scope='generation': `rlloss.tokens.covariance_selection` of the whole batch",
    )  # fmt: skip
    _check_divisor(denominator, mask, config)
    precise = logp.dtype == torch.float64
    dtype = torch.float64 if precise else torch.float32
    old_logp, ref_logp, sampler_ratio, sampler_logp = (
        None if x is None else x.to(dtype) for x in (old_logp, ref_logp, sampler_ratio, sampler_logp)
    )
    if logp.requires_grad:
        logp = logp.detach()
    if entropy is not None:
        entropy = entropy.detach() if entropy.requires_grad else entropy
        entropy = entropy if entropy.dtype == torch.float64 else entropy.float()
    return LossInputs(
        logp.to(dtype), (advantage if advantage.dim() == 2 else advantage.unsqueeze(1)).to(dtype), mask, config,
        old_logp, ref_logp, sampler_ratio, sampler_logp, entropy, cutoff, denominator, kept, selected,
    )  # fmt: skip


def check_scalars(cutoff: Tensor | float | None, denominator: Tensor | float | None) -> None:
    if cutoff is not None:
        checks.cutoff(cutoff)
    if denominator is not None:
        checks.denominator(denominator)


def _check_divisor(denominator: Tensor | float | None, mask: Tensor, config: LossConfig) -> None:
    """Check the value of a tensor if it may be read (`checks.values_checked`)."""
    if isinstance(denominator, Tensor) and checks.values_checked(denominator) and checks.values_checked(mask):
        none_kept = config.entropy_denominator == "kept" and bool(denominator == 0)
        checks.require(
            bool((denominator > 0) & (denominator < torch.inf)) or none_kept or not bool(mask.any()), "denominator",
            denominator, "a finite number above 0 where a token counts",
        )  # fmt: skip


def as_scalar(value: Tensor | float, like: Tensor) -> Tensor:
    """Return a 0-d tensor with dtype and device of `like`. A number is filled in there, not copied to the device."""
    if isinstance(value, Tensor):
        return value.to(like).reshape(())
    return torch.full((), value, dtype=like.dtype, device=like.device)
