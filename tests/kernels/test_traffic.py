"""Count the reads and writes of kernels, entry by entry, in Triton's interpreter.

The forward reads each logit once. The backward reads and writes live rows once, and only writes dead rows. If the
compiler removes the second of two equal loads, it still counts here.
"""

import math
import random

import pytest
import torch

from rlloss.kernels import (
    entropy_quantile,
    entropy_temperature,
    gradient_in_forward,
    logits_tile,
    token_pass,
    token_stats_backward,
    token_stats_forward,
)
from tests.support.counting import READ, WRITE, counted, needs_interpreter

pytestmark = needs_interpreter

FP32, BF16 = torch.float32, torch.bfloat16
FLAG = (True, False)
SETTINGS = token_pass.TokenSettings(cispo=0.0, low=0.8, high=1.2, gain=1.2, loss_bound=5.0, beta=0.1)


def cases(count, **options):
    """`count` random settings in which every value of every option occurs equally often."""
    draw = random.Random(0)
    columns = {}
    for name, values in options.items():
        column = [values[i % len(values)] for i in range(count)]
        draw.shuffle(column)
        columns[name] = column
    settings = [{name: column[i] for name, column in columns.items()} for i in range(count)]
    return pytest.mark.parametrize("case", settings, ids=lambda case: "-".join(str(v) for v in case.values()))


class Rows:
    """Logits [B, T, V] with the strides of a layout, and the inputs of their rows, from the options of a case."""

    def __init__(self, case):
        self.g = torch.Generator().manual_seed(0)
        B, T = case["shape"]
        (V, self.block_v), dtype = case["V_and_block"], case["dtype"]
        wide = torch.randn(B, T, 2 * V, generator=self.g).to(dtype)
        if case["layout"] == "columns":
            self.logits = wide[..., ::2]
        elif case["layout"] == "transposed":
            self.logits = wide[..., :V].transpose(0, 1).contiguous().transpose(0, 1)
        else:
            self.logits = wide[..., :V].contiguous()
        self.target = torch.randint(0, V, (B * T,), generator=self.g).to(case["target"])
        counts = {"all": 1.0, "some": 0.6, "none": 0.0, None: 1.0}[case["mask"]]
        self.counts = torch.rand(B * T, generator=self.g) < counts
        self.mask = None if case["mask"] is None else self.counts
        self.temperature = 0.5 + torch.rand(B * T, generator=self.g) if case["per_row"] else 0.7
        self.scaling = (self.temperature, 20.0 if case["softcap"] else None, 1.5)
        self.N = B * T

    def reads(self, traffic, times, own_target=False):
        """Assert how often each row's logits are read. own_target: the target's logit once more in rows that count."""
        found = traffic.of(self.logits, READ)
        if own_target:
            place = self.target.view(*found.shape[:2], 1).long()
            found.scatter_add_(-1, place, -self.counts.view(place.shape).long())
        assert torch.equal(found, times.long().view(found.shape[:2])[..., None].expand(found.shape))


def written_once(traffic, x, rows=None):
    """Assert that each entry of all rows [B, T], or of the given rows, is written once."""
    expected = torch.ones_like(traffic.of(x, WRITE))
    if rows is not None:
        expected = rows.long().view(x.shape[:-1])[..., None].expand(x.shape)
    assert torch.equal(traffic.of(x, WRITE), expected)


TWO_CHUNKS = (3000, 256)
V_AND_BLOCK = ((1, None), (7, None), (300, 256), (512, 256), (3000, None), *[TWO_CHUNKS] * 3)
ROWS = {
    "shape": ((2, 3), (1, 1), (3, 2)), "V_and_block": V_AND_BLOCK, "dtype": (FP32, BF16),
    "layout": ("contiguous", "columns", "transposed"), "mask": (None, "some", "some", "none"), "per_row": FLAG,
    "softcap": FLAG, "target": (torch.int64, torch.int32),
}  # fmt: skip
ONE_CASE = {
    "shape": (2, 3), "V_and_block": (300, None), "dtype": BF16, "layout": "contiguous", "mask": "some",
    "per_row": True, "softcap": False, "target": torch.int64,
}  # fmt: skip


@cases(32, **ROWS, split=FLAG, extra=FLAG)
def test_the_statistics(monkeypatch, case):
    rows = Rows(case)
    with counted(monkeypatch) as traffic:
        token_stats_forward.token_stats_forward(
            rows.logits, rows.target, rows.mask, rows.scaling, extra=case["extra"], split=case["split"],
            block_v=rows.block_v,
        )  # fmt: skip
    rows.reads(traffic, rows.counts, own_target=True)
    forward, *merge = traffic.all
    assert len(merge) == case["split"]
    assert (forward.numbers()["chunks"] > 1) == (case["V_and_block"] == TWO_CHUNKS)


@cases(24, **ROWS, logp=(True, True, False), entropy=FLAG, inplace=FLAG, live=("all", "some", "some", "none"),
       factor=(None, None, 1.0, 0.5))  # fmt: skip
