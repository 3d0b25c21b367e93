"""Roles, adapters and heads, against peft's own switching and separate peft models."""

import pytest
import torch
from conftest import make_model
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from align.errors import AlignError
from align.model.forward import forward, forward_head
from align.model.packing import Example, make_row
from align.model.trunk import Head, Role, Trunk
from align.settings import Lora

ROW = make_row([Example(0, (5, 9, 100, 7), ((8, 200, 1), (30, 31))), Example(1, (60, 61), ((4, 1),))])
IDS = torch.tensor([[5, 9, 100, 7, 8, 200, 1]])
LORAS = [
    pytest.param(Lora(rank=3, alpha=5.0), id="plain"),
    pytest.param(Lora(rank=3, alpha=5.0, rslora=True), id="rsLoRA"),
    pytest.param(Lora(rank=3, alpha=5.0, dora=True), id="DoRA"),
    pytest.param(Lora(rank=3, targets=("q_proj", "down_proj")), id="two targets"),
]


def randomise(trunk, adapter, seed=0):
    """Give an adapter's B random numbers, so that it changes something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in trunk.parameters_of(adapter).items():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def add(trunk, name, seed, lora=None):
    trunk.add_adapter(name, lora or Lora(rank=3), seed)
    randomise(trunk, name, seed)


@pytest.fixture
def stacked():
    """A trunk with the adapters `sft`, `ppo` and `value`, and a head `value`; `sft` is frozen."""
    trunk = Trunk(make_model())
    for seed, name in enumerate(["sft", "ppo", "value"]):
        add(trunk, name, seed)
    torch.manual_seed(0)
    trunk.heads["value"] = Head(64)
    for parameter in (trunk.parameters_of("ppo") | trunk.parameters_of("value", "value")).values():
        parameter.requires_grad_(True)
    return trunk


def wanting_gradients(trunk):
    return {name for name, parameter in trunk.model.named_parameters() if parameter.requires_grad}


def state(trunk):
    return [(list(m._active_adapter), m._disable_adapters) for m in trunk.model.modules() if isinstance(m, LoraLayer)]


def logprobs(trunk, *adapters):
    with torch.no_grad():
        return forward(trunk, Role(adapters), ROW).logprobs


def plain_logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def trunk_logits(trunk, *adapters):
    with trunk.switched_to(Role(adapters)):
        return plain_logits(trunk.model)


def drop_own_forward(trunk):
    """Let peft's class run the layers again."""
    for module in trunk.model.modules():
        if isinstance(module, LoraLayer):
            module.__dict__.pop("forward", None)


# Fresh adapters and roles --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", LORAS)
def test_a_fresh_adapter_changes_nothing_to_the_bit(trunk, lora):
    before = logprobs(trunk)
    trunk.add_adapter("sft", lora, seed=0)
    assert torch.equal(logprobs(trunk, "sft"), before)
    assert torch.equal(logprobs(trunk), before)
    randomise(trunk, "sft")
    changed = logprobs(trunk, "sft")
    assert not torch.equal(changed, before)
    trunk.add_adapter("ppo", lora, seed=1)
    assert torch.equal(logprobs(trunk, "sft", "ppo"), changed)


def test_an_adapter_is_its_seed_s():
    def a_matrices(seed):
        trunk = Trunk(make_model())
        torch.rand(7)
        trunk.add_adapter("sft", Lora(rank=3), seed)
        return torch.cat([p.flatten() for n, p in trunk.parameters_of("sft").items() if "lora_A" in n])

    assert torch.equal(a_matrices(1), a_matrices(1))
    assert not torch.equal(a_matrices(1), a_matrices(2))


