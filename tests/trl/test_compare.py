"""Test a small version of the full comparison: arms over seeds, paired differences, stored results, and the report."""

import io
import json
import math

import pytest
import torch
from rich.console import Console

from rlloss.cli import main
from rlloss.integrations.trl.demo import compare as comparison
from rlloss.integrations.trl.demo import task as arithmetic
from rlloss.integrations.trl.demo.arms import ARMS, REMEDIES, ArmResult, what_never_acted
from rlloss.integrations.trl.trainer import GRPOConfig

pytestmark = pytest.mark.usefixtures("on_torch")
SMALL = {
    "steps": 4, "seeds": 2, "arms": ["dynamic temperature", "KL-Cov"], "warm_start_steps": 3, "held_out_samples": 1,
}  # fmt: skip


def run(folder, **changes):
    terminal = io.StringIO()
    console = Console(file=terminal, width=120)
    return comparison.run_comparison(folder, console=console, **{**SMALL, **changes}), terminal.getvalue()


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    return folder, *run(folder)


@pytest.mark.slow
def test_every_arm_runs_with_every_seed(ran):
    folder, results, terminal = ran
    assert list(results) == ["plain GRPO", "dynamic temperature", "KL-Cov"]
    page = (folder / "comparison.html").read_text()
    for name, of_arm in results.items():
        assert len(of_arm) == 2 and all(len(result.history) == 4 for result in of_arm)
        assert name in page and name in terminal
    assert page.count("<svg") == 2 * len(comparison.PANELS)  # two sections have an arm
    assert "| KL-Cov |" in (folder / "comparison.md").read_text()
    record = json.loads((folder / "comparison.json").read_text())
    assert record["command"] == 'rlloss demo --full --steps 4 --seeds 2 --arms "dynamic temperature" "KL-Cov"'
    assert len(record["arms"]["KL-Cov"]["seeds"]) == 2


@pytest.mark.slow
def test_arms_of_a_seed_start_alike_and_seeds_do_not(ran):
    _, results, _ = ran
    plain, kl_cov = results["plain GRPO"], results["KL-Cov"]
    for seed in range(2):
        assert plain[seed].history[0]["entropy"] == pytest.approx(kl_cov[seed].history[0]["entropy"], rel=1e-6)
    assert plain[0].history[0]["entropy"] != plain[1].history[0]["entropy"]


@pytest.mark.slow
def test_the_temperature_is_cut_at_the_models_own_percentile(ran):
    _, results, _ = ran
    for result in results["dynamic temperature"]:
        cutoff = result.options["dynamic_temperature"]["cutoff"]
        # The same model completes other prompts, at temperature 1 for the cutoff and by the rule in the arm.
        assert cutoff == pytest.approx(result.history[0]["entropy/p80"], abs=0.5) and cutoff > 0.1
        assert 0.0 < result.history[0]["sampling/temperature/std"] < 0.15


