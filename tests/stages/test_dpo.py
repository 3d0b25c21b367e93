import json
import math

import pytest
import torch
from conftest import SMALL, make_trainee, randomise
from safetensors.torch import load_file, save_file

from align import Recipe
from align.artifact import Artifact
from align.errors import AlignError
from align.learn.optimise import train
from align.model.load import load_role, open_trunk
from align.model.packing import make_row, pack
from align.progress import Meter
from align.records import Message, Preference
from align.settings import DPOSettings
from align.stages.dpo import REFERENCE, DirectPreference, _check_start, reference_logps

REPLIES = [("red", "der"), ("blue", "eulb eulb"), ("a longer reply", "no"), ("grey", "gray")]
PROBABILITIES = [1.0, 0.8, 0.5, 0.1]


def preferences():
    return [
        Preference(
            prompt=[Message(role="user", content=f"say {i}")],
            chosen=[Message(role="assistant", content=chosen)],
            rejected=[Message(role="assistant", content=rejected)],
            chosen_probability=probability,
        )
        for i, ((chosen, rejected), probability) in enumerate(zip(REPLIES, PROBABILITIES, strict=True))
    ]


def opened(chat, tmp_path, **changes):
    """A fresh trainee, the four preferences as examples, and the objective with the reference computed as the stage does."""
    trainee, rows, settings = make_trainee(chat), preferences(), DPOSettings(**changes)
    examples = [chat.preference(i, row["prompt"], row["chosen"], row["rejected"]) for i, row in enumerate(rows)]
    reference = reference_logps(trainee, pack(examples, settings.row_tokens), len(rows), tmp_path / REFERENCE)
    return trainee, examples, DirectPreference(trainee, torch.tensor([row["chosen_probability"] for row in rows]), reference, settings)


def plain_logps(trainee, role, examples):
    """Summed log-probabilities (chosen, rejected), one plain forward a completion."""
    found = []
    for example in examples:
        for completion in example.completions:
            ids = torch.tensor([example.prompt + completion])
            with torch.no_grad(), trainee.trunk.switched_to(role):
                logprobs = torch.log_softmax(trainee.trunk.model(ids, use_cache=False).logits[0], -1)
            at = len(example.prompt)
            found.append(sum(float(logprobs[at + i - 1, token]) for i, token in enumerate(completion)))
    return torch.tensor(found).view(-1, 2)


def total(objective, examples, row_tokens=1024):
    totals = objective.totals(examples)
    return float(sum(objective(row, totals)[0] for row in pack(examples, row_tokens)))


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("sigmoid", lambda beta: math.log(2)),
        ("ipo", lambda beta: 1 / (4 * beta**2)),
        ("hinge", lambda beta: 1.0),
        ("apo_zero", lambda beta: 1.0),
        ("sigmoid_norm", lambda beta: math.log(2)),
    ],
)
def test_the_loss_at_the_start_is_known(loss, expected, beta, chat, tmp_path):
    """A policy that equals its reference has log-ratio 0, whatever the labels."""
    _, examples, objective = opened(chat, tmp_path, loss=loss, beta=beta)
    assert total(objective, examples) == pytest.approx(expected(beta), abs=1e-6)
    sums = objective(make_row(examples), objective.totals(examples))[1]
    assert sums["margin"] == (0.0, 4)
    assert sums["chosen_reward"] == sums["rejected_reward"] == (0.0, 4)
    assert _check_start(objective, pack(examples, 1024), objective.settings) == {
        "loss_at_start": pytest.approx(expected(beta), abs=1e-6),
        "margin_at_start": 0.0,
    }


def test_the_reference_is_what_training_starts_from_and_not_the_base(chat, tmp_path):
    trainee, examples, objective = opened(chat, tmp_path)
    torch.testing.assert_close(objective.reference, plain_logps(trainee, trainee.before, examples), atol=1e-4, rtol=1e-5)
    base = plain_logps(trainee, type(trainee.before)(), examples)
    assert (objective.reference - base).abs().min() > 1e-3


def test_the_reference_is_computed_once_and_read_from_its_file_after(chat, tmp_path):
    trainee, examples, objective = opened(chat, tmp_path)
    assert torch.equal(load_file(tmp_path / REFERENCE)["logps"], objective.reference)
    save_file({"logps": torch.full((4, 2), 7.0)}, tmp_path / REFERENCE)
    again = reference_logps(trainee, pack(examples, 1024), 4, tmp_path / REFERENCE)
    assert again.tolist() == [[7.0, 7.0]] * 4
    assert [path.name for path in tmp_path.iterdir()] == [REFERENCE]


def test_rows_that_are_left_out_have_no_reference(chat, tmp_path):
    """Unknown is not zero: a row nobody computed is nan, and would stop the training that used it."""
    trainee, examples, _ = opened(chat, tmp_path)
    reference = reference_logps(trainee, pack(examples[1:3], 1024), 4, tmp_path / "some")
    assert reference.isnan().tolist() == [[True, True], [False, False], [False, False], [True, True]]


