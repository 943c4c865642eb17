"""The log of a run: its lines, the texts of tokens that are not whole characters, resuming, and what is not finite."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlloss.integrations.token_log import MetricsLog, TokenLog
from rlloss.token_states import TokenState

PAD, EOS = "<pad>", "<eos>"
TEXT = "the café 😀 ends\n"
EMOJI = ["⟨F0⟩", "⟨9F⟩", "⟨98⟩", "😀"]


def byte_level():
    """A token per byte, as a byte-level BPE has them before its merges, and one merge."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, *alphabet, "th"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


def sentencepiece():
    """Words behind ▁, and bytes for what is in no word, as the tokenizers of Llama and Gemma."""
    tokens = [PAD, EOS, "<unk>", "▁the", "▁", "end", "s", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token="<unk>")


def ids_of(tokenizer, *tokens):
    return torch.tensor([tokenizer.convert_tokens_to_ids(list(tokens))])


def write(log, ids, *, step=1, prompt=None, **changes):
    """One batch; everything that is not given is plain."""
    B, T = ids.shape
    given = {
        "mask": torch.ones(B, T, dtype=torch.bool),
        "entropy": torch.zeros(B, T),
        "states": torch.full((B, T), TokenState.LIVE, dtype=torch.int8),
        "advantage": torch.zeros(B),
    }
    log.write(step, torch.zeros(B, 0, dtype=torch.int64) if prompt is None else prompt, ids, **{**given, **changes})


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


def tokens_of(tmp_path, tokenizer, ids):
    log = TokenLog(tmp_path, tokenizer)
    write(log, ids)
    return lines_of(log.path)[-1]["tokens"]


def test_a_line_holds_what_was_given(tmp_path):
    tokenizer = byte_level()
    log = TokenLog(tmp_path / "run", tokenizer, process_index=3)
    assert log.path == tmp_path / "run" / "tokens" / "process-00003.jsonl"
    prompt = ids_of(tokenizer, PAD, PAD, EOS, "th", "e").repeat(2, 1)
    ids = torch.cat([ids_of(tokenizer, "a", "b", EOS, PAD), ids_of(tokenizer, "Ġ", "Ċ", "a", "b")])
    mask = ids != tokenizer.pad_token_id
    states = torch.tensor([[7, 2, 5, 0], [1, 3, 4, 6]], dtype=torch.int8)
    entropy = torch.tensor([[0.123456, 2.0, 1e-6, 9.0], [math.nan, math.inf, 0.5, 0.25]])
    write(log, ids, step=17, prompt=prompt, mask=mask, entropy=entropy, states=states,
          advantage=torch.tensor([0.70710678, -math.inf]),
          rewards={"right": torch.tensor([1.0, math.nan], dtype=torch.float64), "form": [0.1, None]})  # fmt: skip
    assert lines_of(log.path) == [
        {"step": 17, "prompt": "<eos>the", "tokens": ["a", "b", "<eos>"], "entropy": [0.1235, 2.0, 0.0], "state": "lec",
         "advantage": 0.7071, "rewards": {"right": 1.0, "form": 0.1}},
        {"step": 17, "prompt": "<eos>the", "tokens": [" ", "\n", "a", "b"], "entropy": [None, None, 0.5, 0.25],
         "state": "dovp", "advantage": None, "rewards": {"right": None, "form": None}},
    ]  # fmt: skip


def test_each_byte_of_a_character_is_shown_and_the_last_completes_it(tmp_path):
    tokenizer = byte_level()
    ids = torch.tensor([tokenizer.encode(TEXT)])
    tokens = tokens_of(tmp_path, tokenizer, ids)
    assert tokens == ["th", "e", " ", "c", "a", "f", "⟨C3⟩", "é", " ", *EMOJI, " ", "e", "n", "d", "s", "\n"]
    assert "".join(t for t in tokens if not t.startswith("⟨")) == tokenizer.decode(ids[0]) == TEXT


def test_bytes_that_are_no_text(tmp_path):
    tokenizer = byte_level()
    alphabet = {b: c for c, b in zip("ðŁĺĢÿ", (0xF0, 0x9F, 0x98, 0x80, 0xFF), strict=True)}
    broken = (
        [alphabet[b] for b in (0x80, 0xFF, 0xF0, 0x9F)] + ["a"] + [alphabet[b] for b in (0xF0, 0xF0, 0x9F, 0x98, 0x80)]
    )
    found = tokens_of(tmp_path, tokenizer, ids_of(tokenizer, *broken))
    assert found == ["⟨80⟩", "⟨FF⟩", "⟨F0⟩", "⟨9F⟩", "a", "⟨F0⟩", *EMOJI]


