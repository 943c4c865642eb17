"""Test EntropyTemperatureProcessor in transformers' own `generate`, on a small model."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper

from rlloss import reference, token_stats
from rlloss.entropy.temperature import DynamicTemperature, EDTemperature, TwoLevelTemperature, entropy_temperature
from rlloss.integrations.transformers.sampling import EntropyTemperatureProcessor

RULES = [TwoLevelTemperature(1.4, 0.7, cutoff=2.2), EDTemperature(1.3, 0.8), DynamicTemperature(0.3, 1.6, 2.0)]
V = 24
pytestmark = pytest.mark.usefixtures("on_torch")


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        initializer_range=0.4,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def prompts(B=3, L=5):
    return torch.randint(2, V, (B, L), generator=torch.Generator().manual_seed(1))


def generate(model, processor, ids, **options):
    options = {
        "do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": 8, "min_new_tokens": 8,
        "return_dict_in_generate": True, "output_logits": True, "output_scores": True,
    } | options  # fmt: skip
    torch.manual_seed(0)
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), logits_processor=LogitsProcessorList([processor]), **options
    )


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_the_record_is_the_rule_on_the_models_own_logits(model, rule):
    ids = prompts()
    processor = EntropyTemperatureProcessor(rule, record=True)
    out = generate(model, processor, ids, min_new_tokens=None, eos_token_id=None, num_return_sequences=2)
    T, H = processor.temperatures(), processor.entropies()
    assert T.shape == H.shape == (6, 8) and T.dtype == torch.float32
    assert T.max() > T.min() + 0.1
    # A separate forward pass in fp64
    with torch.no_grad():
        z = model(out.sequences).logits[:, ids.shape[1] - 1 : -1].double()
    token = out.sequences[:, ids.shape[1] :]
    logp, entropy, _ = reference.token_stats(z, token, T.double())
    entropy = reference.token_stats(z, token)[1]
    torch.testing.assert_close(H.double(), entropy, rtol=1e-5, atol=1e-5)
    if rule.name == "two_level":
        assert (entropy - rule.cutoff).abs().min() > 1e-4 and T.unique().tolist() == pytest.approx([0.7, 1.4])
        exact = torch.where(entropy > rule.cutoff, 1.4, torch.full_like(entropy, 0.7))
    elif rule.name == "edt":
        exact = 1.3 * 0.8 ** (0.8 / entropy)
    else:
        exact = 0.3 + 1.3 * (entropy / math.log(V)) ** 2
    torch.testing.assert_close(T.double(), exact, rtol=1e-4, atol=1e-5)
    # The processed scores of generate are the sampled distribution, and the loss gives the same log-probabilities.
    scores = torch.stack(out.scores, 1)
    torch.testing.assert_close(scores, torch.stack(out.logits, 1) / T[..., None], rtol=1e-6, atol=1e-6)
    sampled = scores.log_softmax(-1).gather(-1, token[..., None]).squeeze(-1)
    trained = token_stats(torch.stack(out.logits, 1), token, temperature=T).logp
    torch.testing.assert_close(trained, sampled, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logp, sampled.double(), rtol=1e-4, atol=1e-4)


def chi_square(counts, p):
    expected = counts.sum() * p
    return ((counts - expected) ** 2 / expected).sum().item()


def test_sampled_frequencies_are_those_of_the_scaled_logits(model):
    ids = prompts(1)
    n, rule = 20000, TwoLevelTemperature(high=1.5, low=0.6, cutoff=0.5)
    processor = EntropyTemperatureProcessor(rule, record=True)
    out = generate(model, processor, ids.expand(n, -1), max_new_tokens=1, min_new_tokens=None, output_scores=False)
    z = out.logits[0][0].double()
    T = processor.temperatures()[0, 0].double()
    assert T == 1.5 and (processor.temperatures() == 1.5).all()
    counts = torch.bincount(out.sequences[:, -1], minlength=V).double()
    # 23 degrees of freedom: above 58.6 with probability 6e-5
    assert chi_square(counts, (z / T).softmax(-1)) < 58.6
    assert chi_square(counts, z.softmax(-1)) > 500


def test_it_runs_after_penalties_and_before_the_temperature_of_generate(model):
    ids = prompts()
    rule = DynamicTemperature(0.5, 1.5)
    processor = EntropyTemperatureProcessor(rule, record=True)
    options = {"suppress_tokens": [3, 4], "max_new_tokens": 1, "min_new_tokens": 1}
    out = generate(model, processor, ids, temperature=0.5, top_k=7, **options)
    z = out.logits[0].clone()
    z[:, [1, 3, 4]] = -math.inf  # the end of sequence is banned by min_new_tokens
    T, H = entropy_temperature(z, rule)
    assert torch.equal(processor.temperatures()[:, 0], T) and torch.equal(processor.entropies()[:, 0], H)
    assert not torch.allclose(T, entropy_temperature(out.logits[0], rule)[0])
    warped = TemperatureLogitsWarper(0.5)(ids, z / T[:, None])
    kept = warped >= warped.topk(7).values[:, -1:]
    torch.testing.assert_close(out.scores[0], torch.where(kept, warped, -math.inf), rtol=1e-6, atol=1e-6)


def test_greedy_decoding_is_left_as_it_is(model):
    ids = prompts()
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
    for rule in (*RULES, TwoLevelTemperature(high=0.0, low=0.0)):
        out = generate(model, EntropyTemperatureProcessor(rule), ids, do_sample=False, min_new_tokens=None, top_k=None)
        assert torch.equal(out.sequences, plain)
    sampled = generate(model, EntropyTemperatureProcessor(TwoLevelTemperature(0.0, 0.0)), ids, min_new_tokens=None)
    assert torch.equal(sampled.sequences, plain)  # T = 0 samples greedily


def test_beams_run_and_their_record_is_refused(model):
    processor = EntropyTemperatureProcessor(RULES[2], record=True)
    out = generate(model, processor, prompts(), do_sample=False, num_beams=4, top_k=None)
    assert out.sequences.shape == (3, 13)
    with pytest.raises(ValueError, match="input_ids: found rows that did not go on where they were"):
        processor.temperatures()


def test_one_generation_at_a_time(model):
    processor = EntropyTemperatureProcessor(RULES[0], record=True)
    generate(model, processor, prompts(), max_new_tokens=3, min_new_tokens=3)
    with pytest.raises(ValueError, match=r"input_ids: found shape \(3, 5\) after \(3, 7\), expected \(3, 8\).*reset"):
        generate(model, processor, prompts())
    processor.reset()
    generate(model, processor, prompts(), max_new_tokens=3, min_new_tokens=3)
    assert processor.temperatures().shape == (3, 3)
    # A prompt that happens to be as long as the next step would be
    with pytest.raises(ValueError, match="rows that did not go on"):
        generate(model, processor, prompts(3, 8) + 0, max_new_tokens=1, min_new_tokens=1)
        processor.temperatures()


def test_it_writes_a_new_tensor_and_names_bad_arguments():
    scores = torch.randn(2, V, dtype=torch.bfloat16)
    before = scores.clone()
    processor = EntropyTemperatureProcessor(RULES[0])
    assert processor(torch.zeros(2, 1, dtype=torch.int64), scores).dtype == torch.bfloat16
    assert torch.equal(scores, before)
    assert processor.supports_continuous_batching
    with pytest.raises(ValueError, match="record: found False"):
        processor.temperatures()
    recording = EntropyTemperatureProcessor(RULES[0], record=True)
    assert not recording.supports_continuous_batching
    with pytest.raises(ValueError, match="steps: found 0"):
        recording.entropies()
    with pytest.raises(TypeError, match="rule: found dict"):
        EntropyTemperatureProcessor({"rule": "edt"})
