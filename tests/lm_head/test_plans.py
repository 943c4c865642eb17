"""Test which plan is taken for real heads, and its memory. Only shapes are needed."""

import itertools

import pytest
import torch

from benchmarks.harness.shapes import REAL
from rlloss import LossConfig, explain_plan
from rlloss.lm_head import plans

ROWS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
SHARES = (1.0, 0.5, 0.2)
# {(loss, share, frozen): first letters of the plans for ROWS}, for V 151,936, D 4,096 and a GPU of 80 GB.
QWEN3_8B = {
    ("dapo", 1.0, False): "kkkkgggg", ("dapo", 0.5, False): "kkkkgrrr", ("dapo", 0.2, False): "rrrrrrrr",
    ("dapo", 1.0, True): "jjjjjjjj", ("dapo", 0.5, True): "kkkkkggg", ("dapo", 0.2, True): "rrrrrrrr",
    ("gspo", 1.0, False): "kkkkkrrr", ("gspo", 0.5, False): "kkkkkrrr", ("gspo", 0.2, False): "rrrrrrrr",
    ("gspo", 1.0, True): "jjjjjjjj", ("gspo", 0.5, True): "kkkkkrrr", ("gspo", 0.2, True): "rrrrrrrr",
}  # fmt: skip


def report(model, rows, share, frozen, device, loss, **more):
    D, V = REAL[model]
    hidden, weight = (torch.empty((), dtype=torch.bfloat16, device=device).expand(n, D) for n in (rows, V))
    return explain_plan(
        hidden.requires_grad_(), weight.requires_grad_(not frozen), config=LossConfig(loss), live_share=share, **more
    )


@pytest.mark.parametrize("loss, share, frozen", QWEN3_8B)
def test_the_plans_of_a_real_head(loss, share, frozen):
    found = "".join(report("Qwen3-8B", rows, share, frozen, "meta", loss).plan[0] for rows in ROWS)
    assert found == QWEN3_8B[loss, share, frozen]


@pytest.mark.parametrize("model", REAL)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_no_more_products_than_plain_logits_where_a_third_of_their_memory_allows_it(model, device):
    D, V = REAL[model]
    most = plans.ASSUMED_GPU // plans.SHARE_OF_MEMORY if device == "meta" else plans.OTHER_DEVICE
    for rows, share, frozen, loss in itertools.product(ROWS, SHARES, (False, True), ("dapo", "gspo")):
        of = report(model, rows, share, frozen, device, loss)
        third = 12 * rows * V // 3
        assert of.extra_bytes <= of.memory_budget == 2 * V * D + min(third, most)
        plain = 2 if frozen else 3
        if of.products > plain:
            # Then every plan with as few products as plain logits holds too much, or is not for this loss.
            for products, extra, why_not in of.alternatives.values():
                assert products > plain or why_not is not None
                assert why_not is None or extra > min(third, most) or "budget" not in why_not
        # Nothing is within a tenth of the cheapest and holds less.
        costs = {name: (p + plans.OVERHEAD[name], extra)
                 for name, (p, extra, why_not) in of.alternatives.items() if why_not is None}  # fmt: skip
        cheapest = min(cost for cost, _ in costs.values())
        assert of.extra_bytes == min(extra for cost, extra in costs.values() if cost <= plans.WORTHWHILE * cheapest)


def test_the_budget_of_ranks_that_share_a_vocabulary_does_not_depend_on_their_gpus():
    options = plans.HeadOptions(vocab_group=object())
    work = plans.Work(10**6, 10**6, 10**6, 1000, 8, 1.0, (True, True), 2, 4, torch.device("meta"), options)
    assert plans.default_budget(work) == 2 * 1000 * 8 + plans.OTHER_DEVICE
    alone = work._replace(options=plans.HeadOptions())
    assert plans.default_budget(alone) == 2 * 1000 * 8 + 4 * 10**6 * 1000 < 2 * 1000 * 8 + plans.ASSUMED_GPU // 16
