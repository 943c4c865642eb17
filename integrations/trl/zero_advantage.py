"""Find dead completions of a micro-batch, and run them without gradient or not at all.

A completion is dead if its advantage is exactly 0 wherever a token counts, or if no token counts. Its gradient is 0.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlloss import checks
from rlloss.integrations.trl import compat
from rlloss.integrations.trl.batch_dependence import BatchDependence
from rlloss.integrations.trl.config import given, options
from rlloss.integrations.trl.model_call import ModelCall, Parts
from rlloss.loss_types import LOSSES

CHOICES = ("auto", "forward_only", "drop", "keep")
# Measured on an H200 with the 4-layer Llama of benchmarks/suites/step.py in fp32: a second call of the model took the
# host 8 ms, which is 0.2 ms for each module without children, and the backward ran at 34 TFLOP/s. A large product in
# bf16 ran at 650 TFLOP/s (benchmarks/results/nvidia-h200/hidden.json).
SECONDS_OF_MODULE = 2e-4
FLOPS, FLOPS_OF_HALF = 34e12, 650e12
READ = ("advantages", "completion_mask", "tool_mask")  # entries that `look` reads

logger = logging.getLogger(__name__)


def counted_tokens(inputs: dict) -> Tensor:
    """Mask `[B, T]` bool of the tokens of a micro-batch that are neither padding nor written by a tool."""
    mask = inputs["completion_mask"].bool()
    return mask & inputs["tool_mask"].bool() if inputs.get("tool_mask") is not None else mask


def dead_completions(inputs: dict) -> Tensor:
    """Mask `[B]` bool. A completion with a NaN advantage is not dead, so that the NaN reaches the loss."""
    zero = inputs["advantages"] == 0.0
    return ((zero.unsqueeze(1) if zero.dim() == 1 else zero) | ~counted_tokens(inputs)).all(-1)


class Rows(NamedTuple):
    """A micro-batch on the host. dead: one bool per completion. reach: number of columns up to its last token."""

    dead: list[bool]
    reach: list[int]

    def of(self, rows: list[int]) -> "Rows":
        return Rows([self.dead[i] for i in rows], [self.reach[i] for i in rows])


def look(batches: list[dict]) -> list[Rows]:
    """Read all micro-batches with one transfer to the host."""
    if not batches:
        return []
    tables = []
    for inputs in batches:
        mask = inputs["completion_mask"].bool()
        column = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        reach = nn.functional.pad(torch.where(mask, column, 0), (1, 0)).amax(-1)
        tables.append(torch.stack([dead_completions(inputs).long(), reach]))
    dead, reach = torch.cat(tables, dim=1).tolist()
    rows, start = [], 0
    for table in tables:
        end = start + table.shape[1]
        rows.append(Rows([bool(x) for x in dead[start:end]], reach[start:end]))
        start = end
    return rows


def split(rows: Rows, agreed: bool | None = None) -> Parts:
    """Decide which rows run with gradient and which without.

    agreed: whether any process has a dead row, in which case all make both calls. None: there is only one process. At
    least one row runs with gradient: the loss must be differentiable, and its backward must reach every parameter.
    """
    B = len(rows.dead)
    if agreed is False:
        return Parts(list(range(B)), [])
    live = [i for i in range(B) if not rows.dead[i]]
    dead = [i for i in range(B) if rows.dead[i]]
    shortest = min(range(B), key=lambda i: (rows.reach[i] == 0, rows.reach[i]))
    if not live:
        live = [shortest]
        dead.remove(shortest)
    return Parts(live, dead or [shortest]) if agreed else Parts(live, dead)


class Memory:
    """Stores the rows of all micro-batches of a generation batch in advance, and the agreement of the processes."""

    def __init__(self):
        self._known: list[tuple[Tensor, list[tuple], Rows, bool | None]] = []

    def remember(
        self,
        batches: list[dict],
        agree: Callable[[list[bool]], list[bool]] | None,
        pays: Callable[[Rows], bool] = lambda rows: any(rows.dead),
    ) -> None:
        """Store these micro-batches. agree: elementwise "any" over the processes; None: there is only one process.
        pays: whether this process wants two calls for these rows."""
        rows = look(batches)
        agreed = [None] * len(rows) if agree is None else agree([pays(r) for r in rows])
        self._known = [
            (inputs["completion_ids"], _state(inputs), *known)
            for inputs, *known in zip(batches, rows, agreed, strict=True)
        ]

    def recall(
        self,
        inputs: dict,
        agree: Callable[[list[bool]], list[bool]] | None,
        pays: Callable[[Rows], bool] = lambda rows: any(rows.dead),
    ) -> tuple[Rows, bool | None]:
        """Return the present rows and the agreement. The agreement does not change: other processes rely on it."""
        known = next((known for known in self._known if known[0] is inputs["completion_ids"]), None)
        _, state, rows, agreed = known or (None, None, None, None)
        if rows is None or not _same(state, _state(inputs)):
            rows = look([inputs])[0]
        if agreed is None and agree is not None:
            agreed = agree([pays(rows)])[0]
        return rows, agreed


def _state(inputs: dict) -> list[tuple]:
    """A state that changes if a tensor that `look` has read is replaced or overwritten."""
    tensors = [inputs.get(name) for name in READ]
    return [(x, 0 if x is None or x.is_inference() else x._version) for x in tensors]


def _same(state: list[tuple] | None, now: list[tuple]) -> bool:
    return state is not None and all(a is b and m == n for (a, m), (b, n) in zip(state, now, strict=True))


def has_rows(x: object, B: int) -> bool:
    return (isinstance(x, Tensor) and x.dim() >= 1 and x.shape[0] == B) or (isinstance(x, list) and len(x) == B)


def take(inputs: dict, rows: list[int]) -> dict:
    """Return the micro-batch with these rows only, for every entry that has one row per completion."""
    B, result = inputs["completion_ids"].shape[0], dict(inputs)
    for name, x in inputs.items():
        if has_rows(x, B):
            result[name] = x[rows] if isinstance(x, Tensor) else [x[i] for i in rows]
    return result


class SecondCall:
    """Weighs a second call of the model by a GPU's host against the backward that it saves. half: in bf16 or fp16."""

    def __init__(self, model: Any, half: bool):
        self.model = model
        heads = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
        not_counted = {id(p) for head in heads for p in head.parameters()}
        backbone = [p for p in model.parameters() if id(p) not in not_counted]
        # Two operations a token for each weight that a gradient passes, and two more for the gradient of that weight.
        # (ZeRO-3 empties parameters and notes their size.)
        flop = sum(2 * getattr(p, "ds_numel", p.numel()) * (1 + p.requires_grad) for p in backbone)
        self._seconds_of_token = flop / (FLOPS_OF_HALF if half else FLOPS)
        self._seconds = SECONDS_OF_MODULE * sum(not m._modules for m in model.modules())

    def pays(self, tokens: int) -> bool:
        """Return whether `tokens` tokens without a gradient should run in a call of their own."""
        return self._seconds_of_token * tokens >= self._seconds


