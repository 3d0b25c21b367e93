"""PPO as a stage of a recipe: rewards of every kind, what its artifact says, what is refused, and kills of the whole process."""

import functools
import json
import random
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tokenizer, write_rows
from processes import align, start
from safetensors.torch import load_file
from test_run import contents, kill_at_call, kill_at_step, kill_in_checkpoint
from transformers import AutoConfig, AutoModelForSequenceClassification

from align import AlignError, Lora, Recipe, judged
from align.artifact import Artifact
from align.base import Base
from align.learn import session as session_module
from align.learn.session import VALUE, check_same_trunk
from align.plan import make_plan
from align.report.facts import run_facts
from align.run import Job
from align.stages import ppo

SMALL = {
    "lora": Lora(rank=4),
    "iterations": 2,
    "prompts_per_iteration": 3,
    "completions_per_prompt": 4,
    "epochs": 2,
    "minibatches": 3,
    "max_new_tokens": 6,
    "row_tokens": 64,
}


def length(prompt, completion, row):
    return len(completion)


def answered(prompt, completion, row):
    """Whether it holds the row's answer, whose column is no part of a prompt."""
    assert prompt == [{"role": "user", "content": row["question"]}]
    return row["answer"] in completion


def recipe_of(tiny_base, small_run, prompts, **settings):
    recipe = Recipe("ppo", base=str(tiny_base), dtype="float32")
    recipe.ppo(policy=recipe.load(small_run / "sft"), prompts=prompts, **{**SMALL, **settings})
    return recipe


@pytest.fixture
def questions(tmp_path):
    return write_rows(tmp_path / "questions.jsonl", [{"question": f"say {c}", "answer": c} for c in "abcdefgh"])


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier") / "kind"
    torch.manual_seed(5)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 261}
    AutoModelForSequenceClassification.from_config(AutoConfig.for_model("llama", **sizes, num_labels=1, pad_token_id=0)).save_pretrained(
        folder
    )
    make_tokenizer().save_pretrained(folder)
    return folder


def rounds_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# Rewards ------------------------------------------------------------------------------------------------------------------


def test_a_function_is_given_the_row_with_every_column(tiny_base, small_run, questions, tmp_path):
    """No reward model anywhere: the value begins as a fresh adapter."""
    run = recipe_of(tiny_base, small_run, questions, reward=answered).run(tmp_path / "run")
    facts = Artifact.open(run / "ppo", verify=True).facts
    (reward,) = facts["rewards"]
    assert (reward["name"], reward["weight"], reward["kind"]) == ("answered", 1.0, "function")
    assert 'return row["answer"] in completion' in reward["source"]
    assert set(facts["parents"]) == {"policy"}
    assert all(0 <= row["score/answered"] <= 1 for row in rounds_of(run / "ppo"))
    assert facts["checks"].items() >= {"change_at_start": 0.0, "kl_at_start": 0.0, "ratio_off_1_at_start": 0.0}.items()


@pytest.mark.parametrize("estimator", ["gae", "rloo"])
def test_a_sum_of_all_kinds_of_rewards_is_logged_by_name(estimator, tiny_base, small_run, questions, classifier, tmp_path):
    recipe = Recipe("ppo", base=str(tiny_base), dtype="float32")
    model = recipe.load(small_run / "reward")
    recipe.ppo(
        policy=recipe.load(small_run / "sft"),
        prompts=questions,
        reward_model=model,
        reward=[(length, -0.01), (str(classifier), 0.5)],
        estimator=estimator,
        missing_eos_score=None,
        **SMALL,
    )
    run = recipe.run(tmp_path / "run")
    rows = rounds_of(run / "ppo")
    assert len(rows) == 2
    for row in rows:
        assert row["raw_score"] == pytest.approx(row["score/reward"] - 0.01 * row["score/length"] + 0.5 * row["score/kind"], abs=1e-5)
    facts = Artifact.open(run / "ppo").facts
    assert [(part["name"], part["weight"]) for part in facts["rewards"]] == [("reward", 1.0), ("length", -0.01), ("kind", 0.5)]
    assert set(facts["parents"]) == {"policy", "reward_model"}


