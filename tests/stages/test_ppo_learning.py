"""What PPO must learn, what it must not, and how a run ends: on the tiny model, in seconds."""

import pytest
import torch
from conftest import randomise
from ppo_session import PROMPTS, killed_at, open_tiny, train, trunk_of, without_times

from align.learn.scores import RewardFailure
from align.stages import ppo

ESTIMATORS = ("gae", "rloo", "grpo", "dr_grpo", "reinforce++")
LEARNING = {
    "completions_per_prompt": 12,
    "row_tokens": 1024,
    "learning_rate": 1e-2,
    "value_learning_rate": 1e-2,
    "missing_eos_score": None,
    "minibatches": 1,
    "warmup": 0.0,
}


def letters(prompt, completion, row):
    """How many letters a it has: at most its tokens."""
    return completion.count("a")


# What must rise, and what must not ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_token_s_count_reaches_its_maximum(estimator, chat, tmp_path):
    """4 tokens, of which nearly all are the letter in the end; at the start one in 261.

    Which tokens are drawn depends on the processor's rounding. Half as many completions ended at 3.1 on one kind of machine.
    """
    changes = {"iterations": 32, "max_new_tokens": 4, "entropy_coef": 0.06, "kl_coef": 0.0, "completions_per_prompt": 24}
    _, rounds = train(open_tiny(chat, tmp_path, {"letters": letters}, estimator=estimator, **LEARNING | changes))
    scores = [row["score"] for row in rounds]
    assert scores[0] < 0.2
    assert sum(scores[-3:]) / 3 > 3.2, scores  # the entropy bonus keeps it from 4


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_constant_reward_leaves_the_policy_where_it_was(estimator, chat, tmp_path):
    """0.3, which has no exact binary form: no difference between completions, so no gradient at all."""
    session = open_tiny(chat, tmp_path, {"constant": lambda p, c, r: 0.3}, estimator=estimator, iterations=5, **LEARNING)
    policy = session.learner.trainee.parameters
    start = {name: parameter.clone() for name, parameter in policy.items()}
    _, rounds = train(session)
    assert [row["kl_k3"] for row in rounds] == [pytest.approx(0, abs=1e-6)] * 5
    assert all(torch.allclose(start[name], parameter, atol=1e-6, rtol=0) for name, parameter in policy.items())


def test_a_constant_reward_and_a_value_that_is_wrong_keep_kl_small(chat, tmp_path):
    """Nothing is compared, so the value's errors move the policy at first; with nothing to gain, the penalty holds it."""
    changes = {"learning_rate": 1e-3, "kl_coef": 0.5, "compare_completions": False, "iterations": 12, "max_new_tokens": 6}
    _, rounds = train(open_tiny(chat, tmp_path, {"constant": lambda p, c, r: 1.0}, **{**LEARNING, **changes}))
    assert max(row["kl"] for row in rounds) < 0.5


PULLS = {
    "gae": {"kl_coef": 1.0},
    "reinforce++": {"kl_coef": 1.0, "estimator": "reinforce++"},
    "rloo": {"kl_coef": 1.0, "estimator": "rloo"},
    "grpo": {"kl_coef": 1.0, "estimator": "grpo"},
    "dr_grpo": {"kl_coef": 1.0, "estimator": "dr_grpo"},
    "a term of the loss": {"kl_coef": 0.0, "kl_loss_coef": 1.0},
}


@pytest.mark.parametrize("pull", PULLS)
def test_the_penalty_pulls_a_policy_back_to_its_reference(pull, chat, tmp_path):
    """Begun away from it, with nothing to gain: the sign of the KL term, in the rewards and in the loss."""
    changes = LEARNING | {"iterations": 12, "max_new_tokens": 6, "learning_rate": 3e-3, "completions_per_prompt": 24} | PULLS[pull]
    session = open_tiny(chat, tmp_path, {"constant": lambda p, c, r: 0.0}, **changes)
    randomise(trunk_of(session), "ppo", seed=8, spread=0.05)
    _, rounds = train(session)
    nats = [row["kl"] for row in rounds]
    assert nats[0] > 5
    assert sum(nats[-3:]) / 3 < 0.7 * nats[0], nats