def test_sentencepiece_keeps_its_spaces_and_its_bytes(tmp_path):
    tokenizer = sentencepiece()
    ids = ids_of(tokenizer, "▁the", "▁", "end", "s", "<0x0A>", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", EOS)
    found = tokens_of(tmp_path, tokenizer, ids)
    assert found == [" the", " ", "end", "s", "\n", *EMOJI, EOS]


def test_the_replacement_character_itself_is_text(tmp_path):
    tokenizer = byte_level()
    ids = torch.tensor([tokenizer.encode("\ufffd")])
    assert tokens_of(tmp_path, tokenizer, ids) == ["⟨EF⟩", "⟨BF⟩", "\ufffd"]


def test_an_id_beyond_the_tokenizer_is_named(tmp_path):
    assert tokens_of(tmp_path, byte_level(), torch.tensor([[999]])) == ["⟨no token 999⟩"]


def test_only_padding_at_the_end_is_left_out(tmp_path):
    tokenizer = byte_level()
    log = TokenLog(tmp_path, tokenizer)
    ids = ids_of(tokenizer, "a", PAD, "b", PAD, PAD)
    write(log, ids, mask=torch.tensor([[True, False, False, False, False]]))  # a tool's output in the middle
    write(log, ids, mask=torch.zeros(1, 5, dtype=torch.bool))  # a truncated completion that is left out
    write(log, ids, mask=torch.ones(1, 5, dtype=torch.bool))  # generated padding
    assert [len(line["tokens"]) for line in lines_of(log.path)] == [3, 3, 5]


def test_the_prompts_padding(tmp_path):
    tokenizer = byte_level()
    log = TokenLog(tmp_path, tokenizer)
    prompt = ids_of(tokenizer, PAD, PAD, "a", PAD, "b")
    write(log, ids_of(tokenizer, "c"), prompt=prompt)
    write(log, ids_of(tokenizer, "c"), prompt=prompt, prompt_mask=torch.tensor([[False, True, True, True, True]]))
    assert [line["prompt"] for line in lines_of(log.path)] == ["a<pad>b", "<pad>a<pad>b"]


def test_an_advantage_per_token(tmp_path):
    log = TokenLog(tmp_path, byte_level())
    write(log, torch.tensor([[5, 6, 7]]), advantage=torch.tensor([[0.5, -1.25, math.nan]]))
    assert lines_of(log.path)[0]["advantage"] == [0.5, -1.25, None]


def test_resuming_appends_and_cuts_off_what_was_not_finished(tmp_path):
    tokenizer, ids = byte_level(), torch.tensor([[5, 6]])
    first = TokenLog(tmp_path, tokenizer)
    write(first, ids, step=1)
    with first.path.open("a") as file:
        file.write('{"step": 2, "prompt": "' + "x" * 10_000)
    write(TokenLog(tmp_path, tokenizer), ids, step=3)
    assert [line["step"] for line in lines_of(first.path)] == [1, 3]
    first.path.write_text('{"torn')
    write(TokenLog(tmp_path, tokenizer), ids, step=4)
    assert [line["step"] for line in lines_of(first.path)] == [4]


def test_each_tensor_is_brought_to_the_host_once(tmp_path, monkeypatch):
    log, calls = TokenLog(tmp_path, byte_level()), []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: calls.append(x.shape) or tolist(x))
    monkeypatch.setattr(torch.Tensor, "item", lambda x: pytest.fail("a transfer of one number"))
    write(log, torch.full((4, 6), 5), rewards={"right": torch.ones(4)})
    assert len(calls) == 7


@pytest.mark.parametrize("change, error, message", [
    ({"mask": torch.ones(1, 2)}, TypeError, "mask: found dtype"),
    ({"entropy": torch.ones(2, 2)}, ValueError, r"entropy: found shape \(2, 2\), expected \(1, 2\)"),
    ({"states": torch.ones(1, 3)}, ValueError, "states: found shape"),
    ({"advantage": torch.ones(2)}, ValueError, r"advantage: found shape \(2,\), expected \[B\] = \(1,\)"),
    ({"prompt": torch.ones(2, 3)}, ValueError, "prompt_ids: found 2 prompts, expected 1"),
    ({"rewards": {"right": [1.0, 2.0]}}, ValueError, r"rewards\['right'\]: found 2 numbers, expected 1"),
    ({"prompt": torch.ones(1, 3), "prompt_mask": torch.ones(1, 2)}, ValueError, "prompt_mask: found shape"),
])  # fmt: skip
def test_bad_arguments_are_named_and_nothing_is_written(tmp_path, change, error, message):
    log = TokenLog(tmp_path, byte_level())
    with pytest.raises(error, match=message):
        write(log, torch.tensor([[5, 6]]), **change)
    assert not log.path.exists()


def on_log(log, logs, step=1, main=True):
    log.on_log(None, SimpleNamespace(is_world_process_zero=main, global_step=step), None, logs=logs)


def test_metrics_are_finite_numbers_or_null(tmp_path):
    log = MetricsLog(tmp_path / "run")
    odd = {"text": "x", "many": [1.0], "flag": True, "nothing": None, "step": 99}
    logs = {
        "loss": 0.5,
        "bad": math.nan,
        "worse": -math.inf,
        "np": np.float32(0.25),
        "tensor": torch.tensor(2.0),
        "n": 3,
    }
    on_log(log, {**logs, **odd}, step=7)
    on_log(log, {"loss": 0.25}, step=8)
    assert lines_of(log.path) == [
        {"loss": 0.5, "bad": None, "worse": None, "np": 0.25, "tensor": 2.0, "n": 3, "step": 7},
        {"loss": 0.25, "step": 8},
    ]


def test_only_the_main_process_writes_metrics(tmp_path):
    on_log(MetricsLog(tmp_path), {"loss": 0.5}, main=False)
    on_log(MetricsLog(tmp_path), None)
    assert list(tmp_path.iterdir()) == []


def test_metrics_resume(tmp_path):
    on_log(MetricsLog(tmp_path), {"loss": 0.5}, step=1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"lo')
    on_log(MetricsLog(tmp_path), {"loss": 0.25}, step=2)
    assert [line["step"] for line in lines_of(tmp_path / "metrics.jsonl")] == [1, 2]
