"""From records to examples: rendered, measured against the longest length, checked, split by prompt. Kept as Arrow files in the cache."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from rich.markup import escape
from torch import Tensor

from align.artifact import identity_of
from align.chat import Chat, JoinedReply, UnfitMessages
from align.data.cache import cache_for
from align.data.checks import Problem
from align.data.convert import Converted
from align.data.mix import Data, is_heldout, stirred, times_in_epoch
from align.data.near import near_duplicates
from align.data.report import stop_if_bad
from align.errors import AlignError
from align.model.packing import Example
from align.progress import console, say
from align.records import Message, write_jsonl
from align.settings import Training

if TYPE_CHECKING:
    import datasets

REVISION = 1  # raised when the same records begin to give other tokens
SEVERAL_PROCESSES_FROM = 20_000  # records
OVERLONG = "over the longest length"
NEAR_DUPLICATE = "near duplicate of an earlier record"
DEMONSTRATIONS = 128  # completions that scores are centred on, at most: their mean is known to an eleventh of their spread
PIECE = 500  # records rendered at one time


@dataclass(frozen=True)
class Examples:
    """Training and held-out examples of a stage. An example's index is its place in `probability`, `margin` and `where`."""

    training: Sequence[Example]
    heldout: Sequence[Example]
    probability: Tensor  # (examples,) how sure the labeller is that chosen is better; 1 where it is no pair
    margin: Tensor  # (examples,)
    where: Sequence[str]  # file:line
    facts: dict[str, Any]


class Stored(Sequence[Example]):
    """Some of the tokenised examples, read from mapped memory when they are asked for."""

    def __init__(self, dataset: datasets.Dataset, at: np.ndarray):
        """Those at the places `at` of the data set, in that order."""
        self.dataset, self.at = dataset, at

    def __len__(self) -> int:
        return len(self.at)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Stored: ...
    def __getitem__(self, index: int | slice) -> Example | Stored:
        if isinstance(index, slice):
            return Stored(self.dataset, self.at[index])
        place = int(self.at[index])
        row = self.dataset[place]
        trained = row["trained"]
        return Example(place, tuple(row["prompt"]), tuple(map(tuple, row["completions"])), trained and tuple(map(tuple, trained)))

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))


class Places(Sequence[str]):
    """file:line of every example, looked up when asked for."""

    def __init__(self, data: Data, records: np.ndarray):
        """`records` are the examples' places in the data."""
        self.data, self.records = data, records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        return self.data.place(int(self.records[index]))


def prepare(name: str, role: str, data: Data, chat: Chat, settings: Training, folder: Path | None = None) -> Examples:
    """Examples of a stage's data: tokenised once, then found in the cache.

    Args:
        name: of the stage.
        role: its input: data or preferences.
        data: records.
        chat: tokenizer and template.
        settings: of the stage: longest length, what becomes of longer ones, share held out, seed.
        folder: where rejected.jsonl goes, with every row that is not used and why; without one nothing is written or said.

    Raises:
        AlignError: where too many records cannot be rendered, one is too long and that is an error, or none is left.
    """
    dataset = tokenised(data, chat, settings)
    columns = {name: dataset.data.column(name).to_numpy() for name in ("record", "tokens", "cut")}
    reasons = dataset.data.column("reason")
    good = np.asarray(reasons.is_null())
    counts = _refusals(reasons, good)
    where = Places(data, columns["record"])
    overlong = counts.get(OVERLONG, 0)
    if overlong and settings.on_overlong == "error":
        first = next(i for i in np.flatnonzero(~good) if reasons[int(i)].as_py() == OVERLONG)
        raise AlignError(
            f"{where[first]}: over {name}.max_length of {settings.max_length} tokens, with {overlong - 1} more of {len(data)} records. "
            f"Raise it (--set {name}.max_length=...), or leave such rows out: --set {name}.on_overlong=drop"
        )
    details = dataset.data.column("detail")
    unfit: dict[str, list[str]] = {reason: [] for reason in counts}
    for i in map(int, np.flatnonzero(~good)):
        if len(shown := unfit[reasons[i].as_py()]) < 3:
            shown.append(_place(where[i], details[i].as_py()))
    bad = sum(counts.values()) - overlong
    stop_if_bad(f"{name}.{role}", counts, unfit, bad, len(data), int(good.sum()) + overlong, settings.max_bad_rows, name)
    if settings.near_duplicates is not None:
        among = set(columns["record"][good].tolist())
        near = np.isin(columns["record"], near_duplicates(data, settings.near_duplicates, among)["at"])
        counts[NEAR_DUPLICATE], good = int((near & good).sum()), good & ~near
    keys = data.column("key")[columns["record"]]
    held = good & is_heldout(keys, settings.holdout, settings.seed)
    times = times_in_epoch(data.weights()[columns["record"]], data.column("digest")[columns["record"]], settings.seed)
    training = np.repeat(np.arange(len(good)), np.where(good & ~held, times, 0))
    heldout = np.flatnonzero(held)
    heldout = np.sort(heldout[np.argsort(stirred(keys[heldout], settings.seed), kind="stable")[: settings.max_heldout]])
    if not len(training):
        raise AlignError(f"{name}.{role}: no row is left to train on ({overlong} over {name}.max_length, {int(held.sum())} held out).")
    facts = {
        "training": len(training),
        "heldout": int(held.sum()),
        "overlong": overlong,
        "cut": int(columns["cut"].sum()),
        "unfit": {reason: count for reason, count in counts.items() if reason != OVERLONG},
        "tokens": int(columns["tokens"][training].sum(dtype=np.int64)),
    }
    if folder is not None:
        write_rejected(folder, data, ((where[int(i)], reasons[int(i)].as_py() or NEAR_DUPLICATE) for i in np.flatnonzero(~good)))
        _say(name, facts, settings)
    return Examples(
        Stored(dataset, training),
        Stored(dataset, heldout),
        torch.from_numpy(data.column("probability")[columns["record"]].copy()),
        torch.from_numpy(data.column("margin")[columns["record"]].copy()),
        where,
        facts,
    )