@pytest.mark.slow
def test_what_is_done_is_not_done_again(ran, monkeypatch):
    folder, results, _ = ran

    def forbidden(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(comparison._Start, "__init__", forbidden)
    again, _ = run(folder)
    assert {name: [vars(r) for r in of_arm] for name, of_arm in again.items()} == {
        name: [vars(r) for r in of_arm] for name, of_arm in results.items()
    }
    (folder / "seed-1" / "KL-Cov.json").write_text("{")  # a run that was killed while it wrote
    with pytest.raises(AssertionError, match="trained again"):
        run(folder)
    with pytest.raises(AssertionError, match="trained again"):
        run(folder, steps=5)


@pytest.mark.parametrize("found", [
    b"", b"{", b"[]", b"7", b"{}", b'{"key": {}}', b'{"key": {}, "result": 3}', b'{"key": {}, "result": {"name": "x"}}',
    b"\xff\xfe{", None,
])  # fmt: skip
def test_a_record_that_is_none_of_ours_is_made_anew(tmp_path, found):
    path = tmp_path / "arm.json"
    path.mkdir() if found is None else path.write_bytes(found)
    assert comparison._read(path, {}) is None


def test_differences_are_paired():
    # 1, 2, 6 minus 0, 3, 2: 1, -1, 4; mean 4/3, standard deviation sqrt(19/3), error 1.4530; 4.303 of it is more.
    found = comparison.difference([1.0, 2.0, 6.0], [0.0, 3.0, 2.0])
    assert found == pytest.approx((4 / 3, math.sqrt(19) / 3, False))
    assert comparison.difference([1.1, 2.0, 2.9], [0.0, 1.0, 2.0]).distinct  # 1.1, 1, 0.9: 1 against 4.303 * 0.0577
    one = comparison.difference([2.0], [1.0])
    assert one.mean == 1.0 and math.isnan(one.error) and not one.distinct


def result(name, entropy, answer, **more):
    history = [{"entropy": entropy, "entropy/p80": 2 * entropy, "rlloss/live_share": 0.5}]
    return ArmResult(name, {}, history, {"answer_right": (answer, 0.1), "format_right": (0.5, 0.1)}, 1.0, **more)


def test_the_tables_by_hand():
    warned = [
        {"warnings": ["step 3: x", "step 9: x"]},
        {"warnings": ["step 4: y: z", "step 5: x"], "inactive": ["clip"]},
    ]
    results = {
        "plain GRPO": [result("plain GRPO", 0.1, 0.3), result("plain GRPO", 0.2, 0.5)],
        "GDPO": [result("GDPO", 0.3, 0.3, **warned[0]), result("GDPO", 0.4001, 0.7, **warned[1])],
    }
    held_out, training, acted = comparison.tables(results)
    assert held_out.rows[0][:3] == ["plain GRPO", "0.400 ± 0.141", ""]
    assert held_out.rows[1] == ["GDPO", "0.500 ± 0.283", "+0.100", "0.500 ± 0.000", "+0.000"]
    assert training.rows[1][:3] == ["GDPO", "0.350 ± 0.071", "+0.200 *"]
    assert acted.rows == [["plain GRPO", "none", "none"], ["GDPO", "clip", "x 3, 5; y: z -, 4"]]
    assert comparison.markdown(acted).splitlines()[-1] == "| GDPO | clip | x 3, 5; y: z -, 4 |"


def test_curves_are_means_over_seeds():
    histories = [[{"entropy": 1.0}, {"entropy": None}], [{"entropy": 2.0}, {"entropy": 4.0}]]
    assert comparison.mean_curve(histories, "entropy") == [1.5, None]


def test_the_percentile_is_that_of_the_models_own_tokens():
    tokenizer, model = arithmetic.make_tokenizer(), arithmetic.make_model(hidden_size=32, layers=1)
    problems, _ = arithmetic.make_problems(operand_limit=8)
    before = torch.get_rng_state()
    low, high = (comparison.entropy_percentile(model, tokenizer, problems, seed=0, share=share) for share in (0.8, 0.2))
    assert 0.0 < low < high < math.log(len(tokenizer)) and torch.equal(before, torch.get_rng_state())


ACTING = {"clip_ratio/region_mean": 0.1}


@pytest.mark.parametrize("options, row, expected", [
    ({"loss_type": "kl_cov"}, {"rlloss/on_policy_share": 1.0, "cov/selected_share": 0.1}, ["ratio"]),
    ({"loss_type": "kl_cov"}, {"rlloss/on_policy_share": 0.4, "cov/selected_share": 0.1}, []),
    ({"loss_type": "clip_cov"}, {**ACTING, "cov/selected_share": 0.0}, ["covariance"]),
    ({"loss_type": "clip_cov"}, {**ACTING, "cov/selected_share": 0.1}, []),
    ({"entropy_coef": 0.1}, ACTING, ["entropy bonus"]),
    ({"use_adaptive_entropy": True}, {**ACTING, "entropy_coef": 0.0}, ["entropy bonus"]),
    ({"use_adaptive_entropy": True}, {**ACTING, "entropy_coef": 0.1}, []),
    ({"dynamic_temperature": {}}, {**ACTING, "sampling/temperature/std": 0.0}, ["temperature"]),
    ({"dynamic_temperature": {}}, {**ACTING, "sampling/temperature/std": 0.2}, []),
], ids=str)  # fmt: skip
def test_every_remedy_has_to_act(options, row, expected):
    assert what_never_acted([row, {}], options) == expected


def test_every_arm_is_a_config(tmp_path):
    arms = [ARMS[0], *(arm for of_group in REMEDIES.values() for arm in of_group)]
    assert len({arm.name for arm in arms}) == len(arms) == 13
    for arm in arms:
        options = json.loads(json.dumps(arm.options).replace(json.dumps(comparison.PERCENTILE_80), "0.5"))
        GRPOConfig(output_dir=str(tmp_path), bf16=False, **options)


def test_the_command_names_bad_options(capsys, tmp_path):
    assert main(["demo", "--full", "--seed", "1"]) == 2
    assert "--seed: found 1, expected none with --full" in capsys.readouterr().err
    assert main(["demo", "--arms", "GDPO"]) == 2
    assert "--arms: found ['GDPO'], expected none without --full" in capsys.readouterr().err
    assert main(["demo", "--full", "--arms", "PPO", "--output", str(tmp_path)]) == 2
    assert "arms: found 'PPO', expected some of 'clip-higher'" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    for full in ([], ["--full"]):
        for output, found in (("file", "file"), ("file/inside", "file/inside")):
            assert main(["demo", *full, "--output", str(tmp_path / output)]) == 2
            said = capsys.readouterr().err
            assert said == f"rlloss demo: error: --output: found {str(tmp_path / found)!r}: Not a directory\n"
