"""PPO on the tiny model: what must be true at the start, what must not move, and that packing, padding and kills change nothing."""

import json
import math
import statistics
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from conftest import randomise
from ppo_session import (
    IDS,
    PROMPTS,
    STOPS,
    killed_at,
    make_settings,
    open_tiny,
    rollouts_of,
    train,
    trunk_of,
    without_times,
)
from safetensors import safe_open

from align.learn.prompts import prompts_of_round
from align.learn.rollouts import estimate_advantages, score_rollouts
from align.learn.session import VALUE
from align.learn.updates import minibatches, update_step
from align.model.forward import forward, forward_head
from align.model.packing import Example, make_row, pack
from align.model.trunk import Role

ESTIMATORS = ("gae", "rloo", "grpo", "dr_grpo", "reinforce++")
FOUR_WAYS = {
    "rloo": {"estimator": "rloo"},
    "grpo, adaptive": {"estimator": "grpo", "kl_target": 0.1, "kl_horizon": 20},
    "gae, everything": {
        "kl_target": 0.1,
        "kl_horizon": 20,
        "centre_scores": True,
        "scale_scores": True,
        "entropy_coef": 0.01,
        "kl_loss_coef": 0.1,
        "value_warmup": 1,
        "max_update_kl": 1e-3,
        "holdout": 0.3,
        "eval_every": 1,
        "learning_rate": 1e-2,
    },
}

# The start ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kl_is_exactly_0_and_ratios_exactly_1_at_the_start(estimator, temperature, chat, tmp_path):
    state, rounds = train(open_tiny(chat, tmp_path, iterations=2, temperature=temperature, estimator=estimator))
    assert state.checks == {"change_at_start": 0.0, "kl_at_start": 0.0, "ratio_off_1_at_start": 0.0}
    assert (rounds[0]["kl"], rounds[0]["kl_k3"], rounds[0]["kl_per_token"], rounds[0]["k3_per_token"]) == (0.0, 0.0, 0.0, 0.0)
    assert rounds[1]["k3_per_token"] > 0


@pytest.mark.parametrize("iteration", [0, 1])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_nothing_is_clipped_in_the_first_minibatch_of_any_round(iteration, entropy_coef, chat):
    session = open_tiny(chat, entropy_coef=entropy_coef)
    randomise(trunk_of(session), "ppo", seed=8)  # a policy that has moved, as in a later round
    rollouts, rows, _ = rollouts_of(session, iteration)
    found = update_step(session.learner, rollouts, rows[0], iteration, 0.05)
    assert found.peaks == {"largest_log_ratio": 0.0, "ratio_max": 1.0}
    for name in ("approx_kl", "approx_kl_k1", "clip_share", "clip_share_below", "clip_share_above", "value_clip_share"):
        assert found.sums[name][0] == 0
    assert found.sums["ratio"][0] == found.sums["ratio"][1]


def test_log_ratios_stay_0_while_nothing_is_learned(chat, tmp_path):
    """Rates too small to show, three rounds: KL to the reference stays 0 to the bit, the second pass is within rounding."""
    state, rounds = train(open_tiny(chat, tmp_path, learning_rate=1e-30, value_learning_rate=1e-30))
    assert state.checks["ratio_off_1_at_start"] == 0
    for row in rounds:
        assert row["kl"] == row["k3_per_token"] == 0
        assert row["approx_kl"] < 1e-10
        assert row["clip_share"] == 0
        assert row["largest_log_ratio"] < 1e-5


