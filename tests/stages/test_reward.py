import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import heldout_records, make_trainee, randomise, read_records
from safetensors.torch import load_file, save_file

from align import Lora, Recipe
from align.artifact import Artifact
from align.data.mix import load_data
from align.data.sources import Source
from align.errors import AlignError
from align.learn.optimise import evaluate, train
from align.model.forward import forward_head
from align.model.load import HEAD, PROBES, load_role, open_trunk
from align.model.packing import Example, make_row, pack
from align.progress import Meter
from align.records import Message, Preference
from align.settings import RewardSettings
from align.stages.reward import BradleyTerry, _centre, agreement, baselines, grade, wilson_interval

REPLIES = [("red", "der"), ("blue", "eulb eulb"), ("a longer reply", "no"), ("grey", "gray")]
PROBABILITIES = [1.0, 0.8, 0.5, 0.1]
MARGINS = [0.0, 0.5, 1.0, 2.0]


def preferences():
    return [
        Preference(
            prompt=[Message(role="user", content=f"say {i}")],
            chosen=[Message(role="assistant", content=chosen)],
            rejected=[Message(role="assistant", content=rejected)],
            chosen_probability=probability,
            margin=margin,
        )
        for i, ((chosen, rejected), probability, margin) in enumerate(zip(REPLIES, PROBABILITIES, MARGINS, strict=True))
    ]


def opened(chat, **changes):
    trainee, settings = make_trainee(chat, head=True), RewardSettings(**changes)
    objective = BradleyTerry(trainee, torch.tensor(PROBABILITIES), torch.tensor(MARGINS), settings)
    return trainee, pairs(chat, preferences()), objective


def pairs(chat, rows):
    return [chat.preference(i, row["prompt"], row["chosen"], row["rejected"]) for i, row in enumerate(rows)]


def plain_scores(trunk, role, examples):
    """The head on the last hidden state of each completion, one plain forward a completion."""
    found, head = [], trunk.heads[role.head]
    for example in examples:
        for completion in example.completions:
            with torch.no_grad(), trunk.switched_to(role):
                hidden = trunk.model.model(torch.tensor([example.prompt + completion]), use_cache=False).last_hidden_state[0, -1]
            found.append(float(hidden @ head.weight - head.offset))
    return torch.tensor(found)


def total(objective, examples, row_tokens=1024):
    totals = objective.totals(examples)
    return float(sum(objective(row, totals)[0] for row in pack(examples, row_tokens)))


def loaded(folder):
    artifact = Artifact.open(folder)
    trunk, chat = open_trunk(artifact.base, artifact, "float32")
    return artifact, trunk, chat, load_role(trunk, artifact)


@pytest.mark.parametrize("margins", [False, True])
@pytest.mark.parametrize("row_tokens", [16, 1024])
def test_probabilities_margins_and_centring_reach_the_loss(margins, row_tokens, chat):
    """p * -ln sigmoid(d - m) + (1 - p) * -ln sigmoid(-d - m) + c * (chosen + rejected)^2, over 4, from plain forwards."""
    trainee, examples, objective = opened(chat, margins=margins, centering=0.2)
    randomise(trainee.trunk, "stage", seed=5)
    scores = plain_scores(trainee.trunk, trainee.role, examples).view(-1, 2).tolist()
    expected = 0.0
    for (chosen, rejected), p, margin in zip(scores, PROBABILITIES, MARGINS if margins else [0.0] * 4, strict=True):
        d = chosen - rejected
        expected += p * math.log1p(math.exp(margin - d)) + (1 - p) * math.log1p(math.exp(margin + d)) + 0.2 * (chosen + rejected) ** 2
    assert total(objective, examples, row_tokens) == pytest.approx(expected / 4, rel=1e-5)


def test_a_head_of_zeros_has_loss_ln_2(chat):
    trainee, examples, objective = opened(chat)
    trainee.trunk.heads["stage"].weight.data.zero_()
    assert total(objective, examples) == pytest.approx(math.log(2), abs=1e-6)


def test_swapping_every_pair_and_its_probability_changes_nothing(chat):
    trainee, examples, objective = opened(chat)
    other = BradleyTerry(trainee, 1 - objective.probability, objective.margin, objective.settings)
    swapped_examples = [Example(e.index, e.prompt, e.completions[::-1]) for e in examples]
    assert total(other, swapped_examples) == pytest.approx(total(objective, examples), rel=1e-6)