def test_a_judge_scores_on_the_policy_s_own_weights(tiny_base, small_run, data, tmp_path, monkeypatch):
    from align.model.trunk import Trunk

    rubric = tmp_path / "rubric.txt"  # shorter than the model's context, as the shipped one is not
    rubric.write_text("kind: score\nlowest: 1\nhighest: 10\nreply: verdict\n---\n[user]\nFrom 1 to 10: $prompt $completion\n")
    loaded, load = [], Trunk.load
    monkeypatch.setattr("align.judge.verdict.FLOOR", 0.0)  # a random model gives its answers next to no probability
    monkeypatch.setattr(Trunk, "load", lambda *arguments, **named: loaded.append(1) or load(*arguments, **named))
    recipe = Recipe("ppo", base=str(tiny_base), dtype="float32")
    sft = recipe.load(small_run / "sft")
    rewards = {"base": judged(str(tiny_base), template=str(rubric)), "sft": (judged(sft, template=str(rubric)), 0.5)}
    recipe.ppo(policy=sft, prompts=data / "prompts.jsonl", reward=rewards, **SMALL)
    recipe.run(tmp_path / "run")
    assert len(loaded) == 1
    for line in rounds_of(tmp_path / "run" / "ppo"):
        assert -1 <= line["score/base"] <= 1
        assert line["raw_score"] == pytest.approx(line["score/base"] + 0.5 * line["score/sft"], abs=1e-6)
    assert [part["kind"] for part in Artifact.open(tmp_path / "run" / "ppo").facts["rewards"]] == ["judge", "judge"]
    assert make_plan(recipe, tmp_path / "run")[0].state == "done"


def test_a_reward_model_alone_is_the_same_by_either_name(tiny_base, small_run, data, tmp_path):
    found = []
    for number, word in enumerate(("reward_model", "reward")):
        recipe = Recipe("ppo", base=str(tiny_base), dtype="float32")
        given = {word: recipe.load(small_run / "reward")}
        recipe.ppo(policy=recipe.load(small_run / "sft"), prompts=data / "prompts.jsonl", **given, **SMALL)
        run = recipe.run(tmp_path / str(number))
        found.append(load_file(run / "ppo" / "adapter" / "adapter_model.safetensors"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[1][key], tensor) for key, tensor in found[0].items())


def test_a_changed_function_runs_again_and_says_so(tiny_base, small_run, questions, tmp_path):
    run = recipe_of(tiny_base, small_run, questions, reward=length).run(tmp_path / "run")
    (same,) = make_plan(recipe_of(tiny_base, small_run, questions, reward=length), run)
    assert same.state == "done"
    (changed,) = make_plan(recipe_of(tiny_base, small_run, questions, reward={"length": answered}), run)
    assert (changed.state, changed.reason) == ("run", "changed: its rewards")


def test_a_reward_model_with_the_weight_0_is_only_watched(tiny_base, small_run, questions, tmp_path):
    """It chooses the best round and changes nothing of what is learned."""
    adapters = []
    for number, watched in enumerate((False, True)):
        recipe = Recipe("ppo", base=str(tiny_base), dtype="float32")
        rewards = [length, (recipe.load(small_run / "reward"), 0.0)]
        settings = {**SMALL, "holdout": 0.4, "eval_every": 1, "estimator": "rloo", "choose_by": "reward" if watched else None}
        recipe.ppo(policy=recipe.load(small_run / "sft"), prompts=questions, reward=rewards if watched else length, **settings)
        run = recipe.run(tmp_path / str(number))
        facts = Artifact.open(run / "ppo").facts
        points = facts["metrics"]["evaluations"]
        assert [point["round"] for point in points] == [0, 1, 2]
        worth = [point["score"] - 0.05 * point["kl"] for point in points]
        assert facts["metrics"]["best_round"] == points[worth.index(max(worth))]["round"]
        assert facts["data"]["prompts"]["used"] + facts["data"]["prompts"]["heldout"] == 8
        if watched:
            assert all(point["score"] == point["score/reward"] for point in points)
        adapters.append([{**row, "seconds": 0} for row in rounds_of(run / "ppo")])
    for one, other in zip(*adapters, strict=True):
        assert {name: one[name] for name in ("score", "kl", "policy_loss")} == {
            name: other[name] for name in ("score", "kl", "policy_loss")
        }


@pytest.mark.parametrize("estimator", ["rloo", "grpo", "dr_grpo", "reinforce++"])
def test_an_estimator_without_a_value_loads_none(estimator, tiny_base, small_run, data, tmp_path, monkeypatch):
    opened = []
    real = session_module.open_session
    monkeypatch.setattr(ppo, "open_session", lambda job: opened.append(real(job)) or opened[0])
    recipe = recipe_of(tiny_base, small_run, data / "prompts.jsonl", reward=length, estimator=estimator)
    recipe.run(tmp_path / "run")
    (session,) = opened
    trunk = session.learner.trainee.trunk
    assert session.learner.value is None
    assert VALUE not in {*trunk.heads, *trunk.peft.peft_config}
    assert session.parameters.keys() == session.learner.trainee.parameters.keys()
    assert not any("value" in name for name in rounds_of(tmp_path / "run" / "ppo")[0])