def test_the_value_role_starts_with_the_reward_model_s_adapter_and_a_value_of_0(chat):
    """With the reward model's head in place of its zeros, it gives the reward model's scores of what is there so far."""
    session = open_tiny(chat)
    trunk, value, reward_role = trunk_of(session), session.learner.value, Role(("sft", "reward"), "reward")
    head = trunk.heads[VALUE]
    examples = [Example(0, IDS[0], ((9, 8, 7), (5, 1))), Example(1, IDS[1], ((6, 1),))]
    before_each_token = [Example(0, IDS[0][:-1], (IDS[0][-1:], (*IDS[0][-1:], 9), (*IDS[0][-1:], 9, 8)))]
    with torch.no_grad():
        reward = forward_head(trunk, reward_role, make_row(examples))
        assert forward_head(trunk, value, make_row(examples)).values.tolist() == [0.0] * 7
        head.load_state_dict(trunk.heads["reward"].state_dict())
        own = forward_head(trunk, value, make_row(examples))
        assert torch.equal(own.scores, reward.scores)
        assert torch.equal(own.values, reward.values)
        so_far = forward_head(trunk, reward_role, make_row(before_each_token))
        torch.testing.assert_close(so_far.scores, own.values[:3], atol=1e-5, rtol=1e-5)
        randomise(trunk, VALUE, seed=9)
        head.weight += 1
        assert torch.equal(forward_head(trunk, reward_role, make_row(examples)).scores, reward.scores)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rollout_log_probabilities_are_the_sampler_s(temperature, chat):
    """float32, an adapter merged for sampling and stacked for scoring."""
    session = open_tiny(chat, temperature=temperature)
    randomise(trunk_of(session), "ppo", seed=8)
    assert session.sampler.copy is not None
    rollouts, _, _ = rollouts_of(session)
    for rollout in rollouts:
        sampled = torch.tensor([logprob for completion in rollout.completions for logprob in completion.logprobs])
        torch.testing.assert_close(rollout.old_logprobs, sampled, atol=2e-5, rtol=1e-5)
        assert rollout.sampled.example.completions == tuple(completion.ids for completion in rollout.completions)


def test_sampling_through_adapters_gives_the_merged_sampler_s_completions(chat):
    completions = []
    for merged in (True, False):
        session = open_tiny(chat, merged_sampler=merged)
        randomise(trunk_of(session), "ppo", seed=8)
        assert (session.sampler.copy is not None) is merged
        completions.append([rollout.sampled.example.completions for rollout in rollouts_of(session)[0]])
    assert completions[0] == completions[1]


# What must change nothing -----------------------------------------------------------------------------------------------


