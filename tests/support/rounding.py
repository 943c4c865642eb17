"""How far two ways to add up the same numbers may be apart, on any CPU."""

import torch

FP32 = torch.finfo(torch.float32).eps


def assert_sums_close(found, expected, terms: int, size: float | None = None) -> None:
    """Sums of `terms` numbers in any order, or lists of such tensors.

    Each addition rounds by eps times a partial sum. That is about `size`: the largest number expected, or what is given
    where sums cancel. What multiplies a sum rounds too: hence the same bound relative to each number. The sums are in
    fp32 at least; a narrower result is rounded once.
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