def test_agreement_by_hand():
    """Differences 2, -1, 3, -4 against 0.9, 0.8, 0.5, 0.2: right, wrong, undecided, right."""
    sums = agreement(torch.tensor([2.0, -1, 3, -4]), torch.tensor([0.9, 0.8, 0.5, 0.2]))
    assert sums == {"accuracy": (2.0, 3), "margin": (0.0, 4)}


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # 0.8 + 3.8416 / 20 = 0.99208; 1.96 * sqrt(0.016 + 3.8416 / 400) = 0.31362; both over 1.38416
        (8, 10, 0.49016, 0.94332),
        # 0 + z^2 / 2n -+ the same: 0 and z^2 / (n + z^2) = 3.8416 / 8.8416
        (0, 5, 0.0, 0.43449),
        (5, 5, 0.56551, 1.0),
        (50, 100, 0.40383, 0.59617),
    ],
)
def test_wilson_s_interval_by_hand(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx([low, high], abs=1e-5)


def test_baselines_by_hand():
    """Longer wins row 0; row 1 says the shorter; row 2 is undecided and left out; row 3 is a draw: (1 + 0 + 0.5) / 3."""
    completions = [((1, 2), (1,)), ((1,), (1, 2)), ((1, 2), (1,)), ((1, 2), (3, 4))]
    heldout = [Example(i, (0,), c) for i, c in enumerate(completions)]
    data = SimpleNamespace(heldout=heldout, probability=torch.tensor([1.0, 0.9, 0.5, 1.0]))
    found = baselines(data, {"heldout_accuracy": 2 / 3})
    assert found["heldout_pairs"] == 3
    assert found["longer_is_better_accuracy"] == pytest.approx(0.5)
    assert found["heldout_accuracy_interval"] == pytest.approx(wilson_interval(2, 3))
    undecided = SimpleNamespace(heldout=[heldout[2]], probability=data.probability)
    assert baselines(undecided, {}) == {}


def test_training_scores_the_chosen_completions_higher(chat, tmp_path):
    trainee, examples, objective = opened(chat, batch_size=4, epochs=30.0, learning_rate=3e-3)
    meter = Meter("reward", tmp_path, ())
    train(objective, trainee.parameters, examples, [], objective.settings, tmp_path, meter, ["x"] * 4)
    margins = -plain_scores(trainee.trunk, trainee.role, examples).view(-1, 2).diff(dim=1)[:, 0]
    assert margins[0] > 1
    assert 0 < margins[1] < margins[0]
    assert margins[3] < -1


# A whole run ----------------------------------------------------------------------------------------------------------


def test_scores_are_centred_on_the_demonstrations_and_the_offset_is_in_the_file(small_run, data):
    """The demonstrations are the SFT stage's data, every row of it; the raw mean is the offset."""
    artifact, trunk, chat, role = loaded(small_run / "reward")
    rows = read_records(data / "chat.jsonl", "conversation")
    scores = plain_scores(trunk, role, [chat.conversation(i, row["messages"]) for i, row in enumerate(rows)])
    assert float(scores.mean()) == pytest.approx(0, abs=1e-5)
    offset = float(load_file(small_run / "reward" / HEAD)["offset"])
    assert offset != 0
    assert artifact.facts["metrics"]["score_offset"] == pytest.approx(offset)
    assert artifact.facts["checks"]["centred_on"] == "demonstrations"
    assert artifact.facts["checks"]["change_at_start"] == 0


def test_without_demonstrations_scores_are_centred_on_the_chosen_completions(tiny_base, data, tmp_path):
    recipe = Recipe("chosen", base=str(tiny_base), dtype="float32")
    recipe.reward(preferences=data / "preferences.jsonl", lora=Lora(rank=4), batch_size=4, row_tokens=64, holdout=0.0)
    run = recipe.run(tmp_path / "run")
    artifact, trunk, chat, role = loaded(run / "reward")
    examples = pairs(chat, read_records(data / "preferences.jsonl", "preference"))
    chosen = plain_scores(trunk, role, examples).view(-1, 2)[:, 0]
    assert float(chosen.mean()) == pytest.approx(0, abs=1e-5)
    assert artifact.facts["checks"]["centred_on"] == "chosen completions"
    assert "heldout_accuracy" not in artifact.facts["metrics"]


def test_centring_reads_the_last_turn_and_leaves_out_what_is_too_long(chat, tmp_path):
    trainee = make_trainee(chat, head=True)
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "more"), ("assistant", "ok")]
    rows = [turns, [("user", "x" * 100), ("assistant", "y")], turns[:2]]
    path = tmp_path / "demonstrations.jsonl"
    path.write_text("".join(json.dumps({"messages": [{"role": r, "content": c} for r, c in row]}) + "\n" for row in rows))
    demonstrations = load_data((Source(str(path)),), "conversation", "test")
    job = SimpleNamespace(name="stage", data={"demonstrations": demonstrations}, settings=RewardSettings(max_length=60))
    conversations = list(demonstrations.records())
    short = [chat.conversation(i, conversations[i]["messages"], last_turn_only=True) for i in (0, 2)]
    expected = float(plain_scores(trainee.trunk, trainee.role, short).mean())
    offset, what = _centre(job, trainee, None)
    assert offset == pytest.approx(expected, rel=1e-5)
    assert what == "demonstrations"