def test_a_completion_is_measured_alike_in_any_company(chat):
    """Each alone in a row, against all in shared rows: log-probabilities, values, scores, the value after the last token."""
    session = open_tiny(chat)
    trunk = trunk_of(session)
    randomise(trunk, "ppo", seed=8)
    trunk.heads[VALUE].load_state_dict(trunk.heads["reward"].state_dict())
    rollouts, rows, scores = rollouts_of(session)
    assert any(len(row.examples) > 1 for batch in rows for row in batch)
    sampled = [rollout.sampled for rollout in rollouts]
    alone = [make_row([one.example]) for one in sampled]
    others = score_rollouts(session.learner.trainee, session.learner.value, sampled, alone, 1.0)
    for one, other in zip(rollouts, others, strict=True):
        for name in ("old_logprobs", "ref_logprobs", "old_values", "values_after", "entropy"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(session.scorers["reward"](sampled, alone), scores.raw, atol=1e-5, rtol=1e-5)


def test_a_pad_token_that_is_the_end_token_changes_nothing(chat, tmp_path):
    """Masks come from lengths, so which token pads plays no part."""
    ends = deepcopy(chat.tokenizer)
    ends.pad_token = ends.eos_token
    assert chat.tokenizer.pad_token_id != chat.tokenizer.eos_token_id == ends.pad_token_id
    parameters, metrics = [], []
    for number, tokenizer in enumerate((chat.tokenizer, ends)):
        (tmp_path / str(number)).mkdir()
        session = open_tiny(replace(chat, tokenizer=tokenizer), tmp_path / str(number))
        trunk_of(session).model.config.pad_token_id = tokenizer.pad_token_id
        metrics.append([without_times(row) for row in train(session)[1]])
        parameters.append(session.parameters)
    assert metrics[0] == metrics[1]
    assert all(torch.equal(parameters[1][name], parameter) for name, parameter in parameters[0].items())


def gradients_after(session, rollouts, rows):
    """Gradients of one step on those rows, read from plain SGD at rate 1."""
    before = {name: parameter.detach().clone() for name, parameter in session.parameters.items()}
    groups = [group["params"] for group in session.learner.optimizer.param_groups]
    session.learner.optimizer = torch.optim.SGD([{"params": group} for group in groups], lr=0.0)
    update_step(session.learner, rollouts, rows, 0, 0.05)
    return {name: before[name] - parameter.detach() for name, parameter in session.parameters.items()}


SGD = {"learning_rate": 1.0, "value_learning_rate": 1.0, "warmup": 0.0, "max_grad_norm": 1e9}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_one_row_of_all_gives_the_gradient_of_many_rows(estimator, chat):
    """Losses are divided by what the whole step counts, so a minibatch is the same in one row and in one row for each prompt."""
    found = []
    for row_tokens in (4096, 16):
        session = open_tiny(chat, estimator=estimator, **SGD)
        randomise(trunk_of(session), "ppo", seed=8)
        rollouts, _, _ = rollouts_of(session)
        rows = pack([rollout.sampled.example for rollout in rollouts], row_tokens)
        assert len(rows) == (1 if row_tokens == 4096 else 5)
        found.append(gradients_after(session, rollouts, rows))
    for name, gradient in found[0].items():
        assert float((found[1][name] - gradient).abs().max()) <= 1e-4 * float(gradient.abs().max()), name


def test_activations_computed_again_give_the_same_gradient(chat):
    """With gradient checkpointing each role's backward pass runs under its own adapters."""
    found = []
    for again in (False, True):
        session = open_tiny(chat, gradient_checkpointing=again, entropy_coef=0.01, **SGD)
        randomise(trunk_of(session), "ppo", seed=8)
        rollouts, rows, _ = rollouts_of(session)
        found.append(gradients_after(session, rollouts, rows[0]))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-7, rtol=1e-5)


