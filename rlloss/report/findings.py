"""Summarise a training run in sentences for its report."""

from __future__ import annotations

from collections.abc import Mapping

from rlloss.report.run_log import RunLog

Series = Mapping[int, "float | None"]


def found_in(run: RunLog) -> list[str]:
    """Return sentences from the metrics of a run, then those of its monitor. Missing metrics are skipped."""
    metrics, said = run.metrics, []
    ends = start_and_end(metrics.get("entropy") or metrics.get("entropy/mean") or {})
    if ends is not None:
        said.append(f"Entropy goes from {ends[0]:.3g} to {ends[1]:.3g} nats per token.")
    live = mean(metrics.get("rlloss/live_share", {}))
    if live is not None:
        said.append(f"{_percent(live)} of the tokens had a gradient.")
    products, plain = (mean(metrics.get(name, {})) for name in ("rlloss/products", "rlloss/products_plain"))
    if products is not None and plain is not None:
        said.append(f"The lm_head ran {products:.2f} products a token where plain logits run {plain:.2f}.")
    dead = mean(metrics.get("rlloss/zero_advantage_share", {}))
    if dead is not None:
        # This includes groups with one reward, rewards equal to the mean of their group, and masked completions.
        none = f"{_percent(dead)} of the completions had no signal: no token that counts has an advantage other than 0."
        said.append(none if dead else "Every completion had a signal.")
    return said + [f"Step {step}: {message}" for step, _, message in run.findings]


def start_and_end(series: Series) -> tuple[float, float] | None:
    """Return means over the first and the last tenth of the values, or None if there are fewer than two values."""
    values = [value for _, value in sorted(series.items()) if value is not None]
    if len(values) < 2:
        return None
    tenth = max(1, len(values) // 10)
    return sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth


def mean(series: Series) -> float | None:
    values = [value for value in series.values() if value is not None]
    return sum(values) / len(values) if values else None


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
