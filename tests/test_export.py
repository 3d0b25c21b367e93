import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from huggingface_hub import ModelCard
from processes import align
from test_artifact import allow_files_of

from align import Lora, Recipe
from align.artifact import Artifact
from align.chat import Chat
from align.errors import AlignError
from align.export import converter, export
from align.model.load import load_role, open_trunk

LINES = """
import sys
from transformers import AutoTokenizer
{loading}
folder = sys.argv[1]
model = {model}.from_pretrained(folder, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer.apply_chat_template([{{"role": "user", "content": "say red"}}], add_generation_prompt=True, return_tensors="pt")
answer = model.generate(**ids, max_new_tokens=5)
assert answer.shape[1] > ids["input_ids"].shape[1]
import torch, json
with torch.no_grad():
    logprobs = model(**ids).logits[0].log_softmax(-1)
assert not [name for name in sys.modules if name.split(".")[0] == "align"]
print(json.dumps([ids["input_ids"][0].tolist(), logprobs.tolist()]))
"""
LOADED = {
    "adapter": LINES.format(loading="from peft import AutoPeftModelForCausalLM", model="AutoPeftModelForCausalLM"),
    "merged": LINES.format(loading="from transformers import AutoModelForCausalLM", model="AutoModelForCausalLM"),
}


def loaded_elsewhere(folder, form):
    """Ids of a prompt and the log-probabilities after each, from a process that knows nothing of align."""
    ended = subprocess.run([sys.executable, "-c", LOADED[form], str(folder)], capture_output=True, text=True, cwd="/")
    assert ended.returncode == 0, ended.stderr
    ids, logprobs = json.loads(ended.stdout.splitlines()[-1])
    return ids, torch.tensor(logprobs)


def logprobs_of(artifact, ids):
    trunk, _ = open_trunk(artifact.base, artifact, "float32")
    with torch.no_grad(), trunk.switched_to(load_role(trunk, artifact)):
        return trunk.model(torch.tensor([ids])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_an_exported_policy_is_the_same_without_align(small_run, tmp_path, form):
    artifact = Artifact.open(small_run / "ppo")
    folder = export(small_run / "ppo", form, tmp_path / "out", dtype="float32")
    ids, logprobs = loaded_elsewhere(folder, form)
    assert ids == list(Chat.load(artifact.base.location).prompt_ids([{"role": "user", "content": "say red"}]))
    torch.testing.assert_close(logprobs, logprobs_of(artifact, ids), atol=2e-5, rtol=1e-5)


def test_merged_in_bfloat16_is_near_and_says_how_near(small_run, tmp_path, capsys):
    artifact = Artifact.open(small_run / "ppo")
    folder = export(small_run / "ppo", "merged", tmp_path / "out")
    ids, logprobs = loaded_elsewhere(folder, "merged")
    off = float((logprobs - logprobs_of(artifact, ids)).abs().max())
    assert 0 < off < 1
    said = capsys.readouterr().out
    assert "largest change by merging, on 4 prompts:" in said
    assert "rounded once: on a few prompts a logit moved by up to" in (folder / "README.md").read_text()


def test_a_fully_trained_policy_is_exported_as_it_is(tiny_base, data, tmp_path):
    recipe = Recipe("full", base=str(tiny_base), dtype="float32")
    recipe.sft(data=data / "chat.jsonl", lora=None, **SMALL)
    run = recipe.run(tmp_path / "run")
    folder = export(run, "merged", dtype="float32")
    assert folder == run / "exports" / "sft-merged"
    ids, logprobs = loaded_elsewhere(folder, "merged")
    torch.testing.assert_close(logprobs, logprobs_of(Artifact.open(run / "sft"), ids), atol=2e-5, rtol=1e-5)
    with pytest.raises(AlignError, match=r"all of its weights were trained, so there is no adapter\. Use --to merged"):
        export(run, "adapter")


def test_the_card_says_what_is_known(small_run, tmp_path):
    folder = export(small_run / "ppo", "adapter", tmp_path / "out")
    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.tags) == ("peft", ["align", "sft", "ppo", "rlhf"])
    for text in (
        "supervised fine-tuning, then PPO with a KL penalty",
        "unknown to align; see the base",
        "chat.jsonl",
        "## Evaluation: evaluate",
        Artifact.open(small_run / "ppo").identity,
        "AutoPeftModelForCausalLM",
    ):
        assert text in card.text, text


