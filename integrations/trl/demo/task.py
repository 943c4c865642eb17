"""Define a task small enough for two CPU cores: add or subtract two numbers, and wrap the answer in a tag.

For the prompt ``27+15=`` the right completion is ``<a>42</a>``, with one token per character. A seed determines
everything: tokenizer, model, prompts and the text of the supervised warm start. That text has wrong answers and broken
tags on purpose. The policy therefore starts with medium rewards and with entropy to lose.

The two rewards are independent: a right number in a broken tag earns only `answer_right`, and a wrong number in a
proper tag earns only `format_right`. If such rewards are summed before they are normalised, the sum hides which one was
earned.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"
ALPHABET = "0123456789+-=<>/a"
MAX_COMPLETION_LENGTH = 12
"""In tokens: ``<a>``, up to three digits, ``</a>``, end of text, and one spare token."""

WRONG_ANSWER_SHARE = 0.15
BROKEN_FORMAT_SHARE = 0.5
_HELD_OUT_SHARE = 0.1
_NUMBER = re.compile(r"-?\d+")
_WELL_FORMED = re.compile(r"<a>-?\d+</a>")
_BROKEN_FORMATS = ("{}", "<a>{}", "{}</a>", "<a>{}<a>", "<a{}</a>", "a{}a")


@dataclass(frozen=True)
class Problem:
    """One sum or difference: `prompt` is ``"27+15="`` and `answer` is 42."""

    prompt: str
    answer: int


def make_problems(*, operand_limit: int = 25, seed: int = 0) -> tuple[list[Problem], list[Problem]]:
    """Make all ``a+b``, and all ``a-b`` >= 0, with 0 <= a, b < `operand_limit`. Return (training, held out).

    The held-out tenth appears neither in the warm start nor among the prompts of the policy training.
    """
    if operand_limit < 2:
        raise ValueError(f"operand_limit: found {operand_limit}, expected at least 2")
    operands = range(operand_limit)
    problems = [Problem(f"{a}+{b}=", a + b) for a in operands for b in operands]
    problems += [Problem(f"{a}-{b}=", a - b) for a in operands for b in range(a + 1)]
    random.Random(seed).shuffle(problems)
    held_out = max(1, int(len(problems) * _HELD_OUT_SHARE))
    return problems[held_out:], problems[:held_out]


def make_dataset(problems: list[Problem]) -> Dataset:
    """Make a `datasets.Dataset` with the columns ``prompt`` (str) and ``answer`` (int), as GRPO trainers take it."""
    return Dataset.from_dict({"prompt": [p.prompt for p in problems], "answer": [p.answer for p in problems]})


def answer_right(completions: list[str], answer: list[int], **_: object) -> list[float]:
    """Return 1.0 for each completion whose first number is the answer, with or without tags, else 0.0."""
    found = (_NUMBER.search(text) for text in completions)
    return [float(match is not None and int(match.group()) == a) for match, a in zip(found, answer, strict=True)]


def format_right(completions: list[str], **_: object) -> list[float]:
    """Return 1.0 for each completion that is exactly ``<a>``, a whole number (right or wrong), ``</a>``, else 0.0."""
    return [float(_WELL_FORMED.fullmatch(text) is not None) for text in completions]


REWARDS: tuple[Callable[..., list[float]], ...] = (answer_right, format_right)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per character of `ALPHABET`. It pads on the left, as generation requires."""
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_model(*, seed: int = 0, hidden_size: int = 128, layers: int = 3) -> LlamaForCausalLM:
    """Make an fp32 Llama with random weights. It has 0.5 million parameters at the default size."""
    config = LlamaConfig(
        vocab_size=len(ALPHABET) + 2,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.06,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def imperfect_completion(problem: Problem, rng: random.Random) -> str:
    """A warm-start completion, with a wrong number in `WRONG_ANSWER_SHARE`, a broken tag in `BROKEN_FORMAT_SHARE`."""
    number = problem.answer
    if rng.random() < WRONG_ANSWER_SHARE:
        number += rng.choice((-10, -2, -1, 1, 2, 10))
    template = rng.choice(_BROKEN_FORMATS) if rng.random() < BROKEN_FORMAT_SHARE else "<a>{}</a>"
    return template.format(number)


def warm_start(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: list[Problem],
    *,
    steps: int = 240,
    batch_size: int = 64,
    seed: int = 0,
) -> Iterator[float]:
    """Train in place on texts of `imperfect_completion`. Yield each step's loss in nats per completion token."""
    rng = random.Random(seed)
    optimizers = _optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(1.0, 2 * (1 - step / steps))) for o in optimizers
    ]
    model.train()
    for _ in range(steps):
        chosen = rng.choices(problems, k=batch_size)
        texts = [p.prompt + imperfect_completion(p, rng) + EOS for p in chosen]
        batch = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
        # Padding is on the left, so each completion ends at the right edge, and its length gives its first column.
        lengths = torch.tensor([len(tokenizer.tokenize(t)) - len(p.prompt) for t, p in zip(texts, chosen, strict=True)])
        positions = torch.arange(batch["input_ids"].shape[1]) - batch["input_ids"].shape[1]
        counts = (positions[None, :] >= -lengths[:, None]).to(model.device)
        loss = model(**batch, labels=batch["input_ids"].masked_fill(~counts, -100)).loss
        model.zero_grad()
        loss.backward()
        for part in (*optimizers, *schedules):
            part.step()
        yield float(loss.detach())
    model.eval()


