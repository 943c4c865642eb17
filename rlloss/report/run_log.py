"""Read the files of a training run, `tokens/*.jsonl` and `metrics.jsonl`, for its report.

`rlloss.integrations.transformers.token_log` describes the files. In memory a token takes 7 bytes, so that a run of
millions of tokens fits.
"""

from __future__ import annotations

import json
import math
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCALE = 5000
"""Steps per nat of the stored entropies. The largest, 65534 steps or 13.1 nats, exceeds the log of any vocabulary."""
MISSING = 65535
LIVE, MASKED = "lp", "m"


@dataclass
class Completion:
    step: int
    prompt: int  # index of its text
    tokens: array[int]  # indices of their texts
    entropy: array[int]  # in steps of 1 / SCALE nats, or MISSING
    state: str
    advantage: float | list[float] | None
    rewards: dict[str, float | None]
    run: int = 0  # number of its run on the page


@dataclass
class RunLog:
    """Contents of a run.

    texts and prompts map a text to its index. metrics maps a name to {step: value}. findings are (step, kind, message)
    of the monitor. about is the content of run.json. unreadable lists "file:line", or "file (reason)".
    """

    texts: dict[str, int] = field(default_factory=dict)
    prompts: dict[str, int] = field(default_factory=dict)
    completions: list[Completion] = field(default_factory=list)
    metrics: dict[str, dict[int, float | None]] = field(default_factory=dict)
    findings: list[tuple[int, str, str]] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)

    def left_out(self) -> str:
        """Return what could not be read, the first five by name, or "" if everything was read."""
        more = f" and {len(self.unreadable) - 5} more" if len(self.unreadable) > 5 else ""
        return f"{', '.join(self.unreadable[:5])}{more}"


Record = tuple[int, Any]
"""A line as (step, content). The content is None if the line says that the run was resumed."""


@dataclass
class Session:
    """The lines of a file between two resumptions. It replaces the lines of earlier sessions from step `begins` on."""

    begins: int
    records: list[Record]


TOKEN_LOG = "token_log_steps=20 in GRPOConfig writes the tokens"


def read_run(run_dir: Path, run: RunLog | None = None) -> RunLog:
    """Read a run. If another run is given, the two share texts and prompts.

    Without metrics.jsonl the metrics come from trainer_state.json, in the folder or in its newest checkpoint. A file or
    a line that cannot be read is left out and noted. If a file says that the run was resumed, or its steps go back, the
    earlier lines from that step on are left out.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such run.
        ValueError: nothing in it can be read.
    """
    expected = f"expected the folder of a run, with tokens/*.jsonl, metrics.jsonl or trainer_state.json ({TOKEN_LOG})"
    if not run_dir.exists():
        raise FileNotFoundError(f"run_dir: found no {str(run_dir)!r}, {expected}")
    if not run_dir.is_dir():
        raise NotADirectoryError(f"run_dir: found a file, {str(run_dir)!r}, {expected}")
    files, metrics = sorted((run_dir / "tokens").glob("*.jsonl")), run_dir / "metrics.jsonl"
    states = [run_dir / "trainer_state.json", *sorted(run_dir.glob("checkpoint-*/trainer_state.json"), key=_number)]
    states = [path for path in states if path.is_file()]
    if not files and not os.path.lexists(metrics) and not states:
        names = sorted(path.name for path in run_dir.iterdir())
        more = ", ..." if len(names) > 8 else ""
        held = f"only {', '.join(names[:8])}{more}" if names else "nothing"
        held = "tokens/ without a .jsonl file" if names == ["tokens"] else held
        raise ValueError(f"run_dir: found {held} in {str(run_dir)!r}, {expected}")
    run = RunLog() if run is None else RunLog(texts=run.texts, prompts=run.prompts)
    processes = [_sessions(_records(run, path, _completion)) for path in files]
    clock = next((sessions for sessions in processes if sessions), [])
    run.completions = [c for sessions in processes for _, c in _kept(sessions, clock)]
    run.completions.sort(key=lambda c: c.step)
    if os.path.lexists(metrics):
        for step, values in _kept(_sessions(_records(run, metrics, _log)), []):
            for name, value in values.items():
                run.metrics.setdefault(name, {})[step] = value
    elif states:
        _read_state(run, states[-1])
    _read_about(run, run_dir)
    if not run.completions and not run.metrics:
        not_readable = f" (not readable: {run.left_out()})" if run.unreadable else ""
        raise ValueError(
            f"run_dir: found no completion and no metric in the files of {str(run_dir)!r}{not_readable}, {expected}"
        )
    return run


