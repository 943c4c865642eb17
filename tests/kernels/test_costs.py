"""The costs that each kernel's docstring states, against what the interpreter loads, stores and computes."""

import random
import re

import pytest
import torch

from rlloss.kernels import (
    entropy_quantile,
    entropy_temperature,
    gradient_in_forward,
    logits_tile,
    surrogates,
    token_pass,
    token_stats_backward,
    token_stats_forward,
)
from tests.support.counting import READ, WRITE, assert_costs, counted, evaluated, needs_interpreter, stated

pytestmark = needs_interpreter

FP32, BF16 = torch.float32, torch.bfloat16
FLAG = (True, False)


def cases(count, **options):
    """`count` settings that try every value of every option, each equally often, in random company."""
    draw = random.Random(0)
    columns = {}
    for name, values in options.items():
        column = [values[i % len(values)] for i in range(count)]
        draw.shuffle(column)
        columns[name] = column
    settings = [{name: column[i] for name, column in columns.items()} for i in range(count)]
    return pytest.mark.parametrize("case", settings, ids=lambda case: "-".join(str(v) for v in case.values()))


class Rows:
    """Logits [B, T, V] with strides of a layout, and what belongs to their rows, from a case's options."""

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
        self.flags = {
            "HAS_MASK": int(self.mask is not None), "PER_ROW": int(case["per_row"]), "HAS_SOFTCAP": int(case["softcap"])
        }  # fmt: skip
        self.names = {
            "N": B * T, "n": int(self.counts.sum()), "V": V, "b": dtype.itemsize, "t": self.target.element_size(),
        }  # fmt: skip

    def reads(self, traffic, live=None):
        """Asserts that each logit of `live` rows is read once and no other one, the targets' own entries aside."""
        found = traffic.of(self.logits, READ)
        if live is None:
            live = self.counts
            place = self.target.view(*found.shape[:2], 1).long()
            found.scatter_add_(-1, place, -live.view(place.shape).long())
        assert torch.equal(found, live.view(found.shape[:2])[..., None].expand(found.shape).long())


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


@cases(32, **ROWS, split=FLAG, entropy=FLAG, squares=FLAG, mean=FLAG, top1=FLAG)
def test_the_statistics(monkeypatch, case):
    rows = Rows(case)
    wanted = {name: case[name] for name in ("entropy", "squares", "mean", "top1")}
    with counted(monkeypatch) as traffic:
        token_stats_forward.token_stats_forward(
            rows.logits, rows.target, rows.mask, *rows.scaling, **wanted, split=case["split"], block_v=rows.block_v
        )
    rows.reads(traffic)
    names = rows.names | rows.flags | {name.upper(): int(asked) for name, asked in wanted.items()}
    forward, *merge = traffic.all
    assert len(merge) == case["split"]
    assert (forward.numbers()["chunks"] > 1) == (case["V_and_block"] == TWO_CHUNKS)
    for launch in traffic.all:
        assert_costs(launch, token_stats_forward.__doc__, **names)


@cases(24, **ROWS, logp=(True, True, False), entropy=FLAG, inplace=FLAG, live=("all", "some", "some", "none"),
       factor=(None, None, 1.0, 0.5))  # fmt: skip
def test_the_backward(monkeypatch, case):
    rows = Rows(case)
    N = rows.names["N"]
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
            logits, rows.target, rows.mask, *rows.scaling, torch.zeros(2, N), torch.zeros(N), *coefs,
            inplace=case["inplace"] and held is None, held=held, block_v=rows.block_v,
        )  # fmt: skip
    assert (grad.data_ptr() == logits.data_ptr()) == (case["inplace"] and held is None)
    (launch,) = traffic.all
    flags = dict(zip(("LOGP_GRAD", "ENTROPY_GRAD", "LSE_GRAD"), map(int, given), strict=True))
    flags |= {"HELD": int(held is not None)} | rows.flags
    assert_costs(launch, token_stats_backward.__doc__, **rows.names, **flags, L=int(live.sum()), factor=case["factor"])
    moved = live if case["factor"] != 1.0 else torch.zeros_like(live)
    rows.reads(traffic, moved)
    written = moved if held is not None else torch.ones_like(live)
    assert torch.equal(traffic.of(grad, WRITE), written.view(grad.shape[:2])[..., None].expand(grad.shape).long())


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
        *_, coef, g_entropy = gradient_in_forward.gradient_in_forward(
            rows.logits, rows.target, rows.mask.view(B, T), *rows.scaling, advantage,
            floats("token") if case["old"] else None, ref, sampler, torch.tensor(3.0) if case["select"] else None,
            torch.ones(2, B), cispo=case["cispo"], low=0.8, gain=1.2, loss_bound=5.0, max_log_ratio=None, beta=0.1,
            kl_estimator=case["kl"] or 1, kl_bias_correction=False, bonus=case["bonus"], block_v=rows.block_v,
        )  # fmt: skip
    live = coef != 0 if g_entropy is None else (coef != 0) | (g_entropy != 0)
    (launch,) = traffic.all
    flags = {
        "PER_ROW": int(case["per_row"]), "HAS_SOFTCAP": int(case["softcap"]), "HAS_OLD": int(case["old"]),
        "KL": case["kl"], "SELECT": int(case["select"]), "BONUS": int(case["bonus"]),
        "HAS_SAMPLER_RATIO": int(sampler is not None), "KL_BIAS_CORRECTION": 0,
    }  # fmt: skip
    S = int(rows.counts.view(B, T).any(-1).sum())
    assert_costs(launch, gradient_in_forward.__doc__, **rows.names, **flags, L=int(live.sum()), S=S)


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
    (launch,) = traffic.all
    flags = {"HAS_MASK": rows.flags["HAS_MASK"], "WRITE": int(case["write"]), "RULE": case["rule"]}
    names = {"N": 5, "n": rows.names["n"], "V": rows.names["V"], "size": case["dtype"].itemsize}
    assert_costs(launch, entropy_temperature.__doc__, **names, **flags)


