"""Preferences out of the rows of files that compare replies: sides, votes, scores, ranks, labels."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

from align.data.instructions import prompt_reader
from align.data.rows import Convert, Format, Unfit, list_of, number_of, shown, text_of
from align.data.transcripts import transcript_turns
from align.data.turns import as_turns, read_tools, read_turns
from align.data.votes import share_of_first

_PARTED = "chosen and rejected part before the last turn"
GOOD_LABELS = {"true", "yes", "good", "chosen", "desirable", "positive", "up", "thumbs_up", "like", "accepted", "1"}
BAD_LABELS = {"false", "no", "bad", "rejected", "undesirable", "negative", "down", "thumbs_down", "dislike", "0", "-1"}


def from_sides(format: Format) -> Convert:
    """A chosen and a rejected reply; the prompt is a column, or the shared beginning of two conversations, or both."""
    prompt, chosen, rejected = format.column("prompt"), format.column("chosen"), format.column("rejected")
    prompt_of, extras, repeats = prompt_reader(format), _extras(format), format.coding == "repeats the prompt"
    plain = bool(prompt) and not repeats and not any(format.column(field) for field in ("input", "system", "history", "passages"))

    def convert(row: Mapping) -> list[dict]:
        asked, better, worse = row.get(prompt), row.get(chosen), row.get(rejected)
        if plain and type(asked) is str and type(better) is str and type(worse) is str and not asked.startswith("\n\nHuman:"):
            record: dict[str, Any] = {
                "prompt": [{"role": "user", "content": asked}],
                "chosen": [{"role": "assistant", "content": better}],
                "rejected": [{"role": "assistant", "content": worse}],
            }
        else:
            if repeats:
                better, worse = _without(asked, better, chosen), _without(asked, worse, rejected)
            sides = as_turns(better, "assistant", chosen), as_turns(worse, "assistant", rejected)
            record = _record(prompt_of(row) if prompt else [], *sides)
        if extras:
            extras(row, record)
        return [record]

    return convert


def from_transcripts(format: Format) -> Convert:
    """Two transcripts of one conversation that differ in the last reply, as in hh-rlhf (Bai et al. 2022)."""
    chosen, rejected, style, extras = format.column("chosen"), format.column("rejected"), format.coding, _extras(format)

    def added(row: Mapping, record: dict) -> dict:
        if extras:
            extras(row, record)
        return record

    def convert(row: Mapping) -> list[dict]:
        better, worse = text_of(row.get(chosen), chosen), text_of(row.get(rejected), rejected)
        shared, _, reply = better.rpartition("\n\nAssistant:")
        if style == "hh" and worse.startswith(f"{shared}\n\nAssistant:"):  # mostly so: the shared turns are read once
            other = worse[len(better) - len(reply) :]
            if "\n\nHuman:" not in reply and "\n\nHuman:" not in other and "\n\nAssistant:" not in other:
                prompt = transcript_turns(shared, style, chosen)
                sides = [[{"role": "assistant", "content": text.strip()}] for text in (reply, other)]
                return [added(row, _sides_of(prompt, *sides))]
        record = _record([], *(transcript_turns(text, style, column) for text, column in ((better, chosen), (worse, rejected))))
        if record["chosen"][0]["role"] != "assistant":
            raise Unfit("the last turn is not the assistant's", shown(record["chosen"][0]["content"]))
        return [added(row, record)]

    return convert


def from_votes(format: Format) -> Convert:
    """Two replies and what one or several said of them: the side with more votes is chosen, by its share of them.

    A tie keeps the first as chosen, with a probability of one half, so that it stays visible.
    """
    prompt, (first, second), votes = format.column("prompt"), format.several("replies"), format.several("votes")
    prompt_of, extras, coding = prompt_reader(format), _extras(format), format.coding

    def share(row: Mapping) -> float:
        given: list[float] = []
        if coding == "counts":
            counts = [_number(row, column) for column in votes]
            if min(counts) < 0 or sum(counts) == 0:
                raise Unfit(f"no vote in {', '.join(votes)}", shown(counts))
            return counts[0] / sum(counts)
        if coding == "one-hot":
            return _one_hot_share(row, votes)
        for column in votes:
            value = row.get(column)
            for vote in value if isinstance(value, list | tuple) else [value]:
                if vote is None or vote == "":
                    continue
                if (found := share_of_first(vote, coding, first, second)) is None:
                    raise Unfit(f"{column} is no vote that can be read", shown(vote))
                given.append(found)
        if not given:
            raise Unfit(f"no vote in {', '.join(votes)}")
        return sum(given) / len(given)

    def convert(row: Mapping) -> list[dict]:
        sides = [_reply(row.get(column), column) for column in (first, second)]
        of_first = share(row)
        better, worse = sides if of_first >= 0.5 else sides[::-1]
        record = _record(prompt_of(row) if prompt else [], better, worse)
        record["chosen_probability"] = max(of_first, 1 - of_first)
        if coding == "signed" and len(votes) == 1 and (strength := number_of(row.get(votes[0]))):
            record["margin"] = abs(strength)
        if extras:
            extras(row, record)
        return [record]

    return convert


def from_columns_of_replies(format: Format) -> Convert:
    """Two replies or more, a column each, with a score or rank each, or with a verdict on every pair of them."""
    replies, scores, grid = format.several("replies"), format.several("scores"), format.column("verdicts")
    prompt_of, lower_is_better = prompt_reader(format), format.coding == "ranks"

    def convert(row: Mapping) -> list[dict]:
        prompt = prompt_of(row)
        texts = [_reply(row.get(column), column) for column in replies]
        if grid:
            return _by_verdicts(prompt, texts, list_of(row.get(grid), grid), grid)
        if len(scores) == 1:
            values = [_as_number(value, scores[0]) for value in list_of(row.get(scores[0]), scores[0])]
        else:
            values = [_number(row, column) for column in scores]
        return _by_scores(prompt, texts, values, lower_is_better, keep_tie=len(texts) == 2)

    return convert


def from_lists_of_replies(format: Format) -> Convert:
    """A list of replies with a score or rank each: in the items, in a list beside it, or an index that chooses one."""
    prompt_of, lower_is_better = prompt_reader(format), format.coding == "ranks"
    (replies, _, key), (scores, _, score_key) = (format.column(field).partition("[].") for field in ("replies", "scores"))
    choice = format.column("choice")

    def convert(row: Mapping) -> list[dict]:
        items = list_of(row.get(replies), replies)
        if key and not all(isinstance(item, Mapping) for item in items):
            raise Unfit(f"{replies} holds what is not a rated reply", shown(items))
        texts = [_reply(item.get(key) if key else item, f"{replies}[].{key}" if key else replies) for item in items]
        prompt = prompt_of(row)
        if choice:
            return [_by_choice(prompt, texts, row.get(choice), choice)]
        if score_key:
            values = [_as_number(item.get(score_key), f"{replies}[].{score_key}") for item in items]
        else:
            values = [_as_number(value, scores) for value in list_of(row.get(scores), scores)]
        return _by_scores(prompt, texts, values, lower_is_better)

    return convert


def from_labels(format: Format) -> Convert:
    """Replies that are each labelled good or bad, gathered by prompt: every good one with every bad one."""
    split, label = _prompt_and_reply(format), format.column("label")

    def convert(row: Mapping) -> list[dict]:
        sides: dict[bool, list[list[dict]]] = {True: [], False: []}
        for one in row["rows"]:
            prompt, reply = split(one)
            sides[_is_good(one.get(label), label)].append(reply)
        if not sides[True] or not sides[False]:
            raise Unfit(
                "no pair: the prompt has only good (or only bad) replies", f"{len(row['rows'])} of them, {'good' if sides[True] else 'bad'}"
            )
        return [_sides_of(prompt, good, bad) for good, bad in product(sides[True], sides[False])]

    return convert


def from_labelled(format: Format) -> Convert:
    """Replies that are each labelled good or bad, one by one."""
    split, label = _prompt_and_reply(format), format.column("label")

    def convert(row: Mapping) -> list[dict]:
        prompt, reply = split(row)
        return [{"prompt": prompt, "completion": reply, "label": _is_good(row.get(label), label)}]

    return convert


def sides_apart(compare: Convert) -> Convert:
    """The two sides of each preference as a good and a bad reply; of an undecided one, none."""

    def convert(row: Mapping) -> list[dict]:
        found = []
        for record in compare(row):
            probability = record.get("chosen_probability", 1.0)
            shared = {field: record[field] for field in ("prompt", "tools") if field in record}
            if probability != 0.5:
                found += [
                    {**shared, "completion": record[side], "label": (side == "chosen") == (probability > 0.5)}
                    for side in ("chosen", "rejected")
                ]
        return found

    return convert


def from_rated_rows(format: Format) -> Convert:
    """One reply with its score a row, gathered by prompt: every two with different scores."""
    split, score, lower_is_better = _prompt_and_reply(format), format.column("score"), format.coding == "ranks"

    def convert(row: Mapping) -> list[dict]:
        read = [(*split(one), _number(one, score)) for one in row["rows"]]
        return _by_scores(read[0][0], [reply for _, reply, _ in read], [value for _, _, value in read], lower_is_better)

    return convert


def prompt_key(format: Format) -> Callable[[Mapping], str]:
    """Gives equal keys to rows of equal prompts."""
    split = _prompt_and_reply(format)
    return lambda row: json.dumps(split(row)[0], ensure_ascii=False)


def _prompt_and_reply(format: Format) -> Callable[[Mapping], tuple[list[dict], list[dict]]]:
    prompt, completion, messages = format.column("prompt"), format.column("completion"), format.column("messages")
    prompt_of = prompt_reader(format)

    def split(row: Mapping) -> tuple[list[dict], list[dict]]:
        if prompt:
            return prompt_of(row), _reply(row.get(completion), completion)
        turns = read_turns(row.get(messages), messages)
        return turns[:-1], turns[-1:]

    return split


def _record(prompt: list[dict], chosen: list[dict], rejected: list[dict]) -> dict:
    """The preference of two sides that may repeat the prompt, or go on from it together."""
    if not chosen or not rejected:
        raise Unfit("chosen or rejected has no turn")
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if len(chosen) - shared != 1 or len(rejected) - shared != 1:
        raise Unfit(_PARTED, f"{len(chosen)} and {len(rejected)} turns, the first {shared} of them shared")
    return _sides_of(_merged(prompt, chosen[:shared]) if shared else prompt, chosen[shared:], rejected[shared:])


def _merged(prompt: list[dict], shared: list[dict]) -> list[dict]:
    """The prompt that a column gives and the sides repeat, in whole or in part; or which they go on from."""
    system = [turn for turn in prompt[:1] if turn["role"] == "system"]
    own = prompt[len(system) :]
    theirs = shared[1:] if shared[0]["role"] == "system" else shared
    if not own or theirs[: len(own)] == own or own[-1] in theirs:
        return system + shared if shared[0]["role"] != "system" else shared
    if shared[0]["role"] == "assistant":
        return prompt + shared
    raise Unfit("chosen and rejected do not begin with the prompt", shown(shared[0]["content"]))


def _sides_of(prompt: list[dict], chosen: list[dict], rejected: list[dict]) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _without(prompt: Any, reply: Any, column: str) -> str:
    text = text_of(reply, column)
    if not isinstance(prompt, str) or not text.startswith(prompt):
        raise Unfit(f"{column} does not begin with the prompt", shown(text))
    return text[len(prompt) :].lstrip()


def _reply(value: Any, column: str) -> list[dict]:
    return [{"role": "assistant", "content": value}] if type(value) is str else as_turns(value, "assistant", column)


def _as_number(value: Any, column: str) -> float:
    if (number := number_of(value)) is None:
        raise Unfit(f"{column} is missing") if value is None else Unfit(f"{column} is not a number", shown(value))
    return number


def _number(row: Mapping, column: str) -> float:
    return _as_number(row.get(column), column)


def _by_scores(
    prompt: list[dict], replies: list[list[dict]], scores: Sequence[float], lower_is_better: bool, keep_tie: bool = False
) -> list[dict]:
    """A preference of every two replies with different scores; the margin is the difference of the scores, not of ranks."""
    if len(replies) != len(scores):
        raise Unfit("there are not as many scores as replies", f"{len(scores)} and {len(replies)}")
    records = []
    for (first, first_score), (second, second_score) in combinations(zip(replies, scores, strict=True), 2):
        better, worse = (first, second) if (first_score >= second_score) != lower_is_better else (second, first)
        if first_score == second_score:
            if keep_tie:
                records.append({**_sides_of(prompt, first, second), "chosen_probability": 0.5})
            continue
        record = _sides_of(list(prompt), better, worse)
        records.append(record if lower_is_better else {**record, "margin": abs(first_score - second_score)})
    if not records:
        raise Unfit("no pair: all replies to the prompt have the same score" if len(replies) > 1 else "no pair: the prompt has one reply")
    return records


def _by_verdicts(prompt: list[dict], replies: list[list[dict]], verdicts: list, column: str) -> list[dict]:
    """A preference of every two replies, by verdicts in the order 12, 13, ..., 23, ...: 1, 2, or 0 for a tie."""
    pairs = list(combinations(replies, 2))
    if len(verdicts) != len(pairs):
        raise Unfit(f"{column} has not a verdict for every pair", f"{len(verdicts)} for {len(pairs)}")
    records = []
    for (first, second), verdict in zip(pairs, verdicts, strict=True):
        if (share := share_of_first(verdict, "1/2")) is None:
            raise Unfit(f"{column} is no vote that can be read", shown(verdict))
        better, worse = (first, second) if share >= 0.5 else (second, first)
        records.append({**_sides_of(list(prompt), better, worse), "chosen_probability": max(share, 1 - share)})
    return records


def _by_choice(prompt: list[dict], replies: list[list[dict]], choice: Any, column: str) -> dict:
    index = number_of(choice)
    if len(replies) != 2 or index not in (0, 1):
        raise Unfit(f"{column} does not choose one of two replies", f"{shown(choice)} of {len(replies)}")
    return {**_sides_of(prompt, replies[int(index)], replies[1 - int(index)]), "chosen_probability": 1.0}


def _one_hot_share(row: Mapping, columns: Sequence[str]) -> float:
    """The first's share where one of the columns (first, second, and often some for ties) is set."""
    values = [row.get(column) for column in columns]
    flags = [str(value).strip().lower() in ("1", "1.0", "true") for value in values]
    if sum(flags) != 1:
        raise Unfit("not exactly one winner", shown(dict(zip(columns, values, strict=True)), 120))
    return 1.0 if flags[0] else 0.0 if flags[1] else 0.5


