"""PPO on the tiny model in float32: what must be true at the start, what must not move, and what must rise."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_trainee, randomise
from safetensors import safe_open
from safetensors.torch import load_file

from align import Lora, Recipe
from align.artifact import Artifact
from align.base import Base
from align.errors import AlignError
from align.learn.optimise import make_optimizer
from align.model.forward import forward, forward_head
from align.model.generate import Completion
from align.model.load import Sampler
from align.model.packing import Example, make_row, pack
from align.model.trunk import Head, Role
from align.progress import Meter
from align.run import Job
from align.settings import PPOSettings
from align.stages import ppo

PROMPTS = [(3, 50, 51, 4), (3, 60, 4), (3, 70, 71, 72, 73, 74, 4), (3, 4), (3, 80, 81, 4)]
STOPS = frozenset({1, *range(200, 230)})  # one token in nine: completions of every length, some cut off
REWARD = Artifact(Path("reward"), {"settings": {"lora": Lora(rank=4).model_dump(mode="json")}})


def make_settings(**changes):
    return PPOSettings(
        **{
            "iterations": 3,
            "prompts_per_iteration": 5,
            "completions_per_prompt": 3,
            "max_new_tokens": 8,
            "temperature": 1.0,
            "row_tokens": 48,
            "learning_rate": 1e-3,
            "value_learning_rate": 1e-3,
            "epochs": 2,
            "minibatches": 2,
            **changes,
        }
    )


def stage(chat, folder=None, **changes):
    """What `ppo.run` opens, on random adapters: policy [sft, ppo], reference [sft], reward [sft, reward], value [sft, value]."""
    settings = make_settings(**changes)
    trainee = make_trainee(replace(chat, stop_ids=STOPS), name="ppo")
    trunk = trainee.trunk
    trunk.add_adapter("reward", Lora(rank=4), seed=3)
    randomise(trunk, "reward", seed=3)
    torch.manual_seed(4)
    trunk.heads["reward"] = Head(trunk.hidden_size).requires_grad_(False)
    trunk.heads["reward"].offset += 0.1
    reward = Role(("sft", "reward"), "reward")
    value = ppo.add_value(trunk, reward, REWARD, settings.seed)
    groups = [trainee.parameters, trunk.parameters_of(ppo.VALUE, ppo.VALUE)]
    for parameter in groups[1].values():
        parameter.requires_grad_(True)
    job = Job("ppo", settings, None, {}, {}, folder)
    sampler = Sampler(trunk, settings.merged_sampler)
    return SimpleNamespace(
        job=job, settings=settings, trainee=trainee, trunk=trunk, reward=reward, value=value, groups=groups, sampler=sampler
    )


def train(opened):
    """All rounds; the checks and the metrics of every round."""
    checks = {}
    ppo._train(opened.job, opened.trainee, opened.reward, opened.value, opened.groups, PROMPTS, opened.sampler, checks)
    lines = (opened.job.work / "metrics.jsonl").read_text().splitlines()
    return checks, [json.loads(line) for line in lines]


def rollouts_of(opened, iteration=0):
    """One round's rollouts with advantages, and the rows of its first pass."""
    settings, meter = opened.settings, SimpleNamespace(phase=lambda text: None)
    sampled = ppo._sample(opened.trainee, opened.sampler, PROMPTS, iteration, settings, meter)
    batches = list(ppo.minibatches(len(sampled), settings, iteration, 0))
    rows = [pack([sampled[i][0] for i in batch], settings.row_tokens) for batch in batches]
    flat = [row for batch in rows for row in batch]
    rollouts = ppo.score_rollouts(opened.trainee, opened.reward, opened.value, sampled, flat, settings)
    ppo.advantages_of(rollouts, settings)
    return rollouts, rows


def optimizer_of(opened):
    return make_optimizer([list(group.values()) for group in opened.groups], 0.0, eps=1e-5)


# The start ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kl_is_exactly_0_and_ratios_exactly_1_at_the_start(temperature, chat, tmp_path):
    checks, rounds = train(stage(chat, tmp_path, iterations=2, temperature=temperature))
    assert checks == {"kl_at_start": 0.0, "ratio_off_1_at_start": 0.0}
    assert (rounds[0]["kl"], rounds[0]["kl_per_token"], rounds[0]["k3_per_token"]) == (0.0, 0.0, 0.0)
    assert rounds[1]["k3_per_token"] > 0


