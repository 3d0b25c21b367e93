import json

import pytest
from conftest import small_recipe

from align import AlignError, Completions, Recipe
from align.stages import sample


def sampling(tiny_base, data, name="s", **settings):
    recipe = Recipe(name, base=str(tiny_base), dtype="float32")
    defaults = {"completions_per_prompt": 3, "max_new_tokens": 12}
    recipe.sample(policy=recipe.base, prompts=data / "prompts.jsonl", **(defaults | settings))
    return recipe


def rows(folder):
    return [json.loads(line) for line in (folder / "sample" / "completions.jsonl").read_text().splitlines()]


def test_completions_are_grouped_by_prompt_and_cut_ones_are_left_out(tiny_base, data, tmp_path):
    folder = sampling(tiny_base, data).run(tmp_path / "run")
    prompts = [json.loads(line)["prompt"] for line in (data / "prompts.jsonl").read_text().splitlines()]
    found = rows(folder)
    assert [row["prompt"] for row in found] == [p for p in prompts if p in [row["prompt"] for row in found]]
    assert all(c["ended"] and c["text"] and c["policy"] == "base" and c["temperature"] == 0.8 for row in found for c in row["completions"])
    metrics = json.loads((folder / "sample" / "artifact.json").read_text())["metrics"]
    assert metrics["completions"] == sum(len(row["completions"]) for row in found)
    assert 0 < metrics["ended"] < 1  # of all that were sampled
    with_cut = sampling(tiny_base, data, keep_cut=True).run(tmp_path / "cut")
    assert sum(len(row["completions"]) for row in rows(with_cut)) > metrics["completions"]


def test_every_policy_and_temperature_is_named(tiny_base, data, tmp_path):
    recipe = Recipe("two", base=str(tiny_base), dtype="float32")
    sft = recipe.sft(data=data / "chat.jsonl", epochs=0.5)
    handle = recipe.sample(
        policy=[recipe.base, sft], prompts=data / "prompts.jsonl", temperatures=(0.5, 1.0), max_new_tokens=12, keep_cut=True
    )
    assert isinstance(handle, Completions)
    found = rows(recipe.run(tmp_path / "run"))
    sources = {(c["policy"], c["temperature"]) for row in found for c in row["completions"]}
    assert sources == {("base", 0.5), ("base", 1.0), ("sft", 0.5), ("sft", 1.0)}


def test_a_stopped_sampling_goes_on_to_the_same_bytes(tiny_base, data, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "AT_ONCE", 2)
    whole = sampling(tiny_base, data).run(tmp_path / "whole")
    real, calls = sample.Sampler.sample, []

    def stopping(self, *arguments, **keywords):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *arguments, **keywords)

    monkeypatch.setattr(sample.Sampler, "sample", stopping)
    with pytest.raises(KeyboardInterrupt):
        sampling(tiny_base, data).run(tmp_path / "stopped")
    written = next((tmp_path / "stopped" / ".partial").glob("sample-*")) / sample.SAMPLED
    with written.open("a") as file:
        file.write('{"step": 2, "prom')  # the kill came in the middle of a line
    sampling(tiny_base, data).run(tmp_path / "stopped")
    assert len(calls) == 3 + 2  # of four steps, the two that were missing
    assert (tmp_path / "stopped/sample/completions.jsonl").read_bytes() == (whole / "sample/completions.jsonl").read_bytes()


def test_no_completion_that_ends_is_said(tiny_base, data, tmp_path):
    with pytest.raises(AlignError, match=r"sample: none of 24 completions ended its turn within 1 tokens.*sample.keep_cut=true"):
        sampling(tiny_base, data, max_new_tokens=1, temperatures=(0.01,)).run(tmp_path / "run")


def test_prompts_cannot_be_a_handle(tiny_base, data):
    recipe = small_recipe(tiny_base, data)
    completions = recipe.sample(policy=recipe.base, prompts=data / "prompts.jsonl")
    with pytest.raises(AlignError, match=r"again: prompts is a Completions \(stage 'sample'\); expected a file"):
        recipe.sample(name="again", policy=recipe.base, prompts=completions)