def _optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the matrices, which needs about half of AdamW's steps to learn the sums."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (matrices if "_proj." in name else others).append(parameter)
    return [torch.optim.AdamW(others, lr=6e-3, betas=(0.9, 0.95)), _Muon(matrices, {"lr": 0.02})]


class _Muon(torch.optim.Optimizer):
    """Muon without weight decay, in fp32. torch 2.8 has no Muon, and torch.optim.Muon multiplies in bf16, which is many
    times slower on a CPU without bf16 units. Source: Keller Jordan, kellerjordan.github.io/posts/muon.
    """

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 0.05)
                update = _orthogonal(p.grad.lerp(momentum, 0.95))
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def _orthogonal(matrix: Tensor) -> Tensor:
    """Approximate the nearest orthogonal matrix by five Newton-Schulz steps."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / wide.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide is matrix else x.T


@torch.no_grad()
def evaluate(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: list[Problem],
    *,
    samples: int = 4,
    seed: int = 0,
    batch_size: int = 512,
) -> dict[str, tuple[float, float]]:
    """Sample `samples` completions per problem at temperature 1 and score them.

    Returns reward name -> (mean, standard error of the mean over problems). The samples depend on `seed` alone.
    """
    if samples < 1 or not problems:
        raise ValueError(
            f"samples and problems: found {samples} and {len(problems)} problems, expected at least 1 each"
        )
    model.eval()
    policy: Any = model  # transformers' generation does not declare its types
    repeated = [p for p in problems for _ in range(samples)]
    texts: list[str] = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for first in range(0, len(repeated), batch_size):
            prompts = [p.prompt for p in repeated[first : first + batch_size]]
            batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
            ids = policy.generate(
                **batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=MAX_COMPLETION_LENGTH
            )
            new_ids = ids[:, batch["input_ids"].shape[1] :]
            texts += tokenizer.batch_decode(new_ids, skip_special_tokens=True)
    answers = [p.answer for p in repeated]
    scores: dict[str, tuple[float, float]] = {}
    for reward in REWARDS:
        per_problem = (
            torch.tensor(reward(completions=texts, answer=answers), dtype=torch.float64).view(-1, samples).mean(1)
        )
        spread = per_problem.std(correction=1) if len(problems) > 1 else torch.zeros(())
        scores[reward.__name__] = (float(per_problem.mean()), float(spread / len(problems) ** 0.5))
    return scores
