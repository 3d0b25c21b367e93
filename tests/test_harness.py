import json

import pytest
from conftest import said, write_rows

from align import harness
from align.artifact import Artifact

TASK = """task: colours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def tasks(tmp_path):
    """A folder with a task of three questions."""
    rows = [{"question": f"say {word}", "choices": [word, word[::-1] + "??"], "answer": 0} for word in ("red", "blue", "green")]
    file = write_rows(tmp_path / "colours.jsonl", rows)
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "colours.yaml").write_text(TASK.format(file=file))
    return folder


def test_a_task_of_one_s_own_is_measured_on_a_policy(small_run, tasks, tmp_path, capsys):
    out = tmp_path / "found.json"
    code, shown, _ = said(capsys, "evaluate", small_run / "sft", "--tasks", "colours", "--include", tasks, "--out", out)
    assert code == 0
    facts = json.loads(out.read_text())
    assert (facts["policy"], facts["identity"]) == ("sft", Artifact.open(small_run / "sft").identity)
    metric = facts["results"]["colours"]["acc"]
    assert metric["value"] in (0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1)
    assert metric["interval"][0] <= metric["value"] <= metric["interval"][1]
    assert facts["examples"] == {"colours": 3}
    assert "colours" in shown
    assert [path.name for path in tmp_path.glob(".exported-*")] == []  # the export it was measured on is gone


def test_no_more_examples_than_asked_for(small_run, tasks, tmp_path, capsys):
    out = tmp_path / "found.json"
    code, _, _ = said(capsys, "evaluate", small_run / "sft", "--tasks", "colours", "--include", tasks, "--limit", 2, "--out", out)
    assert code == 0
    assert json.loads(out.read_text())["examples"] == {"colours": 2}


def test_a_task_that_is_not_known_is_a_message(small_run, capsys):
    code, _, err = said(capsys, "evaluate", small_run / "sft", "--tasks", "colors")
    assert code == 2
    assert "--tasks: the harness knows no task 'colors'. See them all: lm-eval ls tasks." in err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--tasks", "colours", "--policies", "sft"], "--policies: goes with --prompts, and is nothing to --tasks."),
        (["--tasks", "colours", "--set", "best_of=4", "--reward", "reward"], "--reward and --set: goes with --prompts"),
        (
            ["--prompts", "mine.jsonl", "--limit", 2, "--include", "."],
            "--include and --limit: goes with --tasks, and is nothing to --prompts.",
        ),
    ],
)
def test_what_would_be_ignored_is_refused(small_run, capsys, arguments, told):
    code, _, err = said(capsys, "evaluate", small_run, *arguments)
    assert code == 2
    assert told in err


def test_data_that_cannot_be_fetched_is_a_message(small_run, tasks, tmp_path, capsys):
    (tmp_path / "colours.jsonl").unlink()
    code, _, err = said(capsys, "evaluate", small_run / "sft", "--tasks", "colours", "--include", tasks, "--out", tmp_path / "found.json")
    assert code == 2
    assert "--tasks colours: the harness stopped (FileNotFoundError" in err
    assert not (tmp_path / "found.json").exists()


def test_without_the_harness_the_message_says_how_to_get_it(small_run, monkeypatch, capsys):
    monkeypatch.setattr(harness, "PACKAGE", "lm_eval_that_is_not_there")
    code, _, err = said(capsys, "evaluate", small_run / "sft", "--tasks", "colours")
    assert code == 2
    assert "the package lm-eval is not installed. Install it: pip install 'lm-eval" in err


def test_prompts_and_tasks_are_not_both_measured(small_run, capsys):
    code, _, err = said(capsys, "evaluate", small_run, "--tasks", "colours", "--prompts", "a.jsonl")
    assert code == 2
    assert "not allowed with argument" in err
