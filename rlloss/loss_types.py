"""This table defines every loss in one row; no other code compares the name of a loss or of a surrogate.

To add a loss, add a row here, a function in `rlloss.losses.surrogates`, its formula in `rlloss.reference` and a page
docs/losses/<name>.md.
"""

from collections.abc import Mapping
from typing import NamedTuple


class LossType(NamedTuple):
    """One loss. `LossConfig` and `rlloss.reference` give its paper and formula."""

    surrogate: str
    """Name of the token's loss in `rlloss.losses.surrogates.SURROGATES`."""

    reads: frozenset[str]
    """Settings that this loss reads, of those that only some losses read. "covariance.x" is x of CovarianceConfig."""

    level: str | None = None
    """Level of the importance ratio, "token", "sequence" or "product" (over a sequence), or None if
    `LossConfig.ratio_level` decides."""

    mean_of_sequence: bool = False
    """Whether token losses are averaged over their sequence first."""

    divided_by: str = "tokens"
    """Divisor of their sum, "tokens", "sequences" or "length" (sequences * max_completion_length)."""

    own_token_count: bool = False
    """Whether to divide by this call's own token count even if a trainer knows the count of the whole batch."""

    row_local: bool = True
    """Whether a token's coefficient depends on no other token, given a ratio per token and no selection that looks at
    other tokens."""

    silent_without_advantage: bool = True
    """Whether an advantage of 0 silences a token."""

    caps_ratio: bool = False
    """Whether `epsilon_high` is the largest ratio itself. Otherwise the largest ratio is 1 + `epsilon_high`."""

    picks: str | None = None
    """Which tokens the loss picks by covariance, those "between" two bounds, the "largest", or None."""

    picked: str | None = None
    """Effect on picked tokens, "left out" or "penalised"."""

    kernel: str | None = None
    """Form of the loss in the Triton kernels, "clip" or "cispo"; None if only plain torch computes it."""

    logs: Mapping[str, str] = {}
    """Maps each count of the loss to the name under which TRL's trainer logs it."""

    in_trl: bool = True
    """Whether TRL has a loss of that name."""


_RATIO = frozenset({"ratio_level", "max_log_ratio"})
_CLIP = _RATIO | {"epsilon_low", "epsilon_high", "delta"}
_CLIPS = {
    "clip_low": "clip_ratio/low_mean",
    "clip_high": "clip_ratio/high_mean",
    "clip_region": "clip_ratio/region_mean",
    "clip_low_min": "clip_ratio/low_min",
    "clip_high_max": "clip_ratio/high_max",
}
_BETWEEN = {"covariance", "covariance.low", "covariance.high", "covariance.selection", "covariance.seed"}
_LARGEST = {"covariance", "covariance.kl_coef", "covariance.penalty"}

LOSSES: dict[str, LossType] = {
    "grpo": LossType("clip", _CLIP, mean_of_sequence=True, divided_by="sequences", kernel="clip", logs=_CLIPS),
    "bnpo": LossType("clip", _CLIP, own_token_count=True, kernel="clip", logs=_CLIPS),
    "dr_grpo": LossType("clip", _CLIP | {"max_completion_length"}, divided_by="length", kernel="clip", logs=_CLIPS),
    "dapo": LossType("clip", _CLIP, kernel="clip", logs=_CLIPS),
    "cispo": LossType(
        "cispo", _RATIO | {"epsilon_high"}, caps_ratio=True, kernel="cispo", logs={"clip_high": "cispo_clip_ratio"}
    ),
    "sapo": LossType("sapo", _RATIO | {"sapo"}, mean_of_sequence=True, divided_by="sequences"),
    "gspo": LossType(
        "clip", _CLIP - {"ratio_level"}, level="sequence", mean_of_sequence=True, divided_by="sequences",
        row_local=False, kernel="clip", logs=_CLIPS, in_trl=False,
    ),
    "luspo": LossType("clip", _CLIP, divided_by="sequences", kernel="clip", logs=_CLIPS),
    "vespo": LossType(
        "vespo", frozenset({"vespo"}), level="product", row_local=False, logs={"weight": "vespo/phi_seq_mean"}
    ),
    "clip_cov": LossType(
        "clip", (_CLIP - {"ratio_level"}) | _BETWEEN, level="token", row_local=False, picks="between",
        picked="left out", kernel="clip", logs=_CLIPS, in_trl=False,
    ),
    "kl_cov": LossType(
        "kl_cov", frozenset({"max_log_ratio"}) | _LARGEST, level="token", row_local=False,
        silent_without_advantage=False, picks="largest", picked="penalised", in_trl=False,
    ),
}  # fmt: skip


def read_by_some(setting: str) -> bool:
    """Return whether only some losses read this setting."""
    return any(setting in row.reads for row in LOSSES.values())
