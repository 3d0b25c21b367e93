"""Sampling: each prompt is computed once for all its completions, and a finished completion's place goes to the next prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.errors import AlignError
from align.model import attention
from align.model.slots import PaddedSlots, Slots

SEQUENCES = 128  # decoded side by side: on a processor few more take a step as long, for it reads all weights anyway
ROOM = 1e9  # bytes of keys and values, or as many as the weights have: of long prompts there are fewer at a time
REFILL = 16  # free places that are worth a pass over further prompts
BLOCK = 256  # tokens of the vocabulary whose probabilities are summed before one is drawn
FEW = 256  # tokens; a product of more is as fast either way round


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
        on_progress: called with the number of prompts done, whenever it has grown.

    Returns:
        For each prompt its completions.
    """
    count = completions_per_prompt
    ids: list[list[int]] = [[] for _ in range(len(prompts) * count)]
    logprobs: list[list[float]] = [[] for _ in ids]
    unfinished = [count] * len(prompts)
    done = 0
    for step in decode(model, prompts, count, max_new_tokens, temperature, stop_ids, seed):
        before = done
        for sequence, token, logprob in zip(*step, strict=True):
            ids[sequence].append(token)
            logprobs[sequence].append(logprob)
            if token in stop_ids or len(ids[sequence]) == max_new_tokens:
                unfinished[sequence // count] -= 1
                done += unfinished[sequence // count] == 0
        if done > before:
            on_progress(done)
    found = [Completion(tuple(i), tuple(p), i[-1] in stop_ids) for i, p in zip(ids, logprobs, strict=True)]
    return [found[start : start + count] for start in range(0, len(found), count)]


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    completions_per_prompt: int,
    max_new_tokens: int,
    temperature: float,
    stop_ids: frozenset[int],
    seed: int,
) -> Iterator[Step]:
    """Decode token by token. Sequence s belongs to prompt s // completions_per_prompt.

    A sequence's random numbers are its own, by seed and number, so what is decoded beside it changes it by rounding alone.
    """
    count = completions_per_prompt
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # the longest first; alike lengths side by side
    packs = model.config._attn_implementation == attention.NAME
    slots = Slots(model) if packs else PaddedSlots(model)
    stops = torch.tensor(sorted(stop_ids), device=model.device)
    room = max(ROOM, model.get_memory_footprint()) // bytes_of_a_token(model)
    going: list[int] = []  # the sequence in each slot
    drawn: list[int] = []  # its tokens so far
    uniform = torch.empty(0, max_new_tokens, dtype=torch.float64)  # its random numbers
    logits: Tensor | None = None
    while waiting or going:
        beside = [*waiting[-1:], *(sequence // count for sequence in going)]  # every slot has room for the longest
        longest = max(len(prompts[i]) for i in beside) + max_new_tokens
        free = max(count, min(SEQUENCES, int(room // longest))) - len(going)
        if waiting and free >= count and (not going or (free >= REFILL and slots.refills)):
            new = [waiting.pop() for _ in range(min(len(waiting), free // count))]
            admitted = slots.admit([prompts[i] for i in new], count)
            logits = admitted if logits is None else torch.cat([logits, admitted])
            members = [prompt * count + number for prompt in new for number in range(count)]
            going, drawn = going + members, drawn + [0] * len(members)
            numbers = [numpy.random.default_rng([seed, sequence]).random(max_new_tokens) for sequence in members]
            uniform = torch.cat([uniform, torch.from_numpy(numpy.stack(numbers))])
        assert logits is not None
        at = torch.tensor(drawn)[:, None]
        tokens, logprobs = _draw(logits, temperature, uniform.gather(1, at).to(model.device))
        yield Step(going, tokens.tolist(), logprobs.tolist())
        drawn = [number + 1 for number in drawn]
        finished = torch.isin(tokens, stops).cpu() | (at[:, 0] + 1 == max_new_tokens)
        if finished.any():
            kept = slots.keep((~finished).nonzero()[:, 0])
            going, drawn = [going[i] for i in kept], [drawn[i] for i in kept]
            uniform, tokens = uniform[kept], tokens[kept]
        logits = slots.step(tokens) if going else None


def bytes_of_a_token(model: PreTrainedModel) -> int:
    """Of its keys and values in all layers."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize


def suit_to_few_tokens(model: PreTrainedModel) -> None:
    """Have a model that only samples make the products of a decoding step as (W x^T)^T, in float32 on a processor.

    They are the same products. With the weights as the left side, which is the long one, they take about two thirds of the time.
    """
    if model.device.type == "cpu" and model.dtype == torch.float32:
        for module in model.modules():
            if type(module) is nn.Linear:
                module.forward = partial(_turned, module.weight, module.bias)  # type: ignore[method-assign]


def _turned(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) > FEW:
        return nn.functional.linear(x, weight, bias)
    output = torch.mm(weight, rows.T).T
    output = output if bias is None else output + bias
    return output.view(*x.shape[:-1], -1)


def _draw(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """A token for each row of logits by a number in [0, 1), with its log-probability at that temperature.

    It is the first token whose cumulated probability passes the number: its block of tokens is found first, then the token in it.
    """
    scaled = logits.float() / (temperature or 1.0)
    top = scaled.amax(-1, keepdim=True)
    weights = (scaled - top).exp_()
    if short := -weights.shape[1] % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, short))
    blocks = weights.view(len(weights), -1, BLOCK)
    until = blocks.sum(-1).double().cumsum(-1)
    total = until[:, -1:]
    if not torch.isfinite(total).all():
        raise AlignError(
            "sampling stopped: the policy's logits are not finite numbers; its training has diverged. "
            "Lower the learning_rate of the stage that trained it (--set), and run again."
        )
    if temperature == 0:
        tokens = scaled.argmax(-1, keepdim=True)
    else:
        block, share = _passed(until, uniform)
        inside, _ = _passed(blocks.gather(1, block[..., None].expand(-1, 1, BLOCK))[:, 0].double().cumsum(-1), share)
        tokens = block * BLOCK + inside
    logprobs = scaled.gather(1, tokens) - top - total.log().float()
    return tokens[:, 0], logprobs[:, 0]


def _passed(until: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Which of some cumulated weights first passes a share of their total, and the share of its own weight where it does.

    Args:
        until: shape (sequence, n), float64.
        share: in [0, 1). Shape (sequence, 1).
    """
    goal = share * until[:, -1:]
    found = torch.searchsorted(until, goal, right=True).clamp_(max=until.shape[1] - 1)
    before = torch.where(found > 0, until.gather(1, (found - 1).clamp(min=0)), 0.0)
    return found, (goal - before) / (until.gather(1, found) - before)