def test_reference_reward_model_and_base_are_bit_identical_after_training(chat, tmp_path):
    session = open_tiny(chat, tmp_path, learning_rate=1e-2)
    trunk = trunk_of(session)
    trained = {id(parameter) for parameter in session.parameters.values()}
    frozen = [p for p in [*trunk.model.parameters(), *trunk.heads.parameters()] if id(p) not in trained]
    before = [parameter.clone() for parameter in frozen]
    start = [parameter.clone() for parameter in session.parameters.values()]
    row = make_row([Example(0, IDS[2], ((9, 8, 7), (5, 1)))])

    def outputs():
        with torch.no_grad():
            scores = forward_head(trunk, Role(("sft", "reward"), "reward"), row)
            return [forward(trunk, role, row).logprobs for role in (session.learner.trainee.before, Role())] + [*scores]

    outputs_before = outputs()
    train(session)
    assert all(torch.equal(one, other) for one, other in zip(outputs(), outputs_before, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(frozen, before, strict=True))
    assert all(parameter.grad is None for parameter in frozen)
    assert not any(torch.equal(one, other) for one, other in zip(session.parameters.values(), start, strict=True))


@pytest.mark.parametrize("changes", [{}, *FOUR_WAYS.values()], ids=["as it is", *FOUR_WAYS])
def test_a_killed_and_resumed_training_ends_with_the_same_bytes(changes, chat, tmp_path):
    """With every kind of state there is: weights, optimizer, KL coefficient, running scores, evaluations, the best adapter."""
    heldout = PROMPTS[3:] if "holdout" in changes else ()
    for name in ("unbroken", "killed"):
        (tmp_path / name).mkdir()
    unbroken = open_tiny(chat, tmp_path / "unbroken", heldout=heldout, iterations=4, **changes)
    state, rounds = train(unbroken)
    with pytest.raises(KeyboardInterrupt):
        train(killed_at(open_tiny(chat, tmp_path / "killed", heldout=heldout, iterations=4, **changes), 3))
    torch.rand(3)
    resumed = open_tiny(chat, tmp_path / "killed", heldout=heldout, iterations=4, **changes)
    again, rounds_again = train(resumed)
    assert (again.checks, again.kl_coef, again.running, again.evaluations, again.watch) == (
        state.checks,
        state.kl_coef,
        state.running,
        state.evaluations,
        state.watch,
    )
    assert all(torch.equal(resumed.parameters[name], parameter) for name, parameter in unbroken.parameters.items())
    assert [without_times(row) for row in rounds_again] == [without_times(row) for row in rounds]
    samples = [sorted((path.name, path.read_text()) for path in (tmp_path / run / "samples").iterdir()) for run in ("unbroken", "killed")]
    assert samples[0] == samples[1]
    if heldout:
        assert len(state.evaluations.points) == 5
        assert state.kl_coef != unbroken.settings.kl_coef


# Steps, minibatches and prompts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (2, 2), (3, 5), (2, 4)])
def test_optimizer_steps_are_rounds_times_epochs_times_minibatches(epochs, minibatches, chat, tmp_path):
    _, rounds = train(open_tiny(chat, tmp_path, iterations=2, epochs=epochs, minibatches=minibatches))
    with safe_open(tmp_path / "checkpoint.safetensors", framework="pt") as file:
        steps = {int(file.get_tensor(name)) for name in file.keys() if name.startswith("optimizer/step/")}  # noqa: SIM118
    assert steps == {2 * epochs * minibatches}
    assert [row["updates"] for row in rounds] == [epochs * minibatches] * 2


@pytest.mark.parametrize("parts", [1, 2, 4, 16])
def test_a_round_is_cut_into_as_many_minibatches_as_asked_for(parts):
    """Each of the round's prompts in exactly one; sizes differ by one at most; never more parts than prompts."""
    settings = make_settings(minibatches=parts)
    for count in range(1, 20):
        batches = list(minibatches(count, settings, 0, 0))
        assert sorted(i for batch in batches for i in batch) == list(range(count))
        assert len(batches) == min(parts, count), (count, parts)
        sizes = {len(batch) for batch in batches}
        assert max(sizes) - min(sizes) <= 1, (count, parts)


def test_every_pass_has_an_order_of_its_own():
    settings = make_settings(minibatches=3)
    orders = [str(list(minibatches(12, settings, iteration, epoch))) for iteration in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9
    assert str(list(minibatches(12, settings, 2, 1))) == orders[7]


def test_no_prompt_comes_again_before_all_have_come():
    """Rounds of 2 from 5 prompts: places 0-4, 5-9, ... each hold all five."""
    settings = make_settings(prompts_per_iteration=2)
    order = [prompt.index for iteration in range(10) for prompt in prompts_of_round(PROMPTS, iteration, settings)]
    for start in range(0, 20, 5):
        assert sorted(order[start : start + 5]) == list(range(5))


# Advantages of a round ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gamma": 0.9, "gae_lambda": 0.5, "kl_coef": 0.3, "missing_eos_score": None},
        {"gae_lambda": 0.95, "compare_completions": False, "length_penalty": 0.1},
        {"on_cut": "bootstrap", "gamma": 0.9, "whiten_rewards": True},
        {"on_cut": "leave_out"},
    ],
)
def test_advantages_of_a_round_are_the_brute_force_sums_whitened_or_scaled(changes, chat):
    """A_t = sum over k of (gamma lambda)^k delta_{t+k}, completion by completion; scaled to 1 over what counts, with mean 0 where
    scores were not compared within their prompt."""
    session = open_tiny(chat, **changes)
    trunk = trunk_of(session)
    randomise(trunk, "ppo", seed=8)
    trunk.heads[VALUE].load_state_dict(trunk.heads["reward"].state_dict())
    settings = session.settings
    rollouts, _, scores = rollouts_of(session)
    raw_scores, rewards, values, cuts = scores.raw.tolist(), [], [], []
    for rollout in rollouts:
        cut = [c.ids[-1] not in STOPS for c in rollout.completions]
        cuts += cut
        replaced = settings.missing_eos_score is not None
        final = [settings.missing_eos_score if c and replaced else score for c, score in zip(cut, raw_scores, strict=False)]
        del raw_scores[: len(cut)]
        final = [score - settings.length_penalty * length for score, length in zip(final, rollout.lengths, strict=True)]
        if settings.compare_completions:
            final = [score - (sum(final) - score) / (len(final) - 1) for score in final]
        at = 0
        for number, length in enumerate(rollout.lengths):
            part = slice(at, at := at + length)
            kl = (rollout.old_logprobs - rollout.ref_logprobs)[part].tolist()
            rewards.append([-settings.kl_coef * k for k in kl])
            after = settings.gamma * float(rollout.values_after[number])
            rewards[-1][-1] += after if cut[number] and settings.on_cut == "bootstrap" else final[number]
            values.append(rollout.old_values[part].tolist())
    if settings.whiten_rewards:
        flat = [reward for of_completion in rewards for reward in of_completion]
        mean, deviation = statistics.fmean(flat), statistics.pstdev(flat)
        rewards = [[(reward - mean) / deviation + mean for reward in of_completion] for of_completion in rewards]
    raw, returns, counted = [], [], []
    for of_completion, v, cut in zip(rewards, values, cuts, strict=True):
        deltas = [r + settings.gamma * v_next - now for r, now, v_next in zip(of_completion, v, [*v[1:], 0.0], strict=True)]
        weight = settings.gamma * settings.gae_lambda
        own = [sum(weight ** (k - t) * deltas[k] for k in range(t, len(v))) for t in range(len(v))]
        raw += own
        returns += [a + now for a, now in zip(own, v, strict=True)]
        counted += [not (cut and settings.on_cut == "leave_out")] * len(v)
    assert len({length for r in rollouts for length in r.lengths}) > 3
    assert any(cuts)
    assert not all(cuts)
    raw, counted = torch.tensor(raw), torch.tensor(counted)
    found, weights = torch.cat([r.advantages for r in rollouts]), torch.cat([r.weights for r in rollouts])
    assert torch.equal(weights > 0, counted)
    shifted = raw if settings.compare_completions else raw - raw[counted].mean()
    expected = shifted / shifted[counted].square().mean().sqrt()
    torch.testing.assert_close(found[counted], expected[counted], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat([r.returns for r in rollouts]), torch.tensor(returns), atol=1e-5, rtol=1e-5)
    assert float(found[counted].square().mean()) == pytest.approx(1, abs=1e-4)
    assert (abs(float(found[counted].mean())) < 1e-6) == (not settings.compare_completions)


