"""Read numbers from a JSON result of the suite: medians, quotients, shares of a limit. None: there is no number."""

import statistics
from collections.abc import Callable
from typing import Any

Result = dict[str, Any]
OURS = "rlloss"
SAME = f"is what {OURS} takes"  # status of the plan that the default chose
BARE_OF_PLAN = {"recompute": "bare 1 + 3r", "keep": "bare 1 + 2r", "gradient_in_forward": "bare 1 + 2r"}


def samples(entry: dict[str, Any], what: str = "both") -> list[float]:
    """Return seconds of "forward", "backward" or "both". Without a backward only "both" exists."""
    if what == "both" and "forward" in entry:
        return [f + b for f, b in zip(entry["forward"], entry["backward"], strict=True)]
    return entry.get("seconds" if what == "both" else what, [])


def median(entry: dict[str, Any], what: str = "both") -> float | None:
    values = samples(entry, what)
    return statistics.median(values) if values else None


def quartiles(entry: dict[str, Any]) -> tuple[float, float] | None:
    """Return the lower and the upper quartile of "both"."""
    values = samples(entry)
    if len(values) < 2:
        return None
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def is_ours(name: str) -> bool:
    return name.startswith(OURS)


def fastest_peer(result: Result) -> tuple[str, float] | None:
    """Return its name and its median of "both". Plans of rlloss and limits are not peers."""
    found = {
        name: seconds
        for name, entry in result.get("peers", {}).items()
        if not is_ours(name) and (seconds := median(entry)) is not None
    }
    name = min(found, key=lambda name: found[name], default=None)
    return None if name is None else (name, found[name])


def speedup(result: Result, peer: str | None = None) -> float | None:
    """Return the time of the peer, or of the fastest one, divided by the time of rlloss."""
    ours = median(result.get("peers", {}).get(OURS, {}))
    if peer is None:
        fastest = fastest_peer(result)
        theirs = None if fastest is None else fastest[1]
    else:
        theirs = median(result.get("peers", {}).get(peer, {}))
    return theirs / ours if ours and theirs else None


def share_of_copy(result: Result, name: str = OURS) -> float | None:
    """Return the necessary bytes per second, as a share of the bandwidth of a copy of the logits in the same turns."""
    seconds, copy = median(result.get("peers", {}).get(name, {})), median(result.get("limits", {}).get("copy", {}))
    if not seconds or not copy:
        return None
    return result["ideal_bytes"] / seconds / (result["limits"]["copy"]["bytes"] / copy)


def over_bare(result: Result) -> float | None:
    """Return the time of rlloss divided by the time of the bare products of its plan."""
    entry = result.get("peers", {}).get(OURS, {})
    ours = median(entry)
    bare = median(result.get("limits", {}).get(BARE_OF_PLAN.get(entry.get("plan_name", ""), ""), {}))
    return ours / bare if ours and bare else None


def memory_over(peer: str) -> Callable[[Result], float | None]:
    """Return a function of a result: the peak memory of rlloss divided by that of the peer."""

    def quotient(result: Result) -> float | None:
        ours, theirs = (result.get("peers", {}).get(name, {}).get("peak_bytes") for name in (OURS, peer))
        return ours / theirs if ours and theirs else None

    return quotient
