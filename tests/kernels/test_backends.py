"""Test that a forced backend is active in its context only, and in the backward of results computed inside it."""

import asyncio
import contextvars
import threading

import pytest
import torch

from rlloss import LinearGRPOLoss, backends, linear_token_stats, token_stats
from rlloss.backends import BACKENDS, backend, choose_backend

X = torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu")
DEFAULT = choose_backend(X)
needs_two = pytest.mark.skipif(DEFAULT == "torch", reason="torch is the only backend here")


def in_a_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


@needs_two
def test_other_threads_and_tasks_are_left_alone():
    entered, leave = threading.Event(), threading.Event()

    def forced():
        with backend("torch"):
            entered.set()
            leave.wait(10)
            return choose_backend(X)

    async def task(name, meet):
        with backend(name):
            await meet.wait()
            return choose_backend(X)

    async def tasks():
        meet = asyncio.Event()
        running = [asyncio.create_task(task(name, meet)) for name in ("torch", DEFAULT)]
        await asyncio.sleep(0)
        meet.set()
        return [*await asyncio.gather(*running), choose_backend(X)]

    other = threading.Thread(target=forced)
    other.start()
    assert entered.wait(10) and choose_backend(X) == DEFAULT
    with backend("torch"):
        assert in_a_thread(lambda: choose_backend(X)) == DEFAULT
        leave.set()
        other.join()
        assert choose_backend(X) == "torch"
    assert asyncio.run(tasks()) == ["torch", DEFAULT, DEFAULT]


@needs_two
@pytest.mark.parametrize("first_out", [0, 1])
def test_each_ends_for_itself(first_out):
    names = ("torch", DEFAULT)
    both = [backend(name) for name in names]
    for one in both:
        one.__enter__()
    both[first_out].__exit__(None, None, None)
    assert choose_backend(X) == names[1 - first_out]
    both[1 - first_out].__exit__(None, None, None)
    assert choose_backend(X) == DEFAULT and not backends._anywhere


@needs_two
def test_a_context_that_outlives_its_block_forces_nothing():
    with backend("torch"):
        context = contextvars.copy_context()
        assert context.run(choose_backend, X) == "torch"
    with backend("torch"):  # elsewhere, for this context
        assert context.run(choose_backend, X) == DEFAULT


def of_logits(leaves, target, mask, **options):
    hidden, weight = leaves
    return token_stats(hidden @ weight.T, target, mask=mask, entropy_grad=True, **options)


def of_hidden(leaves, target, mask, **options):
    hidden, weight = leaves
    return linear_token_stats(hidden, weight, target, mask=mask, entropy_grad=True, **options)


def of_loss(leaves, target, mask):
    hidden, weight = leaves
    advantage = torch.ones(2, device=X.device)
    loss = LinearGRPOLoss(plan="gradient_in_forward")(hidden, weight, target, advantage, mask=mask).loss
    loss.backward(retain_graph=True)  # the first call's gradient, stored by its forward; the next call computes its own
    for x in leaves:
        x.grad = None
    return loss.unsqueeze(0), None


@needs_two
@pytest.mark.parametrize("stats, options", [
    (of_logits, {}), (of_logits, {"inplace_grad": True}),
    (of_hidden, {"plan": "recompute"}), (of_hidden, {"plan": "keep"}), (of_hidden, {"static_capacity": (6, 6)}),
    (of_loss, {}),
])  # fmt: skip
def test_a_backward_takes_the_backend_of_its_forward(monkeypatch, stats, options):
    torch.manual_seed(0)
    leaves = [torch.randn(*shape, device=X.device, requires_grad=True) for shape in ((2, 3, 8), (11, 8))]
    target = torch.randint(0, 11, (2, 3), device=X.device)
    mask = torch.ones(2, 3, dtype=torch.bool, device=X.device)

    def refuse(*_, **__):
        raise AssertionError("a kernel of the default backend")

    def gradients(run):
        for x in leaves:
            x.grad = None
        with backend("torch"):
            logp, entropy, *_ = stats(leaves, target, mask, **options)
            loss = logp.sum() if entropy is None else logp.sum() + entropy.square().sum()
        run(loss.backward)
        return [x.grad for x in leaves]

    with backend("torch"):
        expected = gradients(lambda backward: backward())
    monkeypatch.setattr("rlloss.kernels.token_stats_backward.token_stats_backward", refuse)
    monkeypatch.setattr("rlloss.kernels.logits_tile.gradient_tile", refuse)
    assert all(map(torch.equal, gradients(in_a_thread), expected))


def test_a_compiled_graph_sees_what_is_forced():
    compiled = torch.compile(lambda x: x + BACKENDS.index(choose_backend(x)), fullgraph=True, backend="eager")
    for name in (DEFAULT, "torch", DEFAULT):
        with backend(name):
            assert compiled(X).item() == BACKENDS.index(name)
        assert compiled(X).item() == BACKENDS.index(DEFAULT)
