"""Sampling from a policy: tokens per second of our samplers and of transformers', on SmolLM2 with a rank-16 adapter on every layer.

    python benchmarks/sampling.py                       32 prompts, 4 completions each, three repetitions, interleaved; 14 minutes
    python benchmarks/sampling.py --prompts 8 --repeats 1 --generate-batch --json

Tokens are those of completions up to the token that ends the turn. `law` is how far the log-probabilities that a sampler gives
are from those of a plain pass over what it sampled, on average over tokens: rounding, in bfloat16.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from align.base import find_base, local_model
from align.chat import Chat
from align.data.mix import load_data
from align.data.sources import Source
from align.model import attention
from align.model.forward import forward
from align.model.generate import Completion
from align.model.load import Sampler
from align.model.packing import Example, pack
from align.model.trunk import Role, Trunk
from align.settings import Lora

TEMPERATURE = 0.7
OWN_LAW = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "top_p": 1.0}  # what transformers needs to be told
Sampled = list[list[Completion]]


def opened() -> tuple[Trunk, Chat, Role]:
    """The embedded model with an adapter that changes it a little."""
    location = local_model(find_base("embedded"))
    trunk, chat = Trunk.load(location), Chat.load(location)
    trunk.add_adapter("policy-new", Lora(rank=16), 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in trunk.parameters_of("policy-new").items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1e-3)
    return trunk, chat, Role(("policy-new",))


def generate(model, chat: Chat, prompts: list[tuple[int, ...]], count: int, longest: int) -> Sampled:
    """What transformers does by default: all prompts in one batch, padded on the left, every sequence until the last one ends."""
    width = max(map(len, prompts))
    end = chat.end_of_turn
    ids = torch.tensor([[end] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            eos_token_id=sorted(chat.stop_ids),
            pad_token_id=end,
            max_new_tokens=longest,
            num_return_sequences=count,
            **OWN_LAW,
        )
    found = [_until_end(row.tolist(), chat) for row in output[:, width:]]
    return [found[i : i + count] for i in range(0, len(found), count)]


def _until_end(ids: list[int], chat: Chat) -> Completion:
    stop = next((at + 1 for at, token in enumerate(ids) if token in chat.stop_ids), len(ids))
    return Completion(tuple(ids[:stop]), (), ids[stop - 1] in chat.stop_ids)


def generate_batch(model, chat: Chat, prompts: list[tuple[int, ...]], count: int, longest: int) -> Sampled:
    """Continuous batching, as transformers has it."""
    from transformers import GenerationConfig
    from transformers.generation import ContinuousBatchingConfig

    end = chat.end_of_turn
    config = GenerationConfig(eos_token_id=end, pad_token_id=end, max_new_tokens=longest, num_return_sequences=count, **OWN_LAW)
    batching = ContinuousBatchingConfig(max_memory_percent=0.1, seed=0)
    outputs = model.generate_batch([list(p) for p in prompts], generation_config=config, continuous_batching_config=batching)
    found = [_until_end(list(output.generated_tokens), chat) for output in outputs.values()]
    if len(found) != len(prompts) * count:
        raise RuntimeError(f"{len(found)} of {len(prompts) * count} completions came back")
    return [found[i : i + count] for i in range(0, len(found), count)]


def law(trunk: Trunk, role: Role, prompts: list[tuple[int, ...]], sampled: Sampled) -> float | None:
    """Mean distance of the sampler's log-probabilities from a plain pass's, in nats per token; none where it gives none."""
    if not sampled[0][0].logprobs:
        return None
    examples = [Example(i, p, tuple(c.ids for c in cs)) for i, (p, cs) in enumerate(zip(prompts, sampled, strict=True))]
    distance = tokens = 0.0
    with torch.no_grad():
        for row in pack(examples, 1024):
            given = torch.tensor([x for example in row.examples for c in sampled[example.index] for x in c.logprobs])
            distance += float((forward(trunk, role, row, TEMPERATURE).logprobs - given).abs().sum())
            tokens += len(given)
    return distance / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--completions", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--generate-batch", action="store_true", help="also transformers' continuous batching: minutes on a processor")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    trunk, chat, role = opened()
    records = load_data((Source("datasets/prompts.jsonl"),), "prompt", "benchmark").records()
    prompts = [chat.prompt_ids(record["prompt"]) for record, _ in zip(records, range(options.prompts), strict=False)]
    merged, through = Sampler(trunk), Sampler(trunk, merged=False)
    plain = trunk.merged_copy()
    trunk.merge_into(plain, role)
    plain.set_attn_implementation("sdpa")
    arguments = (prompts, options.completions, options.max_new_tokens)
    stops = chat.stop_ids

    def with_adapters() -> Sampled:
        with trunk.switched_to(role):
            trunk.model.set_attn_implementation("sdpa")
            try:
                return generate(trunk.model, chat, *arguments)
            finally:
                trunk.model.set_attn_implementation(attention.NAME)

    ways: dict[str, Callable[[], Sampled]] = {
        "align, merged copy": lambda: merged.sample(role, *arguments, TEMPERATURE, stops, seed=0),
        "align, through the adapters": lambda: through.sample(role, *arguments, TEMPERATURE, stops, seed=0),
        "generate, through the adapters": with_adapters,
        "generate, merged weights": lambda: generate(plain, chat, *arguments),
    }
    if options.generate_batch:
        ways["generate_batch, merged weights"] = lambda: generate_batch(plain, chat, *arguments)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    distances: dict[str, float | None] = {}
    for _ in range(options.repeats):
        for name, way in ways.items():
            begun = time.perf_counter()
            try:
                sampled = way()
            except Exception as error:  # a library's sampler that does not run here is a result too
                print(f"{name}: {type(error).__name__}: {error}")
                continue
            tokens = sum(len(c.ids) for cs in sampled for c in cs)
            rates[name].append(tokens / (time.perf_counter() - begun))
            distances[name] = law(trunk, role, prompts, sampled)
    found: dict[str, Any] = {name: {"tokens_per_second": statistics.median(r), "law": distances[name]} for name, r in rates.items() if r}
    if options.json:
        print(json.dumps(found, indent=1))
        return
    best = found["align, merged copy"]["tokens_per_second"]
    print("| sampler | tokens/s | ours is faster by | law |\n|---|--:|--:|--:|")
    for name, line in found.items():
        shown = "" if line["law"] is None else f"{line['law']:.4f}"
        print(f"| {name} | {line['tokens_per_second']:.0f} | {best / line['tokens_per_second']:.2f} | {shown} |")


if __name__ == "__main__":
    main()
