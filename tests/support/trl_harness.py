"""Build real GRPOTrainers with tiny models, random settings and batches, and compare TRL's loss with rlloss's."""

import math
import random
from pathlib import Path

import torch
import trl
from accelerate.state import AcceleratorState, PartialState
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from rlloss.integrations.trl.metrics import GAUGES
from rlloss.integrations.trl.trainer import GRPOTrainer

VOCABULARY = 48
TRL_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
# Gauges that an optimizer step logs; the last two from the third step on.
GAUGES_ALONE = {*GAUGES, "cov/entropy_change_slope", "cov/entropy_change_correlation"}
OURS_ALONE = {"rlloss/live_share", "rlloss/zero_advantage_share", "entropy/kept_share", "entropy/cutoff", *GAUGES_ALONE}
CONTROLLER = ("entropy_coef", "_last_world_entropy", "_entropy_window_stats")
TRLS_LOSS = trl.GRPOTrainer._compute_loss  # as it is before a test forbids it

# Every value of every option of the sweep.
VALUES = {
    "level": ["token", "sequence"],
    "delta": [None, None, 1.5, 4.0, 1.1],
    "beta": [0.0, 0.04],
    "bias_correction": [True, False],
    "rho": [1.0, 1.0, 0.5, 0.2, 0.0],
    "epsilon": [(0.2, 0.2), (0.2, 0.28), (0.1, 0.4)],
    "cispo_cap": [0.2, 1.0, 1.1, 5.0],
    "sapo": [(1.0, 1.05), (0.5, 2.0), (3.0, 0.7)],
    "vespo": [(2.0, 3.0, 3.0, 2.0), (1.0, 1.0, 2.0, 0.5), (0.5, 4.0, 1.5, 1.0)],
    "tool_mask": [True, False],
    "per_token_advantage": [True, False],
    "accumulation": [1, 2, 4],
    "steps_per_generation": [1, 2, 8],
    "off_policy": [None, 0.05, 0.2],
    "sampler": [None, "token", "sequence"],
    "sampler_logp": [None, "given", "with NaN"],
    "correction": [True, True, True, False],
    "on_policy": [True, False, False, False],
    "entropy": [None, None, "static", "adaptive"],
    "entropy_coef": [0.005, 0.3, -0.1],
    "entropy_target": [0.1, 3.0],
    "last_entropy": [math.inf, 0.05, 2.0],
    "aux_coef": [None, None, 0.05, 1.0],
    "train": [True, True, True, False],
    "spread": [0.05, 0.3, 1.0],
}
# A setting without optional features.
PLAIN = {
    "level": "token", "beta": 0.0, "delta": None, "rho": 1.0, "sampler": None, "sampler_logp": None,
    "off_policy": None, "entropy": None, "aux_coef": None, "train": True,
}  # fmt: skip


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>"] + [f"w{i}" for i in range(VOCABULARY - 2)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
    "eos_token_id": 1, "bos_token_id": None, "initializer_range": 0.3,
}  # fmt: skip


def tiny_model(seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**_COMMON))


def tiny_moe_model(seed: int = 0) -> Qwen3MoeForCausalLM:
    """A tiny mixture of experts. The logits of its router give TRL's auxiliary loss."""
    torch.manual_seed(seed)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_COMMON, **experts, router_aux_loss_coef=0.05))


def build_trainer(trainer_class, config_class, output_dir, reward_funcs=None, model=tiny_model, **options):
    arguments = {
        "output_dir": str(output_dir), "report_to": "none", "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "per_device_train_batch_size": 4, "num_generations": 2,
        "max_completion_length": 8, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "seed": 0,
    }  # fmt: skip
    folder = f"{output_dir}/tiny"  # TRL loads the reference model by the policy's name
    if not Path(folder, "config.json").exists():
        model().save_pretrained(folder)
    # A config resets accelerate's shared state, and the trainer creates it again. If the trainer raises before that,
    # the state is missing, and other trainers of the test file need it.
    shared = [(state, dict(state._shared_state)) for state in (AcceleratorState, PartialState)]
    try:
        return trainer_class(
            model=folder,
            reward_funcs=reward_funcs or (lambda completions, **_: [float(len(c)) for c in completions]),
            args=config_class(**{**arguments, **options}),
            train_dataset=Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(16)]}),
            processing_class=tiny_tokenizer(),
        )
    except Exception:
        for state, held in shared:
            state._shared_state.clear()
            state._shared_state.update(held)
        raise


