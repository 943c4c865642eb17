"""Check arguments, and raise errors that name the argument, the value found and the value expected."""

import difflib
import numbers
import os
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch

COMPUTED = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""Allowed dtypes of logits, hidden states and weights."""
SIZES = {"": 1, "b": 1} | {
    f"{letter}{i}b": (1024 if i else 1000) ** power for power, letter in enumerate("kmgt", 1) for i in ("", "i")
}
"""Units of a size in bytes, in lower case."""


def has_values(x: torch.Tensor) -> bool:
    """Return False for a FakeTensor and for a tensor on the "meta" device, which have a shape but no values."""
    return not x.is_meta and not hasattr(x, "fake_mode")


def values_checked(x: torch.Tensor) -> bool:
    """Return whether the values of `x` may be read: on a CPU, or with RLLOSS_CHECK=1, which synchronises."""
    if torch.compiler.is_compiling() or not has_values(x):
        return False
    return x.device.type == "cpu" or os.environ.get("RLLOSS_CHECK") == "1"


def require(condition: bool, name: str, found: object, expected: str) -> None:
    if not condition:
        fail(name, found, expected)


def fail(name: str, found: object, expected: str) -> NoReturn:
    """Raise ValueError. Call it where the message contains a setting: torch.compile makes a changing float symbolic and
    cannot turn it into text."""
    raise ValueError(f"{name}: found {found}, expected {expected}")


def wrong_type(name: str, found: object, expected: str) -> NoReturn:
    is_short = found is None or isinstance(found, str | numbers.Number) or type(found).__name__ == "bool"  # of NumPy
    said = repr(found) if is_short else type(found).__name__
    raise TypeError(f"{name}: found {said}, expected {expected}")


def of_type(name: str, found: object, kind: type | tuple[type, ...], expected: str) -> None:
    if not isinstance(found, kind):
        wrong_type(name, found, expected)


def one_of(name: str, found: object, allowed: Iterable[object]) -> None:
    allowed = list(allowed)
    if not isinstance(found, str) or found not in allowed:
        raise ValueError(f"{name}: found {found!r}, expected one of {', '.join(repr(a) for a in allowed)}")


def unknown_option(name: object, known: Iterable[str], otherwise: str = "") -> str:
    """Return a message that suggests the closest known option, or ends in `otherwise` if none is close."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.75)
    return f"unknown option {name}{f', did you mean {near[0]}?' if near else otherwise}"


def flag(name: str, value: object) -> None:
    of_type(name, value, bool, "True or False")


def number(name: str, value: object, expected: str = "a number") -> None:
    """Require a real number, not a bool. NaN is allowed."""
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        wrong_type(name, value, expected)


def within(name: str, value: float, low: float, high: float) -> None:
    expected = f"a number in [{low}, {high}]"
    number(name, value, expected)
    if not low <= value <= high:
        fail(name, value, expected)


def positive(name: str, value: float) -> None:
    number(name, value, "a finite number above 0")
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{name}: found {value}, expected a finite number above 0")


def whole(name: str, value: int, low: int | None = None, expected: str = "an int") -> None:
    """Require an integer, not a bool."""
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        wrong_type(name, value, expected)
    if low is not None and value < low:
        fail(name, value, f"at least {low}")


def scalar(name: str, value: Any) -> None:
    """Require a number, or a tensor that holds one."""
    if not isinstance(value, torch.Tensor):
        number(name, value, "a number, or a tensor that holds one")
        return
    real(name, value)
    require(tuple(value.shape) in ((), (1,)), name, f"shape {tuple(value.shape)}", "one number")


def cutoff(value: Any) -> None:
    """Require an entropy, as a number or as a tensor. NaN raises if the value may be read (see `values_checked`)."""
    scalar("cutoff", value)
    if not isinstance(value, torch.Tensor) or values_checked(value):
        require(bool(value == value), "cutoff", value, "a number")


def denominator(value: Any) -> None:
    scalar("denominator", value)
    if not isinstance(value, torch.Tensor):
        positive("denominator", value)


def memory_budget(name: str, value: int | str | None) -> int | None:
    """Return a size in bytes, given as a whole number or as a text such as "1GiB" or "500 MB"."""
    expected = 'a whole number of bytes, a size such as "1GiB" or "500 MB", or None'
    if value is None or not isinstance(value, str):
        if value is not None:
            whole(name, value, 0, expected)
        return value
    text = value.strip().lower()
    digits = text.rstrip("kmgtib ")
    unit = text[len(digits) :].strip()
    try:
        size = float(digits) * SIZES[unit]
        return int(size) if size >= 0 else fail(name, repr(value), expected)
    except (ValueError, KeyError, OverflowError):
        raise ValueError(f"{name}: found {value!r}, expected {expected}") from None


