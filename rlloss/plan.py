"""`rlloss plan` computes what a model's lm_head costs in a micro-batch: rlloss's plans, plain logits, TRL and Liger.

Of the N columns of a micro-batch n tokens count, and a share r of those has a gradient. V and D are the entries and the
width of the head. g is 1 if the head is trained and 0 if it is frozen. The unit of the products with the head is the
logits of n tokens::

    plain logits    (2 + g) N / n         forward, gradient of hidden, gradient of weight; padding too
    TRL             3 + g                 computes logits again in the backward; on a CPU for all N columns
    Liger           (3 + g) N / n         the same, one completion at a time; padding too
    rlloss          rlloss.lm_head.plans

The largest block of logits, in bytes::

    plain logits    4 N V                 the fp32 log-softmax that the backward needs
    TRL             4,096 x 32,768        one tile, in the model's dtype
    Liger           2,048 x 4,096         one tile at most, in fp32
    rlloss          one tile, and the logits that the plan holds

More than that may be alive at one time: three such blocks in the backward of plain logits, several tiles for Liger, and
half a tile for the gradient of a 16-bit model in rlloss on a GPU. `tests/house/test_plan.py` compares each line with
counts, for Liger if it is installed.
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlloss import checks
from rlloss.config import LossConfig
from rlloss.lm_head.explain import explain_plan
from rlloss.lm_head.plans import HOLD_LOGITS, PLANS, size_text

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TRL_TILE, LIGER_TILE = (4096, 32768), (2048, 4096)  # rows, vocabulary entries


class Way(NamedTuple):
    """Cost of one way to run the head.

    The unit of products is the logits of the tokens that count. logits_bytes is the largest block of logits, and for a
    plan of rlloss also the logits that it keeps. why_not is the reason that forbids a plan of rlloss here, or None.
    """

    name: str
    products: float
    flop: int
    logits_bytes: int
    why_not: str | None = None


class HeadCosts(NamedTuple):
    """Result of `head_costs`. Its str() is the text of `rlloss plan`.

    shape is (V, D). tokens is the number of tokens that count. plan and why are the plan that rlloss takes and the
    reason. backbone_flop is the FLOP of a forward and backward of the model without its head and without attention
    scores; it is None if the config does not tell.
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
    """Compute the cost of each way to run the lm_head in a micro-batch. Only the model's config is read.

    Args:
        model: a config.json, a folder that has one, the id of a model on the Hub (needs transformers), or the config
            as a dict.
        completions, tokens: size of a micro-batch, B completions of T columns.
        rho: share of the tokens that count which gets a gradient, in [0, 1].
        fill: share of the columns that count, in (0, 1]; the rest is padding.
        dtype: "bf16", "fp16" or "fp32".
        frozen_head: whether the head is not trained, as under LoRA.
        memory_budget: as for `LinearGRPOLoss`.
        device: "cuda" or "cpu", the device whose tile sizes are used.

    Raises:
        ValueError, TypeError: an argument does not fit, or the config names no vocabulary.
        OSError: there is no config.
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
    hidden, weight = (torch.empty((), dtype=DTYPES[dtype], device=place).expand(rows, D) for rows in (N, V))
    report = explain_plan(
        hidden.requires_grad_(), weight.requires_grad_(not frozen_head), mask=torch.arange(N) < n,
        config=LossConfig("dapo", top_entropy_quantile=rho), live_share=rho, memory_budget=budget,
    )  # fmt: skip
    for name in PLANS:
        products, extra, why_not = report.alternatives[name]
        ways.append(way(f"rlloss {name}", products, report.tile_bytes + (extra if name in HOLD_LOGITS else 0), why_not))
    parameters = backbone_parameters(config)
    passes = 4 if frozen_head else 6  # 2 each for the forward, the gradients of inputs and those of weights
    flop = None if parameters is None else passes * parameters * N
    return HeadCosts(
        (V, D), dtype, frozen_head, completions, tokens, n, rho, device, tuple(ways), report.plan, report.why,
        parameters, flop,
    )  # fmt: skip


def read_config(model: str | os.PathLike | dict[str, Any]) -> dict[str, Any]:
    """Return the config of the language model from a config.json, a folder, a Hub id or a dict."""
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
    """Count the weights of a dense decoder's linear layers, without embeddings; None if the config does not tell."""
    experts = any(config.get(name) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    names = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
    if experts or not all(isinstance(config.get(name), int) for name in names):
        return None
    D, layers, inner, heads = (config[name] for name in names)
    size = config.get("head_dim") or D // heads
    shared = config.get("num_key_value_heads") or heads
    attention = 2 * D * heads * size + 2 * D * shared * size
    return layers * (attention + 3 * D * inner)
