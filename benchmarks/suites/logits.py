"""Time and memory of `rlloss.token_stats` against its peers, each first checked against `rlloss.reference` in fp64.

Under pytest (`make bench-pytest`) pytest-benchmark times one contender after the other. As a program,

    python -m benchmarks.suites.logits [--rounds 15] [--compile]

the contenders take turns, so that what disturbs the machine disturbs them all; it prints a Markdown table and writes it
with all samples to benchmarks/results/<device>/token_stats.{md,json}.
"""

import argparse
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.contenders.logits import Case, Peer, peers
from benchmarks.harness import errors
from benchmarks.harness.conditions import ROOT, conditions, sentence
from benchmarks.harness.examine import examined, peak_of, under_pytest
from benchmarks.harness.shapes import lengths
from benchmarks.harness.timing import (
    CUDA,
    DEVICE,
    beside_copies,
    phases,
    refuse_interpreter,
    seconds,
    split,
)
from rlloss import reference
from rlloss.report import replace_file

SHAPES = [(8192, 151936), (8192, 32768), (1024, 151936)] if CUDA else [(512, 32768)]  # (N, V)
DTYPES = (torch.float32, torch.bfloat16)
SEQUENCES = 8


class Measure(NamedTuple):
    """What is timed: the forward without gradient, or forward and backward ("step") with a share `rho` of live rows.

    fill: share of the rows that the mask lets count; below 1 each sequence is padded on the right.
    """

    kind: str
    fill: float
    rho: float = 1.0

    @property
    def label(self) -> str:
        live = f", {self.rho:.0%} live" if self.kind == "step" else ""
        return f"{self.kind}{live}" + (f", {1 - self.fill:.0%} padding" if self.fill < 1 else "")

    def ideal_bytes(self, N: int, V: int, itemsize: int) -> float:
        """What has to be moved: counted rows read; in a step live rows read again, and the whole gradient written."""
        rows = self.fill if self.kind == "forward" else self.fill + self.fill * self.rho + 1
        return rows * N * V * itemsize


MEASURES = [Measure("forward", 1.0), Measure("forward", 0.5)]
MEASURES += [Measure("step", 1.0, rho) for rho in (1.0, 0.2, 0.05)] + [Measure("step", 0.5, 0.2)]


