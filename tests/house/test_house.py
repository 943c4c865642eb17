"""Test the architecture: modules have a layer, imports go down, files are short, docs/architecture.md is complete."""

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"kernels": "rlloss.kernels", "rlloss": "rlloss", "integrations": "rlloss.integrations", "benchmarks": None}
MAX_LINES = 500  # a longer file has more than one subject

# From the lowest layer up. A module imports lower layers, and modules of its folder that do not import it back.
FLOORS = (
    "rlloss.kernels",
    "rlloss.checks",
    "rlloss.lazy",
    "rlloss.reference",
    "rlloss.loss_types",
    "rlloss.config",
    "rlloss.torch_kernels",
    "rlloss.backends",
    "rlloss.operators",
    "rlloss.rewards",
    "rlloss.tokens",
    "rlloss.entropy",
    "rlloss.losses",
    "rlloss.logits",
    "rlloss.lm_head",
    "rlloss.modules",
    "rlloss",  # rlloss/__init__.py: above the modules that it exports, below those that use it
    "rlloss.report",
    "rlloss.integrations.transformers",
    "rlloss.integrations.vllm",
    "rlloss.integrations.trl",
    "rlloss.integrations.trl.demo",
    "rlloss.plan",
    "rlloss.doctor",
    "rlloss.cli",
)
CORE = FLOORS.index("rlloss.modules")
STANDALONE = {
    "rlloss.integrations.trl.checkpoints", "rlloss.integrations.trl.demo.task", "rlloss.integrations.trl.train_help",
    "rlloss.report",
}  # fmt: skip
CORE_LIBRARIES = {"torch", "triton"}


def place_of(module):
    """The file or folder of FLOORS that contains the module, or None."""
    while module and module not in FLOORS:
        module = module.rpartition(".")[0]
    return module or None


def floor_of(module):
    """The module's position in FLOORS. None: a file outside these folders, which FLOORS must name itself."""
    place = place_of(module)
    alone = place == "rlloss" and module != "rlloss"
    return None if place is None or alone else FLOORS.index(place)


def files_of(folder):
    """The .py files of the folder, without files behind symlinks, which belong to another folder."""
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
    """The module that `from module import name` loads: the submodule of that name if it exists, else the module."""
    full = f"{module}.{name}"
    return full if full in MODULES or full in FLOORS else module


