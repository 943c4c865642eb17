"""Test the lines that a TRL run prints about itself, and compare their numbers with counts of the run."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rlloss import __version__
from rlloss.integrations.trl import run_summary
from rlloss.integrations.trl.trainer import GRPOConfig, GRPOTrainer
from rlloss.integrations.trl.zero_advantage import counted_tokens, dead_completions
from rlloss.lm_head import matmul as products
from rlloss.lm_head import vocab_loop
from rlloss.lm_head.matmul import count_products
from tests.support.host_reads import HostReads
from tests.support.ranks import on_ranks
from tests.support.trl_harness import VOCABULARY, WithTrlsLoss, build_trainer, model_inputs

NAMES = ("rlloss/products", "rlloss/products_plain", "rlloss/logits_mib_avoided")


class Watched(GRPOTrainer):
    """Stores the micro-batches of the loss, and pads their completions by `pads` columns."""

    pads = 0
    seen: list

    def _compute_loss(self, model, inputs):
        if self.pads:
            inputs = dict(inputs)
            for name in ("completion_ids", "completion_mask"):
                inputs[name] = torch.nn.functional.pad(inputs[name], (0, self.pads))
        self.seen.append(inputs)
        return super()._compute_loss(model, inputs)


def half(prompts, completion_ids, **_):
    """A reward that differs between the completions of every other prompt."""
    return [
        float(ids[0]) + 1e-3 * i if int(prompt.split()[0][1:]) % 2 else 1.0
        for i, (prompt, ids) in enumerate(zip(prompts, completion_ids, strict=True))
    ]


def trainer_of(folder, rewards=half, pads=0, **options):
    options = {"per_device_train_batch_size": 8, "max_steps": 2, "learning_rate": 1e-2} | options
    trainer = build_trainer(Watched, GRPOConfig, folder, rewards, **options)
    trainer.seen, trainer.pads = [], pads
    return trainer


def plain_flop(trainer, inputs) -> int:
    """FLOP of the lm_head's products with plain logits of the completions, forward and backward."""
    T = inputs["completion_ids"].shape[1]
    model = trainer.accelerator.unwrap_model(trainer.model)
    with torch.no_grad():
        hidden = model.model(**model_inputs(inputs)).last_hidden_state[:, -T - 1 : -1]
    hidden.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        logits = model.lm_head(hidden)
        assert logits.shape == (*inputs["completion_ids"].shape, VOCABULARY)
        logp = logits.log_softmax(-1).gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1)
        (logp * counted_tokens(inputs)).sum().backward()
    return counter.get_total_flops()


