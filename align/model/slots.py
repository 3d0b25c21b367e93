"""Keys and values of the sequences that are being decoded, a slot each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedModel

from align.model.attention import grouped, hiding, row_attention
from align.model.forward import row_hidden_states

PREFILL = 4096  # tokens of prompts in one pass, at least one prompt
GROWTH = 32  # columns that are added at a time


class Slots:
    """For models that pack: prompts come in as a packed row, keys and values are written in place, and a free slot is used again.

    Slots 0 to n - 1 are those of the n sequences that are going.
    """

    refills = True  # whether prompts may come in while others go on

    def __init__(self, model: PreTrainedModel):
        """Empty."""
        self.model, self.slots, self.columns = model, 0, 0
        self.layers: dict[int, list[Tensor]] = {}  # keys and values, each (slots, key heads, columns, size)
        self.lengths = torch.zeros(0, dtype=torch.long, device=model.device)  # tokens of each sequence that is going

    def admit(self, prompts: Sequence[Sequence[int]], copies: int) -> Tensor:
        """Compute prompts, each once for all its sequences, which take the next slots. Returns logits, (sequence, vocab)."""
        logits, some, tokens = [], list[Sequence[int]](), 0
        longest = max(int(self.lengths.max()) if len(self.lengths) else 0, *map(len, prompts))
        self._fit(len(self.lengths) + len(prompts) * copies, longest + 1)
        for prompt in prompts:
            if some and tokens + len(prompt) > PREFILL:
                logits.append(self._admit(some, copies))
                some, tokens = [], 0
            some.append(prompt)
            tokens += len(prompt)
        logits.append(self._admit(some, copies))
        return torch.cat(logits)

    def _admit(self, prompts: Sequence[Sequence[int]], copies: int) -> Tensor:
        device, first = self.model.device, len(self.lengths)
        ends = torch.tensor([len(prompt) for prompt in prompts]).cumsum(0).tolist()
        places = [list(range(end - len(prompt), end)) for prompt, end in zip(prompts, ends, strict=True)]
        sequences = [own for own in places for _ in range(copies)]
        prefill = _Prefill(
            self,
            slot=torch.tensor([first + number for number, own in enumerate(sequences) for _ in own], device=device),
            column=torch.tensor([column for own in sequences for column in range(len(own))], device=device),
            place=torch.tensor([place for own in sequences for place in own], device=device),
            blocks=cache(lambda window: grouped([(own, own) for own in places], window, device)),
        )
        ids = [token for prompt in prompts for token in prompt]
        hidden = self._pass(ids, [at for own in places for at in range(len(own))], prefill)
        self.lengths = torch.cat([self.lengths, torch.tensor([len(own) for own in sequences], device=device)])
        return last_logits(self.model, hidden[[end - 1 for end in ends]]).repeat_interleave(copies, 0)

    def step(self, tokens: Tensor) -> Tensor:
        """Add a token to each sequence. Returns logits, (sequence, vocab)."""
        self._fit(len(tokens), int(self.lengths.max()) + 1)
        hidden = self._pass(tokens, self.lengths, _Step(self))
        self.lengths = self.lengths + 1
        return last_logits(self.model, hidden)

    def _pass(self, ids: Tensor | Sequence[int], positions: Tensor | Sequence[int], keeper: _Prefill | _Step) -> Tensor:
        """The last hidden state of tokens that lie in one row. Shape (tokens, hidden)."""
        ids, positions = (torch.as_tensor(numbers, device=self.model.device) for numbers in (ids, positions))
        return row_hidden_states(self.model.get_decoder(), ids, positions, slots=keeper)

    def keep(self, going: Tensor) -> list[int]:
        """Let the other sequences' slots go. Sequences from the end move into them: the result says which is now in each slot."""
        count = len(going)
        order = list(range(count))
        gone = sorted(set(order) - set(going.tolist()))  # holes among the slots that stay
        moved = [slot for slot in going.tolist() if slot >= count]
        for hole, slot in zip(gone, moved, strict=True):
            order[hole] = slot
        if moved:
            longest = int(self.lengths[moved].max())
            for keys, values in self.layers.values():
                for tensor in (keys, values):
                    tensor[gone, :, :longest] = tensor[moved, :, :longest]
        self.lengths = self.lengths[order]
        return order

    def _fit(self, slots: int, columns: int) -> None:
        """Have columns for the longest sequence and a few more: products read all of them, and a part of them would be copied first."""
        if slots <= self.slots and columns <= self.columns <= columns + 3 * GROWTH:
            return
        kept, count = min(self.columns, columns), len(self.lengths)
        self.slots, self.columns = max(slots, self.slots), columns + GROWTH - 1
        for tensors in self.layers.values():
            for i, old in enumerate(tensors):
                tensors[i] = self._room(old)
                tensors[i][:count, :, :kept] = old[:count, :, :kept]

    def _room(self, like: Tensor) -> Tensor:
        """Zeros, not just memory: what is never written has weight 0, and 0 times it must be 0."""
        return like.new_zeros(self.slots, like.shape[1], self.columns, like.shape[3])

    def of_layer(self, layer: int, key: Tensor, value: Tensor) -> list[Tensor]:
        """Keys and values of a layer, which get their room when it is first computed."""
        if layer not in self.layers:
            self.layers[layer] = [self._room(key), self._room(value)]
        return self.layers[layer]


