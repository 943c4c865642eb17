"""Test the exports of `rlloss`: a dozen names, imported at first use, and the other names in subpackages by subject."""

import ast
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys

import pytest
import torch

import rlloss

SUBJECTS = ("rewards", "tokens", "entropy", "losses", "lm_head")
FOLDERS = SUBJECTS + (("integrations.trl",) if importlib.util.find_spec("trl") else ())


@pytest.mark.parametrize("name", ["rlloss", *(f"rlloss.{folder}" for folder in FOLDERS)])
def test_what_is_exported_is_what_type_checkers_see(name):
    module = importlib.import_module(name)
    (block,) = (node for node in ast.parse(open(module.__file__).read()).body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname: str(node.module) for node in imports for alias in node.names}
    assert set(seen) == set(module.__all__) - {"__version__"} and set(module.__all__) <= set(dir(module))
    assert name != "rlloss" or len(seen) <= 14
    for exported, home in seen.items():
        assert getattr(module, exported) is getattr(importlib.import_module(home), exported)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_help_is_a_map(subject):
    assert f"rlloss.{subject} " in rlloss.__doc__ and importlib.import_module(f"rlloss.{subject}").__doc__
    assert all(f" {name}" in rlloss.__doc__ for name in rlloss.__all__[1:])


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="module 'rlloss' has no attribute 'top_entropy_mask'"):
        rlloss.top_entropy_mask  # noqa: B018
    assert not hasattr(rlloss, "nothing") and set(SUBJECTS) | set(rlloss.__all__) <= set(dir(rlloss))


PROGRAM = """
import sys, rlloss, rlloss.cli
assert 'torch' not in sys.modules, 'rlloss alone imports torch'
assert rlloss.entropy.gauges and rlloss.GRPOLoss and 'torch' in sys.modules
from rlloss import *
assert policy_loss is rlloss.policy_loss
"""


def test_nothing_heavy_is_imported_before_it_is_used():
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)


@pytest.mark.parametrize("command", [["--help"], ["--version"], []])
def test_the_command_answers_without_torch(command):
    program = f"import sys, rlloss.cli\ntry: rlloss.cli.main({command})\nexcept SystemExit: pass\n"
    program += "assert not {'torch', 'trl', 'triton'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert "rlloss" in done.stdout


def test_the_names_are_found_inside_a_compiled_function():
    config = rlloss.LossConfig("grpo")

    def f(logp, advantage, mask):
        return rlloss.policy_loss(logp, advantage, mask, config=config).loss

    x = torch.randn(2, 3), torch.randn(2), torch.ones(2, 3).bool()
    rlloss.__dict__.pop("policy_loss", None)
    torch.testing.assert_close(torch.compile(f, backend="eager", fullgraph=True)(*x), f(*x))


@pytest.mark.parametrize("loss", ["GRPOLoss", "LinearGRPOLoss"])
def test_help_explains_every_argument_of_a_call(loss):
    forward = getattr(rlloss, loss).forward
    arguments = forward.__doc__.split("Args:")[1].split("Returns:")[0]
    for name in list(inspect.signature(forward).parameters)[1:]:
        assert re.search(rf"^ +(\w+, )*{name}(, \w+)*: ", arguments, re.M), name
