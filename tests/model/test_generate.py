"""Sampling against a teacher-forced recompute, transformers' own greedy search, and the softmax it should follow."""

import pytest
import torch
from conftest import make_model
from transformers import GenerationConfig

from align.model.attention import NAME
from align.model.generate import FEW, REFILL, SEQUENCES, bytes_of_a_token, sample, suit_to_few_tokens
from align.model.load import Sampler
from align.model.slots import Slots
from align.model.trunk import Role, Trunk
from align.settings import Lora

KINDS = [
    pytest.param("llama", {}, id="llama"),
    pytest.param("qwen3", {}, id="qwen3"),
    pytest.param(
        "gemma3_text",
        {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": False},
        id="gemma3, window of 8 and full",
    ),
    pytest.param("mistral", {"sliding_window": 8}, id="mistral, window of 8"),
]
PROMPTS = [
    (5, 6, 7),
    (100, 4),
    (8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21),
    (3,),
    (0, 0, 50, 1, 30, 31, 32, 33, 34, 35),
]
WAYS = [pytest.param(NAME, id="packed"), pytest.param("sdpa", id="padded")]
STOPS = frozenset(range(1, 25))  # one token in eleven, so that some completions end early and some not at all


def recomputed(model, prompt, completion, temperature):
    """Log-probabilities of the completion, one plain forward without a cache."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("kind", "changes"), KINDS)
def test_log_probabilities_are_those_of_a_teacher_forced_recompute(kind, changes, way, temperature):
    """Ragged prompts, several completions each, finished ones leaving the batch."""
    model = make_model(kind, **changes)
    model.set_attn_implementation(way)
    sampled = sample(model, PROMPTS, 3, 16, temperature, STOPS, seed=0)
    plain = make_model(kind, **changes)
    plain.set_attn_implementation("eager")
    completions = [c for of_prompt in sampled for c in of_prompt]
    assert len({len(c.ids) for c in completions}) > 3
    for prompt, of_prompt in zip(PROMPTS, sampled, strict=True):
        assert len(of_prompt) == 3
        for completion in of_prompt:
            expected = recomputed(plain, prompt, completion.ids, temperature)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=1e-5)


def test_a_completion_ends_with_the_first_stop_token_and_keeps_it():
    completions = [c for of_prompt in sample(make_model(), PROMPTS, 4, 12, 1.0, STOPS, seed=1) for c in of_prompt]
    assert {c.ended for c in completions} == {True, False}
    for completion in completions:
        assert not STOPS & set(completion.ids[:-1])
        assert completion.ended is (completion.ids[-1] in STOPS)
        assert len(completion.ids) == len(completion.logprobs)
        assert len(completion.ids) == 12 or completion.ended


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("kind", "changes"), KINDS)
def test_temperature_0_is_transformers_greedy_search(kind, changes, way):
    model = make_model(kind, **changes)
    model.set_attn_implementation(way)
    config = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=sorted(STOPS), pad_token_id=0)
    sampled = sample(model, PROMPTS, 2, 12, 0.0, STOPS, seed=0)
    model.set_attn_implementation("sdpa")
    for prompt, (first, second) in zip(PROMPTS, sampled, strict=True):
        greedy = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), generation_config=config
        )
        assert list(first.ids) == greedy[0, len(prompt) :].tolist()
        assert first.ids == second.ids
        torch.testing.assert_close(torch.tensor(first.logprobs), recomputed(model, prompt, first.ids, 1.0), atol=1e-5, rtol=1e-5)


def test_the_same_seed_gives_the_same_completions_and_another_seed_others():
    model = make_model()
    first = sample(model, PROMPTS, 3, 8, 1.0, STOPS, seed=4)
    torch.rand(3)  # the world's random state plays no part
    assert sample(model, PROMPTS, 3, 8, 1.0, STOPS, seed=4) == first
    assert sample(model, PROMPTS, 3, 8, 1.0, STOPS, seed=5) != first


def test_sampling_leaves_the_world_s_random_state_alone():
    model = make_model()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    sample(model, PROMPTS, 1, 4, 1.0, STOPS, seed=4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_one_token_completions_follow_the_softmax(temperature):
    """4,000 samples; Pearson's statistic over tokens expected 5 times or more is below its mean plus 4 deviations."""
    model, prompt, count = make_model(), (5, 6, 7), 4000
    sampled = sample(model, [prompt], count, 1, temperature, STOPS, seed=0)[0]
    assert len(sampled) == count
    with torch.no_grad():
        expected = count * torch.softmax(model(torch.tensor([prompt])).logits[0, -1] / temperature, -1)
    found = torch.bincount(torch.tensor([c.ids[0] for c in sampled]), minlength=261).float()
    often = expected >= 5
    groups = [(found[often], expected[often]), (found[~often].sum()[None], expected[~often].sum()[None])]
    statistic = sum(float(((f - e) ** 2 / e).sum()) for f, e in groups if e.sum() >= 5)
    freedom = int(often.sum())
    assert freedom > 5
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_more_prompts_than_are_decoded_at_once_come_back_in_their_order(way, temperature):
    """A sequence's random numbers are its own: what is decoded beside it, and in which place, does not change it."""
    prompts = [(5 + i, *range(30, 30 + i % 7)) for i in range(60)]
    model, done = make_model(), []
    model.set_attn_implementation(way)
    sampled = sample(model, prompts, 2, 9, temperature, STOPS, seed=0, on_progress=done.append)
    assert done == sorted(set(done))
    assert done[-1] == 60
    model.set_attn_implementation("sdpa")
    for prompt, of_prompt in zip(prompts, sampled, strict=True):
        for completion in of_prompt:
            expected = recomputed(model, prompt, completion.ids, temperature or 1.0)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=1e-5)