RUNS = {
    "as it comes": {},
    "windows": {"top_entropy_quantile": 0.3, "gradient_accumulation_steps": 2, "logging_steps": 2, "max_steps": 4},
    "dropped": {"zero_advantage": "drop"},
    "padded, kept": {"pads": 5, "lm_head_plan": "keep"},
    "frozen head": {"frozen": True},
    "padded, recomputed": {"pads": 5, "lm_head_plan": "recompute"},
    "a window's cutoff": {
        "top_entropy_quantile": 0.3, "entropy_scope": "window", "gradient_accumulation_steps": 2,
        "steps_per_generation": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", list(RUNS))
def test_products_and_logits_are_those_that_ran(tmp_path, monkeypatch, capsys, name):
    options = dict(RUNS[name])
    frozen, logging_steps = options.pop("frozen", False), options.get("logging_steps", 1)
    trainer = trainer_of(tmp_path, **options)
    trainer.model.lm_head.requires_grad_(not frozen)
    blocks, multiply = [], products.multiply

    def watched(out, a, b, kind, **settings):
        if kind in ("logits", "recompute"):
            blocks.append(out.numel() * 4)
        return multiply(out, a, b, kind, **settings)

    monkeypatch.setattr(vocab_loop, "multiply", watched)
    steps = []
    training_step = trainer.training_step

    def counted(*args, **kwargs):
        with count_products() as found:
            result = training_step(*args, **kwargs)
        steps.append((sum(found.flop.values()), max(blocks)))
        blocks.clear()
        return result

    monkeypatch.setattr(trainer, "training_step", counted)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "entropy" in log]
    per_log, unit = len(steps) // len(logs), 2 * VOCABULARY * 32
    assert len(logs) == trainer.state.max_steps // logging_steps and len(steps) == len(trainer.seen)
    for i, log in enumerate(logs):
        of = slice(i * per_log, (i + 1) * per_log)
        batches = trainer.seen[of]
        tokens = sum(counted_tokens(inputs).sum().item() for inputs in batches)
        assert log["rlloss/products"] == pytest.approx(sum(flop for flop, _ in steps[of]) / unit / tokens)
        plain = sum(plain_flop(trainer, inputs) for inputs in batches)
        assert log["rlloss/products_plain"] == pytest.approx(plain / unit / tokens)
        largest = max(inputs["completion_ids"].numel() for inputs in batches) * VOCABULARY * 4
        held = max(bytes for _, bytes in steps[of])
        assert log["rlloss/logits_mib_avoided"] == pytest.approx((largest - held) / 2**20)

    said = capsys.readouterr().out
    (end,) = re.findall(r"^rlloss: .* had a gradient.*", said, re.M)
    tokens = sum(counted_tokens(inputs).sum().item() for inputs in trainer.seen)
    dead = sum(dead_completions(inputs).sum().item() for inputs in trainer.seen)
    all_dead = sum(bool(dead_completions(inputs).all()) for inputs in trainer.seen)  # one of them has to run
    completions = sum(len(inputs["completion_ids"]) for inputs in trainer.seen)
    assert f"of {tokens:,} tokens had a gradient; " in end
    products_a_token = sum(flop for flop, _ in steps) / unit / tokens
    plain_a_token = sum(plain_flop(trainer, inputs) for inputs in trainer.seen) / unit / tokens
    assert f"{products_a_token:.3g} lm_head products a token instead of {plain_a_token:.3g} (plain" in end
    assert f"{dead - all_dead} of {completions} completions ran without a backward" in end
    share = sum(log["rlloss/live_share"] for log in logs) / len(logs)
    if name == "as it comes":
        assert dead > 0 and 0 < share < 1
        found = int(re.match(r"rlloss: (\d+) % of", end)[1])
        lives = [log["rlloss/live_share"] * counted_tokens(x).sum().item()
                 for log, x in zip(logs, trainer.seen, strict=True)]  # fmt: skip
        assert found == round(100 * sum(lives) / tokens)
    held = max(bytes for _, bytes in steps)
    largest = max(inputs["completion_ids"].numel() for inputs in trainer.seen) * VOCABULARY * 4
    assert f"at most {held / 2**20:.3g} MiB of logits at a time instead of {largest / 2**20:.3g} MiB" in end


def test_passes_of_the_generation_are_not_counted(tmp_path):
    """With two iterations the old log-probabilities need a separate pass."""
    trainer = trainer_of(tmp_path, num_iterations=2, zero_advantage="keep", loss_type="dapo", lm_head_plan="keep")
    with count_products() as everything:
        trainer.train()
    logs = [log for log in trainer.state.log_history if "rlloss/products" in log]
    tokens = [counted_tokens(inputs).sum().item() for inputs in trainer.seen]
    unit = 2 * VOCABULARY * 32
    of_loss = sum(log["rlloss/products"] * n * unit for log, n in zip(logs, tokens, strict=True))
    assert len(logs) == 2 and of_loss == pytest.approx(sum(everything.flop.values()) - tokens[0] * unit)


@pytest.mark.parametrize("options, parts", [
    ({}, [f"torch backend ({'the model is on the cpu' if torch.cuda.is_available() else 'no CUDA device'}); ",
          "lm_head plan keep (no plan has fewer products) with up to 8 x 8 tokens, 48 x 32 float32; completions whose "
          "advantage is 0 run forward only."]),
    ({"lm_head_memory_budget": 12288}, ["lm_head plan keep (no plan has fewer products) with up to 8 x 8"]),
    ({"lm_head_memory_budget": 12287}, ["lm_head plan recompute (keep is not possible: it needs 12 KiB, and"]),
    ({"lm_head_plan": "keep", "lm_head_memory_budget": 12287, "max_completion_length": 9, "pads": -1},
     ["lm_head plan keep (it was asked for) with up to 8 x 9"]),  # more than fits, which no micro-batch has
    ({"lm_head_plan": "recompute", "zero_advantage": "drop"},
     ["lm_head plan recompute (it was asked for)", "completions whose advantage is 0 do not run."]),
    ({"lm_head_plan": "trl", "zero_advantage": "keep"},
     ["lm_head TRL's own (lm_head_plan='trl');", "run as the others do (zero_advantage='keep')."]),
    ({"beta": 0.04}, ["completions whose advantage is 0 run as the others do (beta=0.04)."]),
    ({"entropy_coef": 0.1}, ["run as the others do (an entropy bonus)."]),
], ids=str)  # fmt: skip
def test_the_first_line_says_what_will_happen(tmp_path, capsys, monkeypatch, options, parts):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    trainer = trainer_of(tmp_path, max_steps=1, **options)
    capsys.readouterr()
    trainer.train()
    said = capsys.readouterr().out.splitlines()
    first = said[0]
    assert first.startswith(f"rlloss {__version__}: ")
    assert all(part in first for part in parts), first
    last = [line for line in said if "tokens had a gradient; " in line]
    assert len(last) == 1
    with_trls_head = options.get("lm_head_plan") == "trl"
    assert ("lm_head products" in last[0]) != with_trls_head and ("MiB" in last[0]) != with_trls_head
    assert all((name in trainer.state.log_history[0]) != with_trls_head for name in NAMES)


def test_with_trls_own_loss_the_line_says_so(tmp_path, capsys):
    trainer = build_trainer(WithTrlsLoss, GRPOConfig, tmp_path, half, max_steps=1, top_entropy_quantile=0.5)
    trainer.train()
    said = capsys.readouterr().out
    assert "; the loss is TRL's own (get_high_entropy_mask overridden); lm_head plan " in said
    assert "had a gradient" not in said and not set(NAMES) & set(trainer.state.log_history[0])


def test_the_last_line_names_the_next_command(tmp_path, capsys):
    for written in (0, 1):
        trainer_of(tmp_path, max_steps=1, token_log_steps=written).train()
        said = capsys.readouterr().out
        assert (f"Next: `rlloss report {tmp_path}`." in said) == bool(written)
        assert (f"Next: token_log_steps=20, then `rlloss report {tmp_path}`." in said) != bool(written)


def test_a_user_who_asks_for_errors_alone_sees_no_line(tmp_path, capsys):
    from transformers.utils import logging

    before = logging.get_verbosity()
    try:
        trainer = trainer_of(tmp_path, max_steps=1, log_level="error")
        trainer.train()
    finally:
        logging.set_verbosity(before)
    assert "rlloss" not in capsys.readouterr().out.replace("'rlloss/", "") and len(trainer.state.log_history) == 2


def test_a_second_run_begins_anew(tmp_path, capsys):
    trainer = trainer_of(tmp_path, max_steps=1)
    lines = []
    for _ in range(2):
        trainer.seen.clear()
        trainer.train()
        lines += re.findall(r"^rlloss: .*? tokens had", capsys.readouterr().out, re.M)
        tokens = sum(counted_tokens(inputs).sum().item() for inputs in trainer.seen)
        assert f" of {tokens:,} tokens had" in lines[-1]
    assert len(lines) == 2


def test_counting_does_not_wait_for_the_device(tmp_path):
    trainer = trainer_of(tmp_path)
    summary = trainer._summary
    summary.on_train_begin(trainer.args, trainer.state, trainer.control)
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    with HostReads() as reads:
        for _ in range(2):  # the second is added to the first
            with summary.micro_batch():
                summary.loss_begins(torch.zeros(2, 3, dtype=torch.int64))
                summary.tokens(1.0, 6.0)
    assert summary._window[0, 3] == 4 and not reads.found


OF_RANKS = {"per_device_train_batch_size": 4, "steps_per_generation": 1, "ddp_timeout": 60}


def _on_a_rank(rank: int, port: int, folder: str) -> None:
    trainer = trainer_of(f"{folder}/{rank}", **OF_RANKS)
    with count_products() as found:  # no pass of the generation: one update each
        trainer.train()
    tokens = sum(counted_tokens(inputs).sum().item() for inputs in trainer.seen)
    sums = trainer.accelerator.reduce(torch.tensor([sum(found.flop.values()), tokens], dtype=torch.float64))
    logs = [log for log in trainer.state.log_history if "rlloss/products" in log]
    run = trainer._summary._run
    assert len(logs) == 2 and run.flop == sums[0] and trainer._summary._tokens == sums[1] > tokens
    assert run.completions == 16
    Path(folder, f"logs-{rank}").write_text(repr([[log[name] for name in NAMES] for log in logs]))


def test_two_ranks_count_together(tmp_path, capfd):
    on_ranks(_on_a_rank, 2, str(tmp_path))
    first, second = ((tmp_path / f"logs-{rank}").read_text() for rank in (0, 1))
    assert first == second
    assert len(re.findall(r"^rlloss: .* of 16 completions", capfd.readouterr().out, re.M)) == 1


@pytest.mark.slow
def test_a_compiled_model_counts_too(tmp_path, monkeypatch):
    """Compiled calls report no plan. They hold at most one tile of the whole micro-batch."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # transformers sets it; put back at the end
    trainer = trainer_of(tmp_path, torch_compile=True, torch_compile_backend="eager", max_steps=1, pads=20)
    calls = []
    monkeypatch.setattr(trainer._summary, "saw", lambda report: calls.append(report))
    with count_products() as found:
        trainer.train()
    trainer.accelerator.state.dynamo_plugin.backend = "NO"  # the state is that of all trainers of the process
    (inputs,) = trainer.seen
    log, tokens = trainer.state.log_history[0], counted_tokens(inputs).sum().item()
    assert calls == []
    assert log["rlloss/products"] == pytest.approx(sum(found.flop.values()) / (2 * VOCABULARY * 32 * tokens))
    held = inputs["completion_ids"].numel() * VOCABULARY * 4 - log["rlloss/logits_mib_avoided"] * 2**20
    assert held >= tokens * VOCABULARY * 4


def test_a_head_that_is_taken_apart_has_the_shape_of_the_configuration(tmp_path):
    trainer: Any = trainer_of(tmp_path)
    whole = run_summary._head(trainer)
    assert whole[:3] == (VOCABULARY, 32, 2)
    for piece in (torch.empty(0), torch.empty(VOCABULARY * 32 // 2)):
        trainer.model.lm_head.weight.data = piece
        assert run_summary._head(trainer) == whole
    trainer.model.get_output_embeddings = lambda: None
    assert run_summary._head(trainer) is None
