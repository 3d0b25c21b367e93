"""`align judge audit` from its command line to the page, with a real (tiny) judge; and every mistake in its options."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import heldout_records, write_rows

from align import Lora, Recipe
from align.cli import guarded
from align.judge import local
from align.judge.cli import add_judge_commands, run_judge


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def align(*arguments):
    """The exit code of `align judge audit ...`."""
    parser = argparse.ArgumentParser(prog="align")
    add_judge_commands(parser.add_subparsers(dest="command", required=True))
    return guarded(lambda: run_judge(parser.parse_args(["judge", "audit", *map(str, arguments)])))


@pytest.fixture
def gold(tmp_path):
    return write_rows(
        tmp_path / "gold.jsonl", [{"prompt": f"q{i}?", "chosen": f"yes {i}, and why", "rejected": f"no {i}"} for i in range(12)]
    )


@pytest.fixture
def chats(tmp_path):
    reply = "A reply that is long enough to be cut in half, and is about number"
    rows = [{"messages": [{"role": "user", "content": f"q{i}?"}, {"role": "assistant", "content": f"{reply} {i}."}]} for i in range(6)]
    return write_rows(tmp_path / "chats.jsonl", rows)


@pytest.fixture
def refusal(capsys):
    """The message that a mistake ends with."""

    def message(*arguments):
        assert align(*arguments) == 2
        return capsys.readouterr().err

    return message


def test_a_judge_is_measured_told_and_written_down(tiny_base, gold, chats, capsys):
    assert align("--judge", tiny_base, "--gold", gold, "--prompts", chats, "--out", "out", "--set", "max_unparsed=1") == 0
    printed = capsys.readouterr().out
    told = json.loads(Path("out/audit.json").read_text())
    assert told["asked"] == 12 + 4 * 6
    assert told["verdict"] in printed
    for words in ("gold.jsonl", "padded copy", "same text twice", "out/audit.html", "s of the judge's time", "price 0.00"):
        assert words in printed
    assert Path("out/audit.html").read_text().startswith("<!doctype html>")


def test_replay_answers_from_the_ledger_alone(tiny_base, gold, capsys, monkeypatch):
    given = ["--judge", tiny_base, "--gold", gold, "--ledger", "l.sqlite", "--json"]
    assert align(*given) == 0
    first = capsys.readouterr().out
    monkeypatch.setattr(local.LocalJudge, "ask", lambda *_: pytest.fail("the judge was asked"))
    assert align(*given, "--replay") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(first)


def test_rows_left_out_of_the_gold_file_are_told(tiny_base, tmp_path, capsys):
    rows = [{"prompt": "q", "chosen": "yes", "rejected": "no"}, {"prompt": "r", "chosen": "", "rejected": "no"}]
    assert align("--judge", tiny_base, "--gold", write_rows(tmp_path / "g.jsonl", rows)) == 0
    assert "--gold: 1 row is left out (1 chosen is empty)" in capsys.readouterr().out


def test_a_reward_model_is_measured_on_none_of_the_preferences_it_has_learned(tiny_base, data, tmp_path, capsys):
    recipe = Recipe("judge", base=str(tiny_base), dtype="float32")
    recipe.reward(preferences=data / "preferences.jsonl", lora=Lora(rank=2), batch_size=4, row_tokens=64, holdout=0.2)
    run = recipe.run(tmp_path / "run")
    capsys.readouterr()
    assert align("--judge", run / "reward", "--gold", data / "preferences.jsonl") == 0
    heldout = heldout_records(data / "preferences.jsonl", "preference", 0.2)
    assert f"{12 - len(heldout)} pairs are left out, because the judge was trained on them" in capsys.readouterr().out
    told = json.loads(Path("runs/audit/audit.json").read_text())
    assert told["asked"] == len(heldout) > 0
    assert told["all_people"]["correct"]["share"] is not None


def test_replies_are_counted_as_a_table_and_as_json(tmp_path, capsys):
    rows = [{"subset": "[s]", "judge": "j", "strategy": "t", "raw_ab": "Output (a)", "raw_ba": "Output (b)", "label": 1}] * 3
    path = write_rows(tmp_path / "replies.jsonl", rows)
    assert align("--replies", path) == 0
    assert "[s] j t" in capsys.readouterr().out
    assert align("--replies", path, "--json") == 0
    (group,) = json.loads(capsys.readouterr().out)["groups"]
    assert [group[name] for name in ("subset", "judge", "strategy", "n", "correct_ab", "agree")] == ["[s]", "j", "t", 3, 3, 3]
    assert group["kappa"] is None  # both orders always say the same, as they would by chance


def test_help_tells_every_setting_and_imports_no_torch():
    code = (
        "import sys, argparse; from align.judge.cli import add_judge_commands; p = argparse.ArgumentParser();"
        "add_judge_commands(p.add_subparsers())\n"
        "try: p.parse_args(['judge', 'audit', '--help'])\n"
        "except SystemExit: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    from align.settings import JudgeSettings

    assert all(f"  {name}=" in done.stdout for name in JudgeSettings.model_fields)
    assert "correct_ab, correct_ba" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


# Mistakes


def test_no_judge_and_nothing_to_measure_it_on(refusal, gold):
    assert "no judge is given. Name one with --judge" in refusal("--gold", gold)
    assert "nothing to measure the judge on. Give people's preferences with --gold FILE" in refusal("--judge", "embedded")
    assert "--pairs 0: expected 1 or more" in refusal("--judge", "embedded", "--gold", gold, "--pairs", 0)


def test_settings_that_are_none(refusal, gold):
    assert "--set 'abstain': expected setting=value, for example --set abstain=0.1" in refusal(
        "--judge", "j", "--gold", gold, "--set", "abstain"
    )
    assert "abstain" in refusal("--judge", "j", "--gold", gold, "--set", "abstian=0.1")
    assert "under 0.5" in refusal("--judge", "j", "--gold", gold, "--set", "abstain=2")


def test_a_judge_that_is_none(refusal, gold):
    assert "judge 'embeded'" in refusal("--judge", "embeded", "--gold", gold)


def test_files_that_do_not_fit(refusal, gold, tmp_path):
    assert "none.jsonl" in refusal("--judge", "embedded", "--gold", "none.jsonl")
    ties = write_rows(tmp_path / "ties.jsonl", [{"prompt": "q", "chosen": "yes", "rejected": "no", "chosen_probability": 0.5}])
    assert "none of 1 pairs has a better side and was not learned by the judge (0 were)" in refusal("--judge", "embedded", "--gold", ties)
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "q1"}, {"prompt": "q2"}])
    assert "holds prompts without replies" in refusal("--judge", "embedded", "--prompts", prompts)
    assert "'nothing.txt'" in refusal("--judge", "embedded", "--gold", gold, "--template", "nothing.txt")


def test_replaying_what_was_never_asked(refusal, tiny_base, gold, tmp_path):
    given = ("--judge", tiny_base, "--gold", gold, "--replay")
    assert "--replay: there is no ledger runs/audit/judgements.sqlite" in refusal(*given)
    assert align("--judge", tiny_base, "--gold", gold, "--ledger", "l.sqlite", "--pairs", 2) == 0
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": "new", "chosen": "yes", "rejected": "no"}])
    message = refusal("--judge", tiny_base, "--gold", other, "--ledger", "l.sqlite", "--replay")
    assert "l.sqlite has no reply of local" in message
    assert "to any of the 1 pairs" in message


def test_options_that_replies_have_no_use_for(refusal, gold):
    assert "--replies asks no judge, so --judge has no meaning beside it" in refusal("--replies", "r.jsonl", "--judge", "embedded")
    assert "so --set has no meaning beside it" in refusal("--replies", "r.jsonl", "--set", "seed=1")
    assert "--gold: 2 files are given; --replies takes one" in refusal("--replies", "r.jsonl", "--gold", gold, "--gold", gold)
    assert "r.jsonl: there is no such file" in refusal("--replies", "r.jsonl")


def test_a_folder_that_cannot_be_written(refusal, tiny_base, gold, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file/out" in refusal("--judge", tiny_base, "--gold", gold, "--out", tmp_path / "file/out")
