"""Time and memory of `rlloss.token_stats` against its peers, each first checked against `rlloss.reference` in fp64.

Under pytest (`make bench`) pytest-benchmark times one contender after the other. As a program,

    python benchmarks/bench_token_stats.py [--rounds 15] [--compile]

the contenders take turns, so that what disturbs the machine disturbs them all; it prints a Markdown table and writes it
with all samples to benchmarks/results/<device>/token_stats.{md,json}.
"""

import argparse
import functools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]  # as a program, in a checkout that is not installed

from peers import Case, Peer, peers, versions  # noqa: E402

from rlloss import reference  # noqa: E402
from rlloss.ops import choose_backend  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SHAPES = [(8192, 151936), (8192, 32768), (1024, 151936)] if CUDA else [(512, 32768)]  # (N, V)
DTYPES = (torch.float32, torch.bfloat16)
SEQUENCES = 8
SAMPLED_ROWS = 32  # of the rows that count, and again of the live ones, are compared with the reference


class Measure(NamedTuple):
    """What is timed: the forward alone, or forward and backward ("step") with a share `rho` of live rows.

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
def _logits(N: int, V: int, dtype: torch.dtype) -> Tensor:
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
    # Lengths rise evenly from sequence to sequence, with `fill` as their mean share of T.
    lengths = [round(T * measure.fill * (2 * b + 1) / SEQUENCES) for b in range(SEQUENCES)]
    mask = torch.arange(T) < torch.tensor(lengths).unsqueeze(-1)
    mask = mask.flatten() if measure.fill < 1 else torch.ones(N, dtype=torch.bool)
    counted = mask.nonzero().squeeze(-1)
    live = counted[torch.randperm(len(counted), generator=generator)[: round(len(counted) * measure.rho)]]
    grad = torch.zeros(N).index_copy_(0, live, torch.randn(len(live), generator=generator).add_(0.01))
    given_mask = mask.to(DEVICE) if measure.fill < 1 else None
    return Case(_logits(N, V, dtype), target.to(DEVICE), given_mask, grad.to(DEVICE))


def _spread(rows: Tensor) -> Tensor:
    return rows[torch.linspace(0, len(rows) - 1, min(SAMPLED_ROWS, len(rows)), device=rows.device).long()]


def _worst(found: Tensor, expected: Tensor) -> float:
    """The largest difference; inf where what was found is not finite."""
    return (found.double() - expected).abs().nan_to_num(nan=torch.inf).max().item()


def check(peer: Peer, case: Case, measure: Measure) -> dict[str, float]:
    """The peer's errors on sampled rows against the reference in fp64.

    Raises:
        ArithmeticError: an error above what rounding to the result's dtype explains, or a dead row that is not 0.
    """
    counts = torch.ones_like(case.target, dtype=torch.bool) if case.mask is None else case.mask
    rows = _spread(counts.nonzero().squeeze(-1))
    if measure.kind == "step":
        rows = torch.cat([rows, _spread((case.grad != 0).nonzero().squeeze(-1))]).unique()
    x = case.logits[rows].double().requires_grad_(measure.kind == "step")
    logp, entropy, _ = reference.token_stats(x, case.target[rows])
    errors, allowed = {}, {}
    if measure.kind == "forward":
        found_logp, found_entropy = peer.forward(case)
        for name, found, expected in (("logp", found_logp, logp), ("entropy", found_entropy, entropy)):
            if found is not None:
                errors[name] = _worst(found[rows], expected)
                allowed[name] = 1e-5 + 4 * torch.finfo(found.dtype).eps * expected.abs().max().item()
                if found[~counts].ne(0).any():
                    raise ArithmeticError(f"{peer.name}: {name} of a masked row is not 0")
    else:
        logp.backward(case.grad[rows].double())
        found = peer.step(case)
        if (found.ne(0).any(-1) & (case.grad == 0)).any():  # NaN is not 0 either
            raise ArithmeticError(f"{peer.name}: the gradient of a dead row is not 0")
        # Relative to the row, and the target's entry apart from the rest: it is far larger than they are.
        live = case.grad[rows] != 0
        assert x.grad is not None
        d, expected, place = found[rows][live].double(), x.grad[live], case.target[rows][live].unsqueeze(-1)
        g = case.grad[rows][live].double().unsqueeze(-1)
        errors["gradient at the target"] = _worst(d.gather(-1, place) / g, expected.gather(-1, place) / g)
        rest = (d - expected).scatter(-1, place, 0.0).norm(dim=-1) / expected.scatter(-1, place, 0.0).norm(dim=-1)
        errors["gradient elsewhere"] = _worst(rest, torch.zeros_like(rest))
        allowed = dict.fromkeys(errors, 1e-5 + 4 * torch.finfo(found.dtype).eps)
    for name, error in errors.items():
        if not error <= allowed[name]:
            raise ArithmeticError(f"{peer.name}: {name} is off by {error:.2g}, allowed {allowed[name]:.2g}")
    return errors


def runner(peer: Peer, case: Case, measure: Measure) -> Callable[[], object]:
    return functools.partial(peer.forward if measure.kind == "forward" else peer.step, case)


def seconds(run: Callable[[], object]) -> float:
    """Of one call; on a GPU between two events on the stream."""
    if not CUDA:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory a call holds above its inputs, its results included."""
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # Every allocation and release of torch's CPU allocator; the resident set would also count what malloc keeps.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def refuse_interpreter() -> None:
    if choose_backend(torch.empty(1, device=DEVICE)) == "interpreter":
        raise RuntimeError("TRITON_INTERPRET: found 1, expected unset: the interpreter's speed says nothing")


