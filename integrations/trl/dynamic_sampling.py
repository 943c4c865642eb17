"""Replace groups without a signal by fresh prompts in a trainer of TRL (dynamic sampling, DAPO, 2503.14476)."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

try:
    from accelerate.utils import gather_object
except ImportError as error:
    raise ImportError('rlloss.integrations.trl.dynamic_sampling needs accelerate: pip install "rlloss[trl]"') from error

from rlloss import checks
from rlloss.integrations.trl import compat
from rlloss.integrations.trl.config import options
from rlloss.integrations.trl.zero_advantage import counted_tokens, has_rows

# Padding values other than 0, or than the pad token for ids: TRL's values, and 1 for temperatures, which divide logits.
PADDING = {"tool_mask": 1, "importance_sampling_ratio": 1, "temperatures": 1}

Draw = Callable[[list[dict]], tuple[dict, Any]]


def merge(output: dict, more: dict, places: list[int], rows: list[int], pad_token_id: int) -> dict:
    """Return the generation batch `output` with the rows `rows` of `more` at `places`. Neither input changes.

    Entries with one row per completion, tensors `[B, ...]` and lists, are merged. Both sides are padded to the longer
    of the two: prompts on the left, other tensors on the right. All other entries come from `output`.

    Raises:
        ValueError: the two batches differ in which entries have one row per completion.
    """
    B, b = output["completion_ids"].shape[0], more["completion_ids"].shape[0]
    names = [name for name, x in output.items() if has_rows(x, B)]
    others = [name for name, x in more.items() if has_rows(x, b)]
    checks.require(sorted(names) == sorted(others), "more", f"the entries {sorted(others)}", f"{sorted(names)}")
    merged = dict(output)
    for name in names:
        x, y = output[name], more[name]
        if isinstance(x, list):
            merged[name] = list(x)
            for place, row in zip(places, rows, strict=True):
                merged[name][place] = y[row]
            continue
        fill = pad_token_id if name.endswith("_ids") else PADDING.get(name, 0)
        width = None if x.dim() == 1 else max(x.shape[1], y.shape[1])
        x, y = (_widened(z, width, fill, left=name.startswith("prompt_")) for z in (x, y))
        x[torch.tensor(places, device=x.device)] = y[torch.tensor(rows, device=y.device)]
        merged[name] = x
    return merged


def _widened(x: Tensor, width: int | None, fill: float, left: bool) -> Tensor:
    """Return a copy of x padded to [B, width, ...]."""
    if width is None or x.shape[1] == width:
        return x.clone()
    wide = x.new_full((x.shape[0], width, *x.shape[2:]), fill)
    target = wide[:, width - x.shape[1] :] if left else wide[:, : x.shape[1]]
    target.copy_(x)
    return wide


def shuffled(n: int, rng: random.Random) -> Iterator[int]:
    """Yield 0 ... n - 1 in random order. Time and memory grow with the numbers taken, not with n."""
    moved: dict[int, int] = {}
    for i in range(n):
        j = rng.randrange(i, n)
        yield moved.get(j, j)
        moved[j] = moved.get(i, i)


class FreshPrompts:
    """Draws rows of a dataset in random order. Prompts in `seen` are left out, and no prompt comes twice.

    Every process draws the same sequence and takes its own part of it.
    """

    def __init__(self, dataset: Any, seen: set[str], seed: str):
        self._dataset, self._seen = dataset, set(seen)
        self._order = shuffled(len(dataset), random.Random(seed))

    def take(self, count: int, processes: int, process: int) -> list[dict]:
        """Return `count` rows for this process. If the dataset runs out, every process gets the same smaller number."""
        rows: list[dict] = []
        for i in self._order:
            row = self._dataset[i]
            if (key := prompt_key(row)) not in self._seen:
                self._seen.add(key)
                rows.append(row)
                if len(rows) == count * processes:
                    break
        count = len(rows) // processes
        return rows[process * count : (process + 1) * count]


def prompt_key(row: dict) -> str:
    return json.dumps(row["prompt"], sort_keys=True, default=str)


def match(dead: list[bool], dead_fresh: list[bool], processes: int) -> list[tuple[int, int]]:
    """Pair each dead group with a fresh group that is not dead, in order and within each process.

    dead, dead_fresh: for each group of all processes, whether it is dead. Every process has the same number of groups.
    """
    pairs, n, m = [], len(dead) // processes, len(dead_fresh) // processes
    for p in range(processes):
        places = [group for group in range(p * n, (p + 1) * n) if dead[group]]
        found = [group for group in range(p * m, (p + 1) * m) if not dead_fresh[group]]
        pairs += zip(places, found, strict=False)
    return pairs


class DynamicSampling:
    """Applies the option `dynamic_sampling_rounds` in a trainer of TRL.

    multimodal: names of the entries of a generation batch that hold other data than text.
    """

    def __init__(self, trainer: Any, multimodal: tuple[str, ...]):
        self.trainer, self.multimodal = trainer, multimodal

    @property
    def rounds(self) -> int:
        return options(self.trainer.args).dynamic_sampling_rounds

    def check(self) -> None:
        """Raise ValueError if the option cannot act."""
        trainer, rounds = self.trainer, self.rounds
        if rounds == 0:
            return
        for name in ("tools", "environment_factories", "rollout_func"):
            checks.require(not getattr(trainer, name, None), "dynamic_sampling_rounds", rounds, f"0 with {name}")
        dataset = trainer.train_dataset
        checks.require(
            hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"), "dynamic_sampling_rounds", rounds,
            f"0 with {type(dataset).__name__} as train_dataset: fresh prompts are taken by their index",
        )  # fmt: skip
        groups = trainer.args.generation_batch_size // trainer.num_generations
        checks.require(
            len(dataset) > groups, "dynamic_sampling_rounds", rounds,
            f"0 with {len(dataset)} prompts in train_dataset, of which a generation batch takes {groups}: none is left",
        )  # fmt: skip

    def replace(
        self, inputs: list[dict], output: dict, rewards: Tensor, dead_groups: Callable[[Tensor], list[bool]], draw: Draw
    ) -> tuple[dict, Tensor]:
        """Return the generation batch and its rewards after at most `rounds` further draws.

        inputs: this process's rows of the dataset, G equal rows per group. rewards: `[N, K]` of all processes.
        dead_groups: maps rewards to one bool per group, True if the group is dead. draw: maps inputs to (generation
        batch of this process, rewards of all processes). All processes see the same rewards, so they draw alike.
        """
        trainer, G = self.trainer, self.trainer.num_generations
        processes, process = trainer.accelerator.num_processes, trainer.accelerator.process_index
        self._require_text(output)
        dead = dead_groups(rewards)
        total, first, rounds = len(dead), sum(dead), 0
        per_process = total // processes
        prompts = self._fresh_prompts(inputs) if first else None
        while prompts is not None and rounds < self.rounds and any(dead):
            needed = max(sum(dead[start : start + per_process]) for start in range(0, total, per_process))
            fresh = prompts.take(needed, processes, process)
            if not fresh:  # every prompt of the dataset was drawn
                break
            rounds += 1
            # Deep copies: reward functions may write into their rows.
            drawn = [{name: copy.deepcopy(row[name]) for name in inputs[0]} for row in fresh for _ in range(G)]
            with compat.unlogged(trainer, "train"):
                more, more_rewards = draw(drawn)
            self._require_text(more)
            pairs = match(dead, dead_groups(more_rewards), processes)
            rewards = rewards.clone()
            for place, group in pairs:
                dead[place] = False
                rewards[place * G : (place + 1) * G] = more_rewards[group * G : (group + 1) * G]
            mine = [(a % per_process, b % len(fresh)) for a, b in pairs if a // per_process == process]
            if mine:
                places, rows = (
                    [group * G + i for group in groups for i in range(G)] for groups in zip(*mine, strict=True)
                )
                output = merge(output, more, places, rows, _pad_token_id(trainer))
        if sum(dead) < first and "num_items_in_batch" in output:
            output = dict(output)
            output["num_items_in_batch"] = trainer.accelerator.gather(counted_tokens(output).sum()).sum()
        log = compat.log_of(trainer, "train")
        log["dynamic_sampling/rounds"].append(float(rounds))
        log["dynamic_sampling/without_signal_share"].append(first / total)
        log["dynamic_sampling/replaced_share"].append((first - sum(dead)) / total)
        log["dynamic_sampling/left_share"].append(sum(dead) / total)
        return output, rewards

    def _fresh_prompts(self, inputs: list[dict]) -> FreshPrompts:
        trainer = self.trainer
        seen = set(gather_object(sorted({prompt_key(row) for row in inputs})))
        # One step may generate several times, so the seed includes the place within the accumulation window. A resumed
        # run starts at the beginning of a window, and so draws the same prompts.
        within = compat.micro_batches(trainer) % trainer.args.gradient_accumulation_steps
        seed = f"{trainer.args.seed} {trainer.state.global_step} {within}"
        return FreshPrompts(trainer.train_dataset, seen, seed)

    def _require_text(self, output: dict) -> None:
        found = [name for name in self.multimodal if output.get(name) is not None]
        checks.require(not found, "dynamic_sampling_rounds", self.rounds, f"0 with images ({', '.join(found)})")


def _pad_token_id(trainer: Any) -> int:
    return compat.tokenizer(trainer).pad_token_id
