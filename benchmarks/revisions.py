"""Compare another revision with this tree on the same calls: bits of the results, errors against fp64, and time.

    python -m benchmarks.revisions REVISION [--calls 200] [--rounds 5] [--within 1e-6]

A seed determines the calls, which use public functions only. For each call the program tells whether loss, metrics and
gradients have the same bits. If not, it tells the largest relative difference, and whether the error against the same
call in fp64 has grown. Then it times small calls, alternating between the revisions. The exit status is 1 if a call
differs by more than --within or has a larger error than before.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
CLIPS = ("grpo", "bnpo", "dr_grpo", "dapo", "gspo", "luspo", "clip_cov")
TYPES = (*CLIPS, "cispo", "sapo", "vespo", "kl_cov")
FLOAT = {"old_logp", "ref_logp", "sampler_ratio", "entropy", "advantage", "logp", "logits", "hidden", "weight"}


def settings_of(r: random.Random, loss_type: str) -> dict[str, Any]:
    """Draw settings that the loss reads, as arguments of LossConfig."""
    found: dict[str, Any] = {"loss_type": loss_type}
    if loss_type in CLIPS and loss_type not in ("gspo", "clip_cov"):
        found["ratio_level"] = r.choice(["token", "sequence"])
    if loss_type in CLIPS:
        found |= {"epsilon_high": r.choice([0.2, 0.28]), "delta": r.choice([None, 1.5])}
    if loss_type in ("cispo", "sapo"):
        found["ratio_level"] = r.choice(["token", "sequence"])
    if loss_type == "cispo":
        found["epsilon_high"] = r.choice([1.0, 2.0])
    if loss_type == "dr_grpo":
        found["max_completion_length"] = 16
    if loss_type != "vespo":
        found["max_log_ratio"] = r.choice([None, None, 0.3])
    if r.random() < 0.3:
        found |= {"beta": 0.1, "kl_estimator": r.choice(["k1", "k2", "k3"]), "kl_bias_correction": r.random() < 0.5}
    if r.random() < 0.4:
        found |= {"top_entropy_quantile": r.choice([0.2, 0.5]), "exact_k": r.random() < 0.3}
    if r.random() < 0.2:
        found["entropy_coef"] = 0.01
    if r.random() < 0.3:
        found["off_policy_threshold"] = 0.1
    return found


def inputs_of(seed: int, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Draw inputs in fp64. All dtypes are converted from the same numbers."""
    g, r = torch.Generator().manual_seed(seed), random.Random(seed)
    B, T, D, V = r.choice([(1, 1), (3, 7), (4, 16)]) + (8, 50)
    x: dict[str, torch.Tensor] = {}
    x["hidden"], x["weight"] = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((B, T, D), (V, D)))
    x["logits"] = x["hidden"] @ x["weight"].T
    x["target"] = torch.randint(0, V, (B, T), generator=g)
    log_p = x["logits"].log_softmax(-1)
    x["logp"] = log_p.gather(-1, x["target"][..., None]).squeeze(-1)
    x["entropy"] = -(log_p.exp() * log_p).sum(-1)
    x["mask"] = torch.rand(B, T, generator=g) < 0.8
    shape = (B, T) if r.random() < 0.3 else (B,)
    x["advantage"] = torch.randn(shape, generator=g, dtype=torch.float64).round(decimals=1)
    if r.random() < 0.8:
        x["old_logp"] = x["logp"] + 0.3 * torch.randn(B, T, generator=g, dtype=torch.float64)
    if settings.get("beta"):
        x["ref_logp"] = x["logp"] + 0.3 * torch.randn(B, T, generator=g, dtype=torch.float64)
    if r.random() < 0.3:
        x["sampler_ratio"] = torch.rand(B, r.choice([1, T]), generator=g, dtype=torch.float64).mul(2).round(decimals=1)
    return x


