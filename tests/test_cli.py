import functools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import write_rows
from processes import align
from test_run import STAGES, kill_at_step

from align.artifact import FACTS
from align.overrides import help_lines
from align.settings import DPOSettings, EvaluateSettings, PPOSettings, RewardSettings, SFTSettings

COMMAND = Path(sys.executable).with_name("align")


def refused(*arguments, folder, **keywords):
    """What a user is told: exit code 2, one message on stderr, no traceback."""
    ended = align(*arguments, folder=folder, **keywords)
    assert "Traceback" not in ended.err, ended.err
    assert ended.code == 2, ended.out + ended.err
    assert ended.err.startswith(("error: ", "usage: "))
    return ended.err


# Help -------------------------------------------------------------------------------------------------------------------------


def test_help_comes_at_once():
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        ended = subprocess.run([COMMAND, "--help"], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - begun)
    assert min(seconds) < 0.5
    assert all(command in ended.stdout for command in ("run", "show", "chat"))


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["show", "--help"], ["chat", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    program = f"""
import sys
from align.cli import main
try:
    main({arguments!r})
except SystemExit as stop:
    print("code", stop.code, sorted({{"torch", "transformers", "pydantic", "rich", "matplotlib"}} & set(sys.modules)))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.endswith("code 0 []\n")


def test_every_public_name_is_there_and_no_other():
    import align as package

    assert {name for name in dir(package) if getattr(package, name) is None} == set()
    with pytest.raises(AttributeError, match="has no attribute 'Recipes'"):
        package.Recipes  # noqa: B018


def test_the_help_of_a_recipe_lists_every_setting_of_every_stage(script, tmp_path):
    ended = align("run", script, "--help", folder=tmp_path)
    assert ended.code == 0
    kinds = (SFTSettings, RewardSettings, DPOSettings, PPOSettings, EvaluateSettings)
    for stage, kind in zip(STAGES, kinds, strict=True):
        for name, _, expected, meaning in help_lines(kind, stage):
            assert f"\n  {name}=" in ended.out
            assert f"({expected})\n      {meaning}" in ended.out
    for option in ("--plan", "--set", "--out", "--only", "--from"):
        assert option in ended.out
    for file in ("sft.data=FILE", "reward.preferences=FILE", "dpo.preferences=FILE", "ppo.prompts=FILE", "evaluate.prompts=FILE"):
        assert f"  {file}  (now " in ended.out


@pytest.mark.parametrize("arguments", [[], ["frobnicate"], ["run"], ["chat"], ["show"], ["chat", "a", "--temperature", "hot"]])
def test_a_command_line_that_is_no_command_shows_the_usage(arguments, tmp_path):
    assert "usage: align" in refused(*arguments, folder=tmp_path)


# Mistakes ---------------------------------------------------------------------------------------------------------------------

MISTAKES = {
    "no equals sign": (["--set", "ppo.kl_coef"], "--set 'ppo.kl_coef': expected stage.setting=value"),
    "unknown stage": (["--set", "pppo.kl_coef=1"], "this recipe has no stage 'pppo'. It has: sft, reward"),
    "unknown setting": (["--set", "ppo.kl_cof=1"], "ppo.kl_cof: there is no such setting. Did you mean 'kl_coef'?"),
    "unknown nested setting": (["--set", "sft.lora.rnk=1"], "sft.lora.rnk: there is no such setting. Did you mean 'rank'?"),
    "out of range": (["--set", "sft.epochs=0"], "sft.epochs: 0 does not fit; expected a number, over 0"),
    "not a number": (["--set", "sft.epochs=nan"], "sft.epochs: nan does not fit; expected a number, over 0"),
    "unknown tracker": (["--set", "recipe.tracker=x"], "recipe.tracker (tensorboard, wandb, trackio, mlflow)"),
    "unknown --only": (["--only", "stf"], "this recipe has no stage 'stf'. It has: sft, reward"),
    "unknown --from": (["--from", "stf"], "this recipe has no stage 'stf'. It has: sft, reward"),
    "--only without what it needs": (["--only", "ppo"], "--only ppo: needs sft, reward, which is not done"),
    "missing data": (["--set", "sft.data=nothing.jsonl"], "sft.data: there is no file 'nothing.jsonl'."),
    "missing data beside others": (["--set", "sft.data={data}/chta.jsonl"], "there are: chat.jsonl, heldout.jsonl"),
    "no data in a glob": (["--set", "sft.data={data}/*.csv"], "sft.data: nothing matches"),
    "data of another kind": (["--set", "sft.data={data}/prompts.jsonl"], "holds prompts (format 'prompts'"),
    "unknown base": (["--set", "recipe.base=nothing"], "base 'nothing': found no such folder or file"),
    "base without weights": (["--set", "recipe.base={data}"], "the folder holds no config.json or no .safetensors"),
    "missing gguf": (["--set", "recipe.base=x.gguf"], "base 'x.gguf': there is no such file."),
    "unknown option": (["--resume"], "unrecognized arguments: --resume"),
    "no adapter for ppo": (["--set", "ppo.lora=none"], "ppo.lora: None does not fit; expected settings (rank, alpha, targets,"),
    "output is a file": (["--out", "{data}/chat.jsonl"], "chat.jsonl"),
    "output below a file": (["--out", "{data}/chat.jsonl/run"], "chat.jsonl"),
    "a tracker that is not installed": (
        ["--set", "recipe.tracker=mlflow"],
        "the package 'mlflow' is not installed. Install it: pip install mlflow",
    ),
    "layers that are not there": (["--set", "sft.lora.targets=nothing"], "sft.lora.targets: 'nothing' fits no layer of this model."),
    "nothing left to train on": (
        ["--set", "sft.max_length=8"],
        "no row is left to train on (12 over sft.max_length, 0 held out).",
    ),
    "too long is an error": (
        ["--set", "sft.max_length=8", "--set", "sft.on_overlong=error"],
        "chat.jsonl:1: over sft.max_length of 8",
    ),
    "no prompt is short enough": (["--set", "ppo.max_prompt_tokens=1"], "every prompt is over ppo.max_prompt_tokens (1)."),
}
BEFORE_ANYTHING_IS_MADE = list(MISTAKES)[: list(MISTAKES).index("output below a file") + 1]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_users_mistake_is_a_message_and_exit_code_2(script, data, tmp_path, mistake):
    arguments, expected = MISTAKES[mistake]
    arguments = [argument.format(data=data) for argument in arguments]
    assert expected in refused("run", script, "--out", "run", *arguments, folder=tmp_path)
    if mistake in BEFORE_ANYTHING_IS_MADE:
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"{", ["bad.jsonl:1: the file ends in the middle of a value"]),
        (b'{"prompt": "a", "chosen": "b"}\n', ["bad.jsonl: the columns are not recognised", "it lacks rejected", "columns={"]),
        (b'{"prompt": "a", "chosen": "b", "rejected": "b"}\n', ["1 of 1 rows cannot be used", "are the same: bad.jsonl:1"]),
        (b'{"prompt": "a", "chosen": "", "rejected": "b"}\n', ["chosen is empty: bad.jsonl:1"]),
        (b'{"prompt": "a", "chosen": "c", "rejected": "b", "chosen_probability": 2}\n', ["not a number from 0 to 1: bad.jsonl:1 (2)"]),
        (
            b'{"prompt": "a", "chosen": "caf\xe9", "rejected": "b"}\n',
            ["bad.jsonl:1: not UTF-8 text (invalid continuation byte at byte 31"],
        ),
        (b"", ["bad.jsonl: the file is empty"]),
        (b'\n{"prompt": "a <|end|>", "chosen": "c", "rejected": "b"}\n', ["its text contains the control token: bad.jsonl:2 (<|end|>)"]),
    ],
    ids=["no JSON", "no column", "same", "empty", "probability", "no UTF-8", "no rows", "control token"],
)
def test_a_malformed_data_file_is_a_message_that_names_it(script, tmp_path, text, expected):
    (tmp_path / "bad.jsonl").write_bytes(text)
    message = refused("run", script, "--set", "reward.preferences=bad.jsonl", folder=tmp_path)
    assert all(part in message for part in expected)


def broken(base, what):
    """A base that cannot be loaded, though it looks like one."""
    if what == "no tokenizer":
        for path in base.glob("tokenizer*"):
            path.unlink()
    elif what == "weights cut short":
        os.truncate(base / "model.safetensors", 1000)
    elif what == "no JSON":
        (base / "config.json").write_text("{")
    elif what == "unknown architecture":
        (base / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    elif what == "no end of turn":
        settings = json.loads((base / "tokenizer_config.json").read_text())
        (base / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ messages[-1].content }}"}))
        (base / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    return base


@pytest.mark.parametrize("what", ["no tokenizer", "weights cut short", "no JSON", "unknown architecture", "no end of turn"])
def test_a_base_that_cannot_be_loaded_is_a_message_that_names_it(script, tiny_base, tmp_path, what):
    base = broken(Path(shutil.copytree(tiny_base, tmp_path / "base")), what)
    assert str(base) in refused("run", script, "--set", f"recipe.base={base}", "--only", "sft", folder=tmp_path)


def test_a_hub_id_that_cannot_be_fetched_is_a_message_that_names_it(script, tmp_path):
    message = refused("run", script, "--set", "recipe.base=nobody/no-such-model", "--only", "sft", folder=tmp_path)
    assert "nobody/no-such-model" in message


def test_a_gguf_file_that_is_none_is_a_message_that_names_it(script, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"not a model")
    assert "model.gguf" in refused("run", script, "--set", "recipe.base=model.gguf", "--only", "sft", folder=tmp_path)


WRONG_HANDLE = """
from align import Recipe

recipe = Recipe("wrong", base="embedded")
reward_model = recipe.reward(preferences="datasets/preferences.jsonl")
recipe.dpo(policy=reward_model, preferences="datasets/preferences.jsonl")

if __name__ == "__main__":
    recipe.main()
"""


@pytest.mark.parametrize("way", ["align run", "python"])
def test_a_handle_of_the_wrong_kind_is_a_message(tmp_path, way):
    path = tmp_path / "wrong.py"
    path.write_text(WRONG_HANDLE)
    command = [COMMAND, "run", path] if way == "align run" else [sys.executable, path]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ended.stderr.startswith("error: dpo: policy is a RewardModel (stage 'reward'); expected a Policy")
    assert ended.returncode == 2


def test_a_missing_script_is_a_message(tmp_path):
    assert refused("run", "nothing.py", folder=tmp_path) == "error: align run: there is no script 'nothing.py'.\n"


def test_a_script_is_run_as_python_would_run_it(script, tmp_path):
    (tmp_path / "helper.py").write_text("NAME = 'of a helper beside it'\n")
    (tmp_path / "own.py").write_text("import sys\nfrom helper import NAME\nprint(NAME, __name__, sys.argv)\n")
    ended = align("run", "own.py", "--plan", folder=tmp_path)
    assert (ended.code, ended.out) == (0, "of a helper beside it __main__ ['own.py', '--plan']\n")


# Training that goes wrong ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def not_finite(script, tmp_path_factory):
    """What sft says when its numbers overflow, and the folder of the run."""
    folder = tmp_path_factory.mktemp("not_finite")
    settings = ("learning_rate=1", "lora.alpha=1e19", "decay=constant", "warmup=0")  # two steps are finite, the third is not
    overrides = [argument for setting in settings for argument in ("--set", f"sft.{setting}")]
    return refused("run", script, "--out", "run", "--only", "sft", *overrides, folder=folder), folder / "run"


def test_numbers_that_are_not_finite_stop_training_with_the_rows_they_came_from(not_finite, data):
    message, _ = not_finite
    assert message.startswith("error: ")
    assert "finite number" in message
    assert "It came from " in message
    assert f"{data / 'chat.jsonl'}:" in message
    assert "Checkpoints of earlier steps are kept" in message


def test_training_that_was_stopped_keeps_its_checkpoint_and_makes_no_artifact(not_finite):
    _, run = not_finite
    (work,) = (run / ".partial").iterdir()
    assert (work / "checkpoint.safetensors").is_file()
    assert not (run / "sft").exists()


def test_training_that_was_stopped_names_the_setting_to_lower(not_finite):
    message, _ = not_finite
    assert "lower the stage's learning_rate (--set), and run again" in message


@pytest.mark.parametrize(
    ("setting", "stopped", "cure"),
    [
        (
            "lora.alpha=1e19",
            "sampling stopped: the policy's logits are not finite",
            "Lower the learning_rate of the stage that trained it (--set)",
        ),
        ("lora.alpha=1e30", "PPO stopped: in round 1 policy_grad_norm is not a finite", "Lower its learning_rate and value_learning_rate"),
        ("kl_coef=1e30", "PPO stopped: in round 2 value_loss", "Lower its learning_rate and value_learning_rate"),
    ],
    ids=["the logits overflow", "the gradient overflows", "the loss overflows"],
)
def test_ppo_that_is_not_finite_stops(script, finished_copy, tmp_path, setting, stopped, cure):
    settings = ("learning_rate=1", setting, "warmup=0", "epochs=1", "minibatches=1")
    arguments = [argument for each in settings for argument in ("--set", f"ppo.{each}")]
    message = refused("run", script, "--out", finished_copy, "--only", "ppo", *arguments, folder=tmp_path)
    assert message.startswith(f"error: {stopped}")
    assert cure in message
    assert not list(finished_copy.glob("archive/ppo-*"))


# Showing ----------------------------------------------------------------------------------------------------------------------


def test_show_lists_every_stage_of_a_finished_run(finished, tmp_path):
    ended = align("show", finished, folder=tmp_path)
    assert ended.code == 0, ended.err
    assert ended.out.count("│ done") == len(STAGES)
    assert all(f"│ {name} " in ended.out for name in STAGES)
    assert "heldout_loss" in ended.out
    assert "evaluate: 4 held-out prompts" in ended.out


def test_show_prints_one_stage_as_json(finished, tmp_path):
    ended = align("show", finished / "sft", folder=tmp_path)
    facts = json.loads((finished / "sft" / FACTS).read_text())
    assert json.loads(ended.out) == {name: value for name, value in facts.items() if name != "files"}


def test_show_says_which_stage_was_stopped_and_which_were_not_begun(script, tmp_path):
    align("run", script, "--out", "run", folder=tmp_path, before=functools.partial(kill_at_step, "reward", 2))
    ended = align("show", "run", folder=tmp_path)
    assert ended.code == 0, ended.err
    states = {line.split("│")[1].strip(): line.split("│")[4].strip() for line in ended.out.splitlines() if line.startswith("│")}
    middle = "stopped in the middle"
    assert states == {"sft": "done", "reward": middle, "dpo": "not made", "ppo": "not made", "evaluate": "not made"}


def test_show_says_which_stage_stands_on_one_that_has_changed(script, finished_copy, tmp_path):
    assert align("run", script, "--out", finished_copy, "--only", "reward", "--set", "reward.centering=0.5", folder=tmp_path).code == 0
    ended = align("show", finished_copy, folder=tmp_path)
    assert ended.out.count("outdated (reward changed)") == 2


@pytest.mark.parametrize("content", [None, "{", "{}", "[]"])
def test_show_refuses_what_is_no_run(tmp_path, content):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    message = refused("show", tmp_path, folder=tmp_path)
    assert f"{tmp_path}" in message
    assert "run.json" in message


def test_show_refuses_a_damaged_stage(finished_copy, tmp_path):
    (finished_copy / "dpo" / FACTS).write_text("{")
    assert f"{finished_copy / 'dpo'}: damaged" in refused("show", finished_copy, folder=tmp_path)


@pytest.mark.parametrize("name", ["run [red]", "run [/red]"])
def test_a_folder_may_have_any_name(script, finished, tmp_path, name):
    shutil.copytree(finished, tmp_path / name)
    for arguments in (["show", name], ["run", script, "--plan", "--out", name]):
        ended = align(*arguments, folder=tmp_path)
        assert ended.code == 0, ended.err
        assert name in ended.out


# Talking ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def answers(finished, tmp_path_factory):
    """The likeliest answers of the last policy and of sft to two turns, from a pipe to the installed command, as cold as it comes."""
    command = [COMMAND, "chat", finished, "--against", finished / "sft", "--temperature", "0", "--max-new-tokens", "5"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, input="say red\n\nsay blue\n", capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended


def test_two_policies_answer_every_turn_from_a_pipe(answers):
    assert [line.partition(":")[0] for line in answers.stdout.splitlines() if line.startswith(("ppo:", "sft:"))] == ["ppo", "sft"] * 2


def test_chat_writes_only_the_answers(answers):
    assert answers.stderr == ""
    assert answers.stdout.startswith("ppo: ")


def test_one_policy_answers_as_it_does_beside_another(finished, answers, tmp_path):
    ended = align("chat", finished / "ppo", "--temperature", 0, "--max-new-tokens", 5, folder=tmp_path, stdin="say red\n")
    assert ended.code == 0, ended.err
    assert answers.stdout.startswith(f"ppo: {ended.out.strip()}\n")


def test_an_answer_from_a_seed_is_the_same_again(finished, tmp_path):
    said = [align("chat", finished / "sft", "--seed", seed, folder=tmp_path, stdin="say red\n").out for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


def test_a_turn_that_cannot_be_sent_is_told_and_the_next_is_answered(finished, tmp_path):
    ended = align("chat", finished / "sft", "--max-new-tokens", 3, folder=tmp_path, stdin="say <|end|> [/b]\nsay red\n")
    assert ended.code == 0, ended.err
    assert "that cannot be sent: its text contains the control token: <|end|>" in ended.out
    assert len(ended.out.splitlines()) >= 2


def test_nothing_to_say_is_no_mistake(finished, tmp_path):
    ended = align("chat", finished / "sft", folder=tmp_path, stdin="")
    assert (ended.code, ended.out) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{run}/reward"], "{run}/reward: is the reward model of a run; expected a policy, such as {run}/sft."),
        (["{run}/sft", "--against", "{run}/reward"], "{run}/reward: is the reward model of a run; expected a policy, such as {run}/sft."),
        (["{run}/evaluate"], "{run}/evaluate: is the evaluation of a run; expected a policy, such as {run}/sft."),
        (["nothing"], "nothing: not a run's folder (no run.json)."),
        (["{run}/sft", "--temperature", "-1"], "--temperature must be a number of at least 0"),
        (["{run}/sft", "--temperature", "nan"], "--temperature must be a number of at least 0"),
        (["{run}/sft", "--max-new-tokens", "0"], "--max-new-tokens at least 1"),
    ],
)
def test_what_cannot_be_talked_to_is_refused(finished, tmp_path, arguments, expected):
    message = refused("chat", *(a.format(run=finished) for a in arguments), folder=tmp_path, stdin="say red\n")
    assert expected.format(run=finished) in message


def test_chat_refuses_a_run_without_a_policy_and_says_where_to_look(script, tmp_path):
    align("run", script, "--out", "run", folder=tmp_path, before=functools.partial(kill_at_step, "sft", 1))
    assert refused("chat", "run", folder=tmp_path) == "error: run: no finished policy in this run yet. See: align show run\n"


def test_a_reader_that_leaves_early_sees_no_error(finished):
    with subprocess.Popen([COMMAND, "show", finished], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""


def test_rows_of_a_file_given_on_the_command_line_are_used(script, finished, tmp_path):
    write_rows(tmp_path / "own.jsonl", [{"prompt": f"say {word}", "completion": word} for word in ("one", "two", "three", "four", "five")])
    ended = align("run", script, "--plan", "--set", "sft.data=own.jsonl", folder=tmp_path)
    assert "│ 5 data" in ended.out