def _number(path: Path) -> int:
    digits = path.parent.name.rpartition("-")[2]
    return int(digits) if digits.isdigit() else -1


def _read_state(run: RunLog, path: Path) -> None:
    """Read the metrics from the log history of transformers."""
    try:
        for line in json.loads(path.read_text(encoding="utf-8"))["log_history"]:
            for name, value in line.items():
                if name != "step" and isinstance(value, int | float):
                    run.metrics.setdefault(_name(name), {})[_step(line)] = _finite(value)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        run.unreadable.append(f"{path.name} ({type(error).__name__})")


def _read_about(run: RunLog, run_dir: Path) -> None:
    """Read run.json and findings.jsonl if they exist. A finding that a resumed run repeats is kept once."""
    about, findings = run_dir / "run.json", run_dir / "findings.jsonl"
    if about.is_file():
        try:
            run.about = dict(json.loads(about.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            run.unreadable.append(f"{about.name} ({type(error).__name__})")
    if findings.is_file():
        found: dict[tuple[int, str], str] = {}
        for step, (kind, message) in _kept(_sessions(_records(run, findings, _finding)), []):
            found.setdefault((step, kind), message)
        run.findings = [(step, kind, message) for (step, kind), message in sorted(found.items())]


def _finding(run: RunLog, line: dict[str, Any]) -> tuple[str, str]:
    if not (isinstance(line["kind"], str) and isinstance(line["message"], str)):
        raise TypeError("not a finding")
    return line["kind"], line["message"]


def _records(run: RunLog, path: Path, parse: Callable[[RunLog, Any], Any]) -> Iterator[Record]:
    """Yield the result of `parse` for each line. A line that does not fit, or a path that is no file, is noted."""
    try:
        if not path.is_file():  # reading a named pipe would block
            kind = "a directory" if path.is_dir() else "not a file" if path.exists() else "a link to nothing"
            run.unreadable.append(f"{path.name} ({kind})")
            return
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            for number, text in enumerate(file, 1):
                if not text.strip():
                    continue
                try:
                    line = json.loads(text)
                    yield _step(line), None if line.get("resumed") is True else parse(run, line)
                except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
                    run.unreadable.append(f"{path.name}:{number}")
    except OSError as error:
        run.unreadable.append(f"{path.name} ({error.strerror})")


def _sessions(records: Iterator[Record]) -> list[Session]:
    sessions: list[Session] = []
    for step, record in records:
        if record is None:
            sessions.append(Session(step, []))
            continue
        if not sessions or (sessions[-1].records and step < sessions[-1].records[-1][0]):
            sessions.append(Session(step, []))
        sessions[-1].records.append((step, record))
    return sessions


def _kept(sessions: list[Session], clock: list[Session]) -> Iterator[Record]:
    """Yield the records that no later session replaced.

    A process that was not resumed with the others has no later session of its own. All processes write the same steps,
    so `clock`, the sessions of the first process, stands in for it, unless several of them began with the same step.
    """
    for number, session in enumerate(sessions):
        later = sessions[number + 1 :]
        same = [n for n, of_first in enumerate(clock) if session.records[:1] and _begins_alike(session, of_first)]
        if len(same) == 1:
            later = later + clock[same[0] + 1 :]
        end = min((of.begins for of in later), default=math.inf)
        yield from (record for record in session.records if record[0] < end)


def _begins_alike(a: Session, b: Session) -> bool:
    return [step for step, _ in a.records[:1]] == [step for step, _ in b.records[:1]]


def _completion(run: RunLog, line: dict[str, Any]) -> Completion:
    tokens, entropy, state = line["tokens"], line["entropy"], line["state"]
    if not (isinstance(state, str) and state.isascii() and isinstance(line["prompt"], str)):
        raise TypeError("not a completion")
    if not len(tokens) == len(entropy) == len(state):
        raise ValueError("not one completion")
    if not all(isinstance(token, str) for token in tokens):
        raise TypeError("not tokens")
    quanta = [MISSING if nats is None else _quantum(nats) for nats in entropy]
    advantage, texts, prompts = line["advantage"], run.texts, run.prompts
    if isinstance(advantage, list):
        advantage = [value for value in map(_finite, advantage) if value is not None]
    else:
        advantage = _finite(advantage)
    return Completion(
        step=_step(line),
        rewards={_name(name): _finite(value) for name, value in (line.get("rewards") or {}).items()},
        advantage=advantage,
        state=state,
        entropy=array("H", quanta),
        prompt=prompts.setdefault(line["prompt"], len(prompts)),
        tokens=array("I", [texts.setdefault(token, len(texts)) for token in tokens]),
    )


def _quantum(nats: float) -> int:
    return max(0, min(MISSING - 1, round(nats * SCALE)))


def _log(run: RunLog, line: dict[str, Any]) -> dict[str, float | None]:
    return {_name(name): _finite(value) for name, value in line.items() if name != "step"}


def _name(text: str) -> str:
    """Escape lone surrogates, because names go into addresses and attributes, which cannot hold them."""
    return text.encode("utf-8", "backslashreplace").decode()


def _step(line: dict[str, Any]) -> int:
    step = line["step"]
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 2**53:
        raise ValueError("not a step")
    return step


def _finite(value: Any) -> float | None:
    """Return the number, or None if it is missing, not finite, or too large to draw."""
    if value is None:
        return None
    value = float(value)
    return value if abs(value) < 1e30 else None


@dataclass
class Counts:
    """Statistics of the tokens that count.

    entropy is the number of tokens by entropy in steps of 1 / SCALE nats. states maps a letter to its number of tokens,
    masked ones included. rows holds the texts with the largest mean entropy that occur at least `at_least` times, as
    (index of the text, count, mean entropy in nats, share live).
    """

    entropy: list[int]
    states: dict[str, int]
    rows: list[tuple[int, int, float, float]]
    at_least: int

    @property
    def tokens(self) -> int:
        return sum(n for letter, n in self.states.items() if letter != MASKED)

    @property
    def live(self) -> int:
        return sum(self.states.get(letter, 0) for letter in LIVE)

    @property
    def mean(self) -> float | None:
        """Mean entropy in nats, or None if no token has one."""
        known = sum(self.entropy)
        return sum(quantum * n for quantum, n in enumerate(self.entropy)) / SCALE / known if known else None

    def quantile(self, share: float) -> float | None:
        """Return the smallest entropy in nats that at least this share of the tokens does not exceed."""
        needed, below = share * sum(self.entropy), 0
        for quantum, n in enumerate(self.entropy):
            below += n
            if n and below >= needed:
                return quantum / SCALE
        return None


def count(run: RunLog, top: int) -> Counts:
    entropy, states = [0] * MISSING, Counter()
    n, known, nats, live = ([0] * len(run.texts) for _ in range(4))
    for completion in run.completions:
        states.update(completion.state)
        for token, quantum, letter in zip(completion.tokens, completion.entropy, completion.state, strict=True):
            if letter == MASKED:
                continue
            n[token] += 1
            live[token] += letter in LIVE
            if quantum != MISSING:
                entropy[quantum] += 1
                known[token] += 1
                nats[token] += quantum
    at_least = max(3, math.ceil(sum(n) / 10_000))
    rows = [
        (t, n[t], nats[t] / known[t] / SCALE, live[t] / n[t]) for t in range(len(n)) if n[t] >= at_least and known[t]
    ]
    rows.sort(key=lambda row: (-row[2], -row[1]))
    return Counts(entropy, dict(states), rows[:top], at_least)
