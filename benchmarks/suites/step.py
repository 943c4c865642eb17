"""Measure an update step (loss and backward) of a real GRPOTrainer: rlloss's against TRL's on the same batch.

A contender is timed if its loss, gradients and metrics agree with TRL's. Kind "beta 0.04" adds the KL to a reference
model, which gives every completion a gradient. Kind "LoRA" trains an adapter on the attention; the head is frozen.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders.trainers import NOTES, Contender, Result, add_reference, contenders, make_batch
from benchmarks.harness.contest import Contest, Entrant
from benchmarks.harness.peer import absent
from benchmarks.harness.shapes import LLAMA, Cell
from rlloss import count_products

TOLERANCE = 1e-5
PARTS = {
    "backbone, all completions": "the model without its head, forward and backward",
    "backbone, forward only without a signal": "the same, backward of the completions with a signal alone",
    "generation": "as many tokens as the batch has columns, by the same model in transformers; no part of the others",
}


def _furthest(errors: Iterable[float]) -> float:
    """Return the largest error. A NaN, which max() may ignore, counts as the largest."""
    return max(math.inf if math.isnan(error) else error for error in errors)


def compare(found: Result, expected: Result) -> dict[str, float]:
    """Return relative errors of the loss, of all gradients as one vector, and of the worst parameter and metric.

    Raises:
        ArithmeticError: an error is above 1e-5, or a metric of TRL is missing.
    """
    missing = set(expected.metrics) - set(found.metrics)
    if missing:
        raise ArithmeticError(f"no {', '.join(sorted(missing))} among the metrics")
    errors = {"loss": abs(found.loss - expected.loss).item() / max(abs(expected.loss.item()), 1e-8)}
    off, whole = [], []
    for name, theirs in expected.gradients.items():
        ours = found.gradients[name]
        if (ours is None) != (theirs is None):
            raise ArithmeticError(f"the gradient of {name} is there on one side alone")
        if ours is not None and theirs is not None:
            off.append((ours - theirs).double().norm().item())
            whole.append(theirs.double().norm().item())
    errors["gradient"] = math.hypot(*off) / max(math.hypot(*whole), 1e-30)
    # A parameter's gradient may be 0 but for the rounding of the whole.
    rounding = torch.finfo(torch.float32).eps / TOLERANCE * math.hypot(*whole)
    errors["parameter"] = _furthest(a / max(b, rounding, 1e-30) for a, b in zip(off, whole, strict=True))
    errors["metric"] = _furthest(
        0.0 if math.isnan(theirs) and math.isnan(found.metrics[name])
        else abs(found.metrics[name] - theirs) / max(abs(theirs), 0.1)
        for name, theirs in expected.metrics.items()
    )  # fmt: skip
    for name, error in errors.items():
        if not error <= TOLERANCE:
            raise ArithmeticError(f"{name} is off by {error:.2g}, allowed {TOLERANCE:.0e}")
    return errors


def check(contender: Contender, inputs: dict, expected: Result) -> dict[str, Any]:
    """Return {"errors"} against TRL, and "units": the products of rlloss's head, in logits of all its tokens."""
    with count_products() as products:
        found = contender.result(inputs)
    return {"errors": compare(found, expected), "units": products.units}


def backbones(model, inputs: dict) -> list[Callable[[], object]]:
    """Return two runs of the model without its head. The first runs forward and backward of all completions. The second
    does so only for completions with a signal, cut after the longest, and runs only the forward of the others."""
    P = inputs["prompt_ids"].shape[1]
    ids, mask = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    live = inputs["advantages"] != 0

    def forward(rows: Tensor | slice) -> Tensor:
        end = ids.shape[1] if isinstance(rows, slice) else P + int(inputs["completion_mask"][rows].sum(-1).max())
        return model.model(input_ids=ids[rows, :end], attention_mask=mask[rows, :end], use_cache=False)[0]

    def apart() -> None:
        with torch.no_grad():
            forward(~live)
        forward(live).sum().backward()

    return [lambda: forward(slice(None)).sum().backward(), apart]


def generation(model, inputs: dict) -> Callable[[], object]:
    """Return a run that samples the completions of a batch. None of them ends early."""
    T = inputs["completion_ids"].shape[1]
    prompt = {"input_ids": inputs["prompt_ids"], "attention_mask": inputs["prompt_mask"]}
    return functools.partial(model.generate, **prompt, do_sample=True, min_new_tokens=T, max_new_tokens=T)


def notes(compiled: bool) -> dict[str, str]:
    return NOTES | PARTS


def contest(cell: Cell, compiled: bool) -> Contest:
    if why_not := absent("trl.trainer.utils"):  # TRL's trainers need datasets, which may be missing
        return Contest([Entrant(name, dict, why_not=why_not) for name in NOTES])
    beta = float(cell.kind.removeprefix("beta")) if cell.kind.startswith("beta") else 0.0
    with_lora = cell.kind == "LoRA"
    if with_lora and (why_not := absent("peft")):
        return Contest([Entrant(name, dict, why_not=why_not) for name in NOTES])
    entrants = contenders(LLAMA, beta=beta, top_entropy_quantile=cell.rho, with_lora=with_lora)
    if with_lora:  # without the completions that it drops the mean entropy is not TRL's
        entrants = [one for one in entrants if one.mode != "drop"]
    inputs = make_batch(LLAMA, cell.fill)
    trl = entrants[0]
    if beta != 0.0:
        add_reference(trl.trainer, inputs)
    expected = trl.result(inputs)
    parts = {}
    if not with_lora:
        model = trl.trainer.model
        parts = dict(zip(PARTS, (*backbones(model, inputs), generation(model, inputs)), strict=True))
    mask = inputs["completion_mask"]
    return Contest(
        [
            Entrant(
                one.name, functools.partial(one.start, inputs), functools.partial(check, one, inputs, expected),
                one.why_not, one.clear,
            )
            for one in entrants
        ],
        [
            Entrant(name, run, prepare=trl.clear, phased=False)
            for name, run in parts.items()
        ],
        {"counted": int(mask.sum()), "with_signal": int(mask[inputs["advantages"] != 0].sum()), **LLAMA._asdict()},
    )  # fmt: skip
