"""Test the README.md that a trainer writes next to its checkpoints."""

import json
import re
from importlib.metadata import PackageNotFoundError, version

import datasets

import rlloss.integrations.trl.model_card
from rlloss import __version__
from rlloss.integrations.trl.model_card import REMEDIES, about_run, dataset_of, options_that_differ
from rlloss.integrations.trl.trainer import GRPOConfig, GRPOTrainer
from tests.support.trl_harness import WithTrlsLoss, build_trainer


def card_of(trainer, **given) -> str:
    trainer.create_model_card(**given)
    return open(f"{trainer.args.output_dir}/README.md", encoding="utf-8").read()


def test_a_local_model_has_its_name_and_nothing_is_none(tmp_path):
    options = {"epsilon_high": 0.28, "top_entropy_quantile": 0.2, "temperature": 0.9, "hub_token": "hf_secret"}
    trainer = build_trainer(GRPOTrainer, GRPOConfig, tmp_path / "run", **options)
    text = card_of(trainer, model_name="run")
    assert "None" not in text and "hf_secret" not in text and "tmp" not in text.replace(str(tmp_path / "run"), "")
    assert "This model is a fine-tuned version of the local model `tiny`." in text
    assert f'pipeline("text-generation", model="{tmp_path / "run"}"' in text
    assert f"Trained with rlloss {__version__}, `loss_type='dapo'`." in text and f"\n- rlloss: {__version__}\n" in text
    assert "\n- Remedies: `epsilon_high=0.28`, `top_entropy_quantile=0.2`\n" in text
    (others,) = re.findall(r"^- Other options that differ from TRL's defaults: (.*)", text, re.M)
    # Options that build_trainer sets, and none with its default value.
    assert set(re.findall(r"`(\w+)=", others)) == {
        "per_device_train_batch_size", "num_generations", "max_completion_length", "temperature", "seed",
    }  # fmt: skip
    again = card_of(trainer, model_name="run")
    assert again == text and again.count("### rlloss") == 1
    assert "- Dataset: " not in text


def test_the_dataset_by_its_id_or_its_file(tmp_path):
    trainer = build_trainer(GRPOTrainer, GRPOConfig, tmp_path)
    text = card_of(trainer, dataset_name="some/prompts")
    assert "\n- Dataset: `some/prompts`\n" in text and "datasets/some/prompts) dataset" in text
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "w1"}))
    trainer.dataset_name = str(file)
    text = card_of(trainer)
    assert f"\n- Dataset: `{file}`\n" in text and "huggingface.co/datasets" not in text
    plain = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    assert dataset_of(plain) is None
    by_id = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "own___name"))
    assert dataset_of(by_id) == "own/name"


def test_trls_own_loss_and_a_model_without_a_name(tmp_path):
    trainer = build_trainer(WithTrlsLoss, GRPOConfig, tmp_path, top_entropy_quantile=0.5)
    setattr(trainer.model.config, "_name_or_path", "")  # noqa: B010
    text = card_of(trainer)
    assert "by TRL's own loss (get_high_entropy_mask overridden)." in text
    assert "This is a fine-tuned model." in text and "None" not in text


def test_remedies_are_options_and_derived_values_are_none(tmp_path):
    config = GRPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    assert options_that_differ(config) == {} and all(hasattr(config, name) for name in REMEDIES)
    config = GRPOConfig(
        output_dir=str(tmp_path), bf16=False, use_cpu=True, epsilon_low=0.1, gradient_accumulation_steps=2,
        steps_per_generation=4, lr_scheduler_type="cosine", vllm_server_host="10.0.0.1",
    )  # fmt: skip
    assert options_that_differ(config) == {
        "lr_scheduler_type": "cosine", "gradient_accumulation_steps": 2, "steps_per_generation": 4, "epsilon_low": 0.1,
    }  # fmt: skip


def test_a_run_says_what_it_is(tmp_path, monkeypatch):
    trainer = build_trainer(GRPOTrainer, GRPOConfig, tmp_path, epsilon_high=0.28)
    about = about_run(trainer)
    assert about["model"] == "tiny" and about["device"] == "cpu" and about["options"]["epsilon_high"] == "0.28"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", about["date"])
    libraries = ("torch", "triton", "trl", "transformers")
    assert about["versions"] == {"rlloss": __version__} | {name: version(name) for name in libraries}

    def without_triton(name):
        if name == "triton":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(rlloss.integrations.trl.model_card, "version", without_triton)
    assert list(about_run(trainer)["versions"]) == ["rlloss", "torch", "trl", "transformers"]