@pytest.mark.parametrize("estimator", ["gae", "reinforce++"])
def test_a_prompt_whose_completions_all_score_alike_teaches_nothing(estimator, chat):
    """Before the value has learned anything: its advantages are exactly 0, whatever the others' are."""
    session = open_tiny(chat, estimator=estimator, kl_coef=0.0)
    rollouts, _, scores = rollouts_of(session)
    group = session.settings.completions_per_prompt
    for rollout in rollouts:
        rollout.old_values = torch.zeros_like(rollout.old_values)
    final = torch.full_like(scores.final, 0.3)
    final[0] = 1.3  # one success, of the first prompt
    estimate_advantages(rollouts, final, 0.0, session.settings)
    assert group > 1
    assert rollouts[0].advantages.abs().min() > 0
    assert all(rollout.advantages.abs().max() == 0 for rollout in rollouts[1:])


@pytest.mark.parametrize("estimator", ESTIMATORS[1:])
def test_advantages_without_a_value_are_the_papers_sums(estimator, chat):
    """Completion by completion, in plain Python; no value role is on the trunk."""
    session = open_tiny(chat, estimator=estimator, kl_coef=0.3, gamma=0.9, compare_completions=False)
    trunk = trunk_of(session)
    randomise(trunk, "ppo", seed=8)
    assert VALUE not in trunk.heads
    assert VALUE not in trunk.peft.peft_config
    assert len(session.learner.optimizer.param_groups) == 1
    rollouts, _, scores = rollouts_of(session)
    final = iter(scores.final.tolist())
    expected = []
    for rollout in rollouts:
        kl = [part.tolist() for part in (rollout.old_logprobs - rollout.ref_logprobs).split(rollout.lengths)]
        own = [next(final) for _ in rollout.lengths]
        if estimator == "rloo":
            own = [score - 0.3 * sum(each) for score, each in zip(own, kl, strict=True)]
            own = [score - (sum(own) - score) / 2 for score in own]
        elif estimator != "reinforce++":
            spread = statistics.stdev(own) + 1e-4 if estimator == "grpo" else 1.0
            own = [(score - statistics.fmean(own)) / spread for score in own]
        for score, each in zip(own, kl, strict=True):
            rewards = [-0.3 * k for k in each]
            rewards[-1] += score
            to_go = [sum(0.9 ** (k - t) * rewards[k] for k in range(t, len(rewards))) for t in range(len(rewards))]
            expected += to_go if estimator == "reinforce++" else [score] * len(each)
    expected = torch.tensor(expected)
    if estimator == "reinforce++":
        expected = (expected - expected.mean()) / expected.std(unbiased=False)
    torch.testing.assert_close(torch.cat([r.advantages for r in rollouts]), expected, atol=1e-4, rtol=1e-4)
    assert all(len(r.returns) == 0 for r in rollouts)