def scored(trainer, rewards, G: int, aggregation: str, weights=None, scale="group"):
    """The advantages that TRL's own trainer computes from given rewards [N, K], for completions of one token."""
    N, K = rewards.shape
    trainer._generate = lambda prompts: ([[2]] * N, [[1]] * N, None, ["w2"] * N, None, {}, None, [])
    trainer._calculate_rewards = lambda *_: rewards.clone()
    trainer.num_generations, trainer.multi_objective_aggregation, trainer.scale_rewards = G, aggregation, scale
    trainer.reward_weights = torch.ones(K) if weights is None else torch.tensor(weights)
    trainer.reward_funcs, trainer.reward_func_names = [None] * K, [f"reward{k}" for k in range(K)]
    return trainer._generate_and_score_completions([{"prompt": "w2"}] * N)["advantages"]


def build_trainers(trainer_class, config_class, folder) -> dict:
    """{whether the model has experts: trainer}. beta > 0 makes TRL build the parts for a KL; the sweep varies it."""
    made = {False: tiny_model, True: tiny_moe_model}
    for moe, model in made.items():  # all before the first trainer: once there are ranks, only the first one saves
        model().save_pretrained(f"{folder}/{moe}/tiny")
    return {
        moe: build_trainer(trainer_class, config_class, f"{folder}/{moe}", model=model, beta=0.04)
        for moe, model in made.items()
    }


def draw_setting(seed: int) -> dict:
    r = random.Random(seed)
    loss_type = TRL_LOSS_TYPES[seed % len(TRL_LOSS_TYPES)]
    return {"loss_type": loss_type, **{name: r.choice(values) for name, values in VALUES.items()}}


def apply_setting(trainer, setting: dict, seed: int) -> dict:
    """Set the options where TRL's `_compute_loss` reads them, and return inputs that fit them."""
    trainer.loss_type = setting["loss_type"]
    trainer.importance_sampling_level = setting["level"]
    trainer.args.delta = setting["delta"]
    trainer.beta = setting["beta"]
    trainer.args.use_bias_correction_kl = setting["bias_correction"]
    trainer.top_entropy_quantile = setting["rho"]
    trainer.epsilon_low, trainer.epsilon_high = setting["epsilon"]
    if setting["loss_type"] == "cispo":
        trainer.epsilon_high = setting["cispo_cap"]
    trainer.args.sapo_temperature_pos, trainer.args.sapo_temperature_neg = setting["sapo"]
    for name, value in zip(("k_pos", "lambda_pos", "k_neg", "lambda_neg"), setting["vespo"], strict=True):
        setattr(trainer.args, f"vespo_{name}", value)
    trainer.current_gradient_accumulation_steps = setting["accumulation"]
    trainer.args.steps_per_generation = setting["steps_per_generation"]
    trainer.off_policy_mask_threshold = setting["off_policy"]
    trainer.use_vllm = setting["sampler"] is not None
    trainer.vllm_importance_sampling_correction = setting["correction"]
    trainer.entropy_coef = setting["entropy_coef"] if setting["entropy"] else 0.0
    trainer.use_adaptive_entropy = setting["entropy"] == "adaptive"
    trainer._entropy_bonus_enabled = setting["entropy"] is not None
    trainer._last_world_entropy, trainer._entropy_window_stats = setting["last_entropy"], None
    trainer.args.entropy_target, trainer.args.entropy_coef_delta = setting["entropy_target"], 0.02
    trainer.args.entropy_coef_min, trainer.args.entropy_coef_max = 0.0, 0.31
    trainer.aux_loss_enabled = setting["aux_coef"] is not None
    trainer.router_aux_loss_coef = setting["aux_coef"] or 0.0
    trainer.model.train(setting["train"])
    return setting_inputs(trainer, setting, seed)


