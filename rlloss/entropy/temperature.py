"""Choose each sampling temperature from the entropy of the next-token distribution, and apply it in a decode step.

z are the logits of a row, and H is the entropy of softmax(z), at temperature 1 and in nats. A rule computes the
temperature T from H, and the token is sampled from softmax(z / T). Its log-probability is
`rlloss.token_stats(logits, token, temperature=T).logp`.

A temperature below MIN_TEMPERATURE counts as 0, which is greedy. The largest logits of a row then keep their value and
all others become -inf, which is the limit T -> 0; equal largest logits share the probability. A greedy token has no
gradient, and `token_stats` refuses T = 0.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from rlloss import backends, checks
from rlloss.operators import operator
from rlloss.torch_kernels.entropy_temperature import temperature_of

MIN_TEMPERATURE = 0.01
"""Smallest temperature that is not greedy, as in vLLM. Below it fp16 could not hold z / T of ordinary logits."""

MAX_TEMPERATURE = 1e4


def _check(name: str, value: float, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    """Require a finite number in [low, high], or with `open_low` in (low, high)."""
    checks.number(name, value)
    inside = low < value < high if open_low else low <= value <= high and value < math.inf
    brackets = f"({low}, {high})" if open_low else f"[{low}, {high}]"
    checks.require(inside, name, value, f"a finite number in {brackets}")


def _check_temperature(name: str, value: float) -> None:
    checks.number(name, value)
    valid = value == 0 or MIN_TEMPERATURE <= value <= MAX_TEMPERATURE
    checks.require(valid, name, value, f"0 (greedy) or a temperature in [{MIN_TEMPERATURE}, {MAX_TEMPERATURE}]")


def _entropies(entropy: Tensor) -> Tensor:
    checks.floating("entropy", entropy)
    entropy = entropy.detach()
    return entropy if entropy.dtype == torch.float64 else entropy.float()


@dataclasses.dataclass(frozen=True)
class TwoLevelTemperature:
    """T = high where H > cutoff, else low (2506.01939, Eq. 5).

    The paper varies one of the two and holds the other at 1. Up to a point, raising `high` helps or does no harm;
    raising `low` breaks the text. The paper recommends no value, so `high` has no default. A value out of its range
    raises ValueError.
    """

    name: ClassVar[str] = "two_level"

    high: float
    """T of the forking tokens, 0 (greedy) or in [MIN_TEMPERATURE, MAX_TEMPERATURE]."""

    low: float = 1.0
    """T of all other tokens, in the same range as `high`."""

    cutoff: float = 0.672
    """Entropy in nats, >= 0. The paper's default is the 80th percentile of Qwen3-8B's entropies."""

    def __post_init__(self) -> None:
        _check_temperature("high", self.high)
        _check_temperature("low", self.low)
        _check("cutoff", self.cutoff, 0.0)

    @property
    def lowest(self) -> float:
        """Lower bound of T. If it is 0, some tokens are greedy and have no log-probability to train on."""
        return min(self.high, self.low)

    def constants(self) -> tuple[float, float, float]:
        """Return the constants (a, b, c) of the kernel."""
        return self.high, self.low, self.cutoff

    def temperature(self, entropy: Tensor, candidates: Tensor | int | None = None) -> Tensor:
        """See `temperature_rule`. `candidates` is not read."""
        return temperature_of(self.name, self.constants(), MIN_TEMPERATURE, _entropies(entropy), None)


@dataclasses.dataclass(frozen=True)
class EDTemperature:
    """T = max(base N^(theta / H), minimum) (EDT, 2403.14541; the bound `minimum` is rlloss's).

    T falls towards 0 with H, and rises towards `base`. The paper tunes base and theta for each task. A value out of its
    range raises ValueError.
    """

    name: ClassVar[str] = "edt"

    base: float
    """Highest T, in [MIN_TEMPERATURE, MAX_TEMPERATURE]."""

    theta: float
    """Entropy in nats, above 0, at which T is N times `base`."""

    N: float = 0.8
    """Base of the power, in (0, 1). The default is the paper's."""

    minimum: float = MIN_TEMPERATURE
    """Lowest T, 0 (greedy below MIN_TEMPERATURE) or in [MIN_TEMPERATURE, base]."""

    def __post_init__(self) -> None:
        _check("base", self.base, MIN_TEMPERATURE, MAX_TEMPERATURE)
        _check("theta", self.theta, 0.0, open_low=True)
        _check("N", self.N, 0.0, 1.0, open_low=True)
        _check_temperature("minimum", self.minimum)
        checks.require(self.minimum <= self.base, "minimum", self.minimum, f"at most base ({self.base})")

    @property
    def lowest(self) -> float:
        """Lower bound of T. If it is 0, some tokens are greedy and have no log-probability to train on."""
        return self.minimum

    def constants(self) -> tuple[float, float, float]:
        """Return the constants (a, b, c) of the kernel."""
        return self.base, self.theta * math.log2(self.N), self.minimum

    def temperature(self, entropy: Tensor, candidates: Tensor | int | None = None) -> Tensor:
        """See `temperature_rule`. `candidates` is not read."""
        return temperature_of(self.name, self.constants(), MIN_TEMPERATURE, _entropies(entropy), None)


@dataclasses.dataclass(frozen=True)
class DynamicTemperature:
    """T = low + (high - low) (H / log n)^exponent, as llama.cpp's "dynatemp"; n logits of the row are above -inf.

    A uniform row gets `high`. A row with one candidate, whose H / log n is 0 / 0, gets `low`. A value out of its range
    raises ValueError.
    """

    name: ClassVar[str] = "dynatemp"

    low: float
    """T at entropy 0, 0 (greedy) or in [MIN_TEMPERATURE, MAX_TEMPERATURE]."""

    high: float
    """T at the highest possible entropy of n candidates, in the same range as `low` and not below it."""

    exponent: float = 1.0
    """Exponent, above 0. A larger one keeps T near `low` for longer."""

    def __post_init__(self) -> None:
        _check_temperature("low", self.low)
        _check_temperature("high", self.high)
        checks.require(self.low <= self.high, "low", self.low, f"at most high ({self.high})")
        _check("exponent", self.exponent, 0.0, open_low=True)

    @property
    def lowest(self) -> float:
        """Lower bound of T. If it is 0, some tokens are greedy and have no log-probability to train on."""
        return self.low

    def constants(self) -> tuple[float, float, float]:
        """Return the constants (a, b, c) of the kernel."""
        return self.low, self.high - self.low, self.exponent

    def temperature(self, entropy: Tensor, candidates: Tensor | int | None = None) -> Tensor:
        """See `temperature_rule`. `candidates` must be given."""
        entropy = _entropies(entropy)
        if isinstance(candidates, Tensor):
            checks.real("candidates", candidates)
            if candidates.dim():
                checks.same_shape("candidates", candidates, entropy.shape, "like entropy, or a number")
        else:
            checks.number("candidates", candidates, "the number of logits above -inf, which dynatemp reads")
        n = torch.as_tensor(candidates, dtype=entropy.dtype)
        return temperature_of(self.name, self.constants(), MIN_TEMPERATURE, entropy, n)


TemperatureRule = TwoLevelTemperature | EDTemperature | DynamicTemperature
RULES: dict[str, type[TemperatureRule]] = {
    rule.name: rule for rule in (TwoLevelTemperature, EDTemperature, DynamicTemperature)
}


class ScaledLogits(NamedTuple):
    """Decode step: logits `[..., V]` divided by temperature `[...]`, which a rule chose from entropy `[...]`."""

    logits: Tensor
    temperature: Tensor
    entropy: Tensor


def temperature_rule(settings: Mapping[str, object]) -> TemperatureRule:
    """Make a temperature rule from a mapping.

    The method `temperature(entropy, candidates=None)` of a rule returns T for known entropies. entropy is `[...]`
    floating point, in nats, at temperature 1. candidates is the number of logits above -inf, `[...]` or one number, and
    only dynatemp reads it. T is `[...]` fp32 (fp64 for fp64 entropies), without gradient, and NaN where the entropy is.

    Args:
        settings: "rule" is "two_level", "edt" or "dynatemp"; the other keys are the fields of that rule.

    Returns:
        A `TwoLevelTemperature`, `EDTemperature` or `DynamicTemperature`.

    Raises:
        ValueError, TypeError: the rule or a field is unknown, a field is missing, or a value is out of its range.

    Source: 2506.01939 (two_level), 2403.14541 (edt), llama.cpp (dynatemp).
    """
    checks.require(isinstance(settings, Mapping), "settings", repr(settings), 'a mapping {"rule": ..., ...}')
    given = dict(settings)
    name = given.pop("rule", None)
    checks.one_of("rule", name, RULES)
    rule = RULES[str(name)]
    fields = {field.name: field for field in dataclasses.fields(rule)}
    for key in given:
        checks.one_of(f"{name}: setting", key, fields)
    for key, field in fields.items():
        checks.require(
            key in given or field.default is not dataclasses.MISSING, f"{name}: {key}", "nothing", "a value: no default"
        )
    return rule(**given)  # type: ignore[arg-type]


def _fake(logits, rule, fields, write):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    temperature, entropy = (logits.new_empty(logits.shape[:-1], dtype=dtype) for _ in range(2))
    out = torch.empty(logits.shape if write else (0,), dtype=logits.dtype, device=logits.device)
    return out, temperature, entropy


@operator("entropy_temperature", fake=_fake)
def _entropy_temperature(
    logits: Tensor, rule: str, fields: Sequence[float], write: bool
) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty(logits.shape if write else (0,), dtype=logits.dtype, device=logits.device)
    matrix = logits.reshape(-1, logits.shape[-1])
    of = RULES[rule](*fields)
    temperature, entropy = backends.of(matrix).entropy_temperature(
        matrix, None, out.view(matrix.shape) if write else None, rule, of.constants(), MIN_TEMPERATURE
    )
    rows = logits.shape[:-1]
    return out, temperature.view(rows), entropy.view(rows)


@torch.library.custom_op("rlloss::scale_logits_", mutates_args=("logits",))
def _scale_logits_op(logits: Tensor, mask: Tensor | None, rule: str, fields: Sequence[float]) -> tuple[Tensor, Tensor]:
    rows = logits.shape[:-1]
    try:
        matrix = logits.view(-1, logits.shape[-1])
    except RuntimeError:  # the rows have more than one stride
        matrix = logits.reshape(-1, logits.shape[-1])
    selected = None if mask is None else mask.reshape(-1).contiguous()
    of = RULES[rule](*fields)
    temperature, entropy = backends.of(matrix).entropy_temperature(
        matrix, selected, matrix, rule, of.constants(), MIN_TEMPERATURE
    )
    if matrix.data_ptr() != logits.data_ptr():
        logits.copy_(matrix.view(logits.shape))
    return temperature.view(rows), entropy.view(rows)


@_scale_logits_op.register_fake
def _(logits, mask, rule, fields):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    temperature, entropy = (logits.new_empty(logits.shape[:-1], dtype=dtype) for _ in range(2))
    return temperature, entropy


def _check_logits(logits: Tensor) -> None:
    checks.of_dtype("logits", logits, checks.COMPUTED, "bf16, fp16, fp32 or fp64")
    checks.require(logits.dim() >= 1 and logits.shape[-1] >= 1, "logits", tuple(logits.shape), "[..., V] with V >= 1")


def _check_rule(rule: object) -> None:
    checks.of_type("rule", rule, tuple(RULES.values()), ", ".join(r.__name__ for r in RULES.values()))


@torch.no_grad()
def entropy_temperature(logits: Tensor, rule: TemperatureRule) -> tuple[Tensor, Tensor]:
    """Compute the temperature and the entropy of rows of logits.

    Args:
        logits: `[..., V]`, bf16, fp16, fp32 or fp64; -inf where a token is excluded.
        rule: a rule, from `temperature_rule` or made directly.

    Returns:
        (T, H), both `[...]`, fp32 (fp64 for fp64 logits), without gradient; H in nats. Both are NaN for a row with a
        NaN, with a +inf, or with nothing above -inf.

    Raises:
        ValueError, TypeError: an argument does not fit; the error names it.
    """
    _check_logits(logits)
    _check_rule(rule)
    return _entropy_temperature(logits, rule.name, _fields(rule), False)[1:]


@torch.no_grad()
def scale_logits(
    logits: Tensor, rule: TemperatureRule, *, mask: Tensor | None = None, inplace: bool = False
) -> ScaledLogits:
    """Divide each row of logits by the temperature from its own entropy, in one pass over the vocabulary.

    Args:
        logits: `[..., V]`, bf16, fp16, fp32 or fp64; -inf where a token is excluded, which stays -inf.
        rule: a rule, from `temperature_rule` or made directly.
        mask: `[...]` bool, only with `inplace`. Rows with False do not change; their T is 1 and their H 0.
        inplace: overwrite the logits.

    Returns:
        `ScaledLogits`, without gradient. Its logits have the dtype of the input (fp16 overflows above 65504 T). T and H
        are as in `entropy_temperature`. A row whose T is NaN becomes NaN; other rows are not affected.

    Raises:
        ValueError: mask without `inplace`, mask of another shape, or `inplace` on rows that share memory.
        TypeError: a dtype does not fit, or rule is no rule.
    """
    _check_logits(logits)
    _check_rule(rule)
    checks.flag("inplace", inplace)
    if mask is not None:
        checks.require(inplace, "mask", "a mask without inplace", "inplace=True, which leaves the other rows alone")
        checks.boolean("mask", mask)
        checks.same_shape("mask", mask, logits.shape[:-1], "like logits without the vocabulary")
        checks.same_device("mask", mask, logits, "logits")
    if not inplace:
        return ScaledLogits(*_entropy_temperature(logits, rule.name, _fields(rule), True))
    shared = any(n > 1 and stride == 0 for n, stride in zip(logits.shape, logits.stride(), strict=True))
    checks.require(not shared, "inplace", f"strides {logits.stride()}", "logits whose rows do not share memory")
    return ScaledLogits(logits, *_scale_logits_op(logits, mask, rule.name, _fields(rule)))


def _fields(rule: TemperatureRule) -> list[float]:
    return [float(value) for value in dataclasses.astuple(rule)]