# An update ------------------------------------------------------------------------------------------------------------------

UPDATES = {
    "plain": {},
    "a low temperature": {"temperature": 0.7},
    "wider above, dual clip": {"clip_range_high": 0.4, "dual_clip": 1.3, "on_cut": "leave_out"},
    "entropy and KL in the loss": {"entropy_coef": 0.3, "kl_loss_coef": 0.7, "temperature": 0.7},
    "grpo": {"estimator": "grpo"},
    "dr_grpo": {"estimator": "dr_grpo", "kl_loss_coef": 0.2},
    "rloo": {"estimator": "rloo"},
}


@pytest.mark.parametrize("changes", UPDATES.values(), ids=UPDATES)
def test_an_update_is_that_of_a_plain_implementation_without_packing(changes, chat):
    """Plain SGD at rate 1, so the weights move by minus the gradient: of the losses as the papers have them, one sequence at a time."""
    session = open_tiny(chat, value_coef=0.3, value_clip=0.05, **SGD, **changes)
    settings, trunk, learner = session.settings, trunk_of(session), session.learner
    if learner.value:
        trunk.heads[VALUE].load_state_dict(trunk.heads["reward"].state_dict())  # one of zeros hides the adapter
    rollouts, _, _ = rollouts_of(session)
    randomise(trunk, "ppo", seed=8, spread=0.02)  # the policy moves on, so that ratios are not 1 and some are clipped
    if learner.value:
        randomise(trunk, VALUE, seed=9, spread=0.02)
    low, high = 0.2, settings.clip_range_high or 0.2
    kl_weight = settings.kl_loss_coef + (0.05 if settings.kl_in_loss else 0)
    losses, counts, below, above, tokens = [], [], 0, 0, 0
    for rollout in rollouts:
        at = 0
        for completion in rollout.completions:
            length = len(completion.ids)
            part = slice(at, at := at + length)
            if settings.on_cut == "leave_out" and not completion.ended:
                continue
            tokens += length
            ids = torch.tensor([rollout.sampled.example.prompt + completion.ids])
            before = slice(len(rollout.sampled.example.prompt) - 1, ids.shape[1] - 1)
            with trunk.switched_to(learner.trainee.role):
                logits = trunk.model(ids, use_cache=False).logits[0, before] / settings.temperature
            every = torch.log_softmax(logits, -1)
            logprobs = every[range(length), list(completion.ids)]
            ratio, advantage = torch.exp(logprobs - rollout.old_logprobs[part]), rollout.advantages[part]
            earned = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
            if settings.dual_clip:
                earned = torch.where(advantage < 0, torch.maximum(earned, settings.dual_clip * advantage), earned)
            still = earned == ratio * advantage
            below, above = below + int((~still & (ratio < 1)).sum()), above + int((~still & (ratio > 1)).sum())
            loss = -earned + kl_weight * (logprobs - rollout.ref_logprobs[part]) ** 2 / 2
            loss = loss + settings.entropy_coef * (every.exp() * every).sum(-1)
            if learner.value:
                with trunk.switched_to(learner.value):
                    hidden = trunk.model.model(ids, use_cache=False).last_hidden_state[0, before]
                values = hidden @ trunk.heads[VALUE].weight - trunk.heads[VALUE].offset
                old, target = rollout.old_values[part], rollout.returns[part]
                near = torch.minimum(torch.maximum(values, old - 0.05), old + 0.05)
                loss = loss + 0.3 * 0.5 * torch.maximum((values - target) ** 2, (near - target) ** 2)
            losses.append(loss.mean() if settings.estimator == "grpo" else loss.sum() / (8 if settings.estimator == "dr_grpo" else 1))
            counts.append(1 if settings.kl_in_loss else length)
    (sum(losses) / sum(counts)).backward()
    expected = {name: parameter.grad.clone() for name, parameter in session.parameters.items()}
    for parameter in session.parameters.values():
        parameter.grad = None
    before = {name: parameter.detach().clone() for name, parameter in session.parameters.items()}
    groups = [group["params"] for group in learner.optimizer.param_groups]
    learner.optimizer = torch.optim.SGD([{"params": group} for group in groups], lr=0.0)
    rows = pack([rollout.sampled.example for rollout in rollouts], 24)
    assert len(rows) > 2
    sums = update_step(learner, rollouts, rows, 0, 0.05).sums
    assert (sums["clip_share_below"], sums["clip_share_above"]) == ((below, tokens), (above, tokens))
    assert 0 < sums["clip_share"][0] == below + above < tokens
    for name, gradient in expected.items():
        moved = before[name] - session.parameters[name].detach()
        assert float((moved - gradient).abs().max()) <= 1e-4 * float(gradient.abs().max()), name


