"""Test `rlloss plan`: compare every formula with counted matrix products and with the logits in memory."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from rlloss import LinearGRPOLoss, backends, cli, count_products
from rlloss.lm_head.plans import PLANS
from rlloss.plan import head_costs, read_config

B, T, V, D = 4, 25, 1000, 4
CONFIG = {"vocab_size": V, "hidden_size": D}
# fill, rho, whether the head is trained
SHAPES = [(1.0, 1.0, True), (0.5, 0.2, True), (0.75, 0.2, False)]


class Counted(TorchDispatchMode):
    """flop: of all products of two matrices. largest: bytes of the largest tensor of logits. Here logits are larger
    than hidden states, weight and their gradients."""

    def __init__(self, least=2 * V * D):
        super().__init__()
        self.flop, self.largest, self.least = 0, 0, least

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.partition(".")[0]
        if name in ("mm", "addmm", "addmm_"):  # torch's FLOP counter leaves out addmm_
            a, b = args[:2] if name == "mm" else args[1:3]
            self.flop += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.numel() > self.least:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return out


def case(fill, rho, trained):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, D, generator=g).requires_grad_()
    weight = torch.randn(V, D, generator=g).requires_grad_(trained)
    n = round(fill * B * T)
    mask = (torch.arange(B * T) < n).view(B, T)
    target = torch.randint(0, V, (B, T), generator=g)
    return hidden, weight, target, mask, n, torch.arange(B * T).view(B, T) < round(rho * n)


def costs(fill, rho, trained, device="cpu", **options):
    found = head_costs(
        CONFIG,
        completions=B,
        tokens=T,
        rho=rho,
        fill=fill,
        dtype="fp32",
        frozen_head=not trained,
        device=device,
        **options,
    )
    return found, {way.name: way for way in found.ways}


@pytest.mark.parametrize("fill, rho, trained", SHAPES)
def test_plain_logits(fill, rho, trained):
    hidden, weight, target, mask, n, live = case(fill, rho, trained)
    with Counted() as counted:
        log_p = torch.log_softmax(hidden @ weight.T, -1, dtype=torch.float32)
        logp = log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        torch.where(mask & live, logp, 0.0).sum().backward()
    way = costs(fill, rho, trained)[1]["plain logits"]
    assert way.flop == counted.flop == round(way.products * 2 * n * V * D)
    assert way.logits_bytes == counted.largest


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("fill, rho, trained", SHAPES)
def test_trls_head(fill, rho, trained, device):
    """The function that TRL's fused head calls: on a CPU with every column, on a GPU with the columns that count."""
    pytest.importorskip("trl")
    logprob = pytest.importorskip("trl.kernels.chunked_logprob")
    from trl.trainer import utils

    hidden, weight, target, mask, n, live = case(fill, rho, trained)
    chosen = mask if device == "cuda" else torch.ones_like(mask)
    chunk = utils._CHUNKED_LOGPROB_CHUNK_SIZE
    with Counted() as counted:
        rows = hidden[chosen]
        found = logprob.ChunkedLogProbFunction.apply(
            rows, weight, None, target[chosen], 1.0, chunk, None, 1.0, ("log_probs", "entropy")
        )
        torch.where(live[chosen], found[0], 0.0).sum().backward()
    way = costs(fill, rho, trained, device)[1]["TRL 1.16, fused head"]
    assert way.flop == counted.flop
    assert way.logits_bytes == counted.largest


@pytest.mark.parametrize("fill, rho, trained", SHAPES)
def test_ligers_loss(fill, rho, trained):
    losses = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss")
    hidden, weight, target, mask, n, _ = case(fill, rho, trained)
    loss = losses.LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, compiled=False)
    with Counted() as counted:
        loss(hidden, weight, target, mask.long(), torch.ones(B))[0].backward()
    way = costs(fill, rho, trained)[1]["Liger 0.8.5, chunked loss"]
    assert way.flop == counted.flop and way.logits_bytes == counted.largest


@pytest.mark.parametrize("T, V", [(16, 4097), (16, 33_000), (2100, 5000)])
def test_ligers_tile(T, V):
    """Shapes that are larger than its tile in either direction."""
    losses = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss")
    hidden, weight = torch.randn(2, T, 1).requires_grad_(), torch.randn(V, 1).requires_grad_()
    loss = losses.LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, compiled=False)
    with Counted(least=max(V, 2 * T)) as counted:
        loss(hidden, weight, torch.randint(0, V, (2, T)), torch.ones(2, T).long(), torch.ones(2))[0].backward()
    found = head_costs({"vocab_size": V, "hidden_size": 1}, completions=2, tokens=T, dtype="fp32")
    assert found.ways[2].logits_bytes == counted.largest
    assert found.ways[2].flop == counted.flop


