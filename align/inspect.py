"""`align inspect`: what a source was understood as, what would be trained on, and what would not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import markup
from rich.table import Table
from rich.text import Text

from align.data.convert import Converted, convert_source
from align.data.mix import Data
from align.data.sources import Source, as_sources
from align.errors import AlignError
from align.progress import console, printable
from align.records import Kind

if TYPE_CHECKING:
    from align.chat import Chat
    from align.data.tokenise import Examples
    from align.model.packing import Example
    from align.settings import Training

STAGE_KINDS: dict[str, Kind] = {"sft": "conversation", "reward": "preference", "dpo": "preference", "ppo": "prompt", "evaluate": "prompt"}
BARS = " ▁▂▃▄▅▆▇█"
BINS = 32


@dataclass(frozen=True)
class Wanted:
    """What the command line asked for."""

    source: Source
    kind: Kind | None = None
    stage: str | None = None
    base: str = "embedded"
    max_length: int = 1024
    on_overlong: str = "drop"
    train_on: str = "all"
    examples: int = 2
    against: Sequence[str] = ()
    near: float | None = None
    out: Path | None = None
    as_json: bool = False


def inspect(wanted: Wanted) -> None:
    """Print what a source holds, and write its records where that is asked for.

    Raises:
        AlignError: where the source cannot be read or its format is not known.
    """
    kind = wanted.kind or (STAGE_KINDS[wanted.stage] if wanted.stage else None)
    if wanted.stage and kind != STAGE_KINDS[wanted.stage]:
        raise AlignError(f"--kind {kind}: the stage {wanted.stage} takes {STAGE_KINDS[wanted.stage]}s. Leave one of the two out.")
    if wanted.examples < 0:
        raise AlignError(f"--examples {wanted.examples}: expected 0 or more.")
    if wanted.near is not None and not 0 < wanted.near <= 1:
        raise AlignError(f"--near-duplicates {wanted.near}: expected a share over 0 and at most 1, such as 0.8.")
    converted = convert_source(wanted.source, kind, "align inspect")
    data = Data(converted.report["kind"], (wanted.source,), (converted,))
    found: dict[str, Any] = {"source": wanted.source.path, **_public(converted)}
    if wanted.near is not None:
        from align.data.near import near_duplicates

        found["near_duplicates"] = near_duplicates(data, wanted.near)
    for path in wanted.against:
        found.setdefault("shared_prompts", {})[path] = _shared(data, path)
    rendered, trouble = None, ""
    if len(data):
        chat, settings = _chat(wanted.base), _settings(wanted, data.kind)
        try:
            rendered = _rendered(wanted, data, chat, settings)
        except AlignError as error:  # what a stage would stop with; what was found is shown all the same
            trouble = str(error)
    found["tokens"] = rendered.facts if rendered else {"stops": trouble}
    if wanted.out is not None:
        _write(wanted.out, data)
    if wanted.as_json:
        print(json.dumps(found, ensure_ascii=False, indent=1))
        return
    _show(found, converted)
    if rendered is not None:
        _show_tokens(rendered, wanted)
    elif trouble:
        console.print(f"\n[yellow]a stage would stop:[/] {escape(trouble)}")
    if wanted.out is not None:
        console.print(f"{len(data):,} records written to {escape(str(wanted.out))}")


def _public(converted: Converted) -> dict[str, Any]:
    """The report with places as file:line."""
    report = dict(converted.report)
    files = report["files"]
    report["places"] = {
        reason: [{"where": f"{files[file]['path']}:{line}", "detail": detail} for file, line, detail in places]
        for reason, places in report["places"].items()
    }
    return report


def _shared(data: Data, path: str) -> int:
    """How many records have a prompt that the other file has too."""
    import numpy as np

    (source,) = as_sources(path, "--against")
    other = convert_source(source, "prompt", "--against")
    prompts = other.column("prompt")[np.asarray(other.table["reason"].is_null())]
    return int(np.isin(data.column("prompt"), prompts).sum())


def _write(out: Path, data: Data) -> None:
    from align.records import write_jsonl

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(out, data.records())
    except OSError as error:
        raise AlignError(f"--out {out}: cannot be written ({error.strerror}). Give another file.") from None


# In tokens ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rendered:
    """What a base's tokenizer and template make of the records."""

    chat: Chat
    base: str
    examples: Examples | None  # none for prompts
    shown: list[Example]
    lengths: list[int]  # tokens of every example: its prompt and its longest completion
    facts: dict[str, Any]


