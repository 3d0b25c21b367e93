import json
import math

import pytest
import torch
from conftest import heldout_records, make_trainee, randomise

from align import Lora, Recipe
from align.artifact import Artifact
from align.learn.optimise import evaluate
from align.model.load import Trainee, load_role, open_trunk
from align.model.packing import make_row, pack
from align.records import Message
from align.stages.sft import Likelihood

MESSAGES = [("user", "hi"), ("assistant", "hello"), ("user", "more"), ("assistant", "ok"), ("user", "bye"), ("assistant", "goodbye")]


def messages(*turns):
    return [Message(role=role, content=content) for role, content in turns]


def plain_nll(trainee, example):
    """Summed over trained tokens, by one plain forward of the whole conversation."""
    ids = torch.tensor([example.prompt + example.completions[0]])
    with torch.no_grad(), trainee.trunk.switched_to(trainee.role):
        logprobs = torch.log_softmax(trainee.trunk.model(ids, use_cache=False).logits[0], -1)
    trained = example.trained[0] if example.trained else [True] * len(example.completions[0])
    at = len(example.prompt)
    return -sum(
        float(logprobs[at + i - 1, token]) for i, (token, counts) in enumerate(zip(example.completions[0], trained, strict=True)) if counts
    )


def test_the_loss_is_the_mean_over_trained_tokens_of_the_whole_step(chat):
    """Three conversations in three rows: shares add up to the mean of all trained tokens, not to a mean of means."""
    trainee = make_trainee(chat)
    randomise(trainee.trunk, "stage", seed=5)
    examples = [chat.conversation(i, messages(*MESSAGES[:turns])) for i, turns in enumerate([2, 4, 6])]
    objective, rows = Likelihood(trainee), [make_row([example]) for example in examples]
    totals = objective.totals(examples)
    # each assistant turn and its end: hello 5, ok 2, goodbye 7
    assert totals == {"tokens": (5 + 1) + (6 + 2 + 1) + (9 + 7 + 1)}
    expected = sum(plain_nll(trainee, example) for example in examples) / totals["tokens"]
    assert sum(float(objective(row, totals)[0]) for row in rows) == pytest.approx(expected, rel=1e-5)
    assert float(objective(make_row(examples), totals)[0]) == pytest.approx(expected, rel=1e-5)
    sums = objective(make_row(examples), totals)[1]["loss"]
    assert sums == (pytest.approx(expected * 32, rel=1e-5), 32)


def test_training_on_the_last_turn_counts_that_turn_only(chat):
    example = chat.conversation(0, messages(*MESSAGES), last_turn_only=True)
    assert Likelihood(make_trainee(chat)).totals([example]) == {"tokens": len("goodbye") + 1}


def test_a_saved_policy_has_the_held_out_losses_that_were_recorded(small_run, data):
    """Recomputed on the loaded artifact, after training and, without its adapter, before."""
    artifact = Artifact.open(small_run / "sft")
    trunk, chat = open_trunk(artifact.base, artifact, "float32")
    role = load_role(trunk, artifact)
    heldout = [chat.conversation(i, r["messages"]) for i, r in heldout_records(data / "chat.jsonl", "conversation", 0.2)]
    trainee = Trainee(trunk, chat, role, role, None, {})
    metrics = artifact.facts["metrics"]
    total = sum(example.trained_tokens for example in heldout)
    assert metrics["heldout_loss"] == pytest.approx(sum(plain_nll(trainee, example) for example in heldout) / total, rel=1e-5)
    base = Trainee(trunk, chat, role, type(role)(), None, {})
    assert metrics["heldout_loss_before"] == pytest.approx(sum(plain_nll(base, example) for example in heldout) / total, rel=1e-5)
    assert metrics["heldout_loss"] < metrics["heldout_loss_before"]
    assert artifact.facts["checks"] == {"change_at_start": 0.0}
    assert artifact.facts["data"]["data"]["heldout"] == len(heldout)


