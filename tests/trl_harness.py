"""A real GRPOTrainer around a tiny model, and random generation batches for its `_compute_loss`."""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

VOCABULARY = 48


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>"] + [f"w{i}" for i in range(VOCABULARY - 2)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def tiny_model(seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        initializer_range=0.3,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def build_trainer(trainer_class, config_class, output_dir, reward_funcs=None, **options):
    arguments = {
        "output_dir": str(output_dir), "report_to": "none", "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "per_device_train_batch_size": 4, "num_generations": 2,
        "max_completion_length": 8, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "seed": 0,
    }  # fmt: skip
    folder = f"{output_dir}/tiny"  # TRL loads the reference model by the policy's name
    tiny_model().save_pretrained(folder)
    return trainer_class(
        model=folder,
        reward_funcs=reward_funcs or (lambda completions, **_: [float(len(c)) for c in completions]),
        args=config_class(**{**arguments, **options}),
        train_dataset=Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(16)]}),
        processing_class=tiny_tokenizer(),
    )


def random_inputs(trainer, *, seed: int, per_token_advantage=False, tool_mask=False, spread=0.3, B=4, P=3, T=7):
    """A micro-batch as `_prepare_inputs` returns it; old and reference log-probabilities are noisy copies."""
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
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([prompt_mask, completion_mask], 1)
        logp = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, T)[0]
    inputs["old_per_token_logps"] = logp + spread * torch.randn(B, T, generator=g)
    inputs["ref_per_token_logps"] = logp + spread * torch.randn(B, T, generator=g)
    return inputs


def loss_gradients_metrics(trainer, compute_loss, inputs):
    """(loss, flat gradient, metrics logged by this call) of `compute_loss(trainer, model, inputs)`."""
    trainer.model.zero_grad()
    mode = "train" if trainer.model.training else "eval"
    trainer._metrics[mode].clear()
    loss = compute_loss(trainer, trainer.model, dict(inputs))
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    metrics = {name: values[-1] for name, values in trainer._metrics[mode].items()}
    trainer._metrics[mode].clear()
    return loss.detach(), gradient, metrics