def test_the_wrong_reference_is_refused(chat, tmp_path):
    _, examples, objective = opened(chat, tmp_path)
    objective.reference[0, 0] += 1
    with pytest.raises(AlignError, match="dpo: the loss before the first step is .*; expected 0.693147"):
        _check_start(objective, pack(examples, 1024), objective.settings)


def test_each_row_s_own_probability_reaches_the_loss(chat, tmp_path):
    """sum over rows of p * -ln sigmoid(beta d) + (1 - p) * -ln sigmoid(-beta d), over 4, from plain forwards."""
    trainee, examples, objective = opened(chat, tmp_path, beta=0.3)
    randomise(trainee.trunk, "stage", seed=5)
    moved = plain_logps(trainee, trainee.role, examples) - plain_logps(trainee, trainee.before, examples)
    d = (0.3 * (moved[:, 0] - moved[:, 1])).tolist()
    expected = sum(p * math.log1p(math.exp(-x)) + (1 - p) * math.log1p(math.exp(x)) for p, x in zip(PROBABILITIES, d, strict=True)) / 4
    assert max(map(abs, d)) > 0.5
    assert total(objective, examples) == pytest.approx(expected, rel=1e-4)
    assert total(objective, examples, row_tokens=16) == pytest.approx(expected, rel=1e-4)
    sums = objective(make_row(examples), objective.totals(examples))[1]
    assert sums["margin"] == (pytest.approx(sum(d), rel=1e-3), 4)
    right = sum((x > 0) == (p > 0.5) for p, x in zip(PROBABILITIES, d, strict=True) if p != 0.5)
    assert sums["accuracy"] == (right, 3)


def test_the_sft_term_is_per_token_of_the_chosen_completions(chat, tmp_path):
    trainee, examples, objective = opened(chat, tmp_path, sft_weight=0.7)
    chosen = plain_logps(trainee, trainee.role, examples)[:, 0].sum() / sum(len(e.completions[0]) for e in examples)
    assert total(objective, examples) == pytest.approx(math.log(2) - 0.7 * float(chosen), rel=1e-5)


def test_simpo_has_no_reference(chat, tmp_path):
    """-ln sigmoid(beta * (mean chosen - mean rejected) - gamma), and the file's numbers play no part."""
    trainee, examples, objective = opened(chat, tmp_path, loss="simpo", beta=2.0, simpo_gamma=0.4)
    logps = plain_logps(trainee, trainee.role, examples)
    expected = 0.0
    for (chosen, rejected), example, p in zip(logps.tolist(), examples, PROBABILITIES, strict=True):
        means = [logp / len(c) for logp, c in zip((chosen, rejected), example.completions, strict=True)]
        for probability, (one, other) in ((p, means), (1 - p, means[::-1])):
            expected += probability * math.log1p(math.exp(-(2 * (one - other) - 0.4))) / 4
    assert total(objective, examples) == pytest.approx(expected, rel=1e-5)
    objective.reference += 5
    assert total(objective, examples) == pytest.approx(expected, rel=1e-5)


def test_training_prefers_the_chosen_completions(chat, tmp_path):
    """Thirty steps on labels that are sure: every margin is positive, and the row labelled the other way round is negative."""
    trainee, examples, objective = opened(chat, tmp_path, batch_size=4, epochs=30.0, learning_rate=2e-3)
    meter = Meter("dpo", tmp_path, ())
    train(objective, trainee.parameters, examples, [], objective.settings, tmp_path, meter, ["x"] * 4)
    moved = plain_logps(trainee, trainee.role, examples) - objective.reference
    margins = moved[:, 0] - moved[:, 1]
    assert margins[0] > 1
    assert 0 < margins[1] < margins[0]
    assert margins[3] < -1


def test_the_run_records_its_start_and_keeps_its_reference(small_run, data):
    artifact = Artifact.open(small_run / "dpo")
    checks = artifact.facts["checks"]
    assert checks["loss_at_start"] == pytest.approx(math.log(2), abs=1e-6)
    assert checks["margin_at_start"] == 0
    logps = load_file(small_run / "dpo" / REFERENCE)["logps"]
    assert logps.shape == (12, 2)
    assert torch.isfinite(logps).all()
    first = json.loads((small_run / "dpo" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["margin"] == 0
    trunk, chat = open_trunk(artifact.base, artifact, "float32")
    role = load_role(trunk, artifact)
    assert [name.split("-")[0] for name in role.adapters] == ["sft", "dpo"]


def test_pairs_that_training_does_not_come_to_need_no_reference(tiny_base, data, tmp_path):
    recipe = Recipe("part", base=str(tiny_base), dtype="float32")
    recipe.dpo(preferences=data / "preferences.jsonl", epochs=0.3, **SMALL)
    folder = recipe.run(tmp_path / "run") / "dpo"
    facts = Artifact.open(folder).facts["data"]["preferences"]
    known = torch.isfinite(load_file(folder / REFERENCE)["logps"]).all(1)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1  # one step, of four pairs
    assert known.sum() == 4 + facts["heldout"] < len(known)
