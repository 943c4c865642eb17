"""Test tiles in plain torch: large tiles are folded a few rows at a time, which must give the same bits."""

import math

import pytest
import torch

from rlloss.lm_head.vocab_loop import STATE
from rlloss.torch_kernels import logits_tile

R, C = 7, 40


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7, "per row"])
def test_parts_of_a_tile_give_the_bits_of_the_whole(monkeypatch, temperature, softcap, overwrite):
    g = torch.Generator().manual_seed(0)
    tiles = torch.randn(3, R, C, generator=g) * 5
    tiles[0, 2], tiles[1, 3, 5:], tiles[2, 4, 1] = -math.inf, -math.inf, math.nan
    target = torch.randint(0, 3 * C, (R,), generator=g)
    if temperature == "per row":
        temperature = torch.rand(R, generator=g) + 0.5

    def fold(entries):
        monkeypatch.setattr(logits_tile, "PART_ENTRIES", entries)
        state = torch.zeros(STATE, R)
        state[0] = state[5] = -math.inf
        for i, tile in enumerate(tiles):
            logits_tile.fold_tile(
                tile.clone(), i * C, target, state, (temperature, softcap, 1.0),
                entropy=True, extra=True, overwrite=overwrite,
            )  # fmt: skip
        return state

    whole = fold(1 << 20)
    assert len(list(logits_tile._parts(tiles[0]))) == 1
    for entries in (1, C):
        assert torch.equal(fold(entries).nan_to_num(nan=7e7), whole.nan_to_num(nan=7e7))
        assert len(list(logits_tile._parts(tiles[0]))) > 1
    assert whole[1][[0, 1, 2, 3, 5, 6]].isfinite().all() and whole[1, 4].isnan()
