"""Conversations written out as one text: where the turns begin and whose they are."""

from __future__ import annotations

import re
from collections.abc import Iterable

from align.data.rows import Unfit, shown

# One group that says whose turn begins; what stands before the first is the system's.
_STYLES = {
    "hh": re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):"),
    "guanaco": re.compile(r"\s*### ?(System|Human|User|Assistant|Bot|AI):"),
    "alpaca": re.compile(r"(?:\A\s*|\n\s*)### ?(Instruction|Input|Response):"),
    "chatml": re.compile(r"<\|im_start\|>(\w+)\n"),
    "llama3": re.compile(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n\n"),
    "zephyr": re.compile(r"<\|(system|user|prompter|assistant)\|>"),
    "inst": re.compile(r"\[(/?INST)\]"),
    "colon": re.compile(r"(?:\A\s*|\n\s*)(USER|User|Human|ASSISTANT|Assistant|AI|Bot|SYSTEM|System):"),
}
_ROLES = {
    **dict.fromkeys(("human", "user", "prompter", "instruction", "input", "inst"), "user"),
    **dict.fromkeys(("assistant", "bot", "ai", "response", "/inst", "model", "gpt"), "assistant"),
    "system": "system",
}
_EDGE = r"(?:<s>|</s>|<\|im_end\|>|<\|eot_id\|>|<\|end_of_text\|>|<\|begin_of_text\|>|<\|endoftext\|>|<\|end\|>|\s)+"
_EDGES = re.compile(rf"\A{_EDGE}|{_EDGE}\Z")
_LLAMA_SYSTEM = re.compile(r"\A\s*<<SYS>>(.*?)<</SYS>>", re.DOTALL)


def style_of(texts: Iterable[str]) -> str:
    """The style that most of the texts are written in, with turns of both sides; empty if they are plain text."""
    sample = [text for text in texts if text][:100]
    for style, pattern in _STYLES.items():
        markers = [{_ROLES.get(marker.lower()) for marker in pattern.findall(text)} for text in sample]
        if sum({"user", "assistant"} <= found for found in markers) * 2 > len(sample):
            return style
    return ""


def transcript_turns(text: str, style: str, column: str) -> list[dict]:
    """The turns of a transcript, stripped; what comes before the first is the system's."""
    before, *rest = _STYLES[style].split(text)
    turns = []
    if preamble := _EDGES.sub("", before):
        turns.append({"role": "system", "content": preamble})
    for marker, said in zip(rest[::2], rest[1::2], strict=True):
        role = _ROLES.get(marker.lower())
        if role is None:
            raise Unfit(f"a turn of {column} has an unknown role", repr(marker))
        if style == "inst" and (system := _LLAMA_SYSTEM.match(said)):
            turns.append({"role": "system", "content": system[1].strip()})
            said = said[system.end() :]
        content = said.strip() if style == "hh" else _EDGES.sub("", said)
        if marker == "Input" and turns and turns[-1]["role"] == "user":
            turns[-1]["content"] += f"\n\n{content}"
        else:
            turns.append({"role": role, "content": content})
    if not rest:
        raise Unfit(f"{column} has no turns", shown(text))
    return turns


def without_cue(turns: list[dict]) -> list[dict]:
    """A prompt's turns without the empty one that only cues the assistant to speak."""
    return turns[:-1] if turns and turns[-1]["role"] == "assistant" and not turns[-1]["content"] else turns
