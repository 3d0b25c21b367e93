import shutil
import sys
from pathlib import Path

import pytest

from align.artifact import Artifact
from align.base import find_base
from align.errors import AlignError
from align.judge.endpoint import EndpointJudge
from align.judge.local import LocalJudge
from align.judge.open import fitting_template, open_judge
from align.judge.reward import RewardJudge
from align.prompts import PromptTemplate
from align.settings import JudgeSettings

SETTINGS = JudgeSettings()
PRINCIPLED = JudgeSettings(template="prompts/judge_principle.txt", constitution="prompts/constitution.txt")


def test_each_form_opens_its_judge(small_run, tiny_base):
    run = Path(small_run)
    sft, reward = Artifact.open(run / "sft"), Artifact.open(run / "reward")
    base = find_base(str(tiny_base))
    template = PromptTemplate.load(SETTINGS.template)
    for spec, kind, model, used in (
        (str(tiny_base), LocalJudge, base.identity, template.fingerprint),
        (base, LocalJudge, base.identity, template.fingerprint),
        (str(run / "sft"), LocalJudge, sft.identity, template.fingerprint),
        (sft, LocalJudge, sft.identity, template.fingerprint),
        (run / "reward", RewardJudge, reward.identity, ""),
        (reward, RewardJudge, reward.identity, ""),
        ("http://localhost:8000/v1#small/model", EndpointJudge, "small/model", template.fingerprint),
    ):
        judge = open_judge(spec, SETTINGS)
        assert (type(judge), judge.model, judge.template) == (kind, model, used)


def test_a_template_of_the_callers_comes_before_that_of_the_settings(tiny_base):
    own = PromptTemplate.load("prompts/judge_score.txt")
    judge = open_judge(str(tiny_base), SETTINGS, own)
    assert (judge.template, judge.pointwise) == (own.fingerprint, True)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("embeded", "judge 'embeded': base 'embeded': found no such folder or file.* Did you mean 'embedded'?"),
        ("localhost:8000/v1#m", "Did you mean 'http://localhost:8000/v1#m'?"),
        ("runs/nothing/here", "Expected 'embedded' or another base, the folder of a stage that made a policy or a reward model"),
        (
            "http://me:secret@localhost:8000/v1",
            r"judge http://localhost: names no model; expected it after a '#': 'http://host:port/v1#name'",
        ),
    ],
)
def test_what_names_no_judge_is_refused_with_the_forms(spec, told):
    with pytest.raises(AlignError, match="(?s)" + told) as refused:
        open_judge(spec, SETTINGS)
    assert "secret" not in str(refused.value)


def test_a_run_and_a_stage_that_judges_nothing_are_refused(small_run, tmp_path):
    with pytest.raises(AlignError, match="is a run, not one of its stages; expected one of them, such as .*/dpo"):
        open_judge(str(small_run), SETTINGS)
    with pytest.raises(AlignError, match="evaluate: is the evaluation of a run, which cannot judge. Expected 'embedded'"):
        open_judge(str(Path(small_run) / "evaluate"), SETTINGS)


def test_a_damaged_stage_is_refused(small_run, tmp_path):
    folder = Path(shutil.copytree(small_run, tmp_path / "run")) / "reward"
    (folder / "head.safetensors").write_bytes(b"x")
    with pytest.raises(AlignError, match="reward: damaged: head.safetensors"):
        open_judge(str(folder), SETTINGS)


def test_templates_are_held_against_what_will_fill_them(tmp_path):
    assert fitting_template(PRINCIPLED).kind == "pair"
    with pytest.raises(AlignError, match=r"judge_principle.txt: uses \$principle, but there is no constitution to draw one from"):
        fitting_template(SETTINGS.model_copy(update={"template": "prompts/judge_principle.txt"}))
    with pytest.raises(AlignError, match=r"judge_pair.txt:\d+: does not use \$principle, which would be lost"):
        fitting_template(PRINCIPLED.model_copy(update={"template": "prompts/judge_pair.txt"}))
    with pytest.raises(AlignError, match="critique.txt:1: is a template of kind 'critique'; expected 'pair' or 'score'"):
        fitting_template(SETTINGS.model_copy(update={"template": "prompts/critique.txt"}))
    (tmp_path / "odd.txt").write_text("kind: pair\nfirst: A\nsecond: B\nreply: verdict\n---\n[user]\n$prompt $first $completion_b\n")
    with pytest.raises(AlignError, match=r"odd.txt:7: uses \$completion_b, which nobody fills. Filled: \$first, \$prompt, \$second."):
        fitting_template(SETTINGS.model_copy(update={"template": str(tmp_path / "odd.txt")}))


def test_opening_an_endpoint_needs_no_torch():
    import subprocess

    program = (
        "import sys; from align.judge.open import open_judge; from align.settings import JudgeSettings;"
        "open_judge('http://localhost:1/v1#m', JudgeSettings()); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
