"""Count the reads, writes and launches of the kernels in the interpreter: a test of "one pass over the logits"."""

from fractions import Fraction

import pytest
import torch

from rlloss import GRPOLoss, LinearGRPOLoss, LossConfig, count_products, explain_plan, linear_token_stats
from rlloss.lm_head import plans, vocab_loop
from tests.support.counting import READ, WRITE, counted, needs_interpreter

pytestmark = needs_interpreter

B, T, V = 3, 4, 3000  # two blocks of the vocabulary, the second one not full


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(B, T, V, generator=g)
    target = torch.randint(0, V, (B, T), generator=g)
    mask = torch.rand(B, T, generator=g) < 0.7
    old_logp = logits.log_softmax(-1).gather(-1, target[..., None]).squeeze(-1)
    old_logp[0, :2] -= 1.0  # clipped where the advantage is positive
    advantage = torch.tensor([1.0, -1.0, 0.0])
    assert mask[0].any() and mask[1].any() and mask[2].any() and not mask.all()
    return {"logits": logits, "target": target, "advantage": advantage, "mask": mask, "old_logp": old_logp}


def forward(config, batch, **switches):
    logits = batch["logits"].requires_grad_()
    given = {name: batch[name] for name in ("mask", "old_logp")}
    return logits, GRPOLoss(config, **switches)(logits, batch["target"], batch["advantage"], **given)


TOKEN_PASS = {"token_pass_kernel": 1}


@pytest.mark.parametrize("settings", [
    {}, {"ratio_level": "sequence", "loss_type": "grpo"}, {"loss_type": "cispo", "epsilon_high": 2.0},
    {"top_entropy_quantile": 0.4}, {"top_entropy_quantile": 0.4, "exact_k": True}, {"off_policy_threshold": 0.1},
], ids=str)  # fmt: skip
def test_each_logit_is_read_once_forward_and_live_ones_once_backward(monkeypatch, batch, settings):
    with counted(monkeypatch) as traffic:
        logits, (loss, metrics) = forward(LossConfig(**settings), batch, single_launch=False)
    reads = traffic.of(logits, READ)
    # One more read of the target's logit.
    expected = batch["mask"][..., None].expand(B, T, V).long()
    expected = expected.scatter_add(-1, batch["target"][..., None], batch["mask"][..., None].long())
    assert torch.equal(reads, expected)
    assert sum(traffic.of(logits, WRITE).flatten().tolist()) == 0
    launches = dict(traffic.launches)
    assert launches.pop("token_stats_forward_kernel") == 1
    selecting = {name: launches.pop(name) for name in list(launches) if name.startswith("entropy_")}
    assert launches == TOKEN_PASS and bool(selecting) == ("top_entropy_quantile" in settings)

    with counted(monkeypatch) as traffic:
        (gradient,) = torch.autograd.grad(loss, logits)
    live = (gradient != 0).any(-1)
    assert live.sum() == metrics["live"] and 0 < live.sum() < batch["mask"].sum()
    assert torch.equal(traffic.of(logits, READ), live[..., None].expand(B, T, V).long())
    assert (traffic.of(gradient, WRITE) == 1).all()
    assert traffic.launches == {"token_stats_backward_kernel": 1}


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_the_single_launch(monkeypatch, batch, factor):
    with counted(monkeypatch) as traffic:
        logits, (loss, metrics) = forward(LossConfig(), batch, single_launch=True)
    assert traffic.launches == {"gradient_in_forward_kernel": 1, **TOKEN_PASS}
    reads = traffic.of(logits, READ)
    factor = torch.tensor(factor)
    with counted(monkeypatch) as later:
        (gradient,) = torch.autograd.grad(loss, logits, factor)
    live = (gradient != 0).any(-1)
    assert live.sum() == metrics["live"]
    # Once for the statistics, and again (from the cache) if the row is live.
    expected = (batch["mask"].long() + live)[..., None].expand(B, T, V)
    expected = expected.scatter_add(-1, batch["target"][..., None], batch["mask"][..., None].long())
    assert torch.equal(reads, expected)
    assert (traffic.of(gradient, WRITE) == 1).all()
    assert later.launches == {"token_stats_backward_kernel": 1}
    again = live[..., None].expand(B, T, V).long() * (factor != 1)
    assert torch.equal(later.of(logits, READ), again)
    assert torch.equal(later.of(gradient, WRITE), again)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_token_pass_reads_old_logp_once(monkeypatch, batch, level):
    with counted(monkeypatch) as traffic:
        forward(LossConfig(ratio_level=level), batch, single_launch=False)
    assert torch.equal(traffic.of(batch["old_logp"], READ), batch["mask"].long())


