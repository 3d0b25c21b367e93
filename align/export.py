"""`align export`: a policy as others load it: one adapter, merged weights, or a GGUF file. Each folder needs nothing of align."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import GenerationConfig, PreTrainedModel

from align.artifact import Artifact, full_disk_explained
from align.base import cache_folder, loading_explained
from align.card import model_card
from align.chat import Chat
from align.errors import AlignError
from align.model.compose import plain_configs, save_composed
from align.model.load import adapter_folders, load_role, open_trunk, weights_below
from align.model.trunk import Role, Trunk
from align.progress import say
from align.records import Message

Form = Literal["adapter", "merged", "gguf"]
MARK = ".align-export"  # in a folder that an export may replace
CONVERTER = "llama-cpp-python==0.3.36"  # whose source package holds llama.cpp's own converter
PROBES = (
    "What is the capital of France?",
    "Write one sentence about rain.",
    "How do I boil an egg?",
    "Is it safe to mix bleach and vinegar?",
)
PROBE_TOKENS = 24


@dataclass(frozen=True)
class Change:
    """How far exported weights are from the policy as it was trained, on a few prompts: the largest differences, natural logarithms.

    Both are run in float32, so it is the weights that differ.
    """

    logit: float
    logprob: float


def export(folder: Path, form: Form, out: Path | None = None, dtype: str = "bfloat16") -> Path:
    """Write a policy in a form that transformers and peft, or llama.cpp, load by themselves.

    Args:
        folder: a stage that made a policy, or a run (its last policy).
        form: one adapter for the base; weights with the adapters merged in; a GGUF file of those.
        out: a folder that is not there, is empty, or holds an export; beside the stage unless given.
        dtype: of merged weights; they are added in float32.

    Returns:
        The folder.

    Raises:
        AlignError: where it is no policy, its base is gone, the folder holds something else, or the disk is full.
    """
    from align.talk import find_policy

    artifact = find_policy(folder)
    out = out or artifact.folder.parent / "exports" / f"{artifact.name}-{form}"
    check_free(out)
    if form == "adapter" and not adapter_folders(artifact):
        raise AlignError(f"{artifact.folder}: all of its weights were trained, so there is no adapter. Use --to merged.")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        with full_disk_explained(out, "Nothing was exported, and the run is as it was"):
            (work / MARK).write_text(f"{artifact.identity}\n")
            change = None
            if form == "adapter":
                write_adapter(artifact, work)
            else:
                change = write_merged(artifact, work, dtype)
            (work / "README.md").write_text(model_card(artifact, form, change and vars(change)), encoding="utf-8")
            if form == "gguf":
                to_gguf(work, artifact.name)
            work.chmod(0o755)  # a temporary folder is its owner's alone
            former = work.with_name(f"{work.name}-former")
            if out.exists():
                out.rename(former)
            work.rename(out)
            shutil.rmtree(former, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if change is not None:
        say(f"largest change by merging, on {len(PROBES)} prompts: {change.logit:.3g} of a logit, {change.logprob:.3g} nats of a token")
    return out


def check_free(out: Path) -> None:
    """Refuse a folder with anything in it that is not an export.

    Raises:
        AlignError: with the folder.
    """
    if out.exists() and not (out.is_dir() and ((out / MARK).is_file() or not any(out.iterdir()))):
        raise AlignError(f"{out}: is there already and is no export. Give another folder: --out FOLDER")


def write_adapter(artifact: Artifact, folder: Path) -> None:
    """The stack as one adapter, with the tokenizer it was trained with."""
    location, revision = weights_below(artifact.base, artifact)
    location = str(Path(location).resolve()) if Path(location).is_dir() else location  # else a hub's id
    with loading_explained(artifact.facts["base"]["source"]):
        chat = Chat.load(location, revision)
    save_composed(adapter_folders(artifact), folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": location, "revision": revision}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    chat.tokenizer.save_pretrained(folder)  # with the chat template that the policy was trained with


@torch.no_grad()
def write_merged(artifact: Artifact, folder: Path, dtype: str) -> Change | None:
    """The weights with the adapters added in float32 and rounded once; how far that moved the policy, where there are any."""
    trunk, chat = open_trunk(artifact.base, artifact, "float32")  # never a base in four bits, which merging would round anew
    role = load_role(trunk, artifact)
    merged, change = trunk.model, None
    if role.adapters:
        if not trunk.can_merge():
            plain_configs(adapter_folders(artifact))  # says which of them is not plain LoRA
            raise AlignError(f"{artifact.folder}: an adapter is on tied weights, which cannot take it. Use --to adapter.")
        merged = trunk.merged_copy()
        trunk.merge_into(merged, role)
    if role.adapters:
        merged = merged.to(getattr(torch, dtype)).float()  # what the file will hold, run as the stack is
        change = largest_change(trunk, role, merged, chat)
    merged = merged.to(getattr(torch, dtype))
    merged.set_attn_implementation(trunk.own_attention)
    merged.generation_config = generation_config(chat)
    merged.save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)  # with the chat template that the policy was trained with
    return change


def largest_change(trunk: Trunk, role: Role, merged: PreTrainedModel, chat: Chat) -> Change:
    """Compare merged weights with the stack, position by position of a few prompts and what the policy answers."""
    logit = logprob = 0.0
    for text in PROBES:
        ids = torch.tensor([chat.prompt_ids([Message(role="user", content=text)])], device=trunk.device)
        with trunk.switched_to(role):
            for _ in range(PROBE_TOKENS):  # the likeliest answer, so that places where it matters are compared
                ids = torch.cat([ids, trunk.model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
            stack = trunk.model(ids, use_cache=False).logits.float()
        other = merged(ids, use_cache=False).logits.float()
        chosen = ids[:, 1:, None]
        moved = (stack.log_softmax(-1)[:, :-1].gather(2, chosen) - other.log_softmax(-1)[:, :-1].gather(2, chosen)).abs().max()
        logit, logprob = max(logit, float((stack - other).abs().max())), max(logprob, float(moved))
    return Change(logit, logprob)


def generation_config(chat: Chat) -> GenerationConfig:
    """Ends where a turn ends, and samples from the policy's own law."""
    return GenerationConfig(
        eos_token_id=sorted(chat.stop_ids),
        pad_token_id=chat.tokenizer.pad_token_id,
        bos_token_id=chat.tokenizer.bos_token_id,
        do_sample=True,
    )


