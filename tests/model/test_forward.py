"""The packed path against a plain padded forward of the same model by transformers and peft, with eager attention."""

import random
from dataclasses import replace

import pytest
import torch
from conftest import make_model
from peft import LoraConfig, TaskType, get_peft_model

from align.errors import AlignError
from align.model.forward import forward, forward_head, picked
from align.model.packing import Example, make_row, pack
from align.model.trunk import Head, Role, Trunk
from align.settings import Lora

KINDS = [
    pytest.param("llama", {}, id="llama, grouped keys"),
    pytest.param("llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}, id="llama, untied"),
    pytest.param("qwen3", {}, id="qwen3"),
    pytest.param(
        "gemma3_text", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}, id="gemma3, window of 8 and full"
    ),
    pytest.param("mistral", {"sliding_window": 8}, id="mistral, window of 8"),
]
ROLE = Role(("one",))
HEAD_ROLE = Role(("one",), "h")


SYSTEM = (2, 30, 31, 1, 3)


def some_examples(seed=0, system=()):
    """Prompts of 1 to 20 tokens, 1 to 4 completions of 1 to 15; the last two are conversations of several turns.

    With `system` all prompts begin with it, and one is nothing else.
    """
    rng = random.Random(seed)

    def ids(longest):
        return tuple(rng.randrange(261) for _ in range(rng.randint(1, longest)))

    examples = [Example(i, ids(20), tuple(ids(15) for _ in range(count))) for i, count in enumerate([1, 2, 4, 3, 1, 2])]
    for index in (6, 7):
        turns = [(ids(6), number % 2 == 0) for number in range(5)]
        completion = tuple(token for turn, _ in turns for token in turn)
        trained = tuple(counts for turn, counts in turns for _ in turn)
        examples.append(Example(index, ids(10), (completion,), (trained,)))
    if system:
        examples.append(Example(8, (), (ids(9), ids(9))))
    return [replace(example, prompt=system + example.prompt) for example in examples]


def randomise_b(trunk, seed=0):
    """Give every B random numbers, so that A has gradients too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in trunk.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def trunk_and_plain(kind, changes):
    """The same model with the same adapter twice: as a trunk, and as peft and transformers run it."""
    trunk = Trunk(make_model(kind, **changes))
    trunk.add_adapter("one", Lora(rank=3), seed=1)
    randomise_b(trunk)
    torch.manual_seed(5)
    trunk.heads["h"] = Head(trunk.hidden_size)
    trunk.heads["h"].offset += 0.25
    base = make_model(kind, **changes)
    base.set_attn_implementation("eager")
    config = LoraConfig(r=3, lora_alpha=32, target_modules="all-linear", task_type=TaskType.CAUSAL_LM)
    plain = get_peft_model(base, config, adapter_name="one").eval()
    for name, parameter in trunk.model.named_parameters():
        plain.get_parameter("base_model.model." + name).data.copy_(parameter.data)
    for parameter in trunk.parameters_of("one", "h").values():
        parameter.requires_grad_(True)
    return trunk, plain


def padded(examples):
    """Sequences (ids, mask) padded on the right with token 3, and the (sequence, column) of each completion token that counts."""
    sequences = [(e.prompt, c) for e in examples for c in e.completions]
    counts = [e.trained[i] if e.trained else [True] * len(c) for e in examples for i, c in enumerate(e.completions)]
    width = max(len(p) + len(c) for p, c in sequences)
    ids = torch.full((len(sequences), width), 3)
    mask = torch.zeros_like(ids)
    for number, (prompt, completion) in enumerate(sequences):
        length = len(prompt) + len(completion)
        ids[number, :length] = torch.tensor(prompt + completion)
        mask[number, :length] = 1
    places = [(row, len(prompt) + k) for row, (prompt, _) in enumerate(sequences) for k, counted in enumerate(counts[row]) if counted]
    rows, columns = torch.tensor(places).unbind(1)
    return ids, mask, rows, columns


def plain_logprobs(model, examples, temperature=1.0):
    ids, mask, rows, columns = padded(examples)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    return logprobs[rows, columns - 1, ids[rows, columns]]


def plain_head(model, head, examples):
    """Values before each completion token, and scores at each sequence's last token."""
    ids, mask, rows, columns = padded(examples)
    hidden = model.get_base_model().model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    values = (hidden * head.weight).sum(-1) - head.offset
    return values[rows, columns - 1], values[torch.arange(len(ids)), mask.sum(1) - 1]


def loss_weights(examples, seed=3):
    """A random weight for every completion token that counts."""
    return torch.randn(sum(e.trained_tokens for e in examples), generator=torch.Generator().manual_seed(seed))


def gradients(parameters):
    found = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    for parameter in parameters.values():
        parameter.grad = None
    return found


def assert_equal_gradients(found, expected, relative=1e-5):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        assert float((found[name] - gradient).abs().max()) <= relative * scale, name