def test_the_backward(monkeypatch, case):
    rows = Rows(case)
    N = rows.N
    g = [torch.randn(N, generator=rows.g) for _ in range(3)]
    given = [case["logp"], case["entropy"], not case["logp"]]
    live = torch.rand(N, generator=rows.g) < {"all": 1.0, "some": 0.5, "none": 0.0}[case["live"]]
    coefs = [x * live if some else None for x, some in zip(g, given, strict=True)]
    live &= rows.counts
    held = None
    if case["factor"] is not None:
        held = (torch.zeros(rows.logits.shape, dtype=case["dtype"]), torch.tensor(case["factor"]))
    logits = rows.logits
    if case["inplace"]:
        logits = rows.logits = logits.contiguous()
    with counted(monkeypatch) as traffic:
        grad = token_stats_backward.token_stats_backward(
            logits, rows.target, rows.mask, rows.scaling, (torch.zeros(2, N), torch.zeros(N)), coefs,
            inplace=case["inplace"] and held is None, held=held, block_v=rows.block_v,
        )  # fmt: skip
    assert (grad.data_ptr() == logits.data_ptr()) == (case["inplace"] and held is None)
    assert len(traffic.all) == 1
    moved = live if case["factor"] != 1.0 else torch.zeros_like(live)
    rows.reads(traffic, moved)
    written_once(traffic, grad, None if held is None else moved)


@cases(16, **(ROWS | {"mask": ("some", "some", "all", "none")}), cispo=FLAG, old=FLAG, kl=(0, 1, 3), select=FLAG,
       bonus=FLAG, advantage=("token", "sequence"), sampler=("token", "sequence", None))  # fmt: skip
def test_the_loss_and_its_gradient(monkeypatch, case):
    rows = Rows(case)
    B, T = case["shape"]

    def floats(level):
        return torch.randn((B, T if level == "token" else 1), generator=rows.g) if level else None

    sampler, ref = floats(case["sampler"]), floats("token") if case["kl"] else None
    advantage = floats(case["advantage"])
    advantage[0] = 0.0  # a sequence without a gradient, as far as the loss goes
    with counted(monkeypatch) as traffic:
        grad, *_, coef, g_entropy = gradient_in_forward.gradient_in_forward(
            rows.logits, rows.target, rows.mask.view(B, T), rows.scaling,
            gradient_in_forward.LossTensors(
                advantage, floats("token") if case["old"] else None, ref, sampler,
                torch.tensor(3.0) if case["select"] else None, torch.ones(2, B),
            ),
            SETTINGS._replace(
                cispo=case["cispo"], kl_estimator=case["kl"] or 1, entropy_coef=0.1 if case["bonus"] else 0.0
            ),
            block_v=rows.block_v,
        )  # fmt: skip
    live = coef != 0 if g_entropy is None else (coef != 0) | (g_entropy != 0)
    assert len(traffic.all) == 1
    rows.reads(traffic, rows.counts.long() + live.flatten(), own_target=True)
    written_once(traffic, grad)


@cases(12, V_and_block=V_AND_BLOCK, dtype=(FP32, BF16), mask=(None, "some", "some", "none"), write=FLAG,
       rule=("two_level", "edt", "dynatemp"))  # fmt: skip
def test_the_temperature(monkeypatch, case):
    rows = Rows(ONE_CASE | case | {"shape": (1, 5), "layout": "columns"})
    logits = rows.logits[0]
    out = torch.zeros(logits.shape, dtype=case["dtype"]) if case["write"] else None
    with counted(monkeypatch) as traffic:
        entropy_temperature.entropy_temperature(
            logits, rows.mask, out, case["rule"], (1.2, 0.9, 0.5), 0.0, block_v=rows.block_v
        )
    assert len(traffic.all) == 1
    rows.reads(traffic, rows.counts * (1 + case["write"]))
    if out is not None:
        written_once(traffic, out, rows.counts)


@cases(12, V=(1, 300, 512, 700), start=(0, 100), per_row=FLAG, softcap=FLAG, target=(torch.int64, torch.int32),
       dtype=(FP32, BF16), entropy=FLAG, lse=FLAG, extra=FLAG, chunk_blocks=(8, 1))  # fmt: skip
def test_the_tiles_of_a_product(monkeypatch, case):
    monkeypatch.setattr("rlloss.kernels.launch.CHUNK_BLOCKS", case["chunk_blocks"])
    monkeypatch.setattr("rlloss.kernels.launch.choice", lambda *_: (256, 1))
    of = Rows(ONE_CASE | case | {"shape": (1, 4), "V_and_block": (case["V"], None), "dtype": FP32, "mask": None})
    tile, start = of.logits[0].clone(), case["start"]
    target = (of.target * 3 + 50).to(case["target"])
    state = torch.zeros(7, 9)[:, 2:6]
    with counted(monkeypatch) as traffic:
        logits_tile.fold_tile(tile, start, target, state, of.scaling, entropy=True, extra=case["extra"])
    (launch,) = traffic.all
    assert (launch.numbers()["chunks"] > 1) == (case["chunk_blocks"] == 1 and case["V"] > 256)
    read = traffic.of(tile, READ)
    inside = (target >= start) & (target < start + case["V"])
    place = torch.where(inside, target - start, 0).long().unsqueeze(-1)
    assert (read.scatter_add(-1, place, -inside.long().unsqueeze(-1)) == 1).all()  # and the target's own

    given = (not case["extra"], case["entropy"], case["lse"])
    g_logp, g_entropy, g_lse = (torch.randn(4) if some else None for some in given)
    m, log_s, logp, entropy = torch.zeros(4, 4)
    with counted(monkeypatch) as traffic:
        out = logits_tile.gradient_tile(
            tile, start, target, of.scaling, (m, log_s, logp, entropy), (g_logp, g_entropy, g_lse), case["dtype"]
        )
    assert len(traffic.all) == 1 and (traffic.of(tile, READ) == 1).all()
    written_once(traffic, out)


