"""Run a contest: check each contender, read its peak memory, and time the correct ones in turns."""

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

    start: the forward. It returns the backward, or the result if not `phased`. check: returns "errors" and further
    facts, and raises ArithmeticError if the contender is wrong. why_not: why it is not measured. prepare: runs before
    each run, off the clock. head_start: see `timing.phases`.
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
        """Return the seconds of forward and backward, or of the whole run if not `phased`."""
        self.prepare()
        return phases(self.start, self.head_start) if self.phased else (seconds(self.start),)


def entrant(
    peer: Peer, case: Any, check: Callable[[], dict[str, Any]], why_not: str | None = None, **options: Any
) -> Entrant:
    """Make an entrant. `phased=False`: the forward without gradient. A peer that cannot select runs at rho 1 only."""
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
    """facts: description of the case for the result. limits: lower limits of every contender, or parts of its work,
    timed in the same turns."""

    peers: list[Entrant]
    limits: list[Entrant] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def examine(entrant: Entrant, longest_step: float = math.inf) -> dict[str, Any]:
    """Return {"status"}, and for a contender that is present and correct also its check's results and "peak_bytes".

    longest_step: contenders other than rlloss are not timed if a step takes more seconds.
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
    """Return the facts, "peers" and "limits": {name: `examine`, and seconds "forward" and "backward", or "seconds"}.

    rounds: largest number of samples of each. limit: seconds for the whole contest.
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
    """Return the lower limits of a step from logits: copy the logits to allocated memory, and allocate a gradient."""
    buffer = logits.new_empty(logits.shape)
    return [
        Entrant("copy", lambda: buffer.copy_(logits), lambda: {"bytes": 2 * buffer.nbytes}, phased=False),
        Entrant("zeros", lambda: logits.new_zeros(logits.shape), lambda: {"bytes": buffer.nbytes}, phased=False),
    ]
