"""Temperatures that follow the entropy of the next-token distribution, and the decode step that applies them.

Everywhere z are the logits of a row, H is the entropy of softmax(z), at temperature 1 and in nats, T the temperature
that a rule gives for it; the token is then sampled from softmax(z / T). The logp of that token is
`rlloss.token_stats(logits, token, temperature=T).logp`.

A temperature below MIN_TEMPERATURE counts as 0, which is greedy: the largest logits of a row keep their value, all
others become -inf. (The limit T -> 0: equal largest ones share.) A greedy token has no gradient, and `token_stats`
refuses T = 0.
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
"""Below it fp16 could not hold z / T of ordinary logits; vLLM, too, samples at no smaller one."""

MAX_TEMPERATURE = 1e4


def _check(name: str, value: float, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    """A number in [low, high], or in (low, high), and finite."""
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

    The paper varies one of the two and holds the other at 1: raising `high` helps or does no harm up to a point,
    raising `low` breaks the text. It recommends no value, so `high` has no default.
    """

    name: ClassVar[str] = "two_level"

    high: float
    """T of the forking tokens: 0 (greedy) or in [MIN_TEMPERATURE, MAX_TEMPERATURE]."""

    low: float = 1.0
    """T of all others; as `high`."""

    cutoff: float = 0.672
    """In nats, >= 0. The default is the paper's: the 80th percentile of Qwen3-8B's entropies."""

    def __post_init__(self) -> None:
        _check_temperature("high", self.high)
        _check_temperature("low", self.low)
        _check("cutoff", self.cutoff, 0.0)

    @property
    def lowest(self) -> float:
        """No temperature is below it; at 0 some are greedy, and have no log-probability to train on."""
        return min(self.high, self.low)

    def constants(self) -> tuple[float, float, float]:
        """What the kernel takes."""
        return self.high, self.low, self.cutoff

    def temperature(self, entropy: Tensor, candidates: Tensor | int | None = None) -> Tensor:
        """See `temperature_rule`. `candidates` are not looked at."""
        return temperature_of(self.name, self.constants(), MIN_TEMPERATURE, _entropies(entropy), None)


@dataclasses.dataclass(frozen=True)
class EDTemperature:
    """T = max(base N^(theta / H), minimum) (EDT, 2403.14541; the bound is ours).

    T falls to 0 as H does, and rises towards `base`. The paper tunes base and theta for each task.
    """

    name: ClassVar[str] = "edt"

    base: float
    """The highest T: in [MIN_TEMPERATURE, MAX_TEMPERATURE]."""

    theta: float
    """In nats, above 0: at this entropy T is N times `base`."""

    N: float = 0.8
    """In (0, 1), the paper's default."""

    minimum: float = MIN_TEMPERATURE
    """The lowest T: 0 (greedy below MIN_TEMPERATURE), or in [MIN_TEMPERATURE, base]."""

    def __post_init__(self) -> None:
        _check("base", self.base, MIN_TEMPERATURE, MAX_TEMPERATURE)
        _check("theta", self.theta, 0.0, open_low=True)
        _check("N", self.N, 0.0, 1.0, open_low=True)
        _check_temperature("minimum", self.minimum)
        checks.require(self.minimum <= self.base, "minimum", self.minimum, f"at most base ({self.base})")

    @property
    def lowest(self) -> float:
        """No temperature is below it; at 0 some are greedy, and have no log-probability to train on."""
        return self.minimum

    def constants(self) -> tuple[float, float, float]:
        """What the kernel takes."""
        return self.base, self.theta * math.log2(self.N), self.minimum

    def temperature(self, entropy: Tensor, candidates: Tensor | int | None = None) -> Tensor:
        """See `temperature_rule`. `candidates` are not looked at."""
        return temperature_of(self.name, self.constants(), MIN_TEMPERATURE, _entropies(entropy), None)


@dataclasses.dataclass(frozen=True)
class DynamicTemperature:
    """T = low + (high - low) (H / log n)^exponent, n = how many logits of the row are above -inf (llama.cpp's
    "dynatemp").

    A uniform row gets `high`. A row with one candidate, whose H / log n is 0 / 0, gets `low`.
    """

    name: ClassVar[str] = "dynatemp"

    low: float
    """T at entropy 0: 0 (greedy) or in [MIN_TEMPERATURE, MAX_TEMPERATURE]."""

    high: float
    """T at the highest entropy that n candidates can have; as `low`, and not below it."""

    exponent: float = 1.0
    """Above 0; above 1, T stays near `low` for longer."""

    def __post_init__(self) -> None:
        _check_temperature("low", self.low)
        _check_temperature("high", self.high)
        checks.require(self.low <= self.high, "low", self.low, f"at most high ({self.high})")
        _check("exponent", self.exponent, 0.0, open_low=True)

    @property
    def lowest(self) -> float:
        """No temperature is below it; at 0 some are greedy, and have no log-probability to train on."""
        return self.low

    def constants(self) -> tuple[float, float, float]:
        """What the kernel takes."""
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
    """A decode step: logits `[..., V]` divided by temperature `[...]`, which was chosen by entropy `[...]`."""

    logits: Tensor
    temperature: Tensor
    entropy: Tensor


def temperature_rule(settings: Mapping[str, object]) -> TemperatureRule:
    """The rule of {"rule": "two_level" | "edt" | "dynatemp", its fields ...}.

    Its method `temperature(entropy, candidates=None)` gives T for known entropies: entropy `[...]` floating point, in
    nats, at temperature 1; candidates `[...]` or a number, of the logits above -inf, which only dynatemp reads. T is
    fp32 (fp64 for fp64 entropies) `[...]`, without gradient, and NaN where the entropy is.

    Raises ValueError on an unknown rule or field, a missing one, and a value out of its range.
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
    except RuntimeError:  # rows at more than one distance
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
    """(temperature, entropy) of rows of logits.

    Args:
        logits: `[..., V]`, bf16, fp16, fp32 or fp64; -inf where a token is excluded.
        rule: from `temperature_rule`, or made directly.

    Returns:
        T and H, both `[...]`, fp32 (fp64 for fp64 logits), without gradient; H in nats. A row that has a NaN or +inf
        or nothing above -inf gets NaN for both.
    """
    _check_logits(logits)
    _check_rule(rule)
    return _entropy_temperature(logits, rule.name, _fields(rule), False)[1:]


@torch.no_grad()
def scale_logits(
    logits: Tensor, rule: TemperatureRule, *, mask: Tensor | None = None, inplace: bool = False
) -> ScaledLogits:
    """The decode step: logits / T, T from each row's own entropy, in one pass over the vocabulary.

    Args:
        logits: `[..., V]`, bf16, fp16, fp32 or fp64; -inf where a token is excluded, and there it stays.
        rule: from `temperature_rule`, or made directly.
        mask: `[...]` bool, only with `inplace`: rows with False are left as they are; T is 1 and H 0 for them.
        inplace: overwrite the logits.

    Returns:
        `ScaledLogits`, without gradient. Its logits have the dtype of the logits (fp16 overflows above 65504 T), T and
        H are as in `entropy_temperature`. A row whose T is NaN becomes NaN, and no other.

    Raises:
        ValueError: a mask without `inplace`, a mask of another shape, `inplace` on rows that share memory.
        TypeError: a dtype that does not fit, a rule that is none.
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
