"""Errors that name the argument, what was found and what was expected."""

import os
from collections.abc import Iterable
from typing import NoReturn

import torch


def has_values(x: torch.Tensor) -> bool:
    """False for a tensor on the "meta" device and for a FakeTensor, which are shapes alone."""
    return not x.is_meta and not hasattr(x, "fake_mode")


def values_checked(x: torch.Tensor) -> bool:
    """Whether looking at the values of `x` is free (CPU) or was asked for (RLLOSS_CHECK=1, which synchronises)."""
    if torch.compiler.is_compiling() or not has_values(x):
        return False
    return x.device.type == "cpu" or os.environ.get("RLLOSS_CHECK") == "1"


def require(condition: bool, name: str, found: object, expected: str) -> None:
    if not condition:
        fail(name, found, expected)


def fail(name: str, found: object, expected: str) -> NoReturn:
    """For a message that names a setting: torch.compile makes a float that changes symbolic, and no text of it."""
    raise ValueError(f"{name}: found {found}, expected {expected}")


def one_of(name: str, found: object, allowed: Iterable[object]) -> None:
    allowed = list(allowed)
    if found not in allowed:
        raise ValueError(f"{name}: found {found!r}, expected one of {', '.join(repr(a) for a in allowed)}")


def same_shape(name: str, x: torch.Tensor, shape: Iterable[int], like: str) -> None:
    shape = tuple(shape)
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: found shape {tuple(x.shape)}, expected {shape} ({like})")


def same_device(name: str, x: torch.Tensor, like: torch.Tensor, like_name: str) -> None:
    if x.device != like.device:
        raise ValueError(f"{name}: found device {x.device}, expected {like.device} (that of {like_name})")


def local(name: str, x: object, ways_out: str) -> None:
    """Refuse a DTensor, by what it can do: importing its class takes as long as importing torch."""
    if isinstance(x, torch.Tensor) and hasattr(x, "full_tensor"):
        placements = getattr(x, "placements", None)
        raise TypeError(f"{name}: found a DTensor with {placements}, expected a plain tensor: {ways_out}")


def boolean(name: str, x: torch.Tensor) -> None:
    if x.dtype != torch.bool:
        raise TypeError(f"{name}: found dtype {x.dtype}, expected torch.bool with True where a token counts")


def floating(name: str, x: torch.Tensor) -> None:
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name}: found dtype {x.dtype}, expected a floating-point tensor")


def positive(name: str, value: float) -> None:
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{name}: found {value}, expected a finite number above 0")


def target_in_range(target: torch.Tensor, mask: torch.Tensor | None, V: int) -> None:
    """Raise at the first target of an unmasked row that is not a vocabulary entry."""
    bad = (target < 0) | (target >= V)
    if mask is not None:
        bad &= mask
    if bool(bad.any()):
        index = tuple(int(i) for i in bad.nonzero()[0])
        hint = "" if mask is not None else "; give a mask to skip rows without a target"
        raise ValueError(
            f"target: found {int(target[index])} at index {index}, expected 0 <= target < {V} (the vocabulary){hint}"
        )
