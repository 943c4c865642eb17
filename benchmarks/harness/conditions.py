"""Record the conditions of a measurement: device, driver, versions, commit, date, load."""

import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.timing import CUDA

ROOT = Path(__file__).resolve().parents[2]
COMPARED = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy")


def _output(*command: str) -> str:
    """Return the output of a command, or an empty text if it is missing or fails."""
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def versions() -> dict[str, str]:
    """Return the versions of the compared packages."""
    found = {}
    for name in COMPARED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str | None:
    """Return the short hash, and whether the timed code differs from it. None: git does not know a commit."""
    name = _output("git", "rev-parse", "--short", "HEAD")
    changed = _output("git", "status", "--porcelain", "--", "rlloss", "kernels", "benchmarks/*.py")
    return name + (" with uncommitted changes" if changed else "") if name else None


def conditions() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if CUDA:
        name = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo")
        model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
        name = f"{model.group(1) if model else platform.processor() or platform.machine()}, {cores} cores"
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if CUDA else ""
    return {
        "device": name,
        "slug": re.sub(r"[^a-z0-9]+", "-", name.lower()) if CUDA else f"cpu-{cores}-cores",
        "threads": torch.get_num_threads(),
        "load": [round(x, 1) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "versions": versions()
        | {
            "python": platform.python_version(),
            "CUDA": torch.version.cuda if CUDA else None,
            "driver": driver.splitlines()[0] if driver else None,
        },
        "commit": commit() or "unknown",
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
    }


def sentence(where: dict[str, Any]) -> str:
    """Write device, versions, commit, date and load of `conditions` on one line."""
    load = f" Load average before: {where['load'][0]}, after: {where['load_after'][0]}." if where["load"] else ""
    found = ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version)
    machine = f"{where['device']}, {where['threads']} threads"
    return f"{machine}; {found}; commit {where['commit']}, {where['date']}.{load}"
