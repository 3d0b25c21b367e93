"""One of TRL's own trainers on our artifacts. What is to be known of TRL is in this file and in align.trl_settings.

- The policy's adapters are joined into one, exactly; TRL trains that one on, and the result takes the stack's place. TRL keeps a
  frozen copy of it as the reference, so the reference is the policy that training starts from.
- Weights stay in the base's type and adapters in float32, without autocast and without activations computed twice: TRL's own
  defaults are float32 weights under autocast, and checkpointing. Learning rates are ten times TRL's, whose fit training all weights.
- Padding gets a token that is not the end of a turn. The end of a turn is the chat template's, where the tokenizer has another.
- Rows that TRL would cut without a word are left out, and counted. SFT learns the last turn only.
- Nothing is reported, pushed or saved by TRL; a stage that was stopped begins anew.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils import logging

import datasets
from align.chat import Chat
from align.data.mix import Data
from align.data.originals import original_rows
from align.data.tokenise import bars_of_datasets
from align.errors import AlignError
from align.learn.prompts import PromptRow
from align.learn.scores import FunctionReward
from align.model.compose import compose
from align.model.gated import keep_products
from align.model.load import ADAPTER, adapter_folders, load_role, open_trunk, own_model
from align.model.trunk import Trunk, peft_config, save_adapter
from align.progress import Meter, say
from align.run import Job, Result
from align.settings import Lora
from align.trl_settings import BY_REWARD, BY_TEACHER, ROWS, TRLSettings, module_of

ROW = "align_row"  # the column with a prompt's place, by which a reward finds its row
PROBE = 16  # tokens on which the joined adapter is held against the stack


def run(job: Job) -> Result:
    """Hand model, rows and settings to the trainer, and keep the adapter that it leaves."""
    settings: TRLSettings = job.settings
    trunk, chat = open_trunk(job.base, job.parents["policy"], job.dtype)
    facts = own_model(trunk, chat, "composed" if adapter_folders(job.parents["policy"]) else "adapter")
    model, change = _trained_model(job, trunk, settings.lora)
    data = next(iter(job.data.values()))
    rows, left_out = _rows(job, data, chat)
    more: dict[str, Any] = {"reward_funcs": _rewards(job, data)} if settings.trainer in BY_REWARD else {}
    more |= {"teacher_model": _teacher(job)} if settings.trainer in BY_TEACHER else {}
    with _quiet(), bars_of_datasets(False):
        with _explained(job.name, f"TRL's {settings.trainer} trainer refuses this"):
            trainer = _make_trainer(job, model, _tokenizer(chat), rows, **more)
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        meter = job.meter("loss", "reward", "kl", unit="steps")
        trainer.add_callback(_Report(meter))
        try:
            with _explained(job.name, f"TRL's {settings.trainer} trainer stopped in training"):
                trainer.train()
        finally:
            meter.close()
    _check_finite(job.name, trainer.model)
    save_adapter(trainer.model, "default", job.work / ADAPTER)  # without the reference's copy that some trainers add
    metrics = {name: value for line in trainer.state.log_history for name, value in line.items() if isinstance(value, int | float)}
    used = {"used": len(rows), "over_max_length": left_out}
    return Result("policy", facts, metrics, {"change_at_start": change}, {next(iter(job.data)): used})


# The model -------------------------------------------------------------------------------------------------------------------


def _trained_model(job: Job, trunk: Trunk, lora: Lora) -> tuple[PeftModel, float]:
    """The policy as a base with the one adapter 'default', and how much joining its adapters changed logits (see `_size`).

    Raises:
        AlignError: where that is more than rounding.
    """
    policy = job.parents["policy"]
    ids = torch.arange(PROBE, device=trunk.device)[None] * 7919 % trunk.model.config.get_text_config().vocab_size
    with torch.no_grad(), trunk.switched_to(load_role(trunk, policy)):
        before = trunk.model(ids).logits.float()
    model = trunk.peft.unload() if trunk.peft else trunk.model
    model.set_attn_implementation(trunk.own_attention)
    keep_products(model)  # TRL computes whole layers again
    torch.manual_seed(job.settings.seed)
    folders = adapter_folders(policy)
    config, weights = compose(folders) if folders else (peft_config(lora), {})
    config.inference_mode = False
    trained = get_peft_model(model, config)
    if folders:
        loaded = set_peft_model_state_dict(trained, weights)
        assert not loaded.unexpected_keys, loaded.unexpected_keys
    with torch.no_grad():
        change = _size(trained(ids).logits.float() - before)
    allowed = (1e-4 if model.dtype == torch.float32 else 0.02) * _size(before)
    if not change <= allowed:
        raise AlignError(
            f"{job.name}: the policy's {len(folders)} adapters, joined into one, change logits by {change:.3g} (root mean square at "
            f"the median token); up to {allowed:.3g} could be rounding. The installed peft does not run them as align does."
        )
    return trained, change


def _size(logits: Tensor) -> float:
    """Root mean square over the vocabulary, at the median token: of some tokens' activations the rounding alone moves a logit by 7."""
    return float(logits.square().mean(-1).sqrt().median())


