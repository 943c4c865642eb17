"""Test the log of a run: its lines, texts of tokens that are partial characters, resuming, and non-finite numbers."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlloss.integrations.transformers.token_log import MetricsLog, TokenLog
from rlloss.losses.token_states import TokenState
from rlloss.report.run_log import read_run

PAD, EOS = "<pad>", "<eos>"
TEXT = "the café 😀 ends\n"
EMOJI = ["⟨F0⟩", "⟨9F⟩", "⟨98⟩", "😀"]


def byte_level():
    """A byte-level BPE with one token per byte and one merge."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, *alphabet, "th"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


def sentencepiece():
    """Words with the prefix ▁, and bytes for all other text, as in the tokenizers of Llama and Gemma."""
    tokens = [PAD, EOS, "<unk>", "▁the", "▁", "end", "s", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token="<unk>")


def ids_of(tokenizer, *tokens):
    return torch.tensor([tokenizer.convert_tokens_to_ids(list(tokens))])


def write(log, ids, *, step=1, prompt=None, **changes):
    """Write one batch, with defaults for everything that is not given."""
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
    assert [(line["step"], "resumed" in line) for line in lines_of(first.path)] == [(1, False), (3, True), (3, False)]
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
    assert lines_of(tmp_path / "metrics.jsonl") == [
        {"loss": 0.5, "step": 1}, {"step": 2, "resumed": True}, {"loss": 0.25, "step": 2},
    ]  # fmt: skip


def train(folder, *, processes, begins, steps, every=1, text=5):
    """Call the logs as a trainer does: completions with the number of finished steps, metrics after the step."""
    tokenizer, args = byte_level(), SimpleNamespace(world_size=processes)
    logs = [TokenLog(folder, tokenizer, process_index=n) for n in range(processes)]
    metrics = MetricsLog(folder)
    for log in (*logs, metrics):
        log.on_train_begin(args, SimpleNamespace(global_step=begins), None)
    for step in steps:
        for log in logs if step % every == 0 else ():
            write(log, torch.tensor([[text]]), step=step)
        on_log(metrics, {f"loss{text}": 0.5}, step=step + 1)


@pytest.mark.parametrize("processes", [(2, 1), (1, 2), (3, 2, 3, 1)])
@pytest.mark.parametrize("every", [1, 2])
def test_what_a_resumed_run_discards_is_left_out_whatever_its_processes(tmp_path, processes, every):
    """The first run continues beyond its checkpoint after step 2. Each later run repeats the steps from there."""
    for number, count in enumerate(processes):
        # In the first repetition no step goes back: the run was killed in the step after its checkpoint.
        steps = range(5) if number == 0 else range(2, 3 + number)
        train(tmp_path, processes=count, begins=2 * (number > 0), steps=steps, every=every if number == 0 else 1,
              text=5 + number)  # fmt: skip
    run, last = read_run(tmp_path), len(processes) - 1
    old = [0, 1][::every]
    found = sorted((c.step, c.tokens[0]) for c in run.completions)
    texts = [run.texts[t] for t in (byte_level().convert_ids_to_tokens([5, 5 + last]))]
    expected = [(s, texts[0]) for s in old] * processes[0] + [(s, texts[1]) for s in range(2, 3 + last)] * processes[-1]
    assert found == sorted(expected) and run.unreadable == []
    assert run.metrics == {
        "loss5": {1: 0.5, 2: 0.5}, f"loss{5 + last}": dict.fromkeys(range(3, 4 + last), 0.5),
    }  # fmt: skip


def test_a_run_that_is_begun_anew_replaces_the_old_one_with_its_first_line(tmp_path):
    train(tmp_path, processes=2, begins=0, steps=range(3))
    train(tmp_path, processes=1, begins=0, steps=[], text=6)
    assert len(read_run(tmp_path).completions) == 6
    train(tmp_path, processes=1, begins=0, steps=[0], text=6)
    run = read_run(tmp_path)
    assert [c.step for c in run.completions] == [0] and run.metrics == {"loss6": {1: 0.5}}


def test_a_directory_in_the_place_of_a_log_is_named_before_training(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ValueError, match="folder: found a directory .*metrics.jsonl, expected a file, or none"):
        MetricsLog(tmp_path)
    (tmp_path / "tokens" / "process-00000.jsonl").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match="process-00000.jsonl"):
        TokenLog(tmp_path, byte_level())


def test_a_run_says_what_it_is_and_what_was_found(tmp_path):
    found = []
    log = MetricsLog(tmp_path, lambda: {"model": "m", "options": {"seed": 3}}, lambda: found)
    state = SimpleNamespace(global_step=0, is_world_process_zero=True)
    log.on_train_begin(None, state, None)
    assert read_run_json(tmp_path) == {"model": "m", "options": {"seed": 3}}
    for step in (1, 2, 3):
        state.global_step = step
        if step != 2:
            found.append((step, "kind", f"message ⟨{step}⟩"))
        log.on_log(None, state, None, logs={"loss": 1.0})
        log.on_step_end(None, state, None)
    # Resumed from step 2: a finding of step 3 may be found again or not.
    again = MetricsLog(tmp_path, lambda: {"model": "m2"}, lambda: [(3, "kind", "another")])
    state.global_step = 2
    again.on_train_begin(None, state, None)
    state.global_step = 3
    again.on_log(None, state, None, logs={"loss": 2.0})
    again.on_train_end(None, state, None)
    run = read_run(tmp_path)
    assert run.findings == [(1, "kind", "message ⟨1⟩"), (3, "kind", "another")] and run.about["model"] == "m2"
    assert run.metrics == {"loss": {1: 1.0, 2: 1.0, 3: 2.0}}
    (tmp_path / "findings.jsonl").write_text("{\n")
    (tmp_path / "run.json").write_text("[1]")
    run = read_run(tmp_path)
    assert run.findings == [] and run.about == {} and {n.partition(" ")[0] for n in run.unreadable} == {
        "findings.jsonl:1", "run.json",
    }  # fmt: skip


def read_run_json(folder):
    return json.loads((folder / "run.json").read_text())
