"""What the lm_head of a model costs in a micro-batch: rlloss's plans beside plain logits, TRL's and Liger's heads.

n tokens count of the N columns of a micro-batch, r is the share of them with a gradient, V and D are the head's entries
and width, g is 1 where the head is trained and 0 where it is frozen. Products with the head, in logits of n tokens:

    plain logits    (2 + g) N / n         forward, gradient of hidden, gradient of weight; padding too
    TRL             3 + g                 logits again in the backward; on a CPU of all N columns
    Liger           (3 + g) N / n         the same, a completion at a time, padding too
    rlloss          rlloss.lm_head.plans

The largest block of logits, in bytes: 4 N V (plain logits, the fp32 log-softmax that the backward needs), one tile of
4,096 x 32,768 in the model's dtype (TRL), an fp32 tile of at most 2,048 x 4,096 (Liger), one tile and what the plan
keeps (rlloss). At one time more is alive: of plain logits three such blocks in the backward, of Liger several tiles, of
rlloss on a GPU with a 16-bit model half a tile for its gradient. `tests/house/test_plan.py` compares each line
with what is counted; Liger's where it is installed.
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlloss import checks
from rlloss.config import LossConfig
from rlloss.lm_head.explain import explain_plan
from rlloss.lm_head.plans import PLANS, size_text

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TRL_TILE, LIGER_TILE = (4096, 32768), (2048, 4096)  # rows, vocabulary entries


class Way(NamedTuple):
    """One way to run the head. products: in logits of the tokens that count. logits_bytes: the largest block of
    logits, with a plan of rlloss also what it keeps. why_not: what forbids a plan of rlloss here, or None."""

    name: str
    products: float
    flop: int
    logits_bytes: int
    why_not: str | None = None


class HeadCosts(NamedTuple):
    """What `head_costs` found; str() of it is the text of `rlloss plan`.

    shape: (V, D). tokens: those that count. plan, why: the one that rlloss takes, and the reason. backbone_flop:
    forward and backward of the model without its head, attention scores left out; None where the config does not say.
    """

    shape: tuple[int, int]
    dtype: str
    frozen_head: bool
    completions: int
    columns: int
    tokens: int
    live_share: float
    device: str
    ways: tuple[Way, ...]
    plan: str
    why: str
    backbone_parameters: int | None
    backbone_flop: int | None

    @property
    def taken(self) -> Way:
        return next(way for way in self.ways if way.name == f"rlloss {self.plan}")

    @property
    def head_share(self) -> float | None:
        """The head's share of the FLOP of a forward and backward with plain logits."""
        if self.backbone_flop is None:
            return None
        return self.ways[0].flop / (self.ways[0].flop + self.backbone_flop)

    @property
    def step_share(self) -> float | None:
        """FLOP of a forward and backward with rlloss's plan, divided by those with plain logits."""
        if self.backbone_flop is None:
            return None
        return (self.taken.flop + self.backbone_flop) / (self.ways[0].flop + self.backbone_flop)

    def to_dict(self) -> dict[str, Any]:
        ways = [way._asdict() for way in self.ways]
        return self._asdict() | {"ways": ways, "head_share": self.head_share, "step_share": self.step_share}

    def __str__(self) -> str:
        V, D = self.shape
        head = "frozen" if self.frozen_head else "trained"
        lines = [
            f"lm_head {V:,} x {D:,}, {self.dtype}, {head}; {self.completions:,} completions of {self.columns:,} "
            f"tokens, {self.tokens:,} count,",
            f"{self.live_share:.0%} of them get a gradient; tiles of a {'CPU' if self.device == 'cpu' else 'GPU'}",
            "",
            f"{'':<30}{'products':>9}{'TFLOP':>10}{'largest block':>15}",
        ]
        for way in self.ways:
            mark = "  <- taken" if way.name == f"rlloss {self.plan}" else "     (no)" if way.why_not else ""
            lines.append(
                f"{way.name:<30}{way.products:>9.2f}{way.flop / 1e12:>10.4g}{size_text(way.logits_bytes):>15}{mark}"
            )
        lines += ["", *(f"{way.name}: {way.why_not}." for way in self.ways if way.why_not)]
        if self.head_share is not None and self.step_share is not None:
            lines += [
                f"With plain logits the head is {self.head_share:.0%} of the FLOP of a forward and backward; "
                f"rlloss takes {self.step_share:.0%} of the whole.",
            ]
        return "\n".join(lines)


