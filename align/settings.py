"""Every setting of every stage: type, bounds, default, and what it means. Imports no torch.

Units are in the text. `example` means one conversation (SFT), one pair (reward, DPO) or one prompt (PPO).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

KEEP_OUT_OF_IDENTITY: JsonDict = {"outcome": False}  # marks a setting that changes how a stage runs, not what comes out


BadRows = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        description="Largest share of bad rows that is left out (and written to rejected.jsonl); more stop the stage.",
        json_schema_extra=KEEP_OUT_OF_IDENTITY,
    ),
]


class Settings(BaseModel):
    """Strict settings: unknown names and wrong types are refused, and nothing changes after construction."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    revision: ClassVar[int] = 1
    """Raised when the same settings begin to mean another outcome, so that older artifacts are made again."""

    texts: ClassVar[tuple[str, ...]] = ()
    """Settings that name text files, whose content decides the outcome."""

    def deciding(self) -> dict:
        """The settings that decide the outcome, for the stage's identity."""
        fields = type(self).model_fields
        return {
            name: value
            for name, value in self.model_dump(mode="json").items()
            if (fields[name].json_schema_extra or {}) != KEEP_OUT_OF_IDENTITY
        }


class Lora(Settings):
    """A low-rank adapter (Hu et al. 2021, arXiv 2106.09685): W x + alpha / rank * B A x, with W frozen."""

    rank: int = Field(16, ge=1, le=1024, description="Rank of the two adapter matrices.")
    alpha: float = Field(32.0, gt=0, description="Scale; the adapter's output is multiplied by alpha / rank.")
    targets: str | tuple[str, ...] = Field(
        "all-linear", description="Names of the linear layers to adapt, or 'all-linear' for all but the output layer."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input while training. PPO wants 0.")
    dora: bool = Field(False, description="Train magnitude and direction apart (DoRA, arXiv 2402.09353).")
    rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732).")


class Optimiser(Settings):
    """What every stage that trains has."""

    lora: Lora | None = Field(Lora(), description="Adapter settings; none trains all weights of the model.")
    learning_rate: float = Field(2e-4, gt=0, le=1, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(0.0, ge=0, le=1, description="Decoupled weight decay of AdamW.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients with a larger norm are scaled down to it.")
    row_tokens: int = Field(2048, ge=16, description="Tokens in one packed row, that is in one forward pass.")
    gradient_checkpointing: bool | None = Field(
        None,
        description="Compute activations again in the backward pass: less memory, up to 1.5 times the time, the same result. "
        "None: where the stage would not fit without.",
        json_schema_extra=KEEP_OUT_OF_IDENTITY,
    )
    seed: int = Field(0, ge=0, description="Seed of everything random in the stage. The recipe's seed unless given.")


class Training(Optimiser):
    """What SFT, the reward model and DPO share."""

    epochs: float = Field(1.0, gt=0, le=1000, description="Passes over the training examples.")
    batch_size: int = Field(16, ge=1, description="Examples in one optimizer step.")
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of the steps over which the learning rate rises from 0.")
    decay: Literal["linear", "cosine", "constant"] = Field("linear", description="How the learning rate falls to 0.")
    holdout: float = Field(0.1, ge=0, lt=1, description="Share of the prompts held out for evaluation, chosen by a hash of the prompt.")
    eval_every: int = Field(25, ge=1, description="Optimizer steps between evaluations on the held-out examples.")
    save_every: int = Field(20, ge=1, description="Optimizer steps between checkpoints.", json_schema_extra=KEEP_OUT_OF_IDENTITY)
    max_length: int = Field(1024, ge=8, description="Longest example in tokens: the prompt and its longest completion.")
    on_overlong: Literal["error", "drop", "shorten_prompt", "cut_completion"] = Field(
        "drop",
        description="What becomes of examples over max_length: error stops; drop leaves them out; shorten_prompt leaves out early "
        "turns; cut_completion cuts the completion and trains no end of the turn there. Their count is always shown.",
    )
    max_heldout: int = Field(1000, ge=1, description="Held-out examples that evaluations use; further ones are only kept out of training.")
    near_duplicates: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Leave out examples whose text is this alike to an earlier one's (Jaccard of five-word shingles), such as 0.8.",
    )
    max_bad_rows: BadRows = 0.02


