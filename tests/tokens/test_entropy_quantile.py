"""Test the radix select (kernels and torch) against torch.quantile and a stable sort, in shards, with ties and NaN."""

import functools
import math
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlloss import backends, entropy_cutoff
from rlloss.tokens.masks import POSITION, top_entropy_mask, top_entropy_selection
from rlloss.torch_kernels import entropy_quantile

pytestmark = pytest.mark.skipif(not backends.triton, reason="needs Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = "triton" if DEVICE == "cuda" else "interpreter"
BOTH = (KERNELS, "torch")
RHOS = (0.0, 0.2, 1 / 3, 0.5, 0.9, 1.0)
N_LARGEST = 5000
INF, NAN = math.inf, math.nan
TINY = 2.0**-149  # the smallest subnormal


def random_values(n: int, seed: int, spread: float = 1.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, generator=g) * torch.exp(spread * torch.randn(n, generator=g))


def some(n: int, seed: int) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.7


CASES = {
    "ties": torch.tensor([3.0, 1.0, 2.0, 2.0, 2.0, 1.0, 5.0, 2.0]),
    "all equal": torch.full((37,), 0.7),
    "all zero": torch.zeros(9),
    "more than half zeros": torch.cat([torch.zeros(30), random_values(20, 1)])[random_values(50, 2).argsort()],
    "both zeros": torch.tensor([0.0, -0.0, 0.0, -0.0, -1.0, 1.0]),
    "tiny negative values": torch.tensor([-1e-7, -3e-8, 0.0, 2e-9, 0.5, -1e-7, 1.0, 1e-3]),
    "subnormals": torch.tensor([TINY, 3 * TINY, -TINY, 0.0, 1e-39, -1e-39, 2e-38, 7 * TINY]),
    "huge spread": torch.tensor([1e-38, 3e38, -3e38, 1.0, 1e-20, 2e38, -1.0, 1e20]),
    "one bit apart": torch.tensor([1.0, 1.0 + 2.0**-23, 1.0 + 2.0**-22, 1.0, 2.0 - 2.0**-23, 2.0]),
    "last bits": (1065353216 + torch.arange(300, dtype=torch.int32).flip(0) * 3).view(torch.float32),
    "infinite": torch.tensor([INF, 1.0, -INF, 2.0, INF, 0.0]),
    "spread of magnitudes": random_values(801, 2, spread=20.0) - 0.1,
}


def as_tokens(values: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The values in order, mixed with tokens that do not count: NaN, infinities and numbers."""
    g = torch.Generator().manual_seed(seed)
    n = values.numel()
    hidden = n // 3 + 2
    order = torch.randperm(n + hidden, generator=g)
    mask = torch.zeros(n + hidden, dtype=torch.bool)
    mask[order[:n]] = True
    entropy = torch.tensor([NAN, INF, -INF, 0.5, -7.0])[torch.randint(0, 5, (n + hidden,), generator=g)]
    entropy[mask] = values
    return entropy.to(DEVICE), mask.to(DEVICE)


def cutoffs(entropy: torch.Tensor, mask: torch.Tensor, rho: float) -> torch.Tensor:
    """The cutoff on the CPU. Both backends must give the same bits."""
    found = []
    for name in BOTH:
        with backends.backend(name):
            found.append(entropy_cutoff(entropy, mask, rho).cpu())
    assert found[0].dtype == found[1].dtype == torch.float32
    assert found[0].shape == found[1].shape == ()
    both_nan = found[0].isnan() & found[1].isnan()
    assert both_nan or found[0].view(torch.int32) == found[1].view(torch.int32), (found, rho)
    return found[0]


def assert_is_the_quantile(cutoff: torch.Tensor, values: torch.Tensor, rho: float) -> None:
    # + 0.0 turns -0.0 into 0.0; the comparison is by bits
    expected = values.cpu().quantile(1 - rho) + 0.0
    same = (cutoff + 0.0).view(torch.int32) == expected.view(torch.int32)
    assert same or (cutoff.isnan() and expected.isnan()), (cutoff, expected)


@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("case", CASES)
def test_both_backends_are_torchs_quantile_bit_for_bit(case, rho):
    entropy, mask = as_tokens(CASES[case])
    assert_is_the_quantile(cutoffs(entropy, mask, rho), CASES[case], rho)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 127, 1000, 2047, 2048, 2049, N_LARGEST])
def test_sizes_about_a_block(n):
    values = random_values(n, seed=n, spread=2.0)
    for rho in (0.2, 1 / 3):
        assert_is_the_quantile(
            cutoffs(values.to(DEVICE), torch.ones(n, dtype=torch.bool, device=DEVICE), rho), values, rho
        )
    entropy, mask = as_tokens(values, seed=n)
    assert_is_the_quantile(cutoffs(entropy, mask, 0.37), values, 0.37)


@pytest.mark.parametrize("n, mask", [(0, False), (5, False), (3000, False), (4, True)])
def test_where_nothing_counts_the_cutoff_is_infinite(n, mask):
    entropy = torch.full((n,), NAN if mask else 1.0, device=DEVICE)
    mask = torch.full((n,), mask, device=DEVICE)
    for rho in (0.0, 0.3):
        assert cutoffs(entropy, mask, rho) == INF
    for name in BOTH:
        with backends.backend(name):
            cutoff, last = top_entropy_selection(entropy, mask, 0.3, exact_k=True)
        assert (cutoff.item(), last.item()) == (INF, -1)


def test_hand_worked_cutoffs():
    entropy, mask = torch.tensor([4.0, 1.0, 3.0, 2.0], device=DEVICE), torch.ones(4, dtype=torch.bool, device=DEVICE)
    for rho, expected in ((0.0, 4.0), (0.5, 2.5), (0.25, 3.25), (1.0, 1.0)):
        assert cutoffs(entropy, mask, rho) == expected
    mask[0] = False
    assert cutoffs(entropy, mask, 0.5) == 2.0


def test_without_a_mask_everything_counts():
    values = random_values(2100, seed=5)
    x, all_of_them = values.to(DEVICE), torch.ones(2100, dtype=torch.bool, device=DEVICE)
    for module in (backends.triton, entropy_quantile):
        assert_is_the_quantile(module.entropy_quantile(x, None, 0.2, **POSITION).cpu(), values, 0.2)
        for a, b in zip(module.entropy_top_k(x, None, 0.2), module.entropy_top_k(x, all_of_them, 0.2), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("rounded_up_to", [0, 2**24])
def test_the_position_before_and_since_torch_2_14(rounded_up_to):
    for n in (1, 2, 6, 11, 101, 4097):
        values = random_values(n, seed=n)
        ordered = values.sort().values
        for rho in (*RHOS, 0.3, 0.7):
            position = float(np.float32(1 - rho)) * (n - 1)
            position = float(np.float32(position)) if rounded_up_to else position
            low, high = ordered[math.floor(position)], ordered[math.ceil(position)]
            expected = low.lerp(high, torch.tensor(position - math.floor(position), dtype=torch.float32))
            for module in (backends.triton, entropy_quantile):
                cutoff = module.entropy_quantile(values.to(DEVICE), None, rho, rounded_up_to=rounded_up_to)
                assert torch.equal(cutoff.cpu(), expected), (module, n, rho)


@pytest.mark.parametrize("rho", RHOS)
def test_fp64_is_torchs_quantile_bit_for_bit(rho):
    for seed, n in enumerate((1, 2, 5, 1000, N_LARGEST)):
        values = random_values(n, seed, spread=9.0).double() + random_values(n, seed + 9).double() * 1e-9
        cutoff = entropy_cutoff(values.to(DEVICE), torch.ones(n, dtype=torch.bool, device=DEVICE), rho).cpu()
        assert torch.equal(cutoff, values.quantile(1 - rho)) and cutoff.dtype == torch.float64


def test_half_precision_and_strided_entropies():
    entropy = random_values(60, 3).to(torch.bfloat16).view(6, 10).t().to(DEVICE)
    mask = some(60, 4).view(6, 10).t().to(DEVICE)
    assert not entropy.is_contiguous() and not mask.is_contiguous()
    assert_is_the_quantile(cutoffs(entropy, mask, 0.3), entropy.float()[mask], 0.3)


def exact_k_by_sorting(entropy: torch.Tensor, mask: torch.Tensor, rho: float) -> torch.Tensor:
    """The top k of the counted tokens by a stable descending sort: the first of equal ones is kept."""
    entropy, mask = entropy.cpu(), mask.cpu()
    counted = mask & ~entropy.isnan()
    places = counted.nonzero().squeeze(1)
    values = entropy[places]
    kept = mask & entropy.isnan()
    if places.numel():
        k = places.numel() - math.ceil(np.float32(1 - rho) * np.float32(places.numel() - 1))
        order = torch.sort(values, descending=True, stable=True).indices
        kept[places[order[:k]]] = True
    return kept


def assert_exact_k(entropy: torch.Tensor, mask: torch.Tensor, rho: float) -> None:
    expected = exact_k_by_sorting(entropy, mask, rho)
    selections = []
    for name in BOTH:
        with backends.backend(name):
            cutoff, last = top_entropy_selection(entropy, mask, rho, exact_k=True)
        assert last is not None and cutoff.dtype == torch.float32 and last.dtype == torch.int64
        selections.append((cutoff.item(), last.item()))
    assert selections[0] == selections[1]
    index = torch.arange(entropy.numel(), device=entropy.device)
    cutoff, last = selections[0]
    chosen = entropy.isnan() | (entropy > cutoff) | ((entropy == cutoff) & (index <= last))
    assert torch.equal((chosen & mask).cpu(), expected)
    with backends.backend("torch"):
        assert torch.equal(top_entropy_mask(entropy, mask, rho, exact_k=True).cpu(), expected)


@pytest.mark.parametrize("case", CASES)
def test_exact_k_is_a_stable_descending_sort(case):
    entropy, mask = as_tokens(CASES[case], seed=3)
    for rho in (0.0, 0.7):
        assert_exact_k(entropy, mask, rho)
    mask = mask | entropy.isnan()  # NaN that counts moves neither cutoff nor k, and is kept
    assert_exact_k(entropy, mask, 0.2)
    assert_is_the_quantile(cutoffs(entropy, mask, 0.2), entropy[mask & ~entropy.isnan()], 0.2)


@pytest.mark.parametrize("n", [1, 2049, N_LARGEST])
def test_exact_k_whose_last_tie_lies_in_any_tile(n):
    entropy = torch.randint(0, 3, (n,), generator=torch.Generator().manual_seed(n)).float().to(DEVICE)
    for rho in (0.0, 0.4, 1.0):
        assert_exact_k(entropy, some(n, 7).to(DEVICE), rho)


def test_more_tiles_than_the_last_tie_takes_in_one_step(monkeypatch):
    monkeypatch.setattr("rlloss.kernels.entropy_quantile.BLOCK", 16)
    entropy = torch.randint(0, 3, (300,), generator=torch.Generator().manual_seed(1)).float().to(DEVICE)
    for rho in (0.1, 0.95):  # 19 tiles, 16 a step
        assert_exact_k(entropy, some(300, 8).to(DEVICE), rho)


def in_shards(select, shards, rho):
    """Run `select` with one thread per shard. The hook sums the histograms and gives every shard the sum."""
    waiting = [torch.empty(0) for _ in shards]
    barrier = threading.Barrier(len(shards), timeout=60)
    found = [None] * len(shards)

    def reduce(shard, histogram):
        waiting[shard] = histogram.clone()
        barrier.wait()
        total = torch.stack(waiting).sum(0)
        barrier.wait()
        histogram.copy_(total)

    def work(shard):
        try:
            found[shard] = select(*shards[shard], rho, reduce=functools.partial(reduce, shard)).cpu()
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(shards))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return found


SHARDS = {
    "random": [random_values(n, n, spread=3.0) for n in (40, 1, 0, 7)],
    "one shard has all of the top": [torch.zeros(20), 5 + random_values(15, 1), torch.zeros(3)],
    "ranks in different shards": [torch.tensor([1.0, 4.0, 9.0]), torch.tensor([2.0, 3.0, NAN, 1e30])],
    "ties across shards": [torch.tensor([2.0, 2.0, 1.0]), torch.tensor([2.0, 2.0, 3.0]), torch.tensor([2.0])],
    "nothing counts": [torch.tensor([NAN]), torch.zeros(0)],
}


def twin_shards(shards, rho):
    return in_shards(functools.partial(entropy_quantile.entropy_quantile, **POSITION), shards, rho)


def kernel_shards(shards, rho):
    """Let threads take turns between two hooks, because the interpreter changes triton.language during a launch."""
    turn = threading.Lock()

    def select(entropy, mask, rho, reduce):
        def between_turns(histogram):
            turn.release()
            try:
                reduce(histogram)
            finally:
                turn.acquire()

        with turn:
            return backends.triton.entropy_quantile(entropy, mask, rho, reduce=between_turns, **POSITION)

    return in_shards(select, shards, rho)


@pytest.mark.parametrize("run", [kernel_shards, twin_shards])
@pytest.mark.parametrize("case", SHARDS)
def test_shards_find_the_cutoff_of_the_whole(case, run):
    shards = [(x.to(DEVICE), (~torch.isclose(x, torch.tensor(9.0))).to(DEVICE)) for x in SHARDS[case]]
    whole, mask = (torch.cat(parts) for parts in zip(*shards, strict=True))
    counted = whole[mask & ~whole.isnan()]
    for rho in (0.0, 0.3):
        expected = cutoffs(whole, mask, rho)
        if counted.numel():
            assert_is_the_quantile(expected, counted, rho)
        found = run(shards, rho)
        assert all(torch.equal(x, expected) for x in found), (found, expected)


@pytest.mark.parametrize("c", [2**23, 2**30, 2**40])
def test_more_values_than_fp32_counts(c):
    """Multiplying histograms by c repeats every value c times. Above 2^24 values positions are always fp64."""
    values = torch.tensor([1.0, 2.0, 4.0, 8.0], device=DEVICE)
    for module in (backends.triton, entropy_quantile):
        # Positions 2 c - 1/2, between the last two and the first four, and 3 c - 3/4.
        for rho, expected in ((0.5, 3.0), (0.25, 5.0)):
            assert module.entropy_quantile(values, None, rho, reduce=lambda h: h.mul_(c), **POSITION) == expected


floats = st.one_of(
    st.floats(width=32, allow_nan=True, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1.0, TINY, -TINY, 3.0, float(np.float32(3e38))]),
    st.integers(0, 3).map(float),
)


@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(floats, st.booleans()), max_size=40), st.floats(0.0, 1.0))
def test_any_values_and_any_share(tokens, rho):
    entropy = torch.tensor([value for value, _ in tokens], dtype=torch.float32, device=DEVICE)
    mask = torch.tensor([counts for _, counts in tokens], dtype=torch.bool, device=DEVICE)
    values = entropy[mask & ~entropy.isnan()]
    cutoff = cutoffs(entropy, mask, rho)
    if values.numel():
        assert_is_the_quantile(cutoff, values, rho)
    else:
        assert cutoff == INF
    assert_exact_k(entropy, mask, rho)


def test_the_interpolation_is_torchs_for_any_two_values_and_weight():
    """Two values: the position is 1 - rho itself."""
    g = torch.Generator().manual_seed(0)
    for _ in range(15):
        pair = torch.randn(2, generator=g) * torch.exp(4 * torch.randn(2, generator=g))
        rho = torch.rand((), generator=g).item()
        assert_is_the_quantile(cutoffs(pair.to(DEVICE), torch.ones(2, dtype=torch.bool, device=DEVICE), rho), pair, rho)


def test_the_interpolated_sum_is_rounded_once():
    """low + w (high - low) exceeds the midpoint of two fp32 values by less than fp64 resolves: A B = 2^47 + small."""
    found = 0
    for A in range(2**23 + 1, 2**23 + 20000, 2):
        B = -(-(2**47) // A)
        if 0 < A * B - 2**47 < 2**16 and B < 2**24:
            low = -float(2**23 + 2)
            w = B * 2.0**-48
            pair = torch.tensor([low, low + A])
            cutoff = cutoffs(pair.to(DEVICE), torch.ones(2, dtype=torch.bool, device=DEVICE), 1 - w)
            assert (
                cutoff == low + 1
            )  # rounded to fp64 first, the sum would be the middle, and then `low`, which is even
            assert_is_the_quantile(cutoff, pair, 1 - w)
            found += 1
            if found == 3:
                return
    raise AssertionError("no such A and B")


def test_neither_entropy_nor_mask_is_changed():
    entropy, mask = as_tokens(CASES["both zeros"])
    before = entropy.clone(), mask.clone()
    for name in BOTH:
        with backends.backend(name):
            top_entropy_mask(entropy, mask, 0.4, exact_k=True)
            entropy_cutoff(entropy, mask, 0.4)
    assert torch.equal(entropy.view(torch.int32), before[0].view(torch.int32)) and torch.equal(mask, before[1])


@pytest.mark.parametrize("exact_k", [False, True])
def test_one_graph_under_compile(exact_k):
    entropy, mask = as_tokens(random_values(50, 1))

    def select(entropy, mask):
        return top_entropy_mask(entropy, mask, 0.3, exact_k=exact_k), entropy_cutoff(entropy * 2, mask, 0.3)

    compiled = torch.compile(select, backend="aot_eager", fullgraph=True)
    for found, expected in zip(compiled(entropy, mask), select(entropy, mask), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_operators_declare_what_they_return(dtype):
    entropy, mask = as_tokens(random_values(20, 1))
    tests = ("test_schema", "test_faketensor")
    for op in (torch.ops.rlloss.entropy_quantile.default, torch.ops.rlloss.entropy_top_k.default):
        torch.library.opcheck(op, (entropy.to(dtype).view(2, -1), mask.view(2, -1), 0.3), test_utils=tests)