def _chat(source: str) -> Chat:
    from align.base import find_base, loading_explained, local_model
    from align.chat import Chat

    base = find_base(source)
    location = local_model(base)
    with loading_explained(base.source):
        return Chat.load(location, base.revision if location == base.location else None)


def _settings(wanted: Wanted, kind: Kind) -> Training:
    from align.overrides import build
    from align.settings import DPOSettings, RewardSettings, SFTSettings

    settings: type[Training] = SFTSettings if kind == "conversation" else DPOSettings if wanted.stage == "dpo" else RewardSettings
    given: dict[str, Any] = {"max_length": wanted.max_length, "on_overlong": wanted.on_overlong, "max_bad_rows": 1.0}
    given |= {"train_on": wanted.train_on} if kind == "conversation" else {}
    return build(settings, given, "align inspect")


def _rendered(wanted: Wanted, data: Data, chat: Chat, settings: Training) -> Rendered:
    if data.kind == "prompt":
        return _rendered_prompts(wanted, data, chat)
    import numpy as np

    from align.data.tokenise import prepare

    stage = wanted.stage or ("sft" if data.kind == "conversation" else "reward")
    examples = prepare(stage, "data" if stage == "sft" else "preferences", data, chat, settings)
    lengths = _lengths(examples)
    facts = {**examples.facts, "base": wanted.base, "max_length": wanted.max_length, **_spread(np.array(lengths))}
    return Rendered(chat, wanted.base, examples, list(examples.training[: wanted.examples]), lengths, facts)


def _rendered_prompts(wanted: Wanted, data: Data, chat: Chat) -> Rendered:
    import numpy as np

    from align.data.tokenise import prompt_ids
    from align.model.packing import Example

    ids = [prompt for _, prompt in prompt_ids(wanted.stage or "ppo", data, chat, 1.0)]
    lengths = [len(prompt) for prompt in ids]
    shown = [Example(i, prompt, ()) for i, prompt in enumerate(ids[: wanted.examples])]
    unfit = {"the chat template cannot render it": len(data) - len(ids)} if len(ids) < len(data) else {}
    facts = {"prompts": len(ids), "unfit": unfit, "base": wanted.base, **_spread(np.array(lengths))}
    return Rendered(chat, wanted.base, None, shown, lengths, facts)


def _lengths(examples: Examples) -> list[int]:
    return [example.longest for example in [*examples.training, *examples.heldout]]


def _spread(lengths: Any) -> dict[str, int]:
    import numpy as np

    low, middle, high, top = np.percentile(lengths, [0, 50, 95, 100])
    return {"shortest": int(low), "median": int(middle), "p95": int(high), "longest": int(top)}


# In the terminal ------------------------------------------------------------------------------------------------------


def _show(found: dict[str, Any], converted: Converted) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("[bold]source[/]", escape(found["source"]) + (f" ({len(found['files'])} files)" if len(found["files"]) > 1 else ""))
    table.add_row("[bold]format[/]", f"[green]{escape(found['format'])}[/]: {escape(found['why'].rstrip('.'))}")
    for ours, theirs in found["columns"].items():
        table.add_row("", f"{ours} <- {escape(theirs if isinstance(theirs, str) else ', '.join(theirs))}")
    left_out = found["rows"] - found["kept"]
    records = "" if found["records"] == found["kept"] else f", which give {found['records']:,} {found['kind']}s"
    table.add_row("[bold]rows[/]", f"{found['rows']:,}: {found['kept']:,} kept{records}, {left_out:,} left out")
    if sizes := found["characters"]:
        table.add_row("[bold]characters[/]", f"{sizes['sum']:,}; of one {sizes['min']:,} to {sizes['max']:,}, median {sizes['median']:,}")
    if pairs := found.get("pairs"):
        table.add_row("[bold]pairs[/]", escape(_pairs_text(pairs)))
    if near := found.get("near_duplicates"):
        text = f"{near['records']:,} records alike to {near['threshold']:.0%} to one of {near['groups']:,} earlier ones"
        table.add_row("[bold]near duplicates[/]", text)
    for path, count in found.get("shared_prompts", {}).items():
        table.add_row("[bold]overlap[/]", f"{count:,} records have a prompt of {escape(path)}")
    console.print(table)
    if found["rejected"]:
        problems = Table("left out", "reason", "where")
        for reason, count in found["rejected"].items():
            places = found["places"].get(reason, [])
            where = _short([place["where"] for place in places[:4]]) + (", ..." if count > 4 else "")
            detail = next((place["detail"] for place in places if place["detail"]), "")
            detail = f"\n[dim]{escape(detail[:100])}[/]" if detail else ""
            problems.add_row(f"{count:,}", f"[yellow]{escape(reason)}[/]{detail}", escape(where))
        console.print(problems)


