"""Compute the errors of a contender against fp64. A contender whose errors exceed rounding is not timed."""

import torch
from torch import Tensor

SAMPLED_ROWS = 32


def allowed(V: int, dtype: torch.dtype) -> float:
    """Return the allowed relative error: rounding of the result to its dtype, and of fp32 sums over the vocabulary."""
    return 1e-5 + V * 2.0**-30 + 4 * torch.finfo(dtype).eps


def spread(rows: Tensor, most: int = SAMPLED_ROWS) -> Tensor:
    """Return at most `most` rows, evenly spaced, including the first and the last."""
    return rows[torch.linspace(0, len(rows) - 1, min(most, len(rows)), device=rows.device).long()]


def worst(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, or inf if `found` is not finite."""
    return (found.double() - expected).abs().nan_to_num(nan=torch.inf).max().item()


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the relative error of the whole tensor, or inf if `found` is not finite."""
    error = (found.double() - expected).norm() / expected.norm().clamp(min=torch.finfo(expected.dtype).tiny)
    return error.nan_to_num(nan=torch.inf).item()


def of_rows(found: Tensor, expected: Tensor, target: Tensor, coef: Tensor) -> dict[str, float]:
    """Return errors of gradients `[L, V]` of rows with coefficients coef `[L]`, relative to the row. The entry of the
    target is far larger than the others and has its own error."""
    d, place, g = found.double(), target.unsqueeze(-1), coef.double().unsqueeze(-1)
    rest = (d - expected).scatter(-1, place, 0.0).norm(dim=-1) / expected.scatter(-1, place, 0.0).norm(dim=-1)
    return {
        "gradient at the target": worst(d.gather(-1, place) / g, expected.gather(-1, place) / g),
        "gradient elsewhere": worst(rest, torch.zeros_like(rest)),
    }


def require(name: str, errors: dict[str, float], allowed: dict[str, float]) -> None:
    """Raise ArithmeticError if an error is NaN or larger than allowed."""
    for what, error in errors.items():
        if not error <= allowed[what]:
            raise ArithmeticError(f"{name}: {what} is off by {error:.2g}, allowed {allowed[what]:.2g}")


def failure(error: Exception) -> str:
    """Return the status of a contender that raised."""
    if isinstance(error, ArithmeticError):
        return f"wrong: {error}"
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"failed: {type(error).__name__}" + (f": {lines[0][:200]}" if lines else "")
