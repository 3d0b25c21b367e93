"""What a PPO run works with: policy, rewards and value on one trunk, the prompts, the sampler and the optimizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from align.artifact import Artifact
from align.errors import AlignError
from align.judge.judgement import Judge
from align.judge.local import LocalJudge
from align.judge.open import open_judge
from align.learn.optimise import make_optimizer
from align.learn.prompts import PromptRow, read_prompts
from align.learn.scores import ClassifierReward, FunctionReward, JudgedReward, Scorer, TrunkReward
from align.learn.updates import Learner
from align.model.load import Sampler, adapter_folders, load_role, open_trainee, root_identity
from align.model.served import ServedSampler
from align.model.trunk import Head, Role, Trunk, native_dtype
from align.rewards import Reward
from align.run import Job
from align.settings import Lora, PPOSettings

VALUE = "value-role"


@dataclass
class Session:
    """All that a run works with; only weights and optimizer change."""

    job: Job
    learner: Learner
    parameters: dict[str, torch.nn.Parameter]  # what is trained: the policy's and the value's
    scorers: dict[str, Scorer]  # by the reward's name
    weights: dict[str, float]
    sampler: Sampler | ServedSampler
    prompts: list[PromptRow]
    heldout: list[PromptRow]

    @property
    def settings(self) -> PPOSettings:
        """The stage's."""
        return self.learner.settings

    def place(self, prompt: PromptRow) -> str:
        """Where a prompt came from: file:line."""
        return self.job.data["prompts"].place(prompt.index)


def open_session(job: Job) -> Session:
    """Load everything. The same adapter is never loaded twice, and none for a value that the estimator does not need."""
    settings: PPOSettings = job.settings
    models = {role: artifact for role, artifact in job.parents.items() if artifact is not None and artifact.kind == "reward_model"}
    for artifact in models.values():
        check_same_trunk(job, artifact)
    trainee = open_trainee(job)
    trunk = trainee.trunk
    roles = {role: load_role(trunk, artifact) for role, artifact in models.items()}
    groups = [trainee.parameters]
    value = None
    if settings.has_value:
        like = next((reward.role for reward in job.rewards if reward.role in models and reward.weight), None)
        value = add_value(trunk, trainee.before, settings, roles[like] if like else None, models[like] if like else None)
        groups.append(trunk.parameters_of(VALUE, VALUE))
        for parameter in groups[1].values():
            parameter.requires_grad_(True)
    optimizer = make_optimizer([list(group.values()) for group in groups], settings.weight_decay, eps=1e-5)
    prompts, heldout = read_prompts(job, trainee.chat, any(reward.kind == "function" for reward in job.rewards))
    session = Session(
        job=job,
        learner=Learner(trainee, value, optimizer, settings),
        parameters={name: parameter for group in groups for name, parameter in group.items()},
        scorers={},
        weights={reward.name: reward.weight for reward in job.rewards},
        sampler=_sampler(job, trunk, settings),
        prompts=prompts,
        heldout=heldout,
    )
    session.scorers |= {reward.name: _scorer(session, reward, roles) for reward in job.rewards}
    return session


def _sampler(job: Job, trunk: Trunk, settings: PPOSettings) -> Sampler | ServedSampler:
    """The local sampler, or a server that is handed the policy."""
    if settings.sampler == "local":
        return Sampler(trunk, settings.merged_sampler)
    policy = job.parents["policy"]
    chain = policy.chain() if policy else []
    if any(artifact.facts["model"]["form"] == "full" for artifact in chain):
        raise AlignError(f"{job.name}.sampler: a server holds the base, but {chain[0].name} has weights of its own. Use sampler=local.")
    return ServedSampler(settings.sampler, trunk, adapter_folders(policy))


def _scorer(session: Session, reward: Reward, roles: dict[str, Role]) -> Scorer:
    trunk, job = session.learner.trainee.trunk, session.job
    if reward.kind == "function":
        return FunctionReward(reward.name, reward.source, session.place)
    if reward.kind == "classifier":
        dtype = getattr(torch, job.dtype) if job.dtype not in (None, "nf4") else native_dtype(trunk.device)
        return ClassifierReward(reward.name, reward.source, dtype, trunk.device)
    if reward.kind == "judge":
        return JudgedReward(reward.name, _judge(session, reward), reward.source.settings)
    return TrunkReward(trunk, roles[reward.role])


def _judge(session: Session, reward: Reward) -> Judge:
    """The judge, on the policy's own trunk where that is what it stands on: the weights are not loaded twice."""
    job, trainee, spec = session.job, session.learner.trainee, reward.source.spec
    given = spec if isinstance(spec, str) else job.parents[reward.role] or job.base
    judge = open_judge(given, reward.source.settings, dtype=job.dtype)
    if isinstance(judge, LocalJudge) and root_identity(judge.base, judge.artifact) == root_identity(job.base, job.parents["policy"]):
        judge.stand_on(trainee.trunk, trainee.chat)
    return judge


def check_same_trunk(job: Job, reward_model: Artifact) -> None:
    """Refuse a reward model that stands on other weights than the policy.

    Raises:
        AlignError: with both and what to do.
    """
    policy_root, reward_root = (root_identity(job.base, artifact) for artifact in (job.parents["policy"], reward_model))
    if policy_root != reward_root:
        raise AlignError(
            f"{job.name}: the reward model {reward_model.name!r} stands on other weights ({reward_root[:20]}) "
            f"than the policy ({policy_root[:20]}); "
            "expected one base for both. Train the reward model with an adapter on the same policy: recipe.reward(policy=..., lora=Lora())."
        )


def add_value(trunk: Trunk, before: Role, settings: PPOSettings, reward: Role | None, artifact: Artifact | None) -> Role:
    """The value role ("critic"): a copy of the reward model's adapter, to be trained, and a head of zeros.

    Huang et al. 2024 (arXiv 2403.17031) copy the head too. A reward head has seen whole completions only: in the middle of a
    sentence it was off by 1.4 on average where scores vary by 0.4, and advantages were mostly its error. Scores are centred,
    so 0 is the best constant, and the adapter's features let the head learn fast. Without a reward model it is a fresh adapter.
    """
    under, lora = before.adapters, settings.lora.model_copy(update={"dropout": 0.0})
    if reward is not None and artifact is not None:
        under, lora = reward.adapters[:-1], Lora.model_validate(artifact.facts["settings"]["lora"] | {"dropout": 0.0}, strict=False)
    trunk.add_adapter(VALUE, lora, settings.seed)
    if reward is not None:
        trunk.copy_adapter(reward.adapters[-1], VALUE)
    trunk.heads[VALUE] = Head(trunk.hidden_size, scale=0.0).to(trunk.device)
    return Role((*under, VALUE), VALUE)