def test_the_recorded_held_out_loss_is_without_dropout(tiny_base, data, tmp_path):
    """The loss of the saved policy, whatever the dropout it was trained with."""
    recipe = Recipe("dropout", base=str(tiny_base), dtype="float32")
    recipe.sft(data=data / "chat.jsonl", lora=Lora(rank=4, dropout=0.5), batch_size=4, holdout=0.3, learning_rate=1e-2, epochs=4.0)
    artifact = Artifact.open(recipe.run(tmp_path / "run") / "sft")
    trunk, chat = open_trunk(artifact.base, artifact, "float32")
    role = load_role(trunk, artifact)
    heldout = [chat.conversation(i, r["messages"]) for i, r in heldout_records(data / "chat.jsonl", "conversation", 0.3)]
    found = evaluate(Likelihood(Trainee(trunk, chat, role, role, None, {})), heldout, 1024)
    assert artifact.facts["metrics"]["heldout_loss"] == pytest.approx(found["heldout_loss"], rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "lora",
    [
        pytest.param(Lora(rank=4, dora=True), id="DoRA"),
        pytest.param(Lora(rank=4, rslora=True), id="rsLoRA"),
        pytest.param(Lora(rank=4, targets=("q_proj", "v_proj"), dropout=0.1), id="two targets with dropout"),
    ],
)
def test_every_kind_of_adapter_runs_twice_on_top_of_itself(lora, dtype, tiny_base, data, tmp_path):
    recipe = Recipe("kinds", base=str(tiny_base), dtype=dtype)
    settings = {"data": data / "chat.jsonl", "lora": lora, "batch_size": 4, "row_tokens": 64}
    first = recipe.sft(**settings)
    recipe.sft(policy=first, name="again", **settings)
    run = recipe.run(tmp_path / "run")
    for name in ("sft", "again"):
        facts = json.loads((run / name / "artifact.json").read_text())
        change = facts["checks"]["change_at_start"]
        assert change == 0 or (lora.dora and change < (0.5 if dtype == "bfloat16" else 1e-5))  # DoRA divides by a norm, which rounds
        losses = [json.loads(line)["loss"] for line in (run / name / "metrics.jsonl").read_text().splitlines()]
        assert all(math.isfinite(loss) for loss in losses)
    artifact = Artifact.open(run / "again")
    trunk, _ = open_trunk(artifact.base, artifact, dtype)
    assert len(load_role(trunk, artifact).adapters) == 2


def test_recomputed_activations_train_the_same_adapter_on_top_of_another(tiny_base, data, tmp_path):
    """The backward pass computes activations again with the adapters that the forward pass had."""
    losses = []
    for checkpointed in (False, True):
        recipe = Recipe("checkpointed", base=str(tiny_base), dtype="float32")
        settings = {"data": data / "chat.jsonl", "lora": Lora(rank=4), "batch_size": 4, "row_tokens": 64}
        first = recipe.sft(**settings)
        recipe.sft(policy=first, name="again", gradient_checkpointing=checkpointed, **settings)
        run = recipe.run(tmp_path / str(checkpointed))
        losses.append([json.loads(line)["loss"] for line in (run / "again" / "metrics.jsonl").read_text().splitlines()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_training_learns(chat, tmp_path):
    """Forty steps on four conversations: the loss falls to a fraction, through the real loop."""
    from align.learn.optimise import train
    from align.progress import Meter
    from align.settings import SFTSettings

    trainee = make_trainee(chat)
    examples = [
        chat.conversation(i, messages(("user", f"say {c}"), ("assistant", c))) for i, c in enumerate(["red", "blue", "grey", "pink"])
    ]
    before = evaluate(Likelihood(trainee), examples, 1024)["heldout_loss"]
    settings = SFTSettings(batch_size=4, epochs=40.0, learning_rate=1e-2)
    train(Likelihood(trainee), trainee.parameters, examples, [], settings, tmp_path, Meter("sft", tmp_path, ()), ["x"] * 4)
    assert evaluate(Likelihood(trainee), examples, 1024)["heldout_loss"] < 0.2 * before
    assert len(pack(examples, 1024)) == 1
