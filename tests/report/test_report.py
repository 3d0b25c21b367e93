"""The report of a run: its facts, its page, and the page in a real browser."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import write_rows

from align.artifact import FORMAT
from align.cli import main
from align.confidence import in_words, prompts_needed, t_quantile
from align.errors import AlignError
from align.report.chart import chain, intervals, lines, ticks
from align.report.facts import run_facts
from align.report.page import _cost_charts, page, write_report
from align.trl_settings import settings_of

HOSTILE = '<script>window.hit=1</script> & \x1b[31mred\u202e "quoted" </p>'


@pytest.fixture
def run(small_run, tmp_path):
    """A copy that may be changed."""
    return Path(shutil.copytree(small_run, tmp_path / "run"))


def edit(path, change):
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))


def samples(run, rows):
    """Other samples for the run's evaluation, with the artifact still whole."""
    write_rows(run / "evaluate" / "samples.jsonl", rows)
    size = (run / "evaluate" / "samples.jsonl").stat().st_size
    edit(run / "evaluate" / "artifact.json", lambda facts: facts["files"]["samples.jsonl"].update(bytes=size))


def test_the_facts_are_the_artifacts(small_run):
    facts = run_facts(small_run)
    assert [stage["name"] for stage in facts["stages"]] == ["sft", "reward", "dpo", "ppo", "evaluate"]
    assert facts["missing"] == []
    assert facts["seconds"] == pytest.approx(sum(stage["seconds"] for stage in facts["stages"]))
    rows = {(row["stage"], row["role"]): row for row in facts["data"]}
    assert rows["sft", "data"]["rows"] == 12
    assert rows["reward", "preferences"]["longer_is_better"] is not None
    assert {stage["stage"] for stage in facts["curves"]} == {"sft", "reward", "dpo", "ppo"}
    (rounds,) = facts["ppo"]
    assert [point["round"] for point in rounds["training"]] == [1, 2, 3]
    (evaluation,) = facts["evaluations"]
    assert [policy["name"] for policy in evaluation["policies"]] == ["base", "sft", "dpo", "ppo"]
    assert len(evaluation["samples"]) == evaluation["prompts"]
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize("choose_by", [None, "watched"])
def test_a_reward_that_was_only_watched_has_a_chart_of_its_own(choose_by):
    """And where rounds are chosen by it, its held-out score is not drawn among the scores in training, which are another's."""

    def points(slope):
        return [
            {"round": i, "kl": i * i, "score": i, "length": 9.0, "score/trained": float(i), "score/watched": slope * i} for i in range(1, 4)
        ]

    rounds = {"training": points(1.0), "heldout": points(-1.0), "best_round": 1, "rewards": ["trained", "watched"], "choose_by": choose_by}
    charts = {chart["title"]: str(chart["chart"]) for chart in _cost_charts(rounds)}
    assert list(charts) == ["score", "score by trained", "score by watched", "tokens a completion"]
    assert "held out: -3 at square root of KL to the reference 3" in charts["score by watched"]
    assert ("held out" in charts["score"]) == (choose_by is None)


def test_a_policy_that_says_the_same_to_many_prompts_is_not_just_called_better(run):
    warning = "ppo says the same to 9 of 12 prompts: '<b>sorry'. Read its answers before its score."
    edit(run / "evaluate" / "artifact.json", lambda facts: facts["checks"].update(warnings={"ppo": warning}))
    (box,) = (part for part in page([run_facts(run)]).split('<div class="verdict') if "<b>ppo</b>" in part[:60])
    assert "ppo says the same to 9 of 12 prompts: &#39;&lt;b&gt;sorry&#39;." in box.partition("</div>")[0]


def test_how_far_to_trust_a_reward_model_is_on_the_page(run):
    def by_source(facts):
        group = {"pairs": 7, "accuracy": 3 / 7, "accuracy_interval": [0.16, 0.75], "longer_is_better_accuracy": 0.5}
        facts["metrics"]["heldout_by"]["by_source"] = {"<b>.jsonl": group}

    edit(run / "reward" / "artifact.json", by_source)
    (graded,) = run_facts(run)["reward_models"]
    assert graded["groups"]["all"]["pairs"] == sum(each["n"] for each in graded["calibration"])
    text = page([run_facts(run)])
    assert "How far to trust reward</h2>" in text
    assert "<td>&lt;b&gt;.jsonl</td><td>7</td><td>43%<small>16% to 75%</small></td><td>50%</td>" in text
    edit(run / "reward" / "artifact.json", lambda facts: facts["metrics"].pop("heldout_by"))  # made by an older version
    assert "How far to trust" not in page([run_facts(run)])


@pytest.mark.parametrize(("price", "told"), [(1.25, True), (0.0, False), (None, False)])
def test_what_a_judge_cost_is_told_where_it_cost_anything(run, price, told):
    def labels(facts):
        facts["stage"] = "label"
        facts["metrics"] = {"labelled": 310, "price": price}

    edit(run / "dpo" / "artifact.json", labels)
    text = page([run_facts(run)])
    assert ("<b>1.25</b><span>dpo: price of the judge&#39;s replies</span>" in text) == told
    assert "labelled 310" in text


