"""A PPO run on the tiny model in float32, opened by hand: every role on random adapters, prompts of a few tokens."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from conftest import make_trainee, randomise

from align import Lora
from align.artifact import Artifact
from align.learn.optimise import make_optimizer
from align.learn.prompts import PromptRow, prompts_of_round
from align.learn.rollouts import estimate_advantages, score_rollouts
from align.learn.scores import FunctionReward, TrunkReward
from align.learn.session import VALUE, Session, add_value
from align.learn.updates import Learner, minibatches
from align.model.load import Sampler
from align.model.packing import pack
from align.model.trunk import Head, Role
from align.progress import Meter
from align.run import Job
from align.settings import PPOSettings
from align.stages import ppo

IDS = [(3, 50, 51, 4), (3, 60, 4), (3, 70, 71, 72, 73, 74, 4), (3, 4), (3, 80, 81, 4)]
PROMPTS = [PromptRow(ids, [{"role": "user", "content": f"prompt {i}"}], None, {"line": i}, i) for i, ids in enumerate(IDS)]
STOPS = frozenset({1, *range(200, 230)})  # one token in nine: completions of every length, some cut off
REWARD = Artifact(Path("reward"), {"settings": {"lora": Lora(rank=4).model_dump(mode="json")}})
QUIET = SimpleNamespace(phase=lambda text: None)


class Places:
    """Stands for the data: prompt i is line i + 1."""

    def place(self, index):
        return f"prompts.jsonl:{index + 1}"


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


def open_tiny(chat, folder=None, rewards=None, heldout=(), **changes):
    """What `open_session` gives: policy [sft, ppo], reference [sft], reward [sft, reward], value [sft, value].

    `rewards` are functions of the prompt's messages, the text and the row, by name; without any, the random reward model scores.
    """
    settings = make_settings(**changes)
    trainee = make_trainee(replace(chat, stop_ids=STOPS), name="ppo")
    trunk = trainee.trunk
    trunk.add_adapter("reward", Lora(rank=4), seed=3)
    randomise(trunk, "reward", seed=3)
    torch.manual_seed(4)
    trunk.heads["reward"] = Head(trunk.hidden_size).requires_grad_(False)
    trunk.heads["reward"].offset += 0.1
    reward = Role(("sft", "reward"), "reward")
    groups = [trainee.parameters]
    value = None
    if settings.has_value:
        value = add_value(trunk, trainee.before, settings, reward, REWARD)
        groups.append(trunk.parameters_of(VALUE, VALUE))
        for parameter in groups[1].values():
            parameter.requires_grad_(True)
    if settings.gradient_checkpointing:
        trunk.checkpoint_activations()
    session = Session(
        job=Job("ppo", settings, None, {}, {"prompts": Places()}, folder),
        learner=Learner(trainee, value, make_optimizer([list(group.values()) for group in groups], 0.0, eps=1e-5), settings),
        parameters={name: parameter for group in groups for name, parameter in group.items()},
        scorers={},
        weights=dict.fromkeys(rewards or ["reward"], 1.0),
        sampler=Sampler(trunk, settings.merged_sampler),
        prompts=list(PROMPTS),
        heldout=list(heldout),
    )
    places = session.place
    session.scorers |= {name: FunctionReward(name, function, places) for name, function in (rewards or {}).items()}
    session.scorers |= {} if rewards else {"reward": TrunkReward(trunk, reward)}
    return session


def trunk_of(session):
    return session.learner.trainee.trunk


def train(session):
    """All rounds: the state they leave, and the metrics of every round."""
    state = ppo.train(session)
    lines = (session.job.work / "metrics.jsonl").read_text().splitlines()
    return state, [json.loads(line) for line in lines]


def killed_at(session, step):
    """Make the session's training stop once that step's metrics are written, before its checkpoint."""

    class Killed(Meter):
        def step(self, number, metrics, counted):
            super().step(number, metrics, counted)
            if number == step:
                raise KeyboardInterrupt

    session.job.meter = lambda *shown: Killed("ppo", session.job.work, shown)
    return session


def rollouts_of(session, iteration=0):
    """One round's rollouts with advantages, and the rows of each minibatch of its first pass."""
    settings, learner = session.settings, session.learner
    prompts = prompts_of_round(session.prompts, iteration, settings)
    sampled = ppo.sample(session, prompts, settings.completions_per_prompt, settings.seed * 1_000_003 + iteration, QUIET)
    batches = minibatches(len(sampled), settings, iteration, 0)
    rows = [pack([sampled[i].example for i in batch], settings.row_tokens) for batch in batches]
    flat = [row for batch in rows for row in batch]
    rollouts = score_rollouts(learner.trainee, learner.value, sampled, flat, settings.temperature)
    scores = ppo.score(session, ppo.State(settings.kl_coef), rollouts, flat)
    estimate_advantages(rollouts, scores.final, settings.kl_coef, settings)
    return rollouts, rows, scores


def without_times(row):
    return {name: number for name, number in row.items() if name != "seconds" and "per_second" not in name}
