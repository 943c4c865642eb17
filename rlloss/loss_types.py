"""The losses as a table: a row has all that tells one loss from another.

To add a loss: a row here, a function in `rlloss.losses.surrogates`, its formula in `rlloss.reference`, a line in
docs/losses.md. Nothing else compares the name of a loss or of a surrogate with anything.
"""

from collections.abc import Mapping
from typing import NamedTuple


class LossType(NamedTuple):
    """One loss. Papers and formulas are in `LossConfig` and `rlloss.reference`."""

    surrogate: str
    """What a token's ratio and advantage make of its loss: a name in `rlloss.losses.surrogates.SURROGATES`."""

    reads: frozenset[str]
    """Of the settings that only some losses read, those that it reads; "covariance.x": x of CovarianceConfig."""

    level: str | None = None
    """Of the importance ratio: "token", "sequence", "product" (of a sequence); None: `LossConfig.ratio_level`."""

    mean_of_sequence: bool = False
    """Token losses are averaged over their sequence first."""

    divided_by: str = "tokens"
    """What their sum is then divided by: "tokens", "sequences", or "length" (sequences * max_completion_length)."""

    own_token_count: bool = False
    """The tokens of the call, also where a trainer knows those of the whole batch."""

    row_local: bool = True
    """A token's coefficient depends on no other token, as long as the ratio is per token and no selection looks at
    others."""

    silent_without_advantage: bool = True
    """An advantage of 0 silences a token."""

    caps_ratio: bool = False
    """`epsilon_high` is the largest ratio itself, and not 1 less."""

    picks: str | None = None
    """By covariance it picks tokens "between" two bounds, or those with the "largest"; None: none."""

    picked: str | None = None
    """What becomes of them: "left out" or "penalised"."""

    kernel: str | None = None
    """The form in which the Triton kernels know it: "clip" or "cispo"; None: plain torch alone."""

    logs: Mapping[str, str] = {}
    """What it counts, and the name under which a trainer of TRL logs it."""

    in_trl: bool = True
    """TRL has a loss of that name."""


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
    """Whether it is a setting that only some losses read."""
    return any(setting in row.reads for row in LOSSES.values())
