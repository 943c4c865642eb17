"""Bound the difference between two ways to sum the same numbers, on any CPU."""

import torch

FP32 = torch.finfo(torch.float32).eps


def assert_sums_close(found, expected, terms: int, size: float | None = None) -> None:
    """Compare sums of `terms` numbers in any order, or lists of such tensors.

    Each addition rounds by eps times a partial sum, which is about `size`: the largest expected number, or for sums
    that cancel the given size. Multiplications of a sum round too, hence the same bound relative to each number. The
    sums are in fp32 at least. A narrower result is rounded once.
    """
    if not isinstance(expected, torch.Tensor):
        for f, e in zip(found, expected, strict=True):
            assert_sums_close(f, e, terms, size)
        return
    eps = max(torch.finfo(x.dtype).eps for x in (found, expected))
    bound = terms * min(eps, FP32) + (eps if eps > FP32 else 0.0)
    if size is None:
        finite = expected.detach()[expected.isfinite()]
        size = finite.abs().max().item() if finite.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound * size, check_dtype=False)