class SFTSettings(Training):
    """Supervised fine-tuning: maximum likelihood of the assistant's turns."""

    learning_rate: float = Field(3e-4, gt=0, le=1, description="Peak learning rate of AdamW.")
    batch_size: int = Field(8, ge=1, description="Conversations in one optimizer step.")
    epochs: float = Field(2.0, gt=0, le=1000, description="Passes over the training conversations.")
    train_on: Literal["all", "last"] = Field("all", description="Learn every turn of the assistant, or its last one.")


class RewardSettings(Training):
    """Reward model: Bradley-Terry on preferences (Ouyang et al. 2022, arXiv 2203.02155, eq. 1)."""

    margins: bool = Field(False, description="Subtract a row's `margin` from the score difference (Llama 2, arXiv 2307.09288, eq. 2).")
    centering: float = Field(0.01, ge=0, description="Weight of (chosen + rejected)^2 in the loss, which keeps scores near 0 (2312.09244).")
    value_scale: float = Field(1.0, gt=0, description="Standard deviation of the head at start, times 1/sqrt(hidden+1).")


class DPOSettings(Training):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290)."""

    learning_rate: float = Field(5e-5, gt=0, le=1, description="Peak learning rate of AdamW.")
    loss: Literal["sigmoid", "ipo", "hinge", "apo_zero", "sigmoid_norm", "simpo"] = Field(
        "sigmoid",
        description="sigmoid: DPO, with each row's chosen_probability (cDPO); ipo: 2310.12036; hinge: SLiC, 2305.10425; "
        "apo_zero: 2408.06266; sigmoid_norm: DPO per token, 2411.15124; simpo: 2405.14734, per token and without a reference.",
    )
    beta: float = Field(0.1, gt=0, description="Strength of the pull to the reference; simpo's scale (2.0 is usual there).")
    simpo_gamma: float = Field(0.5, ge=0, description="Target margin of simpo.")
    sft_weight: float = Field(0.0, ge=0, description="Weight of an added SFT term on the chosen completion, per token.")


class PPOSettings(Optimiser):
    """Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347) with a KL penalty to the reference."""

    revision = 2

    lora: Lora = Field(Lora(), description="Adapter settings. PPO always trains an adapter, so that every role shares one base.")  # type: ignore[assignment]

    # The rounds
    learning_rate: float = Field(5e-4, gt=0, le=1, description="Peak learning rate of the policy's adapter.")
    value_learning_rate: float = Field(5e-4, gt=0, le=1, description="Peak learning rate of the value adapter and head.")
    iterations: int = Field(12, ge=1, description="Rounds of sampling and updating.")
    prompts_per_iteration: int = Field(6, ge=1, description="Prompts sampled in one round.")
    completions_per_prompt: int = Field(
        8, ge=1, description="Completions of each prompt; its tokens are computed once, and its completions compared."
    )
    max_new_tokens: int = Field(64, ge=1, description="Longest completion in tokens.")
    max_prompt_tokens: int = Field(512, ge=1, description="Longer prompts are left out, and counted.")
    temperature: float = Field(0.7, gt=0, le=5, description="Sampling temperature; every log-probability uses it too.")
    epochs: int = Field(1, ge=1, description="Passes over a round's rollouts.")
    minibatches: int = Field(6, ge=1, description="Optimizer steps in each of those passes; at most one for every prompt.")
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of the rounds over which the learning rates rise from 0.")

    # From scores to advantages
    estimator: Literal["gae", "rloo", "grpo", "dr_grpo", "reinforce++"] = Field(
        "gae",
        description="How advantages are estimated. gae: with a learned value, 1506.02438; the others load and train no value. "
        "rloo: score less the mean of the prompt's other completions, 2402.14740; grpo: distance from the prompt's mean in standard "
        "deviations, each completion counting alike, 2402.03300; dr_grpo: grpo without both divisions, 2503.20783; "
        "reinforce++: the rest of the rewards, normalised over the round, 2501.03262.",
    )
    gamma: float = Field(1.0, gt=0, le=1, description="Discount per token.")
    gae_lambda: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Lambda of generalised advantage estimation (1506.02438). Below 1 the policy learns from the value's own errors, "
        "and a value that has just left the reward model errs in the middle of a sentence.",
    )
    compare_completions: bool = Field(
        True,
        description="Subtract from each score the mean score of the prompt's other completions (RLOO's baseline, 2402.14740): "
        "no bias, and what only the prompt decides is no noise. Advantages are then scaled over the round, and not shifted to mean 0 as "
        "well (whitened). Needs 2 or more completions of each prompt. Of gae and reinforce++.",
    )
    centre_scores: bool = Field(
        False, description="Subtract the mean score of the first round: of the policy as it begins. Reward models are centred already."
    )
    scale_scores: bool = Field(False, description="Divide scores by their standard deviation over all rounds so far.")
    clip_scores: float | None = Field(None, gt=0, description="Largest score, either way, after centring and scaling.")
    missing_eos_score: float | None = Field(
        -1.0, description="Score of a completion that never ends its turn, in place of the reward's; none keeps it."
    )
    on_cut: Literal["score", "bootstrap", "leave_out"] = Field(
        "score",
        description="What a completion that never ends its turn teaches. score: its score; bootstrap: the value of where it was cut "
        "takes the score's place; leave_out: nothing, it only counts in the metrics.",
    )
    length_penalty: float = Field(0.0, ge=0, description="Subtracted from the score for each token of the completion.")
    whiten_rewards: bool = Field(False, description="Scale per-token rewards to variance 1 over the round, keeping their mean.")

    # The pull to the reference
    kl_coef: float = Field(
        0.05,
        ge=0,
        description="Weight of the KL penalty to the reference: in each token's reward; for grpo and dr_grpo a term of the loss.",
    )
    kl_target: float | None = Field(
        None, gt=0, description="Move kl_coef so that KL comes to this many nats per completion (1909.08593, sec. 2.2); none: fixed."
    )
    kl_horizon: int = Field(
        500, ge=1, description="Completions over which kl_coef changes by a fifth where KL is a fifth or more off kl_target."
    )
    kl_loss_coef: float = Field(0.0, ge=0, description="Weight of a KL term in the loss: k2, whose gradient is that of KL (2510.01555).")

    # The updates
    clip_range: float = Field(0.2, gt=0, description="How far the ratio may move from 1 before it stops earning.")
    clip_range_high: float | None = Field(None, gt=0, description="The same upwards, where it differs (2503.14476); none: clip_range.")
    dual_clip: float | None = Field(
        None, gt=1, description="Ratio above which tokens of negative advantage stop losing, such as 3 (1912.09729); none: never."
    )
    entropy_coef: float = Field(0.0, ge=0, description="Weight of the entropy that is added to what the policy earns.")
    value_clip: float = Field(0.5, gt=0, description="How far a value may move from its rollout's in one round.")
    value_coef: float = Field(0.1, ge=0, description="Weight of the value loss.")
    value_warmup: int = Field(0, ge=0, description="Rounds at the start that train the value alone.")
    max_update_kl: float | None = Field(
        None, gt=0, description="A round's updates end once the policy is this many nats a token from the one that sampled."
    )

    # The best round
    holdout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the prompts held out, chosen by a hash of the prompt. With it the best evaluated round is the result: "
        "that of the highest held-out score less kl_coef times KL.",
    )
    max_heldout: int = Field(64, ge=1, description="Held-out prompts that evaluations use; further ones are only kept out of training.")
    eval_every: int = Field(4, ge=1, description="Rounds between evaluations on the held-out prompts.")
    patience: int | None = Field(None, ge=1, description="End the run after this many evaluations without a better one; none goes on.")
    max_kl: float | None = Field(
        None, gt=0, description="End the run once held-out KL passes this many nats per completion; such a round is not the best."
    )
    choose_by: str | None = Field(
        None,
        description="Name of the reward that decides which round is best, such as a second reward model that is given the weight 0: "
        "it was not learned from, so it tells a better policy from one that exploits the first. A completion that was cut scores "
        "missing_eos_score by it too. None: the whole score.",
    )

    merged_sampler: bool = Field(
        True, description="Sample from a copy with the adapters merged: about twice as fast, for one more copy of the weights."
    )
    sampler: str = Field(
        "local",
        description="local, or the address of a vLLM server that has the base and may be handed adapters: http://localhost:8000/v1. Its "
        "completions are weighed here, by the exact policy; a run that was killed does not end with the same bytes then.",
        json_schema_extra=KEEP_OUT_OF_IDENTITY,
    )
    samples_every: int = Field(1, ge=1, description="Rounds between tables of samples.", json_schema_extra=KEEP_OUT_OF_IDENTITY)
    save_every: int = Field(1, ge=1, description="Rounds between checkpoints.", json_schema_extra=KEEP_OUT_OF_IDENTITY)
    max_bad_rows: BadRows = 0.02

    @property
    def has_value(self) -> bool:
        """Whether a value is learned."""
        return self.estimator == "gae"

    @property
    def kl_in_loss(self) -> bool:
        """Whether kl_coef weighs a term of the loss rather than the rewards."""
        return self.estimator in ("grpo", "dr_grpo")

    def contradictions(self, rewards: Sequence[str]) -> list[str]:
        """Settings that cannot go together, each with the cure. `rewards` are the names of the score's parts."""
        of_groups = self.estimator in ("rloo", "grpo", "dr_grpo")
        watched = [name for name in ("patience", "max_kl", "choose_by") if getattr(self, name) is not None]
        checks = (
            (of_groups and self.completions_per_prompt == 1, "compares completions of one prompt; set completions_per_prompt to 2 or more"),
            (of_groups and self.whiten_rewards, "has no per-token rewards; set whiten_rewards=false"),
            (not self.has_value and self.value_warmup > 0, "has no value to warm up; set value_warmup=0"),
            (not self.has_value and self.on_cut == "bootstrap", "has no value to take a score's place; set on_cut=score"),
        )
        found = [f"estimator={self.estimator} {problem}" for there, problem in checks if there]
        if self.sampler != "local" and not self.sampler.startswith(("http://", "https://")):
            found.append(f"sampler={self.sampler!r} is no address; expected local, or a server's, such as http://localhost:8000/v1")
        if self.value_warmup >= self.iterations:
            found.append(f"value_warmup={self.value_warmup} leaves no round for the policy; raise iterations ({self.iterations})")
        if self.kl_target is not None and self.kl_coef == 0:
            found.append("kl_target multiplies kl_coef, which is 0; set kl_coef above 0")
        completions = self.prompts_per_iteration * self.completions_per_prompt
        if self.kl_target is not None and self.kl_horizon < completions:
            found.append(f"kl_horizon={self.kl_horizon} is under a round's {completions} completions, so kl_coef would jump; raise it")
        if watched and self.holdout == 0:
            found.append(f"{' and '.join(watched)} need evaluations; set holdout, such as 0.1")
        if self.choose_by is not None and self.choose_by not in rewards:
            found.append(f"choose_by={self.choose_by!r} names no reward of this stage; there is {', '.join(rewards)}")
        return found