@pytest.mark.parametrize("iteration", [0, 1])
def test_nothing_is_clipped_in_the_first_minibatch_of_any_round(iteration, chat):
    opened = stage(chat)
    randomise(opened.trunk, "ppo", seed=8)  # a policy that has moved, as in a later round
    rollouts, rows = rollouts_of(opened, iteration)
    sums = ppo.update_step(opened.trainee, opened.value, rollouts, rows[0], optimizer_of(opened), iteration, opened.settings)
    assert sums["largest_log_ratio"] == (0.0, 1)
    assert sums["approx_kl"][0] == sums["clip_share"][0] == sums["value_clip_share"][0] == 0


def test_log_ratios_stay_0_while_nothing_is_learned(chat, tmp_path):
    """Rates too small to show, three rounds: KL to the reference stays 0 to the bit, the second pass is within rounding."""
    checks, rounds = train(stage(chat, tmp_path, learning_rate=1e-30, value_learning_rate=1e-30))
    assert checks["ratio_off_1_at_start"] == 0
    for row in rounds:
        assert row["kl"] == row["k3_per_token"] == 0
        assert row["approx_kl"] < 1e-10
        assert row["clip_share"] == 0
        assert row["largest_log_ratio"] < 1e-5


def test_the_value_role_starts_with_the_reward_model_s_adapter_and_a_value_of_0(chat):
    """With the reward model's head in place of its zeros, it gives the reward model's scores of what is there so far."""
    opened = stage(chat)
    trunk, head = opened.trunk, opened.trunk.heads[ppo.VALUE]
    examples = [Example(0, PROMPTS[0], ((9, 8, 7), (5, 1))), Example(1, PROMPTS[1], ((6, 1),))]
    before_each_token = [Example(0, PROMPTS[0][:-1], (PROMPTS[0][-1:], (*PROMPTS[0][-1:], 9), (*PROMPTS[0][-1:], 9, 8)))]
    with torch.no_grad():
        reward = forward_head(trunk, opened.reward, make_row(examples))
        assert forward_head(trunk, opened.value, make_row(examples)).values.tolist() == [0.0] * 7
        head.load_state_dict(trunk.heads["reward"].state_dict())
        value = forward_head(trunk, opened.value, make_row(examples))
        assert torch.equal(value.scores, reward.scores)
        assert torch.equal(value.values, reward.values)
        so_far = forward_head(trunk, opened.reward, make_row(before_each_token))
        torch.testing.assert_close(so_far.scores, value.values[:3], atol=1e-5, rtol=1e-5)
        randomise(trunk, ppo.VALUE, seed=9)
        head.weight += 1
        assert torch.equal(forward_head(trunk, opened.reward, make_row(examples)).scores, reward.scores)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rollout_log_probabilities_are_the_sampler_s(temperature, chat):
    """Sanity test 1: float32, an adapter merged for sampling and stacked for scoring."""
    opened = stage(chat, temperature=temperature)
    randomise(opened.trunk, "ppo", seed=8)
    assert opened.sampler.copy is not None
    rollouts, _ = rollouts_of(opened)
    for rollout in rollouts:
        sampled = torch.tensor([logprob for completion in rollout.completions for logprob in completion.logprobs])
        torch.testing.assert_close(rollout.old_logprobs, sampled, atol=2e-5, rtol=1e-5)
        assert rollout.example.completions == tuple(completion.ids for completion in rollout.completions)


def test_sampling_through_adapters_gives_the_merged_sampler_s_completions(chat):
    completions = []
    for merged in (True, False):
        opened = stage(chat, merged_sampler=merged)
        randomise(opened.trunk, "ppo", seed=8)
        assert (opened.sampler.copy is not None) is merged
        completions.append([rollout.example.completions for rollout in rollouts_of(opened)[0]])
    assert completions[0] == completions[1]


# What must not move ---------------------------------------------------------------------------------------------------