def write_rejected(folder: Path, data: Data, unfit: Iterable[tuple[str, str]]) -> None:
    """Write every row that is not used to folder/rejected.jsonl: where it is, the reason, and what of it is known."""
    rows = [*data.rejected(), *({"where": place, "reason": reason} for place, reason in unfit)]
    if rows:
        write_jsonl(folder / "rejected.jsonl", rows)


def _place(place: str, detail: str | None) -> str:
    return f"{place} ({detail})" if detail else place


def _refusals(reasons: Any, good: np.ndarray) -> dict[str, int]:
    return dict(Counter(reasons[int(at)].as_py() for at in np.flatnonzero(~good)).most_common())


def _say(name: str, facts: dict[str, Any], settings: Training) -> None:
    policy = {"shorten_prompt": "too long with the last turn alone", "cut_completion": "with no room for a completion"}
    text = f"  {name}: {facts['training']:,} examples to train on ({facts['tokens']:,} tokens), {facts['heldout']:,} held out"
    text += f", {facts['overlong']:,} over {settings.max_length} tokens {policy.get(settings.on_overlong, 'left out')}"
    say(text + (f", {facts['cut']:,} shortened" if facts["cut"] else ""))
    for reason, count in facts["unfit"].items():
        say(f"  [yellow]{name}: {count:,} left out: {escape(reason)}[/]")


def tokenised(data: Data, chat: Chat, settings: Training) -> datasets.Dataset:
    """Every record of the data as tokens, or with the reason why not. Columns: see `_features`."""
    import datasets

    rendering = {"train_on": getattr(settings, "train_on", None), "max_length": settings.max_length, "on_overlong": settings.on_overlong}
    known = [chat.template_fingerprint, chat.tokenizer_fingerprint, chat.tokenizer.special_tokens_map]  # templates write those too
    fingerprint = identity_of({"revision": REVISION, "data": data.identity, "chat": known, **rendering})[:32]
    files = [str(path) for converted in data.converted for path in converted.files]
    whole = datasets.concatenate_datasets([datasets.Dataset.from_file(path) for path in files]).select_columns(["record", "raw", "file"])
    starts = np.cumsum([0, *(len(converted.table) for converted in data.converted)])[:-1]
    records = whole.select(starts[data.chosen[:, 0]] + data.chosen[:, 1], new_fingerprint=fingerprint)
    processes = (os.cpu_count() or 1) if len(records) >= SEVERAL_PROCESSES_FROM else None
    with bars_of_datasets(processes is not None and console.is_terminal):
        tokens = records.map(
            _Renderer(chat, data, rendering),
            batched=True,
            batch_size=PIECE,
            with_indices=True,
            remove_columns=["record", "raw", "file"],
            features=_features(),
            num_proc=processes,
            desc="tokenising",
            cache_file_name=str(cache_for("tokens") / f"{fingerprint}.arrow"),
            new_fingerprint=f"{fingerprint}-tokens",
        )
    for file in tokens.cache_files:
        os.utime(file["filename"])  # what is used stays in the cache
    return tokens