def _check_finite(name: str, model: PeftModel) -> None:
    bad = [key for key, parameter in model.named_parameters() if parameter.requires_grad and not torch.isfinite(parameter).all()]
    if bad:
        raise AlignError(f"{name}: TRL's training left {bad[0]} with numbers that are not finite. Lower {name}.learning_rate.")


# The tokenizer and the rows ----------------------------------------------------------------------------------------------------


def _tokenizer(chat: Chat) -> Any:
    """A copy whose end token ends a turn, and whose padding is another token."""
    tokenizer = deepcopy(chat.tokenizer)
    end = tokenizer.convert_ids_to_tokens(chat.end_of_turn)
    tokenizer.eos_token = end
    if tokenizer.pad_token in (None, end):
        others = [token for token in tokenizer.all_special_tokens if token != end]
        if others:  # else TRL takes the end token, and masks padding by length
            tokenizer.pad_token = others[0]
    return tokenizer


def _rows(job: Job, data: Data, chat: Chat) -> tuple[datasets.Dataset, int]:
    """The records in the columns that TRL knows, and how many were left out because TRL would cut them."""
    trainer, longest = job.settings.trainer, getattr(job.settings, "max_length", None)
    kept, left_out = [], 0
    for index, record in enumerate(data.records()):
        row = _row(trainer, record)
        if longest is not None and _longest(row, chat) > longest:
            left_out += 1
            continue
        if trainer in BY_REWARD:
            row[ROW] = index
        kept += [row] if row else []
    if left_out:
        say(f"  {job.name}: {left_out:,} of {len(data):,} rows are over max_length ({longest} tokens) and left out")
    if not kept:
        raise AlignError(f"{job.name}: no row is left to train on: {left_out} are over {job.name}.max_length ({longest}).")
    if ROWS[trainer] == "feedback" and len({row["label"] for row in kept}) < 2:
        say(f"  [yellow]{job.name}: every reply is {'good' if kept[0]['label'] else 'bad'}; KTO wants some of both[/]")
    say(f"  {job.name}: {len(kept):,} rows for TRL's {trainer} trainer")
    return datasets.Dataset.from_list(kept), left_out


def _row(trainer: str, record: dict[str, Any]) -> dict[str, Any]:
    """A record as TRL's conversational columns; an undecided preference gives nothing, and one against chosen is turned round."""
    shared = {"tools": record["tools"]} if "tools" in record else {}
    if ROWS[trainer] == "conversation":
        if "text" in record:
            return {"text": record["text"]}
        return {"prompt": record["messages"][:-1], "completion": record["messages"][-1:], **shared}
    if ROWS[trainer] == "preference":
        probability = record.get("chosen_probability", 1.0)
        if probability == 0.5:
            return {}
        sides = ("chosen", "rejected") if probability > 0.5 else ("rejected", "chosen")
        return {"prompt": record["prompt"], "chosen": record[sides[0]], "rejected": record[sides[1]], **shared}
    names = ("prompt", "completion", "label") if ROWS[trainer] == "feedback" else ("prompt",)
    return {**{name: record[name] for name in names}, **shared}