def test_reference_reward_model_and_base_are_bit_identical_after_training(chat, tmp_path):
    opened = stage(chat, tmp_path, learning_rate=1e-2)
    trained = {id(parameter) for group in opened.groups for parameter in group.values()}
    frozen = [p for p in [*opened.trunk.model.parameters(), *opened.trunk.heads.parameters()] if id(p) not in trained]
    before = [parameter.clone() for parameter in frozen]
    start = [parameter.clone() for group in opened.groups for parameter in group.values()]
    row = make_row([Example(0, PROMPTS[2], ((9, 8, 7), (5, 1)))])

    def outputs():
        with torch.no_grad():
            scores = forward_head(opened.trunk, opened.reward, row)
            return [forward(opened.trunk, role, row).logprobs for role in (opened.trainee.before, Role())] + [*scores]

    outputs_before = outputs()
    train(opened)
    assert all(torch.equal(one, other) for one, other in zip(outputs(), outputs_before, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(frozen, before, strict=True))
    assert all(parameter.grad is None for parameter in frozen)
    ends = [parameter for group in opened.groups for parameter in group.values()]
    assert not any(torch.equal(one, other) for one, other in zip(ends, start, strict=True))


def test_a_killed_and_resumed_training_ends_with_the_same_bytes(chat, tmp_path):
    class Killed(Meter):
        def step(self, step, metrics, counted):
            super().step(step, metrics, counted)
            if step == 2:
                raise KeyboardInterrupt

    for name in ("unbroken", "killed"):
        (tmp_path / name).mkdir()
    unbroken = stage(chat, tmp_path / "unbroken", iterations=4)
    checks, rounds = train(unbroken)
    killed = stage(chat, tmp_path / "killed", iterations=4)
    killed.job.meter = lambda *shown: Killed("ppo", tmp_path / "killed", shown)
    with pytest.raises(KeyboardInterrupt):
        train(killed)
    torch.rand(3)
    resumed = stage(chat, tmp_path / "killed", iterations=4)
    again, rounds_again = train(resumed)
    assert again == checks
    for group, other in zip(unbroken.groups, resumed.groups, strict=True):
        assert all(torch.equal(other[name], parameter) for name, parameter in group.items())
    assert [{**row, "seconds": 0} for row in rounds_again] == [{**row, "seconds": 0} for row in rounds]
    samples = [sorted((path.name, path.read_text()) for path in (tmp_path / run / "samples").iterdir()) for run in ("unbroken", "killed")]
    assert samples[0] == samples[1]


# Steps, minibatches and prompts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (2, 2), (3, 5), (2, 4)])
def test_optimizer_steps_are_rounds_times_epochs_times_minibatches(epochs, minibatches, chat, tmp_path):
    train(stage(chat, tmp_path, iterations=2, epochs=epochs, minibatches=minibatches))
    with safe_open(tmp_path / "checkpoint.safetensors", framework="pt") as file:
        steps = {int(file.get_tensor(name)) for name in file.keys() if name.startswith("optimizer/step/")}  # noqa: SIM118
    assert steps == {2 * epochs * minibatches}


@pytest.mark.parametrize("minibatches", [1, 2, 4, 16])
def test_a_round_is_cut_into_as_many_minibatches_as_asked_for(minibatches):
    """Each of the round's prompts in exactly one; sizes differ by one at most; never more parts than prompts."""
    settings = make_settings(minibatches=minibatches)
    for count in range(1, 20):
        batches = list(ppo.minibatches(count, settings, 0, 0))
        assert sorted(i for batch in batches for i in batch) == list(range(count))
        assert len(batches) == min(minibatches, count), (count, minibatches)
        sizes = {len(batch) for batch in batches}
        assert max(sizes) - min(sizes) <= 1, (count, minibatches)


def test_every_pass_has_an_order_of_its_own():
    settings = make_settings(minibatches=3)
    orders = [str(list(ppo.minibatches(12, settings, iteration, epoch))) for iteration in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9
    assert str(list(ppo.minibatches(12, settings, 2, 1))) == orders[7]


def test_no_prompt_comes_again_before_all_have_come(chat):
    """Rounds of 2 from 5 prompts: places 0-4, 5-9, ... each hold all five."""
    opened = stage(chat, prompts_per_iteration=2, completions_per_prompt=1, max_new_tokens=1)
    meter = SimpleNamespace(phase=lambda text: None)
    rounds = [ppo._sample(opened.trainee, opened.sampler, PROMPTS, iteration, opened.settings, meter) for iteration in range(10)]
    order = [example.prompt for sampled in rounds for example, _ in sampled]
    for start in range(0, 20, 5):
        assert sorted(order[start : start + 5]) == sorted(PROMPTS)


# Scores, rewards, advantages --------------------------------------------------------------------------------------------


def test_a_missing_end_of_turn_replaces_the_score(chat):
    completions = [Completion((5, 1), (0.0, 0.0), True), Completion((5, 6), (0.0, 0.0), False), Completion((1,), (0.0,), True)]
    scores = torch.tensor([2.0, 3.0, -4.0])
    empty = torch.zeros(5)
    example = Example(0, (3,), ((5, 1), (5, 6), (1,)))
    rollout = ppo.Rollout(example, completions, empty, empty, empty, empty, scores, empty, empty)
    assert ppo.final_scores(rollout, -1.0).tolist() == [2.0, -1.0, -4.0]
    assert ppo.final_scores(rollout, None).tolist() == [2.0, 3.0, -4.0]
    assert rollout.scores.tolist() == [2.0, 3.0, -4.0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gamma": 0.9, "gae_lambda": 0.5, "kl_coef": 0.3, "missing_eos_score": None},
        {"gae_lambda": 0.95, "compare_completions": False},
    ],
)
def test_advantages_of_a_round_are_the_brute_force_sums_whitened(changes, chat):
    """A_t = sum over k of (gamma lambda)^k delta_{t+k}, completion by completion; mean 0 and variance 1 over the round."""
    opened = stage(chat, **changes)
    randomise(opened.trunk, "ppo", seed=8)
    settings = opened.settings
    rollouts, _ = rollouts_of(opened)
    raw, returns = [], []
    for rollout in rollouts:
        at = 0
        cut = [c.ids[-1] not in STOPS and settings.missing_eos_score is not None for c in rollout.completions]
        final = [settings.missing_eos_score if c else score for c, score in zip(cut, rollout.scores.tolist(), strict=True)]
        if settings.compare_completions:
            final = [score - (sum(final) - score) / (len(final) - 1) for score in final]
        for completion, score in zip(rollout.completions, final, strict=True):
            length = len(completion.ids)
            part = slice(at, at + length)
            at += length
            kl, values = (rollout.old_logprobs - rollout.ref_logprobs)[part].tolist(), rollout.old_values[part].tolist()
            rewards = [-settings.kl_coef * k for k in kl]
            rewards[-1] += score
            deltas = [r + settings.gamma * v_next - v for r, v, v_next in zip(rewards, values, [*values[1:], 0.0], strict=True)]
            weight = settings.gamma * settings.gae_lambda
            own = [sum(weight ** (k - t) * deltas[k] for k in range(t, length)) for t in range(length)]
            raw += own
            returns += [a + v for a, v in zip(own, values, strict=True)]
    assert len({len(c.ids) for r in rollouts for c in r.completions}) > 3
    raw, found = torch.tensor(raw), torch.cat([rollout.advantages for rollout in rollouts])
    torch.testing.assert_close(found, (raw - raw.mean()) / raw.std(unbiased=False), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat([rollout.returns for rollout in rollouts]), torch.tensor(returns), atol=1e-5, rtol=1e-5)
    assert float(found.mean()) == pytest.approx(0, abs=1e-6)
    assert float(found.var(unbiased=False)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_an_update_moves_along_the_gradient_of_the_stated_loss(temperature, chat):
    """Plain SGD at rate 1, so the weights move by minus the gradient of the clipped losses, summed and divided by tokens."""
    changes = {"temperature": temperature, "learning_rate": 1.0, "value_learning_rate": 1.0, "warmup": 0.0, "max_grad_norm": 1e9}
    opened = stage(chat, value_coef=0.3, value_clip=0.05, **changes)
    opened.trunk.heads[ppo.VALUE].load_state_dict(opened.trunk.heads["reward"].state_dict())  # one of zeros hides the adapter
    rollouts, _ = rollouts_of(opened)
    randomise(opened.trunk, "ppo", seed=8, spread=0.02)  # the policy moves on, so that ratios are not 1 and some are clipped
    randomise(opened.trunk, ppo.VALUE, seed=9, spread=0.02)
    tokens, losses, clipped = 0, [], []
    for rollout in rollouts:
        at = 0
        for completion in rollout.example.completions:
            part = slice(at, at + len(completion))
            at, tokens = part.stop, tokens + len(completion)
            ids = torch.tensor([rollout.example.prompt + completion])
            before = slice(len(rollout.example.prompt) - 1, ids.shape[1] - 1)
            with opened.trunk.switched_to(opened.trainee.role):
                logits = opened.trunk.model(ids, use_cache=False).logits[0, before] / temperature
            logprobs = torch.log_softmax(logits, -1)[range(len(completion)), list(completion)]
            with opened.trunk.switched_to(opened.value):
                hidden = opened.trunk.model.model(ids, use_cache=False).last_hidden_state[0, before]
            head = opened.trunk.heads[ppo.VALUE]
            values = hidden @ head.weight - head.offset
            ratio, advantage = torch.exp(logprobs - rollout.old_logprobs[part]), rollout.advantages[part]
            policy = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            old, target = rollout.old_values[part], rollout.returns[part]
            near = torch.minimum(torch.maximum(values, old - 0.05), old + 0.05)
            value = 0.5 * torch.maximum((values - target) ** 2, (near - target) ** 2)
            losses += [policy.sum(), 0.3 * value.sum()]
            clipped.append((ratio * advantage > ratio.clamp(0.8, 1.2) * advantage).float().sum())
    (sum(losses) / tokens).backward()
    trained = {**opened.groups[0], **opened.groups[1]}
    expected = {name: parameter.grad.clone() for name, parameter in trained.items()}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    for parameter in trained.values():
        parameter.grad = None
    optimizer = torch.optim.SGD([{"params": list(group.values())} for group in opened.groups], lr=0.0)
    rows = pack([rollout.example for rollout in rollouts], 24)
    assert len(rows) > 2
    sums = ppo.update_step(opened.trainee, opened.value, rollouts, rows, optimizer, 0, opened.settings)
    assert sums["clip_share"] == (float(sum(clipped)), tokens)
    assert 0 < float(sum(clipped)) < tokens
    for name, gradient in expected.items():
        moved = before[name] - trained[name].detach()
        assert float((moved - gradient).abs().max()) <= 1e-4 * float(gradient.abs().max()), name


# What must rise, and what must not ----------------------------------------------------------------------------------------


def with_reward(monkeypatch, count):
    """Replace the reward model's scores with a function of each completion's ids."""
    real = ppo.forward_head

    def forward_head_with_toy_scores(trunk, role, row):
        outputs = real(trunk, role, row)
        if role.head != "reward":
            return outputs
        return outputs._replace(scores=torch.tensor([count(ids) for example in row.examples for ids in example.completions]))

    monkeypatch.setattr(ppo, "forward_head", forward_head_with_toy_scores)


TOY = {
    "iterations": 15,
    "prompts_per_iteration": 5,
    "completions_per_prompt": 12,
    "max_new_tokens": 6,
    "row_tokens": 1024,
    "learning_rate": 3e-3,
    "value_learning_rate": 1e-2,
    "missing_eos_score": None,
}


@pytest.mark.parametrize("seed", [0, 1])
def test_a_toy_reward_rises(seed, chat, tmp_path, monkeypatch):
    """The share of a completion's tokens that are below 100."""
    with_reward(monkeypatch, lambda ids: sum(i < 100 for i in ids) / len(ids))
    _, rounds = train(stage(chat, tmp_path, seed=seed, **TOY))
    scores = [row["score"] for row in rounds]
    print(f"toy reward, seed {seed}: {scores[0]:.2f} to {scores[-1]:.2f}, kl {rounds[-1]['kl']:.2f}")
    assert sum(scores[:3]) / 3 < 0.3
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.15


def test_a_constant_reward_keeps_kl_small(chat, tmp_path, monkeypatch):
    """Values begin wrong, so the policy wanders at first; with nothing to gain, the penalty holds it."""
    with_reward(monkeypatch, lambda ids: 1.0)
    _, rounds = train(stage(chat, tmp_path, **{**TOY, "learning_rate": 1e-3, "kl_coef": 0.5}))
    kl = [row["kl"] for row in rounds]
    print(f"constant reward: kl {[round(k, 2) for k in kl]}")
    assert max(kl) < 0.5


def test_explained_rewards_bring_the_values_near_the_returns(chat, tmp_path, monkeypatch):
    """A constant score of 2 and no KL penalty: every return is near 2, and so is the value in the end."""
    with_reward(monkeypatch, lambda ids: 2.0)
    alone = {"compare_completions": False}
    _, rounds = train(
        stage(chat, tmp_path, **{**TOY, "kl_coef": 0.0, "value_coef": 1.0, "learning_rate": 1e-30, "value_clip": 10.0, **alone})
    )
    assert abs(rounds[0]["value"] - 2) > 0.5
    assert abs(rounds[-1]["value"] - 2) < 0.2


@pytest.mark.parametrize("name", ["value", "reward", "sft", "mlp"])
def test_the_stage_s_name_plays_no_part(name, small_run, tiny_base, data, tmp_path):
    """Also where it is that of an adapter PPO makes, or of one it stands on: the same weights come out."""
    adapters = []
    for stage_name in ("ppo", name):
        recipe = Recipe("named", base=str(tiny_base), dtype="float32")
        recipe.ppo(
            policy=recipe.load(small_run / "sft"),
            reward_model=recipe.load(small_run / "reward"),
            prompts=data / "prompts.jsonl",
            name=stage_name,
            **{"lora": Lora(rank=4), "iterations": 2, "prompts_per_iteration": 2, "max_new_tokens": 4, "row_tokens": 64},
        )
        run = recipe.run(tmp_path / f"run-{stage_name}")
        adapters.append(load_file(run / stage_name / "adapter" / "adapter_model.safetensors"))
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(adapters[1][key], tensor) for key, tensor in adapters[0].items())


# What is refused ------------------------------------------------------------------------------------------------------------


def artifact(name, form):
    return Artifact(Path(name), {"name": name, "identity": name * 8, "kind": "policy", "parents": {}, "model": {"form": form}})


BASE = Base("tiny", "folder", "tiny", None, "folder:base")


@pytest.mark.parametrize(
    ("policy", "reward_form"), [(None, "full"), (artifact("full", "full"), "adapter"), (artifact("sft", "adapter"), "full")]
)
def test_a_reward_model_on_other_weights_is_refused(policy, reward_form):
    reward = artifact("reward", reward_form)
    job = Job("ppo", make_settings(), BASE, {"policy": policy, "reward_model": reward}, {}, Path())
    with pytest.raises(AlignError, match="ppo: the reward model 'reward' stands on other weights .* than the policy"):
        ppo._check_same_trunk(job, reward)


def test_a_reward_model_on_the_same_weights_is_taken():
    reward = artifact("reward", "adapter")
    ppo._check_same_trunk(Job("ppo", make_settings(), BASE, {"policy": artifact("sft", "adapter")}, {}, Path()), reward)


def test_ppo_without_an_adapter_is_refused(tiny_base, small_run, data):
    recipe = Recipe("full", base=str(tiny_base))
    policy, reward = recipe.load(small_run / "sft"), recipe.load(small_run / "reward")
    with pytest.raises(AlignError, match=r"ppo.*lora"):
        recipe.ppo(policy=policy, reward_model=reward, prompts=data / "prompts.jsonl", lora=None)


def test_numbers_that_are_not_finite_stop_the_round(chat, tmp_path, monkeypatch):
    with_reward(monkeypatch, lambda ids: float("nan"))
    with pytest.raises(AlignError, match=r"in round 1 policy_loss, value_loss.* is not a finite number"):
        train(stage(chat, tmp_path, missing_eos_score=None))
    assert not (tmp_path / "checkpoint.safetensors").exists()
