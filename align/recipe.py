"""Declaring a recipe: calling a stage returns a typed handle, and nothing runs until `main`. Imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from align.artifact import Artifact
from align.data.sources import Source, as_sources
from align.errors import AlignError
from align.handles import (
    BASE,
    KINDS,
    MAKERS,
    Comparison,
    Completions,
    Conversations,
    Evaluation,
    Handle,
    Judge,
    Policy,
    Preferences,
    RewardModel,
)
from align.overrides import build, parse_override, replace_in
from align.records import Kind
from align.rewards import Reward, as_rewards
from align.settings import (
    CompareSettings,
    DPOSettings,
    EvaluateSettings,
    LabelSettings,
    MeasuredJudge,
    PPOSettings,
    ReviseSettings,
    RewardSettings,
    SampleSettings,
    Settings,
    SFTSettings,
)
from align.trl_settings import BY_REWARD, BY_TEACHER, ROWS, settings_of

DTYPES = ("bfloat16", "float32", "nf4")
RESERVED = ("base", "recipe", "archive", "tracker")  # names that a stage may not have: the run's folder or --set uses them
TEACHER = "teacher_model_name_or_path"  # TRL's own name for a teacher that is no artifact
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")


OPTIONAL_DATA: dict[str, dict[str, Kind]] = {
    "reward": {"demonstrations": "conversation"},
    "label": {"gold": "preference"},
    "compare": {"gold": "preference"},
}


Rows = str | os.PathLike | Source | Mapping[str, Any] | Sequence[Any] | Preferences | Conversations  # what data= and preferences= take
MADE_ROWS: dict[Kind, type[Handle]] = {"preference": Preferences, "conversation": Conversations}


@dataclass(frozen=True)
class Stage:
    """A declared stage."""

    name: str
    kind: str  # the module in align/stages that runs it
    makes: type[Handle]
    settings: Settings
    inputs: dict[str, Handle]
    data: dict[str, tuple[tuple[Source, ...], Kind]]  # input -> (where its rows are, what they must become)
    rewards: tuple[Reward, ...] = ()  # the parts of PPO's score


class Recipe:
    """A chain of stages on one base model.

    Args:
        name: the run's folder is runs/NAME unless --out says otherwise.
        base: 'embedded', a folder, a .gguf file, or a hub id.
        revision: of a hub id.
        seed: of every stage that is not given its own.
        tracker: tensorboard, wandb, trackio or mlflow, beside metrics.jsonl; none by default.
        dtype: of the base's weights: bfloat16 or float32; by default bfloat16 where the processor computes in it natively.
        quantize: 'nf4' keeps the base's linear layers in four bits (QLoRA, arXiv 2305.14314), once for all roles; the same as dtype='nf4'.
    """

    def __init__(
        self,
        name: str,
        *,
        base: str,
        revision: str | None = None,
        seed: int = 0,
        tracker: str | None = None,
        dtype: str | None = None,
        quantize: str | None = None,
    ):
        """See the class."""
        if quantize not in (None, "nf4"):
            raise AlignError(f"recipe: quantize {quantize!r} is not known; expected 'nf4', or none.")
        if quantize is not None and dtype not in (None, quantize):
            raise AlignError(f"recipe: quantize={quantize!r} and dtype={dtype!r} cannot both be; leave dtype out.")
        dtype = quantize or dtype
        if tracker is not None and tracker not in TRACKERS:
            raise AlignError(f"recipe: tracker {tracker!r} is not known; expected one of {', '.join(TRACKERS)}, or none.")
        if dtype is not None and dtype not in DTYPES:
            raise AlignError(f"recipe: dtype {dtype!r} is not known; expected one of {', '.join(DTYPES)}, or none.")
        self.name, self.base_model, self.revision, self.seed, self.tracker = name, base, revision, seed, tracker
        self.dtype = dtype
        self.stages: dict[str, Stage] = {}
        self._own_seed: set[str] = set()  # stages that were given one

    @property
    def base(self) -> Policy:
        """The base model as a policy, untrained."""
        return BASE

    # Stages -----------------------------------------------------------------------------------------------------------

    def sft(self, *, data: Rows, policy: Policy = BASE, name: str = "sft", **settings: Any) -> Policy:
        """Supervised fine-tuning of a policy on conversations (any format `align inspect` knows)."""
        inputs = {"policy": (policy, Policy)}
        return self._declare(name, "sft", Policy, SFTSettings, inputs, {"data": (data, "conversation")}, settings)

    def reward(
        self,
        *,
        preferences: Rows,
        policy: Policy = BASE,
        demonstrations: Rows | None = None,
        name: str = "reward",
        **settings: Any,
    ) -> RewardModel:
        """A reward model on top of a policy, from preferences (`prompt`, `chosen`, `rejected`, optional `chosen_probability`).

        Its scores are centred on `demonstrations` (conversations), by default the data of the SFT stage it stands on.
        """
        data: dict[str, tuple[Any, Kind]] = {"preferences": (preferences, "preference")}
        if demonstrations is not None:
            data["demonstrations"] = (demonstrations, "conversation")
        return self._declare(name, "reward", RewardModel, RewardSettings, {"policy": (policy, Policy)}, data, settings)

    def dpo(self, *, preferences: Rows, policy: Policy = BASE, name: str = "dpo", **settings: Any) -> Policy:
        """Direct preference optimisation of a policy, with that policy as the reference."""
        inputs = {"policy": (policy, Policy)}
        return self._declare(name, "dpo", Policy, DPOSettings, inputs, {"preferences": (preferences, "preference")}, settings)

    def ppo(
        self,
        *,
        prompts: Rows,
        reward_model: RewardModel | None = None,
        reward: Any = None,
        policy: Policy = BASE,
        name: str = "ppo",
        **settings: Any,
    ) -> Policy:
        """PPO of a policy against a reward model or other rewards, with a KL penalty to where it starts.

        Args:
            prompts: what it answers.
            reward_model: from recipe.reward, on the same base as the policy.
            reward: a function (prompt, completion, row) -> number, the folder or hub id of a sequence classifier, a reward model,
                a judge (`align.judged`), or a list or dict of these, each alone or as a pair with its weight; see `align.rewards`.
            policy: what it starts from, and the reference.
            name: of the stage.
            **settings: see `--help`.
        """
        rewards = as_rewards(reward_model, reward, name)
        inputs: dict[str, tuple[Any, type[Handle]]] = {"policy": (policy, Policy)}
        inputs |= {part.role: (part.source, RewardModel) for part in rewards if "reward_model" in (part.kind, part.role)}
        inputs |= {
            part.role: (part.source.spec, Policy) for part in rewards if part.kind == "judge" and isinstance(part.source.spec, Handle)
        }
        return self._declare(name, "ppo", Policy, PPOSettings, inputs, {"prompts": (prompts, "prompt")}, settings, rewards)

    def trl(
        self,
        *,
        trainer: str,
        data: Rows,
        policy: Policy = BASE,
        reward: Any = None,
        teacher: Policy | None = None,
        name: str | None = None,
        **settings: Any,
    ) -> Policy:
        """One of TRL's own trainers on a policy: KTO, ORPO, CPO, RLOO, GRPO, Distillation, and its SFT and DPO for comparison.

        Args:
            trainer: its name.
            data: conversations (SFT), preferences (DPO, ORPO, CPO), replies that are each good or bad, or preferences (KTO), or
                prompts (RLOO, GRPO, Distillation).
            policy: what it starts from, and the reference where there is one.
            reward: of RLOO and GRPO: a function (prompt, completion, row) -> number, or several; see `align.rewards`.
            teacher: of Distillation: the policy whose law is learned; one of another base by recipe.load, or a model that is no artifact
                by TRL's own setting teacher_model_name_or_path. It must have the policy's vocabulary.
            name: of the stage; the trainer's name unless given.
            **settings: TRL's own, by their names; see `--help`.
        """
        name = trainer.lower() if name is None else name
        kind = settings_of(trainer)
        rewards: tuple[Reward, ...] = ()
        if trainer in BY_REWARD:
            rewards = as_rewards(None, reward, name)
            if other := next((part for part in rewards if part.kind != "function"), None):
                raise AlignError(
                    f"{name}: reward {other.name!r} is a {other.kind}; TRL is given functions. For others: recipe.ppo(estimator='rloo')."
                )
        elif reward is not None:
            raise AlignError(f"{name}: TRL's {trainer} trainer takes no reward; {' and '.join(BY_REWARD)} do.")
        inputs = {"policy": (policy, Policy)}
        if trainer in BY_TEACHER:
            if (teacher is None) == (TEACHER not in settings):
                raise AlignError(f"{name}: TRL's {trainer} trainer learns from one teacher: give teacher=POLICY, or {TEACHER}.")
            inputs |= {} if teacher is None else {"teacher": (teacher, Policy)}
        elif teacher is not None:
            raise AlignError(f"{name}: TRL's {trainer} trainer takes no teacher; {' and '.join(BY_TEACHER)} does.")
        return self._declare(name, "trl", Policy, kind, inputs, {"data": (data, ROWS[trainer])}, {"trainer": trainer, **settings}, rewards)

    def sample(self, *, policy: Policy | Sequence[Policy], prompts: Rows, name: str = "sample", **settings: Any) -> Completions:
        """Several completions of each prompt, by one policy or by each of several."""
        policies = [policy] if isinstance(policy, Handle) else list(policy)
        inputs: dict[str, tuple[Any, type[Handle]]] = {f"policies.{i}": (each, Policy) for i, each in enumerate(policies)}
        return self._declare(name, "sample", Completions, SampleSettings, inputs, {"prompts": (prompts, "prompt")}, settings)

    def revise(self, *, completions: Completions, policy: Policy = BASE, name: str = "revise", **settings: Any) -> Conversations:
        """Have a policy criticise completions by principles and rewrite them (Bai et al. 2022, arXiv 2212.08073, sec. 3.1)."""
        inputs = {"policy": (policy, Policy), "completions": (completions, Completions)}
        return self._declare(name, "revise", Conversations, ReviseSettings, inputs, {}, settings)

    def label(
        self,
        *,
        completions: Completions,
        judge: str | Judge | Sequence[str | Judge],
        gold: Rows | None = None,
        name: str = "label",
        **settings: Any,
    ) -> Preferences:
        """Have a judge compare completions of the same prompt, in both orders, and keep what it is sure of as preferences.

        Args:
            completions: from recipe.sample.
            judge: a policy, a reward model, 'embedded' or another base, or an endpoint ('http://host:port/v1#model'); a list is a panel.
            gold: people's preferences, by which the judge is measured before it labels.
            name: of the stage.
            **settings: see `--help`.
        """
        return self._judged(name, "label", Preferences, LabelSettings, {"completions": (completions, Completions)}, judge, gold, settings)

    def compare(
        self,
        *,
        evaluation: Evaluation,
        judge: str | Judge | Sequence[str | Judge],
        gold: Rows | None = None,
        name: str = "compare",
        **settings: Any,
    ) -> Comparison:
        """Have a judge compare the answers of an evaluation's policies with its first policy's, in both orders: win rates.

        Args:
            evaluation: from recipe.evaluate.
            judge: as of `label`.
            gold: people's preferences, by which the judge is measured before it is believed.
            name: of the stage.
            **settings: see `--help`.
        """
        return self._judged(name, "compare", Comparison, CompareSettings, {"evaluation": (evaluation, Evaluation)}, judge, gold, settings)

    def _judged(
        self,
        name: str,
        kind: str,
        makes: type[Handle],
        settings_kind: type[MeasuredJudge],
        inputs: dict[str, tuple[Any, type[Handle]]],
        judge: str | Judge | Sequence[str | Judge],
        gold: Rows | None,
        settings: dict[str, Any],
    ) -> Any:
        judges = [judge] if isinstance(judge, str | Handle) else list(judge)
        inputs |= {f"judges.{i}": (each, Judge) for i, each in enumerate(judges) if isinstance(each, Handle)}
        specs = [each for each in judges if not isinstance(each, Handle)]
        data: dict[str, tuple[Any, Kind]] = {} if gold is None else {"gold": (gold, "preference")}
        return self._declare(name, kind, makes, settings_kind, inputs, data, {"judges": specs, **settings})

    def evaluate(
        self,
        *,
        policies: Sequence[Policy],
        prompts: Rows,
        reward_model: RewardModel,
        held_out: Sequence[RewardModel] = (),
        name: str = "evaluate",
        **settings: Any,
    ) -> Evaluation:
        """Sample policies on the same prompts and compare them with the first: score, length, KL, end-of-turn rate.

        Args:
            policies: the first is what the others are compared with.
            prompts: that nothing was trained on.
            reward_model: whose score decides.
            held_out: reward models that no policy was trained against: they tell a better policy from one that exploits the other.
            name: of the stage.
            **settings: see `--help`.
        """
        if isinstance(policies, Handle) or not policies:
            found = "empty" if not isinstance(policies, Handle) else f"a single {type(policies).__name__}"
            raise AlignError(f"{name}: 'policies' is {found}; give a list of at least one policy, such as policies=[sft, ppo].")
        inputs: dict[str, tuple[Any, type[Handle]]] = {f"policies.{i}": (policy, Policy) for i, policy in enumerate(policies)}
        inputs["reward_model"] = (reward_model, RewardModel)
        inputs |= {f"held_out.{i}": (model, RewardModel) for i, model in enumerate(held_out)}
        return self._declare(name, "evaluate", Evaluation, EvaluateSettings, inputs, {"prompts": (prompts, "prompt")}, settings)

    def load(self, folder: str | os.PathLike) -> Any:
        """A policy or reward model from another run's folder, such as runs/a/sft."""
        artifact = Artifact.open(Path(folder))
        kind = KINDS.get(artifact.kind)
        if kind is None:
            raise AlignError(f"{folder}: is a {artifact.kind}; expected one of {', '.join(KINDS)}.")
        return kind(artifact.name, artifact)

    def _declare(
        self,
        name: str,
        kind: str,
        makes: type[Handle],
        settings_kind: type[Settings],
        inputs: Mapping[str, tuple[Any, type[Handle]]],
        data: Mapping[str, tuple[Any, Kind]],
        settings: dict[str, Any],
        rewards: tuple[Reward, ...] = (),
    ) -> Any:
        if name in self.stages or name in RESERVED or not name.replace("_", "").replace("-", "").isalnum():
            taken = "is taken" if name in self.stages or name in RESERVED else "may hold letters, digits, '-' and '_' only"
            raise AlignError(f"{kind}: the stage name {name!r} {taken}. Give it another, such as name={f'{kind}2'!r}.")
        made = {role: given for role, (given, _) in data.items() if isinstance(given, Handle)}  # rows that another stage makes
        for role, given in made.items():
            if data[role][1] not in MADE_ROWS:
                raise AlignError(
                    f"{name}: {role} is a {type(given).__name__} (stage {given.name!r}); expected a file, a folder or a hub id."
                )
            inputs = {**inputs, role: (given, MADE_ROWS[data[role][1]])}
        for role, (handle, wanted) in inputs.items():
            if not isinstance(handle, wanted):
                found = f"a {type(handle).__name__} (stage {handle.name!r})" if isinstance(handle, Handle) else f"{handle!r}"
                article = "an" if wanted is Evaluation else "a"
                raise AlignError(f"{name}: {role} is {found}; expected {article} {wanted.__name__}, {MAKERS[wanted]}.")
            if handle.artifact is None and handle is not BASE and handle.recipe is not self:
                raise AlignError(f"{name}: {role} is stage {handle.name!r} of another recipe; declare it here, or use recipe.load(folder).")
        columns = settings.pop("columns", None)
        checked = build(settings_kind, {"seed": self.seed, **settings}, name)
        if "seed" in settings:
            self._own_seed.add(name)
        handles = {role: handle for role, (handle, _) in inputs.items()}
        sources = {role: (as_sources(given, f"{name}.{role}"), becomes) for role, (given, becomes) in data.items() if role not in made}
        if columns is not None:
            first = next(iter(sources), None)
            if first is None:
                raise AlignError(f"{name}: columns= maps the columns of a file, but this stage is given no file.")
            mapped = tuple(replace(source, columns=source.columns or columns) for source in sources[first][0])
            sources[first] = (as_sources(mapped, f"{name}.{first}"), sources[first][1])
        self.stages[name] = Stage(name, kind, makes, checked, handles, sources, rewards)
        return makes(name, recipe=self)

    # Overrides --------------------------------------------------------------------------------------------------------

    def override(self, text: str) -> None:
        """Apply one `--set`: stage.setting=value, stage.input=FILE, label.judge=SPEC, or recipe.base / .seed / .tracker=value.

        Raises:
            AlignError: where the stage or setting is unknown, or the value does not fit.
        """
        path, value = parse_override(text)
        name, *rest = path
        if name == "recipe":
            return self._override_recipe(rest, value)
        if name not in self.stages:
            raise AlignError(f"--set {text}: this recipe has no stage {name!r}. It has: {', '.join(self.stages)}, and recipe.")
        stage = self.stages[name]
        made = {role: becomes for becomes, kind in MADE_ROWS.items() for role, given in stage.inputs.items() if isinstance(given, kind)}
        takes = {role: becomes for role, (_, becomes) in stage.data.items()} | OPTIONAL_DATA.get(stage.kind, {}) | made
        if isinstance(stage.settings, MeasuredJudge) and rest == ["judge"]:
            given = [value] if isinstance(value, str) else value
            inputs = {role: handle for role, handle in stage.inputs.items() if not role.startswith("judges.")}
            self.stages[name] = replace(stage, settings=replace_in(stage.settings, ["judges"], given, name), inputs=inputs)
        elif rest[0] in takes and len(rest) == 1:
            given = value if isinstance(value, list | dict) else text.partition("=")[2].strip()
            data = {**stage.data, rest[0]: (as_sources(given, f"{name}.{rest[0]}"), takes[rest[0]])}
            inputs = {role: given for role, given in stage.inputs.items() if role != rest[0]}
            self.stages[name] = replace(stage, data=data, inputs=inputs)
        else:
            if rest[0] == TEACHER and "teacher" in stage.inputs:
                raise AlignError(
                    f"--set {text}: {name} has a teacher already, {stage.inputs['teacher'].name}. Take it out of the recipe first."
                )
            self.stages[name] = replace(stage, settings=replace_in(stage.settings, rest, value, name))
        return None

    def _override_recipe(self, path: list[str], value: Any) -> None:
        if path == ["base"] and value is not None:
            self.base_model = str(value)
        elif path == ["revision"]:
            self.revision = None if value is None else str(value)
        elif path == ["tracker"] and (value is None or value in TRACKERS):
            self.tracker = value
        elif (path == ["dtype"] and (value is None or value in DTYPES)) or (path == ["quantize"] and value in (None, "nf4")):
            self.dtype = value
        elif path == ["seed"] and isinstance(value, int) and value >= 0:
            for name, stage in self.stages.items():
                if name not in self._own_seed:
                    self.stages[name] = replace(stage, settings=replace_in(stage.settings, ["seed"], value, name))
            self.seed = value
        else:
            raise AlignError(
                f"--set recipe.{'.'.join(path)}={value}: expected recipe.base, recipe.revision, recipe.seed (0 or more), "
                f"recipe.dtype ({', '.join(DTYPES)}), recipe.quantize (nf4, none) or recipe.tracker ({', '.join(TRACKERS)})."
            )

    # Running ----------------------------------------------------------------------------------------------------------

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """The command line of a recipe script: run it, or show its plan."""
        from align.cli import recipe_main

        sys.exit(recipe_main(self, arguments))

    def run(self, out: str | os.PathLike | None = None) -> Path:
        """Run every stage that is not done, from Python, and return the run's folder."""
        from align.run import execute

        folder = Path(out) if out is not None else self.default_folder
        execute(self, folder)
        return folder

    @property
    def default_folder(self) -> Path:
        """Where the run goes unless told otherwise."""
        return Path("runs") / self.name
