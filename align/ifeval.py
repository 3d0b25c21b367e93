"""Instructions that prompts carry and that a program can check, as in IFEval (Zhou et al. 2023, arXiv 2311.07911).

Rows with the columns `instruction_id_list` and `kwargs` of IFEval's own data are checked by its published checkers, which
lm-evaluation-harness ships, in their strict form.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import StringIO
from types import ModuleType
from typing import Any

from align.confidence import wilson_interval
from align.errors import AlignError, did_you_mean
from align.progress import say

IDS, ARGUMENTS = "instruction_id_list", "kwargs"
INSTALL = "pip install 'lm-eval[ifeval]'"


@dataclass(frozen=True)
class Instructions:
    """What a prompt asks for that can be checked. The names are those that the checkers read."""

    prompt: str
    instruction_id_list: list[str]
    kwargs: list[dict[str, Any]]


def instructions_of(row: Mapping[str, Any], prompt: str, where: str) -> Instructions | None:
    """A prompt's instructions; None where its row has none.

    Args:
        row: as it is in its file.
        prompt: what the user says last.
        where: the row's file and line.

    Raises:
        AlignError: where the checkers are not installed, or know no such instruction.
    """
    ids = row.get(IDS)
    if not ids:
        return None
    known = list(_checkers().instructions_registry.INSTRUCTION_DICT)
    for name in ids if isinstance(ids, list) else [ids]:
        if name not in known:
            raise AlignError(f"{where}: {IDS} has {name!r}, which IFEval does not know.{did_you_mean(name, known)}")
    arguments = row.get(ARGUMENTS)
    if not isinstance(arguments, list) or len(arguments) != len(ids) or not all(isinstance(each, dict) for each in arguments):
        raise AlignError(f"{where}: {ARGUMENTS} is {str(arguments)[:80]}; expected a list of {len(ids)} mappings, one for each of {IDS}.")
    return Instructions(prompt, ids, arguments)


@cache
def _checkers() -> ModuleType:
    """The module of the published checkers."""
    if not all(importlib.util.find_spec(name) for name in ("lm_eval", "langdetect", "immutabledict", "nltk")):
        raise AlignError(
            f"the prompts carry instructions to check ({IDS}), and the checkers are not installed: {INSTALL}. "
            "Or evaluate without: check_instructions=false"
        )
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # nltk tells at length that it cannot fetch data, which is told below
        from langdetect import DetectorFactory
        from lm_eval.tasks.ifeval import utils

    DetectorFactory.seed = 0  # else a language is told by chance
    return utils


def followed(texts: Sequence[Sequence[str]], instructions: Sequence[Instructions | None]) -> dict[str, Any] | None:
    """How many answers follow all their instructions, and how many instructions are followed.

    Args:
        texts: the answers to each prompt.
        instructions: of each prompt.

    Returns:
        `answers` that could be checked, those that `followed` all, the share's 95 percent `interval`, and the share of the
        `instructions`; None where no prompt carries any.
    """
    if not any(instructions):
        return None
    checked = [_follows(each, text) for of_prompt, each in zip(texts, instructions, strict=True) if each for text in of_prompt]
    known = [found for found in checked if found is not None]
    single, count = [one for found in known for one in found], sum(all(found) for found in known)
    return {
        "answers": len(known),
        "not_checked": len(checked) - len(known),
        "followed": count,
        "interval": list(wilson_interval(count, len(known))) if known else None,
        "instructions": sum(single) / len(single) if single else None,
    }


def _follows(instructions: Instructions, text: str) -> list[bool] | None:
    """Whether an answer follows each instruction; unknown where a checker lacks its data."""
    try:
        return _checkers().test_instruction_following_strict(instructions, text).follow_instruction_list
    except LookupError as error:  # of nltk, which fetches the data that split sentences
        if "punkt" not in str(error):
            raise
        _say_once()
        return None


@cache
def _say_once() -> None:
    say("  note: some instructions are not checked: python -m nltk.downloader punkt_tab fetches what splits sentences")