def test_what_is_decoded_beside_a_sequence_does_not_change_it():
    prompts = [(5 + i, *range(30, 30 + i % 7)) for i in range(40)]
    completions = []
    for way in (NAME, "sdpa"):
        model = make_model()
        model.set_attn_implementation(way)
        completions.append([[c.ids for c in of_prompt] for of_prompt in sample(model, prompts, 2, 9, 1.0, STOPS, seed=0)])
    assert completions[0] == completions[1]


def test_a_place_that_is_free_goes_to_the_next_prompt(monkeypatch):
    """100 prompts of two completions, 1 to 30 tokens long: until the last come in, nearly all places are taken."""
    model, sizes = make_model(), []
    model.set_attn_implementation(NAME)
    step = Slots.step
    monkeypatch.setattr(Slots, "step", lambda slots, tokens: sizes.append(len(tokens)) or step(slots, tokens))
    prompts = [(5 + i, 30) for i in range(100)]
    found = sample(model, prompts, 2, 30, 1.0, STOPS, seed=0)
    tokens = [len(c.ids) for of_prompt in found for c in of_prompt]
    assert max(tokens) == 30
    assert sum(sizes) == sum(tokens) - len(tokens)  # no step is spent on a finished one; the first token needs none
    before_the_last_came_in = sizes[:-30]
    assert sum(before_the_last_came_in) / len(before_the_last_came_in) > SEQUENCES - REFILL


def test_a_trunk_samples_from_the_role_it_is_switched_to():
    trunk = Trunk(make_model())
    trunk.add_adapter("sft", Lora(rank=3), seed=0)
    with torch.no_grad():
        for name, parameter in trunk.parameters_of("sft").items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    copy = trunk.merged_copy()
    for role in (Role(("sft",)), Role()):
        with trunk.switched_to(role):
            through_adapters = sample(trunk.model, PROMPTS, 2, 8, 1.0, STOPS, seed=0)
            for prompt, of_prompt in zip(PROMPTS, through_adapters, strict=True):
                for completion in of_prompt:
                    expected = recomputed(trunk.model, prompt, completion.ids, 1.0)
                    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=1e-5)
        trunk.merge_into(copy, role)
        merged = sample(copy, PROMPTS, 2, 8, 1.0, STOPS, seed=0)
        assert [[c.ids for c in of_prompt] for of_prompt in merged] == [[c.ids for c in of_prompt] for of_prompt in through_adapters]


