"""Test the launchers of the vocabulary kernels: chunks, splits, tiles, alignment, and unchecked targets."""

import math

import numpy as np
import pytest
import torch

from rlloss import backends, reference, token_stats
from rlloss.torch_kernels.rows import TILE_ENTRIES
from tests.support.rounding import FP32, assert_sums_close

kernels = pytest.mark.skipif(not backends.triton, reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERY_OUTPUT = {"entropy": True, "extra": True}


def logits_and_target(N: int, V: int, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(N, V, generator=g)).to(dtype).to(DEVICE)
    return logits, torch.randint(0, V, (N,), generator=g).to(DEVICE)


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [300, 2048, 9000])
def test_the_bits_of_a_row_do_not_depend_on_the_launch(dtype, V):
    logits, target = logits_and_target(3, V, dtype)
    flags = {"extra": True, "block_v": 256}
    whole = backends.triton.token_stats_forward(logits, target, None, (0.9, None, 1.0), split=False, **flags)
    split = backends.triton.token_stats_forward(logits, target, None, (0.9, None, 1.0), split=True, **flags)
    alone = backends.triton.token_stats_forward(logits[1:2], target[1:2], None, (0.9, None, 1.0), **flags)
    for x, y, z in zip(whole, split, alone, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x[..., 1:2], z)
    exact = reference.token_stats(logits.double(), target, 0.9)
    for x, e in zip(whole[:3], exact, strict=True):
        assert_sums_close(x, e, 64)