def test_an_entropy_bonus_keeps_the_policy_wide(chat, tmp_path):
    entropies = []
    for bonus in (0.0, 0.3):
        (tmp_path / str(bonus)).mkdir()
        changes = {"iterations": 8, "max_new_tokens": 4, "kl_coef": 0.0, "entropy_coef": bonus}
        _, rounds = train(open_tiny(chat, tmp_path / str(bonus), {"letters": letters}, **LEARNING, **changes))
        entropies.append(rounds[-1]["entropy"])
    assert entropies[1] > entropies[0] + 1


def test_explained_rewards_bring_the_values_near_the_returns(chat, tmp_path):
    """A constant score of 2 and no KL penalty: every return is 2, and so is the value in the end."""
    changes = {"kl_coef": 0.0, "value_coef": 1.0, "learning_rate": 1e-30, "value_clip": 10.0, "compare_completions": False}
    changes |= {"iterations": 15, "max_new_tokens": 6}
    _, rounds = train(open_tiny(chat, tmp_path, {"two": lambda p, c, r: 2.0}, **{**LEARNING, **changes}))
    assert abs(rounds[0]["value"] - 2) > 0.5
    assert abs(rounds[-1]["value"] - 2) < 0.2


def test_values_come_to_explain_what_prompts_decide(chat, tmp_path):
    """The score is the prompt's number, which nothing in the completion changes."""
    changes = {"kl_coef": 0.0, "value_coef": 1.0, "learning_rate": 1e-30, "value_clip": 10.0, "compare_completions": False}
    changes |= {"iterations": 15, "max_new_tokens": 4}
    _, rounds = train(open_tiny(chat, tmp_path, {"line": lambda p, c, r: r["line"]}, **{**LEARNING, **changes}))
    assert rounds[0]["explained_variance"] == pytest.approx(0, abs=1e-6)
    assert rounds[-1]["explained_variance"] > 0.8


# The KL coefficient -------------------------------------------------------------------------------------------------------


def test_the_kl_coefficient_follows_its_target_round_by_round(chat, tmp_path):
    """60 completions a round over a horizon of 120, a target far above: each round takes 0.2 * 60 / 120 off."""
    changes = {"iterations": 4, "kl_target": 1e6, "kl_horizon": 120, "kl_coef": 0.1}
    state, rounds = train(open_tiny(chat, tmp_path, {"letters": letters}, **LEARNING, **changes))
    assert [row["kl_coef"] for row in rounds] == [pytest.approx(0.1 * 0.9**number) for number in range(4)]
    assert state.kl_coef == pytest.approx(0.1 * 0.9**4)


def test_a_kl_that_passed_its_target_comes_back_to_it(chat, tmp_path):
    """The reward pulls to 22 nats, which a coefficient of 0.1 would let happen. It swings about the target."""
    changes = {"iterations": 60, "max_new_tokens": 4, "kl_coef": 0.1, "kl_target": 5.0, "kl_horizon": 40, "entropy_coef": 0.1}
    _, rounds = train(open_tiny(chat, tmp_path, {"letters": letters}, **LEARNING, **changes, estimator="rloo"))
    kl = [row["kl"] for row in rounds]
    assert max(kl) > 8
    assert 2 < sum(kl[-30:]) / 30 < 14


# The best round -----------------------------------------------------------------------------------------------------------


def up_to_two(prompt, completion, row):
    """What people would like: two letters a, and each further one spoils it. The policy learns from `letters` alone."""
    return 2.0 - abs(completion.count("a") - 2)


