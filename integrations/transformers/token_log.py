"""Write a log of training: completions with the entropy and state of each token, and the trainer's metrics.

`rlloss report RUN_DIR` turns the log into one HTML page.
"""

import json
import math
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        'rlloss.integrations.transformers.token_log needs transformers: pip install "rlloss[trl]"'
    ) from error

from rlloss import checks
from rlloss.losses.token_states import TokenState
from rlloss.report import replace_file

DIGITS = 4  # decimal places of entropies and advantages
_PROCESS = re.compile(r"process-(\d+)\.jsonl")
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenLog(TrainerCallback):
    """Appends completions to ``folder/tokens/process-00000.jsonl``, with one file per process.

    Each line describes one completion. It is a JSON object in ASCII::

        step        int, the optimizer step
        prompt      str, with special tokens
        tokens      [str, ...], `tokenizer.decode` of each token, with special tokens. If a character spans several
                    tokens, the last one has the character and the others have their bytes, such as ⟨F0⟩
        entropy     [float, ...] in nats, rounded to 4 decimals; null where it is not finite
        state       str, one letter per token: `TokenState.letter`
        advantage   float, or [float, ...] if there is one per token; null where it is not finite
        rewards     {name: float or null}

    Trailing padding is left out. If a killed run left an unfinished line, it is cut off when the file is opened again.
    A later run first writes the line ``{"step": int, "resumed": true}``: lines above it are void from this step on. As
    a callback of the trainer the log knows the first step of the run, and process 0 also marks the files of processes
    that no longer exist. Otherwise the run starts at the step of its first completion.

    Args:
        folder: folder of the run.
        tokenizer: a tokenizer of transformers.
        process_index: number of this process.
    """

    def __init__(self, folder: str | Path, tokenizer: Any, process_index: int = 0):
        self.path = Path(folder) / "tokens" / f"process-{process_index:05d}.jsonl"
        self._is_first = process_index == 0
        self._begins: int | None = None
        self._processes: int | None = None
        self._is_marked = False
        self._texts = _TokenTexts(tokenizer)
        self._tokenizer = tokenizer
        self._pad = tokenizer.pad_token_id
        _open_for_append(self.path)

    def on_train_begin(self, args, state, control, **kwargs):
        self._begins, self._processes, self._is_marked = int(state.global_step), args.world_size, False

    def write(
        self,
        step: int,
        prompt_ids: Tensor,
        completion_ids: Tensor,
        mask: Tensor,
        entropy: Tensor,
        states: Tensor,
        advantage: Tensor,
        rewards: Mapping[str, Tensor | Sequence[float | None]] | None = None,
        *,
        prompt_mask: Tensor | None = None,
    ) -> None:
        """Append a batch of completions. Each tensor is copied to the host once.

        Args:
            step: the optimizer step.
            prompt_ids: `[B, P]` int. Padding on the left is left out.
            completion_ids: `[B, T]` int.
            mask: `[B, T]` bool, True = counts.
            entropy: `[B, T]` in nats.
            states: `[B, T]` int8, from `rlloss.tokens.token_states`.
            advantage: `[B]` or `[B, T]`.
            rewards: name -> `[B]` numbers; None or NaN where a reward does not apply.
            prompt_mask: `[B, P]` bool, True = not padding. None: the leading pad tokens are padding.

        Raises:
            TypeError: `mask` is not bool.
            ValueError: a shape does not fit. The message names the argument.
        """
        checks.boolean("mask", mask)
        B, shape = len(completion_ids), tuple(completion_ids.shape)
        for name, x in (("mask", mask), ("entropy", entropy), ("states", states)):
            checks.same_shape(name, x, shape, "like completion_ids")
        checks.require(
            tuple(advantage.shape) in {(B,), shape}, "advantage", f"shape {tuple(advantage.shape)}",
            f"[B] = ({B},) or [B, T] = {shape}",
        )  # fmt: skip
        checks.require(len(prompt_ids) == B, "prompt_ids", f"{len(prompt_ids)} prompts", f"{B}, one per completion")
        if prompt_mask is not None:
            checks.same_shape("prompt_mask", prompt_mask, prompt_ids.shape, "like prompt_ids")
        columns = {name: _numbers(values) for name, values in (rewards or {}).items()}
        for name, values in columns.items():
            checks.require(len(values) == B, f"rewards[{name!r}]", f"{len(values)} numbers", f"{B}, one per completion")

        prompts = self._prompts(prompt_ids, prompt_mask)
        ids, counted, state = completion_ids.tolist(), mask.tolist(), states.tolist()
        nats, advantages = _numbers(entropy), _numbers(advantage)
        lines = []
        for b in range(B):
            n = self._length(ids[b], counted[b])
            line = {
                "step": int(step),
                "prompt": prompts[b],
                "tokens": self._texts(ids[b][:n]),
                "entropy": nats[b][:n],
                "state": "".join(TokenState(s).letter for s in state[b][:n]),
                "advantage": advantages[b][:n] if isinstance(advantages[b], list) else advantages[b],
                "rewards": {name: values[b] for name, values in columns.items()},
            }
            lines.append(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n")
        if not self._is_marked:
            for path in (self.path, *self._left_behind()):
                _mark_resumed(path, int(step) if self._begins is None else self._begins)
            self._is_marked = True
        with self.path.open("a", encoding="ascii") as file:
            file.write("".join(lines))

    def _left_behind(self) -> list[Path]:
        """The files of processes that no longer exist. Only process 0 returns any."""
        if not self._is_first or self._processes is None:
            return []
        found = {path: _PROCESS.fullmatch(path.name) for path in self.path.parent.iterdir() if path.is_file()}
        return [path for path, name in found.items() if name is not None and int(name[1]) >= self._processes]

    def _length(self, ids: list[int], counted: list[bool]) -> int:
        n = len(ids)
        while n and not counted[n - 1] and ids[n - 1] == self._pad:
            n -= 1
        return n

    def _prompts(self, prompt_ids: Tensor, prompt_mask: Tensor | None) -> list[str]:
        rows = prompt_ids.tolist()
        if prompt_mask is not None:
            is_real = prompt_mask.bool().tolist()
            rows = [[i for i, real in zip(*row, strict=True) if real] for row in zip(rows, is_real, strict=True)]
        else:
            first = [next((at for at, i in enumerate(row) if i != self._pad), len(row)) for row in rows]
            rows = [row[at:] for row, at in zip(rows, first, strict=True)]
        return [_decode(self._tokenizer, row) for row in rows]


class MetricsLog(TrainerCallback):
    """Appends each log of the trainer to ``folder/metrics.jsonl``, on the main process.

    A line is a JSON object: "step" (int) and the logged metrics under their names. Numbers that are not finite become
    null; other values are left out. A later run first writes ``{"step": int, "resumed": true}``, as in `TokenLog`.

    Two more files lie beside it: ``run.json`` describes the run (`about`), and ``findings.jsonl`` lists the findings of
    a `CollapseMonitor`, one ``{"step": int, "kind": str, "message": str}`` per line.

    Args:
        folder: folder of the run.
        about: returns the content of run.json; called when training begins.
        findings: returns all findings so far, as (step, kind, message).

    Raises:
        ValueError: there is a directory in the place of the file.
    """

    def __init__(
        self,
        folder: str | Path,
        about: Callable[[], Mapping[str, Any]] | None = None,
        findings: Callable[[], Sequence[tuple[int, str, str]]] | None = None,
    ):
        self.path = Path(folder) / "metrics.jsonl"
        self._about, self._findings, self._written = about, findings, 0
        checks.require(not self.path.is_dir(), "folder", f"a directory {self.path}", "a file, or none")
        self._begins: int | None = None
        self._is_open = False

    def on_train_begin(self, args, state, control, **kwargs):
        # The completions of a step are logged before global_step is raised, its metrics after it.
        self._begins, self._is_open = int(state.global_step) + 1, False
        if self._about is not None and state.is_world_process_zero:
            replace_file(self.path.with_name("run.json"), json.dumps(self._about(), default=str, indent=1) + "\n")

    def on_step_end(self, args, state, control, **kwargs):
        self._write_findings(state)

    def on_train_end(self, args, state, control, **kwargs):
        self._write_findings(state)

    def _write_findings(self, state) -> None:
        found = list(self._findings()) if self._findings is not None and state.is_world_process_zero else []
        path = self.path.with_name("findings.jsonl")
        if found[self._written :]:
            _open_for_append(path)
            with path.open("a", encoding="ascii") as file:
                for step, kind, message in found[self._written :]:
                    file.write(json.dumps({"step": int(step), "kind": kind, "message": message}) + "\n")
            self._written = len(found)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or logs is None:
            return
        if not self._is_open:
            begins = int(state.global_step) if self._begins is None else self._begins
            _mark_resumed(self.path, begins)
            _mark_resumed(self.path.with_name("findings.jsonl"), begins)
            self._is_open = True
        values = {str(name): _scalar(value) for name, value in logs.items() if _is_number(value)}
        with self.path.open("a", encoding="ascii") as file:
            file.write(json.dumps({**values, "step": int(state.global_step)}, allow_nan=False) + "\n")


class _TokenTexts:
    """Turns token ids into texts, with a cache of the text of each single token."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._known: dict[int, str | bytes] = {}

    def __call__(self, ids: list[int]) -> list[str]:
        texts, pending = [], b""
        for i in ids:
            if i not in self._known:
                self._known[i] = self._text(i)
            text = self._known[i]
            if isinstance(text, str):
                texts.append(text)
                pending = b""
            else:
                shown, pending = _completed(pending, text)
                texts.append(shown)
        return texts

    def _text(self, i: int) -> str | bytes:
        """The text of a single token, or its bytes if they are not valid UTF-8."""
        token = self._tokenizer.convert_ids_to_tokens(i)
        if token is None:
            return f"⟨no token {i}⟩"
        if isinstance(token, bytes):
            return token.decode() if _is_text(token) else token
        if i in self._special:
            return token
        if (byte := _BYTE_FALLBACK.fullmatch(token)) is not None:
            return bytes.fromhex(byte[1])
        text = _decode(self._tokenizer, [i])
        if "\ufffd" in text and all(character in _BYTE_OF for character in token):
            data = bytes(_BYTE_OF[character] for character in token)
            return text if _is_text(data) else data
        if token.startswith("▁") and not text.startswith(" "):  # decode drops the space at the beginning of a text
            return token.replace("▁", " ")
        return text or token


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _completed(pending: bytes, data: bytes) -> tuple[str, bytes]:
    """Return the text shown for a token, and the bytes that wait for the next token. Bytes are shown as ⟨F0 9F⟩."""
    whole = pending + data
    try:
        return whole.decode(), b""
    except UnicodeDecodeError as error:
        unfinished = error.reason == "unexpected end of data" and error.end == len(whole)
        if not unfinished:
            return _completed(b"", data) if pending else (_shown(data), b"")
        text, rest = whole[: error.start].decode(), whole[error.start :]
        return text + _shown(rest if text else data), rest


def _shown(data: bytes) -> str:
    return f"⟨{data.hex(' ').upper()}⟩"


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte. Byte-level BPE writes each byte as one printable character: itself, or one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _numbers(values: Tensor | Sequence[Any]) -> list[Any]:
    """Rounded numbers, nested like the tensor. None where a number is missing or not finite."""
    values = values.detach().float().tolist() if isinstance(values, Tensor) else values
    return [_numbers(v) if isinstance(v, list) else _rounded(v) for v in values]


def _rounded(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else round(float(value), DIGITS)


def _is_number(value: Any) -> bool:
    scalar = isinstance(value, Tensor) and value.numel() == 1
    return scalar or (isinstance(value, numbers.Real) and not isinstance(value, bool))


def _scalar(value: Any) -> float | int | None:
    value = value.item() if isinstance(value, Tensor) else value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if math.isfinite(value) else None


def _mark_resumed(path: Path, step: int) -> None:
    """Append the line "resumed" to a file that is not empty: its lines from this step on are void."""
    _open_for_append(path)
    if path.exists() and path.stat().st_size > 0:
        with path.open("a", encoding="ascii") as file:
            file.write(json.dumps({"step": step, "resumed": True}) + "\n")


def _open_for_append(path: Path) -> None:
    """Make the folder, and cut off an unfinished last line, which the next line would continue."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = file.seek(0, 2)
        keep = end
        while keep:
            start = max(0, keep - 4096)
            file.seek(start)
            newline = file.read(keep - start).rfind(b"\n")
            if newline >= 0:
                keep = start + newline + 1
                break
            keep = start
        if keep != end:
            file.truncate(keep)