def _longest(row: dict[str, Any], chat: Chat) -> int:
    """Tokens of the longest conversation in a row."""
    if "text" in row:
        return len(chat.tokenizer(row["text"])["input_ids"])
    replies = [row[name] for name in ("completion", "chosen", "rejected") if name in row] or [[]]
    texts = [chat.tokenizer.apply_chat_template([*row.get("prompt", []), *reply], tokenize=False) for reply in replies if row]
    return max((len(chat.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts), default=0)


def _rewards(job: Job, data: Data) -> list[Callable]:
    """The recipe's reward functions as TRL calls them."""
    rows = original_rows(data, range(len(data)))
    prompts = [PromptRow((), record["prompt"], record.get("tools"), rows[i], i) for i, record in enumerate(data.records())]
    functions = []
    for reward in job.rewards:
        scorer = FunctionReward(reward.name, reward.source, lambda prompt: data.place(prompt.index))

        def score(completions: list, weight=reward.weight, scorer=scorer, **columns: Any) -> list[float]:
            texts = [one[0]["content"] if isinstance(one, list) else one for one in completions]
            return [weight * scorer.score(prompts[at], text) for at, text in zip(columns[ROW], texts, strict=True)]

        score.__name__ = reward.name
        functions.append(score)
    return functions


# The trainer -------------------------------------------------------------------------------------------------------------------


def _make_trainer(job: Job, model: PeftModel, tokenizer: Any, rows: datasets.Dataset, **more: Any) -> Any:
    settings: TRLSettings = job.settings
    module = module_of(settings.trainer)
    config = getattr(importlib.import_module(module), f"{settings.trainer}Config")
    trainer = getattr(importlib.import_module(module.replace("_config", "_trainer")), f"{settings.trainer}Trainer")
    arguments = config(
        **settings.given(),
        output_dir=str(job.work / "trl"),
        seed=settings.seed,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    return trainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, **more)


def _teacher(job: Job) -> Any:
    """The model whose law is learned, on weights of its own beside the policy's: TRL trains and runs both at once."""
    if "teacher" not in job.parents:
        return job.settings.teacher_model_name_or_path
    artifact = job.parents["teacher"]
    trunk, _ = open_trunk(artifact.base if artifact else job.base, artifact, job.dtype)
    trunk.rest_in(load_role(trunk, artifact))
    trunk.model.set_attn_implementation(trunk.own_attention)
    return trunk.model


class _Report(TrainerCallback):
    """Hands what the trainer logs to our progress report."""

    def __init__(self, meter: Meter):
        self.meter, self.reported = meter, 0

    def on_train_begin(self, args, state, control, **kwargs):
        """The number of steps is known."""
        self.meter.begin(state.max_steps)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Numbers of a step; the summary at the end has none."""
        numbers = {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
        if "train_runtime" not in numbers:
            bad = [name for name, value in numbers.items() if name == "loss" and not math.isfinite(value)]
            if bad:
                raise AlignError(
                    f"{self.meter.name}: the loss is not a finite number at step {state.global_step}. Lower its learning_rate."
                )
            self.meter.step(state.global_step, numbers, state.global_step - self.reported)
            self.reported = state.global_step


@contextmanager
def _quiet() -> Iterator[None]:
    """Without telemetry, and without the library's remarks on what is decided here."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def _explained(name: str, what: str) -> Iterator[None]:
    """What TRL raises, as a message that names the stage."""
    try:
        yield
    except (ValueError, TypeError, KeyError, NotImplementedError, ImportError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise AlignError(f"{name}: {what}: {said}\n  Change a setting: --set {name}.SETTING=...") from error