def watched(chat, folder, heldout=PROMPTS * 8, **changes):
    """A run that learns from `letters` and is evaluated by `up_to_two`, which weighs nothing."""
    settings = {"iterations": 16, "max_new_tokens": 4, "kl_coef": 0.0, "holdout": 0.4, "eval_every": 2, "choose_by": "liked"}
    changes = LEARNING | settings | changes
    session = open_tiny(chat, folder, {"letters": letters, "liked": up_to_two}, heldout, estimator="rloo", **changes)
    session.prompts, session.weights["liked"] = PROMPTS[:3], 0.0
    return session


def test_over_optimisation_leaves_the_best_evaluated_policy(chat, tmp_path):
    """What is learned from goes on rising; what is watched falls; the adapter is the one at the top, to the bit."""
    session = watched(chat, tmp_path)
    state, rounds = train(session)
    points = state.evaluations.points
    assert [point["round"] for point in points] == [0, 2, 4, 6, 8, 10, 12, 14, 16]
    liked = [point["score"] for point in points]
    assert rounds[-1]["score"] > 3.5
    assert points[-1]["score/letters"] > 3.5
    assert max(liked) > liked[-1] + 0.5
    best = liked.index(max(liked))
    assert state.evaluations.best_round == points[best]["round"] not in (0, 16)
    again = ppo.evaluate(session, session.job.meter())
    assert again == {name: number for name, number in points[best].items() if name != "round"}


def test_a_run_ends_after_so_many_evaluations_without_a_better_one(chat, tmp_path, capsys):
    session = watched(chat, tmp_path, patience=2)
    state, rounds = train(session)
    points = state.evaluations.points
    assert len(rounds) == points[-1]["round"] < 16
    assert points[-3]["round"] == state.evaluations.best_round
    out = capsys.readouterr().out
    assert f"ended after round {len(rounds)} of 16: 2 evaluations in a row were not better than that after round" in out
    assert "of " in out
    assert f"the policy after round {state.evaluations.best_round}" in out


def test_a_run_ends_where_kl_passes_its_bound_and_keeps_a_policy_within_it(chat, tmp_path, capsys):
    state, rounds = train(watched(chat, tmp_path, max_kl=4.0, choose_by=None, kl_coef=0.01))
    points = state.evaluations.points
    assert len(rounds) < 16
    assert points[-1]["kl"] > 4 >= points[-2]["kl"]
    assert state.evaluations.best_round < points[-1]["round"]
    assert f"held-out KL is {points[-1]['kl']:.1f} nats per completion, over max_kl=4.0" in capsys.readouterr().out


def test_a_cut_completion_counts_as_cut_by_every_reward(chat, tmp_path):
    session = watched(chat, tmp_path, missing_eos_score=-5.0)
    session.scorers["liked"].function = lambda p, c, r: 1.0
    point = ppo.evaluate(session, session.job.meter())
    assert point["ended"] < 1
    assert point["score/liked"] == point["score"] == pytest.approx(point["ended"] - 5 * (1 - point["ended"]))


def test_where_no_round_is_better_the_policy_is_the_one_it_began_with(chat, tmp_path, capsys):
    """Learns from letters, is judged by their absence."""
    session = watched(chat, tmp_path, iterations=6)
    session.scorers["liked"].function = lambda p, c, r: -c.count("a")
    state, _ = train(session)
    assert state.evaluations.best_round == 0
    assert "the policy it began with: no round was better" in capsys.readouterr().out
    assert all(not parameter.any() for name, parameter in session.learner.trainee.parameters.items() if "lora_B" in name)


