"""A contest: each contender is checked, its memory is read, and those that are right are timed in turns."""

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from benchmarks.harness.errors import failure
from benchmarks.harness.peer import Peer
from benchmarks.harness.readings import is_ours
from benchmarks.harness.timing import in_turns, peak_bytes, phases, seconds, warm


@dataclass(frozen=True)
class Entrant:
    """A contender with its inputs.

    start: the forward; it returns the backward, or the result where there is none (not `phased`). check: gives its
    "errors" and what else there is to say of it, and raises ArithmeticError where it is wrong. why_not: why there is no
    number of it. prepare: what comes before each run, off the clock. head_start: see `timing.phases`.
    """

    name: str
    start: Callable[[], Any]
    check: Callable[[], dict[str, Any]] = dict
    why_not: str | None = None
    prepare: Callable[[], object] = tuple
    phased: bool = True
    head_start: int | None = None

    def run(self) -> Any:
        return self.start()() if self.phased else self.start()

    def clock(self) -> tuple[float, ...]:
        """Seconds of the forward and the backward, or of all of it."""
        self.prepare()
        return phases(self.start, self.head_start) if self.phased else (seconds(self.start),)


def entrant(
    peer: Peer, case: Any, check: Callable[[], dict[str, Any]], why_not: str | None = None, **options: Any
) -> Entrant:
    """The forward without gradient where `phased=False`. It has no number below rho 1 if it cannot select."""
    if peer.ignores_rho and case.rho < 1.0:
        why_not = "keeps every token: at rho 1 only"
    why_not = peer.absent() or why_not
    function = peer.start if options.get("phased", True) else peer.forward

    def start() -> Any:
        assert function is not None
        return function(case)

    def prepare() -> None:
        if peer.prepare is not None:
            peer.prepare(case)

    return Entrant(peer.name, start, check, why_not, prepare, **options)


@dataclass(frozen=True)
class Contest:
    """facts: what a result says of its case. limits: what no contender goes below, or a part of what each does; timed
    in the same turns."""

    peers: list[Entrant]
    limits: list[Entrant] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def examine(entrant: Entrant, longest_step: float = math.inf) -> dict[str, Any]:
    """{"status"} and, of a contender that is there and right, what its check found and "peak_bytes".

    longest_step: seconds above which a contender that is not rlloss is not timed.
    """
    if entrant.why_not is not None:
        return {"status": entrant.why_not}
    try:
        found = {"status": "measured"} | entrant.check()
        entrant.prepare()
        gc.collect()
        begin = time.monotonic()
        found["peak_bytes"] = peak_bytes(entrant.run)
        took = time.monotonic() - begin
    except Exception as error:
        return {"status": failure(error)}
    if took > longest_step and not is_ours(entrant.name):
        return {"status": f"not measured: a step takes {took:.2g} s"}
    return found


def hold(contest: Contest, rounds: int, limit: float = math.inf, longest_step: float = math.inf) -> dict[str, Any]:
    """The facts, "peers" and "limits": {name: `examine`, and seconds "forward" and "backward", or "seconds"}.

    rounds: the most samples of each. limit: seconds that it may take.
    """
    begin = time.monotonic()
    found = {
        "peers": {entrant.name: examine(entrant, longest_step) for entrant in contest.peers},
        "limits": {entrant.name: {"status": "measured"} | entrant.check() for entrant in contest.limits},
    }
    entries = found["limits"] | found["peers"]
    timed = {e.name: e for e in (*contest.limits, *contest.peers) if entries[e.name]["status"] == "measured"}
    clocks = {name: entrant.clock for name, entrant in timed.items()}
    for name, values in in_turns(clocks, rounds, limit - (time.monotonic() - begin), warm=warm(limit)).items():
        columns = [[round(x, 9) for x in column] for column in zip(*values, strict=True)]
        names = ("forward", "backward") if timed[name].phased else ("seconds",)
        entries[name] |= dict(zip(names, columns, strict=True))
    return contest.facts | found


def copies(logits: Tensor) -> list[Entrant]:
    """What no step from logits goes below: a copy of the logits into memory that was there, and a fresh gradient."""
    buffer = logits.new_empty(logits.shape)
    return [
        Entrant("copy", lambda: buffer.copy_(logits), lambda: {"bytes": 2 * buffer.nbytes}, phased=False),
        Entrant("zeros", lambda: logits.new_zeros(logits.shape), lambda: {"bytes": buffer.nbytes}, phased=False),
    ]
