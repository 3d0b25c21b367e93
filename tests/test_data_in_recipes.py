"""Data of every form in a recipe on the tiny base, and what its artifacts say of it."""

import csv
import functools
import gzip
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SMALL, small_recipe, write_rows
from processes import align

from align import Lora, Recipe
from align.artifact import FACTS, Artifact
from align.data.sources import Source
from align.errors import AlignError

WORDS = ["red", "blue", "green", "grey", "pink", "black", "white", "brown", "gold", "teal", "plum", "lime"]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
QUICK = {**SMALL, "epochs": 1.0, "lora": Lora(rank=2)}


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("align.run.draw", lambda *_: None)
        yield


def talk(asked, answered):
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}


def chats(path, words=WORDS, start="say"):
    return write_rows(path, [talk(f"{start} {word}", word) for word in words])


@pytest.fixture
def sft(tiny_base, tmp_path):
    """Train on data and return the artifact's facts."""

    def run(data, *overrides, **settings):
        recipe = Recipe("one", base=str(tiny_base), dtype="float32")
        recipe.sft(data=data, **{**QUICK, **settings})
        for text in overrides:
            recipe.override(text)
        return Artifact.open(recipe.run(tmp_path / "run") / "sft", verify=True).facts

    return run


def shown_of(facts):
    """How many examples were trained on, held out, and left out."""
    data = facts["data"]["data"]
    return data["training"] + data["heldout"], sum(data["rejected"].values())


# What data= may be -----------------------------------------------------------------------------------------------------------


def test_columns_of_a_stage_name_those_of_its_file(sft, tmp_path):
    write_rows(tmp_path / "own.jsonl", [{"x1": f"say {word}", "x2": word} for word in WORDS])
    facts = sft(tmp_path / "own.jsonl", columns={"prompt": "x1", "completion": "x2"})
    assert shown_of(facts) == (12, 0)
    with pytest.raises(AlignError, match=r"(?s)own.jsonl: the columns are not recognised.*columns=\{"):
        sft(tmp_path / "own.jsonl", name="other")


def test_columns_that_the_file_lacks_are_refused(sft, tmp_path):
    with pytest.raises(AlignError, match="'nothing'"):
        sft(chats(tmp_path / "a.jsonl"), columns={"prompt": "nothing", "completion": "messages"})


def test_a_list_of_sources_with_weights_and_caps(sft, tmp_path):
    many = chats(tmp_path / "many.jsonl", [f"w{i}" for i in range(40)], "tell")
    twice, extra = chats(tmp_path / "twice.jsonl"), chats(tmp_path / "extra.jsonl", WORDS[:3], "sing")
    facts = sft([Source(str(twice), weight=2.0), {"path": str(many), "cap": 10}, extra], holdout=0.0)
    data = facts["data"]["data"]
    assert data["training"] == 2 * 12 + 10 + 3
    assert data["records"] == 12 + 10 + 3
    assert data["rows"] == 12 + 40 + 3
    assert [(Path(s["path"]).name, s["rows"], s["records"], s["weight"]) for s in data["sources"]] == [
        ("twice.jsonl", 12, 12, 2.0),
        ("many.jsonl", 40, 10, 1.0),
        ("extra.jsonl", 3, 3, 1.0),
    ]


