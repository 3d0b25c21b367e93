"""What a step costs, in counts that no clock disturbs: passes, tokens in them, those of the last block, positions of the output layer."""

import pytest
import torch
from conftest import make_trainee
from ppo_session import QUIET, open_tiny

from align.model import forward as forward_module
from align.model.packing import Example, pack
from align.settings import DPOSettings, RewardSettings
from align.stages import ppo
from align.stages.dpo import DirectPreference
from align.stages.reward import BradleyTerry
from align.stages.sft import Likelihood

SYSTEM = (2, 30, 31)  # which all prompts begin with
EXAMPLES = [Example(i, (*SYSTEM, 70 + i, *range(50, 50 + i), 4), ((60, 61, 1), (62,) * (i + 1) + (1,))) for i in range(6)]
OWN_TOKENS = sum(len(e.prompt) - len(SYSTEM) + sum(map(len, e.completions)) for e in EXAMPLES)
COMPLETION_TOKENS = sum(map(len, (c for e in EXAMPLES for c in e.completions)))


@pytest.fixture
def counted(monkeypatch):
    """Counts passes, tokens, those in the last block and output positions: counted(trunk) begins, and gives the counts from then on."""
    found = {"passes": 0, "tokens": 0, "last": 0, "outputs": 0}
    plain = forward_module.target_logprobs

    def outputs(trunk, hidden, targets, temperature):
        found["outputs"] += len(targets)
        return plain(trunk, hidden, targets, temperature)

    def passed(module, arguments, keywords):
        found["passes"] += 1
        found["tokens"] += keywords["input_ids"].numel()

    def in_the_last(module, arguments):
        found["last"] += arguments[0].shape[-2]

    def begin(trunk):
        trunk.decoder.register_forward_pre_hook(passed, with_kwargs=True)
        trunk.decoder.layers[-1].mlp.down_proj.register_forward_pre_hook(in_the_last)
        monkeypatch.setattr(forward_module, "target_logprobs", outputs)
        return found

    return begin


def step(objective, examples, row_tokens):
    rows = pack(examples, row_tokens)
    totals = objective.totals(examples)
    for row in rows:
        objective(row, totals)[0].backward()
    return len(rows)


@pytest.mark.parametrize("row_tokens", [24, 1024])
def test_sft_passes_each_token_once_and_only_what_counts_through_the_output_layer(chat, counted, row_tokens):
    trainee = make_trainee(chat)
    found = counted(trainee.trunk)
    conversations = [((*SYSTEM, 90 + i, 4), sum(e.completions, ())) for i, e in enumerate(EXAMPLES)]
    turns = [Example(i, prompt, (rest,), ((False, False, *[True] * (i + 3)),)) for i, (prompt, rest) in enumerate(conversations)]
    alone = [Example(e.index, e.prompt, e.completions[:1]) for e in EXAMPLES]
    rows = step(Likelihood(trainee), [*alone, *turns], row_tokens)
    counts = sum(len(e.completions[0]) for e in alone) + sum(i + 3 for i in range(6))
    assert found == {
        "passes": rows,
        "tokens": rows * len(SYSTEM) + sum(e.tokens - len(SYSTEM) for e in alone + turns),
        "last": counts,
        "outputs": counts,
    }


@pytest.mark.parametrize("row_tokens", [24, 1024])
def test_dpo_passes_a_prompt_once_for_both_sides_and_never_the_reference(chat, counted, row_tokens):
    trainee = make_trainee(chat)
    objective = DirectPreference(trainee, torch.ones(6), torch.zeros(6, 2), DPOSettings())
    found = counted(trainee.trunk)
    rows = step(objective, EXAMPLES, row_tokens)
    assert found == {
        "passes": rows,
        "tokens": rows * len(SYSTEM) + OWN_TOKENS,
        "last": COMPLETION_TOKENS - len(EXAMPLES),  # a prompt's last token, which both completions begin from, is there once
        "outputs": COMPLETION_TOKENS,
    }


def test_a_reward_model_has_no_output_layer(chat, counted):
    trainee = make_trainee(chat, head=True)
    found = counted(trainee.trunk)
    rows = step(BradleyTerry(trainee, torch.ones(6), torch.zeros(6), RewardSettings()), EXAMPLES, 1024)
    assert found == {"passes": rows, "tokens": rows * len(SYSTEM) + OWN_TOKENS, "last": 2 * len(EXAMPLES), "outputs": 0}


def test_a_round_of_ppo_passes_its_rows_four_times_to_score_and_twice_an_update(chat, counted, tmp_path, monkeypatch):
    """Policy, reference, value and reward model once each; then policy and value in each of two passes. Sampling is not counted."""
    session = open_tiny(chat, tmp_path, row_tokens=1024, minibatches=1)
    found, rows = counted(session.learner.trainee.trunk), []
    monkeypatch.setattr(ppo, "pack", lambda *given: rows.append(pack(*given)) or rows[-1])
    sample = session.sampler.sample

    def sampled(*arguments, **keywords):
        completions = sample(*arguments, **keywords)
        found.update(passes=0, tokens=0, last=0, outputs=0)
        return completions

    session.sampler.sample = sampled
    ppo.play_round(session, ppo.State(0.05), 0, QUIET)
    ((row,), _) = rows
    predicting, completions = len(row.predicted_at.unique()), len(row.last)
    assert found == {
        "passes": 4 + 2 * 2,
        "tokens": 8 * row.ids.numel(),
        "last": 7 * predicting + 4 * completions,  # of the reward model the completions' last tokens alone, of the value those too
        "outputs": 4 * len(row.targets),
    }