@cases(12, V=(1, 300, 512, 700), start=(0, 100), per_row=FLAG, softcap=FLAG, target=(torch.int64, torch.int32),
       dtype=(FP32, BF16), entropy=FLAG, squares=FLAG, mean=FLAG, top1=FLAG, chunk_blocks=(8, 1))  # fmt: skip
def test_the_tiles_of_a_product(monkeypatch, case):
    monkeypatch.setattr("rlloss.kernels.launch.CHUNK_BLOCKS", case["chunk_blocks"])
    monkeypatch.setattr("rlloss.kernels.launch.choice", lambda *_: (256, 1))
    of = Rows(ONE_CASE | case | {"shape": (1, 4), "V_and_block": (case["V"], None), "dtype": FP32, "mask": None})
    tile, start = of.logits[0].clone(), case["start"]
    target = (of.target * 3 + 50).to(case["target"])
    wanted = {name: case[name] for name in ("entropy", "squares", "mean", "top1")}
    state = torch.zeros(7, 9)[:, 2:6]
    with counted(monkeypatch) as traffic:
        logits_tile.fold_tile(tile, start, target, state, *of.scaling, **wanted)
    (launch,) = traffic.all
    assert (launch.numbers()["chunks"] > 1) == (case["chunk_blocks"] == 1 and case["V"] > 256)
    names = {"n": 4, "V": case["V"], "t": of.names["t"], "PER_ROW": of.flags["PER_ROW"]}
    names |= {"HAS_SOFTCAP": of.flags["HAS_SOFTCAP"]}
    H = int(((target >= start) & (target < start + case["V"])).sum())
    doc = logits_tile.__doc__
    assert_costs(launch, doc, **names, H=H, **{name.upper(): int(asked) for name, asked in wanted.items()})

    given = {"LOGP_GRAD": case["squares"], "ENTROPY_GRAD": case["entropy"], "LSE_GRAD": case["mean"]}
    g_logp, g_entropy, g_lse = (torch.randn(4) if some else None for some in given.values())
    m, log_s, entropy = torch.zeros(3, 4)
    with counted(monkeypatch) as traffic:
        out = logits_tile.gradient_tile(
            tile, start, target, m, log_s, entropy, g_logp, g_entropy, g_lse, *of.scaling, case["dtype"]
        )
    (launch,) = traffic.all
    assert (traffic.of(tile, READ) == 1).all() and (traffic.of(out, WRITE) == 1).all()
    given = {name: int(some) for name, some in given.items()}
    assert_costs(launch, doc, **names, **given, g=case["dtype"].itemsize)


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
    with counted(monkeypatch) as traffic:
        token_pass.token_pass(
            logp, advantage, mask, old, ref, sampler, behavior, entropy, cutoff, last, case["denominator"],
            cispo=case["cispo"], sequence=case["sequence"], mean_of_sequence=case["mean"], kept_counts=kept_counts,
            low=0.8, high=1.2, gain=1.2, loss_bound=5.0, delta=None, max_log_ratio=None, beta=0.1,
            kl_estimator=case["kl"] or 1, kl_bias_correction=case["bias"], off_policy_threshold=case["off_policy"],
            entropy_coef=0.1 if case["bonus"] else 0.0,
        )  # fmt: skip
    (launch,) = traffic.all
    flags = {
        "HAS_OLD": old is not None, "CISPO": case["cispo"], "SEQUENCE": case["sequence"],
        "MEAN_OF_SEQUENCE": case["mean"], "HAS_DENOMINATOR": isinstance(case["denominator"], torch.Tensor),
        "KEPT_COUNTS": kept_counts, "PER_TOKEN_ADVANTAGE": T > 1 and case["advantage"] == "token",
        "HAS_SAMPLER_RATIO": sampler is not None, "PER_TOKEN_RATIO": T > 1 and case["sampler"] == "token",
        "KL": case["kl"], "KL_BIAS_CORRECTION": case["bias"],
        "OFF_POLICY": case["off_policy"] is not None, "HAS_BEHAVIOR": case["behavior"],
        "HAS_ENTROPY": entropy is not None, "SELECT": cutoff is not None, "EXACT_K": last is not None,
        "BONUS": case["bonus"],
    }  # fmt: skip
    kept = mask if cutoff is None else mask & (entropy >= cutoff)
    moves = (kept & (advantage != 0)).any(-1) if not case["cispo"] else torch.zeros(B, dtype=torch.bool)
    if case["kl"] and case["bias"]:
        moves |= mask.any(-1)
    moves &= case["sequence"]
    names = {"B": B, "T": T, "N": B * T, "n": int(mask.sum()), "M": int(moves.sum()), "m": int(mask[moves].sum())}
    assert_costs(launch, surrogates.__doc__, **names, **{name: int(flag) for name, flag in flags.items()})


