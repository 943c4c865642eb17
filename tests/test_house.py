"""The house: every module stands on a floor, imports go down, files stay short, docs/architecture.md has them all."""

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"kernels": "rlloss.kernels", "rlloss": "rlloss", "integrations": "rlloss.integrations", "benchmarks": None}
MAX_LINES = 500  # more has a second noun in it

FLOORS = {
    "rlloss.checks": -1,  # the cellar: argument checks, which even the configuration needs
    "rlloss.reference": 0,
    "rlloss.config": 0,
    "rlloss.tiled": 0,
    "rlloss.tiled_linear": 0.1,
    "rlloss.products": 0,
    "rlloss.picked": 0,
    "rlloss.radix": 0,
    "rlloss.backends": 0.5,  # above the kernels, below whoever launches them
    "rlloss.vocab_shard": 0.1,
    "rlloss.vocab_loop": 0.7,
    "rlloss.plans": 0.8,
    "rlloss.ops": 1,
    "rlloss.linear_op": 1,
    "rlloss.linear": 1.1,
    "rlloss.selection": 0.9,
    "rlloss.masks": 1,
    "rlloss.covariance": 1,
    "rlloss.ratios": 1,
    "rlloss.surrogates": 1.5,
    "rlloss.token_pass": 1.7,
    "rlloss.reward_resolution": 1.2,
    "rlloss.overlong": 1,
    "rlloss.entropy_control": 1,
    "rlloss.advantages": 1,
    "rlloss.sampling": 1,
    "rlloss.loss_inputs": 1.9,
    "rlloss.losses": 2,
    "rlloss.token_states": 2.5,
    "rlloss.single_launch": 2.5,
    "rlloss.linear_loss": 2.5,
    "rlloss.explain": 2.6,
    "rlloss.diagnostics": 2,
    "rlloss.modules": 3,
    "rlloss.rewards": 3.1,  # what a user imports, by subject
    "rlloss.tokens": 3.1,
    "rlloss.entropy": 3.1,
    "rlloss.lm_head": 3.1,
    "rlloss": 3.5,  # rlloss/__init__.py: above what it exports, below what uses it
    "rlloss.integrations.trl": 4.2,
    "rlloss.integrations.batch_dependence": 3.6,
    "rlloss.integrations.zero_advantage": 3.7,
    "rlloss.integrations.trl_lm_head": 3.7,
    "rlloss.integrations.trl_config": 3.8,
    "rlloss.integrations.transformers_sampling": 3.6,
    "rlloss.integrations.rollout": 3.8,
    "rlloss.integrations.dynamic_sampling": 3.8,
    "rlloss.integrations.trl_advantages": 3.9,
    "rlloss.integrations.trl_metrics": 3.7,
    "rlloss.integrations.token_log": 3.7,
    "rlloss.integrations.collapse_monitor": 3.7,
    "rlloss.integrations.notice": 3.6,
    "rlloss.integrations.run_summary": 3.8,
    "rlloss.integrations.model_card": 4.05,
    "rlloss.integrations.trl_grpo": 4.1,
    "rlloss.arithmetic": 4,
    "rlloss.head_costs": 4,
    "rlloss.doctor": 5,
    "rlloss.report.charts": 3.55,
    "rlloss.report": 3.6,
    "rlloss.report.run_log": 3.6,
    "rlloss.report.findings": 3.65,
    "rlloss.checkpoints": 4,
    "rlloss.report.run_report": 4.5,
    "rlloss.arms": 4,
    "rlloss.demo": 5,
    "rlloss.comparison": 5.5,
    "rlloss.train_help": 4,
    "rlloss.train_options": 4.8,
    "rlloss.train": 5,
    "rlloss.cli": 6,
}
PACKAGE_FLOORS = {"rlloss.kernels": 0, "rlloss.integrations": 4}
CORE = 3.5
STANDALONE = {"rlloss.arithmetic", "rlloss.checkpoints", "rlloss.report", "rlloss.train_help"}
CORE_LIBRARIES = {"torch", "triton"}


def floor_of(module):
    """The floor of a dotted module name, or None where it has none."""
    if module in FLOORS:
        return FLOORS[module]
    package = module if module in PACKAGE_FLOORS else module.rpartition(".")[0]
    return PACKAGE_FLOORS.get(package)


def files_of(folder):
    """The folder's .py files, without those behind the symlinks, which belong to another folder."""
    here = ROOT / folder
    return sorted(p for p in here.rglob("*.py") if p.resolve().is_relative_to(here) and "__pycache__" not in p.parts)


def package_modules():
    """{dotted name: file} of everything that is installed."""
    modules = {}
    for folder, package in FOLDERS.items():
        for path in files_of(folder) if package else ():
            inner = path.relative_to(ROOT / folder).with_suffix("").parts
            inner = inner[:-1] if inner[-1] == "__init__" else inner
            modules[".".join((package, *inner))] = path
    return modules


MODULES = package_modules()


def resolve(module, name):
    """What `from module import name` loads: the submodule of that name if there is one, else the module itself."""
    full = f"{module}.{name}"
    return full if full in MODULES or full in FLOORS or full in PACKAGE_FLOORS else module


@cache
def imports_of(module):
    """The modules that a module imports, at its top or inside functions: (name, line), relative ones made absolute."""
    path = MODULES[module]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                steps = node.level - (path.name == "__init__.py")
                anchor = module.split(".")[: len(module.split(".")) - steps]
                base = ".".join([*anchor, *([node.module] if node.module else [])])
            found += [(resolve(base, alias.name), node.lineno) for alias in node.names]
    return tuple(found)


def is_within(module, package):
    return module == package or module.startswith(package + ".")


def where(module, line):
    return f"{MODULES[module].relative_to(ROOT)}:{line}"


