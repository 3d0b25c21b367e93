"""Message trees of OpenAssistant: their best-ranked path, and the ranked replies to one turn as preferences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations

from align.data.rows import Convert, Format, Unfit, list_of, number_of, parsed, text_of
from align.data.turns import ROLES, up_to_last_user


def from_trees(format: Format) -> Convert:
    """A conversation, its prompt, or the preferences among ranked replies, out of each tree."""
    read = {"conversation": _conversation, "prompt": _prompt, "preference": _preferences}[format.kind]
    column = format.column("tree")

    def convert(row: Mapping) -> list[dict]:
        if format.gathers:
            return [record for root in _grown(row["rows"], format) for record in read(root)]
        root = row.get(column) if column else row
        root = parsed(root) if isinstance(root, str) else root
        if not isinstance(root, Mapping):
            raise Unfit(f"{column} is not a message tree", repr(root)[:60])
        return read(root)

    return convert


def _grown(rows: list[Mapping], format: Format) -> list[dict]:
    """The trees of messages that each name their parent."""
    key, parent = format.column("id"), format.column("parent")
    nodes = {str(row.get(key)): {**row, "replies": []} for row in rows}
    roots = []
    for node in nodes.values():
        above = node.get(parent)
        if above is None or above == "":
            roots.append(node)
        elif str(above) in nodes:
            nodes[str(above)]["replies"].append(node)
    if not roots:
        raise Unfit("the tree has no first message")
    return roots


def _conversation(root: Mapping) -> list[dict]:
    path, node = [_turn(root)], root
    while replies := _usable(node):
        node = min(replies, key=lambda reply: _rank(reply, unranked=float("inf")))
        path.append(_turn(node))
    while path and path[-1]["role"] == "user":
        path.pop()
    if not path:
        raise Unfit("the tree has no reply")
    return [{"messages": path}]


def _prompt(root: Mapping) -> list[dict]:
    try:
        return [{"prompt": up_to_last_user(_conversation(root)[0]["messages"])}]
    except Unfit:
        return [{"prompt": [_turn(root)]}]


def _preferences(root: Mapping) -> list[dict]:
    records = []
    for path, replies in _ranked(root, [_turn(root)]):
        for first, second in combinations(replies, 2):
            better, worse = (first, second) if _rank(first) < _rank(second) else (second, first)
            if _rank(better) != _rank(worse):
                records.append({"prompt": list(path), "chosen": [_turn(better)], "rejected": [_turn(worse)]})
    if not records:
        raise Unfit("no pair: the tree has no two ranked replies to one turn")
    return records


def _ranked(node: Mapping, path: list[dict]) -> Iterator[tuple[list[dict], list[Mapping]]]:
    """Each turn of the user's with two ranked replies or more: the path to it, and these."""
    waiting = [(node, path)]
    while waiting:
        node, path = waiting.pop()
        replies = [(reply, _turn(reply)) for reply in _usable(node)]
        ranked = [reply for reply, turn in replies if turn["role"] == "assistant" and number_of(reply.get("rank")) is not None]
        if len(ranked) > 1 and path[-1]["role"] == "user":
            yield path, ranked
        waiting += [(reply, [*path, turn]) for reply, turn in reversed(replies)]


def _usable(node: Mapping) -> list[Mapping]:
    replies = node.get("replies")
    return [reply for reply in list_of(replies, "replies") if isinstance(reply, Mapping) and _kept(reply)] if replies else []


def _kept(reply: Mapping) -> bool:
    """Neither deleted nor failed in review; CSV files write that as text."""
    return str(reply.get("deleted")).lower() != "true" and str(reply.get("review_result")).lower() != "false"


def _rank(reply: Mapping, unranked: float = 0.0) -> float:
    rank = number_of(reply.get("rank"))
    return unranked if rank is None else rank


def _turn(node: Mapping) -> dict:
    role = node.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise Unfit("a message of the tree has an unknown role", repr(role))
    return {"role": ROLES[role], "content": text_of(node.get("text"), "text")}