def folder_of_three(folder):
    """The same conversations as three kinds of files."""
    (folder / "sub").mkdir(parents=True)
    chats(folder / "a.jsonl", WORDS[:4])
    with (folder / "b.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("question", "answer"), *((f"say {word}", word) for word in WORDS[4:8])])
    rows = "".join(json.dumps(talk(f"say {word}", word)) + "\n" for word in WORDS[8:])
    (folder / "sub" / "c.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    return folder


def test_a_folder_a_glob_csv_and_gzip(sft, tmp_path):
    folder = folder_of_three(tmp_path / "all")
    data = sft(folder)["data"]["data"]
    assert (data["rows"], data["records"]) == (12, 12)
    assert data["format"] == "messages, question/answer"
    assert [Path(file["path"]).name for file in data["sources"][0]["files"]] == ["a.jsonl", "b.csv", "c.jsonl.gz"]
    assert shown_of(sft(str(folder / "*.csv"))) == (4, 0)
    assert shown_of(sft(str(folder / "**" / "*.jsonl*"))) == (8, 0)
    assert shown_of(sft(folder / "sub" / "c.jsonl.gz", holdout=0.0)) == (4, 0)


def test_the_same_records_train_the_same_whatever_file_they_are_in(sft, tmp_path):
    chats(tmp_path / "a.jsonl")
    path = tmp_path / "b.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("question", "answer"), *((f"say {word}", word) for word in WORDS)])
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    weights = {name: sft(tmp_path / name)["files"]["adapter/adapter_model.safetensors"] for name in ("a.jsonl", "b.csv", "c.jsonl.gz")}
    assert weights["a.jsonl"] == weights["b.csv"] == weights["c.jsonl.gz"]


def test_data_is_set_from_the_command_line_in_every_form(sft, tmp_path):
    first, second = chats(tmp_path / "first.jsonl"), chats(tmp_path / "second.jsonl", WORDS[:5], "sing")
    assert sft(first, f"sft.data={second}")["data"]["data"]["records"] == 5
    assert sft(first, f"sft.data={json.dumps([str(first), str(second)])}")["data"]["data"]["records"] == 17
    data = sft(first, f"sft.data={json.dumps({'path': str(first), 'cap': 4, 'weight': 3.0})}", "sft.holdout=0.0")["data"]["data"]
    assert (data["records"], data["training"]) == (4, 12)
    data = sft(first, f"sft.data={json.dumps([{'path': str(first), 'weight': 2}, str(second)])}", "sft.holdout=0.0")["data"]["data"]
    assert data["training"] == 29


# Longer than the limit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "overlong", "cut"), [("drop", 1, 0), ("shorten_prompt", 0, 1), ("cut_completion", 0, 1)])
def test_policies_from_the_command_line(sft, tmp_path, policy, overlong, cut):
    turns = [{"role": ("user", "assistant")[i % 2], "content": "x" * 10} for i in range(4)]
    write_rows(tmp_path / "long.jsonl", [*(talk(f"say {word}", word) for word in WORDS), {"messages": turns}])
    facts = sft(tmp_path / "long.jsonl", "sft.max_length=30", f"sft.on_overlong={policy}", holdout=0.0)
    data = facts["data"]["data"]
    assert (data["overlong"], data["cut"], data["training"]) == (overlong, cut, 13 - overlong)
    assert facts["settings"]["on_overlong"] == policy
    assert ("rejected.jsonl" in facts["files"]) == bool(overlong)


def test_too_long_as_an_error_trains_nothing(sft, tmp_path):
    with pytest.raises(AlignError, match=r"a.jsonl:1: over sft.max_length of 10 tokens.*on_overlong=drop"):
        sft(chats(tmp_path / "a.jsonl"), "sft.max_length=10", "sft.on_overlong=error")
    assert not (tmp_path / "run" / "sft").exists()


# What an artifact says -----------------------------------------------------------------------------------------------------------


def test_an_artifact_tells_its_data_and_holds_what_was_rejected(sft, tmp_path):
    rows = [talk(f"say {word}", word) for word in WORDS]
    bad = [talk("say <|end|>", "x"), talk("empty", ""), rows[0], talk("long", "x" * 60)]
    path = write_rows(tmp_path / "mixed.jsonl", [*rows, *bad])
    facts = sft(path, max_bad_rows=0.2, max_length=40)
    data = facts["data"]["data"]
    content = path.read_bytes()
    assert data["sources"][0]["files"] == [{"path": str(path), "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}]
    assert data["sources"][0]["format"] == data["format"] == "messages"
    assert (data["rows"], data["records"], data["bytes"]) == (16, 14, len(content))
    assert data["rejected"] == {"a turn of the assistant is empty": 1, "duplicate of an earlier record": 1}
    assert data["unfit"] == {"its text contains the control token": 1}
    assert (data["overlong"], data["cut"], data["training"] + data["heldout"]) == (1, 0, 12)
    listing = tmp_path / "run" / "sft" / "rejected.jsonl"
    assert facts["files"]["rejected.jsonl"]["sha256"] == hashlib.sha256(listing.read_bytes()).hexdigest()
    found = {row["where"]: row["reason"] for row in map(json.loads, listing.read_text().splitlines())}
    assert found == {
        f"{path}:13": "its text contains the control token",
        f"{path}:14": "a turn of the assistant is empty",
        f"{path}:15": "duplicate of an earlier record",
        f"{path}:16": "over the longest length",
    }


@pytest.fixture(scope="module")
def run_with_bad_rows(tiny_base, data, tmp_path_factory):
    """A run of every stage, each of whose files has a row at its end that cannot be read as what the stage takes."""
    folder = tmp_path_factory.mktemp("bad")
    bad = {
        "chat": talk("x", ""),
        "preferences": {"prompt": "x", "chosen": "y", "rejected": "y"},
        "prompts": {"prompt": ""},
        "heldout": {"prompt": ""},
    }
    for name, row in bad.items():
        (folder / f"{name}.jsonl").write_text((data / f"{name}.jsonl").read_text() + json.dumps(row) + "\n")
    recipe = small_recipe(tiny_base, folder)
    for name in recipe.stages:
        recipe.override(f"{name}.max_bad_rows=0.3")
    recipe.override("ppo.iterations=1")
    return recipe.run(folder / "run")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("sft", "chat"),
        ("reward", "preferences"),
        ("dpo", "preferences"),
        ("ppo", "prompts"),
        pytest.param("evaluate", "heldout"),
    ],
)
def test_every_stage_holds_what_it_rejected(run_with_bad_rows, name, file):
    assert "rejected.jsonl" in Artifact.open(run_with_bad_rows / name, verify=True).facts["files"]
    (row,) = [json.loads(line) for line in (run_with_bad_rows / name / "rejected.jsonl").read_text().splitlines()]
    path = run_with_bad_rows.parent / f"{file}.jsonl"
    assert row["where"] == f"{path}:{len(path.read_text().splitlines())}"
    assert row["reason"]
    assert row["row"]


def test_prompts_that_do_not_fit_the_base_are_left_out_of_an_evaluation(tiny_base, data, run_with_bad_rows, tmp_path):
    prompts = [{"prompt": "say one"}, {"prompt": "say two"}, {"prompt": "say <|end|>"}]
    recipe = Recipe("other", base=str(tiny_base), dtype="float32")
    reward = recipe.load(run_with_bad_rows / "reward")
    path = write_rows(tmp_path / "prompts.jsonl", prompts)
    recipe.evaluate(policies=[recipe.base], reward_model=reward, prompts=path, max_new_tokens=4, max_bad_rows=0.5)
    artifact = Artifact.open(recipe.run(tmp_path / "run") / "evaluate")
    assert artifact.facts["data"]["prompts"]["used"] == 2
    assert "rejected.jsonl" in artifact.facts["files"]


def test_demonstrations_that_are_all_too_long_are_refused_before_the_training(tiny_base, data, tmp_path):
    recipe = Recipe("one", base=str(tiny_base), dtype="float32")
    long = chats(tmp_path / "long.jsonl", start="say " * 20)
    recipe.reward(preferences=data / "preferences.jsonl", demonstrations=long, max_length=40, **QUICK)
    with pytest.raises(AlignError, match="demonstrations"):
        recipe.run(tmp_path / "run")
    assert not list((tmp_path / "run").rglob("metrics.jsonl"))


def test_duplicates_across_sources_count_once_and_are_told(sft, tmp_path):
    first, second = chats(tmp_path / "first.jsonl"), chats(tmp_path / "second.jsonl", [*WORDS[:3], "other"])
    data = sft([first, second])["data"]["data"]
    assert data["records"] == 13
    assert data["rejected"] == {"duplicate of another source's record": 3}
    assert [source["records"] for source in data["sources"]] == [12, 1]


# Trouble stops the run before anything is trained -----------------------------------------------------------------------------------


def refused(*arguments, folder, cache):
    ended = align(*arguments, folder=folder, before=functools.partial(use_cache, cache))
    assert "Traceback" not in ended.err, ended.err
    assert ended.code == 2, ended.out + ended.err
    assert ended.err.startswith("error: ")
    return ended.err


def use_cache(folder):
    os.environ["ALIGN_CACHE"] = str(folder)


def pair(asked, chosen, rejected, **more):
    return {"prompt": asked, "chosen": chosen, "rejected": rejected, **more}


LATER = {
    "an empty reply for dpo": ("dpo.preferences", [pair("a", "b", "c"), pair("d", "", "f")], ["bad.jsonl:2", "chosen is empty"]),
    "a control token for dpo": (
        "dpo.preferences",
        [pair("a", "b", "c"), pair("d", "<|end|>", "f")],
        ["bad.jsonl:2 (<|end|>)", "control token"],
    ),
    "a control token for ppo": ("ppo.prompts", [{"prompt": "a"}, {"prompt": "<|pad|>"}], ["bad.jsonl:2 (<|pad|>)", "control token"]),
    "a control token for evaluate": (
        "evaluate.prompts",
        [{"prompt": "a"}, {"prompt": "<|pad|>"}],
        ["bad.jsonl:2 (<|pad|>)", "control token"],
    ),
    "tools for sft": (
        "sft.data",
        [{**talk(f"say {i}", "x"), "tools": [TOOL]} for i in range(4)],
        ["the chat template has no place for tools", "bad.jsonl:1"],
    ),
    "tools for dpo": (
        "dpo.preferences",
        [pair(f"say {i}", "x", "y", tools=[TOOL]) for i in range(4)],
        ["the chat template has no place for tools", "bad.jsonl:1"],
    ),
    "tools for ppo": (
        "ppo.prompts",
        [{"prompt": f"say {i}", "tools": [TOOL]} for i in range(4)],
        ["the chat template has no place for tools", "bad.jsonl:1"],
    ),
}


@pytest.mark.parametrize("trouble", LATER)
def test_bad_rows_of_any_stage_stop_the_run_before_anything_is_trained(script, tmp_path, trouble):
    where, rows, expected = LATER[trouble]
    write_rows(tmp_path / "bad.jsonl", rows)
    message = refused("run", script, "--out", "run", "--set", f"{where}=bad.jsonl", folder=tmp_path, cache=tmp_path / ".cache")
    assert message.startswith(f"error: {where}: ")
    assert all(part in message for part in expected), message
    stage = where.partition(".")[0]
    if "tools" not in trouble:
        assert f"--set {stage}.max_bad_rows=" in message
    assert not list((tmp_path / "run").rglob(FACTS))
    assert not list((tmp_path / "run").rglob("metrics.jsonl"))


def test_bad_demonstrations_stop_the_run_before_anything_is_trained(script, tmp_path):
    write_rows(tmp_path / "bad.jsonl", [talk("a", "b"), talk("c", "<|end|>")])
    options = ["--out", "run", "--only", "sft", "--only", "reward", "--set", "reward.demonstrations=bad.jsonl"]
    message = refused("run", script, *options, folder=tmp_path, cache=tmp_path / ".cache")
    assert message.startswith("error: reward.demonstrations: 1 of 2 rows cannot be used")
    assert not list((tmp_path / "run").rglob("metrics.jsonl"))


def test_bad_rows_that_are_allowed_stop_nothing(script, tmp_path, data):
    rows = [*map(json.loads, (data / "chat.jsonl").read_text().splitlines()), talk("a", "<|end|>")]
    write_rows(tmp_path / "bad.jsonl", rows)
    options = ["--set", "sft.data=bad.jsonl", "--set", "sft.max_bad_rows=0.1", "--only", "sft", "--out", "run"]
    ended = align("run", script, *options, folder=tmp_path, before=functools.partial(use_cache, tmp_path / ".cache"))
    assert ended.code == 0, ended.err
    assert "1 left out: its text contains the control token" in ended.out
    assert (tmp_path / "run" / "sft" / "rejected.jsonl").is_file()


# The cache ---------------------------------------------------------------------------------------------------------------------------


def test_a_plan_with_data_converted_before_is_quick_and_without_torch(script, tmp_path):
    rows = 20_000
    write_rows(tmp_path / "many.jsonl", [talk(f"say {i}", str(i)) for i in range(rows)])
    program = f"""
import runpy, sys
sys.argv = [{str(script)!r}, "--plan", "--out", "run", "--set", "sft.data=many.jsonl"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    print("code", stop.code, "heavy", sorted({{"torch", "transformers", "peft", "matplotlib", "datasets"}} & set(sys.modules)))
"""
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        environment = {**os.environ, "ALIGN_CACHE": str(tmp_path / ".cache"), "COLUMNS": "200"}
        ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
        seconds.append(time.perf_counter() - begun)
        assert ended.stdout.endswith("code 0 heavy []\n"), ended.stdout + ended.stderr
        assert f"{rows:,} data" in ended.stdout
    assert min(seconds[1:]) < 3
    assert not (tmp_path / "run").exists()


def test_a_second_run_converts_and_renders_nothing(sft, tmp_path, monkeypatch):
    from align.data import convert, tokenise

    path = chats(tmp_path / "a.jsonl")
    before = sft(path)

    def fail(*_, **__):
        raise AssertionError("done again")

    monkeypatch.setattr(convert, "_convert", fail)
    monkeypatch.setattr(tokenise, "render", fail)
    again = sft(path, "sft.learning_rate=0.001")
    assert again["identity"] != before["identity"]
    assert again["data"] == before["data"]
