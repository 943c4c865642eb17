"""What the suite should reach on an H100 or H200, and whether it did."""

from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.harness.readings import OURS, Result, median, memory_over, over_bare, share_of_copy, speedup

DEVICES = ("H100", "H200")
FILL = 1.0
TOKENS = 16384  # of the token pass


class Target(NamedTuple):
    """what: in words. value: of a result of the suite, kind and rho. at_least: `limit` is a lower bound."""

    what: str
    suite: str
    rho: float
    limit: float
    value: Callable[[Result], float | None]
    at_least: bool = True
    kind: str = "step"
    unit: str = "x"


def _of_trl(result: Result) -> float | None:
    return speedup(result, "TRL")


def _token_pass_us(result: Result) -> float | None:
    seconds = median(result.get("peers", {}).get(OURS, {}), "forward")
    return None if seconds is None or result["B"] * result["T"] != TOKENS else 1e6 * seconds


TARGETS = [
    Target("logits, forward without gradient: share of the copy bandwidth", "logits", 1.0, 0.9, share_of_copy,
           kind="forward", unit=""),
    *(
        Target(f"{name}, forward and backward, rho {rho:g}: time of the fastest peer / rlloss", suite, rho, limit,
               speedup)
        for suite, name in (("logits", "logits"), ("loss", "whole loss from logits"))
        for rho, limit in ((1.0, 1.4), (0.2, 1.8))
    ),
    *(
        Target(f"hidden states, rho {rho:g}: time of rlloss / the bare products of its plan", "hidden", rho, 1.15,
               over_bare, at_least=False)
        for rho in (1.0, 0.2)
    ),
    Target("hidden states, rho 1: time of TRL / rlloss", "hidden", 1.0, 1.25, _of_trl),
    Target("hidden states, rho 0.2: time of TRL / rlloss", "hidden", 0.2, 2.4, _of_trl),
    *(
        Target(f"hidden states, rho {rho:g}: peak memory of rlloss / TRL", "hidden", rho, 0.5, memory_over("TRL"),
               at_least=False)
        for rho in (1.0, 0.2)
    ),
    Target("token pass of 16,384 tokens, forward", "token pass", 1.0, 30.0, _token_pass_us, at_least=False, unit=" µs"),
]  # fmt: skip


def judge(results: list[Result], device: str) -> list[dict[str, Any]]:
    """Of each target and each model and dtype among its results, padding apart: {"what", "bound", "model", "dtype",
    "found", "met"}. found and met are None where there is no number, and on a device that the targets are not for."""
    judged = []
    for target in TARGETS:
        bound = f"{'at least' if target.at_least else 'at most'} {target.limit:g}{target.unit}"
        for result in results:
            if (result["suite"], result["kind"], result["rho"], result["fill"]) != (
                target.suite, target.kind, target.rho, FILL,
            ):  # fmt: skip
                continue
            found = target.value(result) if any(name in device for name in DEVICES) else None
            met = None if found is None else found >= target.limit if target.at_least else found <= target.limit
            judged.append(
                {"what": target.what, "bound": bound, "model": result["model"], "dtype": result["dtype"],
                 "found": found, "met": met, "unit": target.unit}
            )  # fmt: skip
    return judged


def verdict(judged: dict[str, Any]) -> str:
    if judged["met"] is None:
        return "not measured"
    return f"{judged['found']:.3g}{judged['unit']}, {'met' if judged['met'] else 'missed'}"