def test_only_settings_that_are_not_the_defaults_are_told(small_run):
    stages = {stage["name"]: stage["settings"] for stage in run_facts(small_run)["stages"]}
    assert stages["sft"]["batch_size"] == 4
    assert "learning_rate" not in stages["sft"]


@pytest.mark.parametrize(("trainer", "more"), [("KTO", 0), ("of another TRL", 20)])
def test_of_the_settings_of_a_trl_trainer_too(run, trainer, more):
    """Where the installed TRL has no such trainer its defaults are not known, so all are told."""
    settings = settings_of("KTO")(trainer="KTO", learning_rate=0.5).model_dump(mode="json") | {"trainer": trainer}
    edit(run / "sft" / "artifact.json", lambda facts: facts.update(stage="trl", settings=settings))
    told = next(stage["settings"] for stage in run_facts(run)["stages"] if stage["name"] == "sft")
    assert {name: told[name] for name in ("trainer", "learning_rate")} == {"trainer": trainer, "learning_rate": 0.5}
    assert len(told) == 2 if not more else len(told) > more


def test_the_page_needs_nothing_else(small_run):
    text = page([run_facts(small_run)])
    assert "default-src 'none'" in text
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", text)
    assert text.count("<svg") >= 8
    assert all(int(count) > 0 for count in re.findall(r'data-points="(\d+)"', text))


def test_the_commands_are_on_the_page(run):
    assert run_facts(run)["commands"] == []  # it was run from Python
    edit(run / "run.json", lambda listing: listing.update(commands=["python recipe.py --set sft.data='<b>.jsonl'"]))
    assert "<pre>python recipe.py --set sft.data=&#39;&lt;b&gt;.jsonl&#39;" in page([run_facts(run)])


def test_text_of_models_and_data_is_shown_and_never_obeyed(run):
    answer = {"text": HOSTILE, "score": 1.0, "ended": True}
    samples(run, [{"prompt": [{"role": "user", "content": HOSTILE}], "answers": {n: [answer] for n in ("base", "sft", "dpo", "ppo")}}])
    text = write_report(run).read_text()
    assert "<script>window" not in text
    assert "&lt;script&gt;window.hit=1&lt;/script&gt;" in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\\x1b[31mred\\u202e" in html.unescape(text)


def test_an_unfinished_run_says_what_is_missing(run):
    shutil.rmtree(run / "ppo")
    shutil.rmtree(run / "evaluate")
    (run / ".partial" / "ppo-123").mkdir(parents=True)
    facts = run_facts(run)
    assert facts["missing"] == ["ppo", "evaluate"]
    assert [stage["state"] for stage in facts["stages"]] == ["done", "done", "done", "stopped", "not made"]
    assert "Not finished: ppo, evaluate are missing here." in write_report(run).read_text()


def test_a_run_with_nothing_made_yet_has_a_page(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"format": 1, "recipe": "new", "stages": ["sft"]}))
    assert "Not finished: sft is missing here." in write_report(tmp_path).read_text()


def test_what_is_no_run_and_what_a_newer_version_made_are_refused(run, tmp_path):
    with pytest.raises(AlignError, match=r"not a run's folder \(no run\.json\)"):
        write_report(tmp_path)
    edit(run / "sft" / "artifact.json", lambda facts: facts.update(format=FORMAT + 1))
    with pytest.raises(AlignError, match="made by a newer align"):
        write_report(run)


@pytest.mark.parametrize("prompts", [0, 1])
def test_zero_or_one_prompts_say_nothing_of_a_difference(run, prompts):
    def fewer(facts):
        facts["metrics"]["prompts"] = prompts
        for policy in facts["metrics"]["policies"]:
            policy |= {"scored": prompts, "compared": prompts, "difference_interval": None, "score_interval": None}
            policy["difference"] = policy["score"] = 0.5 if prompts else None

    edit(run / "evaluate" / "artifact.json", fewer)
    samples(run, [{"prompt": [{"role": "user", "content": "?"}], "answers": {}}] * prompts)
    assert "nothing can be said against base: fewer than two prompts" in write_report(run).read_text()


def test_a_policy_that_answers_nothing_is_shown(run):
    empty = [{"text": "", "score": None, "ended": False}]
    samples(run, [{"prompt": [{"role": "user", "content": "?"}], "answers": {"base": empty, "sft": [], "dpo": empty, "ppo": empty}}])
    assert 'data-kind="cut"' in write_report(run).read_text()


def test_two_runs_side_by_side_show_what_differs(run, small_run, tmp_path):
    edit(run / "sft" / "artifact.json", lambda facts: facts["settings"].update(learning_rate=0.5))
    text = write_report(run, small_run, tmp_path / "two.html").read_text()
    assert re.search(r"sft\.learning_rate</td><td>0\.5</td><td>default", text)
    assert text.count("<article>") == 2