def digits_added(launch, entropy, mask):
    """(bins that get a count from a program, added up over the programs; different bins) of one histogram launch."""
    bits = entropy.view(torch.int32).long() & 0xFFFFFFFF
    key = torch.where(bits >> 31 == 1, ~bits & 0xFFFFFFFF, bits | 1 << 31)
    numbers, state = launch.numbers(), launch.arguments["state_ptr"]
    known, shift, BLOCK = numbers["known"] & 0xFFFFFFFF, numbers["shift"], numbers["BLOCK"]
    program = torch.arange(len(entropy)) // BLOCK % numbers["programs"]
    found = set()
    for which, prefix in enumerate({int(x) & 0xFFFFFFFF for x in state[:2]}):
        some = (key & known == prefix) & (torch.ones_like(mask) if mask is None else mask)
        found |= {(which, p, int(d)) for p, d in zip(program[some].tolist(), key[some] >> shift & 255, strict=True)}
    return len(found), len({(which, d) for which, _, d in found})


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
    for launch in traffic.all:
        names = {"N": N, "HAS_MASK": int(given is not None)}
        if launch.kernel == "entropy_histogram_kernel":
            names["adds"], names["bins"] = digits_added(launch, entropy, mask)
        elif launch.kernel == "entropy_narrow_kernel":
            low, high = launch.arguments["state_ptr"][:2].tolist()
            names = {"shared": int(low == high)}
        elif launch.kernel == "entropy_last_tie_kernel":
            first = max(int(last), 0) // entropy_quantile.BLOCK * entropy_quantile.BLOCK
            names["last"] = min(N - first, entropy_quantile.BLOCK)
        assert_costs(launch, entropy_quantile.__doc__, **names)


def test_each_kernel_states_its_costs():
    for module in (token_pass, entropy_quantile, entropy_temperature, logits_tile, gradient_in_forward,
                   token_stats_forward, token_stats_backward):  # fmt: skip
        kernels = {name for name, x in vars(module).items() if name.endswith("_kernel") and hasattr(x, "fn")}
        doc = surrogates.__doc__ if module is token_pass else module.__doc__
        assert kernels and stated(doc).keys() == kernels


@pytest.mark.parametrize("quantity", ["read", "again", "written", "exponentials"])
def test_a_formula_that_is_off_by_one_is_found(monkeypatch, quantity):
    rows = Rows(ONE_CASE)
    with counted(monkeypatch) as traffic:
        token_stats_forward.token_stats_forward(rows.logits, rows.target, rows.mask, *rows.scaling)
    (launch,) = traffic.all
    doc = token_stats_forward.__doc__ or ""
    assert_costs(launch, doc, **rows.names)
    wrong = re.sub(f"    {quantity} = (.*)", rf"    {quantity} = (\1) + 1", doc, count=1)
    with pytest.raises(AssertionError, match=f"differ in {{'{quantity}'"):
        assert_costs(launch, wrong, **rows.names)
    with pytest.raises(AssertionError, match="no formula for 'read'"):
        assert_costs(launch, doc.replace("    read = ", "    said = ", 1), **rows.names)
    with pytest.raises(AssertionError, match="'N'"):
        assert_costs(launch, doc, **(rows.names | {"N": 7}))


def test_a_docstring_is_read_in_blocks():
    text = "Words: a = b.\n\none:\n    x = 2 * N\n    y = (x +\n        1)\n\nMore:\n\n    z = 3\n\ntwo:\n    x = N\n"
    assert stated(text) == {"one": {"x": "2 * N", "y": "(x + 1)"}, "two": {"x": "N"}}
    assert evaluated(stated(text)["one"], {"N": 4}) == {"x": 8, "y": 9}
    with pytest.raises(NameError):
        evaluated(stated(text)["two"], {})