CASES = [(N, V, dtype, measure) for N, V in SHAPES for dtype in DTYPES for measure in MEASURES]


@pytest.mark.parametrize("peer", peers(compiled=CUDA), ids=lambda p: p.name)
@pytest.mark.parametrize("N, V, dtype, measure", CASES, ids=[f"{N}x{V}-{str(d)[6:]}-{m.label}" for N, V, d, m in CASES])
def test_token_stats(benchmark, N, V, dtype, measure, peer):
    refuse_interpreter()
    if reason := peer.absent(DEVICE):
        pytest.skip(f"{peer.name}: {reason}")
    benchmark.group = f"N {N}, V {V}, {str(dtype)[6:]}: {measure.label}"
    case = make_case(N, V, dtype, measure)
    try:
        benchmark.extra_info.update(check(peer, case, measure))
    except ArithmeticError as error:
        if peer.name == "rlloss":
            raise
        pytest.skip(f"wrong: {error}")
    run = runner(peer, case, measure)

    def synchronised():
        run()
        if CUDA:
            torch.cuda.synchronize()

    benchmark.pedantic(synchronised, rounds=20 if CUDA else 7, warmup_rounds=1)


def compare(N: int, V: int, dtype: torch.dtype, measure: Measure, contenders: list[Peer], rounds: int) -> dict:
    """One measure of everyone in turns.

    "peers": {name: {"status", "seconds", "peak_bytes", "errors"}}; "copy" of the logits into memory that was there, and
    "zeros", a fresh gradient, which no step out of place goes below: {"bytes", "seconds"}.
    """
    case = make_case(N, V, dtype, measure)
    found: dict[str, dict] = {}
    runs = {}
    for peer in contenders:
        found[peer.name] = entry = {"status": peer.absent(DEVICE) or "measured", "seconds": []}
        if entry["status"] != "measured":
            continue
        try:
            entry["errors"] = check(peer, case, measure)
            entry["peak_bytes"] = peak_bytes(runner(peer, case, measure))
            runs[peer.name] = runner(peer, case, measure)
        except (ArithmeticError, torch.OutOfMemoryError) as error:
            if peer.name == "rlloss":
                raise
            entry["status"] = f"wrong: {error}" if isinstance(error, ArithmeticError) else "out of memory"
    buffer = torch.empty_like(case.logits)
    runs["copy"] = lambda: buffer.copy_(case.logits)
    runs["zeros"] = lambda: torch.zeros_like(buffer)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        names = list(runs)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            elapsed = seconds(runs[name])
            if turn:  # the first turn warms up
                samples[name].append(elapsed)
    copy, zeros = samples.pop("copy"), samples.pop("zeros")
    for name, values in samples.items():
        found[name]["seconds"] = values
    return {
        "N": N,
        "V": V,
        "dtype": str(dtype)[6:],
        "measure": measure._asdict() | {"label": measure.label},
        "ideal_bytes": measure.ideal_bytes(N, V, dtype.itemsize),
        "copy": {"bytes": 2 * buffer.nbytes, "seconds": copy},
        "zeros": {"bytes": buffer.nbytes, "seconds": zeros},
        "peers": found,
    }


def conditions(rounds: int) -> dict:
    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return result.stdout.strip()

    changed = git("status", "--porcelain", "--", "rlloss", "kernels", "benchmarks/*.py")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if CUDA:
        name = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo")
        model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
        name = f"{model.group(1) if model else platform.processor() or platform.machine()}, {cores} cores"
    return {
        "device": name,
        "slug": re.sub(r"[^a-z0-9]+", "-", name.lower()) if CUDA else f"cpu-{cores}-cores",
        "threads": torch.get_num_threads(),
        "load": [round(x, 1) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "versions": versions() | {"python": platform.python_version(), "CUDA": torch.version.cuda},
        "commit": git("rev-parse", "--short", "HEAD") + (" with uncommitted changes" if changed else ""),
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "rounds": rounds,
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
    load = f" Load average before: {where['load'][0]}, after: {where['load_after'][0]}." if where["load"] else ""
    lines = [
        f"{where['device']}, {where['threads']} threads; "
        + ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version)
        + f"; commit {where['commit']}, {where['date']}; {where['rounds']} rounds in turns.{load}",
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
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "token_stats.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    text = markdown(report, contenders)
    (folder / "token_stats.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
