"""`rlloss doctor` checks versions, device and results on this machine, and times one step for the user."""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import statistics
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch
from torch import Tensor

from rlloss import GRPOLoss, LinearGRPOLoss, __version__, backends, reference
from rlloss.lm_head.matmul import has_bf16_units

OTHERS = ("triton", "trl", "transformers", "datasets", "accelerate", "peft", "vllm", "liger-kernel")
COLUMNS = 100
CONSTRAINTS = 'pip install "./rlloss[trl]", or with the versions that the tests run with: -c constraints.txt'


class Check(NamedTuple):
    """One check: its name, a text with the finding, and a remedy, which is None if nothing is wrong."""

    name: str
    text: str
    remedy: str | None = None


class Report(NamedTuple):
    """Result of `doctor`. Its str() is the text that the command prints."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.remedy is None for check in self.checks)

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.checks) + 2
        lines = []
        for check in self.checks:
            paragraphs = [(check.name, check.text)]
            if check.remedy is not None:
                paragraphs.append(("", f"what to do: {check.remedy}"))
            for name, text in paragraphs:
                lines += textwrap.wrap(
                    text, COLUMNS, initial_indent=f"{name:<{width}}", subsequent_indent=" " * width,
                    break_long_words=False, break_on_hyphens=False,
                )  # fmt: skip
        wrong = sum(check.remedy is not None for check in self.checks)
        lines.append("All is well." if not wrong else f"{wrong} of {len(self.checks)} checks found something.")
        return "\n".join(lines)


def doctor(*, benchmark: bool = True, seconds: float = 8.0) -> Report:
    """Check versions, device, backend and results, and time a step. seconds limits the benchmark's time.

    It raises nothing: a failure becomes a check with a remedy.
    """
    checks: list[Check] = [_rlloss(), _installation(), _torch(), *_libraries(), _trl(), _device()]
    chosen = _backend()
    checks.append(chosen)
    if chosen.remedy is None:
        checks += [_self_check(name) for name in _backends()]
        if benchmark:
            checks.append(_benchmark(seconds))
    return Report(tuple(checks))


def _requirements() -> dict[str, str]:
    """Return {library: lowest version} that rlloss requires, extras included."""
    try:
        lines = importlib.metadata.requires("rlloss") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = (re.match(r"([\w-]+)[^;]*?>=\s*([\d.]+)", line) for line in lines)
    return {match[1].lower(): match[2] for match in found if match}


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _rlloss() -> Check:
    where = Path(__file__).parent
    missing = [
        f"rlloss.{folder}" for folder, module in (("kernels", "launch_table"), ("integrations", "trl/config"))
        if not (where / folder / f"{module}.py").exists()
    ]  # fmt: skip
    text = f"{__version__}, from {where}"
    if missing:
        return Check("rlloss", f"{text}, without {' and '.join(missing)}", "install it again: pip install ./rlloss")
    return Check("rlloss", text)


def _installation() -> Check:
    """Report how pip installed rlloss, and whether Python imports that copy."""
    here = Path(__file__).resolve().parent
    try:
        installed = importlib.metadata.distribution("rlloss")
    except importlib.metadata.PackageNotFoundError:
        return Check("installation", "not installed, so the lowest versions of libraries are not known")
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    editable = bool(origin.get("dir_info", {}).get("editable"))
    root = Path(url2pathname(urlsplit(origin["url"]).path)) if editable else Path(str(installed.locate_file("")))
    text = f"{'editable, of' if editable else 'in'} {root}"
    # Python asks a finder after the path. On the path, a clone seen from its parent is a package without __init__.py.
    if any("__editable___rlloss" in getattr(finder, "__module__", "") for finder in sys.meta_path):
        for folder in dict.fromkeys([Path.cwd(), *map(Path, sys.path)]):
            if (folder / "rlloss").is_dir() and not (folder / "rlloss" / "__init__.py").exists():
                return Check(
                    "installation", f"{text}; `import rlloss` in {folder} finds the folder of that name instead",
                    "pip install ./rlloss without -e, or with -e anew: its pyproject.toml asks for a path entry",
                )  # fmt: skip
    if (root / "rlloss").resolve() == here:
        return Check("installation", text)
    text = f"{text}; imported is another copy, see above"
    if installed.version != __version__:
        return Check(
            "installation", f"{text}, {__version__} and not {installed.version}",
            "install the copy that you import, or take its folder from PYTHONPATH",
        )  # fmt: skip
    return Check("installation", text)


def _torch() -> Check:
    lowest = _requirements().get("torch", "0")
    text = f"{torch.__version__}, Python {platform.python_version()}"
    if _number(torch.__version__) < _number(lowest):
        return Check("torch", text, f"rlloss needs torch >= {lowest}: {CONSTRAINTS}")
    if torch.version.cuda and not torch.cuda.is_available() and _has_nvidia_device():
        return Check(
            "torch", f"{text}, built for CUDA {torch.version.cuda}, sees no GPU",
            "this machine has an NVIDIA device: update its driver, or install the torch that fits it",
        )  # fmt: skip
    return Check("torch", text)


def _has_nvidia_device() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*"))


def _libraries() -> Iterator[Check]:
    lowest = _requirements()
    found, old = [], []
    for name in OTHERS:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found.append(f"{name} {version}")
        if name in lowest and _number(version) < _number(lowest[name]):
            old.append(f"{name} >= {lowest[name]}")
    yield Check(
        "libraries", ", ".join(found) or "none", f"rlloss needs {', '.join(old)}: {CONSTRAINTS}" if old else None
    )


def _trl() -> Check:
    if importlib.util.find_spec("trl") is None:
        return Check("TRL plugin", 'TRL is not installed; the plain API works without it (extra "trl")')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("rlloss.integrations.trl.trainer")
            plugin = importlib.import_module("rlloss.integrations.trl.compat")
    except Exception as error:  # TRL and the libraries that it imports may raise anything
        text = f"cannot be imported: {' '.join(f'{type(error).__name__}: {error}'.split())}"
        return Check("TRL plugin", text[:300], CONSTRAINTS)
    low, below = plugin.TESTED
    text = f"tested with TRL >= {low}, < {below}; found {plugin.trl.__version__}"
    if not plugin.IN_TESTED_RANGE:
        return Check("TRL plugin", text, f'pip install "trl>={low},<{below}"')
    return Check("TRL plugin", text)


def _device() -> Check:
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        count = torch.cuda.device_count()
        return Check(
            "device", f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
            + (f", one of {count}" if count > 1 else ""),
        )  # fmt: skip
    units = "bf16 products in its bf16 units" if has_bf16_units() else "no bf16 units: bf16 heads run in fp32"
    return Check("device", f"{_cpu()}, {os.cpu_count()} cores, {units}")


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", path.read_text()) if path.exists() else None
    return named[1] if named else platform.processor() or platform.machine()


def _place() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _backend() -> Check:
    forced = os.environ.get("RLLOSS_BACKEND")
    try:
        chosen = backends.choose_backend(torch.zeros(1, device=_place()))
    except (RuntimeError, ValueError) as error:
        return Check("backend", str(error), "unset RLLOSS_BACKEND, or set it to a backend that runs here")
    no_triton = backends.triton is None
    if _place() == "cuda" and no_triton:
        return Check(
            "backend", f"{chosen}: Triton is not installed", "pip install triton: the kernels need it on a GPU"
        )
    why = f"RLLOSS_BACKEND={forced}" if forced else "a GPU and Triton" if chosen == "triton" else "no CUDA device"
    if chosen == "interpreter":
        why = "TRITON_INTERPRET=1, for tests: slow"
    return Check("backend", f"{chosen} ({why})")


def _backends() -> list[str]:
    """Return the backends that run here; the first is the one in use."""
    used = backends.choose_backend(torch.zeros(1, device=_place()))
    return [used] if used == "torch" else [used, "torch"]


def _case() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = {
        "hidden": torch.randn(4, 8, 32, generator=g),
        "weight": torch.randn(257, 32, generator=g) / 4,
        "target": torch.randint(0, 257, (4, 8), generator=g),
        "advantage": torch.tensor([1.0, -0.5, 0.25, 0.0]),
        "old_logp": -5.5 + 0.3 * torch.randn(4, 8, generator=g),
        "mask": torch.rand(4, 8, generator=g) < 0.8,
    }
    return {name: v.to(_place()) for name, v in x.items()}


def _by_formula(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return (loss, gradients of hidden and weight) from the formulas of `rlloss.reference` and autograd."""
    # Both dtypes start from the fp32 inputs.
    x = {name: v.to(dtype) if v.is_floating_point() else v for name, v in _case().items()}
    hidden, weight = x["hidden"].requires_grad_(), x["weight"].requires_grad_()
    logp, _, _ = reference.token_stats(hidden @ weight.T, x["target"])
    ratio = reference.ratio(logp, x["old_logp"], x["mask"])
    loss = reference.clip_surrogate(ratio, x["advantage"].unsqueeze(-1), 0.2, 0.28)
    loss = reference.aggregate(loss, x["mask"], "tokens")
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def _by_rlloss(name: str, linear: bool) -> tuple[Tensor, ...]:
    x = _case()
    hidden, weight = x.pop("hidden").requires_grad_(), x.pop("weight").requires_grad_()
    with backends.backend(name):
        if linear:
            loss = LinearGRPOLoss("dapo")(hidden, weight, **x).loss
        else:
            loss = GRPOLoss("dapo")(hidden @ weight.T, **x).loss
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def _error(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """Return the largest difference, divided by the largest entry."""
    pairs = zip(found, exact, strict=True)
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def _self_check(name: str) -> Check:
    """Compare loss and gradients in fp32 with fp64. Bound: twice the error of plain torch plus a few roundings."""
    label = f"results of {name}"
    try:
        exact = _by_formula(torch.float64)
        plain = _error(_by_formula(torch.float32), exact)
        errors = {way: _error(_by_rlloss(name, way == "hidden states"), exact) for way in ("logits", "hidden states")}
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return Check(label, text[:300], "report it with this output; RLLOSS_BACKEND=torch goes around the kernels")
    bound = 2 * plain + 8 * torch.finfo(torch.float32).eps
    text = ", ".join(f"from {way} {error:.1e}" for way, error in errors.items())
    text = f"relative error against fp64: {text}; at most {bound:.1e}, from plain torch's {plain:.1e}"
    if not all(error <= bound for error in errors.values()):  # a NaN fails here too
        return Check(label, text, "report it with this output; do not train with it")
    return Check(label, text)


def _benchmark(seconds: float) -> Check:
    """Time forward and backward from hidden states, rlloss and plain logits in turns.

    A CPU uses one thread. If other programs run, several threads wait for each other, and small tiles suffer most.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _compare(seconds)
    finally:
        torch.set_num_threads(threads)


def _compare(seconds: float) -> Check:
    cuda = _place() == "cuda"
    B, T, D, V, rho = (16, 1024, 2048, 65536, 0.2) if cuda else (4, 64, 1024, 32768, 0.2)
    dtype = torch.bfloat16 if cuda else torch.float32
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, D, generator=g).to(_place(), dtype).requires_grad_()
    weight = (torch.randn(V, D, generator=g) / D**0.5).to(_place(), dtype).requires_grad_()
    target = torch.randint(0, V, (B, T), generator=g).to(_place())
    mask, advantage = torch.ones_like(target).bool(), torch.ones(B, device=_place())
    loss_fn = LinearGRPOLoss("dapo", top_entropy_quantile=rho)

    def ours() -> None:
        loss_fn(hidden, weight, target, advantage, mask=mask).loss.backward()

    def plain() -> None:
        log_p = torch.log_softmax(hidden @ weight.T, -1, dtype=torch.float32)
        with torch.no_grad():
            entropy = -(log_p.exp() * log_p).sum(-1)
            kept = entropy >= torch.quantile(entropy.flatten(), 1 - rho)
        logp = log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        torch.where(kept, -torch.exp(logp - logp.detach()), 0.0).mean().backward()

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    times: dict[str, list[float]] = {"rlloss": [], "plain logits": []}
    began = time.perf_counter()
    rounds = 0
    while rounds < 2 or (rounds < 12 and time.perf_counter() - began < seconds * rounds / (rounds + 1)):
        for name, step in (("rlloss", ours), ("plain logits", plain)):
            times[name].append(_timed(step, cuda))
        rounds += 1
        if rounds == 1:  # the first round warms up
            for found in times.values():
                found.clear()
        hidden.grad = weight.grad = None
    medians = {name: 1e3 * statistics.median(found) for name, found in times.items()}
    ratio = medians["plain logits"] / medians["rlloss"]
    return Check(
        "benchmark",
        f"rlloss {medians['rlloss']:.0f} ms, plain logits {medians['plain logits']:.0f} ms: {ratio:.1f} times as fast "
        f"({B * T} tokens, D {D}, V {V}, {str(dtype)[6:]}, 20 % with a gradient, "
        f"{'' if cuda else 'one thread, '}rounds: {rounds - 1}){_disturbed(load)}",
    )


def _disturbed(load: float) -> str:
    cores = os.cpu_count() or 1
    if load <= cores / 4:
        return ""
    return f". Only a hint: the machine was busy, load {load:.1f} on {cores} cores"


def _timed(step: Callable[[], Any], cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began
