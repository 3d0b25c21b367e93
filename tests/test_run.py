import functools
import hashlib
import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import small_recipe
from processes import align, start

from align.artifact import FACTS, Artifact
from align.plan import make_plan
from align.run import _write_listing

STAGES = ("sft", "reward", "dpo", "ppo", "evaluate")
KEPT = {"adapter_model.safetensors", "adapter_config.json", "head.safetensors", "probes.json", "results.json", "samples.jsonl"}


def contents(folder):
    """The hash of every file of a run or stage that has no seconds in it: weights, probes, samples, results."""
    files = [path for path in sorted(folder.rglob("*")) if path.name in KEPT and "archive" not in path.relative_to(folder).parts]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def facts_of(run):
    return {name: json.loads((run / name / FACTS).read_text()) for name in STAGES if (run / name / FACTS).is_file()}


def changed(run, before):
    """Stages whose artifact.json was written since `before`, a former result of `times`."""
    return {name for name, moment in times(run).items() if moment != before.get(name)}


def times(run):
    return {name: (run / name / FACTS).stat().st_mtime_ns for name in STAGES if (run / name / FACTS).is_file()}


def steps_of(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


# What a whole run leaves --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STAGES)
def test_an_artifact_describes_itself_whole(finished, name):
    artifact = Artifact.open(finished / name, verify=True)
    files = {path.relative_to(artifact.folder).as_posix() for path in artifact.folder.rglob("*") if path.is_file()}
    assert files == set(artifact.facts["files"]) | {FACTS}
    assert not any("checkpoint" in file or ".new" in file for file in files)
    assert artifact.kind == {"reward": "reward_model", "evaluate": "evaluation"}.get(name, "policy")
    assert artifact.base.identity == artifact.facts["base"]["identity"]
    assert {"align", "torch", "transformers", "peft", "python"} <= set(artifact.facts["versions"])
    assert artifact.facts["seconds"] > 0
    assert artifact.facts["peak_memory_gb"] > 0


@pytest.mark.parametrize("name", STAGES)
def test_an_artifact_knows_the_files_it_was_made_from(finished, name):
    for look in facts_of(finished)[name]["data"].values():
        (source,) = look["sources"]
        content = Path(source["path"]).read_bytes()
        assert source["files"][0]["sha256"] == hashlib.sha256(content).hexdigest()
        assert look["rows"] == look["records"] == len(content.splitlines())
        assert look["rejected"] == {}


def test_parents_are_the_artifacts_beside_it(finished):
    facts = facts_of(finished)
    parents = {name: {role: parent and parent["name"] for role, parent in of["parents"].items()} for name, of in facts.items()}
    assert parents["sft"] == {"policy": None}
    assert parents["reward"] == parents["dpo"] == {"policy": "sft"}
    assert parents["ppo"] == {"policy": "sft", "reward_model": "reward"}
    assert list(parents["evaluate"].values()) == [None, "sft", "dpo", "ppo", "reward"]
    for name in STAGES:
        for role, parent in facts[name]["parents"].items():
            if parent:
                assert Artifact.open(finished / name).parent(role).identity == facts[parent["name"]]["identity"]


def test_what_must_hold_before_the_first_step_was_checked(finished):
    checks = {name: facts["checks"] for name, facts in facts_of(finished).items()}
    assert checks["sft"] == {"change_at_start": 0.0}
    assert checks["reward"]["change_at_start"] == 0
    assert checks["reward"]["centred_on"] == "demonstrations"
    assert len(checks["reward"]["probe_scores"]) >= 2
    assert checks["dpo"] == {"loss_at_start": pytest.approx(math.log(2), abs=1e-4), "margin_at_start": 0.0}
    assert checks["ppo"] == {"change_at_start": 0.0, "kl_at_start": 0.0, "ratio_off_1_at_start": 0.0}


def test_metrics_are_numbers_and_curves_have_every_step(finished):
    for name, facts in facts_of(finished).items():
        numbers = [value for value in facts["metrics"].values() if isinstance(value, float)]
        assert all(map(math.isfinite, numbers))
        steps = steps_of(finished / name)
        assert steps == list(range(1, len(steps) + 1))
        if name != "evaluate":
            assert (finished / name / "curves.png").is_file()
    assert len(steps_of(finished / "ppo")) == 3
    assert facts_of(finished)["sft"]["metrics"].keys() == {"heldout_loss", "heldout_loss_before"}


def test_the_sampler_is_the_policy_it_samples_for(finished):
    assert facts_of(finished)["ppo"]["metrics"]["sampler_mismatch"] < 1e-4


def test_policies_are_compared_with_the_first(finished):
    metrics = facts_of(finished)["evaluate"]["metrics"]
    rows = metrics["policies"]
    assert [row["name"] for row in rows] == ["base", "sft", "dpo", "ppo"]
    assert (rows[0]["kl"], rows[0]["difference"]) == (0, None)
    for row in rows:
        assert 0 <= row["scored"] <= metrics["prompts"]
        assert (row["score"] is None) == (row["scored"] == 0)
        assert 0 < row["length"] <= 12
        assert 0 <= row["ended"] <= 1
    assert all(row["scored"] for row in rows)  # or nothing above was seen of a score
    assert not all(row["ended"] == 1 for row in rows)


def test_nothing_half_made_is_left(finished):
    assert {path.name for path in finished.iterdir()} == {*STAGES, "run.json", ".lock", "report.html"}


def test_the_commands_that_made_something_are_kept_without_passwords(finished, script, finished_copy, tmp_path):
    def commands(run):
        return json.loads((run / "run.json").read_text())["commands"]

    assert commands(finished) == [f"python {script} --out small"]
    assert align("run", script, "--out", finished_copy, folder=tmp_path).code == 0  # which makes nothing
    assert commands(finished_copy) == commands(finished)
    recipe = SimpleNamespace(name="small", stages={"sft": None})
    _write_listing(recipe, finished_copy, "python r.py --set label.judge=https://me:secret@host/v1#m")
    assert commands(finished_copy)[-1] == "python r.py --set label.judge=https://...@host/v1#m"
    (finished_copy / "run.json").write_text("[]")  # of no version
    _write_listing(recipe, finished_copy, None)
    assert commands(finished_copy) == []


# What is done is not done again --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [[], ["--plan"]], ids=["run", "plan"])
def test_a_second_run_does_nothing_at_once_and_without_torch(finished_copy, script, option):
    before = times(finished_copy)
    program = f"""
import runpy, sys
sys.argv = [{str(script)!r}, "--out", {str(finished_copy)!r}, *{option!r}]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    print("code", stop.code, "heavy", sorted({{"torch", "transformers", "peft", "matplotlib"}} & set(sys.modules)))
"""
    begun = time.perf_counter()
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begun
    assert ended.stdout.endswith("code 0 heavy []\n"), ended.stderr
    assert changed(finished_copy, before) == set()
    assert "Nothing to do" in ended.stdout if option else ended.stdout.count("done before") == len(STAGES)
    assert seconds < 3


def test_a_plan_makes_nothing(script, tmp_path):
    ended = align("run", script, "--plan", "--out", "new", folder=tmp_path)
    assert ended.code == 0
    assert ended.out.count("not made yet") == len(STAGES)
    assert "5 of 5 stages would run" in ended.out
    assert not (tmp_path / "new").exists()


def test_changing_a_setting_runs_what_depends_on_it_and_changing_it_back_runs_nothing(finished_copy, script, tmp_path):
    before, made = times(finished_copy), contents(finished_copy)
    ended = align("run", script, "--out", finished_copy, "--set", "ppo.kl_coef=0.5", folder=tmp_path)
    assert ended.code == 0, ended.err
    assert "changed: kl_coef 0.05 -> 0.5" in ended.out
    assert changed(finished_copy, before) == {"ppo", "evaluate"}
    assert contents(finished_copy)["ppo/adapter/adapter_model.safetensors"] != made["ppo/adapter/adapter_model.safetensors"]

    ended = align("run", script, "--out", finished_copy, folder=tmp_path)
    assert ended.code == 0, ended.err
    assert ended.out.count("taken from the archive") == 2
    assert changed(finished_copy, before) == set()
    assert contents(finished_copy) == made
    assert len(list((finished_copy / "archive").iterdir())) == 2
    Artifact.open(finished_copy / "evaluate", verify=True)


@pytest.fixture
def planned(tiny_base, data, finished):
    """The state and reason of every stage of the finished run's recipe once settings are changed."""

    def plan(*overrides, base=tiny_base, data=data, **options):
        recipe = small_recipe(base, data)
        for text in overrides:
            recipe.override(text)
        return {p.stage.name: (p.state, p.reason) for p in make_plan(recipe, finished, **options)}

    return plan


def to_run(plan):
    return {name for name, (state, _) in plan.items() if state == "run"}


@pytest.mark.parametrize(
    ("override", "runs"),
    [
        ("sft.epochs=3", set(STAGES)),
        ("sft.lora.rank=8", set(STAGES)),
        ("recipe.seed=1", set(STAGES)),
        ("recipe.dtype=bfloat16", set(STAGES)),
        ("reward.centering=0.1", {"reward", "ppo", "evaluate"}),
        ("dpo.beta=0.2", {"dpo", "evaluate"}),
        ("ppo.kl_coef=0.5", {"ppo", "evaluate"}),
        ("evaluate.temperature=1.0", {"evaluate"}),
        ("sft.save_every=5", set()),
        ("ppo.save_every=5", set()),
        ("recipe.tracker=wandb", set()),
    ],
)
def test_a_change_reaches_the_stages_that_stand_on_it(planned, override, runs):
    assert to_run(planned(override)) == runs


def test_a_plan_says_why_each_stage_would_run(planned):
    plan = planned("sft.epochs=3", "evaluate.max_new_tokens=5")
    assert plan["sft"][1] == "changed: epochs 2.0 -> 3.0"
    assert plan["dpo"][1] == "changed: policy sft"
    assert plan["ppo"][1] == "changed: policy sft, reward_model reward"
    assert plan["evaluate"][1].startswith("changed: max_new_tokens 12 -> 5, policies.1 sft")


def test_a_plan_claims_no_steps_for_rows_that_another_stage_makes(tiny_base, data, tmp_path):
    recipe = small_recipe(tiny_base, data)
    sampled = recipe.sample(policy=recipe.base, prompts=data / "prompts.jsonl")
    labels = recipe.label(completions=sampled, judge="embedded", trust_judge=True)
    recipe.reward(preferences=labels, demonstrations=data / "chat.jsonl", name="of_labels")
    steps = {planned.stage.name: planned.steps for planned in make_plan(recipe, tmp_path / "run")}
    assert steps["of_labels"] is None
    assert steps["reward"] is not None


def test_a_plan_says_that_the_precision_changed(planned):
    assert planned("recipe.dtype=bfloat16")["sft"][1] == "changed: recipe.dtype float32 -> bfloat16"


def test_changed_data_is_made_again_and_moved_data_is_not(planned, data, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in data.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    assert to_run(planned(data=moved)) == set()
    with (moved / "prompts.jsonl").open("a") as file:
        file.write('{"prompt": "say mauve"}\n')
    plan = planned(data=moved)
    assert to_run(plan) == {"ppo", "evaluate"}
    assert plan["ppo"][1] == "changed: data prompts"


def test_a_changed_base_makes_everything_again(planned, tiny_base, tmp_path):
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    assert to_run(planned(base=base)) == set()
    with (base / "config.json").open("a") as file:
        file.write("\n")
    plan = planned(base=base)
    assert to_run(plan) == set(STAGES)
    assert plan["sft"][1] == "changed: the base model"


# Parts of a recipe ---------------------------------------------------------------------------------------------------------


def test_only_runs_the_stages_named_and_refuses_what_they_lack(script, tmp_path, finished):
    run = tmp_path / "run"
    assert align("run", script, "--out", run, "--only", "sft", folder=tmp_path).code == 0
    assert set(facts_of(run)) == {"sft"}
    ended = align("run", script, "--out", run, "--only", "ppo", folder=tmp_path)
    assert ended.code == 2
    assert "--only ppo: needs reward, which is not done" in ended.err
    assert align("run", script, "--out", run, "--only", "ppo", "--only", "reward", folder=tmp_path).code == 0
    assert set(facts_of(run)) == {"sft", "reward", "ppo"}
    assert contents(run).items() <= contents(finished).items()


def test_from_makes_a_stage_and_all_after_it_again(finished_copy, script, tmp_path):
    before, made = times(finished_copy), contents(finished_copy)
    assert align("run", script, "--out", finished_copy, "--from", "dpo", folder=tmp_path).code == 0
    assert changed(finished_copy, before) == {"dpo", "ppo", "evaluate"}
    assert contents(finished_copy) == made


# Killed ---------------------------------------------------------------------------------------------------------------------


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_step(stage, step, rest=0.0):
    """After a step's metrics are written and before its checkpoint; `rest` seconds go by in every step before."""
    from align.progress import Meter

    record = Meter.step

    def record_and_die(meter, number, *arguments):
        time.sleep(rest)
        record(meter, number, *arguments)
        if (meter.name, number) == (stage, step):
            kill()

    Meter.step = record_and_die


def kill_at_call(module, name, number):
    """In place of the given call of a function."""
    owner = importlib.import_module(module)
    function, calls = getattr(owner, name), []

    def die(*arguments, **keywords):
        calls.append(1)
        if len(calls) == number:
            kill()
        return function(*arguments, **keywords)

    setattr(owner, name, die)


def kill_in_checkpoint(stage, number):
    """With half of a stage's checkpoint written."""
    from align.learn import checkpoint

    save, saved = checkpoint.save_file, []

    def write_half(tensors, path, **keywords):
        save(tensors, path, **keywords)
        saved.extend([path] if path.parent.name.startswith(stage) else [])
        if len(saved) == number:
            os.truncate(path, path.stat().st_size // 2)
            kill()

    checkpoint.save_file = write_half


def stall_at_step(stage, step):
    """Go no further than a step until killed from outside."""
    from align.progress import Meter

    record = Meter.step

    def record_and_stall(meter, number, *arguments):
        record(meter, number, *arguments)
        if (meter.name, number) == (stage, step):
            time.sleep(600)

    Meter.step = record_and_stall


MOMENTS = {
    "sft, before its first checkpoint": ("sft", None, functools.partial(kill_at_step, "sft", 1)),
    "sft, between a step and its checkpoint": ("sft", 2, functools.partial(kill_at_step, "sft", 3)),
    "sft, described but without its name": ("sft", None, functools.partial(kill_at_call, "align.artifact", "archive", 1)),
    "reward, half a checkpoint written": ("reward", 1, functools.partial(kill_in_checkpoint, "reward", 2)),
    "reward, its last checkpoint written": ("reward", 3, functools.partial(kill_at_call, "align.stages.reward", "_centre", 1)),
    "dpo, the reference known and no step made": ("dpo", None, functools.partial(kill_at_call, "align.stages.dpo", "_check_start", 1)),
    "dpo, between a step and its checkpoint": ("dpo", 1, functools.partial(kill_at_step, "dpo", 2)),
    "ppo, scoring the second round": ("ppo", 1, functools.partial(kill_at_call, "align.stages.ppo", "score_rollouts", 2)),
    "ppo, updating in the second round": ("ppo", 1, functools.partial(kill_at_call, "align.stages.ppo", "update_step", 8)),
    "evaluate, between two policies": ("evaluate", None, functools.partial(kill_at_step, "evaluate", 2)),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_stage_started_again_makes_the_same_bytes(finished, script, tmp_path, moment):
    stage, resumed_from, before = MOMENTS[moment]
    run, done = tmp_path / "run", STAGES[: STAGES.index(stage)]
    for name in done:
        shutil.copytree(finished / name, run / name)
    command = ("run", script, "--out", run, "--only", stage)
    assert align(*command, folder=tmp_path, before=before).code == -signal.SIGKILL
    assert set(facts_of(run)) == set(done)
    assert [path.name.partition("-")[0] for path in (run / ".partial").iterdir()] == [stage]
    ended = align(*command, folder=tmp_path)
    assert ended.code == 0, ended.err
    assert (f"{stage}: going on from step {resumed_from} of" in ended.out) == (resumed_from is not None)
    assert contents(run / stage) == contents(finished / stage) != {}
    assert steps_of(run / stage) == steps_of(finished / stage)
    assert Artifact.open(run / stage, verify=True).identity == facts_of(finished)[stage]["identity"]
    assert not (run / ".partial").exists()


def test_a_killed_run_started_again_makes_the_same_bytes_to_the_end(finished, script, tmp_path):
    run = tmp_path / "run"
    before = functools.partial(kill_at_step, "reward", 2)
    assert align("run", script, "--out", run, folder=tmp_path, before=before).code == -signal.SIGKILL
    assert align("run", script, "--out", run, folder=tmp_path).code == 0
    assert contents(run) == contents(finished)


def test_a_run_killed_twice_makes_the_same_bytes(finished, script, tmp_path):
    run = tmp_path / "run"
    for step in (2, 4):
        before = functools.partial(kill_at_step, "sft", step)
        assert align("run", script, "--out", run, "--only", "sft", folder=tmp_path, before=before).code == -signal.SIGKILL
    assert align("run", script, "--out", run, "--only", "sft", folder=tmp_path).code == 0
    assert contents(run).items() <= contents(finished).items()
    assert steps_of(run / "sft") == steps_of(finished / "sft")


def test_a_resumed_stage_counts_the_seconds_before_it_was_killed(script, tmp_path):
    run = tmp_path / "run"
    before = functools.partial(kill_at_step, "sft", 4, rest=0.2)
    assert align("run", script, "--out", run, "--only", "sft", folder=tmp_path, before=before).code == -signal.SIGKILL
    assert align("run", script, "--out", run, "--only", "sft", folder=tmp_path).code == 0
    seconds = [json.loads(line)["seconds"] for line in (run / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert seconds == sorted(seconds)
    assert facts_of(run)["sft"]["seconds"] > 0.6


def test_one_run_at_a_time_in_a_folder_and_the_next_as_soon_as_the_first_is_killed(finished, script, tmp_path):
    run = tmp_path / "run"
    first = start("run", script, "--out", run, folder=tmp_path, before=functools.partial(stall_at_step, "reward", 2))
    wait_for(lambda: step_reached(run, "reward", 2))
    before = times(run)
    second = align("run", script, "--out", run, folder=tmp_path)
    assert second.code == 2
    assert second.err.startswith(f"error: {run}: process {first.process.pid} on ")
    assert "is running here" in second.err
    assert "--out runs/other" in second.err
    assert changed(run, before) == set()
    assert align("run", script, "--out", run, "--plan", folder=tmp_path).code == 0
    os.kill(first.process.pid, signal.SIGKILL)
    assert first.end().code == -signal.SIGKILL
    assert align("run", script, "--out", run, folder=tmp_path).code == 0
    assert contents(run) == contents(finished)


def test_an_interrupted_run_says_how_to_go_on_and_does(finished, script, tmp_path):
    run = tmp_path / "run"
    running = start("run", script, "--out", run, "--only", "sft", folder=tmp_path, before=functools.partial(stall_at_step, "sft", 3))
    wait_for(lambda: step_reached(run, "sft", 3))
    os.kill(running.process.pid, signal.SIGINT)
    ended = running.end()
    assert ended.code == 130
    assert "Run the same command again to go on from the last checkpoint" in ended.err
    assert "Traceback" not in ended.err
    ended = align("run", script, "--out", run, "--only", "sft", folder=tmp_path)
    assert "sft: going on from step 2 of 6" in ended.out
    assert contents(run).items() <= contents(finished).items()


def step_reached(run, stage, step):
    return any(step in steps_of(folder) for folder in run.glob(f".partial/{stage}-*") if (folder / "metrics.jsonl").is_file())


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


# What is shipped ------------------------------------------------------------------------------------------------------------

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.py"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_plans(recipe, tmp_path):
    ended = align("run", recipe, "--plan", "--out", tmp_path / "run", folder=tmp_path)
    assert ended.code == 0, ended.err
    assert "stages would run" in ended.out
    assert align("run", recipe, "--help", folder=tmp_path).code == 0
