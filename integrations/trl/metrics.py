"""Log the metrics of the loss in a trainer of TRL: TRL's metrics under TRL's names, and the gauges of collapse."""

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlloss.entropy.bonus import adapted
from rlloss.entropy.diagnostics import EntropyFit, gauges, pack, unpack
from rlloss.integrations.trl import compat
from rlloss.integrations.trl.config import options
from rlloss.loss_types import LOSSES
from rlloss.losses.metrics import means

# Metrics that are not summed over ranks -> the function that combines the numbers of the ranks.
OVER_RANKS = {"clip_low_min": min, "clip_high_max": max, "policy_loss": statistics.fmean}


# Logged name -> name of the gauge, for the gauges of an optimizer step that TRL's metrics do not contain. Trackers
# group metrics by the part before the first "/".
GAUGES = {
    "entropy/p50": "entropy/p50",
    "entropy/p80": "entropy/p80",
    "entropy/p95": "entropy/p95",
    "entropy/below_0.01_share": "entropy/below_0.01_share",
    "rlloss/on_policy_share": "on_policy_share",
    "rlloss/abs_log_ratio": "abs_log_ratio",
    "rlloss/approx_kl": "approx_kl",
    "cov/logp_advantage": "cov/logp_advantage",
    "cov/logp_prob_advantage": "cov/logp_prob_advantage",
}
# Metrics that rlloss logs in addition to TRL's, in the order of a log -> whether gauges="basic" logs them. A name that
# ends in "/" stands for all names that begin with it and are not listed before it.
OURS = {
    "rlloss/live_share": True,
    "rlloss/zero_advantage_share": True,
    "rlloss/on_policy_share": True,
    "rlloss/abs_log_ratio": False,
    "rlloss/approx_kl": False,
    "rlloss/products": True,
    "rlloss/products_plain": True,
    "rlloss/logits_mib_avoided": True,
    "rlloss/nonfinite_share": True,
    "entropy/p50": True,
    "entropy/p80": True,
    "entropy/p95": True,
    "entropy/below_0.01_share": False,
    "entropy/cutoff": True,
    "entropy/kept_share": True,
    "cov/logp_advantage": True,
    "cov/logp_advantage/": False,
    "cov/logp_prob_advantage": False,
    "cov/selected_share": True,
    "cov/entropy_change_slope": False,
    "cov/entropy_change_correlation": False,
    "sampling/temperature/": True,
    "dynamic_sampling/": True,
    "reward_resolution/zero_variance/": True,  # the monitor reads it
    "reward_resolution/": False,
}
_PLACES = {name: place for place, name in enumerate(OURS)}


def ours(name: str) -> str | None:
    """Return the key of OURS that a logged name belongs to. None: the metric is not rlloss's."""
    if name in OURS:
        return name
    return next((key for key in OURS if key.endswith("/") and name.startswith(key)), None)


class LogOrder:
    """Sorts the metrics of every log: TRL's in the order of their first log, then rlloss's in the order of OURS."""

    def __init__(self):
        self._theirs: dict[str, int] = {}

    def bring(self, metrics: dict[str, list[float]], gauges: str) -> None:
        """Sort `metrics` in place. Drop rlloss's metrics that `gauges` excludes, and those whose values are all NaN."""
        kept: list[tuple[tuple[int, int], str, list[float]]] = []
        for i, (name, values) in enumerate(metrics.items()):
            key = ours(name)
            if key is None:
                kept.append(((0, self._theirs.setdefault(name, len(self._theirs))), name, values))
            elif (gauges == "all" or OURS[key]) and not all(map(math.isnan, values)):
                kept.append(((1 + _PLACES[key], i), name, values))
        metrics.clear()
        metrics.update((name, values) for _, name, values in sorted(kept))