def test_a_role_is_peft_s_own_set_adapter(stacked):
    own = {adapters: trunk_logits(stacked, *adapters) for adapters in [(), ("sft",), ("sft", "ppo"), ("sft", "value"), ("value",)]}
    drop_own_forward(stacked)
    for adapters, logits in own.items():
        if adapters:
            stacked.peft.base_model.set_adapter(list(adapters))
            torch.testing.assert_close(plain_logits(stacked.model), logits, atol=1e-5, rtol=1e-6)
    with stacked.peft.disable_adapter():
        torch.testing.assert_close(plain_logits(stacked.model), own[()], atol=0, rtol=0)
    assert torch.equal(own[()], plain_logits(make_model()))


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_a_role_is_a_separate_model(stacked, name):
    config = LoraConfig(r=3, lora_alpha=32, target_modules="all-linear", task_type=TaskType.CAUSAL_LM)
    separate = get_peft_model(make_model(), config).eval()
    for parameter_name, parameter in stacked.parameters_of(name).items():
        separate.get_parameter("base_model.model." + parameter_name.replace(f".{name}.", ".default.")).data.copy_(parameter.data)
    torch.testing.assert_close(plain_logits(separate), trunk_logits(stacked, name), atol=1e-5, rtol=1e-6)


def test_switching_changes_no_requires_grad_and_puts_everything_back(stacked):
    trained, before = wanting_gradients(stacked), state(stacked)
    with stacked.switched_to(Role(("sft",))):
        assert wanting_gradients(stacked) == trained
        inside = state(stacked)
        with stacked.switched_to(Role()):
            assert wanting_gradients(stacked) == trained
        assert state(stacked) == inside
    assert state(stacked) == before
    with pytest.raises(ZeroDivisionError), stacked.switched_to(Role(("ppo", "value"))):
        _ = 1 / 0
    assert state(stacked) == before
    assert wanting_gradients(stacked) == trained


def test_an_unknown_adapter_is_refused(stacked, trunk):
    with pytest.raises(KeyError, match=r"no adapter \['sftt'\]; there are \['ppo', 'sft', 'value'\]"), stacked.switched_to(Role(("sftt",))):
        pass
    with pytest.raises(KeyError, match="no adapter"), trunk.switched_to(Role(("sft",))):
        pass


def test_a_merged_adapter_is_refused(stacked):
    stacked.peft.base_model.merge_adapter(["sft"])
    with pytest.raises(RuntimeError, match="merged"), stacked.switched_to(Role(("sft",))):
        pass


def test_one_backward_over_two_roles_reaches_both(stacked):
    policy, value = Role(("sft", "ppo")), Role(("sft", "value"), "value")
    trained = stacked.parameters_of("ppo") | stacked.parameters_of("value", "value")

    def gradients():
        found = {name: parameter.grad.clone() for name, parameter in trained.items()}
        for parameter in trained.values():
            parameter.grad = None
        return found

    forward(stacked, policy, ROW).logprobs.sum().backward()
    forward_head(stacked, value, ROW).values.sum().backward()
    apart = gradients()
    assert all(gradient.abs().max() > 0 for gradient in apart.values())
    (forward(stacked, policy, ROW).logprobs.sum() + forward_head(stacked, value, ROW).values.sum()).backward()
    together = gradients()
    for name in apart:
        torch.testing.assert_close(together[name], apart[name], atol=0, rtol=1e-5)
    assert all(parameter.grad is None for parameter in stacked.parameters_of("sft").values())


def test_adding_or_loading_an_adapter_leaves_the_gradients_of_others_on(stacked, tmp_path):
    trained = wanting_gradients(stacked)
    stacked.add_adapter("later", Lora(rank=2), seed=9)
    assert {name for name in wanting_gradients(stacked) if ".later." not in name} == trained
    stacked.save_adapter("sft", tmp_path)
    stacked.load_adapter("loaded", tmp_path)
    assert {name for name in wanting_gradients(stacked) if ".later." not in name} == trained
    assert not any(p.requires_grad for p in stacked.parameters_of("loaded").values())
    assert not any(p.requires_grad for n, p in stacked.model.named_parameters() if "lora_" not in n)


