"""Test `compat`, the interface to private parts of TRL: the installed TRL has them, and no other file names them."""

import ast
import inspect
from pathlib import Path

import pytest
import trl
from packaging.version import Version

from rlloss.integrations.trl import GRPOConfig, GRPOTrainer, compat
from rlloss.integrations.trl.config import PluginOptions, options
from tests.support.trl_harness import build_trainer

FOLDER = Path(compat.__file__).parent
PRIVATE = {*compat.HOOKS, *compat.ATTRIBUTES, *compat.LM_HEAD} - {"DTensor"}


def test_what_is_named_is_there(tmp_path):
    found = Version(trl.__version__)
    assert all(hasattr(trl.GRPOTrainer, name) for name, since in compat.HOOKS.items() if found >= Version(since))
    assert all(hasattr(compat.utils, name) for name, since in compat.LM_HEAD.items() if found >= Version(since))
    compat.check(build_trainer(GRPOTrainer, GRPOConfig, tmp_path))
    assert set(compat.REPLACED) <= set(compat.LM_HEAD)


def test_what_trl_lacks_is_an_error_that_names_it(tmp_path):
    trainer = build_trainer(GRPOTrainer, GRPOConfig, tmp_path)
    del trainer._buffered_inputs
    with pytest.raises(AttributeError, match="does not fit rlloss: its trainer has no _buffered_inputs; expected TRL"):
        compat.check(trainer)


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: path.stem)
def test_no_other_file_names_a_private_part_of_trl(path):
    """The trainer overrides the hooks: it defines them, calls TRL's own, and asks whether a subclass overrides them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    named |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    allowed = PRIVATE if path.stem == "compat" else set(compat.HOOKS) if path.stem == "trainer" else set()
    if path.stem == "advantages":
        allowed = {"_calculate_rewards"}  # in an error
    if path.stem == "lm_head":
        allowed = {"maybe_gather_lm_head_ctx"}  # called inside `LmHead`, looked up in TRL each time
    assert named & PRIVATE <= allowed


def test_a_private_name_of_trl_is_known():
    """Every private attribute that a file reads from a trainer is rlloss's own or listed in the table."""
    own = {name for name, _ in inspect.getmembers(GRPOTrainer) if not hasattr(trl.GRPOTrainer, name)}
    source = inspect.getsource(trl.GRPOTrainer)
    for path in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("trainer", "self.trainer"):
                name = node.attr
                if name.startswith("_") and name not in own and f"self.{name}" in source:
                    assert name in PRIVATE, (path.name, name)


def test_options_are_typed_and_have_one_default(tmp_path):
    ours, theirs = (
        GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, exact_k=True),
        trl.GRPOConfig(str(tmp_path), use_cpu=True, bf16=False),
    )
    assert options(ours) is ours and options(ours).exact_k
    assert options(theirs) == PluginOptions() and not options(theirs).exact_k
    for path in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and len(node.args) == 3:
                name = ast.unparse(node.args[1]).strip("'\"")
                assert name not in PluginOptions.__dataclass_fields__, (path.name, node.lineno)