def test_an_export_is_made_anew_and_nothing_else_is_overwritten(small_run, tmp_path):
    out = tmp_path / "out"
    assert export(small_run / "sft", "adapter", out) == export(small_run / "sft", "adapter", out) == out
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(AlignError, match=r"mine: is there already and is no export\. Give another folder: --out FOLDER"):
        export(small_run / "sft", "adapter", mine)
    assert (mine / "thesis.txt").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_is_no_policy_cannot_be_exported(small_run, tmp_path):
    with pytest.raises(AlignError, match="reward"):
        export(small_run / "reward", "merged", tmp_path / "out")
    with pytest.raises(AlignError, match="evaluat"):
        export(small_run / "evaluate", "merged", tmp_path / "out")
    with pytest.raises(AlignError, match="nothing"):
        export(tmp_path / "nothing", "merged", tmp_path / "out")


def test_adapters_that_cannot_be_merged_are_told(tiny_base, data, tmp_path):
    recipe = Recipe("dora", base=str(tiny_base), dtype="float32")
    recipe.sft(data=data / "chat.jsonl", lora=Lora(rank=2, dora=True), **SMALL)
    run = recipe.run(tmp_path / "run")
    for form in ("merged", "adapter"):
        with pytest.raises(AlignError, match=r"is DoRA, which cannot be added to other adapters exactly"):
            export(run, form)
    assert not (run / "exports" / "sft-merged").exists()


def test_a_converter_that_cannot_be_fetched_says_what_to_do(small_run, tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(AlignError, match=r"(?s)gguf: llama\.cpp's converter cannot be fetched.*Export the weights \(--to merged\)"):
        converter()


@pytest.mark.slow
def test_the_real_model_exports_in_every_form(smollm2, tmp_path):
    recipe = Recipe("real", base="embedded")
    sft = recipe.sft(data=Path("datasets/chat.jsonl"), epochs=0.3, max_heldout=4)
    recipe.dpo(policy=sft, preferences=Path("datasets/preferences.jsonl"), epochs=0.1, max_heldout=4)
    run = recipe.run(tmp_path / "run")
    artifact = Artifact.open(run / "dpo")
    for form in ("adapter", "merged"):
        ids, logprobs = loaded_elsewhere(export(run, form, dtype="float32"), form)
        torch.testing.assert_close(logprobs, logprobs_of(artifact, ids), atol=1e-3, rtol=1e-4)
    try:
        converter()
    except AlignError as error:
        pytest.skip(f"no package registry: {error}")
    (file,) = export(run, "gguf").glob("*.gguf")
    from transformers import AutoModelForCausalLM

    back = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    with torch.no_grad():
        again = back(torch.tensor([ids])).logits[0].log_softmax(-1)
    stack = logprobs_of(artifact, ids)
    assert float((stack.exp() * (stack - again)).sum(-1).mean()) < 0.02  # KL in nats a token: the weights are rounded to bfloat16


def test_a_full_disk_leaves_nothing_behind_and_says_so(finished, tmp_path):
    """An export has no checkpoint to go on from, so it promises none."""
    ended = align(
        "export", finished / "ppo", "--to", "adapter", "--out", "exported", folder=tmp_path, before=partial(allow_files_of, 20_000)
    )
    assert (ended.code, "Traceback" in ended.err) == (2, False), ended.err
    assert "exported: the disk is full. Nothing was exported, and the run is as it was: make room and run the same" in ended.err
    assert not [path for path in tmp_path.iterdir() if "exported" in path.name]