def test_targets_that_fit_no_layer_are_refused(trunk):
    with pytest.raises(AlignError, match=r"sft\.lora\.targets: \('c_attn',\) fits no layer of this model"):
        trunk.add_adapter("sft", Lora(targets=("c_attn",)), seed=0)


def test_activations_are_computed_again_in_the_backward_pass_also_after_an_adapter_is_added(stacked):
    """PPO adds the reward model's and the value's adapters after the policy's is ready to be trained."""
    calls = []
    stacked.decoder.layers[0].mlp.register_forward_pre_hook(lambda module, inputs: calls.append(module))

    def calls_of_a_step():
        calls.clear()
        with stacked.switched_to(Role(("sft", "ppo"))):
            forward(stacked, Role(("sft", "ppo")), ROW).logprobs.sum().backward()
        return len(calls)

    assert calls_of_a_step() == 1
    stacked.checkpoint_activations()
    assert calls_of_a_step() == 2
    stacked.add_adapter("later", Lora(rank=2), seed=9)
    assert calls_of_a_step() == 2


# Our LoRA forward ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", [(), ("one",), ("one", "two")])
@pytest.mark.parametrize("lora", LORAS)
def test_the_lora_forward_in_float32_is_peft_s(trunk, lora, adapters):
    """Outputs and gradients, for one adapter, two stacked and none."""
    add(trunk, "one", 1, lora)
    add(trunk, "two", 2, Lora(rank=2, alpha=7.0, dora=lora.dora))
    trained = trunk.parameters_of("one") | trunk.parameters_of("two")
    for parameter in trained.values():
        parameter.requires_grad_(True)
    found = []
    for _ in range(2):
        with trunk.switched_to(Role(adapters)):
            logits = trunk.model(IDS, use_cache=False).logits
            if adapters:
                logits.square().sum().backward()
        found.append((logits.detach(), {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}))
        for parameter in trained.values():
            parameter.grad = None
        drop_own_forward(trunk)
    (own, own_gradients), (peft, peft_gradients) = found
    torch.testing.assert_close(own, peft, atol=1e-5, rtol=1e-6)
    assert own_gradients.keys() == peft_gradients.keys()
    assert bool(own_gradients) is bool(adapters)
    for name, gradient in peft_gradients.items():
        assert float((own_gradients[name] - gradient).abs().max()) <= 1e-5 * float(gradient.abs().max()), name


def test_dora_on_top_of_a_plain_adapter_is_peft_s(trunk):
    add(trunk, "sft", 1)
    add(trunk, "ppo", 2, Lora(rank=2, dora=True))
    own = trunk_logits(trunk, "sft", "ppo")
    drop_own_forward(trunk)
    torch.testing.assert_close(trunk_logits(trunk, "sft", "ppo"), own, atol=1e-5, rtol=1e-6)


def test_dropout_is_off_until_it_is_turned_on_and_then_only_where_gradients_are_wanted(trunk):
    add(trunk, "sft", 1, Lora(rank=3, dropout=0.5))
    role, quiet = Role(("sft",)), logprobs(trunk, "sft")

    def with_gradients():
        return forward(trunk, role, ROW).logprobs.detach()

    torch.testing.assert_close(with_gradients(), quiet, atol=1e-5, rtol=1e-6)
    trunk.dropout = True
    torch.manual_seed(0)
    noisy = [with_gradients() for _ in range(2)]
    assert not torch.equal(noisy[0], noisy[1])
    assert torch.equal(logprobs(trunk, "sft"), quiet)
    torch.manual_seed(0)
    assert torch.equal(with_gradients(), noisy[0])
    trunk.dropout = False
    torch.testing.assert_close(with_gradients(), quiet, atol=1e-5, rtol=1e-6)


