"""Build the contenders of the update step: real GRPOTrainers with the same tiny Llama, and one batch for them."""

import contextlib
import functools
import importlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.shapes import Llama
from benchmarks.harness.timing import CUDA, DEVICE

RHO = 0.2
GENERATIONS = 4


@functools.cache
def _folder(size: Llama) -> tempfile.TemporaryDirectory:
    """Return a folder from which every trainer loads the same weights. It is deleted at the end of the process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.V, hidden_size=size.D, intermediate_size=size.F, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, max_position_embeddings=size.P + size.T, pad_token_id=0, eos_token_id=1,
        bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # logits of standard deviation 4: medium entropies
        model.lm_head.weight.mul_(4 / (config.initializer_range * size.D**0.5))
    folder = tempfile.TemporaryDirectory()
    model.save_pretrained(folder.name)
    return folder


def _tokenizer(V: int):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>"] + [f"w{i}" for i in range(V - 2)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def build_trainer(trainer_class, config_class, size: Llama, **options):
    """Build a trainer in training mode: fp32, on-policy, "dapo", one micro-batch per step."""
    from datasets import Dataset

    folder = _folder(size).name
    arguments = {
        "output_dir": folder, "report_to": "none", "use_cpu": not CUDA, "bf16": False, "gradient_checkpointing": False,
        "per_device_train_batch_size": size.B, "num_generations": GENERATIONS, "max_completion_length": size.T,
        "disable_tqdm": True, "save_strategy": "no", "seed": 0, "top_entropy_quantile": RHO, "loss_type": "dapo",
        "beta": 0.0, "steps_per_generation": 1, "gradient_accumulation_steps": 1,
    }  # fmt: skip
    adapter = {"peft_config": lora()} if options.pop("with_lora", False) else {}
    torch.manual_seed(0)  # an adapter is drawn at random
    trainer = trainer_class(
        model=folder,
        reward_funcs=lambda completions, **_: [float(len(c)) for c in completions],
        args=config_class(**{**arguments, **options}),
        train_dataset=Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(16)]}),
        processing_class=_tokenizer(size.V),
        **adapter,
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def make_batch(size: Llama, fill: float = 0.5) -> dict[str, Any]:
    """Make a micro-batch as from `_prepare_inputs`. The lengths fill the share `fill`; every other group is dead."""
    B, P, T = size.B, size.P, size.T
    g = torch.Generator().manual_seed(0)
    share = torch.rand(B, generator=g) + 0.2
    lengths = (share / share.sum() * fill * B * T).round().clamp(1, T).long()
    mask = (torch.arange(T) < lengths.unsqueeze(-1)).long()
    ids = torch.randint(2, size.V, (B, P + T), generator=g)
    group = torch.arange(B) // GENERATIONS
    advantages = torch.where(group % 2 == 0, torch.randn(B, generator=g), 0.0)
    inputs = {
        "prompt_ids": ids[:, :P],
        "prompt_mask": (torch.arange(P) >= torch.randint(0, P, (B, 1), generator=g)).long(),
        "completion_ids": ids[:, P:].where(mask.bool(), 0),
        "completion_mask": mask,
        "advantages": advantages,
        "num_items_in_batch": mask.sum(),
    }
    return {name: x.to(DEVICE) for name, x in inputs.items()}


def add_reference(trainer, inputs: dict) -> None:
    """Add log-probabilities of a reference model: the trainer's own, off by a tenth of a nat."""
    ids, mask = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    with torch.no_grad():
        T = inputs["completion_ids"].shape[1]
        logp, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, T)
    noise = torch.randn(logp.shape, generator=torch.Generator().manual_seed(1)).to(logp.device)
    inputs["ref_per_token_logps"] = logp + 0.1 * noise


class Result(NamedTuple):
    loss: Tensor
    gradients: dict[str, Tensor | None]
    metrics: dict[str, float]


@dataclass
class Contender:
    """A trainer and its way to run a step. mode: rlloss's zero_advantage. why_not: why it is not measured."""

    name: str
    trainer: Any
    mode: str | None = None
    why_not: str | None = None
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    def clear(self) -> None:
        self.trainer.model.zero_grad(set_to_none=True)
        self.trainer._metrics["train"].clear()

    def start(self, inputs: dict) -> Callable[[], Tensor]:
        """Compute the loss. Return the backward, which accumulates gradients in the model and returns the loss."""
        if self.mode is not None:
            self.trainer.args.zero_advantage = self.mode
        with self.context():
            loss = self.trainer._compute_loss(self.trainer.model, dict(inputs))

        def backward() -> Tensor:
            with self.context():
                loss.backward()
            return loss.detach()

        return backward

    def result(self, inputs: dict) -> Result:
        self.clear()
        loss = self.start(inputs)()
        gradients = {name: p.grad for name, p in self.trainer.model.named_parameters()}
        metrics = {name: values[-1] for name, values in self.trainer._metrics["train"].items()}
        self.clear()
        return Result(loss, gradients, metrics)


NOTES = {
    "TRL": "`GRPOTrainer._compute_loss` and backward",
    "TRL, patch_trl()": "the same, its fused lm_head replaced by rlloss's",
    "rlloss": "the same of rlloss's GRPOTrainer, with its defaults",
    "rlloss keep": "`zero_advantage='keep'`",
    "rlloss drop": "`zero_advantage='drop'`",
}


def lora() -> Any:
    """Return an adapter on the attention. Its second factor is not 0, as after a few steps."""
    peft: Any = importlib.import_module("peft")
    return peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")


def contenders(size: Llama, **options: Any) -> list[Contender]:
    """Return TRL's trainer, the same under `patch_trl` (undone after each step), and rlloss's modes. options: those of
    the trainers, and with_lora, whether they train an adapter only."""
    trl: Any = importlib.import_module("trl")
    trl_grpo: Any = importlib.import_module("rlloss.integrations.trl.trainer")
    patch_trl = importlib.import_module("rlloss.integrations.trl.lm_head").patch_trl
    of_trl = build_trainer(trl.GRPOTrainer, trl.GRPOConfig, size, **options)
    with patch_trl():
        under = build_trainer(trl.GRPOTrainer, trl.GRPOConfig, size, **options)
    ours = build_trainer(trl_grpo.GRPOTrainer, trl_grpo.GRPOConfig, size, **options)
    found = [Contender("TRL", of_trl), Contender("TRL, patch_trl()", under, context=patch_trl)]
    for mode, name in {"auto": "rlloss", "keep": "rlloss keep", "drop": "rlloss drop"}.items():
        contender = Contender(name, ours, mode)
        ours.args.zero_advantage = mode
        try:
            ours._make_loss_config()
        except ValueError as error:
            contender.why_not = f"refused: {error}"
        found.append(contender)
    return found
