"""PPO here and in TRL 1.12.0, the last that had it: seconds an episode and peak memory, on SmolLM2 with the same prompts.

    pip download --no-deps trl==1.12.0 && unzip -d trl-1.12.0 trl-1.12.0-py3-none-any.whl
    python benchmarks/ppo_trl.py --trl trl-1.12.0          about 5 minutes on two cores

Every way is a process of its own: rank-16 adapters on every linear layer, 16 prompts a round of up to 200 tokens, one completion of up
to 48 tokens each, two passes in two minibatches. TRL holds policy, value and reward model as three models, and is run with its
defaults (float32 under autocast, checkpointing) and with bfloat16 weights and no checkpointing. Times leave out loading.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from process import measured

PROMPTS, LONGEST, NEW = 16, 200, 48


def source() -> str:
    """The file of prompts: people's where they are here."""
    people = "../shared/data/preference/hh_harmless_test_a.jsonl.gz"
    return people if Path(people).is_file() else "datasets/prompts.jsonl"


def prompts() -> list[tuple[int, ...]]:
    """Token ids of the first prompts that are short enough."""
    from align.data.mix import load_data
    from align.data.sources import Source

    chat = _chat()
    ids = (chat.prompt_ids(record["prompt"]) for record in load_data((Source(source()),), "prompt", "benchmark").records())
    return [one for one, _ in zip((one for one in ids if len(one) <= LONGEST), range(PROMPTS * 4), strict=False)]


def _chat():
    from align.base import find_base, local_model
    from align.chat import Chat

    return Chat.load(local_model(find_base("embedded")))


def ours(rounds: int) -> dict:
    """One trunk with four roles."""
    from align import Recipe
    from align.artifact import Artifact

    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe("benchmark", base="embedded")
        reward = recipe.reward(preferences="datasets/preferences.jsonl", epochs=0.05, batch_size=8)
        recipe.ppo(
            prompts=source(),
            reward_model=reward,
            iterations=rounds,
            prompts_per_iteration=PROMPTS,
            completions_per_prompt=1,
            compare_completions=False,
            max_new_tokens=NEW,
            max_prompt_tokens=LONGEST,
            epochs=2,
            minibatches=2,
        )
        run = recipe.run(Path(folder) / "run")
        last = json.loads((run / "ppo" / "metrics.jsonl").read_text().splitlines()[-1])
        return {"seconds": last["seconds"], "gb": Artifact.open(run / "ppo").facts["peak_memory_gb"], "length": last["length"]}


def theirs(rounds: int, best: bool) -> dict:
    """TRL's PPOTrainer; the caller has put its folder first on sys.path."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    import datasets
    from align.base import find_base, local_model
    from align.model.trunk import native_dtype
    from align.run import peak_memory_gb

    native = native_dtype(torch.device("cpu"))
    location, dtype = local_model(find_base("embedded")), native if best else torch.float32
    chat = _chat()
    tokenizer = chat.tokenizer
    tokenizer.padding_side, tokenizer.pad_token = "left", "<|endoftext|>"
    heads = [AutoModelForSequenceClassification.from_pretrained(location, dtype=dtype, num_labels=1) for _ in range(2)]
    for head in heads:
        head.config.pad_token_id = tokenizer.pad_token_id
    rows = datasets.Dataset.from_list([{"input_ids": list(ids)} for ids in prompts()])
    plain: dict = {"gradient_checkpointing": False, "bf16": False} if best else {}
    if native != torch.bfloat16:  # autocast to a type it lacks takes a hundred times as long
        plain["bf16"] = False
    with tempfile.TemporaryDirectory() as folder:
        arguments = PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            num_mini_batches=2,
            num_ppo_epochs=2,
            local_rollout_forward_batch_size=16,
            total_episodes=PROMPTS * rounds,
            response_length=NEW,
            stop_token="eos",
            missing_eos_penalty=1.0,
            num_sample_generations=0,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            **plain,
        )
        trainer = PPOTrainer(
            arguments,
            tokenizer,
            model=AutoModelForCausalLM.from_pretrained(location, dtype=dtype),
            ref_model=None,
            reward_model=heads[0],
            value_model=heads[1],
            train_dataset=rows,
            eval_dataset=rows,
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
        )
        begun = time.perf_counter()
        trainer.train()
        return {"seconds": time.perf_counter() - begun, "gb": peak_memory_gb()}


WAYS = {
    "align": ours,
    "TRL 1.12, defaults": lambda rounds: theirs(rounds, False),
    "TRL 1.12, tuned": lambda rounds: theirs(rounds, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, required=True, help="the folder of the unpacked wheel")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        if options.measure != "align":
            sys.path.insert(0, str(options.trl.resolve()))
        print(json.dumps(WAYS[options.measure](options.rounds)))
        return
    found = {}
    for way in WAYS:
        found[way] = measured(__file__, way, f"--trl={options.trl}", f"--rounds={options.rounds}", f"--measure={way}")
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print("| PPO | seconds an episode | times ours | peak memory | ours is |\n|---|--:|--:|--:|--:|")
    mine = found["align"]
    for way, line in found.items():
        each = line["seconds"] / PROMPTS / options.rounds
        print(f"| {way} | {each:.2f} | {line['seconds'] / mine['seconds']:.1f} | {line['gb']:.2f} GB | {mine['gb'] / line['gb']:.2f} |")


if __name__ == "__main__":
    main()
