"""Prompts as text files: a header, then turns with named fields. Imports no torch.

    kind: pair
    first: A
    second: B
    reply: verdict
    ---
    [user]
    Which completion is better? $prompt $first $second

`$name` or `${name}` is a field, `$$` a dollar sign. What fills a field is never read again: a dollar sign in it is just that.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, Literal, get_args

from align.errors import AlignError
from align.files import shipped_file
from align.records import Message

Kind = Literal["pair", "score", "critique", "revision"]
ROLES = ("system", "user", "assistant")
# The header keys of each kind, and those of them that it cannot do without.
KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "pair": (("first", "second", "tie", "reply", "verdict"), ("first", "second", "reply")),
    "score": (("lowest", "highest", "reply", "verdict"), ("lowest", "highest", "reply")),
    "critique": ((), ()),
    "revision": ((), ()),
}


@dataclass(frozen=True)
class Section:
    """One turn of a template, and the line of the file where its text begins."""

    role: Literal["system", "user", "assistant"]
    text: str
    line: int


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt with named fields.

    A judge's template says how it is answered. A pair has two answer words, `first` and `second`, and may have a `tie`; a score has
    its `lowest` and `highest` whole number. Where `reasons` is true the judge writes first, and its answer follows the last `verdict`
    (such as 'Verdict:'); else the answer is the reply.
    """

    path: str
    kind: Kind
    sections: tuple[Section, ...]
    fields: frozenset[str]
    fingerprint: str
    first: str = ""
    second: str = ""
    tie: str | None = None
    lowest: int = 0
    highest: int = 0
    reasons: bool = False
    verdict: str | None = None

    @classmethod
    def load(cls, path: str | Path) -> PromptTemplate:
        """Read a template: the path as it is, else the file that ships with align under that name.

        Raises:
            AlignError: where there is no such file or it is no template, with the line.
        """
        return cls.parse(read_prompt_file(path, "prompt template"), str(path))

    @classmethod
    def parse(cls, text: str, path: str) -> PromptTemplate:
        """The template in a file's text. `path` is what errors call it."""
        lines = text.splitlines()
        end = next((i for i, line in enumerate(lines) if line.strip() == "---"), None)
        if end is None:
            raise AlignError(
                f"{path}: has no line '---'; expected a header of 'key: value' lines, a line '---', and the turns. See prompts/README.md."
            )
        sections = _sections(lines, end + 1, path)
        fields = frozenset(field for section in sections for field in _fields(section, path))
        fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        return cls(path=path, sections=sections, fields=fields, fingerprint=fingerprint, **_header(lines[:end], path))

    @property
    def answers(self) -> dict[Literal["first", "second", "tie"], str]:
        """The answer words of a pair."""
        words: dict[Literal["first", "second", "tie"], str] = {"first": self.first, "second": self.second}
        return words | ({"tie": self.tie} if self.tie else {})

    @property
    def answer_words(self) -> list[str]:
        """Every answer, as the judge writes it."""
        return list(self.answers.values()) if self.kind == "pair" else [str(n) for n in range(self.lowest, self.highest + 1)]

    def check(self, filled: Iterable[str], optional: Iterable[str] = ()) -> None:
        """Hold the template's fields against those that will be filled.

        Raises:
            AlignError: where it uses one that nobody fills, or leaves one unused that is not optional.
        """
        given = set(filled)
        known = "Filled: " + ", ".join(f"${name}" for name in sorted(given)) + "."
        for section in self.sections:
            for name, line in _fields(section, self.path).items():
                if name not in given:
                    raise AlignError(f"{self.path}:{line}: uses ${name}, which nobody fills. {known}")
        if unused := sorted(given - self.fields - set(optional)):
            raise AlignError(
                f"{self.path}:{self.sections[-1].line}: does not use ${unused[0]}, which would be lost. {known}\n"
                f"  Write ${unused[0]} where the judge should read it, or take another template."
            )

    def expect(self, *kinds: Kind) -> PromptTemplate:
        """This template, if it is of one of these kinds.

        Raises:
            AlignError: where it is another.
        """
        if self.kind not in kinds:
            raise AlignError(f"{self.path}:1: is a template of kind {self.kind!r}; expected {' or '.join(map(repr, kinds))}.")
        return self

    def fill(self, optional: Iterable[str] = (), **fields: str) -> list[Message]:
        """The messages, with every field filled.

        Args:
            optional: fields that the template may leave unused.
            **fields: the text of each field.

        Raises:
            AlignError: as `check` does.
        """
        self.check(fields, optional)
        return [Message(role=section.role, content=Template(section.text).substitute(fields)) for section in self.sections]


def read_prompt_file(path: str | Path, what: str) -> str:
    """The text of a file of the user's, or of the one that ships with align under that name.

    Raises:
        AlignError: where there is none, or it is no text.
    """
    found = next((p for p in (Path(path).expanduser(), shipped_file(str(path))) if p.is_file()), None)
    if found is None:
        shipped = sorted(f"prompts/{p.name}" for p in shipped_file("prompts").glob("*.txt"))
        raise AlignError(f"{what} {str(path)!r}: there is no such file, nor one that ships with align: {', '.join(shipped)}.")
    try:
        return found.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise AlignError(f"{what} {str(path)!r}: cannot be read ({error}); expected a text file in UTF-8.") from None


def read_principles(path: str | Path) -> list[str]:
    """The principles of a file, one a line; empty lines and those that begin with '#' are left out.

    Raises:
        AlignError: where there is no such file, or no principle in it.
    """
    lines = [line.strip() for line in read_prompt_file(path, "constitution").splitlines()]
    principles = [line for line in lines if line and not line.startswith("#")]
    if not principles:
        raise AlignError(f"{path}: has no principle; expected one a line, such as 'Prefer the reply that answers what was asked.'")
    return principles


