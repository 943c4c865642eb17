"""Test selections of tokens: entropy cutoff against torch.quantile, ties, NaN, ranks, and more than 2^24 tokens."""

import math
from types import SimpleNamespace

import pytest
import torch

from rlloss import entropy_cutoff
from rlloss.backends import backend
from rlloss.tokens.masks import completion_mask, not_truncated, top_entropy_mask
from tests.support.ranks import on_ranks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_ties_at_the_cutoff():
    entropy = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 2.0]])
    mask = torch.ones(1, 8, dtype=torch.bool)
    assert top_entropy_mask(entropy, mask, 0.5).all()  # most entropies are 0, and so is the cutoff
    exact = top_entropy_mask(entropy, mask, 0.5, exact_k=True)
    assert exact.tolist() == [[True, True, False, False, False, False, True, True]]
    assert top_entropy_mask(torch.ones(1, 8), mask, 0.0, exact_k=True).sum() == 1


def test_of_equal_entropies_the_keys_of_the_sequences_decide():
    g = torch.Generator().manual_seed(0)
    entropy, mask = torch.randint(0, 3, (8, 9), generator=g).float(), torch.rand(8, 9, generator=g) < 0.8
    key, order = torch.arange(8), torch.randperm(8, generator=g)
    found = top_entropy_mask(entropy, mask, 0.2, exact_k=True, sequence_key=key)
    first = top_entropy_mask(entropy, mask, 0.2, exact_k=True)
    assert found.sum() == first.sum() and not torch.equal(found, first)
    for o in (order, order.flip(0)):
        again = top_entropy_mask(entropy[o], mask[o], 0.2, exact_k=True, sequence_key=key[o])
        assert torch.equal(again, found[o])
    with pytest.raises(ValueError, match="sequence_key: found a tensor, expected None without exact_k"):
        top_entropy_mask(entropy, mask, 0.2, sequence_key=key)


def test_an_empty_mask_keeps_nothing():
    mask = torch.zeros(2, 3, dtype=torch.bool)
    assert entropy_cutoff(torch.ones(2, 3), mask, 0.2) == math.inf
    for settings in ({}, {"exact_k": True}, {"exact_k": True, "sequence_key": torch.arange(2)}):
        assert not top_entropy_mask(torch.ones(2, 3), mask, 0.2, **settings).any()


def test_a_nan_entropy_does_not_move_the_cutoff_and_is_kept():
    entropy = torch.tensor([[0.1, 0.2, math.nan, 0.3, 0.4, math.nan]])
    mask = torch.tensor([[True, True, True, True, True, False]])
    cutoff = entropy_cutoff(entropy, mask, 0.5)
    assert torch.equal(cutoff, torch.tensor([0.1, 0.2, 0.3, 0.4]).quantile(0.5))
    for settings in ({}, {"exact_k": True}, {"exact_k": True, "sequence_key": torch.arange(1)}):
        kept = top_entropy_mask(entropy, mask, 0.5, **settings)
        assert kept.tolist() == [[False, False, True, True, True, False]]


@pytest.mark.parametrize("rho", [0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8])
def test_the_tokens_that_trl_keeps(rho):
    trl = pytest.importorskip("trl")
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device="cpu", num_processes=1, process_index=0))
    trainer.accelerator.pad_across_processes = lambda x, **_: x
    trainer.accelerator.gather = lambda x: x
    for n in (2, 3, 6, 11, 16, 21, 41, 51):
        entropy = torch.rand(2, n, generator=torch.Generator().manual_seed(n))
        mask = torch.arange(2 * n).view(2, n) % 7 != 3
        theirs = trl.GRPOTrainer.get_high_entropy_mask(trainer, entropy, mask.int(), 1 - rho)
        assert torch.equal(top_entropy_mask(entropy, mask, rho), theirs), n


def test_the_cutoff_carries_no_gradient():
    entropy = torch.rand(2, 5, requires_grad=True)
    assert not entropy_cutoff(entropy, torch.ones(2, 5, dtype=torch.bool), 0.2).requires_grad


def test_completion_mask_ends_with_the_first_end():
    ids = torch.tensor([[5, 1, 7, 1], [5, 6, 7, 8], [1, 1, 1, 1]])
    assert completion_mask(ids, 1).tolist() == [[True, True, False, False], [True] * 4, [True, False, False, False]]
    assert not_truncated(ids, 1).tolist() == [True, False, True]


def _rank(rank: int, port: int, queue) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
    entropy, mask = _share(rank)
    cutoff = entropy_cutoff(entropy, mask, 0.3, process_group=torch.distributed.group.WORLD)
    together = {"process_group": torch.distributed.group.WORLD}
    kept = [top_entropy_mask(entropy, mask, 0.3, exact_k=exact_k, **together).tolist() for exact_k in (False, True)]
    tied = top_entropy_mask(torch.zeros_like(entropy), mask, 0.3, exact_k=True, **together)
    queue.put((rank, cutoff.item(), *kept, tied.tolist()))


def _share(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranks of different shapes; the last has no token."""
    g = torch.Generator().manual_seed(rank)
    entropy = torch.rand(2, 5 + 4 * rank, generator=g)
    return entropy, (torch.rand(entropy.shape, generator=g) < 0.7) & (rank < 2)


def test_ranks_share_one_cutoff():
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    on_ranks(_rank, 3, queue)
    found = {rank: rest for rank, *rest in (queue.get() for _ in range(3))}
    everything = torch.cat([e[m] for e, m in map(_share, range(3))])
    cutoff = everything.quantile(0.7).item()
    k = math.floor(0.3 * (len(everything) - 1)) + 1
    tied = 0
    for rank in range(3):
        entropy, mask = _share(rank)
        expected = (mask & (entropy >= cutoff)).tolist()
        first = mask & (tied + mask.flatten().cumsum(0).view(mask.shape) <= k)
        assert found[rank] == [cutoff, expected, expected, first.tolist()]
        tied += int(mask.sum())


def test_a_cutoff_takes_no_process_group():
    entropy, mask = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="process_group: found a group, expected None with a cutoff"):
        top_entropy_mask(entropy, mask, 0.2, cutoff=0.5, process_group=object())


@pytest.mark.slow
def test_more_tokens_than_fp32_counts():
    n = 2**24 + 3
    # 10000019 and n share no factor: every number below n once, so every value twice
    entropy = ((torch.arange(n) * 10000019 % n) // 2).float().unsqueeze(0).to(DEVICE)
    mask = torch.ones(1, n, dtype=torch.bool, device=DEVICE)
    rho = 0.25
    position = (1 - rho) * (n - 1)
    low, high = math.floor(position) // 2, math.ceil(position) // 2
    expected = low + (position - math.floor(position)) * (high - low)
    with backend("triton" if DEVICE == "cuda" else "torch"):  # the interpreter would take minutes
        found = entropy_cutoff(entropy, mask, rho)
    assert abs(found.item() - expected) <= 0.5  # fp32 spacing up there
    try:
        assert found == entropy.quantile(1 - rho)
    except RuntimeError as error:  # before torch 2.14
        assert "too large" in str(error)
