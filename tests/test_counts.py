"""What the kernels really read, write and launch, counted by the interpreter: "one pass over the logits" as a test."""

import collections
import contextlib

import pytest
import torch

from rlloss import GRPOLoss, LossConfig, backends

interpreted = backends.triton_forward is not None and not torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not interpreted, reason="counts in Triton's interpreter")

B, T, V = 3, 4, 3000  # two blocks of the vocabulary, the second one not full


class Traffic:
    """Reads and writes of single entries, by address, and launches by the name of the kernel."""

    def __init__(self):
        self.reads, self.writes, self.launches = (collections.Counter() for _ in range(3))

    def of(self, x: torch.Tensor, counts: collections.Counter) -> torch.Tensor:
        """How often each entry of `x` was touched, shaped like it."""
        first, size = x.data_ptr(), x.element_size()
        assert x.is_contiguous()
        flat = torch.tensor([counts[first + i * size] for i in range(x.numel())])
        return flat.view(x.shape)


@contextlib.contextmanager
def counted(monkeypatch):
    from triton.runtime import interpreter

    traffic, memory, launch = Traffic(), interpreter._interpreter, interpreter.GridExecutor.__call__

    class Counting:
        def __getattr__(self, name):
            return getattr(memory, name)

        def load(self, pointers, mask, other, dtype):
            traffic.reads.update(pointers[mask].ravel().tolist())
            return memory.load(pointers, mask, other, dtype)

        def store(self, pointers, value, mask):
            traffic.writes.update(pointers[mask].ravel().tolist())
            return memory.store(pointers, value, mask)

    def launched(self, *args, **kwargs):
        traffic.launches[self.fn.__name__] += 1
        return launch(self, *args, **kwargs)

    with monkeypatch.context() as patch, backends.backend("interpreter"):
        patch.setattr(interpreter, "_interpreter", Counting())
        patch.setattr(interpreter.GridExecutor, "__call__", launched)
        yield traffic


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


TOKEN_PASS = {"clip_surrogate_kernel": 1}


@pytest.mark.parametrize("settings", [
    {}, {"ratio_level": "sequence", "loss_type": "grpo"}, {"loss_type": "cispo", "epsilon_high": 2.0},
    {"top_entropy_quantile": 0.4}, {"top_entropy_quantile": 0.4, "exact_k": True}, {"off_policy_threshold": 0.1},
], ids=str)  # fmt: skip
def test_each_logit_is_read_once_forward_and_live_ones_once_backward(monkeypatch, batch, settings):
    with counted(monkeypatch) as traffic:
        logits, (loss, metrics) = forward(LossConfig(**settings), batch, single_launch=False)
    reads = traffic.of(logits, traffic.reads)
    # One more of the target's own logit.
    expected = batch["mask"][..., None].expand(B, T, V).long()
    expected = expected.scatter_add(-1, batch["target"][..., None], batch["mask"][..., None].long())
    assert torch.equal(reads, expected)
    assert sum(traffic.of(logits, traffic.writes).flatten().tolist()) == 0
    launches = dict(traffic.launches)
    assert launches.pop("token_stats_forward_kernel") == 1
    selecting = {name: launches.pop(name) for name in list(launches) if name.startswith("entropy_")}
    assert launches == TOKEN_PASS and bool(selecting) == ("top_entropy_quantile" in settings)

    with counted(monkeypatch) as traffic:
        (gradient,) = torch.autograd.grad(loss, logits)
    live = (gradient != 0).any(-1)
    assert live.sum() == metrics["live"] and 0 < live.sum() < batch["mask"].sum()
    assert torch.equal(traffic.of(logits, traffic.reads), live[..., None].expand(B, T, V).long())
    assert (traffic.of(gradient, traffic.writes) == 1).all()
    assert traffic.launches == {"token_stats_backward_kernel": 1}


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_the_single_launch(monkeypatch, batch, factor):
    with counted(monkeypatch) as traffic:
        logits, (loss, metrics) = forward(LossConfig(), batch, single_launch=True)
    assert traffic.launches == {"loss_gradient_kernel": 1, **TOKEN_PASS}
    reads = traffic.of(logits, traffic.reads)
    factor = torch.tensor(factor)
    with counted(monkeypatch) as later:
        (gradient,) = torch.autograd.grad(loss, logits, factor)
    live = (gradient != 0).any(-1)
    assert live.sum() == metrics["live"]
    # Once for the statistics, again (from the cache) where the row is live.
    expected = (batch["mask"].long() + live)[..., None].expand(B, T, V)
    expected = expected.scatter_add(-1, batch["target"][..., None], batch["mask"][..., None].long())
    assert torch.equal(reads, expected)
    assert (traffic.of(gradient, traffic.writes) == 1).all()
    assert later.launches == {"token_stats_backward_kernel": 1}
    again = live[..., None].expand(B, T, V).long() * (factor != 1)
    assert torch.equal(later.of(logits, later.reads), again)
    assert torch.equal(later.of(gradient, later.writes), again)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_token_pass_reads_old_logp_once(monkeypatch, batch, level):
    with counted(monkeypatch) as traffic:
        forward(LossConfig(ratio_level=level), batch, single_launch=False)
    assert torch.equal(traffic.of(batch["old_logp"], traffic.reads), batch["mask"].long())
