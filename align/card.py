"""The model card of an exported policy, from the facts in its artifacts. What is not known is said to be unknown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from align.artifact import FACTS, Artifact

STAGES = {
    "sft": "supervised fine-tuning",
    "dpo": "direct preference optimisation",
    "ppo": "PPO with a KL penalty",
    "trl": "a trainer of TRL",
}
TAGS = {"sft": ["sft"], "dpo": ["dpo"], "ppo": ["ppo", "rlhf"], "trl": ["trl"]}
LOADING = {
    "adapter": """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)""",
    "merged": """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)""",
}
ASKING = """ids = tokenizer.apply_chat_template([{"role": "user", "content": "..."}], add_generation_prompt=True, return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=64)[0]))"""
EMBEDDED = ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")  # what 'embedded' is


def model_card(artifact: Artifact, form: str, change: Mapping[str, float] | None = None) -> str:
    """README.md in the Hugging Face form.

    Args:
        artifact: the policy.
        form: adapter, merged or gguf.
        change: the largest changes of a logit and of a log-probability that merging made, where it was merged.
    """
    chain = lineage(artifact)
    source = artifact.facts["base"]["source"]
    base, licence = EMBEDDED if source == "embedded" else (source, None)
    head = ModelCardData(
        base_model=base,
        license=licence,
        library_name="peft" if form == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=["align", *dict.fromkeys(tag for each in chain for tag in TAGS.get(each.facts["stage"], []))],
    )
    again = {"identity": artifact.identity, "base": artifact.facts["base"], "versions": artifact.facts["versions"]}
    parts = [
        f"---\n{head.to_yaml()}\n---",
        f"# {artifact.name}",
        f"{base}, aligned by {', then '.join(STAGES.get(a.facts['stage'], a.facts['stage']) for a in chain)}. "
        f"Licence of the base: {licence or 'unknown to align; see the base'}. "
        "Licences of the data are not known to align.",
        _loading(form),
        "## How it was made",
        *[_stage(each) for each in chain],
        *_evaluations(artifact),
        _limits(form, change),
        "## To make it again",
        f"```json\n{json.dumps(again, indent=1)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def lineage(artifact: Artifact) -> list[Artifact]:
    """Every policy that it came from, first to last, itself included."""
    found = [artifact]
    while (parent := found[0].parent("policy")) is not None:
        found.insert(0, parent)
    return found


def _loading(form: str) -> str:
    if form == "gguf":
        return "## Use\n\nWith llama.cpp and what builds on it: `llama-cli -m FILE.gguf`. The chat template is in the file."
    return f'## Use\n\n```python\nfolder = "."\n{LOADING[form]}\n{ASKING}\n```'


def _stage(artifact: Artifact) -> str:
    facts = artifact.facts
    lines = [f"### {artifact.name}: {STAGES.get(facts['stage'], facts['stage'])}", ""]
    for role, data in facts["data"].items():
        counts = f"{data['records']:,} records of {data['rows']:,} rows" if "records" in data else "rows made by another stage"
        lines.append(f"- {role}: `{data.get('path', '?')}` ({data.get('format', '?')}), {counts}, sha256 `{data.get('sha256', '?')[:16]}`")
    settings = {name: value for name, value in facts["settings"].items() if not isinstance(value, dict) and value is not None}
    names = ("learning_rate", "epochs", "iterations", "batch_size", "beta", "loss", "kl_coef", "estimator", "trainer", "seed")
    lines.append("- settings: " + ", ".join(f"{name} {settings[name]}" for name in names if name in settings))
    metrics = {name: value for name, value in facts["metrics"].items() if name in ("heldout_loss", "heldout_accuracy", "score", "kl")}
    if metrics:
        lines.append("- at its end: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    lines.append(f"- {facts['seconds']:.0f} s, {facts['created']}")
    return "\n".join(lines)


def _evaluations(artifact: Artifact) -> list[str]:
    """The tables of the run's evaluations that this policy is in."""
    parts = []
    for path in sorted(artifact.folder.parent.glob(f"*/{FACTS}")):
        other = Artifact.open(path.parent)
        table = other.facts["metrics"].get("policies", []) if other.kind == "evaluation" else []
        if any(line.get("identity") == artifact.identity for line in table):
            rows = [
                f"| {line['name']} | {_plus_minus(line, 'score')} | {_plus_minus(line, 'difference')} | {_number(line['kl'])} |"
                for line in table
            ]
            head = f"| policy | reward model's score | better than {table[0]['name']} by | KL, nats |\n|---|---|---|---|"
            parts.append(
                f"## Evaluation: {other.name}\n\n{other.facts['metrics']['prompts']} held-out prompts.\n\n" + "\n".join([head, *rows])
            )
    return parts or ["## Evaluation\n\nNone in its run."]


def _plus_minus(line: Mapping[str, Any], name: str) -> str:
    """A mean with its 95 percent interval."""
    interval = line.get(f"{name}_interval")
    return _number(line.get(name)) + (f" (95% {interval[0]:.2f} to {interval[1]:.2f})" if interval else "")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _limits(form: str, change: Mapping[str, float] | None) -> str:
    text = "## Limits\n\nTrained and measured as said above and on nothing else. A reward model's score is not quality."
    if change is not None:
        text += (
            f" The adapters were added to the weights in float32 and rounded once: on a few prompts a logit moved by up to "
            f"{change['logit']:.3g} and a token's log-probability by up to {change['logprob']:.3g} nats."
        )
    return text if form != "adapter" else text + " The adapter is the exact sum of those it was made of."