def test_ligers_recorded_count():
    """The count comes from a run in which Liger was installed."""
    path = Path(__file__).resolve().parents[2] / "benchmarks/results/cpu-2-cores/hidden.json"
    runs = [run for run in json.loads(path.read_text())["results"] if "units" in run.get("peers", {}).get("Liger", {})]
    assert runs
    for run in runs:
        N = run["B"] * run["T"]
        frozen = run["kind"] == "frozen head"
        found = head_costs(CONFIG, completions=1, tokens=N, fill=run["counted"] / N, frozen_head=frozen)
        assert found.ways[2].products == pytest.approx(run["peers"]["Liger"]["units"], rel=1e-6)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("fill, rho, trained", SHAPES)
def test_rllosss_plans(fill, rho, trained, plan):
    """The advantage gives a share rho of the tokens a gradient. The loss allows every plan that the head does."""
    hidden, weight, target, mask, n, live = case(fill, rho, trained)
    if plan == "jacobian":
        if trained:
            assert costs(fill, rho, trained)[1]["rlloss jacobian"].why_not == "the weight gets a gradient"
            return
        live = torch.ones_like(live)  # its cost depends on the tokens that may be live
    _, ways = costs(fill, rho, trained)
    with backends.backend("torch"), count_products() as products, Counted() as counted:
        loss = LinearGRPOLoss("dapo", plan=plan)(hidden, weight, target, live.float(), mask=mask).loss
        loss.backward()
    way = ways[f"rlloss {plan}"]
    assert way.products == pytest.approx(products.units, rel=1e-6)
    assert way.flop == sum(products.flop.values())
    if plan == "recompute":
        assert way.logits_bytes == counted.largest


def test_the_plan_taken_is_marked_and_forbidden_ones_say_why():
    found, ways = costs(1.0, 0.5, True, memory_budget="1MiB")
    assert found.plan == "keep" and "keep               " in str(found) and "<- taken" in str(found)
    assert ways["rlloss gradient_in_forward"].why_not and ways["rlloss gradient_in_forward"].why_not in str(found)
    small, ways = costs(1.0, 1.0, True, memory_budget=0)
    assert small.plan == "recompute" and "the memory budget is 0 B" in ways["rlloss keep"].why_not


def test_the_share_of_the_head_in_a_step():
    """The FLOP of a Llama's forward and backward are counted, without attention scores."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with FlopCounterMode(display=False) as flop:
        model(torch.zeros(2, 3, dtype=torch.int64)).logits.sum().backward()
    of = flop.get_flop_counts()["Global"]
    counted = sum(n for name, n in of.items() if "bmm" not in str(name))
    found = head_costs(config.to_dict(), completions=2, tokens=3)
    assert found.backbone_flop + found.ways[0].flop == counted
    assert found.head_share == found.ways[0].flop / counted
    assert head_costs({**config.to_dict(), "num_experts": 8}, completions=2, tokens=3).head_share is None


def test_configs(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"text_config": CONFIG}))
    assert read_config(file) == read_config(tmp_path) == read_config(str(tmp_path)) == CONFIG
    with pytest.raises(FileNotFoundError, match="expected a file, a folder with one, or a Hub id"):
        read_config(tmp_path / "other.json")
    file.write_text("{")
    with pytest.raises(ValueError, match="model: found .*, which is no JSON"):
        read_config(tmp_path)
    with pytest.raises(ValueError, match="model: found vocab_size=None in its config, expected a whole number"):
        head_costs({"hidden_size": 4}, completions=1, tokens=1)


def test_the_command(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    line = ["plan", str(tmp_path), "--completions", "4", "--tokens", "25", "--rho", "0.2", "--memory_budget", "1GiB"]
    assert cli.main(line) == 0
    assert "lm_head 1,000 x 4, bf16, trained; 4 completions of 25 tokens" in capsys.readouterr().out
    assert cli.main([*line, "--lora", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["frozen_head"] is True
    for wrong, message in ((["--rho", "2"], "rho: found 2.0"), (["--dtype", "int8"], "dtype: found 'int8'")):
        assert cli.main([*line, *wrong]) == 2
        assert f"rlloss plan: error: {message}" in capsys.readouterr().err
    assert cli.main(["plan", str(tmp_path / "none.json")]) == 2
    assert "rlloss plan: error: model: found no config.json" in capsys.readouterr().err
