"""Check whether a checkpoint of transformers' Trainer is complete."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

# Files that transformers' Trainer writes. Other files in the folder are ignored.
_ITS_OWN = re.compile(
    r"^(trainer_state|config|generation_config|adapter_config|tokenizer|tokenizer_config|special_tokens_map)\.json$|"
    r"^(optimizer|scheduler|scaler|rng_state|training_args)[^/]*\.(pt|pth|bin)$|^global_step[^/]*/"
)
_WEIGHTS = re.compile(
    r"(^(pytorch_)?model|(^|/)adapter_model)\.(safetensors|bin)(\.index\.json)?$|^pytorch_model_fsdp(\.bin$|_\d+/)"
)


def what_is_wrong(checkpoint: str | Path) -> str | None:
    """Return the part of a checkpoint that is missing or truncated, or None. No weights are read.

    transformers writes the weights, the optimizer, the scheduler, the random state of each process, and at the end
    trainer_state.json. With save_only_model the optimizer, the scheduler and the random states are missing.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return "no trainer_state.json"
    try:
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
        folders = {path.name for path in folder.iterdir() if path.is_dir()}
        shards = _shards(folder, files)
        for name in ("trainer_state.json", *sorted(files)):
            if name not in files:
                return f"no {name}"
            its_own = _ITS_OWN.search(name) or _WEIGHTS.search(name) or name in shards
            if its_own and _is_cut_off(folder / name):
                return f"{name} cut off"
        if missing := sorted(shards - files):
            return f"no {missing[0]}"
        return _missing_part(folder, files, folders)
    except OSError as error:
        return f"no {error.filename} ({error.strerror})"


def _shards(folder: Path, files: set[str]) -> set[str]:
    """The weight files that the index files list, as paths in the folder."""
    shards = set()
    for index in (name for name in files if name.endswith(".index.json") and _WEIGHTS.search(name)):
        try:
            named = json.loads((folder / index).read_bytes())["weight_map"].values()
            shards |= {Path(index).with_name(shard).as_posix() for shard in named}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            continue  # reported as truncated
    return shards


def _is_cut_off(path: Path) -> bool:
    """Whether the file is shorter than its own header or directory says."""
    if path.suffix in (".pt", ".pth", ".bin"):
        try:
            zipfile.ZipFile(path).close()  # the directory of a zip file is at its end
        except zipfile.BadZipFile:
            return True
    try:
        if path.name.endswith(".index.json"):
            return not all(isinstance(shard, str) for shard in json.loads(path.read_bytes())["weight_map"].values())
        elif path.suffix == ".json":
            return not isinstance(json.loads(path.read_bytes()), dict)
        elif path.suffix == ".safetensors":
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > path.stat().st_size:
                    return True
                header = json.loads(file.read(length))
                ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            return path.stat().st_size != 8 + length + max(ends, default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return True
    return False


def _missing_part(folder: Path, files: set[str], folders: set[str]) -> str | None:
    for adapter in (name for name in files if Path(name).name in ("adapter_model.safetensors", "adapter_model.bin")):
        if (config := Path(adapter).with_name("adapter_config.json").as_posix()) not in files:
            return f"no {config}"
    sharded = [name for name in folders if name.startswith(("pytorch_model_fsdp", "optimizer_"))]  # FSDP
    for name in sharded:
        if f"{name}/.metadata" not in files:
            return f"no {name}/.metadata"
    deepspeed = any(name.startswith("global_step") for name in folders)
    if deepspeed and ("latest" not in files or (folder / "latest").read_text(errors="replace").strip() not in folders):
        return "no latest global_step"
    if not deepspeed and not any(_WEIGHTS.search(name) for name in files):
        return "no weights"
    random_of = {name for name in files if re.fullmatch(r"rng_state(_\d+)?\.pth", name)}
    parts = {
        "optimizer.pt": deepspeed or any("optimizer" in name for name in files),
        "scheduler.pt": deepspeed or "scheduler.pt" in files,
        "rng_state.pth": bool(random_of),
    }
    if any(parts.values()):
        for name, is_there in parts.items():
            if not is_there:
                return f"no {name}"
        if "rng_state.pth" not in random_of:
            for n in range(max(2, len(random_of))):
                if f"rng_state_{n}.pth" not in random_of:
                    return f"no rng_state_{n}.pth"
    return None
