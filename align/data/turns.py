"""The turns of any tool's conversations as messages with a role and a content, tool calls and tool schemas included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align.data.rows import Unfit, list_of, parsed, shown
from align.data.transcripts import transcript_turns, without_cue

_USER = ("user", "human", "prompter", "customer", "client", "usr")
_ASSISTANT = ("assistant", "gpt", "chatgpt", "bard", "bing", "model", "bot", "chatbot", "ai", "claude", "llm", "agent")
_TOOL = ("tool", "observation", "function", "function_response", "function-response", "tool_response", "tool_result", "ipython")
_CALL = ("function_call", "function-call", "tool_call", "tool_calls")
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(_USER, "user"),
    **dict.fromkeys(_ASSISTANT, "assistant"),
    **dict.fromkeys(_TOOL, "tool"),
}
ROLE_KEYS = ("role", "from", "speaker", "author", "sender")
CONTENT_KEYS = ("content", "value", "text", "parts", "message", "utterance")
_TEXT_KEYS = ("full_text", "text", "content", "value", "question", "prompt", "parts", "post", "article")


def as_turns(value: Any, role: str, column: str) -> list[dict]:
    """Messages out of what a prompt or a reply may be: a text, a turn, a list of turns, or {"messages": [...]}.

    Args:
        value: as the row has it.
        role: whose a plain text is.
        column: for the reason of an unfit row.
    """
    if type(value) is str:
        if role == "user" and value.startswith("\n\nHuman:"):
            return without_cue(transcript_turns(value, "hh", column))
        return [{"role": role, "content": value}]
    if isinstance(value, list | tuple):
        return read_turns(value, column)
    if isinstance(value, Mapping):
        if "messages" in value:
            return read_turns(value["messages"], column)
        if any(isinstance(value.get(key), str) for key in ROLE_KEYS):
            return read_turns([value], column)
        return [{"role": role, "content": _content(_first(value, _TEXT_KEYS), column)}]
    raise Unfit(f"{column} is missing") if value is None else Unfit(f"{column} is not text", shown(value))


def read_turns(value: Any, column: str) -> list[dict]:
    """Messages out of a list of turns, or of one written as JSON."""
    turns = value if type(value) is list else list_of(value, column)
    messages = []
    for turn in turns:
        if type(turn) is dict and len(turn) == 2:
            role, content = turn.get("role"), turn.get("content")
            if role is None:
                role, content = turn.get("from"), turn.get("value")
            if type(content) is str and type(role) is str and role in ROLES:
                messages.append({"role": ROLES[role], "content": content})
                continue
        messages.append(_message(turn, column))
    return messages


def with_system(turns: list[dict], system: Any, column: str) -> list[dict]:
    """The turns after the text of a system column, unless they open with a system turn of their own."""
    if not system or (turns and turns[0]["role"] == "system"):
        return turns
    text = system if isinstance(system, str) else "".join(turn["content"] for turn in as_turns(system, "system", column))
    return [{"role": "system", "content": text}, *turns] if text else turns


def up_to_last_user(turns: list[dict]) -> list[dict]:
    """The prompt of a conversation: all turns up to the user's last."""
    for end in range(len(turns), 0, -1):
        if turns[end - 1]["role"] == "user":
            return turns[:end]
    raise Unfit("no turn of the user", shown([turn["role"] for turn in turns]))


def exchanges(value: Any, keys: tuple[str, str], column: str) -> list[dict]:
    """Messages out of a list of exchanges: [user, assistant], or dicts with these two keys."""
    messages = []
    for exchange in list_of(value, column):
        if isinstance(exchange, Mapping):
            exchange = [exchange.get(key) for key in keys if key in exchange]
        if not isinstance(exchange, list | tuple) or len(exchange) not in (1, 2):
            raise Unfit(f"{column} has an exchange that is not of two", shown(exchange))
        messages += [turn for said, role in zip(exchange, ("user", "assistant"), strict=False) for turn in as_turns(said, role, column)]
    return messages


def alternating(value: Any, column: str) -> list[dict]:
    """Messages out of a list of texts, where the user speaks first."""
    texts = list_of(value, column)
    for text in texts:
        if not isinstance(text, str):
            raise Unfit(f"{column} is not a list of texts", shown(text))
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def read_tools(value: Any, column: str) -> list[dict]:
    """Tool schemas, each as {"type": "function", "function": {...}}; also out of JSON text. Empty where there are none."""
    if value is None or value == "" or value == []:
        return []
    found = parsed(value) if isinstance(value, str) else value
    tools = []
    for tool in [found] if isinstance(found, Mapping) else list_of(found if found is not None else value, column):
        schema = parsed(tool) if isinstance(tool, str) else tool
        if not isinstance(schema, Mapping):
            raise Unfit(f"{column} holds what is not a tool schema", shown(tool))
        wrapped = isinstance(schema.get("function"), Mapping) or "name" not in schema
        tools.append(dict(schema) if wrapped else {"type": "function", "function": dict(schema)})
    return tools


def _first(turn: Mapping, keys: tuple[str, ...]) -> Any:
    return next((turn[key] for key in keys if turn.get(key) is not None), None)


def _message(turn: Any, column: str) -> dict:
    if not isinstance(turn, Mapping):
        raise Unfit(f"{column} has a turn that is not a message", shown(turn))
    role = _first(turn, ROLE_KEYS)
    if not isinstance(role, str):
        raise Unfit(f"a turn of {column} has no role", shown(dict(turn)))
    role = role.strip().lower()
    content = _first(turn, CONTENT_KEYS)
    if role in _CALL:
        return {"role": "assistant", "content": "", "tool_calls": _calls(content, column)}
    if role not in ROLES:
        raise Unfit(f"a turn of {column} has an unknown role", repr(role))
    role = ROLES[role]
    calls = turn.get("tool_calls") or turn.get("function_call") if role == "assistant" else None
    if calls:
        return {"role": role, "content": "" if content is None else _content(content, column), "tool_calls": _calls(calls, column)}
    message = {"role": role, "content": _content(content, column)}
    if role == "tool" and isinstance(turn.get("name"), str):
        message["name"] = turn["name"]
    return message


def _content(content: Any, column: str) -> str:
    """The text of a turn: as it is, or the joined text parts of one."""
    if isinstance(content, str):
        return content
    if content is None:
        raise Unfit(f"a turn of {column} has no content")
    if not isinstance(content, list | tuple):
        raise Unfit(f"a turn of {column} is not text", shown(content))
    texts = []
    for part in content:
        if isinstance(part, Mapping):
            said = part.get("text") if part.get("type") in (None, "text", "input_text", "output_text") else None
        else:
            said = part
        if not isinstance(said, str):
            raise Unfit(f"a turn of {column} has a part that is not text", shown(part))
        texts.append(said)
    return "".join(texts)


def _calls(value: Any, column: str) -> list[dict]:
    found = parsed(value) if isinstance(value, str) else value
    calls = []
    for call in found if isinstance(found, list | tuple) else [found]:
        call = parsed(call) if isinstance(call, str) else call
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise Unfit(f"a tool call of {column} has no name", shown(value))
        arguments = function.get("arguments", function.get("parameters"))
        arguments = parsed(arguments) if isinstance(arguments, str) and arguments.strip() else arguments or {}
        if not isinstance(arguments, Mapping):
            raise Unfit(f"the arguments of a tool call of {column} are not a JSON object", shown(function.get("arguments")))
        calls.append({"type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}})
    return calls