def head_costs(
    model: str | os.PathLike | dict[str, Any],
    *,
    completions: int,
    tokens: int,
    rho: float = 1.0,
    fill: float = 1.0,
    dtype: str = "bf16",
    frozen_head: bool = False,
    memory_budget: int | str | None = None,
    device: str = "cuda",
) -> HeadCosts:
    """What each way to run the lm_head costs in a micro-batch, from a model's config alone.

    Args:
        model: a config.json, a folder that has one, the id of a model on the Hub (which takes transformers), or the
            config as a dict.
        completions, tokens: of a micro-batch: B completions of T columns.
        rho: the share of the tokens that count which gets a gradient, in [0, 1].
        fill: the share of the columns that count; the rest is padding. In (0, 1].
        dtype: "bf16", "fp16" or "fp32".
        frozen_head: the head is not trained, as under LoRA.
        memory_budget: as for `LinearGRPOLoss`.
        device: "cuda" or "cpu": whose tiles.

    Raises:
        ValueError, TypeError: an argument does not fit, or the config names no vocabulary. OSError: there is none.
    """
    for name, value in (("completions", completions), ("tokens", tokens)):
        checks.whole(name, value, 1)
    checks.within("rho", rho, 0, 1)
    checks.within("fill", fill, 0, 1)
    checks.require(fill > 0, "fill", fill, "a number in (0, 1]")
    checks.one_of("dtype", dtype, DTYPES)
    checks.flag("frozen_head", frozen_head)
    checks.one_of("device", device, ("cuda", "cpu"))
    budget = checks.memory_budget("memory_budget", memory_budget)
    config = read_config(model)
    V, D = (_positive(config, name) for name in ("vocab_size", "hidden_size"))
    N = completions * tokens
    n = max(1, round(fill * N))
    unit, g = 2 * n * V * D, int(not frozen_head)

    def way(name: str, products: float, logits_bytes: int, why_not: str | None = None) -> Way:
        return Way(name, products, round(products * unit), logits_bytes, why_not)

    trl_rows = n if device == "cuda" else N
    ways = [
        way("plain logits", (2 + g) * N / n, 4 * N * V),
        way("TRL 1.16, fused head", (3 + g) * trl_rows / n, min(trl_rows, TRL_TILE[0]) * TRL_TILE[1] * _bytes(dtype)),
        way("Liger 0.8.5, chunked loss", (3 + g) * N / n, 4 * min(tokens, LIGER_TILE[0]) * min(V, LIGER_TILE[1])),
    ]
    place = "meta" if device == "cuda" else "cpu"
    hidden, weight = (torch.empty((), dtype=DTYPES[dtype], device=place).expand(rows, D) for rows in (n, V))
    report = explain_plan(
        hidden.requires_grad_(), weight.requires_grad_(not frozen_head),
        config=LossConfig("dapo", top_entropy_quantile=rho), live_share=rho, memory_budget=budget,
    )  # fmt: skip
    for name in PLANS:
        products, extra, why_not = report.alternatives[name]
        ways.append(way(f"rlloss {name}", products, report.tile_bytes + extra, why_not))
    parameters = backbone_parameters(config)
    passes = 4 if frozen_head else 6  # forward and gradients of inputs, and those of the weights
    flop = None if parameters is None else passes * parameters * N
    return HeadCosts(
        (V, D), dtype, frozen_head, completions, tokens, n, rho, device, tuple(ways), report.plan, report.why,
        parameters, flop,
    )  # fmt: skip


def read_config(model: str | os.PathLike | dict[str, Any]) -> dict[str, Any]:
    """The config of the language model in a config.json, a folder, a Hub id or a dict."""
    checks.of_type("model", model, (str, os.PathLike, dict), "a config.json, a folder, a Hub id or a dict")
    if isinstance(model, dict):
        config = model
    else:
        path = Path(model)
        path = path / "config.json" if path.is_dir() else path
        if path.is_file():
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"model: found {str(path)!r}, which is no JSON: {error}") from error
        else:
            config = _from_hub(str(model), path)
    checks.of_type("model", config, dict, "a config that is a mapping")
    for name in ("text_config", "llm_config", "language_config"):
        config = config[name] if isinstance(config.get(name), dict) else config
    return config


def _from_hub(name: str, path: Path) -> dict[str, Any]:
    missing = FileNotFoundError(2, "found no config.json, expected a file, a folder with one, or a Hub id", str(path))
    if path.suffix == ".json" or path.is_absolute() or name.count("/") > 1:
        raise missing
    try:
        from transformers import AutoConfig  # pyright: ignore[reportPrivateImportUsage]
    except ImportError:
        raise missing from None
    try:
        return AutoConfig.from_pretrained(name).to_dict()
    except (OSError, ValueError) as error:
        raise missing from error


def _positive(config: dict[str, Any], name: str) -> int:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"model: found {name}={value!r} in its config, expected a whole number above 0")
    return value


def _bytes(dtype: str) -> int:
    return DTYPES[dtype].itemsize


def backbone_parameters(config: dict[str, Any]) -> int | None:
    """Weights of the linear layers of a dense decoder, without embeddings; None where the config does not say."""
    experts = any(config.get(name) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    names = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
    if experts or not all(isinstance(config.get(name), int) for name in names):
        return None
    D, layers, inner, heads = (config[name] for name in names)
    size = config.get("head_dim") or D // heads
    shared = config.get("num_key_value_heads") or heads
    attention = 2 * D * heads * size + 2 * D * shared * size
    return layers * (attention + 3 * D * inner)
