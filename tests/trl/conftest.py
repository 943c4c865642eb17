"""Skip these tests if TRL or its requirements are missing. Skip tests of the lm_head if TRL's cannot be replaced."""

import importlib.metadata
import importlib.util

import pytest
from packaging.version import Version

from rlloss.lm_head import vocab_loop
from rlloss.torch_kernels import logits_tile

_missing = [name for name in ("trl", "datasets", "transformers") if importlib.util.find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if _missing else []
if importlib.util.find_spec("peft") is None:
    collect_ignore_glob.append("test_peft.py")
if not _missing and Version(importlib.metadata.version("trl")) < Version("1.15"):  # calls its lm_head itself
    of_the_head = ("lm_head", "model_card", "options", "remedies*", "run_summary", "zero_advantage*")
    collect_ignore_glob += [f"test_{name}.py" for name in of_the_head]

# Tests that train with the lm_head run in torch: interpreting kernels is slow, and tests/lm_head tests the kernels.
IN_TORCH = {
    "test_options", "test_advantages", "test_peft", "test_run_summary", "test_sweep", "test_trainer",
    "test_dynamic_sampling", "test_drop_in", "test_remedies",
}  # fmt: skip


@pytest.fixture(autouse=True)
def lm_head_in_torch(monkeypatch, request):
    if request.path.stem in IN_TORCH:
        monkeypatch.setattr(vocab_loop, "_folder", lambda x: logits_tile)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """A trainer of a tiny model. beta > 0 makes TRL build the parts for a KL; `apply_setting` resets it."""
    from rlloss.integrations.trl.trainer import GRPOConfig, GRPOTrainer
    from tests.support.trl_harness import build_trainer

    return build_trainer(GRPOTrainer, GRPOConfig, tmp_path_factory.mktemp("out"), beta=0.04)
