"""Search the fastest launch shapes for the present GPU and write them into kernels/launch_table.py.

    python -m benchmarks.tune [--minutes 6] [--dtypes bf16 fp32] [--V 151936 ...] [--only statistics ...] [--write]

Only developers run this: at run time the table is looked up. For each choice of `rlloss.kernels.launch_table` the
candidates must first give the result of the table's entry. Then they are timed in turns. A candidate replaces the entry
if it is faster by more than 2 % and by more than the spread of both. "statistics" comes before the choices that depend
on it. The results are printed; --write changes the table.
"""

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.harness.conditions import conditions
from benchmarks.harness.timing import in_turns, seconds
from rlloss import GRPOLoss, LinearGRPOLoss, LossConfig, backends
from rlloss.kernels import launch_table
from rlloss.kernels.launch_table import DTYPE_NAMES, LARGEST, Choice, choice, generation, look_up
from rlloss.report import replace_file

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
BLOCKS = [(block, warps) for block in (1024, 2048, 4096, 8192) for warps in (2, 4, 8, 16)]
CANDIDATES: dict[str, list[tuple[int, ...]]] = {
    # 4 to 32 entries of a block per thread: fewer are less than one 16-byte load, more do not fit the registers.
    "statistics": [(block, warps) for block, warps in BLOCKS if 4 <= block // (32 * warps) <= 32],
    "gradient": [(block, warps) for block, warps in BLOCKS if 4 <= block // (32 * warps) <= 32],
    "split": [(0,), (1,), (2,), (4,), (8,)],
    "single_launch": [(0,), (10**9,)],
    # Smaller tiles stay in the L2 cache between the product that writes a tile and the kernel that reads it.
    "tile": [(rows, 1 << entries) for rows in (2048, 4096, 8192) for entries in (22, 23, 24, 25, 26, 27)],
}
KERNELS = tuple(CANDIDATES)
FASTER = 0.98  # a candidate must take at most this share of the entry's time
FILE = ROOT / "kernels" / "launch_table.py"
BEGIN = "TABLE: dict[tuple[str, str, str, int], Choice] = {\n"


class Key(NamedTuple):
    kernel: str
    generation: str
    dtype: str
    V: int


@contextlib.contextmanager
def chosen(key: Key, value: tuple[int, ...]) -> Iterator[None]:
    """Inside, the table has this entry."""
    before = launch_table.TABLE.get(key)
    launch_table.TABLE[key] = Choice(value)
    look_up.cache_clear()
    try:
        yield
    finally:
        del launch_table.TABLE[key]
        if before is not None:
            launch_table.TABLE[key] = before
        look_up.cache_clear()


def workload(key: Key, device: torch.device, rows: int, D: int = 2048) -> Callable[[], Any]:
    """Return a function that runs the code that depends on the choice, and returns tensors to compare.

    rows: number of rows of logits or hidden states.
    """
    g = torch.Generator(device).manual_seed(0)
    dtype = DTYPES[key.dtype]
    target = torch.randint(0, key.V, (1, rows), generator=g, device=device)
    mask = torch.ones_like(target, dtype=torch.bool)
    advantage = torch.ones(1, device=device)
    if key.kernel == "tile":
        hidden = torch.randn((1, rows, D), generator=g, device=device).to(torch.bfloat16).requires_grad_()
        weight = torch.randn((key.V, D), generator=g, device=device).to(torch.bfloat16).requires_grad_()
        loss_fn = LinearGRPOLoss(LossConfig(top_entropy_quantile=0.2), plan="recompute")

        def from_hidden() -> Any:
            loss = loss_fn(hidden, weight, target, advantage, mask=mask).loss
            return torch.autograd.grad(loss, (hidden, weight))

        return from_hidden
    logits = torch.empty((1, rows, key.V), dtype=dtype, device=device)
    for part in logits[0].split(256):
        part.copy_(torch.randn(part.shape, generator=g, device=device).mul_(4))
    flat, place = logits[0], target[0]
    if key.kernel in ("statistics", "split"):
        return lambda: backends.triton.token_stats_forward(flat, place, None, (1.0, None, 1.0))
    if key.kernel == "gradient":
        logp, entropy, _, saved, _ = backends.triton.token_stats_forward(flat, place, None, (1.0, None, 1.0))
        coef = torch.ones_like(logp)
        return lambda: backends.triton.token_stats_backward(
            flat, place, None, (1.0, None, 1.0), (saved, entropy), (coef, None, None)
        )
    leaf, loss_fn = logits.requires_grad_(), GRPOLoss(LossConfig())

    def from_logits() -> Any:
        loss = loss_fn(leaf, target, advantage, mask=mask).loss
        return torch.autograd.grad(loss, leaf)

    return from_logits


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _flat(found: Any) -> list[torch.Tensor]:
    return [x for x in (found if isinstance(found, tuple | list) else [found]) if isinstance(x, torch.Tensor)]


def agrees(found: Any, expected: Any) -> bool:
    """Whether two results agree up to the order of their sums."""
    for a, b in zip(_flat(found), _flat(expected), strict=True):
        tolerance = 1e-4 + 2 * torch.finfo(b.dtype).eps
        if not torch.allclose(a.float(), b.float(), rtol=tolerance, atol=1e-6):
            return False
    return True


def better(samples: dict[tuple[int, ...], list[float]], current: tuple[int, ...]) -> tuple[int, ...]:
    """Return the value with the smallest median, or the current one if the gain is not above the spread."""
    fastest = min(samples, key=lambda value: statistics.median(samples[value]))
    low, median, high = statistics.quantiles(samples[fastest], n=4, method="inclusive")
    own_low, own, _ = statistics.quantiles(samples[current], n=4, method="inclusive")
    return fastest if median <= FASTER * own and high < own_low else current


def search(
    key: Key, device: torch.device, rows: int, rounds: int, limit: float, clock: Callable = seconds
) -> tuple[tuple[int, ...], dict[tuple[int, ...], list[float]]]:
    """Return the best value, and the samples of every candidate that ran and agreed."""
    if key.kernel == "split":
        return _search_split(key, device, rounds, limit, clock)
    current = choice(key.kernel, device, torch.float32 if key.kernel == "tile" else DTYPES[key.dtype], key.V)
    return _search(key, current, CANDIDATES[key.kernel], workload(key, device, rows), rounds, limit, clock)


def _search_split(key: Key, device: torch.device, rounds: int, limit: float, clock: Callable):
    """Return the largest candidate (rows per multiprocessor) for which three quarters of the rows run faster split."""
    whole, *some = sorted(CANDIDATES["split"])
    value, samples = whole, {}
    for few in reversed(some):
        run = workload(key, device, max(1, few[0] * _multiprocessors(device) * 3 // 4))
        value, samples = _search(key, whole, [few], run, rounds, limit / len(some), clock)
        if value == few:
            break
    return value, samples


def _search(key: Key, current: tuple[int, ...], candidates, run: Callable[[], Any], rounds, limit, clock):
    with chosen(key, current):
        expected = run()
    clocks = {}
    ran: dict[str, tuple[int, ...]] = {}
    for value in dict.fromkeys([current, *candidates]):
        with chosen(key, value):
            try:
                agreed = agrees(run(), expected)
            except Exception as error:  # too many registers or out of memory: not a candidate
                if value == current:
                    raise
                print(f"{key.kernel} {value}: {type(error).__name__}: {error}", file=sys.stderr)
                continue
        if not agreed:
            raise ArithmeticError(f"{key}: with {value} another result than with {current}")
        ran[str(value)], clocks[str(value)] = value, _clock(key, value, run, clock)
    samples = {ran[name]: [s[0] for s in found] for name, found in in_turns(clocks, rounds, limit).items()}
    return better(samples, current), samples


def _clock(key: Key, value: tuple[int, ...], run: Callable[[], Any], clock: Callable) -> Callable[[], tuple[float]]:
    def timed() -> tuple[float]:
        with chosen(key, value):
            return (clock(run),)

    return timed


def rewritten(source: str, table: dict[tuple[str, str, str, int], Choice]) -> str:
    """Return the text of kernels/launch_table.py with another table."""
    head, _, rest = source.partition(BEGIN)
    lines = []
    for (kernel, of, dtype, V), (value, found) in sorted(table.items()):
        size = "LARGEST" if V == LARGEST else str(V)
        said = f', "{found}"' if found else ""
        lines.append(f'    ("{kernel}", "{of}", "{dtype}", {size}): Choice({value!r}{said}),\n')
    return head + BEGIN + "".join(lines) + rest[rest.index("}\n") :]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Search the launch shapes of the GPU at hand.")
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--rounds", type=int, default=20, help="most samples of a candidate (default %(default)s)")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--only", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bf16", "fp32"])
    parser.add_argument("--V", type=int, nargs="+", default=[32768, 151936])
    parser.add_argument("--write", action="store_true", help="change kernels/launch_table.py")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("found no GPU, expected one: what is tuned here is its launch shapes")
    device = torch.device("cuda", torch.cuda.current_device())
    where = conditions()
    said = f"{where['device']}, triton {where['versions']['triton']}, {where['commit']}, {where['date'][:10]}"
    keys = [
        Key(kernel, generation(device), dtype, V)
        for kernel in options.only
        for dtype in (["fp32"] if kernel == "tile" else options.dtypes)
        for V in options.V
    ]
    end = time.monotonic() + 60 * options.minutes
    for i, key in enumerate(keys):
        if time.monotonic() > end:
            print(f"{key}: not measured, the time is over")
            continue
        limit = max(0.0, end - time.monotonic()) / (len(keys) - i)
        value, samples = search(key, device, options.rows, options.rounds, limit)
        for candidate, found in sorted(samples.items(), key=lambda item: statistics.median(item[1])):
            mark = " <- taken" if candidate == value else ""
            print(f"{key.kernel} {key.dtype} V {key.V} {candidate}: {1e3 * statistics.median(found):.4f} ms{mark}")
        # Later searches use this result: the table in memory stays changed.
        launch_table.TABLE[key] = Choice(value, said)
        look_up.cache_clear()
    if options.write:
        replace_file(FILE, rewritten(FILE.read_text(encoding="utf-8"), launch_table.TABLE))


if __name__ == "__main__":
    main()