def setting_inputs(trainer, setting: dict, seed: int) -> dict:
    inputs = random_inputs(
        trainer,
        seed=seed,
        per_token_advantage=setting["per_token_advantage"],
        tool_mask=setting["tool_mask"],
        spread=setting["spread"],
    )
    if setting["on_policy"]:
        del inputs["old_per_token_logps"]
    g = torch.Generator().manual_seed(seed)
    if setting["sampler"] is not None:
        counted = inputs["completion_mask"].bool()
        if setting["tool_mask"]:
            counted = counted & inputs["tool_mask"].bool()
        if setting["sampler"] == "sequence":
            counted = counted.any(-1, keepdim=True)
        ratio = torch.rand(counted.shape, generator=g) * 2
        # Exactly 1 at tokens that do not count, as in TRL: its "vespo" sums every column.
        inputs["importance_sampling_ratio"] = torch.where(counted, torch.where(ratio < 0.4, 0.0, ratio), 1.0)
    if setting["sampler_logp"] is not None:
        sampler_logp = inputs["ref_per_token_logps"] + 0.1
        unscored = torch.rand(sampler_logp.shape, generator=g) < 0.3
        inputs["sampling_per_token_logps"] = (
            sampler_logp.masked_fill(unscored, torch.nan) if setting["sampler_logp"] == "with NaN" else sampler_logp
        )
    return inputs