def test_an_epoch_ends_where_the_policy_has_moved_too_far_and_that_step_is_not_made(chat, tmp_path):
    """The first update of a round is always within the bound: its policy is the one that sampled."""
    changes = {"learning_rate": 0.05, "warmup": 0.0, "epochs": 4, "iterations": 1}
    (tmp_path / "free").mkdir()
    _, free = train(open_tiny(chat, tmp_path / "free", **changes))
    session = open_tiny(chat, tmp_path, max_update_kl=1e-4, **changes)
    _, rounds = train(session)
    assert free[0]["updates"] == 8
    assert rounds[0]["updates"] == 1
    assert all(parameter.grad is None for parameter in session.parameters.values())
    with safe_open(tmp_path / "checkpoint.safetensors", framework="pt") as file:
        assert {int(file.get_tensor(name)) for name in file.keys() if name.startswith("optimizer/step/")} == {1}  # noqa: SIM118


def test_while_the_value_warms_up_the_policy_stays_where_it_was(chat, tmp_path):
    session = open_tiny(chat, tmp_path, iterations=3, value_warmup=2)
    start = {name: parameter.clone() for name, parameter in session.parameters.items()}
    policy = session.learner.trainee.parameters
    with pytest.raises(KeyboardInterrupt):
        train(killed_at(session, 2))
    assert all(torch.equal(start[name], parameter) for name, parameter in policy.items())
    assert not any(torch.equal(start[name], parameter) for name, parameter in session.parameters.items() if name not in policy)
    session = open_tiny(chat, tmp_path, iterations=3, value_warmup=2)
    state, rounds = train(session)
    assert [row["kl"] for row in rounds] == [0, 0, 0]
    assert ["policy_loss" in row for row in rounds] == [False, False, True]
    assert state.checks["ratio_off_1_at_start"] == 0
    assert not all(torch.equal(start[name], parameter) for name, parameter in session.learner.trainee.parameters.items())