def step(plan, hidden, weight, batch):
    """A forward and, with a plan other than "forward", a backward."""
    target, mask = batch["target"], batch["mask"]
    if plan == "forward":
        linear_token_stats(hidden.detach(), weight.detach(), target, mask=mask)
        return
    loss_fn = LinearGRPOLoss(LossConfig(), plan=plan)
    loss, metrics = loss_fn(hidden, weight, target, batch["advantage"], mask=mask, old_logp=batch["old_logp"])
    loss.backward()
    assert metrics["live"] == batch["live"].sum()


@pytest.mark.parametrize("needed, rows, dtype, widened", [
    ((True, True), 4, torch.float32, True), ((True, False), 4, torch.bfloat16, True),
    ((False, True), 4, torch.bfloat16, False), ((True, True), 8, torch.bfloat16, True),
    ((True, True), 64, torch.bfloat16, False),
])  # fmt: skip
@pytest.mark.parametrize("plan", ["forward", *plans.PLANS])
def test_a_plan_costs_what_is_said(monkeypatch, plan, needed, rows, dtype, widened):
    if plan == "jacobian":
        needed = (True, False)  # it is for a frozen head
    monkeypatch.setattr(vocab_loop, "CPU_ROWS", rows)
    monkeypatch.setattr(vocab_loop, "CPU_WIDTH", 256)
    if not widened:  # as on a GPU, whose products take bf16 and give fp32
        monkeypatch.setattr(vocab_loop.Head, "operand", lambda head, x: x.to(head.compute_dtype))
    B, T, V, D = 3, 5, 600, 16
    g = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(shape, generator=g).to(dtype) for shape in ((B, T, D), (V, D)))
    batch = {"target": torch.randint(0, V, (B, T), generator=g), "mask": torch.rand(B, T, generator=g) < 0.8}
    logp = (hidden.float() @ weight.float().t()).log_softmax(-1).gather(-1, batch["target"][..., None]).squeeze(-1)
    batch |= {"advantage": torch.tensor([1.0, -1.0, 0.0]), "old_logp": logp}
    batch["old_logp"][0, :2] -= 1.0  # clipped
    live = batch["mask"] & (batch["advantage"] != 0)[:, None]
    live[0, :2] = False
    batch["live"] = live
    candidates = batch["mask"] & (batch["advantage"] != 0)[:, None]
    # Of how many rows a gradient of the logits is computed.
    n, L = int(batch["mask"].sum()), {"forward": 0, "jacobian": int(candidates.sum())}.get(plan, int(live.sum()))
    assert 4 < live.sum() <= 8 < n < B * T

    hidden.requires_grad_(needed[0])
    weight.requires_grad_(needed[1])
    with counted(monkeypatch) as traffic, count_products() as run:
        step(plan, hidden, weight, batch)

    r, gradients = Fraction(L, n), sum(needed)
    expected = 1 + r * (gradients + (plan == "recompute")) if plan != "forward" else 1
    assert sum(run.flop.values()) == expected * run.unit
    report = explain_plan(
        hidden, weight, mask=batch["mask"], config=LossConfig(), advantage=batch["advantage"], live_share=L / n,
        plan=plan,
    ) if plan != "forward" else explain_plan(hidden.detach(), weight.detach(), mask=batch["mask"])  # fmt: skip
    assert report.plan == plan and report.products == pytest.approx(float(expected))

    tiles = [launch for launch in traffic.all if launch.kernel in ("fold_tile_kernel", "gradient_tile_kernel")]
    read = sum(launch.bytes_of("tile_ptr", READ) for launch in tiles)
    outputs = {"fold_tile_kernel": "tile_ptr", "gradient_tile_kernel": "out_ptr"}
    written = sum(launch.bytes_of(outputs[launch.kernel], WRITE) for launch in tiles)
    # fp32 tiles, plus the target's logit of each row. A gradient has the dtype of the products' operands.
    assert read == 4 * n * V + 4 * n + 4 * L * V
    assert written == (4 if widened else dtype.itemsize) * L * V