class ZeroAdvantage:
    """Applies the option `zero_advantage` in a trainer of TRL: decides which completions run, and how.

    multimodal: names of the entries of a micro-batch that hold other data than text.
    """

    def __init__(self, trainer: Any, multimodal: tuple[str, ...]):
        self.trainer, self.multimodal = trainer, multimodal
        self.memory, self.said = Memory(), set()
        self.dependence: BatchDependence | None = None
        self.second_call: SecondCall | None = None
        self.without_backward = 0
        """Number of completions of this process so far that ran without backward or did not run."""

    @property
    def choice(self) -> str:
        return options(self.trainer.args).zero_advantage

    def check(self, trls_own: str | None) -> None:
        """Raise ValueError if the option would be ignored or would change the loss. trls_own: why the loss is TRL's."""
        trainer, choice = self.trainer, self.choice
        checks.one_of("zero_advantage", choice, CHOICES)
        if trls_own is not None:
            expected = f"'auto', 'forward_only' or 'keep' with {trls_own}, where the loss is TRL's own"
            checks.require(choice != "drop", "zero_advantage", repr(choice), expected)
            return
        looks = self._why_picks_here()
        # With the other scopes the cutoff is known before the micro-batch.
        if trainer.top_entropy_quantile < 1.0 and options(trainer.args).entropy_scope == "microbatch":
            looks = f"top_entropy_quantile={trainer.top_entropy_quantile}"
        checks.require(
            choice != "drop" or looks is None, "zero_advantage", repr(choice),
            f"'auto', 'forward_only' or 'keep' with {looks}, whose selection looks at every completion",
        )  # fmt: skip

    def says(self, trls_own: str | None, trls_call: str | None) -> str:
        """Describe how completions with advantage 0 run, and why. trls_own, trls_call: why TRL computes the loss, or
        calls the model, itself; None: it does not."""
        why = f"zero_advantage={self.choice!r}" if self.choice == "keep" else trls_own or self._why_one_call(trls_call)
        of_them = "completions whose advantage is 0"
        if why is not None:
            return f"{of_them} run as the others do ({why})"
        on_gpu = self.choice == "auto" and self.trainer.accelerator.device.type != "cpu"
        run = "do not run" if self.choice == "drop" else "run forward only"
        return f"{of_them} {run}{' where that saves more than a second call costs' if on_gpu else ''}"

    def look_ahead(self, batches: list[dict]) -> None:
        """Read all micro-batches of a new generation batch at once."""
        if self.choice != "keep":
            self.memory.remember(batches, self._agreement(batches), self._pays)

    def apart(self, model: Any, inputs: dict, trls_call: str | None) -> tuple[Any, dict]:
        """Return the model to call and the micro-batch for it. Decided each step: callbacks may change settings."""
        trainer, choice, sees = self.trainer, self.choice, self._sees(inputs)
        together = self._why_compiled() or self._why_together()
        why = trls_call or together or self._why_all_live()
        splits = choice != "keep" and trainer.model.training and torch.is_grad_enabled()
        if splits and (why is not None or sees):
            self._say(f"zero_advantage={choice!r}: one call per micro-batch with {why or 'images'}")
        splits = splits and why is None
        if trls_call is not None:
            return model, inputs
        trims = choice != "keep" and together is None and not sees
        if not splits and not trims:
            return ModelCall(model, inputs, temperatures=inputs.get("temperatures")), inputs

        B = len(inputs["completion_ids"])
        rows, agreed = self.memory.recall(inputs, self._agreement([inputs]) if splits else None, self._pays)
        if agreed is None and not self._pays(rows):
            agreed = False
        parts = split(rows, False if sees or not splits else None if choice == "drop" else agreed)
        if choice == "drop" and len(parts.live) < len(rows.dead):
            inputs, rows = take(inputs, parts.live), rows.of(parts.live)
            parts = split(rows, False)
        self.without_backward += B - len(parts.live)
        cuts = trims and not self._of_model().on_length
        multiple = getattr(trainer.args, "pad_to_multiple_of", None) or 1
        call = ModelCall(
            model, inputs, parts=parts, reach=rows.reach if cuts else None, multiple=multiple,
            temperatures=inputs.get("temperatures"),
        )  # fmt: skip
        return call, inputs

    def _pays(self, rows: Rows) -> bool:
        """Return whether this process wants a second call for its dead rows. On a CPU that always pays."""
        if self.choice != "auto" or self.trainer.accelerator.device.type == "cpu":
            return any(rows.dead)
        if self.second_call is None or self.second_call.model is not self.trainer.model:
            self.second_call = SecondCall(self.trainer.model, self.trainer._compute_dtype().itemsize == 2)
        tokens = sum(n for n, dead in zip(rows.reach, rows.dead, strict=True) if dead)
        return any(rows.dead) and self.second_call.pays(tokens)

    def _agreement(self, batches: list[dict]):
        """A function by which processes agree on the micro-batches that all run in two calls. None: not needed."""
        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1 or self.choice not in ("auto", "forward_only"):
            return None

        def agree(has_dead: list[bool]) -> list[bool]:
            own = [[dead, self._sees(inputs)] for dead, inputs in zip(has_dead, batches, strict=True)]
            found = torch.tensor(own, dtype=torch.float32, device=batches[0]["completion_ids"].device)
            return [dead > 0 and seeing == 0 for dead, seeing in accelerator.reduce(found, reduction="sum").tolist()]

        return agree

    def _sees(self, inputs: dict) -> bool:
        return any(inputs.get(name) is not None for name in self.multimodal)

    def _of_model(self) -> BatchDependence:
        if self.dependence is None or self.dependence.model is not self.trainer.model:
            self.dependence = BatchDependence(self.trainer.model)
        return self.dependence

    def _why_one_call(self, trls_call: str | None) -> str | None:
        return trls_call or self._why_compiled() or self._why_together() or self._why_all_live()

    def _why_compiled(self) -> str | None:
        """Why a call with another shape would compile another graph, or None."""
        by_accelerate = self.trainer.accelerator.state.dynamo_plugin.backend != "NO"
        return "torch.compile" if by_accelerate or self._of_model().compiled else None

    def _why_together(self) -> str | None:
        """Why a completion's log-probabilities depend on the other completions of its call, or None."""
        if self.trainer.aux_loss_enabled:
            return "an auxiliary loss"
        if getattr(self.trainer.args, "neftune_noise_alpha", None):
            return f"neftune_noise_alpha={self.trainer.args.neftune_noise_alpha}"
        return self._of_model().why()

    def _why_all_live(self) -> str | None:
        """Why every completion has a gradient, or None."""
        if self.trainer.beta != 0.0:
            return f"beta={self.trainer.beta}"
        row = LOSSES.get(self.trainer.loss_type)
        if row is not None and not row.silent_without_advantage:
            return f"loss_type={self.trainer.loss_type!r}"
        return "an entropy bonus" if compat.has_entropy_bonus(self.trainer) else None

    def _why_picks_here(self) -> str | None:
        """The loss, if it picks tokens within one micro-batch, or None."""
        settings = given(options(self.trainer.args).covariance) or {}
        row = LOSSES.get(self.trainer.loss_type)
        picks = row is not None and row.picks is not None and settings.get("scope") != "generation"
        return f"loss_type={self.trainer.loss_type!r}" if picks else None

    def _say(self, reason: str) -> None:
        if reason not in self.said:
            self.said.add(reason)
            logger.info("%s", reason)