def _is_good(value: Any, column: str) -> bool:
    if isinstance(value, bool):
        return value
    said = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip().lower()
    if said in GOOD_LABELS or said in BAD_LABELS:
        return said in GOOD_LABELS
    raise Unfit(f"{column} is missing") if value is None else Unfit(f"{column} is neither good nor bad", shown(value))


def _extras(format: Format) -> Callable[[Mapping, dict], None] | None:
    """Adds what a row says beyond its two sides: how sure the label is, a margin, tools, and who labelled it."""
    probability, margin, scores = format.column("chosen_probability"), format.column("margin"), format.several("scores")
    tools, source, inside = format.column("tools"), format.column("source"), format.column("prompt")
    if not (probability or margin or scores or tools or source or format.coding == "tools in the prompt"):
        return None

    def add(row: Mapping, record: dict) -> None:
        if probability and (value := row.get(probability)) not in (None, ""):
            sure = number_of(value)
            if sure is None or not 0 <= sure <= 1:
                raise Unfit(f"{probability} is not a number from 0 to 1", shown(value))
            record["chosen_probability"] = sure
        if margin and row.get(margin) not in (None, ""):
            record["margin"] = _number(row, margin)
        elif scores:
            ours, theirs = (number_of(row.get(column)) for column in scores)
            if ours is not None and theirs is not None:
                record["margin"] = ours - theirs
        holder = row.get(inside) if format.coding == "tools in the prompt" else row
        if isinstance(holder, Mapping) and (found := read_tools(holder.get(tools or "tools"), tools or "tools")):
            record["tools"] = found
        if source and isinstance(row.get(source), str):
            record["source"] = row[source]

    return add
