"""Test the installed package: mapped folders are real files, and the core needs only torch and triton."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"rlloss": "rlloss", "rlloss/kernels": "kernels", "rlloss/integrations": "integrations"}
ENDINGS = (".html", ".css", ".js")
ASSETS = {f"rlloss/report/{path.name}" for path in (ROOT / "rlloss/report").iterdir() if path.suffix in ENDINGS}
NOT_CORE = ["transformers", "trl", "datasets", "accelerate", "tokenizers", "rich", "tqdm", "liger_kernel", "verl"]


def run(*command, cwd, pythonpath):
    """Run python with only the given path, and return its standard output."""
    environment = {**os.environ, "PYTHONPATH": str(pythonpath), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build_wheel(source, into, *, cwd, pythonpath):
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--wheel-dir", into]
    run("-m", "pip", "wheel", *options, source, cwd=cwd, pythonpath=pythonpath)
    (wheel,) = into.glob("rlloss-*.whl")
    return wheel


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel of the tree, sdist, wheel of the sdist, editable wheel, tree), built from a copy, where importing torch
    fails."""
    here = tmp_path_factory.mktemp("packaging")
    tree = here / "clone" / "rlloss"
    tree.mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("kernels", "integrations", "rlloss"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    poison = here / "poison"
    poison.mkdir()
    (poison / "torch.py").write_text("raise ImportError('the build imported torch')\n")

    backend = "from setuptools import build_meta; build_meta.build_{}('../../{}')"
    run("-c", backend.format("sdist", "sdist"), cwd=tree, pythonpath=poison)
    run("-c", backend.format("editable", "editable"), cwd=tree, pythonpath=poison)
    (sdist,) = (here / "sdist").glob("rlloss-*.tar.gz")
    from_tree = build_wheel(tree, here / "from_tree", cwd=here, pythonpath=poison)
    from_sdist = build_wheel(sdist, here / "from_sdist", cwd=here, pythonpath=poison)
    (editable,) = (here / "editable").glob("rlloss-*.whl")
    return from_tree, sdist, from_sdist, editable, tree


def expected_modules():
    return {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for path in (ROOT / folder).rglob("*.py")
        if path.resolve().is_relative_to(ROOT / folder)
    }


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 2], ids=["from_tree", "from_sdist"])
def test_wheel_holds_every_module_as_a_file(built, which):
    with zipfile.ZipFile(built[which]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        links = [info.filename for info in wheel.infolist() if (info.external_attr >> 16) & 0o170000 == 0o120000]
        assert links == []
        assert names == expected_modules() | {"rlloss/py.typed"} | ASSETS
        assert (
            wheel.read("rlloss/kernels/token_stats_forward.py")
            == (ROOT / "kernels" / "token_stats_forward.py").read_bytes()
        )


@pytest.mark.slow
def test_sdist_holds_the_folders_once(built):
    with tarfile.open(built[1]) as sdist:
        names = {member.name.partition("/")[2] for member in sdist.getmembers() if member.isfile()}
    folders = PACKAGES.values()
    assert {f"{folder}/{path.name}" for folder in folders for path in (ROOT / folder).glob("*.py")} <= names
    assert {"pyproject.toml", "README.md", "LICENSE", "rlloss/py.typed", *ASSETS} <= names
    assert not [name for name in names if name.startswith(("rlloss/kernels", "rlloss/integrations"))]


@pytest.mark.slow
def test_metadata(built):
    with zipfile.ZipFile(built[0]) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = message_from_bytes(wheel.read(name))
        scripts = wheel.read(name.replace("METADATA", "entry_points.txt")).decode()
    always = [line.replace('"', "'") for line in metadata.get_all("Requires-Dist") or [] if "extra ==" not in line]
    assert always == ["torch>=2.8", "triton>=3.4; platform_system == 'Linux'"]
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "rlloss = rlloss.cli:main" in scripts
    assert f'__version__ = "{metadata["Version"]}"' in (ROOT / "rlloss" / "__init__.py").read_text()


def test_the_lowest_versions_are_those_that_are_allowed():
    pinned = re.findall(r"^(\w+)==([\d.]+)", (ROOT / "constraints-lowest.txt").read_text(), re.MULTILINE)
    allowed = dict(re.findall(r"[\"'](torch|triton|trl|transformers)>=([\d.]+)", (ROOT / "pyproject.toml").read_text()))
    lowest = {name: version for name, version in pinned if name in allowed}
    assert lowest.keys() == allowed.keys() == {"torch", "triton", "trl", "transformers"}
    assert all(version.removesuffix(".0").removesuffix(".0") == allowed[name] for name, version in lowest.items())


@pytest.mark.slow
def test_installed_core_imports_without_the_extras(built, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(site)
    program = (
        "import importlib, pathlib, sys\n"
        f"sys.modules.update(dict.fromkeys({NOT_CORE}))\n"  # None: importing it raises, as if it were not installed
        "import rlloss\n"
        "home = pathlib.Path(rlloss.__file__).parent\n"
        "for path in sorted(home.glob('kernels/*.py')):\n"
        "    importlib.import_module(f'rlloss.kernels.{path.stem}')\n"
        "print(home, [name for name in sys.modules if name.startswith('rlloss.integrations.')])\n"
    )
    assert run("-c", program, cwd=tmp_path, pythonpath=site).split() == [str(site / "rlloss"), "[]"]


@pytest.mark.slow
def test_an_editable_clone_is_imported_from_its_parent_folder(built, tmp_path):
    """There the clone itself, a folder `rlloss` without __init__.py, is first on the path."""
    *_, editable, tree = built
    with zipfile.ZipFile(editable) as wheel:
        wheel.extractall(tmp_path)
    program = (
        "import site, sys; site.addsitedir(sys.argv[1])\n"
        "import rlloss, rlloss.kernels.launch_table, rlloss.integrations.trl.generation_batch\n"
        "print(rlloss.__version__, rlloss.__file__, rlloss.kernels.launch_table.__file__)\n"
    )
    # -S: without packages that .pth files install, such as this checkout.
    installed = os.pathsep.join(path for path in sys.path if path.endswith("-packages"))
    version, *files = run("-S", "-c", program, tmp_path, cwd=tree.parent, pythonpath=installed).split()
    assert version in editable.name
    assert files == [str(tree / "rlloss" / name) for name in ("__init__.py", "kernels/launch_table.py")]


def test_kernels_folder_does_not_hide_another_package_of_that_name(tmp_path):
    other = tmp_path / "kernels"
    other.mkdir()
    (other / "__init__.py").write_text("")
    # `python -c` puts the working directory, here the root of the checkout, before PYTHONPATH.
    found = run("-c", "import kernels; print(kernels.__file__)", cwd=ROOT, pythonpath=tmp_path)
    assert Path(found.strip()) == other / "__init__.py"


MISSING = """
import importlib, os, sys
import rlloss

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == library:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
for library in ("packaging", "transformers", "accelerate", "datasets", "tokenizers", "trl"):
    if child := os.fork():
        if os.waitpid(child, 0)[1]:
            sys.exit(1)
        continue
    for module in sys.argv[1:]:
        for name in [name for name in sys.modules if name.startswith("rlloss.integrations")]:
            del sys.modules[name]
        try:
            importlib.import_module(module)
        except ImportError as error:
            print(library, module, 'pip install "rlloss[trl]"' in str(error), flush=True)
    sys.exit()
"""


# The commands behind `rlloss demo` and `rlloss train`, which first look for the libraries.
COMMANDS = {
    *(ROOT / "integrations" / "trl").glob("train_*.py"),
    ROOT / "integrations" / "trl" / "train.py",
    *(ROOT / "integrations" / "trl" / "demo").glob("*.py"),
}
GUARDED = sorted({*(ROOT / "integrations").rglob("*.py")} - COMMANDS)


@pytest.mark.parametrize("path", GUARDED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_an_integration_imports_other_libraries_inside_a_guard(path):
    bare = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [node.module if isinstance(node, ast.ImportFrom) else alias.name for node in bare for alias in node.names]
    roots = {str(name).partition(".")[0] for name in names}
    assert roots <= {"torch", "rlloss", *sys.stdlib_module_names}


@pytest.mark.slow
def test_a_missing_extra_is_said_whichever_part_of_it_is_missing():
    files = [path.relative_to(ROOT).with_suffix("") for path in GUARDED if path.stem != "__init__"]
    modules = ["rlloss." + ".".join(file.parts) for file in files]
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MISSING, *modules], capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = [line.split() for line in ran.stdout.splitlines()]
    assert {name for name, module, _ in found if module.endswith("trl.trainer")} == {
        "packaging", "transformers", "accelerate", "datasets", "tokenizers", "trl",
    }  # fmt: skip
    assert [line for line in found if line[2] != "True"] == []