class _Prefill:
    """Attention of a row of prompts, whose keys and values are written to the slots of every sequence."""

    def __init__(self, slots: Slots, slot: Tensor, column: Tensor, place: Tensor, blocks):
        self.slots, self.blocks = slots, blocks
        self.written, self.place = (slot, slice(None), column), place

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
        for kept, new in zip(self.slots.of_layer(layer, key, value), (key, value), strict=True):
            kept[self.written] = new[0].transpose(0, 1)[self.place]
        return row_attention(query, key, value, scaling, self.blocks(window))


class _Step:
    """Attention of a new token of each sequence to all that came before it."""

    def __init__(self, slots: Slots):
        self.slots, self.count = slots, len(slots.lengths)
        self.written = (torch.arange(self.count, device=slots.lengths.device), slice(None), slots.lengths)
        self.hiding = cache(self._hiding)

    def _hiding(self, window: int | None) -> Tensor:
        """What is added to scores: 0, or -inf where a key may not be seen. Shape (sequence, 1, 1, columns)."""
        behind = self.slots.lengths[:, None] - torch.arange(self.slots.columns, device=self.slots.lengths.device)
        hidden = (behind < 0) if window is None else (behind < 0) | (behind >= window)
        return hiding(hidden)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
        """Plain products: on a processor a third of the time of the fused kernel."""
        key_heads, size = key.shape[1], key.shape[3]
        seen = []
        for kept, new in zip(self.slots.of_layer(layer, key, value), (key, value), strict=True):
            kept[self.written] = new[0].transpose(0, 1)
            seen.append(kept[: self.count].flatten(0, 1))
        keys, values = seen
        q = query[0].transpose(0, 1).reshape(self.count * key_heads, -1, size)
        scores = torch.baddbmm(q.new_zeros(()), q, keys.transpose(1, 2), beta=0, alpha=scaling)
        scores.view(self.count, key_heads, -1, scores.shape[-1]).add_(self.hiding(window).to(scores.dtype))
        return torch.bmm(torch.softmax(scores, dim=-1), values).view(1, self.count, -1, values.shape[-1])


class PaddedSlots:
    """For models whose attention cannot run packed rows: transformers' own cache, prompts padded on the left to the longest."""

    refills = False

    def __init__(self, model: PreTrainedModel):
        """Empty."""
        self.model = model

    def admit(self, prompts: Sequence[Sequence[int]], copies: int) -> Tensor:
        """Compute prompts, each once for all its sequences. Returns logits, (sequence, vocab)."""
        device, width = self.model.device, max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        output = self.model.get_decoder()(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)
        self.cache = output.past_key_values
        self.cache.batch_repeat_interleave(copies)
        self.mask, self.position = (tensor.repeat_interleave(copies, 0) for tensor in (mask, positions[:, -1]))
        return last_logits(self.model, output.last_hidden_state[:, -1].contiguous()).repeat_interleave(copies, 0)

    def step(self, tokens: Tensor) -> Tensor:
        """Add a token to each sequence. Returns logits, (sequence, vocab)."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        self.position = self.position + 1
        output = self.model.get_decoder()(
            input_ids=tokens[:, None],
            attention_mask=self.mask,
            position_ids=self.position[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        return last_logits(self.model, output.last_hidden_state[:, -1].contiguous())

    def keep(self, going: Tensor) -> list[int]:
        """Let the other sequences go. Returns which is now in each place."""
        going = going.to(self.model.device)
        self.cache.batch_select_indices(going)
        self.mask, self.position = self.mask[going], self.position[going]
        return going.tolist()


def last_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits of what follows each hidden state. Shape (sequence, hidden) to (sequence, vocab).

    Not the model's own `logits_to_keep`: it multiplies a strided slice, for which torch copies the output layer once a sequence.
    """
    logits = model.get_output_embeddings()(hidden)
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return softcap * torch.tanh(logits / softcap) if softcap else logits