@kernels
@pytest.mark.parametrize("view", [
    pytest.param(lambda x: x, marks=pytest.mark.slow), pytest.param(lambda x: x[:, 1:6], marks=pytest.mark.slow),
    lambda x: x[:, 1:6].transpose(0, 1),
])  # fmt: skip
def test_split_rows_take_mask_temperature_softcap_and_strides(view):
    logits = view(2 * torch.randn(4, 7, 1500, generator=torch.Generator().manual_seed(0)).to(DEVICE))
    shape = logits.shape[:-1]
    g = torch.Generator().manual_seed(1)
    target = torch.randint(0, 1500, shape, generator=g).to(DEVICE).flatten()
    mask = (torch.rand(shape, generator=g) < 0.7).to(DEVICE).flatten()
    temperature = (torch.rand(shape, generator=g) + 0.5).to(DEVICE).flatten()
    arguments = (logits, target, mask, (temperature, 20.0, 1.5))
    whole, split = (
        backends.triton.token_stats_forward(*arguments, **EVERY_OUTPUT, split=s, block_v=64) for s in (False, True)
    )
    expected = backends.plain.token_stats_forward(*arguments, **EVERY_OUTPUT)
    for name, w, s, e in zip(("logp", "entropy", "lse", "saved", "extra"), whole, split, expected, strict=True):
        assert torch.equal(w, s), name
        counted = w[..., mask], e[..., mask]
        torch.testing.assert_close(*counted, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
        assert (w[..., ~mask] == 0).all(), name


@pytest.mark.parametrize("backend", ["interpreter" if DEVICE == "cpu" else "triton", "torch"])
def test_a_vocabulary_of_several_chunks_backward(backend):
    logits, target = logits_and_target(3, 40000)
    logits.requires_grad_()
    weight = torch.tensor([1.0, 0.0, -0.5], device=DEVICE)
    with backends.backend(backend):
        stats = token_stats(logits, target, entropy_grad=True)
        ((stats.logp + stats.entropy) * weight).sum().backward()
    exact = logits.detach().double().requires_grad_()
    logp, entropy, _ = reference.token_stats(exact, target)
    ((logp + entropy) * weight).sum().backward()
    assert_sums_close(logits.grad, exact.grad, 64)
    assert (logits.grad[1] == 0).all() and (exact.grad[0] != 0).all()


@pytest.mark.parametrize("mask", [None, "scattered", "block"])
@pytest.mark.parametrize("V", [5000, 120])
def test_the_torch_backend_over_several_tiles(V, mask):
    N = 3 * TILE_ENTRIES // V // 2
    logits, target = logits_and_target(N, V)
    keep = torch.ones(N, dtype=torch.bool, device=DEVICE)
    if mask == "scattered":
        keep = (torch.rand(N, generator=torch.Generator().manual_seed(2)) < 0.6).to(DEVICE)
    elif mask == "block":
        keep[: N // 3] = False
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    with backends.backend("torch"):
        stats = token_stats(leaf, target, mask=keep if mask else None, entropy_grad=True)
        (stats.logp - stats.entropy).sum().backward()
    logp, entropy, _ = reference.token_stats(exact, target)
    torch.where(keep, logp - entropy, 0.0).sum().backward()
    torch.testing.assert_close(stats.logp.double(), torch.where(keep, logp, 0.0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.entropy.double(), torch.where(keep, entropy, 0.0), rtol=1e-5, atol=1e-5)
    assert_sums_close(leaf.grad, exact.grad, 64)


@pytest.mark.parametrize("bad", [-1, -100, 300, 2**32 + 3])
@pytest.mark.parametrize("twin", [False, True])
def test_a_target_that_no_check_has_seen_poisons_its_own_row(twin, bad):
    if not twin and not backends.triton:
        pytest.skip("needs Triton")
    forward = (backends.plain if twin else backends.triton).token_stats_forward
    backward = (backends.plain if twin else backends.triton).token_stats_backward
    logits, target = logits_and_target(3, 300)
    target[1] = bad
    logp, entropy, lse, saved, extra = forward(logits, target, None, (1.0, None, 1.0), **EVERY_OUTPUT)
    assert logp[1].isnan() and logp[[0, 2]].isfinite().all()
    assert entropy.isfinite().all() and lse.isfinite().all() and extra[2, 1] == 0
    grad = backward(logits, target, None, (1.0, None, 1.0), (saved, entropy), (torch.ones_like(logp), None, None))
    assert grad[1].isnan().all() and grad[[0, 2]].isfinite().all()


@kernels
@pytest.mark.parametrize("dtype, V, aligned", [
    (torch.bfloat16, 96, True), (torch.bfloat16, 100, False), (torch.float32, 100, True), (torch.float32, 97, False),
])  # fmt: skip
def test_alignment_is_that_of_every_row(dtype, V, aligned):
    from rlloss.kernels.rows import Rows

    base = torch.zeros(4, 6, 96 * 2, dtype=dtype, device=DEVICE)
    assert Rows(torch.zeros(4, V, dtype=dtype, device=DEVICE)).aligned() is aligned
    assert Rows(torch.zeros(4, V, dtype=dtype, device=DEVICE)[:1]).aligned() is aligned  # as among others
    assert Rows(base[..., :V]).aligned()  # the rows lie apart, their starts count
    assert not Rows(base[..., 1 : V + 1]).aligned()
    assert not Rows(base[..., ::2]).aligned()
    assert not Rows(torch.zeros(4 * V + 8, dtype=dtype, device=DEVICE)[1 : 4 * V + 1].view(4, V)).aligned()


def test_column_offsets_beyond_two_to_the_31():
    if DEVICE != "cpu":
        pytest.skip("its logits are host memory that is reserved and never touched")
    stride = 2**30 + 32
    memory = torch.from_numpy(np.zeros(2 * stride + 1, dtype=np.float16))  # pages that are not touched are not there
    logits = memory.as_strided((1, 3), (1, stride))
    logits[0] = torch.tensor([0.5, -1.0, 2.0])
    logits.requires_grad_()
    near = logits.detach().clone().contiguous().requires_grad_()
    target = torch.tensor([2])
    for backend in ("interpreter", "torch") if backends.triton else ("torch",):
        with backends.backend(backend):
            far_logp, near_logp = token_stats(logits, target).logp, token_stats(near, target).logp
            assert torch.equal(far_logp, near_logp)
            gradients = torch.autograd.grad(far_logp.sum(), logits), torch.autograd.grad(near_logp.sum(), near)
            assert torch.equal(gradients[0][0], gradients[1][0])


@pytest.mark.parametrize("softcap", [5.0, 30.0])
def test_the_gradient_where_the_softcap_saturates(softcap):
    g = torch.Generator().manual_seed(0)
    logits = 3 * softcap * torch.randn(6, 200, generator=g).to(DEVICE)
    target = torch.arange(6, device=DEVICE)
    errors = []
    exact = logits.double().requires_grad_()
    reference.token_stats(exact, target, softcap=softcap)[0].sum().backward()
    for compute in (
        lambda z: token_stats(z, target, softcap=softcap).logp,
        lambda z: reference.token_stats(z, target, softcap=softcap)[0],
    ):
        for backend in ("interpreter" if DEVICE == "cpu" else "triton", "torch"):
            with backends.backend(backend):
                leaf = logits.clone().requires_grad_()
                compute(leaf).sum().backward()
                errors.append((leaf.grad.double() - exact.grad).abs().max().item())
    kernel, twin, plain, _ = errors
    assert math.isfinite(kernel) and max(kernel, twin) <= 2 * plain + FP32 * exact.grad.abs().max().item()