def random_inputs(trainer, *, seed: int, per_token_advantage=False, tool_mask=False, spread=0.3, B=4, P=3, T=7):
    """A micro-batch as from `_prepare_inputs`. Old and reference log-probabilities are noisy copies."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, T + 1, (B,), generator=g)
    lengths[0] = T
    completion_mask = (torch.arange(T) < lengths[:, None]).long()
    prompt_mask = (torch.arange(P) >= torch.randint(0, P, (B, 1), generator=g)).long()
    inputs = {
        "prompt_ids": torch.randint(2, VOCABULARY, (B, P), generator=g),
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(2, VOCABULARY, (B, T), generator=g),
        "completion_mask": completion_mask,
        "num_items_in_batch": completion_mask.sum() * trainer.args.steps_per_generation + 3,
    }
    shape = (B, T) if per_token_advantage else (B,)
    inputs["advantages"] = torch.randn(shape, generator=g)
    inputs["advantages"].flatten()[1] = 0.0
    if tool_mask:
        inputs["tool_mask"] = (torch.rand(B, T, generator=g) < 0.7).long()
    with torch.no_grad():
        logp = trainer._get_per_token_logps_and_entropies(trainer.model, *model_inputs(inputs).values(), T)[0]
    inputs["old_per_token_logps"] = logp + spread * torch.randn(B, T, generator=g)
    inputs["ref_per_token_logps"] = logp + spread * torch.randn(B, T, generator=g)
    return inputs


def model_inputs(inputs) -> dict:
    """The arguments of a plain call of the model, from a micro-batch."""
    return {
        "input_ids": torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
        "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
    }


def loss_gradients_metrics(trainer, compute_loss, inputs):
    """(loss, flat gradient, metrics logged by this call) of `compute_loss(trainer, model, inputs)`."""
    trainer.model.zero_grad()
    mode = "train" if trainer.model.training else "eval"
    trainer._metrics[mode].clear()
    loss = compute_loss(trainer, trainer.model, dict(inputs))
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    assert all(len(values) == 1 for values in trainer._metrics[mode].values())
    metrics = {name: values[-1] for name, values in trainer._metrics[mode].items()}
    trainer._metrics[mode].clear()
    return loss.detach(), gradient, metrics


def end_step(trainer, ends: bool) -> None:
    """Set whether the next micro-batch is the last of an optimizer step."""
    trainer.accelerator.gradient_state._set_sync_gradients(ends)


class WithTrlsLoss(GRPOTrainer):
    """Overrides a function that TRL's loss calls, so that the trainer uses TRL's loss."""

    def get_high_entropy_mask(self, *args, **kwargs):
        return super().get_high_entropy_mask(*args, **kwargs)


class Rivals:
    """TRL's loss and rlloss's on one trainer, each with its own entropy controller."""

    def __init__(self, trainer, our_loss):
        self.trainer, self.our_loss = trainer, our_loss
        self.theirs = self.ours = {name: getattr(trainer, name) for name in CONTROLLER}

    def compare(self, inputs, note) -> None:
        plan, self.trainer.args.lm_head_plan = self.trainer.args.lm_head_plan, "trl"
        try:
            expected, self.theirs = self._step(TRLS_LOSS, inputs, self.theirs)
        finally:
            self.trainer.args.lm_head_plan = plan
        found, self.ours = self._step(self.our_loss, inputs, self.ours)
        assert_same_step(found, expected, note)
        assert set(found[2]) - OURS_ALONE == set(expected[2]), note
        for name, value in expected[2].items():
            assert equal(found[2][name], value), (note, name, value, found[2][name])
        for name, value in self.theirs.items():
            assert equal(self.ours[name], value), (note, name, value, self.ours[name])

    def _step(self, compute_loss, inputs, controller):
        for name, value in controller.items():
            setattr(self.trainer, name, value)
        result = loss_gradients_metrics(self.trainer, compute_loss, inputs)
        return result, {name: getattr(self.trainer, name) for name in CONTROLLER}


# Rounding of the longest sums, those over the vocabulary, in the forward and the backward: 1.1e-5.
ROUNDING = 2 * VOCABULARY * torch.finfo(torch.float32).eps


def assert_same_step(found, expected, note="") -> None:
    """Compare the loss, a mean of tokens of size 1 that may cancel, and the gradient relative to its norm."""
    assert abs(found[0] - expected[0]) <= ROUNDING * max(1, abs(expected[0])), f"{note}: loss"
    assert found[1].shape == expected[1].shape
    assert (found[1] - expected[1]).norm() <= ROUNDING * expected[1].norm().clamp(min=1e-3), f"{note}: gradient"


def equal(found, expected) -> bool:
    """Whether values are equal to 1e-5. None equals None, and NaN equals NaN."""
    if found is None or expected is None:
        return found is expected
    if isinstance(expected, torch.Tensor):
        return torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    return math.isclose(found, expected, rel_tol=1e-5, abs_tol=1e-6) or (math.isnan(found) and math.isnan(expected))


def compare_setting(trainers: dict, our_loss, seed: int, inputs_seed: int | None = None) -> None:
    """Compare on random setting `seed`. With an adaptive bonus: four micro-batches in two steps, the third in eval."""
    setting, inputs_seed = draw_setting(seed), seed if inputs_seed is None else inputs_seed
    trainer = trainers[setting["aux_coef"] is not None]
    inputs = apply_setting(trainer, setting, inputs_seed)
    rivals = Rivals(trainer, our_loss)
    if setting["entropy"] != "adaptive":
        end_step(trainer, bool(seed // 8 % 2))
        rivals.compare(inputs, setting)
        return
    for i, (train, ends) in enumerate([(True, False), (True, True), (False, True), (True, True)]):
        trainer.model.train(train and setting["train"])
        end_step(trainer, ends)
        inputs = setting_inputs(trainer, setting, inputs_seed + 1000 * i)
        rivals.compare(inputs, (i, setting))