# GGUF ------------------------------------------------------------------------------------------------------------------------


def to_gguf(folder: Path, name: str) -> None:
    """Turn the merged model in a folder into NAME.gguf, by llama.cpp's own converter; the safetensors go.

    Raises:
        AlignError: where the converter cannot be had or fails, with the command to use on merged weights.
    """
    script = converter()
    command = [sys.executable, str(script), str(folder), "--outfile", str(folder / f"{name}.gguf"), "--outtype", "auto"]
    say("converting with llama.cpp's convert_hf_to_gguf.py")
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        why = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise AlignError(
            f"gguf: llama.cpp's converter failed: {why}\n  Export the weights (--to merged) and convert them with a llama.cpp that knows "
            f"this model: python convert_hf_to_gguf.py FOLDER --outfile {name}.gguf"
        )
    for file in folder.iterdir():
        if file.name not in (MARK, "README.md", f"{name}.gguf"):
            file.unlink()


def converter() -> Path:
    """llama.cpp's convert_hf_to_gguf.py, out of a source package that is fetched once.

    Raises:
        AlignError: where it cannot be fetched.
    """
    home = cache_folder() / "llama.cpp" / CONVERTER.replace("==", "-")
    script = home / "convert_hf_to_gguf.py"
    if script.is_file():
        return script
    with tempfile.TemporaryDirectory() as download:
        say(f"fetching llama.cpp's converter ({CONVERTER}, once)")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python", CONVERTER]
        ended = subprocess.run([*command, "--dest", download], capture_output=True, text=True)
        found = next(Path(download).glob("*.tar.gz"), None)
        if ended.returncode or found is None:
            raise AlignError(
                f"gguf: llama.cpp's converter cannot be fetched ({' '.join(command[1:])}).\n  Export the weights (--to merged), and on a "
                "machine with llama.cpp: python convert_hf_to_gguf.py FOLDER --outfile model.gguf"
            )
        with tarfile.open(found) as package:
            wanted = ("/convert_hf_to_gguf.py", "/conversion/", "/gguf-py/")
            members = [m for m in package.getmembers() if "/vendor/llama.cpp/" in m.name and any(part in m.name for part in wanted)]
            package.extractall(download, members, filter="data")
        (source,) = Path(download).glob("*/vendor/llama.cpp")
        home.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(home, ignore_errors=True)
        shutil.move(source, home)
    return script
