"""List the targets of the suite for an H100 or H200 and for a CPU, and judge whether results meet them."""

from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.harness.readings import OURS, Result, median, memory_over, over_bare, share_of_copy, speedup
from benchmarks.harness.shapes import LLAMA

DEVICES = ("H100", "H200")
FILL = 1.0
TOKENS = 16384  # of the token pass


class Target(NamedTuple):
    """A bound on one number. what: description. value: reads the number from a result with this suite, kind and rho.
    at_least: `limit` is a lower bound. model: the only model, on a CPU; None: DEVICES, all models. dtype: None: all."""

    what: str
    suite: str
    rho: float
    limit: float
    value: Callable[[Result], float | None]
    at_least: bool = True
    kind: str = "step"
    unit: str = "x"
    model: str | None = None
    dtype: str | None = None
    fill: float = FILL

    def is_for(self, result: Result) -> bool:
        mine = (self.suite, self.kind, self.rho, self.fill)
        return (
            (result["suite"], result["kind"], result["rho"], result["fill"]) == mine
            and self.model in (None, result["model"])
            and self.dtype in (None, result["dtype"])
        )


def of_peer(peer: str) -> Callable[[Result], float | None]:
    return lambda result: speedup(result, peer)


def _token_pass_us(result: Result) -> float | None:
    seconds = median(result.get("peers", {}).get(OURS, {}), "forward")
    return None if seconds is None or result["B"] * result["T"] != TOKENS else 1e6 * seconds


def _small(peer: str, dtype: str, rho: float, limit: float) -> Target:
    """A target for a CPU, with padding in half of the columns."""
    what = f"hidden states, small, {dtype}, rho {rho:g}: time of {peer} / rlloss"
    return Target(what, "hidden", rho, limit, of_peer(peer), model="small", dtype=dtype, fill=0.5)


def _small_memory(peer: str, dtype: str, rho: float, limit: float) -> Target:
    what = f"hidden states, small, {dtype}, rho {rho:g}: peak memory of rlloss / {peer}"
    value = memory_over(peer)
    return Target(what, "hidden", rho, limit, value, at_least=False, model="small", dtype=dtype, fill=0.5)


TARGETS = [
    Target("logits, forward without gradient: share of the copy bandwidth", "logits", 1.0, 0.9, share_of_copy,
           kind="forward", unit=""),
    # The limit from logits: (2 + rho) reads and writes of the rows that count, at the bandwidth of a copy.
    *(
        Target(f"{name}, forward and backward, rho {rho:g}: share of the copy bandwidth", suite, rho, 0.85,
               share_of_copy, unit="")
        for suite, name in (("logits", "logits"), ("loss", "whole loss from logits"))
        for rho in (1.0, 0.2)
    ),
    *(
        Target(f"hidden states, rho {rho:g}: time of rlloss / the bare products of its plan", "hidden", rho, 1.15,
               over_bare, at_least=False)
        for rho in (1.0, 0.2)
    ),
    # TRL runs 4 products, rlloss 3 or 1.6, with a frozen head 3 and 2 or 1.4: four fifths of the quotient.
    *(
        Target(f"{what}, rho {rho:g}: time of TRL / rlloss", "hidden", rho, limit, of_peer("TRL"), kind=kind)
        for what, kind, rho, limit in (
            ("hidden states", "step", 1.0, 1.07), ("hidden states", "step", 0.2, 2.0),
            ("frozen head", "frozen head", 1.0, 1.2), ("frozen head", "frozen head", 0.2, 1.7),
        )
    ),
    *(
        Target(f"hidden states, rho {rho:g}: peak memory of rlloss / plain logits", "hidden", rho, 0.4,
               memory_over("naive"), at_least=False)
        for rho in (1.0, 0.2)
    ),
    Target("token pass of 16,384 tokens, forward", "token pass", 1.0, 30.0, _token_pass_us, at_least=False, unit=" µs"),
]  # fmt: skip
CPU_TARGETS = [
    _small("TRL", "float32", 0.2, 5.0),
    _small("TRL", "float32", 1.0, 2.8),
    _small("TRL", "bfloat16", 0.2, 4.5),
    _small("naive", "float32", 0.2, 2.7),
    _small("naive", "float32", 1.0, 1.3),
    _small("naive", "bfloat16", 0.2, 1.8),
    _small_memory("naive", "float32", 0.2, 0.32),
    _small_memory("naive", "bfloat16", 0.2, 0.32),
    _small_memory("Liger", "float32", 1.0, 0.75),
    *(
        Target(f"hidden states, small, float32, rho {rho:g}: time of rlloss / the bare products of its plan", "hidden",
               rho, 1.2, over_bare, at_least=False, model="small", dtype="float32", fill=0.5)
        for rho in (0.2, 1.0)
    ),
    Target("an update step: time of TRL / rlloss", "step", 0.2, 4.0, of_peer("TRL"), model=str(LLAMA), fill=0.5),
]  # fmt: skip


def judge(results: list[Result], device: str) -> list[dict[str, Any]]:
    """Judge each target of the device, for each model and dtype among its results. Return dicts {"what", "bound",
    "model", "dtype", "fill", "found", "met", "unit"}. found and met are None if there is no number."""
    judged = []
    for target in TARGETS if any(name in device for name in DEVICES) else CPU_TARGETS if "cores" in device else []:
        bound = f"{'at least' if target.at_least else 'at most'} {target.limit:g}{target.unit}"
        for result in filter(target.is_for, results):
            found = target.value(result)
            met = None if found is None else found >= target.limit if target.at_least else found <= target.limit
            judged.append(
                {"what": target.what, "bound": bound, "model": result["model"], "dtype": result["dtype"],
                 "fill": target.fill, "found": found, "met": met, "unit": target.unit}
            )  # fmt: skip
    return judged


def verdict(judged: dict[str, Any]) -> str:
    if judged["met"] is None:
        return "not measured"
    return f"{judged['found']:.3g}{judged['unit']}, {'met' if judged['met'] else 'missed'}"