def lora_gradients(trunk, plain):
    found = gradients(trunk.parameters_of("one"))
    expected = gradients({n.removeprefix("base_model.model."): p for n, p in plain.named_parameters() if "lora_" in n})
    return found, expected


@pytest.mark.parametrize(("temperature", "system"), [(1.0, ()), (0.7, ()), (1.0, SYSTEM)])
@pytest.mark.parametrize(("kind", "changes"), KINDS)
def test_packed_log_probabilities_and_gradients_are_the_padded_ones(kind, changes, temperature, system):
    trunk, plain = trunk_and_plain(kind, changes)
    assert trunk.packs
    examples = some_examples(system=system)
    weights = loss_weights(examples)
    expected = plain_logprobs(plain, examples, temperature)
    (expected * weights).sum().backward()
    row = make_row(examples)
    logprobs = forward(trunk, ROLE, row, temperature).logprobs
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-6)
    (logprobs * weights).sum().backward()
    assert_equal_gradients(*lora_gradients(trunk, plain))


@pytest.mark.parametrize("system", [(), SYSTEM])
@pytest.mark.parametrize(("kind", "changes"), KINDS)
def test_packed_values_scores_and_gradients_are_the_padded_ones(kind, changes, system):
    trunk, plain = trunk_and_plain(kind, changes)
    examples, head = some_examples(system=system), trunk.heads["h"]
    expected_values, expected_scores = plain_head(plain, head, examples)
    weights, score_weights = loss_weights(examples), torch.linspace(-1, 1, len(expected_scores))
    ((expected_values * weights).sum() + (expected_scores * score_weights).sum()).backward()
    expected_head = gradients({"weight": head.weight})
    values, scores = forward_head(trunk, HEAD_ROLE, make_row(examples))
    torch.testing.assert_close(values, expected_values, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(scores, expected_scores, atol=1e-5, rtol=1e-6)
    ((values * weights).sum() + (scores * score_weights).sum()).backward()
    assert_equal_gradients(gradients({"weight": head.weight}), expected_head)
    assert_equal_gradients(*lora_gradients(trunk, plain))


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        pytest.param("gemma2", {"sliding_window": 8, "attn_logit_softcapping": None}, id="gemma2, softcapped logits"),
        pytest.param("gemma2", {"sliding_window": 8}, id="gemma2, softcapped attention too"),
        pytest.param("gemma2", {"sliding_window": 8, "attn_logit_softcapping": 5.0}, id="gemma2, attention capped at 5"),
        pytest.param("gpt2", {"n_embd": 64}, id="gpt2, learned positions"),
        pytest.param("llama", {}, id="llama"),
    ],
)
def test_a_model_that_does_not_pack_gives_the_same_numbers_the_padded_way(kind, changes, packs):
    trunk, plain = trunk_and_plain(kind, changes)
    trunk.packs &= packs
    examples = some_examples()
    weights = loss_weights(examples)
    expected = plain_logprobs(plain, examples, 0.7)
    (expected * weights).sum().backward()
    logprobs = forward(trunk, ROLE, make_row(examples), 0.7).logprobs
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-6)
    (logprobs * weights).sum().backward()
    assert_equal_gradients(*lora_gradients(trunk, plain))


@pytest.mark.parametrize("system", [(), SYSTEM])
def test_the_padded_way_gives_the_packed_values_and_scores(system):
    trunk, _ = trunk_and_plain("llama", {})
    row, head = make_row(some_examples(system=system)), trunk.heads["h"]
    found = []
    for packs in (True, False):
        trunk.packs = packs
        values, scores = forward_head(trunk, HEAD_ROLE, row)
        (values.sum() + scores.square().sum()).backward()
        found.append((values, scores, gradients({**trunk.parameters_of("one"), "head": head.weight})))
    torch.testing.assert_close(found[0][:2], found[1][:2], atol=1e-5, rtol=1e-6)
    assert_equal_gradients(found[0][2], found[1][2])