class LossMetrics:
    """Reduces the sums of micro-batches over processes and logs them in a trainer of TRL."""

    def __init__(self, trainer: Any, tokens: Callable[[float, float], None] | None = None):
        """tokens: called for each training micro-batch with its numbers of live tokens and of tokens that count."""
        self.trainer, self._tokens = trainer, tokens
        self.fit = EntropyFit()
        self._of_step: Tensor | None = None  # gauge sums of the present optimizer step over all processes

    def log(self, mode: str, metrics: dict[str, Tensor], gauge_sums: dict[str, Tensor]) -> None:
        """Log one micro-batch. It takes one reduction of the sums and at most one gather of the other metrics."""
        trainer = self.trainer
        log, own = compat.log_of(trainer, mode), LOSSES[trainer.loss_type].logs
        sums = {name: value for name, value in metrics.items() if name not in OVER_RANKS}
        sums |= self._entropy_window(mode, metrics)
        vector = torch.cat([torch.stack(list(sums.values())).double(), pack(gauge_sums)])
        # Read back at once: small numbers cost a GPU's host more, one launch each, than they cost a CPU.
        vector = trainer.accelerator.reduce(vector, reduction="sum").cpu()
        reduced = dict(zip(sums, vector[: len(sums)].float(), strict=True))
        averages = means(reduced) | {"zero_advantage_share": reduced["dead"] / reduced["completions"].clamp(min=1)}
        if "window_kept" in reduced:
            averages["window_entropy"] = reduced["window_entropy"] / reduced["window_kept"].clamp(min=1)
        averages |= {"live": reduced["live"], "counted": reduced["counted"]}
        averages = dict(zip(averages, torch.stack(list(averages.values())).tolist(), strict=True))
        if self._tokens is not None and mode == "train":
            self._tokens(averages["live"], averages["counted"])

        log["rlloss/zero_advantage_share"].append(averages["zero_advantage_share"])
        names = {"entropy": "entropy", "rlloss/live_share": "live_share"}
        names |= {logged: mean for mean, logged in own.items() if mean not in OVER_RANKS}
        if trainer.beta != 0.0:
            names["kl"] = "kl"
        if trainer.top_entropy_quantile < 1.0:
            names["entropy/kept_share"] = "kept_share"
        if "entropy_cutoff" in averages:
            names["entropy/cutoff"] = "entropy_cutoff"
        if "selected_share" in averages:
            names["cov/selected_share"] = "selected_share"
        for name, mean in names.items():
            log[name].append(averages[mean])

        logged = [name for name in OVER_RANKS if name in metrics and (name in own or name == "policy_loss")]
        if logged:
            gathered = trainer.accelerator.gather(torch.stack([metrics[name] for name in logged]).unsqueeze(0))
            for name, of_ranks in zip(logged, gathered.T.tolist(), strict=True):
                known = [value for value in of_ranks if not math.isnan(value)]  # NaN: that rank has no counted sequence
                log[own.get(name, name)].append(OVER_RANKS[name](known) if known else math.nan)

        if "window_entropy" in averages:
            self._adapt_entropy_coef(averages["window_entropy"])
        if compat.has_entropy_bonus(trainer) and mode == "train" and trainer.accelerator.sync_gradients:
            log["entropy_coef"].append(trainer.entropy_coef)
        self._log_gauges(mode, log, vector[len(sums) :], gauge_sums)

    def _log_gauges(self, mode: str, log: dict[str, list], reduced: Tensor, like: dict[str, Tensor]) -> None:
        """Log the gauges: in training once per optimizer step, over all its micro-batches."""
        if mode == "train":
            if self._of_step is not None and len(self._of_step) == len(reduced):
                reduced = self._of_step + reduced
            ends = self.trainer.accelerator.sync_gradients
            self._of_step = None if ends else reduced
            if not ends:
                return
        found = gauges(unpack(reduced, like))
        values = dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))
        bins = {name: name for name in values if name.startswith("cov/logp_advantage/")}
        for name, gauge in (GAUGES | bins).items():
            if not math.isnan(values[gauge]):  # NaN: no token
                log[name].append(values[gauge])
        if values["nonfinite_share"] > 0.0:
            log["rlloss/nonfinite_share"].append(values["nonfinite_share"])
        if mode != "train":
            return
        self.fit.update(values["entropy/mean"], values["cov/logp_advantage"])
        if self.fit.count > 1:
            log["cov/entropy_change_slope"].append(self.fit.slope)
            log["cov/entropy_change_correlation"].append(self.fit.correlation)

    def _entropy_window(self, mode: str, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's sums over the accumulation window if this micro-batch ends it, otherwise {}."""
        trainer = self.trainer
        if mode != "train" or not (compat.has_entropy_bonus(trainer) and trainer.use_adaptive_entropy):
            return {}
        on_kept = options(trainer.args).entropy_bonus_tokens == "kept"
        names = ("entropy_kept", "kept") if on_kept else ("entropy", "tokens")
        stats = torch.stack([metrics[name] for name in names])
        ends = trainer.accelerator.sync_gradients
        stats = compat.add_to_entropy_window(trainer, stats, ends)
        return dict(zip(("window_entropy", "window_kept"), stats, strict=True)) if ends else {}

    def _adapt_entropy_coef(self, world_entropy: float) -> None:
        trainer, args = self.trainer, self.trainer.args
        compat.set_world_entropy(trainer, world_entropy)
        trainer.entropy_coef = adapted(
            trainer.entropy_coef, world_entropy, args.entropy_target, args.entropy_coef_delta, args.entropy_coef_min,
            args.entropy_coef_max,
        )  # fmt: skip
