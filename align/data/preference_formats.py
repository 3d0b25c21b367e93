"""Recognition of files of preferences: sides, votes, scores, ranks, labels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from align.data.columns import SPEECH, Column, distinct, find, fits, named
from align.data.conversation_formats import ends_with_user, prompt_columns
from align.data.preferences import BAD_LABELS, GOOD_LABELS
from align.data.rows import Format, number_of
from align.data.transcripts import style_of
from align.data.votes import CODINGS, TIES, coding_of, words_of

Columns = Mapping[str, Column]
Pins = Mapping[str, str]
Fields = dict[str, str | tuple[str, ...]]
_CANONICAL = {"prompt", "chosen", "rejected", "chosen_probability", "margin", "tools", "source"}
_PAIRS = (("1", "2"), ("0", "1"), ("a", "b"), ("left", "right"), ("first", "second"))
_REPLIES = {"response", "answer", "output", "completion", "reply", "summary", "generation", "prediction", "candidate", "text", "ref"}
_REPLIES |= {"conversation", "message", "continuation", "option", "assistant", "replies", "summaries", "choices", "samples"}
_REPLIES |= {f"{word}s" for word in _REPLIES}
_LABELS: tuple[str, ...] = (
    "preference",
    "preferred",
    "winner",
    "label",
    "labels",
    "better",
    "choice",
    "chosen",
    "best",
    "verdict",
    "vote",
    "votes",
)
_LABELS += (
    "judgement",
    "judgment",
    "selected",
    "selection",
    "annotation",
    "annotations",
    "gold",
    "preferences",
    "human",
    "result",
    "safer",
)
_ANNOTATORS = {"annotator", "annotation", "vote", "rater", "judge", "labeler", "labeller", "label", "worker", "evaluator", "preference"}
_SCORES = {"score", "scores", "rating", "ratings", "reward", "rewards", "rank", "ranks", "ranking", "grade", "points", "helpfulness"}
_COUNTS = {"votes", "wins", "upvotes", "count"}


def recognise_preference(rows: Sequence[Mapping], seen: Columns, pins: Pins) -> Format | None:
    """Preferences of any form but trees."""
    rules = (_sides, _two_replies, _many_replies, _list_of_replies, _labels, _rated_rows)
    return next((found for rule in rules if (found := rule(rows, seen, pins))), None)


def two_replies(seen: Columns, pins: Pins) -> tuple[str, str] | None:
    """The columns of two replies to be compared: response1 and response2, answer_a and answer_b."""
    if "response_a" in pins and "response_b" in pins:
        return pins["response_a"], pins["response_b"]
    for base, group in _series(seen, SPEECH):
        for first, second in _PAIRS:
            if set(group) == {first, second} and (not base or _REPLIES & set(base)):
                return group[first], group[second]
    return None


def has_unread_replies(seen: Columns, pins: Pins) -> bool:
    """Whether there are columns of replies, so that a file not understood as more than prompts is not only that."""
    if two_replies(seen, pins) or any(chosen_and_rejected(seen, pins)):
        return True
    prompt = find(seen, "prompt", ("text", "turns"), pins)
    return any(
        column.holds != "nothing" and name != prompt and fits(column.words, "completion") is not None for name, column in seen.items()
    )


def chosen_and_rejected(seen: Columns, pins: Pins) -> tuple[str, str]:
    """The columns of the two sides, either of them empty if there is none."""
    chosen = find(seen, "chosen", SPEECH, pins)
    return chosen, find(seen, "rejected", SPEECH, pins, (chosen,))


def _sides(rows: Sequence[Mapping], seen: Columns, pins: Pins) -> Format | None:
    chosen, rejected = chosen_and_rejected(seen, pins)
    if not chosen or not rejected:
        return None
    sides: Fields = {"chosen": chosen, "rejected": rejected}
    asked = prompt_columns(seen, pins, (chosen, rejected))
    if not asked and (turns := find(seen, "messages", ("turns",), pins, (chosen, rejected))):
        asked = {"prompt": turns, **({"system": system} if (system := find(seen, "system", ("text",), pins)) else {})}
    extras = _extras(seen, pins)
    if asked:
        prompt, coding = str(asked["prompt"]), ""
        if isinstance(seen[prompt].sample, Mapping) and seen[prompt].sample.get("tools"):
            coding = "tools in the prompt"
        elif _repeat(rows, prompt, (chosen, rejected)):
            coding = "repeats the prompt"
        why = f"{chosen!r} and {rejected!r} are two replies to {prompt!r}" + (", which both repeat." if coding.startswith("rep") else ".")
        return Format("pairs", "preference", {**asked, **sides, **extras}, why, coding=coding)
    if seen[chosen].holds == seen[rejected].holds == "turns":
        why = f"{chosen!r} and {rejected!r} are conversations; the beginning they share is the prompt."
        return Format("implicit prompt", "preference", {**sides, **extras}, why)
    style = style_of(str(row.get(chosen) or "") for row in rows)
    if style and style == style_of(str(row.get(rejected) or "") for row in rows):
        why = f"{chosen!r} and {rejected!r} are transcripts with their turns marked; the beginning they share is the prompt."
        return Format("hh" if style == "hh" else f"{style} transcripts", "preference", {**sides, **extras}, why, coding=style)
    return None


def _two_replies(rows: Sequence[Mapping], seen: Columns, pins: Pins) -> Format | None:
    replies = two_replies(seen, pins)
    if not replies:
        return None
    asked = prompt_columns(seen, pins, replies)
    if not asked and any(seen[name].holds != "turns" for name in replies):
        return None
    fields: Fields = {**asked, "replies": replies}
    taken = {*replies, str(asked.get("prompt", ""))}
    about = f"{replies[0]!r} and {replies[1]!r} are two replies"
    scores = _beside(seen, replies, _SCORES)
    one_hot = _beside(seen, replies, {"winner", "win", "wins", "preferred", "better", "chosen"}, ("number", "flag", "text"))
    if one_hot and {str(value).lower() for value in distinct(rows, one_hot)} <= {"0", "1", "0.0", "1.0", "true", "false"}:
        ties = tuple(name for name, column in seen.items() if TIES & set(column.words) and set(column.words) & set(words_of(one_hot[0])))
        return Format(
            "votes",
            "preference",
            {**fields, "votes": (*one_hot, *ties)},
            f"{about}; {one_hot[0]!r} and its like mark the winner.",
            coding="one-hot",
        )
    if counts := _beside(seen, replies, _COUNTS):
        return Format(
            "votes", "preference", {**fields, "votes": counts}, f"{about}; {counts[0]!r} and {counts[1]!r} count votes.", coding="counts"
        )
    for votes in _votes(seen, pins, taken | set(scores)):
        if coding := coding_of(distinct(rows, votes), *replies, _first_scores_higher(rows, votes, scores)):
            told = f"{votes[0]!r} to {votes[-1]!r} are votes" if len(votes) > 1 else f"{votes[0]!r} says which is better"
            extras = {"source": source} if (source := find(seen, "source", ("text",), pins, votes)) else {}
            return Format(
                "votes", "preference", {**fields, "votes": votes, **extras}, f"{about}; {told} ({CODINGS[coding]}).", coding=coding
            )
    if scores:
        coding = "ranks" if {"rank", "ranks", "ranking"} & set(words_of(scores[0])) else ""
        why = f"{about} with {'ranks, 1 the best' if coding else 'scores'} in {scores[0]!r} and {scores[1]!r}."
        return Format("scored replies", "preference", {**fields, "scores": scores}, why, coding=coding)
    return None


def _many_replies(rows: Sequence[Mapping], seen: Columns, pins: Pins) -> Format | None:
    """Three replies or more in numbered columns."""
    for base, group in _series(seen, SPEECH):
        replies = tuple(group.values())
        if len(replies) < 3 or not _REPLIES & set(base) or not (asked := prompt_columns(seen, pins, replies)):
            continue
        fields: Fields = {**asked, "replies": replies}
        about = f"{replies[0]!r} to {replies[-1]!r} are replies to {str(asked['prompt'])!r}"
        pairs = len(replies) * (len(replies) - 1) // 2
        for name, column in seen.items():
            size = len(column.sample) if column.holds in ("numbers", "texts") else 0
            if size == pairs and set(column.words) & set(_LABELS) and _reads_as(distinct(rows, [name]), {"0", "1", "2", "tie"}):
                why = f"{about}; {name!r} has a verdict for every two of them (1, 2, 0 for a tie)."
                return Format("verdicts on pairs", "preference", {**fields, "verdicts": name}, why)
            if size == len(replies) and set(column.words) & _SCORES:
                return _by_score("rated replies", fields, name, about)
        for other, scores in _series(seen, ("number", "text")):
            if set(scores) >= set(group) and set(other) & _SCORES:
                return _by_score("rated replies", fields, tuple(scores[key] for key in group), about)
    return None


def _list_of_replies(rows: Sequence[Mapping], seen: Columns, pins: Pins) -> Format | None:
    for name, column in seen.items():
        listed = column.holds in ("objects", "texts", "exchanges", "turns") and isinstance(column.sample, list | tuple)
        if not listed or not column.words or column.words[-1] not in _REPLIES or not (asked := prompt_columns(seen, pins, (name,))):
            continue
        about, key = f"{name!r} holds several replies to {str(asked['prompt'])!r}", ""
        if column.holds != "texts":
            key, score = _item_keys(column.sample[0])
            if key and score:
                return _by_score("rated replies", {**asked, "replies": f"{name}[].{key}"}, f"{name}[].{score}", about)
            if not key:
                continue
        replies = f"{name}[].{key}" if key else name
        for other, beside in seen.items():
            if beside.holds == "numbers" and set(beside.words) & _SCORES and len(beside.sample) == len(column.sample):
                return _by_score("rated replies", {**asked, "replies": replies}, other, about)
            chooses = {*_LABELS, "index"} & set(beside.words) and beside.holds in ("number", "text") and len(column.sample) == 2
            if chooses and _reads_as(distinct(rows, [other]), {"0", "1"}):
                why = f"{about}; {other!r} is the index of the better one."
                return Format("choice", "preference", {**asked, "replies": replies, "choice": other}, why)
    return None


def _item_keys(item: Any) -> tuple[str, str]:
    """The keys of the text and of the score in an item of a list of replies, either of them empty if there is none."""
    values = item.items() if isinstance(item, Mapping) else ()
    texts = [key for key, value in values if isinstance(value, str) and set(words_of(key)) <= _REPLIES | {"content", "value"}]
    numbers = {key: Column(key, words_of(key), "number", 1, 0, value) for key, value in values if number_of(value) is not None}
    return texts[0] if texts else "", find(numbers, "score", ("number",))


def _labels(rows: Sequence[Mapping], seen: Columns, pins: Pins) -> Format | None:
    label = find(seen, "label", ("flag", "number", "text"), pins)
    if not label or not _reads_as(distinct(rows, [label]), GOOD_LABELS | BAD_LABELS):
        return None
    if seen[label].holds == "number" and "label" not in pins and {"score", "rating"} & set(seen[label].words):
        return None
    fields = _prompt_and_reply(rows, seen, pins, label)
    why = f"{label!r} says of each reply whether it is good; a good and a bad one to the same prompt make a pair."
    return Format("unpaired", "preference", {**fields, "label": label}, why, gathers=True) if fields else None


def _rated_rows(rows: Sequence[Mapping], seen: Columns, pins: Pins) -> Format | None:
    score = find(seen, "score", ("number", "text"), pins)
    fields = _prompt_and_reply(rows, seen, pins, score) if score else {}
    if not fields or "messages" in fields or not _reads_as_numbers(distinct(rows, [score])):
        return None
    by_prompt: dict[str, set] = {}
    for row in rows:
        key = json.dumps([row.get(str(fields[field])) for field in ("prompt", "input", "system") if field in fields], default=str)
        by_prompt.setdefault(key, set()).add(number_of(row.get(score)))
    if "score" not in pins and not any(len(scores) > 1 for scores in by_prompt.values()):
        return None
    rated = _by_score("rated rows", fields, score, f"each row is one reply to {str(fields['prompt'])!r}, and prompts come again")
    return Format(rated.name, rated.kind, {**fields, "score": score}, rated.why, gathers=True, coding=rated.coding)


def _prompt_and_reply(rows: Sequence[Mapping], seen: Columns, pins: Pins, label: str) -> Fields:
    reply = find(seen, "completion", SPEECH, pins, (label,))
    if reply and (asked := prompt_columns(seen, pins, (reply, label))):
        return {**asked, "completion": reply}
    messages = find(seen, "messages", ("turns",), pins)
    return {"messages": messages} if messages and not ends_with_user(rows, messages) else {}


def _by_score(name: str, fields: Fields, scores: str | tuple[str, ...], about: str) -> Format:
    one = scores if isinstance(scores, str) else scores[0]
    ranks = bool({"rank", "ranks", "ranking"} & set(words_of(one.rpartition("[].")[2])))
    told = f"{one!r} ranks them, the lowest the best" if ranks else f"{one!r} scores them, the highest the best"
    return Format(name, "preference", {**fields, "scores": scores}, f"{about}; {told}.", coding="ranks" if ranks else "")


def _series(seen: Columns, holds: Sequence[str]) -> Iterator[tuple[tuple[str, ...], dict[str, str]]]:
    """Columns whose names differ in one number or letter, as (the words they share, marker to column)."""
    groups: dict[tuple, dict[str, str]] = {}
    for name, column in seen.items():
        if column.holds in holds:
            for i, word in enumerate(column.words):
                if word.isdigit() or word in ("a", "b", "c", "d", "e", "left", "right", "first", "second"):
                    groups.setdefault((column.words[:i], column.words[i + 1 :]), {})[word] = name
    for (before, after), group in groups.items():
        if len(group) > 1:
            yield before + after, dict(sorted(group.items()))


def _beside(seen: Columns, replies: tuple[str, str], words: set[str], holds: Sequence[str] = ("number", "text")) -> tuple[str, ...]:
    """Two columns that count as the replies do and whose names have one of the words: score_0 and score_1."""
    first, second = (set(words_of(mine)) - set(words_of(other)) for mine, other in (replies, replies[::-1]))
    for base, group in _series(seen, holds):
        if words & set(base):
            pair = [next((name for marker, name in group.items() if marker in side), "") for side in (first, second)]
            numeric = all(
                name and (seen[name].holds != "text" or number_of(seen[name].sample) is not None or "text" in holds[2:]) for name in pair
            )
            if all(pair) and numeric and not set(pair) & set(replies):
                return tuple(pair)
    return ()


def _votes(seen: Columns, pins: Pins, taken: set[str]) -> Iterator[tuple[str, ...]]:
    """Columns that may say which of two replies is better, the likeliest first."""
    if "label" in pins:
        yield (pins["label"],)
        return
    for base, group in _series(seen, ("number", "text")):
        if _ANNOTATORS & set(base) and not taken & set(group.values()) and all(marker.isdigit() for marker in group):
            yield tuple(group.values())
    ranked = []
    for name, column in seen.items():
        if name not in taken and column.holds in ("number", "text", "numbers", "texts"):
            ranked += [(i, len(column.words), name) for i, word in enumerate(_LABELS) if word in column.words][:1]
    for _, _, name in sorted(ranked):
        yield (name,)


def _first_scores_higher(rows: Sequence[Mapping], votes: tuple[str, ...], scores: tuple[str, ...]) -> float | None:
    """Among rows labelled 1 whose scores differ, the share where the first reply has the higher."""
    if not scores or len(votes) != 1:
        return None
    pairs = [[number_of(row.get(name)) for name in scores] for row in rows if number_of(row.get(votes[0])) == 1]
    higher = [first > second for first, second in pairs if first is not None and second is not None and first != second]
    return sum(higher) / len(higher) if higher else None


def _repeat(rows: Sequence[Mapping], prompt: str, sides: tuple[str, str]) -> bool:
    """Whether both sides are texts that begin with the prompt, in nearly all rows."""
    texts = [(row.get(prompt), *(row.get(side) for side in sides)) for row in rows]
    written = [(asked, *replies) for asked, *replies in texts if asked and all(isinstance(text, str) for text in (asked, *replies))]
    return bool(written) and sum(a.startswith(p) and b.startswith(p) for p, a, b in written) > 0.95 * len(written)


def _extras(seen: Columns, pins: Pins) -> Fields:
    found: Fields = {}
    for field in ("chosen_probability", "margin"):
        if column := find(seen, field, ("number", "text"), pins):
            found[field] = column
    pairs = [(ours, theirs) for ours in seen for theirs in seen if _same_but_side(seen[ours], seen[theirs])]
    if pairs and "margin" not in found:
        found["scores"] = pairs[0]
    if tools := find(seen, "tools", ("text", "objects", "texts"), pins):
        found["tools"] = tools
    source = named(seen, "source", "text") if set(seen) <= _CANONICAL else find(seen, "source", ("text",), pins)
    return {**found, "source": source} if source else found


def _same_but_side(ours: Column, theirs: Column) -> bool:
    """Whether two columns are a score of the chosen and of the rejected."""
    if not {"score", "rating", "reward"} & set(ours.words) or ours.holds not in ("number", "text") or number_of(ours.sample) is None:
        return False
    return "chosen" in ours.words and tuple("rejected" if word == "chosen" else word for word in ours.words) == theirs.words


def _reads_as(values: list, known: set[str]) -> bool:
    """Whether nearly all different values are among the known ones."""
    said = [str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip().lower() for value in values]
    return bool(said) and sum(value in known for value in said) * 2 > len(said)


def _reads_as_numbers(values: list) -> bool:
    return bool(values) and sum(number_of(value) is not None for value in values) * 2 > len(values)