def as_text(messages: Sequence[Message]) -> str:
    """A conversation as the text of one field.

    One turn without calls of tools is its text. Of several, each has a heading, and its lines are indented, so that nothing in a
    turn can pass for a heading.
    """
    if len(messages) == 1 and messages[0]["role"] in ("user", "assistant") and not messages[0].get("tool_calls"):
        return messages[0]["content"]
    turns = []
    for message in messages:
        body = message["content"]
        if calls := message.get("tool_calls"):
            body = "\n".join([*([body] if body else []), *(json.dumps(call, ensure_ascii=False) for call in calls)])
        turns.append(f"{message['role'].capitalize()}:\n" + "\n".join(f"  {line}" for line in body.split("\n")))
    return "\n".join(turns)


def _header(lines: list[str], path: str) -> dict[str, Any]:
    """The header's values, checked."""
    found: dict[str, str] = {}
    places: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, colon, value = (part.strip() for part in line.partition(":"))
        if not colon or not value:
            raise AlignError(f"{path}:{number}: {line.strip()!r} is no header line; expected 'key: value', and '---' before the turns.")
        if key in found:
            raise AlignError(f"{path}:{number}: gives {key!r} again; it is in line {places[key]} already.")
        found[key], places[key] = value, number
    kind = found.pop("kind", None)
    if kind not in KEYS:
        raise AlignError(f"{path}:{places.get('kind', 1)}: kind is {kind!r}; expected one of: {', '.join(get_args(Kind))}.")
    allowed, needed = KEYS[kind]
    for key in found:
        if key not in allowed:
            raise AlignError(
                f"{path}:{places[key]}: {key!r} is no header key of kind {kind!r}. There are: {', '.join(('kind', *allowed))}."
            )
    if missing := [key for key in needed if key not in found]:
        raise AlignError(f"{path}:1: has no {missing[0]!r} in its header; kind {kind!r} needs {', '.join(needed)}.")
    return {"kind": kind, **_checked(found, places, kind, path)}


def _checked(found: Mapping[str, str], places: Mapping[str, int], kind: str, path: str) -> dict[str, Any]:
    """The answers and the form of the reply."""
    values: dict[str, Any] = {key: found[key] for key in ("first", "second", "tie", "verdict") if key in found}
    if kind in ("pair", "score"):
        if found["reply"] not in ("verdict", "reasoning"):
            raise AlignError(f"{path}:{places['reply']}: reply is {found['reply']!r}; expected 'verdict' or 'reasoning'.")
        values["reasons"] = found["reply"] == "reasoning"
        if values["reasons"] != ("verdict" in found):
            where = places.get("verdict", places["reply"])
            raise AlignError(
                f"{path}:{where}: 'reply: reasoning' and the words before the answer (such as 'verdict: Verdict:') go together."
            )
    words = [values[key].casefold() for key in ("first", "second", "tie") if key in values]
    if len(set(words)) < len(words):
        raise AlignError(f"{path}:{places['second']}: the answers are {', '.join(map(repr, words))}; expected different words.")
    for key in ("lowest", "highest"):
        if key in found:
            if not re.fullmatch(r"\d{1,3}", found[key]):
                raise AlignError(f"{path}:{places[key]}: {key} is {found[key]!r}; expected a whole number from 0 to 999.")
            values[key] = int(found[key])
    if kind == "score" and not values["lowest"] < values["highest"]:
        raise AlignError(f"{path}:{places['highest']}: highest is {values['highest']}; expected more than {values['lowest']}.")
    return values


def _sections(lines: list[str], start: int, path: str) -> tuple[Section, ...]:
    """The turns below the header: a system turn or none, then user and assistant by turns, ending with the user's."""
    marks = [
        (i, line.strip()[1:-1]) for i, line in enumerate(lines) if i >= start and re.fullmatch(r"\[(system|user|assistant)\]", line.strip())
    ]
    first = marks[0][0] if marks else len(lines)
    if stray := next((i for i in range(start, first) if lines[i].strip()), None):
        raise AlignError(f"{path}:{stray + 1}: {lines[stray].strip()!r} stands before the first turn; expected [system] or [user] there.")
    sections = []
    stops = [at for at, _ in marks[1:]] + [len(lines)]
    for (at, role), stop in zip(marks, stops, strict=False):
        text = "\n".join(lines[at + 1 : stop])
        if not text.strip():
            raise AlignError(f"{path}:{at + 1}: the turn [{role}] is empty; expected its text below it.")
        blank = len(text) - len(text.lstrip("\n"))
        sections.append(Section(role, text.strip("\n").rstrip(), at + 2 + blank))  # type: ignore[arg-type]
    turns = [section.role for section in sections if section.role != "system"]
    expected = ["user", "assistant"] * (len(turns) // 2) + ["user"]
    if turns != expected or any(section.role == "system" for section in sections[1:]):
        shown = " ".join(f"[{section.role}]" for section in sections) or "none"
        raise AlignError(
            f"{path}:{start + 1}: the turns are {shown}; expected a [system] or none, then a [user], or examples ([user] [assistant]) and "
            "a [user]."
        )
    return tuple(sections)


def _fields(section: Section, path: str) -> dict[str, int]:
    """The fields a turn uses, each with the line where it is first."""
    fields: dict[str, int] = {}
    for match in Template.pattern.finditer(section.text):
        line = section.line + section.text.count("\n", 0, match.start())
        if match["invalid"] is not None:
            raise AlignError(f"{path}:{line}: a '$' that begins no field; expected $name, or $$ for a dollar sign.")
        if name := match["named"] or match["braced"]:
            fields.setdefault(name, line)
    return fields
