"""From what a user writes to a judge. Nothing is loaded before the judge is first asked."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

from align.artifact import FACTS, Artifact
from align.base import EMBEDDED, Base, find_base
from align.errors import AlignError, did_you_mean
from align.judge.judgement import Judge
from align.prompts import PromptTemplate
from align.settings import JudgeSettings

FORMS = (
    "Expected 'embedded' or another base, the folder of a stage that made a policy or a reward model (runs/rlhf/reward), or an endpoint "
    "with its model: 'http://localhost:8000/v1#name'."
)


def open_judge(
    spec: str | Path | Artifact | Base, settings: JudgeSettings, template: PromptTemplate | None = None, dtype: str | None = None
) -> Judge:
    """The judge that `spec` names.

    Args:
        spec: 'embedded' or another base, the folder of a stage that made a policy or a reward model, or an endpoint
            'http://host:port/v1#model'; or such an artifact or base itself.
        settings: how it is asked.
        template: what it is asked; that of the settings unless given. A reward model needs none.
        dtype: of a local judge's weights; the processor's native one unless given.

    Raises:
        AlignError: where it names nothing that can judge, or the template does not fit.
    """
    found = _artifact_or_base(spec) if isinstance(spec, str | Path) and not _is_url(spec) else spec
    if isinstance(found, Artifact) and found.kind == "reward_model":
        from align.judge.reward import RewardJudge

        return RewardJudge(found.base, found, settings, dtype)
    template = fitting_template(settings, template)
    if isinstance(found, Artifact | Base):
        from align.judge.local import LocalJudge

        if isinstance(found, Base):
            return LocalJudge(found, None, template, settings, dtype)
        if found.kind == "policy":
            return LocalJudge(found.base, found, template, settings, dtype)
        raise AlignError(f"judge {found.folder}: is the {found.kind.replace('_', ' ')} of a run, which cannot judge. {FORMS}")
    from align.judge.endpoint import EndpointJudge

    url, _, model = str(found).partition("#")
    if not model:
        parts = urlsplit(url)  # whose user and password stay out of the message
        raise AlignError(
            f"judge {parts.scheme}://{parts.hostname}: names no model; expected it after a '#': 'http://host:port/v1#name'. "
            "A server lists its models at /v1/models."
        )
    return EndpointJudge(url, model, template, settings)


def fitting_template(settings: JudgeSettings, template: PromptTemplate | None = None) -> PromptTemplate:
    """The judge's template, loaded, and checked against what will fill it.

    Raises:
        AlignError: where it is no judge's, or its fields don't fit; it uses $principle if, and only if, there is a constitution.
    """
    template = (template or PromptTemplate.load(settings.template)).expect("pair", "score")
    fields = ["prompt", *(["completion"] if template.kind == "score" else ["first", "second"])]
    if "principle" in template.fields and not settings.constitution:
        raise AlignError(
            f"{template.path}: uses $principle, but there is no constitution to draw one from.\n"
            "  Name one (constitution='prompts/constitution.txt'), or take a template without $principle (prompts/judge_pair.txt)."
        )
    template.check([*fields, *(["principle"] if settings.constitution else [])])
    return template


def judge_identity(spec: str) -> str:
    """What decides a judge's replies, for the identity of a stage: an endpoint's address and model, or the identity of what it names."""
    return spec if _is_url(spec) else _artifact_or_base(spec).identity


def _is_url(spec: str | Path) -> bool:
    return isinstance(spec, str) and re.match(r"https?://", spec) is not None


def _artifact_or_base(spec: str | Path) -> Artifact | Base:
    """What a path or a name stands for."""
    folder = Path(spec).expanduser()
    if (folder / FACTS).is_file():
        return Artifact.open(folder, verify=True)
    if folder.is_dir() and (stages := sorted(path.parent.name for path in folder.glob(f"*/{FACTS}"))):
        raise AlignError(f"judge {str(spec)!r}: is a run, not one of its stages; expected one of them, such as {folder / stages[0]}.")
    text = str(spec)
    if re.match(r"[\w.-]+:\d+(/|$)", text):
        raise AlignError(f"judge {text!r}: is no url. {FORMS} Did you mean 'http://{text}'?")
    try:
        return find_base(text)
    except AlignError as error:
        raise AlignError(f"judge {text!r}: {error}\n  {FORMS}{did_you_mean(text, [EMBEDDED])}") from None
