"""How `LinearGRPOLoss(plan="recompute")` grows: its time with N, V, D and the live rows, its memory with N * V."""

import functools
import gc
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness.timing import CUDA, DEVICE, peak_bytes, seconds
from rlloss import LinearGRPOLoss, LossConfig

BASE = (4096, 32768, 2048) if CUDA else (512, 8192, 512)  # N, V, D
DOUBLINGS = (1, 2, 4)
SHARES = (0.25, 0.5, 1.0)
EXPONENT = 1.1  # at most
LOGITS_SHARE = 0.01  # at most, of N * V fp32 logits


@dataclass(frozen=True)
class Rows:
    """hidden `[1, N, D]`, weight `[V, D]`, target `[1, N]`, advantage `[1, N]`, 0 but for the share r of live rows."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    advantage: Tensor

    def step(self, plan: str = "recompute") -> None:
        hidden, weight = (x.detach().requires_grad_() for x in (self.hidden, self.weight))
        mask = torch.ones_like(self.target, dtype=torch.bool)
        LinearGRPOLoss(LossConfig(), plan=plan)(hidden, weight, self.target, self.advantage, mask=mask).loss.backward()


def make_rows(N: int, V: int, D: int, r: float) -> Rows:
    g = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn((1, N, D), generator=g, device=DEVICE) * (4 / D**0.5)
    weight = torch.randn((V, D), generator=g, device=DEVICE)
    target = torch.randint(0, V, (1, N), generator=g, device=DEVICE)
    live = torch.arange(N, device=DEVICE) < round(r * N)
    return Rows(hidden, weight, target, torch.where(live, 1.0, 0.0).unsqueeze(0))


def exponent(sizes: list[float], values: list[float]) -> float:
    """The slope of the least-squares line through the logarithms; NaN where a value is not above 0."""
    if min(values) <= 0:
        return math.nan
    return statistics.linear_regression([math.log(x) for x in sizes], [math.log(x) for x in values]).slope


def measure(base: tuple[int, int, int], rounds: int) -> dict:
    """{"base", "time": {size: {"sizes", "seconds", "exponent", "met"}}, "memory": see `memory`}.

    Every row is live but for "r", whose time is what it takes above that of no live row. The smallest of the
    samples is taken: what disturbs a machine only adds.
    """
    N, V, D = base
    settings: dict[tuple[str, float], tuple[int, int, int, float]] = {("r", 0.0): (N, V, D, 0.0)}
    for k in DOUBLINGS:
        settings |= {
            ("N", k * N): (k * N, V, D, 1.0),
            ("V", k * V): (N, k * V, D, 1.0),
            ("D", k * D): (N, V, k * D, 1.0),
        }
    settings |= {("r", r): (N, V, D, r) for r in SHARES}
    runs: dict[tuple[str, float], Callable[[], object]] = {name: make_rows(*s).step for name, s in settings.items()}
    samples: dict[tuple[str, float], list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            elapsed = seconds(run)
            if turn:
                samples[name].append(elapsed)
    found: dict = {"base": list(base), "time": {}}
    for size in ("N", "V", "D", "r"):
        names = [name for name in settings if name[0] == size and name[1] > 0]
        values = [min(samples[name]) for name in names]
        if size == "r":
            values = [value - min(samples["r", 0.0]) for value in values]
        sizes = [name[1] for name in names]
        slope = exponent(sizes, values)
        found["time"][size] = {"sizes": sizes, "seconds": values, "exponent": slope, "met": slope <= EXPONENT}
    runs.clear()
    return found | {"memory": memory(4096 if CUDA else 1024, V, 512)}


def memory(N: int, V: int, D: int) -> dict:
    """Peaks in bytes at N and V and their doubles, and their part that grows as N * V, as a share of fp32 logits.

    That part is what doubling both adds beyond what doubling each does; gradients and a tile drop out of it. D has
    to be large enough for the weight's gradient to put the peak into the backward at every size. {"peaks": {plan:
    [[N, V, bytes], ...]}, "share": {plan: ...}, "met"}. The plan "keep" is the witness: it holds N * V logits.
    """
    gc.collect()
    peaks: dict[str, list] = {}
    shares = {}
    for plan in ("recompute", "keep"):
        found = {}
        for n in (N, 2 * N):
            for v in (V, 2 * V):
                found[n, v] = peak_bytes(functools.partial(make_rows(n, v, D, 0.5).step, plan))
        mixed = found[2 * N, 2 * V] - found[2 * N, V] - found[N, 2 * V] + found[N, V]
        peaks[plan], shares[plan] = [[*size, peak] for size, peak in found.items()], mixed / (4 * N * V)
    return {"D": D, "peaks": peaks, "share": shares, "met": abs(shares["recompute"]) <= LOGITS_SHARE}


def markdown(found: dict) -> list[str]:
    N, V, D = found["base"]
    lines = [
        f"**Growth of recompute** from N {N}, V {V}, D {D}, fp32, all rows live; of r the time above that of r = 0",
        "",
        "| | sizes | ms | exponent | |",
        "|---|---|---|---|---|",
    ]
    for size, x in found["time"].items():
        sizes, times = (", ".join(f"{k * value:.4g}" for value in x[n]) for k, n in ((1, "sizes"), (1e3, "seconds")))
        verdict = "met" if x["met"] else "missed"
        lines.append(f"| {size} | {sizes} | {times} | {x['exponent']:.2f}, at most {EXPONENT} | {verdict} |")
    memory_found = found["memory"]
    shares = memory_found["share"]
    peaks = "; ".join(f"N {n}, V {v}: {b / 2**20:.1f} MiB" for n, v, b in memory_found["peaks"]["recompute"])
    lines += [
        "",
        f"Peak memory of recompute at D {memory_found['D']}, half of the rows live: {peaks}. Its part that grows as "
        f"N * V is {shares['recompute']:.2%} of N * V fp32 logits (at most {LOGITS_SHARE:.0%}: "
        f"{'met' if memory_found['met'] else 'missed'}); of keep, which holds those of the live half, "
        f"{shares['keep']:.0%}.",
    ]
    return lines
