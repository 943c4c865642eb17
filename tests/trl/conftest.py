"""Not collected where TRL is missing, or what it needs."""

import importlib.util

import pytest

from rlloss.lm_head import vocab_loop
from rlloss.torch_kernels import logits_tile

_missing = [name for name in ("trl", "datasets", "transformers") if importlib.util.find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if _missing else []
if importlib.util.find_spec("peft") is None:
    collect_ignore_glob.append("test_peft.py")

# What trains with the lm_head: an interpreted program a row takes a while, and tests/lm_head has the kernels.
IN_TORCH = {
    "test_options", "test_advantages", "test_peft", "test_run_summary", "test_sweep", "test_trainer",
    "test_dynamic_sampling", "test_drop_in", "test_remedies",
}  # fmt: skip


@pytest.fixture(autouse=True)
def lm_head_in_torch(monkeypatch, request):
    if request.path.stem in IN_TORCH:
        monkeypatch.setattr(vocab_loop, "_folder", lambda x: logits_tile)
