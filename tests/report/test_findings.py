"""Test the sentences at the top of a page: they state the metrics, and nothing that was not logged."""

from rlloss.report.findings import found_in, mean, start_and_end
from rlloss.report.run_log import RunLog


def test_sentences_of_a_run():
    run = RunLog(
        metrics={
            "entropy": {step: 1.0 - step / 100 for step in range(1, 51)},
            "rlloss/live_share": {1: 0.1, 2: 0.3},
            "rlloss/products": {1: 1.5, 2: 1.7},
            "rlloss/products_plain": {1: 3.0, 2: 4.0},
            "rlloss/zero_advantage_share": {1: 0.25},
        },
        findings=[(7, "entropy_collapse", "the entropy collapses. Try this.")],
    )
    assert found_in(run) == [
        "Entropy goes from 0.97 to 0.52 nats per token.",
        "20 % of the tokens had a gradient.",
        "The lm_head ran 1.60 products a token where plain logits run 3.50.",
        "25 % of the completions had no signal: no token that counts has an advantage other than 0.",
        "Step 7: the entropy collapses. Try this.",
    ]


def test_of_what_is_missing_nothing_is_said():
    assert found_in(RunLog()) == []
    assert found_in(RunLog(metrics={"entropy": {1: 0.5}, "rlloss/products": {1: 2.0}})) == []
    assert found_in(RunLog(metrics={"rlloss/zero_advantage_share": {1: 0.0}})) == ["Every completion had a signal."]
    assert found_in(RunLog(metrics={"entropy/mean": {1: 0.5, 2: None, 3: 0.25}})) == [
        "Entropy goes from 0.5 to 0.25 nats per token."
    ]


def test_start_and_end_are_means_of_tenths():
    assert start_and_end({step: float(step) for step in range(20)}) == (0.5, 18.5)
    assert start_and_end({3: 1.0}) is None and mean({1: None}) is None