TOKEN_PASS = {
    "shape": ((3, 4), (2, 1), (1, 512), (1, 700)), "mask": ("some", "some", "all", "none"), "old": FLAG,
    "cispo": (False, False, True), "sequence": FLAG, "mean": FLAG, "denominator": (None, 3.0, torch.tensor(3.0)),
    "kept_counts": FLAG, "advantage": ("token", "sequence"), "sampler": ("token", "sequence", None),
    "kl": (0, 1, 2, 3), "bias": FLAG, "off_policy": (None, 1e9, 1e9), "behavior": FLAG,
    "select": (None, "ties", "exact"), "bonus": FLAG,
}  # fmt: skip


@cases(36, **TOKEN_PASS)
def test_the_token_pass(monkeypatch, case):
    g = torch.Generator().manual_seed(0)
    B, T = case["shape"]
    mask = torch.rand(B, T, generator=g) < {"all": 1.0, "some": 0.6, "none": 0.0}[case["mask"]]

    def floats(level):
        return 0.1 + torch.rand((B, T if level == "token" else 1), generator=g) if level else None

    logp, advantage, sampler = floats("token"), floats(case["advantage"]), floats(case["sampler"])
    advantage[0] = 0.0
    # Ratios within the clip range; each token is apart from the reference.
    old = logp - 0.01 if case["old"] else None
    ref = logp - 1.0 if case["kl"] else None
    entropy, cutoff, last = floats("token"), None, None
    if case["select"]:
        cutoff, last = torch.tensor(0.5), torch.tensor(1) if case["select"] == "exact" else None
    elif not (case["bonus"] or case["kept_counts"]):
        entropy = None
    behavior = floats("token") if case["behavior"] else None
    kept_counts = case["kept_counts"] and cutoff is not None
    denominator = case["denominator"]
    given = isinstance(denominator, torch.Tensor)
    tensors = token_pass.TokenTensors(
        logp, advantage, mask, old, ref, sampler, behavior, entropy, cutoff, last, denominator if given else None
    )
    settings = SETTINGS._replace(
        cispo=case["cispo"], sequence=case["sequence"], mean_of_sequence=case["mean"], kept_counts=kept_counts,
        denominator=0.0 if given or denominator is None else denominator, kl_estimator=case["kl"] or 1,
        kl_bias_correction=case["bias"], off_policy_threshold=case["off_policy"] or math.inf,
        entropy_coef=0.1 if case["bonus"] else 0.0,
    )  # fmt: skip
    with counted(monkeypatch) as traffic:
        token_pass.token_pass(tensors, settings)
    assert len(traffic.all) == 1
    # Once, and once more for sums over a sequence that its tokens need. Inputs that are not given are read from logp
    # again.
    stand_ins = sum(x is None for x in (old, behavior, entropy))
    for x in (logp, old, ref, entropy):
        if x is not None:
            read = traffic.of(x, READ)
            most = 2 + 2 * stand_ins * (x is logp)
            assert (read[mask] >= 1).all() and read.max() <= most and not read[~mask].any()
    mask_read = traffic.of(mask, READ)
    assert mask_read.min() >= 1 and mask_read.max() <= 3


@cases(8, N=(1, 300, 5000), mask=(None, "some", "none"), top_k=FLAG, equal=FLAG, rho=(0.2, 0.5))
def test_the_order_statistic(monkeypatch, case):
    g, N = torch.Generator().manual_seed(0), case["N"]
    entropy = torch.randn(N, generator=g)
    if case["equal"]:
        entropy = (entropy * 2).round() + 0.25
    mask = torch.rand(N, generator=g) < {"some": 0.6, "none": 0.0, None: 1.0}[case["mask"]]
    given = None if case["mask"] is None else mask
    with counted(monkeypatch) as traffic:
        if case["top_k"]:
            _, last = entropy_quantile.entropy_top_k(entropy, given, case["rho"])
        else:
            entropy_quantile.entropy_quantile(entropy, given, case["rho"], rounded_up_to=0)
    assert len(traffic.all) == 8 + 2 * case["top_k"]
    read = traffic.of(entropy, READ)  # once in each of four passes, and where ties are counted
    assert read.min() >= 4 + case["top_k"] and read.max() <= 4 + 2 * case["top_k"]
