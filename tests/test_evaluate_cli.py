import json
import shutil

import pytest
from conftest import said


def test_policies_of_a_run_are_compared_on_other_prompts(small_run, data, tmp_path, capsys):
    run = shutil.copytree(small_run, tmp_path / "run")
    command = ["evaluate", run, "--prompts", data / "prompts.jsonl", "--policies", "sft", "ppo", "--set", "max_new_tokens=6"]
    code, out, err = said(capsys, *command, "--held-out", small_run / "reward")
    assert code == 0, err
    assert "8 held-out prompts" in out
    results = json.loads((run / "evaluations" / "prompts" / "evaluate" / "results.json").read_text())
    assert [row["name"] for row in results["policies"]] == ["sft", "ppo"]
    code, out, _ = said(capsys, *command, "--held-out", small_run / "reward")
    assert "done before" in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--policies", "nobody"], "has no policy 'nobody'. It has: sft, dpo, ppo."),
        (["--reward", "sft"], "has no reward model 'sft'. It has: reward."),
        (["--set", "bestof=2"], "evaluate.bestof: there is no such setting. Did you mean 'best_of'?"),
    ],
)
def test_mistakes_are_told(small_run, data, tmp_path, capsys, arguments, told):
    code, _, err = said(capsys, "evaluate", small_run, "--prompts", data / "prompts.jsonl", "--out", tmp_path / "out", *arguments)
    assert code == 2
    assert told in err


def test_a_run_without_a_reward_model_says_so(small_run, data, tmp_path, capsys):
    run = shutil.copytree(small_run, tmp_path / "run")
    shutil.rmtree(run / "reward")
    code, _, err = said(capsys, "evaluate", run, "--prompts", data / "prompts.jsonl")
    assert code == 2
    assert "has no finished reward model" in err