def process_group(name: str, group: object) -> None:
    if group is not None:
        of_type(name, group, torch.distributed.ProcessGroup, "a process group or None")


def tensors(name: str, found: Mapping[str, torch.Tensor], keys: Iterable[str]) -> None:
    """Require a mapping that has a tensor under each of these keys."""
    of_type(name, found, Mapping, "a mapping of names to tensors")
    for key in keys:
        require(key in found, name, f"no {key!r} in it", "a mapping that has one")
        of_type(f"{name}[{key!r}]", found[key], torch.Tensor, "a tensor")


def same_shape(name: str, x: torch.Tensor, shape: Iterable[int], like: str) -> None:
    shape = tuple(shape)
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: found shape {tuple(x.shape)}, expected {shape} ({like})")


def same_device(name: str, x: torch.Tensor, like: torch.Tensor, like_name: str) -> None:
    if x.device != like.device:
        raise ValueError(f"{name}: found device {x.device}, expected {like.device} (that of {like_name})")


def local(name: str, x: object, ways_out: str) -> None:
    """Refuse a DTensor. It is recognised by its methods, because importing its class takes as long as torch itself."""
    if isinstance(x, torch.Tensor) and hasattr(x, "full_tensor"):
        placements = getattr(x, "placements", None)
        raise TypeError(f"{name}: found a DTensor with {placements}, expected a plain tensor: {ways_out}")


def of_dtype(name: str, x: torch.Tensor, dtypes: Iterable[torch.dtype], expected: str) -> None:
    if not isinstance(x, torch.Tensor):
        wrong_type(name, x, f"a tensor, {expected}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: found dtype {x.dtype}, expected {expected}")


def boolean(name: str, x: torch.Tensor) -> None:
    if not isinstance(x, torch.Tensor) or x.dtype != torch.bool:
        of_dtype(name, x, (torch.bool,), f"torch.bool with True where a token counts ({name}.bool() makes one)")


def floating(name: str, x: torch.Tensor) -> None:
    of_type(name, x, torch.Tensor, "a floating-point tensor")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name}: found dtype {x.dtype}, expected a floating-point tensor")


def real(name: str, x: torch.Tensor) -> None:
    of_type(name, x, torch.Tensor, "an integer or floating tensor")
    if x.dtype == torch.bool or x.dtype.is_complex:
        raise TypeError(f"{name}: found dtype {x.dtype}, expected an integer or floating tensor")


def token_ids(name: str, x: torch.Tensor) -> None:
    of_dtype(name, x, (torch.int64, torch.int32), "int64 or int32 token ids")


def constant(name: str, x: torch.Tensor) -> None:
    """Refuse a tensor that requires a gradient where the loss gives it none: the gradient would be lost silently."""
    if x.requires_grad:
        fail(
            name, "a tensor that requires a gradient", f"one that does not, as the loss gives it none: {name}.detach()"
        )


def advantage(x: torch.Tensor, shape: Iterable[int], narrow: str = "[B]") -> None:
    """Require an advantage of shape `[B, T]`, or `[B]`, or with narrow="[B, 1]" that shape instead of `[B]`."""
    floating("advantage", x)
    B, T = shape
    narrow_shape = (B,) if narrow == "[B]" else (B, 1)
    if tuple(x.shape) not in (narrow_shape, (B, T)):
        fail("advantage", f"shape {tuple(x.shape)}", f"{narrow} = {narrow_shape} or [B, T] = ({B}, {T})")


def tokens(logp: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, narrow: str = "[B]") -> None:
    """Require logp and mask of shape `[B, T]`, and advantages that fit them."""
    floating("logp", logp)
    if logp.dim() != 2:
        fail("logp", f"shape {tuple(logp.shape)}", "[B, T]")
    boolean("mask", mask)
    same_shape("mask", mask, logp.shape, "like logp")
    same_device("mask", mask, logp, "logp")
    advantage(advantages, logp.shape, narrow)
    same_device("advantage", advantages, logp, "logp")


def target_in_range(target: torch.Tensor, mask: torch.Tensor | None, V: int) -> None:
    """Raise if the target of an unmasked row is not a vocabulary entry; the error names the first such target."""
    bad = (target < 0) | (target >= V)
    if mask is not None:
        bad &= mask
    if bool(bad.any()):
        index = tuple(int(i) for i in bad.nonzero()[0])
        hint = "" if mask is not None else "; give a mask to skip rows without a target"
        raise ValueError(
            f"target: found {int(target[index])} at index {index}, expected 0 <= target < {V} (the vocabulary){hint}"
        )