def test_the_walk_sees_the_package():
    assert {"rlloss", "rlloss.ops", "rlloss.kernels.token_stats"} <= set(MODULES)
    assert any(is_within(name, "rlloss.kernels") for name, _ in imports_of("rlloss.backends"))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_has_a_floor(module):
    path = MODULES[module].relative_to(ROOT)
    assert floor_of(module) is not None, f"{path} has no floor: give {module!r} one in FLOORS of tests/test_house.py"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module):
    own = floor_of(module)
    wrong = []
    for name, line in imports_of(module):
        if not is_within(name, "rlloss"):
            continue
        floor = floor_of(name)
        among_kernels = is_within(module, "rlloss.kernels") and is_within(name, "rlloss.kernels")
        if floor is None:
            wrong.append(f"{where(module, line)} imports {name}, which has no floor in tests/test_house.py")
        elif own is not None and floor >= own and not among_kernels:
            wrong.append(f"{where(module, line)} (floor {own}) imports {name} (floor {floor})")
    assert not wrong, "imports go to a strictly lower floor:\n" + "\n".join(wrong)


def test_kernels_import_only_torch_triton_and_kernels():
    kernels = [module for module in MODULES if is_within(module, "rlloss.kernels")]
    wrong = [
        f"{where(module, line)} imports {name}"
        for module in kernels
        for name, line in imports_of(module)
        if not is_within(name, "rlloss.kernels")
        and name.partition(".")[0] not in CORE_LIBRARIES | sys.stdlib_module_names
    ]
    assert not wrong, "kernels/ imports torch, triton, the standard library and itself:\n" + "\n".join(wrong)


def test_the_core_imports_only_torch_and_triton():
    core = [module for module in MODULES if (floor_of(module) or 0) <= CORE]
    wrong = [
        f"{where(module, line)} imports {name}"
        for module in core
        for name, line in imports_of(module)
        if name.partition(".")[0] not in CORE_LIBRARIES | {"rlloss"} | sys.stdlib_module_names
    ]
    assert not wrong, "floors 0 to 3 import torch, triton and the standard library:\n" + "\n".join(wrong)


def test_only_backends_imports_kernels():
    wrong = [
        f"{where(module, line)} imports {name}"
        for module in MODULES
        for name, line in imports_of(module)
        if is_within(name, "rlloss.kernels") and module != "rlloss.backends" and not is_within(module, "rlloss.kernels")
    ]
    assert not wrong, "rlloss/backends.py is the only importer of rlloss.kernels:\n" + "\n".join(wrong)


def test_the_task_and_the_report_stand_alone():
    wrong = [
        f"{where(module, line)} imports {name}"
        for module in MODULES
        for alone in STANDALONE
        if is_within(module, alone)
        for name, line in imports_of(module)
        if is_within(name, "rlloss") and not is_within(name, alone)
    ]
    assert not wrong, "these import no other module of rlloss:\n" + "\n".join(wrong)


def test_files_are_short():
    long = {
        str(path.relative_to(ROOT)): count
        for path in [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in files_of(folder))]
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert not long, f"longer than {MAX_LINES} lines: {long}"


@pytest.mark.parametrize("folder", ["kernels", "integrations"])
def test_mapped_folders_are_linked_and_no_regular_package(folder):
    link = ROOT / "rlloss" / folder
    assert link.is_symlink() and link.resolve() == ROOT / folder
    assert not (ROOT / folder / "__init__.py").exists(), f"{folder}/__init__.py would hide other packages of that name"
    inner = {path.parent for path in files_of(folder)} - {ROOT / folder}
    assert folder != "kernels" or not inner, "kernels/ is flat"
    packages = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for path in inner:
        assert (path / "__init__.py").exists(), f"{path} is a folder of integrations/ without __init__.py"
        assert f'"rlloss.{path.relative_to(ROOT).as_posix().replace("/", ".")}"' in packages


def tree():
    """{folder: file names} of the annotated tree in docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    trees = [block for block in blocks if re.search(r"^kernels/(\s|$)", block, flags=re.MULTILINE)]
    assert len(trees) == 1, (
        f"docs/architecture.md needs one fenced block with a line that starts with 'kernels/', found {len(trees)}"
    )
    found, folder = {}, None
    for line in filter(str.strip, trees[0].splitlines()):
        word = line.split()[0]
        if not line[0].isspace():
            folder = word.rstrip("/") if word.endswith("/") else None
            assert folder not in found or folder is None, f"docs/architecture.md's tree names {word} twice"
            if folder:
                found[folder] = []
        elif word.endswith(".py") and folder:
            found[folder].append(word)
    return found


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_the_tree_is_true(folder):
    named = tree().get(folder, [])
    actual = {path.relative_to(ROOT / folder).as_posix() for path in files_of(folder)}
    assert len(named) == len(set(named)), (
        f"docs/architecture.md's tree names a file of {folder}/ twice: {sorted(named)}"
    )
    assert set(named) == actual, (
        f"docs/architecture.md's tree of {folder}/: not in the folder {sorted(set(named) - actual)}, "
        f"not in the tree {sorted(actual - set(named))}"
    )


def test_marks_are_registered_here_and_not_by_a_plugin_that_may_be_missing():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (markers,) = re.findall(r"^markers = (\[.*?^\])", text, flags=re.MULTILINE | re.DOTALL)
    registered = {re.match(r"\w+", line)[0] for line in ast.literal_eval(markers)}
    files = [path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    used = {mark for path in files for mark in re.findall(r"pytest\.mark\.(\w+)", path.read_text(encoding="utf-8"))}
    assert used - {"parametrize", "skip", "skipif", "xfail", "filterwarnings", "usefixtures"} <= registered