def test_held_out_metrics_are_the_saved_model_s(small_run, data):
    artifact, trunk, chat, role = loaded(small_run / "reward")
    metrics = artifact.facts["metrics"]
    heldout = pairs(chat, [row for _, row in heldout_records(data / "preferences.jsonl", "preference", 0.2)])
    scores = plain_scores(trunk, role, heldout).view(-1, 2)
    right = sum(float(c > r) for c, r in scores)
    assert metrics["heldout_pairs"] == len(heldout)
    assert metrics["heldout_accuracy"] == pytest.approx(right / len(heldout))
    assert metrics["heldout_margin"] == pytest.approx(float((scores[:, 0] - scores[:, 1]).mean()), rel=1e-4)
    assert metrics["heldout_accuracy_interval"] == pytest.approx(wilson_interval(right, len(heldout)))


def test_every_decided_pair_that_is_held_out_is_graded_by_its_scores(chat):
    """Undecided pairs are left out, and one against `chosen` is turned round: it is right where its scores are."""
    trainee, examples, objective = opened(chat)
    randomise(trainee.trunk, "stage", seed=5)
    data = SimpleNamespace(heldout=examples, probability=torch.tensor(PROBABILITIES), where=[f"folder/{i}.jsonl:7" for i in range(4)])
    scores = plain_scores(trainee.trunk, trainee.role, examples).view(-1, 2)
    for evaluated in (examples[:2], examples, []):
        objective.differences.clear()
        evaluate(objective, evaluated, 16)
        found = {pair.source: pair for pair in grade(objective, data, 1024)}
        assert set(found) == {"folder/0.jsonl", "folder/1.jsonl", "folder/3.jsonl"}
        for at in (0, 1, 3):
            pair = found[f"folder/{at}.jsonl"]
            better, worse = (0, 1) if PROBABILITIES[at] > 0.5 else (1, 0)
            assert (pair.better, pair.worse) == (len(examples[at].completions[better]), len(examples[at].completions[worse]))
            probability = float(torch.sigmoid(scores[at, better] - scores[at, worse]))
            assert (pair.right, pair.sure) == (probability > 0.5, pytest.approx(max(probability, 1 - probability), abs=1e-5))


def test_the_groups_agree_with_the_accuracy_of_training_s_last_evaluation(small_run):
    metrics = Artifact.open(small_run / "reward").facts["metrics"]
    groups = metrics["heldout_by"]["by_length"].values()
    assert sum(group["pairs"] for group in groups) == metrics["heldout_pairs"] > 0
    right = sum(group["accuracy"] * group["pairs"] for group in groups)
    assert right == pytest.approx(metrics["heldout_accuracy"] * metrics["heldout_pairs"])


def test_probe_scores_are_recorded_and_checked_when_the_model_is_loaded(small_run):
    artifact, trunk, _, role = loaded(small_run / "reward")
    recorded = json.loads((small_run / "reward" / PROBES).read_text())
    examples = [Example(i, tuple(p["prompt"]), tuple(map(tuple, p["completions"]))) for i, p in enumerate(recorded["probes"])]
    assert len(recorded["scores"]) == 2 * len(examples) > 0
    torch.testing.assert_close(plain_scores(trunk, role, examples), torch.tensor(recorded["scores"]), atol=1e-5, rtol=1e-5)
    assert artifact.facts["checks"]["probe_scores"] == recorded["scores"]


def changed_copy(run, tmp_path, path, change):
    """The reward model's folder with the tensors of one file changed."""
    folder = tmp_path / "reward"
    shutil.copytree(run / "reward", folder)
    tensors = load_file(folder / path)
    change(tensors)
    save_file(tensors, folder / path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("path", "change"),
    [
        pytest.param(HEAD, lambda tensors: tensors["offset"].add_(0.01), id="offset"),
        pytest.param(HEAD, lambda tensors: tensors["weight"].mul_(1.1), id="head weight"),
        pytest.param("adapter/adapter_model.safetensors", lambda tensors: [t.mul_(1.5) for t in tensors.values()], id="adapter"),
    ],
)
def test_a_changed_reward_model_is_refused_when_it_is_loaded(path, change, small_run, tmp_path):
    original = Artifact.open(small_run / "reward")
    folder = changed_copy(small_run, tmp_path, path, change)
    artifact = Artifact(
        folder, {**original.facts, "parents": {"policy": {**original.facts["parents"]["policy"], "path": str(small_run / "sft")}}}
    )
    trunk, _ = open_trunk(original.base, artifact, "float32")
    with pytest.raises(AlignError, match="the reward model scores its recorded probes up to .* off"):
        load_role(trunk, artifact)


def test_a_score_does_not_depend_on_what_else_is_scored(small_run):
    _, trunk, _, role = loaded(small_run / "reward")
    examples = [Example(i, (3, 50 + i, 4), ((60 + i, 61, 1), (1,))) for i in range(5)]
    with torch.no_grad():
        together = forward_head(trunk, role, make_row(examples)).scores
    torch.testing.assert_close(together, plain_scores(trunk, role, examples), atol=1e-5, rtol=1e-5)