def test_the_seconds_and_the_samples_are_in_the_artifact(tiny_base, small_run, data, tmp_path):
    run = recipe_of(tiny_base, small_run, data / "prompts.jsonl", reward=length).run(tmp_path / "run")
    rows = [json.loads(line) for line in (run / "ppo" / "samples" / "round-0001.jsonl").read_text().splitlines()]
    assert rows[0].keys() == {"prompt", "completion", "score", "kl", "length", "ended"}


def test_the_run_s_warnings_are_kept_in_the_artifact(tiny_base, small_run, data, tmp_path, capsys):
    recipe = recipe_of(tiny_base, small_run, data / "prompts.jsonl", reward={"constant": lambda prompt, completion, row: 1.0})
    run = recipe.run(tmp_path / "run")
    told = Artifact.open(run / "ppo").facts["checks"]["warnings"]["flat"]
    assert told.startswith("round 1: every completion has the same score")
    assert told in run_facts(run)["stages"][-1]["warnings"]
    assert "ppo, round 1: every completion has the same score (1)" in capsys.readouterr().out


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
            **SMALL,
        )
        run = recipe.run(tmp_path / f"run-{stage_name}")
        adapters.append(load_file(run / stage_name / "adapter" / "adapter_model.safetensors"))
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(adapters[1][key], tensor) for key, tensor in adapters[0].items())


# What is refused ------------------------------------------------------------------------------------------------------------


def artifact(name, form):
    return Artifact(Path(name), {"name": name, "identity": name * 8, "kind": "policy", "parents": {}, "model": {"form": form}})


BASE = Base("tiny", "folder", "tiny", None, "folder:base")


def job_of(policy):
    return Job("ppo", None, BASE, {"policy": policy}, {}, Path())


@pytest.mark.parametrize(
    ("policy", "reward_form"), [(None, "full"), (artifact("full", "full"), "adapter"), (artifact("sft", "adapter"), "full")]
)
def test_a_reward_model_on_other_weights_is_refused(policy, reward_form):
    with pytest.raises(AlignError, match="ppo: the reward model 'reward' stands on other weights .* than the policy"):
        check_same_trunk(job_of(policy), artifact("reward", reward_form))


def test_a_reward_model_on_the_same_weights_is_taken():
    check_same_trunk(job_of(artifact("sft", "adapter")), artifact("reward", "adapter"))


def test_ppo_without_an_adapter_is_refused(tiny_base, small_run, data):
    with pytest.raises(AlignError, match=r"ppo.*lora"):
        recipe_of(tiny_base, small_run, data / "prompts.jsonl", reward=length, lora=None)


@pytest.mark.parametrize(("holdout", "held"), [(1e-9, 0), (0.999999999, 8)])
def test_a_split_that_leaves_one_side_empty_is_refused(holdout, held, tiny_base, small_run, data, tmp_path):
    recipe = recipe_of(tiny_base, small_run, data / "prompts.jsonl", reward=length, holdout=holdout)
    with pytest.raises(AlignError, match=rf"^ppo: of 8 prompts {held} are held out; expected some on both sides. Change ppo.holdout"):
        recipe.run(tmp_path / "run")


def test_a_sampler_that_is_not_the_policy_is_refused():
    from align.learn.round_metrics import check_sampler

    check_sampler(0.05)
    with pytest.raises(AlignError, match="sampled tokens are 0.70 nats off the trained policy's log-probabilities; expected under 0.5"):
        check_sampler(0.7)