def test_a_round_in_which_nothing_counts_changes_nothing(chat, tmp_path):
    """Every completion is cut, and cut ones are left out: no gradient, and no number that is not one."""
    session = open_tiny(chat, tmp_path, iterations=1, max_new_tokens=1, on_cut="leave_out")
    object.__setattr__(session.learner.trainee.chat, "stop_ids", frozenset({10_000}))
    start = {name: parameter.clone() for name, parameter in session.parameters.items()}
    _, rounds = train(session)
    assert rounds[0]["cut"] == 1
    assert all(torch.equal(start[name], parameter) for name, parameter in session.parameters.items())
    assert "explained_variance" not in rounds[0]


# What one sees --------------------------------------------------------------------------------------------------------------


def test_metrics_of_a_round_are_those_of_its_completions(chat, tmp_path):
    """Each against its definition, in plain Python over the round's rollouts."""
    session = open_tiny(chat, tmp_path, iterations=1, kl_coef=0.3)
    randomise(trunk_of(session), "ppo", seed=8)
    rollouts, _, scores = rollouts_of(session)
    _, (row,) = train(session)
    completions = [completion for rollout in rollouts for completion in rollout.completions]
    ratios = [(r.old_logprobs - r.ref_logprobs).tolist() for r in rollouts]
    flat = [number for of_prompt in ratios for number in of_prompt]
    expected = {
        "score": statistics.fmean(scores.final.tolist()),
        "score_spread": statistics.pstdev(scores.final.tolist()),
        "raw_score": statistics.fmean(scores.raw.tolist()),
        "score/reward": statistics.fmean(scores.parts["reward"].tolist()),
        "kl": sum(flat) / 15,
        "kl_per_token": statistics.fmean(flat),
        "kl_k3": sum(math.exp(-k) - 1 + k for k in flat) / 15,
        "objective": statistics.fmean(scores.final.tolist()) - 0.3 * sum(flat) / 15,
        "length": len(flat) / 15,
        "length_min": min(len(c.ids) for c in completions),
        "length_max": max(len(c.ids) for c in completions),
        "ended": sum(c.ids[-1] in STOPS for c in completions) / 15,
        "cut": sum(c.ids[-1] not in STOPS for c in completions) / 15,
        "value": 0.0,
        "return": statistics.fmean(torch.cat([r.returns for r in rollouts]).tolist()),
        "explained_variance": 0.0,  # a value of 0 everywhere
    }
    for name, number in expected.items():
        assert row[name] == pytest.approx(number, abs=2e-5), name
    assert row["kl_coef"] == 0.3
    seen = {"policy_loss", "entropy", "approx_kl", "approx_kl_k1", "clip_share_below", "clip_share_above", "ratio", "ratio_max"}
    seen |= {"policy_grad_norm", "value_loss", "value_clip_share", "value_grad_norm", "sampler_mismatch", "learning_rate"}
    seen |= {f"{phase}_tokens_per_second" for phase in ("sampling", "scoring", "updating")}
    assert seen <= row.keys()
    assert all(math.isfinite(number) for number in row.values())


def test_samples_are_kept_every_few_rounds_and_of_the_last(chat, tmp_path):
    train(
        open_tiny(
            chat, tmp_path, iterations=6, samples_every=4, rewards={"length": lambda p, c, r: len(c), "line": lambda p, c, r: r["line"]}
        )
    )
    files = sorted((tmp_path / "samples").iterdir())
    assert [file.name for file in files] == ["round-0001.jsonl", "round-0005.jsonl", "round-0006.jsonl"]
    for file in files:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(rows) == 8
        for row in rows:
            assert row.keys() == {"prompt", "completion", "score", "score/length", "score/line", "kl", "length", "ended"}
            assert row["score/length"] == len(row["completion"])
            assert row["score"] == row["score/length"] + row["score/line"]
            assert 1 <= row["length"] <= 8