def call(way: str, settings: dict[str, Any], x: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return {name: tensor} with loss, metrics and gradients of one call. way: "logp", "logits" or "hidden"."""
    from rlloss import GRPOLoss, LinearGRPOLoss, LossConfig, policy_loss

    x = {name: value.to(dtype) if name in FLOAT else value for name, value in x.items()}
    given = {name: x[name] for name in ("old_logp", "ref_logp", "sampler_ratio") if name in x}
    config = LossConfig(**settings)
    if way == "logp":
        leaves = [x["logp"].requires_grad_(), x["entropy"].requires_grad_()]
        result = policy_loss(leaves[0], x["advantage"], x["mask"], config=config, entropy=leaves[1], **given)
    elif way == "logits":
        leaves = [x["logits"].requires_grad_()]
        result = GRPOLoss(config)(leaves[0], x["target"], x["advantage"], mask=x["mask"], **given)
    else:
        leaves = [x["hidden"].requires_grad_(), x["weight"].requires_grad_()]
        result = LinearGRPOLoss(config)(*leaves, x["target"], x["advantage"], mask=x["mask"], **given)
    gradients = torch.autograd.grad(result.loss, leaves, allow_unused=True, materialize_grads=True)
    found = {"loss": result.loss.detach(), **{f"metric {name}": m for name, m in result.metrics.items()}}
    return found | {f"gradient {i}": g for i, g in enumerate(gradients)}


def record(calls: int) -> list[dict[str, Any]]:
    """Return the results of each call: fp32, alternating between the two backends, and fp64."""
    from rlloss.backends import backend

    found = []
    for seed in range(calls):
        r = random.Random(1000 + seed)
        settings = settings_of(r, TYPES[seed % len(TYPES)])
        way, x = r.choice(["logp", "logp", "logits", "hidden"]), inputs_of(seed, settings)
        with backend("interpreter" if seed % 2 else "torch"):
            results = call(way, settings, x, torch.float32)
        with backend("torch"):
            exact = call(way, settings, x, torch.float64)
        found.append({"what": f"{seed}: {way}, {settings}", "found": results, "exact": exact})
    return found


def timed(rounds: int) -> dict[str, list[float]]:
    """Time small calls, in seconds. The host's work dominates them."""
    from rlloss.backends import backend

    torch.set_num_threads(1)
    found: dict[str, list[float]] = {}
    with backend("torch"):
        for loss_type in TYPES:
            for way in ("logp", "logits", "hidden"):
                settings = settings_of(random.Random(3), loss_type)
                x = inputs_of(2, settings)
                samples = []
                for _ in range(rounds + 2):
                    begin = time.perf_counter()
                    for _ in range(5):
                        call(way, settings, x, torch.float32)
                    samples.append((time.perf_counter() - begin) / 5)
                found[f"{loss_type} from {way}"] = samples[2:]
    return found


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest difference relative to the largest entry. NaN and inf in the same places count as equal."""
    found, exact = found.double(), exact.double()
    finite = exact.isfinite()
    if not torch.equal(finite, found.isfinite()):
        return float("inf")
    scale = exact[finite].abs().max().item() if finite.any() else 0.0
    difference = (found - exact)[finite].abs().max().item() if finite.any() else 0.0
    return difference / max(scale, 1e-30) if difference else 0.0


def compare(before: list[dict], after: list[dict], within: float) -> tuple[int, list[str]]:
    """Return the number of calls with the same bits, and a list of problems."""
    same, wrong = 0, []
    for old, new in zip(before, after, strict=True):
        what = new["what"]
        if set(old["found"]) != set(new["found"]):
            wrong.append(f"{what}: other results, {sorted(set(old['found']) ^ set(new['found']))}")
            continue
        bits = {
            name: torch.equal(old["found"][name].nan_to_num(7.0), x.nan_to_num(7.0)) for name, x in new["found"].items()
        }
        same += all(bits.values())
        for name, equal in bits.items():
            x, y, exact = new["found"][name], old["found"][name], old["exact"][name]
            if equal:
                continue
            differs, was, now = error(x, y), error(y, exact), error(x, exact)
            eps = torch.finfo(torch.float32).eps
            if differs > within or now > max(was + eps, 8 * eps):  # another order of operations rounds differently
                wrong.append(f"{what}: {name} differs by {differs:.2g}; error {now:.2g}, before {was:.2g}")
    return same, wrong


def in_revision(root: Path, *arguments: str) -> Any:
    """Run this file in another tree and return the content that it saves."""
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/found.pt"
        program = f"import runpy, sys; sys.argv = {['x', *arguments, '--save', file]!r}; "
        program += f"runpy.run_path({__file__!r}, run_name='__main__')"
        environment = os.environ | {"PYTHONPATH": str(root), "TRITON_INTERPRET": "1"}
        subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=root, env=environment, check=True)
        return torch.load(file, weights_only=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="The same calls in another revision and in this tree.")
    parser.add_argument("revision", nargs="?")
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5, help="turns of the two revisions in timing (default 5)")
    parser.add_argument("--within", type=float, default=1e-6, help="relative difference that is allowed (default 1e-6)")
    parser.add_argument("--save", help=argparse.SUPPRESS)
    parser.add_argument("--time", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.save:
        torch.save(timed(options.rounds) if options.time else record(options.calls), options.save)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "-q", "--detach", other, options.revision], cwd=ROOT, check=True)
        try:
            calls = ("--calls", str(options.calls))
            same, wrong = compare(in_revision(other, *calls), in_revision(ROOT, *calls), options.within)
            turns = [
                [in_revision(tree, "--time", "--rounds", "5") for tree in (other, ROOT)] for _ in range(options.rounds)
            ]
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", other], cwd=ROOT, check=True)
    print(f"{same} of {options.calls} calls: the same bits; wrong: {len(wrong)}")
    print("\n".join(wrong[:20]))
    ratios = {}
    for name in turns[0][0] if turns else ():
        before, after = (min(min(turn[i][name]) for turn in turns) for i in (0, 1))
        ratios[name] = after / before
        print(f"{name}: {1e6 * before:.0f} us before, {1e6 * after:.0f} after, {ratios[name]:.2f}")
    if ratios:
        print(f"time after / before: median {statistics.median(ratios.values()):.2f}, most {max(ratios.values()):.2f}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
