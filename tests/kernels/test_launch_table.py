"""Test the table of launch shapes: lookup by device, dtype and vocabulary, completeness, and its use by launchers."""

import types

import pytest
import torch

from rlloss import GRPOLoss, LossConfig, backends
from rlloss.kernels import launch_table
from rlloss.kernels.launch_table import TABLE, Choice, choice, look_up
from rlloss.lm_head import vocab_loop
from tests.support.counting import counted, needs_interpreter

DTYPES = ("bf16", "fp16", "fp32")
LENGTHS = {"statistics": 2, "gradient": 2, "split": 1, "single_launch": 1, "tile": 2}


@pytest.fixture
def table(monkeypatch):
    """A table for the test alone."""
    found: dict = {}
    monkeypatch.setattr(launch_table, "TABLE", found)
    look_up.cache_clear()
    yield found
    look_up.cache_clear()


def test_every_generation_finds_every_choice():
    for kernel, length in LENGTHS.items():
        for dtype in ("fp32",) if kernel == "tile" else DTYPES:
            for generation in ("", "sm_90", "sm_120", "gfx942", "of the future"):
                for V in (1, 151936, 10**7):
                    assert len(look_up(kernel, generation, dtype, V)) == length
    assert {key[0] for key in TABLE} == set(LENGTHS)
    assert list(TABLE) == sorted(TABLE)


def test_what_was_not_measured_says_so():
    for entry in TABLE.values():
        assert entry.tuned == "" or any(character.isdigit() for character in entry.tuned)


def test_an_entry_holds_up_to_its_vocabulary_and_the_largest_beyond(table):
    table["split", "", "bf16", 100] = Choice((1,))
    table["split", "sm_90", "bf16", 300] = Choice((3,))
    table["split", "sm_90", "bf16", 200] = Choice((2,))
    found = [look_up("split", "sm_90", "bf16", V)[0] for V in (1, 200, 201, 300, 301)]
    assert found == [2, 2, 3, 3, 3]
    assert look_up("split", "sm_80", "bf16", 500) == (1,)
    with pytest.raises(KeyError, match="split, fp16: found no entry"):
        look_up("split", "sm_90", "fp16", 1)


@pytest.mark.parametrize("properties, hip, expected", [
    ({"major": 9, "minor": 0}, None, "sm_90"), ({"major": 12, "minor": 0}, None, "sm_120"),
    ({"major": 9, "minor": 4, "gcnArchName": "gfx942:sramecc+:xnack-"}, "7.0", "gfx942"),
], ids=str)  # fmt: skip
def test_the_name_of_a_generation(monkeypatch, properties, hip, expected):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(**properties))
    launch_table._generation.cache_clear()
    assert launch_table.generation(torch.device("cuda", 0)) == expected
    assert launch_table.generation(torch.device("cpu")) == launch_table.generation(torch.device("meta")) == ""
    launch_table._generation.cache_clear()


@pytest.mark.skipif(not backends.triton, reason="needs Triton")
@pytest.mark.parametrize("chosen, V, expected", [
    ((2048, 8), 151936, (2048, 16384, 10, 8)), ((2048, 8), 300, (512, 4096, 1, 2)), ((2048, 8), 5, (256, 2048, 1, 1)),
    ((4096, 8), 151936, (4096, 32768, 5, 8)), ((2048, 4), 300, (512, 4096, 1, 1)),
])  # fmt: skip
def test_a_shape_from_an_entry(chosen, V, expected):
    from rlloss.kernels.launch import shape_of

    assert shape_of(chosen, V) == expected


@needs_interpreter
def test_the_launchers_obey_the_table(table, monkeypatch):
    for dtype in ("bf16", "fp32"):
        table["statistics", "", dtype, 1000] = Choice((256, 1))
        table["gradient", "", dtype, 1000] = Choice((512, 1))
        table["split", "", dtype, 1000] = Choice((2,))
        table["single_launch", "", dtype, 1000] = Choice((100,))
    blocks = {}
    for switches in ({"single_launch": False}, {"single_launch": True}):
        logits = torch.zeros(1, 2, 700, dtype=torch.bfloat16, requires_grad=True)
        with counted(monkeypatch) as traffic:
            loss_fn = GRPOLoss(LossConfig(), **switches)
            mask = torch.ones(1, 2, dtype=torch.bool)
            loss_fn(logits, torch.zeros(1, 2, dtype=torch.int64), torch.ones(1), mask=mask).loss.backward()
        blocks |= {
            launch.kernel: launch.arguments["BLOCK_V"] for launch in traffic.all if "BLOCK_V" in launch.arguments
        }
    assert blocks == {
        "token_stats_forward_kernel": 256,
        "token_stats_backward_kernel": 512,
        "gradient_in_forward_kernel": 256,
    }


def test_the_tile_of_a_gpu_is_the_tables(table):
    table["tile", "", "fp32", 1000] = Choice((100, 51200))
    elsewhere = torch.device("meta")
    assert vocab_loop.chunk_rows(elsewhere, 5000, False) == 100
    assert vocab_loop.tile_shape(70, 5000, elsewhere, False) == (70, 1024)
    assert vocab_loop.tile_shape(7, 50000, elsewhere, False) == (7, 7168)
    assert vocab_loop.tile_shape(7, 500, elsewhere, False) == (7, 500)
    assert choice("tile", elsewhere, torch.float32, 1) == (100, 51200)


@pytest.mark.parametrize("generation, family", [
    ("sm_103", "sm_100"), ("sm_110", "sm_100"), ("gfx950", "gfx942"), ("gfx90a", "gfx942"), ("sm_120", ""),
    ("sm_89", ""), ("gfx1100", ""),
])  # fmt: skip
def test_a_generation_without_an_entry_takes_that_of_its_family(generation, family):
    for kernel in ("statistics", "gradient", "split", "single_launch"):
        assert launch_table.look_up(kernel, generation, "bf16", 151936) == launch_table.look_up(
            kernel, family, "bf16", 151936
        )
    if family:
        assert launch_table.look_up("statistics", generation, "bf16", 1) != launch_table.look_up(
            "statistics", "", "bf16", 1
        )