@functools.lru_cache(maxsize=1)
def make_logits(N: int, V: int, dtype: torch.dtype) -> Tensor:
    """`[1, N + 1, V]`. A standard deviation of 4: entropies of about 4 nats, a model neither sure nor lost."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    padded = torch.empty((1, N + 1, V), dtype=dtype, device=DEVICE)
    for rows in padded[0].split(256):
        rows.copy_(torch.randn(rows.shape, generator=generator, device=DEVICE).mul_(4))
    return padded


def make_case(N: int, V: int, dtype: torch.dtype, measure: Measure) -> Case:
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(0, V, (N,), generator=generator)
    T = N // SEQUENCES
    mask = torch.arange(T) < torch.tensor(lengths(SEQUENCES, T, measure.fill)).unsqueeze(-1)
    mask = mask.flatten()
    counted = mask.nonzero().squeeze(-1)
    live = counted[torch.randperm(len(counted), generator=generator)[: round(len(counted) * measure.rho)]]
    grad = torch.zeros(N).index_copy_(0, live, torch.randn(len(live), generator=generator).add_(0.01))
    return Case(make_logits(N, V, dtype), target.to(DEVICE), mask.to(DEVICE), grad.to(DEVICE))


def check(peer: Peer, case: Case, measure: Measure) -> dict[str, float]:
    """The peer's errors on sampled rows against the reference in fp64.

    Raises:
        ArithmeticError: an error above what rounding to the result's dtype explains, or a dead row that is not 0.
    """
    counts = torch.ones_like(case.target, dtype=torch.bool) if case.mask is None else case.mask
    rows = errors.spread(counts.nonzero().squeeze(-1))
    if measure.kind == "step":
        rows = torch.cat([rows, errors.spread((case.grad != 0).nonzero().squeeze(-1))]).unique()
    x = case.logits[rows].double().requires_grad_(measure.kind == "step")
    logp, entropy, _ = reference.token_stats(x, case.target[rows])
    found_errors, allowed = {}, {}
    if measure.kind == "forward":
        found_logp, found_entropy = peer.forward(case)
        for name, found, expected in (("logp", found_logp, logp), ("entropy", found_entropy, entropy)):
            if found is not None:
                found_errors[name] = errors.worst(found[rows], expected)
                scale = max(1.0, expected.abs().max().item())
                allowed[name] = scale * errors.allowed(case.logits.shape[-1], found.dtype)
                if found[~counts].ne(0).any():
                    raise ArithmeticError(f"{peer.name}: {name} of a masked row is not 0")
    else:
        logp.backward(case.grad[rows].double())
        found = peer.step(case)
        if (found.ne(0).any(-1) & (case.grad == 0)).any():  # NaN is not 0 either
            raise ArithmeticError(f"{peer.name}: the gradient of a dead row is not 0")
        live = case.grad[rows] != 0
        assert x.grad is not None
        of_live = found[rows][live], x.grad[live], case.target[rows][live], case.grad[rows][live]
        found_errors = errors.of_rows(*of_live)
        allowed = dict.fromkeys(found_errors, errors.allowed(found.shape[-1], found.dtype))
    errors.require(peer.name, found_errors, allowed)
    return found_errors


def examine(peer: Peer, case: Case, measure: Measure, *, strict: bool = True, longest_step: float = math.inf) -> dict:
    """{"status"} and, of a peer that is there and right, "errors" and "peak_bytes".

    strict: rlloss being wrong raises, and so does every error but those of arithmetic and of memory. longest_step:
    seconds above which a peer is not timed.
    """
    if reason := peer.absent(DEVICE):
        return {"status": reason}

    def find() -> dict:
        found = {"errors": check(peer, case, measure)}
        return found | peak_of(runner(peer, case, measure), math.inf if peer.ours else longest_step)

    return examined(find, ours=peer.ours, strict=strict)


def runner(peer: Peer, case: Case, measure: Measure) -> Callable[[], object]:
    return functools.partial(peer.forward if measure.kind == "forward" else peer.step, case)


def clock(peer: Peer, case: Case, measure: Measure) -> Callable[[], tuple[float, ...]]:
    if measure.kind == "forward":
        return lambda: (seconds(functools.partial(peer.forward, case)),)
    return lambda: phases(functools.partial(peer.start, case))


CASES = [(N, V, dtype, measure) for N, V in SHAPES for dtype in DTYPES for measure in MEASURES]


@pytest.mark.parametrize("peer", peers(compiled=CUDA), ids=lambda p: p.name)
@pytest.mark.parametrize("N, V, dtype, measure", CASES, ids=[f"{N}x{V}-{str(d)[6:]}-{m.label}" for N, V, d, m in CASES])
def test_token_stats(benchmark, N, V, dtype, measure, peer):
    case = make_case(N, V, dtype, measure)
    shape = {"N": N, "V": V, "dtype": str(dtype)[6:], "measure": measure.label}
    entry = shape | examine(peer, case, measure)
    under_pytest(benchmark, f"N {N}, V {V}, {str(dtype)[6:]}: {measure.label}", entry, runner(peer, case, measure))


def compare(
    N: int,
    V: int,
    dtype: torch.dtype,
    measure: Measure,
    contenders: list[Peer],
    rounds: int,
    limit: float = math.inf,
    **how,
) -> dict:
    """One measure of everyone in turns.

    "peers": {name: {"status", "errors", "peak_bytes", "seconds", and of a step its "forward" and "backward"}}; "copy"
    and "zeros": see `timing.beside_copies`. limit: seconds that it may take. how: see `examine`.
    """
    begin = time.monotonic()
    case = make_case(N, V, dtype, measure)
    found = {peer.name: examine(peer, case, measure, **how) | {"seconds": []} for peer in contenders}
    clocks = {p.name: clock(p, case, measure) for p in contenders if found[p.name]["status"] == "measured"}
    samples, floors = beside_copies(case.logits, clocks, rounds, limit - (time.monotonic() - begin))
    for name, values in samples.items():
        found[name] |= {"seconds": [x for (x,) in values]} if measure.kind == "forward" else split(values)
    return {
        "N": N,
        "V": V,
        "dtype": str(dtype)[6:],
        "measure": measure._asdict() | {"label": measure.label},
        "ideal_bytes": measure.ideal_bytes(N, V, dtype.itemsize),
        **floors,
        "peers": found,
    }


def _cell(entry: dict, ideal_bytes: float, copy_rate: float) -> str:
    if entry["status"] != "measured":
        return entry["status"]
    median = statistics.median(entry["seconds"])
    low, _, high = statistics.quantiles(entry["seconds"], n=4)
    share = ideal_bytes / median / copy_rate
    return f"{1e3 * median:.3g} [{1e3 * low:.3g}, {1e3 * high:.3g}] · {share:.0%}"


def markdown(report: dict, contenders: list[Peer]) -> str:
    where = report["conditions"]
    lines = [
        sentence(where),
        "",
        "Cells: median ms [lower, upper quartile] · bytes that have to be moved per second, as a share of what a copy "
        "of the logits reached in the same rounds.",
    ]
    for N, V, dtype in dict.fromkeys((r["N"], r["V"], r["dtype"]) for r in report["results"]):
        results = [r for r in report["results"] if (r["N"], r["V"], r["dtype"]) == (N, V, dtype)]
        rates = [r["copy"]["bytes"] / statistics.median(r["copy"]["seconds"]) for r in results]
        zeros = [1e3 * statistics.median(r["zeros"]["seconds"]) for r in results]
        labels = [r["measure"]["label"] for r in results]
        lines += [
            "",
            f"**N = {N}, V = {V}, {dtype}** (logits copied at {min(rates) / 1e9:.3g} to {max(rates) / 1e9:.3g} GB/s, "
            f"a fresh zeroed gradient alone in {min(zeros):.3g} to {max(zeros):.3g} ms)",
            "",
            "| | " + " | ".join(labels) + " | memory of a step, all live | largest error of logp |",
            "|---" * (len(labels) + 3) + "|",
        ]
        for peer in contenders:
            entries = [r["peers"][peer.name] for r in results]
            cells = [_cell(e, r["ideal_bytes"], rate) for e, r, rate in zip(entries, results, rates, strict=True)]
            full = next(e for e, label in zip(entries, labels, strict=True) if label == "step, 100% live")
            memory = f"{full['peak_bytes'] / 2**20:.0f} MiB" if "peak_bytes" in full else full["status"]
            error = f"{entries[0]['errors']['logp']:.0e}" if "errors" in entries[0] else entries[0]["status"]
            lines.append(f"| {peer.name} | " + " | ".join([*cells, memory, error]) + " |")
    return "\n".join([*lines, "", *(f"- {peer.name}: {peer.note}." for peer in contenders)]) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time rlloss.token_stats against its peers, in turns.")
    parser.add_argument("--rounds", type=int, default=30 if CUDA else 15, help="samples of each (default %(default)s)")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=CUDA, help="torch.compile takes part (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error(f"--rounds: found {options.rounds}, expected at least 2")
    refuse_interpreter()
    contenders = peers(compiled=options.compile)
    report: dict = {"conditions": conditions(options.rounds), "results": []}
    for N, V, dtype, measure in CASES:
        print(f"N {N}, V {V}, {str(dtype)[6:]}: {measure.label}", file=sys.stderr, flush=True)
        report["results"].append(compare(N, V, dtype, measure, contenders, options.rounds))
    report["conditions"]["load_after"] = conditions(options.rounds)["load"]
    folder = options.out / report["conditions"]["slug"]
    replace_file(folder / "token_stats.json", json.dumps(report, indent=1) + "\n")
    text = markdown(report, contenders)
    replace_file(folder / "token_stats.md", text)
    print(text)


if __name__ == "__main__":
    main()
