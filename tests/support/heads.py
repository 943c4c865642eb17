"""Make hidden states, lm_heads and targets for tests."""

import math

import torch

from tests.support.devices import DEVICE

NAMES = ("hidden", "weight", "bias")
MARKERS = 5


def problem(kind="uniform", N=5, V=300, D=24, dtype=torch.float32, seed=0, bias=False, shape=None, on="torch") -> dict:
    """ "uniform" is flat, "peaked" has p > 0.999, "-inf" has a bias of -inf on the leading half and at the end."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(N, D, generator=g), torch.randn(V, D, generator=g) * 2 / D**0.5
    target = torch.randint(0, V, (N,), generator=g)
    x = {"hidden": hidden, "weight": weight}
    if bias or kind == "-inf":
        x["bias"] = torch.randn(V, generator=g)
    if kind == "peaked":
        # Each row has one of the marker dimensions, and each of these one entry of the vocabulary.
        marker, peak = torch.arange(N) % MARKERS, torch.randperm(V, generator=g)[:MARKERS]
        hidden[:, :MARKERS] = weight[:, :MARKERS] = 0.0
        hidden[torch.arange(N), marker % len(peak)] = 8.0
        weight[peak, torch.arange(len(peak))] = 4.0
        target[1::2] = peak[marker[1::2] % len(peak)]
    if kind == "-inf":
        x["bias"][: V // 2] = x["bias"][V - V // 8 :] = -math.inf
        target = target % (V // 4) + V // 2
    device = "cpu" if on == "torch" else DEVICE
    x = {name: value.to(dtype).to(device) for name, value in x.items()}
    x["target"] = target.to(device)
    if shape is not None:
        x["hidden"], x["target"] = x["hidden"].view(*shape, D), x["target"].view(shape)
    return x