class EvaluateSettings(Settings):
    """Sample every policy on the same prompts and compare."""

    max_prompts: int | None = Field(None, ge=1, description="Use the first this many prompts; none uses all.")
    samples_per_prompt: int = Field(1, ge=1, description="Completions of each prompt.")
    best_of: int | None = Field(
        None,
        ge=2,
        le=256,
        description="Also compare with the best of this many completions of the first policy, by the reward model: the plainest way to "
        "earn reward, whose KL is log n - (n - 1) / n.",
    )
    max_new_tokens: int = Field(64, ge=1, description="Longest completion in tokens.")
    temperature: float = Field(0.7, gt=0, le=5, description="Sampling temperature; the KL is measured at it too.")
    row_tokens: int = Field(2048, ge=16, description="Tokens in one packed row, that is in one forward pass.")
    check_instructions: bool = Field(
        True, description="Check the instructions of prompts that carry them as IFEval's do (instruction_id_list, kwargs)."
    )
    seed: int = Field(0, ge=0, description="Seed of the sampling. The recipe's seed unless given.")
    max_bad_rows: BadRows = 0.02


class JudgeSettings(Settings):
    """How a judge is asked. Whatever it has answered before is in its ledger and is not asked again."""

    texts = ("template", "constitution")

    template: str = Field(
        "prompts/judge_pair.txt", description="What the judge is asked: a text file with a header and named fields; see prompts/README.md."
    )
    constitution: str | None = Field(
        None, description="A file with one principle a line; each pair is judged by one drawn from it. The template must use $principle."
    )
    abstain: float = Field(0.05, ge=0, lt=0.5, description="A probability this near to one half is undecided.")
    margin: float = Field(1.0, gt=0, description="Scores of a pointwise template that differ by less are a tie.")
    max_unparsed: float = Field(0.2, ge=0, le=1, description="Largest share of replies that cannot be read; more stop the stage.")
    max_new_tokens: int = Field(256, ge=1, description="Longest reply, where the judge writes one.")
    max_requests: int | None = Field(None, ge=0, description="Stop cleanly after this many questions to the judge.")
    max_seconds: float | None = Field(None, gt=0, description="Stop cleanly after this long.")
    max_cost: float | None = Field(None, ge=0, description="Stop cleanly before the price of the replies passes this.")
    prompt_price: float | None = Field(
        None, ge=0, description="Price of a million prompt tokens at the endpoint; none: unknown.", json_schema_extra=KEEP_OUT_OF_IDENTITY
    )
    completion_price: float | None = Field(
        None, ge=0, description="Price of a million completion tokens.", json_schema_extra=KEEP_OUT_OF_IDENTITY
    )
    concurrency: int = Field(8, ge=1, le=1000, description="Requests to an endpoint at one time.", json_schema_extra=KEEP_OUT_OF_IDENTITY)
    timeout: float = Field(60.0, gt=0, description="Seconds an endpoint has to reply.", json_schema_extra=KEEP_OUT_OF_IDENTITY)
    retries: int = Field(
        6, ge=0, description="Times a question is asked again after an endpoint failed to reply.", json_schema_extra=KEEP_OUT_OF_IDENTITY
    )
    row_tokens: int = Field(
        2048,
        ge=16,
        description="Tokens in one packed row of a local judge, that is in one forward pass.",
        json_schema_extra=KEEP_OUT_OF_IDENTITY,
    )
    seed: int = Field(0, ge=0, description="Seed of the drawn principles. The recipe's seed unless given.")