def _short(places: list[str]) -> str:
    """Places as `file:3, 7, other:1`."""
    shown: list[str] = []
    before = ""
    for place in places:
        file, _, line = place.rpartition("/")[2].rpartition(":")
        shown.append(line if file == before else f"{file}:{line}")
        before = file
    return ", ".join(shown)


def _pairs_text(pairs: dict[str, Any]) -> str:
    share = pairs["longer_is_better"]
    parts = ["no pair differs in length" if share is None else f"the longer side is better in {share:.0%} of those that differ in length"]
    words = {"ties": "tied", "soft": "with an unsure label", "margins": "with a margin", "labelled_both_ways": "labelled both ways"}
    return "; ".join(parts + [f"{pairs[name]:,} {text}" for name, text in words.items() if pairs[name]])


def _show_tokens(rendered: Rendered, wanted: Wanted) -> None:
    facts = rendered.facts
    ends = f"{facts['shortest']:,} to {facts['longest']:,}, median {facts['median']:,}, p95 {facts['p95']:,}"
    console.print(f"\n[bold]tokens[/] of one, with {escape(rendered.base)}: {ends}")
    console.print("  " + histogram(rendered.lengths))
    if rendered.examples is not None:
        console.print(
            f"  {facts['training']:,} examples would be trained on ({facts['tokens']:,} tokens), {facts['heldout']:,} held out, "
            f"{facts['overlong']:,} over {wanted.max_length:,} tokens ({wanted.on_overlong}), {facts['cut']:,} shortened"
        )
        for reason, count in facts["unfit"].items():
            console.print(f"  [yellow]{count:,} cannot be used with this base: {escape(reason)}[/]")
    marks = "[green]trained tokens are green[/]" if console.is_terminal else "trained tokens are in ⟦ ⟧"
    for example in rendered.shown:
        console.print(f"\n[dim]example {example.index}; {marks}[/]" if rendered.examples else f"\n[dim]prompt {example.index}[/]")
        for text in shown(rendered.chat, example):
            console.print(text)


def escape(text: str) -> str:
    """Text of the data in the middle of markup: shown literally, and obeyed by nothing."""
    return markup.escape(printable(text))


def histogram(lengths: Sequence[int]) -> str:
    """Counts by length as a row of bars, with its ends written out."""
    import numpy as np

    counts, _ = np.histogram(lengths, bins=min(BINS, max(1, len(set(lengths)))))
    heights = np.ceil(counts / counts.max() * (len(BARS) - 1)).astype(int)
    return f"{min(lengths):,} {''.join(BARS[h] for h in heights)} {max(lengths):,}"


def shown(chat: Chat, example: Example) -> list[Text]:
    """The example's prompt and completions with special tokens visible and trained tokens marked."""
    parts = [Text(printable(chat.tokenizer.decode(list(example.prompt))))]
    for number, ids in enumerate(example.completions):
        trained = example.trained[number] if example.trained else (True,) * len(ids)
        text = Text(f"{('chosen', 'rejected')[number]}: ", style="bold") if len(example.completions) == 2 else Text()
        start = 0
        for at in range(1, len(ids) + 1):
            if at == len(ids) or trained[at] != trained[start]:
                piece = printable(chat.tokenizer.decode(list(ids[start:at])))
                if not trained[start]:
                    text.append(piece, style="dim")
                else:
                    text.append(piece if console.is_terminal else f"⟦{piece}⟧", style="green")
                start = at
        parts.append(text)
    return parts


def columns_of(text: str | None) -> dict[str, str] | None:
    """`prompt=question,completion=reply` as a mapping."""
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(ours.strip() and equals and theirs.strip() for ours, equals, theirs in pairs):
        raise AlignError(f"--columns {text!r}: expected our=theirs, separated by commas, such as prompt=question,completion=reply")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}
