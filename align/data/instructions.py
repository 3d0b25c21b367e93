"""Conversations and prompts out of the rows of instruction files, and what a preference file has as its prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from align.data.rows import Convert, Format, Unfit, list_of, shown, text_of
from align.data.transcripts import transcript_turns, without_cue
from align.data.turns import alternating, as_turns, exchanges, read_tools, read_turns, up_to_last_user, with_system

NO_INPUT = ("<noinput>", "nan", "n/a")


def prompt_reader(format: Format) -> Callable[[Mapping], list[dict]]:
    """Reads the messages of a row's prompt from its columns: prompt and what goes with it (input, system, history, passages)."""
    prompt, extra, system = format.column("prompt"), format.column("input"), format.column("system")
    history, passages, coding = format.column("history"), format.column("passages"), format.coding

    def read(row: Mapping) -> list[dict]:
        value = row.get(prompt)
        if extra:
            value = _joined(value, row.get(extra), prompt, extra)
        if passages:
            value = _after_passages(value, row.get(passages), prompt, passages)
        turns = alternating(value, prompt)[:1] if coding == "first of turns" else as_turns(value, "user", prompt)
        if history and (earlier := row.get(history)):
            turns = _earlier(earlier, history) + turns
        return with_system(turns, row.get(system), system) if system else turns

    return read


def from_columns(format: Format) -> Convert:
    """Prompt and completion (alpaca, dolly, question and answer, ...), or the prompt alone."""
    prompt, completion, tools = format.column("prompt"), format.column("completion"), format.column("tools")
    extra, system = format.column("input"), format.column("system")
    others = any(format.column(field) for field in ("history", "passages", "tools")) or format.coding
    prompt_of, prompts_only = prompt_reader(format), format.kind == "prompt"

    def convert(row: Mapping) -> list[dict]:
        question, reply = row.get(prompt), row.get(completion)
        if not others and type(question) is str and type(reply) is str and not prompts_only and not question.startswith("\n\nHuman:"):
            if extra and (more := row.get(extra)):
                question = _joined(question, more, prompt, extra)
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
            return [{"messages": with_system(turns, row.get(system), system) if system else turns}]
        turns = prompt_of(row)
        record: dict[str, Any] = {"prompt": turns} if prompts_only else {"messages": turns + as_turns(reply, "assistant", completion)}
        if prompts_only and turns and turns[-1]["role"] != "user":
            record = {"prompt": up_to_last_user(turns)}
        return [_with_tools(record, row, tools)]

    return convert


def from_messages(format: Format) -> Convert:
    """Lists of turns: OpenAI's messages, ShareGPT's conversations, and their relatives."""
    messages, system, tools = format.column("messages"), format.column("system"), format.column("tools")
    prompts_only, keys = format.kind == "prompt", format.several("exchange")

    def convert(row: Mapping) -> list[dict]:
        value = row.get(messages)
        if format.name == "exchanges":
            turns = exchanges(value, keys or ("", ""), messages)  # type: ignore[arg-type]
        elif format.name == "alternating":
            turns = alternating(value, messages)
        else:
            turns = as_turns(value, "user", messages) if isinstance(value, Mapping) else read_turns(value, messages)
        if system:
            turns = with_system(turns, row.get(system), system)
        record = {"prompt": up_to_last_user(turns)} if prompts_only else {"messages": turns}
        return [_with_tools(record, row, tools) if tools else record]

    return convert


def from_seeds(format: Format) -> Convert:
    """An instruction with nested instances of input and output: a record each (Self-Instruct, Wang et al. 2023)."""
    prompt = format.column("prompt")
    (instances, _, input_key), (_, _, output_key) = (format.column(field).partition("[].") for field in ("input", "completion"))

    def convert(row: Mapping) -> list[dict]:
        records: list[dict] = []
        for instance in list_of(row.get(instances), instances):
            if not isinstance(instance, Mapping):
                raise Unfit(f"{instances} holds what is not an instance", shown(instance))
            asked = as_turns(_joined(row.get(prompt), instance.get(input_key), prompt, input_key), "user", prompt)
            if format.kind == "prompt":
                records.append({"prompt": asked})
            else:
                records.append({"messages": asked + as_turns(instance.get(output_key), "assistant", output_key)})
        return records

    return convert


def from_text(format: Format) -> Convert:
    """Plain text, or transcripts with their turns marked in it; for prompts, one a row."""
    column, style, prompts_only = format.column("text"), format.coding, format.kind == "prompt"

    def convert(row: Mapping) -> list[dict]:
        text = text_of(row.get(column), column)
        if style:
            turns = transcript_turns(text, style, column)
            return [{"prompt": up_to_last_user(without_cue(turns))} if prompts_only else {"messages": turns}]
        return [{"prompt": [{"role": "user", "content": text}]} if prompts_only else {"text": text}]

    return convert


def _earlier(value: Any, column: str) -> list[dict]:
    """What was said before the prompt: a list of [user, assistant], or of messages."""
    turns = list_of(value, column)
    return read_turns(turns, column) if turns and isinstance(turns[0], Mapping) else exchanges(turns, ("", ""), column)


def _with_tools(record: dict, row: Mapping, column: str) -> dict:
    if column and (tools := read_tools(row.get(column), column)):
        record["tools"] = tools
    return record


def _joined(instruction: Any, extra: Any, prompt: str, column: str) -> Any:
    """An instruction and its input as one text with an empty line between, as most instruction templates have them."""
    if extra is None or extra == "":
        return instruction
    if not isinstance(extra, str):
        raise Unfit(f"{column} is not text", shown(extra))
    if not extra.strip() or extra.strip().lower() in NO_INPUT:
        return instruction
    instruction = text_of(instruction, prompt)
    return f"{instruction}\n\n{extra}" if instruction else extra


def _after_passages(question: Any, passages: Any, prompt: str, column: str) -> str:
    """The question after what it is about: passages of a title and sentences, or plain ones."""
    texts = []
    for passage in list_of(passages, column) if passages else []:
        title, *sentences = passage if isinstance(passage, list | tuple) and passage else [passage]
        lines = [text_of(title, column), " ".join(text_of(sentence, column) for sentence in sentences)]
        texts.append("\n".join(line for line in lines if line))
    return "\n\n".join([*texts, text_of(question, prompt)])
