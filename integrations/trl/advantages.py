"""Compute advantages from rewards in a trainer of TRL, with the options of GRPOConfig. Log gauges of the rewards."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rlloss import checks
from rlloss.integrations.trl import compat
from rlloss.integrations.trl.config import given, options
from rlloss.integrations.trl.dynamic_sampling import DynamicSampling
from rlloss.integrations.trl.zero_advantage import counted_tokens
from rlloss.rewards.advantages import Condition, group_advantage
from rlloss.rewards.overlong import SoftOverlongPenalty
from rlloss.rewards.resolution import reward_resolution

ROUNDING = 1e-2  # more than TRL leaves of an advantage that is 0, where rewards are about 1


def add_soft_overlong(trainer: Any) -> None:
    """Apply the option `soft_overlong_cache`: add a reward function with weight 1."""
    cache = options(trainer.args).soft_overlong_cache
    if cache is None:
        return
    penalty = SoftOverlongPenalty(trainer.args.max_completion_length, cache)
    name = penalty.__name__
    checks.require(
        name not in trainer.reward_func_names, "soft_overlong_cache", cache,
        f"None with a reward function that is called {name!r} already",
    )  # fmt: skip
    trainer.reward_funcs = [*trainer.reward_funcs, penalty]  # a new list: the user's own does not change
    trainer.reward_func_names = [*trainer.reward_func_names, name]
    trainer.reward_processing_classes = [*trainer.reward_processing_classes, None]
    trainer.reward_weights = torch.cat([trainer.reward_weights, trainer.reward_weights.new_ones(1)])


def conditions_by_index(conditions: dict | None, names: list[str]) -> list[Condition] | None:
    """Replace names by indices: {"length": ["correct", 1.0]} -> [(0, 1, 1.0)] for the names ["length", "correct"].

    Raises:
        ValueError: a name belongs to no reward function or to several, a value has another form, a reward is
            conditioned on itself, or there is only one reward function.
    """
    if conditions is None:
        return None
    option = "reward_conditions"
    checks.require(len(names) > 1, option, conditions, f"None with one reward function, {', '.join(names)}")
    checks.require(bool(conditions), option, conditions, "at least one condition, or None")
    triples = []
    for name, value in conditions.items():
        is_pair = isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], str)
        is_pair = is_pair and isinstance(value[1], int | float) and not isinstance(value[1], bool)
        checks.require(
            is_pair and value[1] == value[1], option, {name: value}, '{"reward": ["other reward", threshold]}'
        )
        other, threshold = value
        for of in (name, other):
            checks.one_of(option, of, names)
            checks.require(names.count(of) == 1, option, of, f"the name of one reward function; they are {names}")
        checks.require(name != other, option, {name: value}, "a condition on another reward")
        triples.append((names.index(name), names.index(other), float(threshold)))
    return triples


def rewards_of(name: str, rewards: Any, N: int) -> list:
    """Return the result of the reward function `name` as a list of numbers or None. TRL checks the length.

    Raises:
        TypeError: the result, or one of its entries, has another type.
    """
    expected = f"a list with a number, or None, for each of the {N} completions"
    try:
        found = None if isinstance(rewards, str | bytes | dict) else list(rewards)
    except TypeError:  # not iterable, or a 0-d tensor
        found = None
    if found is None:
        raise TypeError(f"reward function {name!r}: found {rewards!r}, expected {expected}")
    for reward in found:
        try:
            is_number = reward is None or not isinstance(reward, str | bytes) and float(reward) is not None
        except (TypeError, ValueError, RuntimeError):
            is_number = False
        if not is_number:
            raise TypeError(f"reward function {name!r}: found {reward!r} for a completion, expected {expected}")
    return found


def named(function: Any, name: str) -> Any:
    """Wrap a reward function so that errors in its result name it. Reward models are not wrapped."""
    if isinstance(function, nn.Module):
        return function

    def called(*, completions: list, **kwargs):
        return rewards_of(name, function(completions=completions, **kwargs), len(completions))

    async def awaited(*, completions: list, **kwargs):
        return rewards_of(name, await function(completions=completions, **kwargs), len(completions))

    inner = function.func if isinstance(function, functools.partial) else function
    is_async = inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(inner.__call__)
    return awaited if is_async else called


class RewardsToAdvantages:
    """Applies the options that concern the advantages of a generation batch.

    With several rewards it logs `reward_resolution/...` in training and evaluation: the numbers of
    `rlloss.rewards.reward_resolution`, for the first draw and after `reward_conditions`.
    """

    def __init__(self, trainer: Any, multimodal: tuple[str, ...]):
        self.trainer = trainer
        add_soft_overlong(trainer)
        conditions = given(options(trainer.args).reward_conditions)
        self.conditions = conditions_by_index(conditions, trainer.reward_func_names)
        self.dynamic_sampling = DynamicSampling(trainer, multimodal)
        self.dynamic_sampling.check()
        self.rewards: Tensor | None = None
        """Rewards `[N, K]` of all processes for the last generation batch. None: not known."""

    @property
    def token_weighted(self) -> bool:
        return options(self.trainer.args).gdpo_token_weighted

    def complete(self, inputs: list[dict], generate: Callable[[list[dict]], dict]) -> dict:
        """Return TRL's generation batch `generate(inputs)`, with the advantages that the options ask for.

        Without such options the batch stays as TRL made it, but for advantages that are 0 up to
        rounding.
        """
        trainer = self.trainer
        mode = "train" if trainer.model.training else "eval"
        G = trainer.num_generations if mode == "train" else trainer.num_generations_eval
        own = self.conditions is not None or self.token_weighted
        samples = mode == "train" and self.dynamic_sampling.rounds > 0

        def draw(inputs: list[dict]) -> tuple[dict, Tensor | None]:
            with compat.kept_rewards(self.trainer) as kept:
                output = generate(inputs)
            one = len(kept) == 1
            expected = "one per generation batch with options that read its rewards"
            checks.require(one or not (own or samples), "_calculate_rewards", f"{len(kept)} calls of it", expected)
            return output, kept[0] if one else None

        self.rewards = None
        output, rewards = draw(inputs)
        if rewards is None:  # a subclass computes rewards in its own way, and no option needs them
            return output
        self._log_resolution(rewards, G, mode)
        if own:
            self._log_advantages(self._advantages(rewards, G, self._token_counts(output)))
        if samples:
            output, rewards = self.dynamic_sampling.replace(
                inputs, output, rewards, lambda rewards: self._dead_groups(rewards, G), draw
            )
        if own or samples:
            B, process = output["advantages"].shape[0], trainer.accelerator.process_index
            advantages = self._advantages(rewards, G, self._token_counts(output))
            output["advantages"] = advantages[process * B : (process + 1) * B]
        elif not rewards.isinf().any():
            limit = ROUNDING * max(1.0, rewards.nan_to_num().abs().max().item())
            self._restore_zeros(output, self._advantages(rewards, G), limit)
        self.rewards = rewards
        return output

    def _restore_zeros(self, output: dict, exact: Tensor, limit: float) -> None:
        """Set the advantages to 0 that are 0 in `exact` and that TRL leaves at rounding, below `limit`.

        The mean of eight rewards of 0.1 is not 0.1, and the difference is divided by a standard deviation of 0 + 1e-4.
        With GDPO TRL subtracts the mean of the batch last, also from groups that had 0.
        """
        B, process = output["advantages"].shape[0], self.trainer.accelerator.process_index
        theirs, ours = output["advantages"], exact[process * B : (process + 1) * B].to(output["advantages"].device)
        output["advantages"] = theirs.masked_fill((ours == 0) & (theirs.abs() < limit), 0.0)

    def _log_advantages(self, advantages: Tensor) -> None:
        """Replace the advantages in TRL's table of completions."""
        logged = compat.logged_advantages(self.trainer)
        for i, advantage in enumerate(advantages.tolist()[::-1][: len(logged)], start=1):
            logged[-i] = advantage

    def checked(self, calculate: Callable[..., Tensor], *args, **kwargs) -> Tensor:
        """TRL's rewards [N, K]. Errors, and the warning about infinite rewards, name the reward function."""
        trainer, functions, names = self.trainer, self.trainer.reward_funcs, self.trainer.reward_func_names
        trainer.reward_funcs = [named(*pair) for pair in zip(functions, names, strict=True)]
        try:
            rewards = calculate(*args, **kwargs)
        finally:
            trainer.reward_funcs = functions
        for name, infinite in zip(names, rewards.isinf().any(0).tolist(), strict=True):
            if infinite:
                trainer._warn_once(
                    f"The reward function {name!r} returned an infinite reward. The advantages of its group are then "
                    "NaN, which TRL makes 0: the group teaches nothing. Return finite numbers, or None for a "
                    "completion without a score."
                )
        return rewards

    def _method(self) -> tuple[str, str]:
        """The arguments (method, scale) of `group_advantage`."""
        if self.trainer.multi_objective_aggregation == "normalize_then_sum":
            return "gdpo", "group"
        return "grpo", self.trainer.scale_rewards

    def _advantages(self, rewards: Tensor, G: int, token_counts: Tensor | None = None) -> Tensor:
        """Advantages `[N]` from the rewards `[N, K]` of all processes."""
        method, scale = self._method()
        return group_advantage(
            rewards, num_generations=G, method=method, scale=scale, weights=self.trainer.reward_weights,
            conditions=self.conditions, token_counts=token_counts,
        )  # fmt: skip

    def _token_counts(self, output: dict) -> Tensor | None:
        """Counted tokens `[N]` int64 of all processes. None: every completion has the same weight."""
        if not self.token_weighted:
            return None
        return self.trainer.accelerator.gather(counted_tokens(output).sum(1))

    def _dead_groups(self, rewards: Tensor, G: int) -> list[bool]:
        """Whether each group is dead. Computed without token counts: their weighted mean makes every advantage != 0."""
        return (self._advantages(rewards, G) == 0).unflatten(0, (-1, G)).all(1).tolist()

    def _log_resolution(self, rewards: Tensor, G: int, mode: str) -> None:
        trainer, K = self.trainer, rewards.shape[1]
        rewards = rewards.cpu()
        if K == 1 or rewards.isinf().any():  # TRL accepts infinite rewards
            return
        method, scale = self._method()
        if scale != "group":
            method = "dr_grpo"  # a std of the batch scales all groups equally
        names = list(trainer.reward_func_names)
        if len(set(names)) < K:
            names = [f"{k}:{name}" for k, name in enumerate(names)]
        weights = trainer.reward_weights.cpu()
        gauges = reward_resolution(
            rewards, num_generations=G, weights=weights, method=method, names=names, conditions=self.conditions
        )
        for name, value in gauges.items():
            compat.log_of(trainer, mode)[f"reward_resolution/{name}"].append(value)
