"""Sampling: each prompt is computed once for all its completions, and finished completions leave the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from align.errors import AlignError

SEQUENCES = 48  # decoded side by side


class Completion(NamedTuple):
    """Sampled token ids with their log-probabilities; the last id is a stop token where the completion `ended`."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ended: bool


class Step(NamedTuple):
    """One decoding step: the new token and its log-probability of every sequence that is still going."""

    sequences: list[int]
    tokens: list[int]
    logprobs: list[float]


def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    completions_per_prompt: int,
    max_new_tokens: int,
    temperature: float,
    stop_ids: frozenset[int],
    seed: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[list[Completion]]:
    """Sample completions from the model's own law: no top-p, no top-k, no penalty.

    Args:
        model: in eval mode; a merged copy, or a trunk's model inside `switched_to`.
        prompts: token ids.
        completions_per_prompt: for each prompt.
        max_new_tokens: longest completion.
        temperature: divides the logits; 0 takes the likeliest token.
        stop_ids: a completion ends with the first of these, which is kept in it.
        seed: the same seed and prompts give the same completions.
        on_progress: called with the number of prompts done.

    Returns:
        For each prompt its completions.
    """
    generator = torch.Generator(device=model.device).manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # alike lengths together: little padding
    at_once = max(1, SEQUENCES // completions_per_prompt)
    results: list[list[Completion]] = [[] for _ in prompts]
    for start in range(0, len(order), at_once):
        members = order[start : start + at_once]
        sequences: list[tuple[list[int], list[float]]] = [([], []) for _ in range(len(members) * completions_per_prompt)]
        batch = [prompts[i] for i in members]
        for step in decode(model, batch, completions_per_prompt, max_new_tokens, temperature, stop_ids, generator):
            for sequence, token, logprob in zip(*step, strict=True):
                sequences[sequence][0].append(token)
                sequences[sequence][1].append(logprob)
        for number, (ids, logprobs) in enumerate(sequences):
            results[members[number // completions_per_prompt]].append(Completion(tuple(ids), tuple(logprobs), ids[-1] in stop_ids))
        on_progress(start + len(members))
    return results


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    completions_per_prompt: int,
    max_new_tokens: int,
    temperature: float,
    stop_ids: frozenset[int],
    generator: torch.Generator,
) -> Iterator[Step]:
    """Decode one batch token by token. Sequence s belongs to prompt s // completions_per_prompt."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    decoder = model.get_decoder()
    output = decoder(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)
    cache = output.past_key_values
    cache.batch_repeat_interleave(completions_per_prompt)
    logits = _last_logits(model, output.last_hidden_state).repeat_interleave(completions_per_prompt, 0)
    mask = mask.repeat_interleave(completions_per_prompt, 0)
    position = positions[:, -1].repeat_interleave(completions_per_prompt, 0)
    going = torch.arange(len(logits), device=model.device)
    stops = torch.tensor(sorted(stop_ids), device=model.device)
    for count in range(1, max_new_tokens + 1):
        tokens, logprobs = _draw(logits, temperature, generator)
        yield Step(going.tolist(), tokens.tolist(), logprobs.tolist())
        unfinished = ~torch.isin(tokens, stops)
        if count == max_new_tokens or not unfinished.any():
            return
        if not unfinished.all():
            keep = unfinished.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            going, mask, position, tokens = going[keep], mask[keep], position[keep], tokens[keep]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        position = position + 1
        output = decoder(
            input_ids=tokens[:, None], attention_mask=mask, position_ids=position[:, None], past_key_values=cache, use_cache=True
        )
        logits = _last_logits(model, output.last_hidden_state)


def _last_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits of what follows each sequence. Shape (sequences, length, hidden) to (sequences, vocab).

    Not the model's own `logits_to_keep`: it multiplies a strided slice, for which torch copies the output layer once a sequence.
    """
    logits = model.get_output_embeddings()(hidden[:, -1].contiguous())
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A token for each row of logits, with its log-probability at that temperature."""
    logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if not torch.isfinite(logprobs).all(dim=-1).all():
        raise AlignError(
            "sampling stopped: the policy's logits are not finite numbers; its training has diverged. "
            "Lower the learning_rate of the stage that trained it (--set), and run again."
        )
    if temperature == 0:
        tokens = logprobs.argmax(-1)
    else:
        # the first token whose cumulated probability passes a uniform number: multinomial draws one number per token instead
        cumulated = logprobs.exp().cumsum(-1, dtype=torch.float64)
        uniform = torch.rand(len(logits), 1, dtype=torch.float64, generator=generator, device=logits.device)
        tokens = torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True)[:, 0]
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]