@contextmanager
def bars_of_datasets(shown: bool) -> Iterator[None]:
    """The library's progress bars only where there is something to wait for and someone to see it."""
    import datasets

    were_shown = not datasets.are_progress_bars_disabled()
    (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
    try:
        yield
    finally:
        (datasets.enable_progress_bars if were_shown else datasets.disable_progress_bars)()


def _features() -> datasets.Features:
    from datasets import Features, List, Value

    return Features(
        {
            "record": Value("int64"),  # place in the data
            "prompt": List(Value("int32")),
            "completions": List(List(Value("int32"))),
            "trained": List(List(Value("bool"))),  # null: all
            "tokens": Value("int32"),
            "cut": Value("bool"),  # shortened to fit
            "reason": Value("string"),  # why it is not used; null where it is
            "detail": Value("string"),
        }
    )


class _Renderer:
    """Renders a batch of records; `datasets` sends it to its processes."""

    def __init__(self, chat: Chat, data: Data, rendering: dict[str, Any]):
        self.chat, self.kind, self.rendering = chat, data.kind, rendering
        self.converted = [Converted(each.folder, each.report) for each in data.converted]  # without the tables that those have open
        self.ends = np.searchsorted(data.chosen[:, 0], np.arange(len(data.converted)), side="right")  # where each source's records end

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        rows: dict[str, list] = {name: [] for name in ("record", "prompt", "completions", "trained", "tokens", "cut", "reason", "detail")}
        sources = np.searchsorted(self.ends, indices, side="right")
        for index, source, *line in zip(indices, sources, *(batch[name] for name in ("record", "raw", "file")), strict=True):
            record = self.converted[source].read(*line)
            for example, cut, problem in render(self.chat, self.kind, record, **self.rendering):
                rows["record"].append(index)
                rows["prompt"].append(example.prompt if example else ())
                rows["completions"].append(example.completions if example else ())
                rows["trained"].append(example.trained if example else None)
                rows["tokens"].append(example.tokens if example else 0)
                rows["cut"].append(cut)
                rows["reason"].append(problem and problem.reason)
                rows["detail"].append(problem and problem.detail)
        return rows


def prompt_ids(
    name: str, data: Data, chat: Chat, max_bad_rows: float, max_tokens: int | None = None, folder: Path | None = None
) -> list[tuple[dict[str, Any], tuple[int, ...]]]:
    """Every prompt with its token ids, ready to be answered.

    Args:
        name: of the stage.
        data: prompts.
        chat: tokenizer and template.
        max_bad_rows: largest share that may be left out because the template cannot render it.
        max_tokens: longer ones are left out.
        folder: where rejected.jsonl goes; without one nothing is written or said.

    Raises:
        AlignError: where more cannot be rendered, or every prompt is too long.
    """
    found, unfit = [], list[tuple[str, str]]()
    for index, record in enumerate(data.records()):
        try:
            found.append((record, chat.prompt_ids(record["prompt"], record.get("tools"))))
        except UnfitMessages as error:
            unfit.append((_place(data.place(index), error.detail), error.reason))
    stop_if_bad(f"{name}.prompts", *_counted(unfit), len(unfit), len(data), len(found), max_bad_rows, name)
    kept = [(record, ids) for record, ids in found if max_tokens is None or len(ids) <= max_tokens]
    if not kept:
        raise AlignError(f"{data.facts['path']}: every prompt is over {name}.max_prompt_tokens ({max_tokens}).")
    if folder is not None:
        write_rejected(folder, data, unfit)
        if max_tokens is not None:
            say(f"  {name}: {len(kept)} prompts, {len(found) - len(kept)} over max_prompt_tokens and left out")
    return kept


def demonstrations(name: str, data: Data, chat: Chat, settings: Training) -> list[Example]:
    """Conversations whose last replies a reward model's scores are centred on: those of the first DEMONSTRATIONS that fit.

    Raises:
        AlignError: where too many cannot be rendered, or none fits.
    """
    examples, unfit, overlong = [], list[tuple[str, str]](), 0
    for index, record in enumerate(data.records(limit=DEMONSTRATIONS)):
        for example, _, problem in render(chat, data.kind, record, settings.max_length, "drop", "last"):
            if example is not None:
                examples.append(example)
            elif problem is not None and problem.reason == OVERLONG:
                overlong += 1
            elif problem is not None:
                unfit.append((_place(data.place(index), problem.detail), problem.reason))
    where, seen = f"{name}.demonstrations", min(len(data), DEMONSTRATIONS)
    stop_if_bad(where, *_counted(unfit), len(unfit), seen, len(examples) + overlong, settings.max_bad_rows, name)
    if not examples:
        raise AlignError(f"{where}: every one is over {name}.max_length ({settings.max_length}). Raise it, or give shorter ones.")
    return examples


def _counted(unfit: Sequence[tuple[str, str]]) -> tuple[dict[str, int], dict[str, list[str]]]:
    """How many there are of each reason, and the first places, of (place, reason)."""
    counts = dict(Counter(reason for _, reason in unfit).most_common())
    return counts, {reason: [place for place, other in unfit if other == reason][:3] for reason in counts}


Rendered = tuple[Example | None, bool, Problem | None]


def render(chat: Chat, kind: str, record: dict[str, Any], max_length: int, on_overlong: str, train_on: str | None = None) -> list[Rendered]:
    """A record as examples with whether each was shortened, or with the reason why it cannot be one. A long text gives several."""
    cut = False
    try:
        if "text" in record:
            return [(example, False, None) for example in chat.plain_text(0, record["text"], max_length)]
        example: Example | None = _example(chat, kind, record, train_on)
        assert example is not None
        if example.longest > max_length and on_overlong == "shorten_prompt":
            for shorter in _without_early_turns(record, "messages" if kind == "conversation" else "prompt"):
                example, cut = _example(chat, kind, shorter, train_on), True
                if example.longest <= max_length:
                    break
    except UnfitMessages as error:
        return [(None, False, Problem(error.reason, error.detail))]
    if example.longest > max_length and on_overlong == "cut_completion":
        example, cut = _cut(example, max_length), True
    if example is None or example.longest > max_length:
        return [(None, False, Problem(OVERLONG))]
    unfinished = cut and on_overlong == "cut_completion"
    reason = _unusable(example, None if unfinished else chat.end_of_turn)
    if reason and unfinished:  # sides that differ only after the cut: nothing is wrong with the row
        reason = OVERLONG
    return [(None, False, Problem(reason))] if reason else [(example, cut, None)]


def _example(chat: Chat, kind: str, record: dict[str, Any], train_on: str | None) -> Example:
    """The whole record. White space before a reply is left out where the tokenizer would join it to the words that open the turn."""
    try:
        return _whole(chat, kind, record, train_on)
    except JoinedReply:
        names = ("messages",) if kind == "conversation" else ("prompt", "chosen", "rejected")
        return _whole(chat, kind, {**record, **{name: [_trimmed(message) for message in record[name]] for name in names}}, train_on)


def _trimmed(message: Message) -> Message:
    return {**message, "content": message["content"].lstrip()} if message["role"] == "assistant" else message


def _whole(chat: Chat, kind: str, record: dict[str, Any], train_on: str | None) -> Example:
    tools = record.get("tools")
    if kind == "conversation":
        return chat.conversation(0, record["messages"], last_turn_only=train_on == "last", tools=tools)
    return chat.preference(0, record["prompt"], record["chosen"], record["rejected"], tools=tools)


def _without_early_turns(record: dict[str, Any], key: str) -> Iterator[dict[str, Any]]:
    """The record with its first exchange left out, then the first two, and so on; the system message stays."""
    messages: list[Message] = record[key]
    system = [message for message in messages[:1] if message["role"] == "system"]
    for at in [i for i, message in enumerate(messages) if message["role"] == "user"][1:]:
        yield {**record, key: [*system, *messages[at:]]}


def _cut(example: Example, max_length: int) -> Example | None:
    """The example with its completions cut to fit: unfinished, so no end of a turn is trained at the cut. None where nothing fits."""
    room = max_length - len(example.prompt)
    if room < 1:
        return None
    return Example(
        example.index,
        example.prompt,
        tuple(completion[:room] for completion in example.completions),
        example.trained and tuple(trained[:room] for trained in example.trained),
    )


def _unusable(example: Example, end_of_turn: int | None) -> str | None:
    """Why nothing would be learned from an example, or the wrong thing. `end_of_turn` is None for one that was cut."""
    if not example.trained_tokens:
        return "nothing left in it to train on"
    if len(set(example.completions)) < len(example.completions):
        return "chosen and rejected are the same in tokens"
    if end_of_turn is None:
        return None
    for number, ids in enumerate(example.completions):
        trained = example.trained[number] if example.trained else [True] * len(ids)
        for at, counts in enumerate(trained):
            if counts and (at + 1 == len(ids) or not trained[at + 1]) and ids[at] != end_of_turn:
                return "a trained turn does not end with the token that ends a turn"
    return None