def test_recomputed_activations_have_the_forward_pass_s_dropout():
    gradients = []
    for checkpointed in (False, True):
        trunk = Trunk(make_model())
        add(trunk, "sft", 1, Lora(rank=3, dropout=0.5))
        parameters = trunk.parameters_of("sft")
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        if checkpointed:
            trunk.checkpoint_activations()
        trunk.dropout = True
        torch.manual_seed(0)
        with trunk.switched_to(Role(("sft",))):
            forward(trunk, Role(("sft",)), ROW).logprobs.sum().backward()
        gradients.append({name: parameter.grad for name, parameter in parameters.items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)


# Saving, loading, copying --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft", "lora-new", "default-new", "my-sft_2-0a1b2c3d"])
@pytest.mark.parametrize("lora", LORAS)
def test_a_saved_adapter_loads_bit_for_bit_here_and_in_plain_peft(trunk, tmp_path, lora, name):
    add(trunk, "other", 3, Lora(rank=2, dora=lora.dora))
    add(trunk, name, 1, lora)
    own = logprobs(trunk, name)
    logits = trunk_logits(trunk, name)
    folder = tmp_path / "adapter"
    trunk.save_adapter(name, folder)
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    again = Trunk(make_model())
    again.load_adapter("loaded", folder)
    assert torch.equal(logprobs(again, "loaded"), own)
    for (_, saved), (_, loaded) in zip(trunk.parameters_of(name).items(), again.parameters_of("loaded").items(), strict=True):
        assert torch.equal(saved, loaded)
    plain = PeftModel.from_pretrained(make_model(), folder).eval()
    torch.testing.assert_close(plain_logits(plain), logits, atol=1e-5, rtol=1e-6)
    again.save_adapter("loaded", tmp_path / "again")
    first, second = (load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("lora", LORAS)
def test_a_copied_adapter_has_the_source_s_weights_and_leaves_it_alone(trunk, lora):
    add(trunk, "reward", 1, lora)
    add(trunk, "value", 2, lora)
    add(trunk, "other", 3, lora)
    source, other = logprobs(trunk, "reward"), logprobs(trunk, "other")
    trunk.copy_adapter("reward", "value")
    assert torch.equal(logprobs(trunk, "value"), source)
    assert torch.equal(logprobs(trunk, "reward"), source)
    assert torch.equal(logprobs(trunk, "other"), other)
    randomise(trunk, "value", 5)
    assert torch.equal(logprobs(trunk, "reward"), source)


@pytest.mark.parametrize("name", ["0-new", "mlp-new", "q_proj-0a1b2c3d"])
def test_an_adapter_of_a_stage_named_like_a_part_of_the_model_is_still_apart(trunk, name):
    add(trunk, "sft", 1)
    add(trunk, name, 2)
    assert all(f".{name}.weight" in parameter for parameter in trunk.parameters_of(name))
    sft = logprobs(trunk, "sft")
    trunk.copy_adapter("sft", name)
    assert torch.equal(logprobs(trunk, name), sft)


def test_parameters_of_an_adapter_are_all_of_it_and_nothing_else(stacked):
    found = stacked.parameters_of("ppo", "value")
    layers = [m for m in stacked.model.modules() if isinstance(m, LoraLayer)]
    assert len(layers) == 2 * 7
    wanted = {id(p) for layer in layers for p in (layer.lora_A["ppo"].weight, layer.lora_B["ppo"].weight)}
    assert {id(p) for p in found.values()} == wanted | {id(stacked.heads["value"].weight)}
    assert {id(p) for p in stacked.parameters_of().values()} == {id(p) for p in stacked.model.parameters()}


def test_a_head_saves_and_loads_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    head = Head(64)
    head.offset += 0.125
    head.save(tmp_path / "head.safetensors")
    again = Head.load(tmp_path / "head.safetensors")
    assert torch.equal(again.weight, head.weight)
    assert torch.equal(again.offset, head.offset)
    hidden = torch.randn(5, 64).to(torch.bfloat16)
    assert torch.equal(again(hidden), head(hidden))
    assert head(hidden).dtype == torch.float32


def test_a_head_by_hand():
    """1 * 2 + 2 * 3 - 0.5 = 7.5; -1 * 2 + 0 * 3 - 0.5 = -2.5."""
    head = Head(2)
    head.weight.data = torch.tensor([2.0, 3.0])
    head.offset += 0.5
    assert head(torch.tensor([[1.0, 2.0], [-1.0, 0.0]])).tolist() == [7.5, -2.5]


def test_a_head_starts_with_the_stated_spread():
    """N(0, scale / sqrt(hidden + 1)): the sample deviation of 100,000 numbers is within 1 percent of it."""
    torch.manual_seed(0)
    assert float(Head(99_999, scale=2.0).weight.detach().std()) == pytest.approx(2 / 100_000**0.5, rel=0.01)


# The copy that only samples ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lora", LORAS[:2] + LORAS[3:])
def test_the_merged_copy_equals_the_stack(kind, tied, lora):
    trunk = Trunk(make_model(kind, tie_word_embeddings=tied))
    add(trunk, "sft", 1, lora)
    add(trunk, "ppo", 2)
    assert trunk.can_merge()
    base = {name: parameter.clone() for name, parameter in trunk.model.named_parameters()}
    copy = trunk.merged_copy()
    for adapters in [("sft", "ppo"), ("sft",), (), ("ppo",)]:
        trunk.merge_into(copy, Role(adapters))
        torch.testing.assert_close(plain_logits(copy), trunk_logits(trunk, *adapters), atol=3e-5, rtol=1e-5)
    for name, parameter in trunk.model.named_parameters():
        assert torch.equal(parameter, base[name]), name
    assert torch.equal(plain_logits(copy.eval()), plain_logits(copy))


def test_the_merged_copy_shares_every_tensor_but_the_adapted_ones(trunk):
    add(trunk, "sft", 1, Lora(rank=3, targets=("q_proj", "down_proj")))
    copy = trunk.merged_copy()
    trunk.merge_into(copy, Role(("sft",)))
    own = {name.replace(".base_layer", ""): p for name, p in trunk.model.named_parameters() if "lora_" not in name}
    copied = dict(copy.named_parameters())
    assert copied.keys() == own.keys()
    for name, parameter in copied.items():
        adapted = any(target in name for target in ("q_proj", "down_proj"))
        assert (parameter.data_ptr() == own[name].data_ptr()) is not adapted, name
        assert not parameter.requires_grad
    assert copy.get_output_embeddings().weight.data_ptr() == trunk.output_layer.weight.data_ptr()


def test_making_a_merged_copy_changes_nothing_in_the_trunk(trunk):
    add(trunk, "sft", 1)
    before = logprobs(trunk, "sft")
    copy = trunk.merged_copy()
    trunk.merge_into(copy, Role(("sft",)))
    plain_logits(copy)
    assert trunk.packs
    assert torch.equal(logprobs(trunk, "sft"), before)


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_on_the_output_layer_works_or_is_refused(tied):
    """Where the output layer shares its weight with the embedding, merging into one must not move the other."""
    trunk = Trunk(make_model(tie_word_embeddings=tied))
    try:
        add(trunk, "sft", 1, Lora(rank=3, targets=("q_proj", "lm_head")))
    except AlignError:
        return
    logits = trunk_logits(trunk, "sft")
    wanted = torch.log_softmax(logits[0], -1)[3:6].gather(1, IDS[0, 4:, None])[:, 0]
    torch.testing.assert_close(logprobs(trunk, "sft")[:3], wanted, atol=1e-5, rtol=1e-6)
    if trunk.can_merge():
        copy = trunk.merged_copy()
        trunk.merge_into(copy, Role(("sft",)))
        torch.testing.assert_close(plain_logits(copy), logits, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_merged_says_so(trunk):
    assert trunk.can_merge()
    add(trunk, "sft", 1, Lora(rank=3, dora=True))
    assert not trunk.can_merge()