def nodes_of(tree):
    """All nodes except `if TYPE_CHECKING` blocks: the names of a folder, which are imported lazily."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from nodes_of(node)


@cache
def imports_of(module):
    """The modules that a module imports, at its top or inside functions: (name, line), relative ones made absolute."""
    path = MODULES[module]
    found = []
    for node in nodes_of(ast.parse(path.read_text(encoding="utf-8"), str(path))):
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


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_has_a_floor(module):
    path = MODULES[module].relative_to(ROOT)
    assert floor_of(module) is not None, (
        f"{path} has no floor: give {module!r} one in FLOORS of tests/house/test_house.py"
    )


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module):
    own, wrong = floor_of(module), []
    for name, line in imports_of(module):
        if not is_within(name, "rlloss"):
            continue
        floor = floor_of(name)
        if floor is None:
            wrong.append(f"{where(module, line)} imports {name}, which has no floor in tests/house/test_house.py")
        elif own is not None and (floor > own or name == module or module in reached_from(name)):
            wrong.append(f"{where(module, line)} imports {name}, which stands above it or imports it")
    assert not wrong, "imports go down, and in a folder never back:\n" + "\n".join(wrong)


def reached_from(module):
    """The modules of its own folder that a module imports, directly or indirectly."""
    found, waiting = set(), [module]
    while waiting:
        module = waiting.pop()
        for name, _ in imports_of(module) if module in MODULES else ():
            if name in MODULES and floor_of(name) == floor_of(module) and name not in found:
                found.add(name)
                waiting.append(name)
    return found


def is_core(module):
    return (floor_of(module) or 0) <= CORE


def is_library(name, *allowed):
    return name.partition(".")[0] in {*CORE_LIBRARIES, *allowed, *sys.stdlib_module_names}


# Rule -> (whether it concerns a module, whether such a module may import a name).
RULES = {
    "kernels/ imports torch, triton, the standard library and itself": (
        lambda module: is_within(module, "rlloss.kernels"),
        lambda module, name: is_within(name, "rlloss.kernels") or is_library(name),
    ),
    "the core imports torch, triton and the standard library": (
        is_core,
        lambda module, name: is_library(name, "rlloss"),
    ),
    "rlloss/backends.py is the only importer of rlloss.kernels": (
        lambda module: module != "rlloss.backends" and not is_within(module, "rlloss.kernels"),
        lambda module, name: not is_within(name, "rlloss.kernels"),
    ),
    "the task, the report and what --help needs import no other module of rlloss": (
        lambda module: any(is_within(module, alone) for alone in STANDALONE),
        lambda module, name: (
            not is_within(name, "rlloss")
            or any(is_within(module, alone) and is_within(name, alone) for alone in STANDALONE)
        ),
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_who_imports_what(rule):
    of, may = RULES[rule]
    imports = [(module, *found) for module in MODULES if of(module) for found in imports_of(module)]
    wrong = [f"{where(module, line)} imports {name}" for module, name, line in imports if not may(module, name)]
    assert imports and not wrong, f"{rule}:\n" + "\n".join(wrong)


def test_the_name_of_a_loss_is_compared_in_the_table_alone():
    """Differences between losses are columns of rlloss/loss_types.py, not comparisons of names."""
    wrong = []
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare) and re.search(r"\b(loss_type|surrogate)\W*$", ast.unparse(node.left)):
                words = [x for side in node.comparators for x in ast.walk(side) if isinstance(x, ast.Constant)]
                is_one = any(isinstance(operator, ast.Is) for operator in node.ops)
                if any(isinstance(word.value, str) for word in words) or (is_one and not words):
                    wrong.append(f"{where(module, node.lineno)}: {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)


MAX_PARAMETERS = 8
MANY_PARAMETERS = {
    # Public: users pass each argument.
    "linear_token_stats", "token_stats", "policy_loss", "explain_plan", "covariance_selection", "head_costs",
    "write_report", "GRPOLoss.forward", "LinearGRPOLoss.forward", "CollapseMonitor.__init__", "TokenLog.write",
    # Operators, and the functions that compute their shapes, cannot take bundles.
    "linear_token_stats_op", "_backward_op", "rlloss.logits.statistics._forward", "rlloss.logits.statistics._gradient",
    "rlloss.logits.statistics._fake", "rlloss.losses.fused._run", "_fake_stats", "_fake_gradients",
    # TRL calls it.
    "LmHead.apply",
}  # fmt: skip


def test_what_is_carried_side_by_side_is_bundled():
    many = []
    for module, path in MODULES.items():
        if is_within(module, "rlloss.kernels"):  # Triton takes numbers and pointers
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        owner = {id(f): f"{c.name}." for c in ast.walk(tree) if isinstance(c, ast.ClassDef) for f in c.body}
        for f in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            names = [a.arg for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs)]
            name = owner.get(id(f), "") + f.name
            count = len([n for n in names if n not in ("self", "ctx", "cls")])
            if count > MAX_PARAMETERS and not {name, f"{module}.{name}"} & MANY_PARAMETERS:
                many.append(f"{where(module, f.lineno)}: {name} has {count} parameters")
    assert not many, f"at most {MAX_PARAMETERS}, then a bundle:\n" + "\n".join(many)


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
    assert folder != "kernels" or not {path.parent for path in files_of(folder)} - {ROOT / folder}, "kernels/ is flat"


@pytest.mark.parametrize("folder", ["rlloss", "integrations"])
def test_every_folder_is_installed(folder):
    packages = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for path in {path.parent for path in files_of(folder)} - {ROOT / folder}:
        name = path.relative_to(ROOT / "rlloss") if folder == "rlloss" else path.relative_to(ROOT)
        assert (path / "__init__.py").exists(), f"{path} has no __init__.py"
        assert f'"rlloss.{name.as_posix().replace("/", ".")}"' in packages


def tree():
    """{folder: file names} in the annotated tree of docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    trees = [block for block in blocks if re.search(r"^kernels/(\s|$)", block, flags=re.MULTILINE)]
    assert len(trees) == 1, (
        f"docs/architecture.md needs one fenced block with a line that starts with 'kernels/', found {len(trees)}"
    )
    found, inside = {}, []
    for line in filter(str.strip, trees[0].splitlines()):
        word, depth = line.split()[0], (len(line) - len(line.lstrip())) // 4
        del inside[depth:]
        if word.endswith("/"):
            inside.append(word.rstrip("/"))
            found.setdefault(inside[0], [])
        elif word.endswith(".py"):
            found[inside[0]].append("/".join([*inside[1:], word]))
    return found


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_the_tree_is_true(folder):
    named = tree().get(folder, [])
    names = {path.relative_to(ROOT / folder).as_posix() for path in files_of(folder)}
    actual = {name for name in names if not name.endswith("/__init__.py")}  # the line of the folder covers it
    assert len(named) == len(set(named)), (
        f"docs/architecture.md's tree names a file of {folder}/ twice: {sorted(named)}"
    )
    assert set(named) == actual, (
        f"docs/architecture.md's tree of {folder}/: not in the folder {sorted(set(named) - actual)}, "
        f"not in the tree {sorted(actual - set(named))}"
    )