def test_a_run_that_was_killed_after_it_had_ended_ends_again(chat, tmp_path):
    for name in ("unbroken", "killed"):
        (tmp_path / name).mkdir()
    unbroken = watched(chat, tmp_path / "unbroken", patience=1)
    state, rounds = train(unbroken)
    with pytest.raises(KeyboardInterrupt):
        train(killed_at(watched(chat, tmp_path / "killed", patience=1), len(rounds)))
    for _ in range(2):  # the second time everything is done already
        resumed = watched(chat, tmp_path / "killed", patience=1)
        again, rounds_again = train(resumed)
        assert again.evaluations == state.evaluations
        assert [without_times(row) for row in rounds_again] == [without_times(row) for row in rounds]
        assert all(torch.equal(resumed.parameters[name], parameter) for name, parameter in unbroken.parameters.items())


# Rewards that fail ----------------------------------------------------------------------------------------------------------


class Failing:
    """Counts letters, until a number of calls have been made; then it does `what`."""

    def __init__(self, calls, what):
        self.left, self.what = calls, what

    def __call__(self, prompt, completion, row):
        self.left -= 1
        return self.what() if self.left < 0 else letters(prompt, completion, row)


FAILURES = {
    "it raises": (lambda: {}["x"], r"^prompts.jsonl:\d: reward 'letters' raised KeyError: 'x' \(.*test_ppo_learning.py:\d+\)"),
    "not a number": (lambda: float("nan"), r"^prompts.jsonl:\d: reward 'letters' is nan; expected a finite number"),
    "infinite": (lambda: float("inf"), r"^prompts.jsonl:\d: reward 'letters' is inf; expected a finite number"),
    "nothing": (lambda: None, r"^prompts.jsonl:\d: reward 'letters' returned None; expected a number"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_reward_that_fails_stops_with_its_row_after_a_checkpoint(failure, chat, tmp_path):
    """In the third round, with checkpoints only at the end: the two rounds before are kept, and the run goes on to the same bytes."""
    what, message = FAILURES[failure]
    changes = {"iterations": 4, "save_every": 10}
    for name in ("unbroken", "failed"):
        (tmp_path / name).mkdir()
    unbroken = open_tiny(chat, tmp_path / "unbroken", {"letters": letters}, **changes)
    train(unbroken)
    with pytest.raises(RewardFailure, match=message) as error:
        train(open_tiny(chat, tmp_path / "failed", {"letters": Failing(37, what)}, **changes))
    assert "The completion: " in str(error.value)
    assert "The rounds before are kept" in str(error.value)
    resumed = open_tiny(chat, tmp_path / "failed", {"letters": Failing(30, what)}, **changes)  # two rounds of 15 are left
    train(resumed)
    assert all(torch.equal(resumed.parameters[name], parameter) for name, parameter in unbroken.parameters.items())


def test_a_reward_that_fails_on_held_out_prompts_costs_no_round(chat, tmp_path):
    """72 calls in two rounds and two evaluations; the third evaluation fails, and is made again."""
    changes = {"iterations": 3, "holdout": 0.4, "eval_every": 1, "save_every": 10}
    session = open_tiny(chat, tmp_path, {"letters": Failing(15 + 15 + 2 + 2 + 1, lambda: float("nan"))}, PROMPTS[3:], **changes)
    with pytest.raises(RewardFailure, match=r"^prompts.jsonl:[45]: reward 'letters' is nan"):
        train(session)
    state, rounds = train(open_tiny(chat, tmp_path, {"letters": letters}, PROMPTS[3:], **changes))
    assert [row["step"] for row in rounds] == [1, 2, 3]
    assert [point["round"] for point in state.evaluations.points] == [0, 1, 2, 3]


def test_two_rewards_are_a_weighted_sum_and_each_is_logged(chat, tmp_path):
    session = open_tiny(chat, tmp_path, {"letters": letters, "line": lambda p, c, r: r["line"]}, iterations=2, missing_eos_score=None)
    session.weights = {"letters": 2.0, "line": -0.5}
    _, rounds = train(session)
    for row in rounds:
        assert row["score/line"] == 2
        assert row["raw_score"] == pytest.approx(2 * row["score/letters"] - 0.5 * 2)