def test_a_failing_function_is_told_with_file_and_line_and_no_traceback(tiny_base, small_run, questions, tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(
        "from align import Lora, Recipe\n"
        f"recipe = Recipe('fails', base={str(tiny_base)!r}, dtype='float32')\n"
        "def picky(prompt, completion, row):\n    return {'a': 1.0}[row['answer']]\n"
        f"recipe.ppo(policy=recipe.load({str(small_run / 'sft')!r}), prompts={str(questions)!r}, reward=picky, iterations=2,\n"
        "           prompts_per_iteration=3, completions_per_prompt=4, epochs=2, minibatches=3, max_new_tokens=6,\n"
        "           row_tokens=64, lora=Lora(rank=4))\n"
        "if __name__ == '__main__':\n    recipe.main()\n"
    )
    ended = align("run", script, "--out", "run", folder=tmp_path)
    assert ended.code == 2
    assert "Traceback" not in ended.err
    assert f"{questions}:" in ended.err
    assert re.search(rf"questions.jsonl:\d: reward 'picky' raised KeyError: '[b-h]' \({script}:4\)", ended.err)
    (work,) = (tmp_path / "run" / ".partial").iterdir()
    assert (work / "checkpoint.safetensors").is_file()


# Killed -------------------------------------------------------------------------------------------------------------------

EVERYTHING = {
    **{name: value for name, value in SMALL.items() if name != "lora"},
    "iterations": 4,
    "kl_target": 0.05,
    "kl_horizon": 20,
    "scale_scores": True,
    "centre_scores": True,
    "value_warmup": 1,
    "holdout": 0.4,
    "eval_every": 1,
    "save_every": 2,
    "learning_rate": 5e-3,
}


@pytest.fixture(scope="module")
def everything(tiny_base, small_run, data, tmp_path_factory):
    """A recipe script with every kind of state, and what it makes when nobody disturbs it."""
    folder = tmp_path_factory.mktemp("everything")
    script = folder / "everything.py"
    script.write_text(
        "from align import Lora, Recipe\n"
        f"recipe = Recipe('everything', base={str(tiny_base)!r}, dtype='float32')\n"
        "def length(prompt, completion, row):\n    return len(completion)\n"
        f"model = recipe.load({str(small_run / 'reward')!r})\n"
        f"recipe.ppo(policy=recipe.load({str(small_run / 'sft')!r}), prompts={str(data / 'prompts.jsonl')!r}, reward_model=model,\n"
        f"           reward=(length, 0.01), lora=Lora(rank=4), **{EVERYTHING!r})\n"
        "if __name__ == '__main__':\n    recipe.main()\n"
    )
    ended = align("run", script, "--out", "run", folder=folder)
    assert ended.code == 0, ended.err
    return SimpleNamespace(script=script, made=folder / "run")


MOMENTS = {
    "scoring the first round": functools.partial(kill_at_call, "align.stages.ppo", "score_rollouts", 1),
    "evaluating before the second round": functools.partial(kill_at_call, "align.stages.ppo", "evaluate", 2),
    "updating in the third round": functools.partial(kill_at_call, "align.stages.ppo", "update_step", 15),
    "between a round and its checkpoint": functools.partial(kill_at_step, "ppo", 4),
    "half a checkpoint written": functools.partial(kill_in_checkpoint, "ppo", 2),
    "at the last evaluation": functools.partial(kill_at_call, "align.stages.ppo", "evaluate", 5),
    "the best taken back": functools.partial(kill_at_call, "align.stages.ppo", "save_model", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_with_every_kind_of_state_makes_the_same_bytes(moment, everything, tmp_path):
    command = ("run", everything.script, "--out", "run")
    assert align(*command, folder=tmp_path, before=MOMENTS[moment]).code == -signal.SIGKILL
    ended = align(*command, folder=tmp_path)
    assert ended.code == 0, ended.err
    assert contents(tmp_path / "run") == contents(everything.made) != {}
    facts, undisturbed = (Artifact.open(run / "ppo", verify=True).facts for run in (tmp_path / "run", everything.made))
    for name in ("evaluations", "best_round", "kl_coef", "score", "kl"):
        assert facts["metrics"][name] == undisturbed["metrics"][name], name
    assert facts["checks"] == undisturbed["checks"]


@pytest.mark.slow
def test_a_run_killed_ten_times_in_a_row_at_random_moments_makes_the_same_bytes(everything, tmp_path):
    """Ten kills of one run, each after a random while: before its first round, in the middle of any, or at its end."""
    command = ("run", everything.script, "--set", "ppo.iterations=150", "--set", "ppo.save_every=1")
    assert align(*command, "--out", "undisturbed", folder=tmp_path).code == 0
    moments, kills = random.Random(0), 0
    while kills < 10:
        running = start(*command, "--out", "run", folder=tmp_path)
        running.process.join(moments.uniform(0.5, 3))
        if running.process.exitcode is None:
            running.process.kill()
            kills += 1
        elif kills < 10:
            assert running.end().code == 0
            pytest.fail(f"the run had ended after {kills} kills: too short a run for this test")
        running.process.join()
    ended = align(*command, "--out", "run", folder=tmp_path)
    assert ended.code == 0, ended.err
    assert contents(tmp_path / "run") == contents(tmp_path / "undisturbed") != {}
