"""The settings of TRL's trainers, read from its source, so that a recipe's are checked where it is declared. Imports no torch."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, create_model

from align.errors import AlignError
from align.records import Kind
from align.settings import BadRows, Lora, Settings

ROWS: dict[str, Kind] = {  # trainer -> what it learns from
    "SFT": "conversation",
    "DPO": "preference",
    "ORPO": "preference",
    "CPO": "preference",
    "KTO": "feedback",
    "RLOO": "prompt",
    "GRPO": "prompt",
    "Distillation": "prompt",
}
BY_REWARD = ("RLOO", "GRPO")  # trainers that sample and are told how good it was
BY_TEACHER = ("Distillation",)  # trainers that learn another model's law
OURS = {"output_dir", "seed", "data_seed", "report_to", "run_name", "project", "logging_dir", "disable_tqdm", "use_cpu", "deepspeed"}
OURS |= {"model_init_kwargs", "trust_remote_code", "resume_from_checkpoint", "ignore_data_skip", "do_train", "do_eval", "do_predict"}
OURS |= {"remove_unused_columns", "label_names", "load_best_model_at_end", "chat_template_path"}
OURS_BEGIN = ("push_to_hub", "hub_", "save_", "fsdp", "eval_", "fp16", "trackio", "log_completions", "tpu_", "ddp_", "local_rank")
OTHER_DEFAULTS = {"gradient_checkpointing": False, "bf16": False, "logging_steps": 1}  # than TRL's, for reasons in align.stages.trl
UNREAD = "as TRL has it"  # a default that is no plain value in its source
LORA_RATE = 10  # TRL's learning rates are for training all weights


class TRLSettings(Settings):
    """A trainer of TRL. Settings of its own have TRL's names; those that are not listed here align decides."""

    model_config = ConfigDict(protected_namespaces=())

    trainer: str = Field("", description="Which of TRL's trainers.")
    lora: Lora = Field(Lora(), description="Of a policy without adapters. Where it has some, they are joined into one that goes on.")
    seed: int = Field(0, ge=0, description="Seed of everything random in the stage. The recipe's seed unless given.")
    max_bad_rows: BadRows = 0.02

    def deciding(self) -> dict:
        """What was set, and the version whose defaults fill the rest."""
        return {**self.model_dump(mode="json", exclude_defaults=True), "seed": self.seed, "trl": version("trl")}

    def given(self) -> dict[str, Any]:
        """TRL's own settings, as its config takes them, but for those whose default could not be read and was not changed."""
        own = {name: getattr(self, name) for name in type(self).model_fields if name not in TRLSettings.model_fields}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in own.items() if value != UNREAD}


@dataclass(frozen=True)
class Setting:
    """A field of one of TRL's dataclasses."""

    name: str
    type: Any
    default: Any
    help: str


@cache
def settings_of(trainer: str) -> type[TRLSettings]:
    """The settings of one of TRL's trainers.

    Raises:
        AlignError: for a trainer that is not bridged or not in the installed TRL.
    """
    if trainer not in ROWS:
        raise AlignError(f"trl: there is no bridge to a trainer {trainer!r}; there are {', '.join(ROWS)}.")
    fields: dict[str, Any] = {}
    for setting in _fields(_config_file(trainer), f"{trainer}Config"):
        if setting.name not in OURS and not setting.name.startswith(OURS_BEGIN):
            default = OTHER_DEFAULTS.get(setting.name, setting.default)
            if setting.name == "learning_rate" and isinstance(default, float):
                default = float(f"{default * LORA_RATE:g}")
            fields[setting.name] = (setting.type, Field(default, description=setting.help))
    return create_model(f"{trainer}Settings", __base__=TRLSettings, __doc__=f"TRL's {trainer} trainer. {TRLSettings.__doc__}", **fields)


def module_of(trainer: str) -> str:
    """The module that has a trainer's config and, beside it, the trainer."""
    return ".".join(["trl", *_config_file(trainer).relative_to(_package("trl")).with_suffix("").parts])


def _config_file(trainer: str) -> Path:
    name = trainer.lower()
    places = [_package("trl") / "trainer" / f"{name}_config.py", _package("trl") / "experimental" / name / f"{name}_config.py"]
    for place in places:
        if place.is_file():
            return place
    raise AlignError(
        f"trl: TRL {version('trl')} has no {trainer} trainer. Install the version that align was tested with: see constraints.txt"
    )


@cache
def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise AlignError(f"trl: the package {name!r} is not installed. Install it: pip install {name}")
    return Path(spec.submodule_search_locations[0])


def _fields(path: Path, name: str) -> Iterator[Setting]:
    """The fields of a dataclass and of those it stands on; a later definition of one takes an earlier one's place."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    node = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    for base in (ast.unparse(base) for base in node.bases):
        if base == "TrainingArguments":
            yield from _fields(_package("transformers") / "training_args.py", base)
        elif base == "_BaseConfig":
            yield from _fields(_package("trl") / "trainer" / "base_config.py", base)
        elif base.endswith("Config"):
            yield from _fields(_package("trl") / "trainer" / f"{base.removesuffix('Config').lower()}_config.py", base)
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and not line.target.id.startswith("_"):
            keywords = {k.arg: k.value for k in line.value.keywords} if isinstance(line.value, ast.Call) else {}
            help = _literal(keywords.get("metadata"), "help")
            default = _value(keywords.get("default", line.value))
            yield Setting(line.target.id, _type(ast.unparse(line.annotation)), default, help)


def _type(annotation: str) -> Any:
    """A plain type as Python has it, with None wherever TRL's default may be that; anything for others."""
    known = {"bool": bool, "int": int, "float": float, "str": str, "None": None}
    parts = [part.strip() for part in annotation.strip("\"'").removeprefix("Optional[").removesuffix("]").split("|")]
    if not all(part in known for part in parts):
        return Any
    found: Any = None
    for part in parts:
        found = known[part] if found is None else found | known[part]
    return found | None


def _value(node: ast.expr | None) -> Any:
    try:
        return ast.literal_eval(node) if node is not None else UNREAD
    except ValueError:
        return UNREAD


def _literal(node: ast.expr | None, key: str) -> str:
    """The text under a key of a dict display, on one line; texts that are joined of constants are joined."""
    if isinstance(node, ast.Dict):
        for name, value in zip(node.keys, node.values, strict=True):
            if isinstance(name, ast.Constant) and name.value == key and isinstance(text := _value(value), str):
                return " ".join(text.replace("%%", "%").split())
    return ""