def test_a_model_without_sdpa_loads_from_its_folder(tmp_path):
    make_model("gemma2", sliding_window=8).save_pretrained(tmp_path)
    trunk, plain = Trunk.load(tmp_path, torch.float32), make_model("gemma2", sliding_window=8)
    examples = some_examples()
    with torch.no_grad():
        found = forward(trunk, Role(), make_row(examples)).logprobs
        torch.testing.assert_close(found, plain_logprobs(plain, examples), atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        pytest.param("granite", {"logits_scaling": 4.0}, id="granite divides its logits"),
        pytest.param("cohere", {"logit_scale": 0.25}, id="cohere multiplies its logits"),
    ],
)
def test_a_model_that_scales_its_logits_is_exact_or_refused(kind, changes):
    model = make_model(kind, **changes)
    examples = some_examples()
    with torch.no_grad():
        expected = plain_logprobs(model, examples)
        try:
            trunk = Trunk(model)
        except AlignError:
            return
        torch.testing.assert_close(forward(trunk, Role(), make_row(examples)).logprobs, expected, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("system", [(), SYSTEM])
@pytest.mark.parametrize(("kind", "changes"), KINDS)
def test_who_shares_a_row_and_in_which_order_changes_nothing(kind, changes, system):
    trunk, _ = trunk_and_plain(kind, changes)
    examples = some_examples(system=system)

    def by_example(rows):
        found = {}
        for row in rows:
            sizes = [e.trained_tokens for e in row.examples]
            counts = [len(e.completions) for e in row.examples]
            heads = forward_head(trunk, HEAD_ROLE, row)
            parts = zip(forward(trunk, ROLE, row).logprobs.split(sizes), heads.values.split(sizes), heads.scores.split(counts), strict=True)
            found |= {e.index: torch.cat(part) for e, part in zip(row.examples, parts, strict=True)}
        return [found[index] for index in range(len(examples))]

    with torch.no_grad():
        together = by_example([make_row(examples)])
        for rows in ([make_row(examples[::-1])], [make_row([e]) for e in examples], pack(examples, 80)):
            torch.testing.assert_close(by_example(rows), together, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("packs", [True, False])
def test_pad_equal_to_end_of_turn_is_irrelevant(packs):
    """Masks come from lengths, so a token is never taken for padding: the same numbers to the bit, whatever pad is."""
    ends = [Example(0, (5, 1, 9), ((1, 6, 1), (7, 1))), Example(1, (0, 0, 8), ((0, 1), (1,)))]
    found = []
    for pad in (0, 1):
        trunk = Trunk(make_model(pad_token_id=pad))
        trunk.packs = packs
        torch.manual_seed(0)
        trunk.heads["h"] = Head(64)
        with torch.no_grad():
            found.append((forward(trunk, Role(), make_row(ends)).logprobs, *forward_head(trunk, Role((), "h"), make_row(ends))))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    plain = make_model()
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        torch.testing.assert_close(found[0][0], plain_logprobs(plain, ends), atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("kind", "changes"), [("llama", {}), ("gemma3_text", {"sliding_window": 8})])
def test_gradients_of_all_weights_are_those_of_plain_autograd(kind, changes, tied):
    trunk = Trunk(make_model(kind, tie_word_embeddings=tied, **changes))
    plain = make_model(kind, tie_word_embeddings=tied, **changes)
    plain.set_attn_implementation("eager")
    trunk.model.requires_grad_(True)
    examples = some_examples()
    weights = loss_weights(examples)
    (plain_logprobs(plain, examples) * weights).sum().backward()
    (forward(trunk, Role(), make_row(examples)).logprobs * weights).sum().backward()
    found = gradients(trunk.parameters_of())
    assert ("lm_head.weight" in found) is not tied
    assert_equal_gradients(found, gradients(dict(plain.named_parameters())))


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("full", [True, False])
def test_gradient_checkpointing_changes_no_gradient(full, packs):
    found = []
    for checkpointed in (False, True):
        trunk, _ = trunk_and_plain("llama", {"attention_dropout": 0.5})  # which must stay off
        trunk.packs = packs
        parameters = trunk.parameters_of("one", "h")
        if full:
            parameters = {n: p for n, p in trunk.parameters_of().items() if "lora_" not in n}
            trunk.model.requires_grad_(True)
        if checkpointed:
            trunk.checkpoint_activations()
        row = make_row(some_examples())
        with trunk.switched_to(ROLE):
            forward(trunk, ROLE, row).logprobs.sum().backward()
            values, scores = forward_head(trunk, HEAD_ROLE, row)
            (values.sum() + scores.sum()).backward()
        found.append(gradients(parameters))
    assert_equal_gradients(found[1], found[0], relative=1e-6)


def test_gradients_of_a_shared_prompt_are_the_same_bits_every_time():
    """Nine completions' gradients meet at the prompt's last token, whichever thread is first: those of float32 indexing would differ."""
    threads, generator = torch.get_num_threads(), torch.Generator().manual_seed(0)
    row = make_row([Example(0, tuple(range(1, 12)), tuple(tuple(range(1, 81)) for _ in range(9)))])
    hidden, weights = (torch.randn(n, 576, generator=generator) for n in (len(row.ids), len(row.predicted_at)))

    def gradient(pick):
        given = hidden.clone().requires_grad_(True)
        (pick(given, row.predicted_at) * weights).sum().backward()
        return given.grad

    torch.set_num_threads(2)
    try:
        torch.use_deterministic_algorithms(True)
        added_in_order = gradient(lambda given, places: given[places])
        torch.use_deterministic_algorithms(False)
        assert all(torch.equal(gradient(picked), added_in_order) for _ in range(30))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