class SampleSettings(Settings):
    """Sample completions of prompts, to be compared, revised or learned from."""

    completions_per_prompt: int = Field(4, ge=1, description="Completions of each prompt by each policy at each temperature.")
    max_new_tokens: int = Field(128, ge=1, description="Longest completion in tokens.")
    max_prompt_tokens: int = Field(1024, ge=1, description="Longer prompts are left out, and counted.")
    max_prompts: int | None = Field(None, ge=1, description="Use the first this many prompts; none uses all.")
    temperatures: tuple[float, ...] = Field((0.8,), min_length=1, description="Sampling temperatures; each gives completions of its own.")
    keep_cut: bool = Field(False, description="Keep completions that never ended their turn.")
    seed: int = Field(0, ge=0, description="Seed of the sampling. The recipe's seed unless given.")
    max_bad_rows: BadRows = 0.02


class ReviseSettings(Settings):
    """Criticise completions by principles and rewrite them."""

    texts = ("constitution", "critique_template", "revision_template")

    constitution: str = Field("prompts/constitution.txt", description="A file with one principle a line; one is drawn for each revision.")
    critique_template: str = Field("prompts/critique.txt", description="The template that asks for a critique.")
    revision_template: str = Field("prompts/revision.txt", description="The template that asks for a rewritten completion.")
    rounds: int = Field(1, ge=1, le=16, description="Critiques and revisions of each completion, one after the other.")
    completions_per_prompt: int = Field(1, ge=1, description="Completions of each prompt that are revised; further ones are left out.")
    max_new_tokens: int = Field(192, ge=1, description="Longest critique and longest revision in tokens.")
    temperature: float = Field(0.7, ge=0, le=5, description="Sampling temperature; 0 takes the likeliest token.")
    seed: int = Field(0, ge=0, description="Seed of the drawn principles and the sampling. The recipe's seed unless given.")