def test_the_command_writes_the_page_or_prints_the_facts(run, capsys):
    with pytest.raises(SystemExit):
        main(["report", str(run)])
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    with pytest.raises(SystemExit):
        main(["report", str(run), "--json"])
    assert json.loads(capsys.readouterr().out)[0]["recipe"] == "small"
    with pytest.raises(SystemExit) as ended:
        main(["report", str(run), "--out", str(run / "nowhere" / "report.html")])
    assert ended.value.code == 2
    assert "the report cannot be written (No such file or directory). Give another file: --out FILE" in capsys.readouterr().err


# Charts ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.5, 1]), (-0.3, 0.4, [-0.4, -0.2, 0, 0.2, 0.4]), (3, 3, None), (0.0, 0.0, None), (1e-9, 2e-9, None), (-5e6, 7e6, None)],
)
def test_ticks_are_round_and_cover_what_is_shown(low, high, expected):
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 7
    if expected:
        assert set(expected) <= set(found) or found == expected


def test_charts_hold_every_point_and_no_markup_of_their_names():
    chart = lines([{"name": HOSTILE, "points": [[0, 1], [1, 2], [2, 1.5]]}], "step", "loss", marked=[1, 2])
    assert chart.count('class="dot') == 3
    assert 'class="ring"' in chart
    assert "<script>" not in chart
    assert (
        intervals([{"name": "a", "value": 1.0, "interval": [0.5, 1.5]}, {"name": "b", "value": None, "interval": None}], "x").count("dot")
        == 1
    )
    drawn = chain(
        [
            {"name": HOSTILE, "parents": ["base"], "state": "not made", "key": []},
            {"name": "b", "parents": ["base"], "state": "stopped", "key": []},
        ]
    )
    assert drawn.count("<rect") == 3
    assert "<script>" not in drawn


# Words -----------------------------------------------------------------------------------------------------------------------


def test_words_say_no_more_than_the_interval():
    assert in_words(0.2, [0.1, 0.3], 60, "sft") == "better than sft by 0.20 (95% +0.10 to +0.30)"
    assert in_words(-0.2, [-0.3, -0.1], 60, "sft").startswith("worse than sft by 0.20")
    assert in_words(0.1, [-0.1, 0.3], 60, "sft") == "no difference to sft shown with 60 prompts; about 471 would be needed for one of 0.10"
    assert in_words(0.0, [-0.1, 0.1], 60, "sft") == "no difference to sft shown with 60 prompts"
    assert "nothing can be said" in in_words(None, None, 1, "sft")


def test_so_many_prompts_show_a_difference_four_times_in_five():
    import numpy as np

    rng = np.random.default_rng(0)
    spread, difference = 0.5, 0.1
    half = t_quantile(59) * spread / 60**0.5
    needed = prompts_needed(difference, [difference - half, difference + half], 60)
    drawn = rng.normal(difference, spread, (4000, needed))
    low = drawn.mean(1) - 1.96 * drawn.std(1, ddof=1) / needed**0.5
    assert (low > 0).mean() == pytest.approx(0.8, abs=0.025)
    assert prompts_needed(0, [-1, 1], 10) is None


# In a browser ----------------------------------------------------------------------------------------------------------------

DRIVE = """
<script>
const select = document.querySelector(".samples select"), search = document.querySelector(".samples input");
const shown = () => [...document.querySelectorAll(".sample")].filter(card => !card.hidden);
const charts = [...document.querySelectorAll("svg[data-points]")];
const found = {all: shown().length, hit: window.hit || 0, empty: charts.filter(svg => !svg.querySelector("circle")).length};
select.value = "worse"; select.dispatchEvent(new Event("input"));
found.worse = shown().map(card => card.dataset.kind);
select.value = ""; search.value = "zebra"; search.dispatchEvent(new Event("input"));
found.zebra = shown().length;
found.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
document.title = "driven"; document.body.dataset.found = JSON.stringify(found);
</script>
"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(run, tmp_path, width):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    rows = [
        {
            "prompt": [{"role": "user", "content": HOSTILE if i else "zebra"}],
            "answers": {
                n: [{"text": f"{n} {i} {HOSTILE}", "score": s * i, "ended": True}] for n, s in (("base", 0.0), ("sft", 1), ("dpo", -1))
            },
        }
        for i in range(12)
    ]
    samples(run, rows)
    driven = tmp_path / "driven.html"
    driven.write_text(write_report(run).read_text().replace("</body>", f"{DRIVE}</body>"))
    command = [
        chromium,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--window-size={width},900",
        "--enable-logging=stderr",
        "--dump-dom",
    ]
    ended = subprocess.run([*command, f"file://{driven}"], capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in ended.stderr, [line for line in ended.stderr.splitlines() if "CONSOLE" in line]
    found = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', ended.stdout)[1]))
    assert found["all"] == 8
    assert found["hit"] == 0
    assert found["empty"] == 0
    assert set(found["worse"]) == {"worse"}
    assert found["zebra"] == 3  # the prompt with each of the other policies
    assert found["wide"] <= 0  # nothing reaches over the edge of the screen
