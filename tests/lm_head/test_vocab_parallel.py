"""Test that a vocabulary split over ranks gives the same result as the whole vocabulary."""

import pytest
import torch
from torch import distributed

from rlloss import GRPOLoss, LinearGRPOLoss, LossConfig, linear_token_stats, token_stats
from rlloss.backends import backend
from rlloss.lm_head import vocab_loop
from tests.support.ranks import on_ranks
from tests.support.saturation import CLOSE, exact, relative_error, saturated

OUTPUTS = ("logp", "entropy", "lse", "mean_logit", "log_sum_sq_probs", "is_top1")
SPLIT = (70, 31)  # one rank's part is smaller, and one row has nothing above -inf in it


def inputs():
    g = torch.Generator().manual_seed(0)
    V, D, B, T = sum(SPLIT), 12, 3, 5
    hidden, weight, bias = (torch.randn(*shape, generator=g) for shape in ((B, T, D), (V, D), (V,)))
    bias[: SPLIT[0]][3] = -torch.inf
    target = torch.randint(0, V, (B, T), generator=g)
    target[target == 3] = 4
    mask = torch.rand(B, T, generator=g) < 0.8
    return hidden, weight, bias, target, mask, torch.randn(B, generator=g)


def steps(hidden, weight, bias, target, mask, advantage, group):
    found = []
    more = {"temperature": 1.3, "softcap": 4.0, "logit_scale": 0.7, "mask": mask, "bias": bias, "vocab_group": group}
    stats = linear_token_stats(hidden, weight, target, outputs=OUTPUTS, entropy_grad=True, **more)
    (stats.logp.sum() + 2 * stats.entropy.sum() + stats.lse.square().sum()).backward()
    found += [*stats, hidden.grad, weight.grad, bias.grad]
    for plan in ("recompute", "keep", "gradient_in_forward"):
        for x in (hidden, weight, bias):
            x.grad = None
        loss = LinearGRPOLoss(LossConfig(), plan=plan, vocab_group=group)(
            hidden, weight, target, advantage, bias=bias, mask=mask
        ).loss
        (3 * loss).backward()
        found += [loss, hidden.grad, weight.grad, bias.grad]
    hidden.grad = None
    logp = linear_token_stats(hidden, weight.detach(), target, plan="jacobian", **more | {"bias": bias.detach()}).logp
    (logp * (advantage[:, None] * mask)).sum().backward()
    found += [logp, hidden.grad]
    return [x.detach().clone() for x in found]


def _on_a_rank(rank, port, expected):
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    vocab_loop.CPU_WIDTH, vocab_loop.CPU_ROWS = 16, 4
    own = slice(0, SPLIT[0]) if rank == 0 else slice(SPLIT[0], None)
    hidden, weight, bias, *rest = inputs()
    weight, bias = weight[own], bias[own]
    for x in (hidden, weight, bias):
        x.requires_grad_()
    with backend("torch"):
        found = steps(hidden, weight, bias, *rest, group=distributed.group.WORLD)
    assert len(found) == len(expected)
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        if x.shape != y.shape:
            y = y[own]
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5, msg=lambda m, i=i: f"{i}: {m}")
    logits, target = saturated(sum(SPLIT))
    weight = logits.T[own].contiguous().requires_grad_()
    logp = linear_token_stats(torch.eye(len(target)), weight, target, vocab_group=distributed.group.WORLD).logp
    logp.sum().backward()
    assert relative_error(logp, exact(logits, target).logp) <= CLOSE
    assert relative_error(weight.grad.T, exact(logits, target).grad[:, own]) <= CLOSE
    mean = torch.stack([x.double().sum() for x in found[:6]])
    both = [torch.zeros_like(mean) for _ in range(2)]
    distributed.all_gather(both, mean)
    assert torch.equal(*both)  # the ranks decide by these which rows are live


def test_two_ranks_give_what_one_gives():
    hidden, weight, bias, *rest = inputs()
    for x in (hidden, weight, bias):
        x.requires_grad_()
    with backend("torch"):
        expected = steps(hidden, weight, bias, *rest, group=None)
    on_ranks(_on_a_rank, 2, expected)


@pytest.fixture
def dtensor():
    """A function from a plain tensor to a DTensor with the same data, on a mesh of one process."""
    from torch.distributed.tensor import distribute_tensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    mesh = distributed.init_device_mesh("cpu", (1,))
    yield lambda x: distribute_tensor(x, mesh)
    distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["logits", "hidden", "weight", "bias", "target", "mask", "temperature"])
def test_a_dtensor_is_named_with_the_ways_out(dtensor, name):
    hidden, weight = torch.randn(2, 3, 4), torch.randn(7, 4)
    given = {"target": torch.ones(2, 3, dtype=torch.int64), "mask": torch.ones(2, 3, dtype=torch.bool),
             "temperature": torch.ones(2, 3)}  # fmt: skip
    if name == "logits":
        calls, given = [token_stats, GRPOLoss()], given | {"logits": hidden @ weight.T}
    else:
        calls = [linear_token_stats, LinearGRPOLoss()]
        given |= {"hidden": hidden, "weight": weight, "bias": torch.zeros(7)}
    given[name] = dtensor(given[name])
    way_out = r"root module.*vocab_group.*Partial\('avg'\)" if name in ("weight", "bias") else r"to_local\(\)"
    for call, more in zip(calls, ({}, {"advantage": torch.ones(2)}), strict=True):
        with pytest.raises(TypeError, match=rf"^{name}: found a DTensor with .*{way_out}"):
            call(**given, **more)