@pytest.mark.parametrize("bias", [True, False])
def test_products_of_few_tokens_are_the_same_the_other_way_round(bias):
    model = make_model(attention_bias=bias)
    layer = model.get_decoder().layers[0].self_attn.q_proj
    inputs = [torch.randn(*shape, 64) for shape in ((1, 1), (1, FEW), (1, FEW + 1), (3, 2))]
    expected = [torch.nn.functional.linear(x, layer.weight, layer.bias) for x in inputs]
    suit_to_few_tokens(model)
    assert "forward" in vars(layer)
    assert (layer.bias is not None) == bias
    for x, plain in zip(inputs, expected, strict=True):
        torch.testing.assert_close(layer(x), plain, atol=1e-5, rtol=1e-5)


def test_bfloat16_products_are_left_alone():
    model = make_model().to(torch.bfloat16)
    suit_to_few_tokens(model)
    assert not any("forward" in vars(module) for module in model.modules() if isinstance(module, torch.nn.Linear))


def test_a_trunk_whose_activations_are_checkpointed_samples_the_same():
    """A checkpointing layer would drop the cache, and every token would be drawn without what came before."""
    completions = []
    for checkpointed in (False, True):
        trunk = Trunk(make_model())
        trunk.add_adapter("sft", Lora(rank=3), seed=0)
        if checkpointed:
            trunk.checkpoint_activations()
        sampled = Sampler(trunk, merged=False).sample(Role(("sft",)), PROMPTS, 2, 8, 1.0, STOPS, seed=0)
        completions.append([[c.ids for c in of_prompt] for of_prompt in sampled])
    assert completions[1] == completions[0]


def test_short_prompts_beside_a_long_one_that_goes_on_count_as_much_as_it(monkeypatch):
    """Keys and values lie in a table, as wide for all sequences as for the longest."""
    model, tables = make_model(), []
    room, width = 6 * (33 + 24), 33 + 24
    monkeypatch.setattr("align.model.generate.ROOM", room * bytes_of_a_token(model))
    monkeypatch.setattr(type(model), "get_memory_footprint", lambda model: 0)
    monkeypatch.setattr("align.model.generate.REFILL", 1)
    model.set_attn_implementation(NAME)
    step = Slots.step

    def counted(slots, tokens):
        tables.append((len(tokens), int(slots.lengths.max()) + 1))
        return step(slots, tokens)

    monkeypatch.setattr(Slots, "step", counted)
    sample(model, [(5, *range(30, 62))] * 6 + [(5, 30 + i) for i in range(40)], 1, 24, 1.0, STOPS, seed=0)
    assert all(sequences * longest <= room for sequences, longest in tables)
    assert max(sequences for sequences, longest in tables if longest > 33) == room // width
    assert max(sequences for sequences, _ in tables) > room // width


def test_long_prompts_are_decoded_a_few_at_a_time(monkeypatch):
    """So that their keys and values fit in memory; short ones then come in numbers."""
    model, sizes = make_model(), []
    each = 2 * 2 * 32 * 4  # keys and values, layers, numbers, float32
    assert bytes_of_a_token(model) == each
    monkeypatch.setattr("align.model.generate.ROOM", 80 * each)
    monkeypatch.setattr(type(model), "get_memory_footprint", lambda model: 0)
    monkeypatch.setattr("align.model.generate.REFILL", 2)
    model.set_attn_implementation(NAME)
    step = Slots.step
    monkeypatch.setattr(Slots, "step", lambda slots, tokens: sizes.append(len(tokens)) or step(slots, tokens))
    prompts = [(5, *range(30, 62))] * 4 + [(5, 30 + i) for i in range(20)]
    sampled = sample(model, prompts, 1, 4, 1.0, frozenset(), seed=0)
    assert sizes[0] == 80 // 37
    assert max(sizes) == 80 // 6
    model.set_attn_implementation("sdpa")
    for prompt, (completion,) in zip(prompts, sampled, strict=True):
        torch.testing.assert_close(torch.tensor(completion.logprobs), recomputed(model, prompt, completion.ids, 1.0), atol=1e-5, rtol=1e-5)