class MeasuredJudge(JudgeSettings):
    """A judge that is measured before it is believed."""

    judges: tuple[str, ...] = Field(
        (), description="Judges beside those given as stages: a base, or an endpoint 'http://host:port/v1#model'."
    )
    audit_pairs: int = Field(200, ge=0, description="Pairs by which the judge is measured first; 0 leaves the audit out.")
    trust_judge: bool = Field(False, description="Go on even if the audit refuses the judge.")
    ledger: str | None = Field(
        None,
        description="File of everything judges have said; judgements.sqlite in the run's folder.",
        json_schema_extra=KEEP_OUT_OF_IDENTITY,
    )


class CompareSettings(MeasuredJudge):
    """Have a judge compare the answers of an evaluation's policies with the first policy's: win rates."""


class LabelSettings(MeasuredJudge):
    """Have a judge compare completions, and keep what it is sure of as preferences."""

    pairs_per_prompt: int = Field(2, ge=1, description="Pairs of each prompt's completions, drawn by lot.")
    max_pairs: int | None = Field(None, ge=1, description="Judge the first this many pairs; none judges all.")
    undecided: Literal["drop", "keep"] = Field(
        "drop", description="drop leaves out pairs on which the judge flipped with the order or was unsure; keep trains on its probability."
    )
    hard_labels: bool = Field(False, description="Give every label the probability 1, for comparison.")
