"""From what a judge wrote, or from its log-probabilities, to a verdict. Pure, and strict: what is not clear is unparsed.

A written reply is read by what it says in so many words: the answer by itself, after the template's announcement ('Verdict: A'), in
double brackets, or declared ('Completion A is better'). Praise is no verdict, and a reply that says both is none either.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import lru_cache

from align.judge.judgement import Reply, Said
from align.prompts import PromptTemplate

FLOOR = 0.1  # the least that the answers' probabilities must add up to; below it the judge did not answer
# The answers of judges whose replies were recorded elsewhere: LLMBar's (a) and (b), MT-Bench's [[A]], [[B]] and [[C]], PandaLM's 1, 2, Tie.
RECORDED: tuple[tuple[Said, str], ...] = (("first", "a"), ("second", "b"), ("first", "1"), ("second", "2"), ("tie", "tie"), ("tie", "0"))

_NOUN = r"(?:(?:the )?(?:completion|response|reply|output|answer|option|assistant|model|candidate|choice)\s*#?)"
_LABEL = (
    r"(?:\b(?:the |my |final )*(?:answer|verdict|choice|decision|judge?ment|winner|preference|preferred|better|best)"
    rf"(?: (?:one|{_NOUN}))?(?: is|:)|\bI (?:would )?(?:choose|pick|prefer|select)\b)"
)
_OPEN, _CLOSE = r"[\s\"'`*_(\[{<“‘]*", r"[\s\"'`*_)\]}>”’]*"
_END = r"(?=$|[\n.,;:!?(\-–—]|(?:is|was|because|since|as)\b)"  # what may follow an answer: 'a concise reply' is none
_BETTER = r"(?:is|was|would be) (?:(?:clearly|slightly|definitely|significantly|much|far|indeed|overall|the) )*better\b(?! (?:if|when)\b)"
_DOUBTED = re.compile(r"\b(?:not|neither|nor|whether|if|unless|hardly|cannot|either)\b|n['’]t\b", re.IGNORECASE)
_CLAUSE = re.compile(r"[.,;:!?\n]|\b(?:and|but|so|because|that said)\b", re.IGNORECASE)


def read_reply(text: str, template: PromptTemplate) -> Reply:
    """What a judge wrote, read by the template it was asked with.

    Returns:
        A reply with what was said, and no log-probabilities. A score's `said` is 'tie', for it takes no side.
    """
    if template.kind == "score":
        score = read_score(text, template)
        return Reply("unparsed" if score is None else "tie", text, score=score)
    answers = tuple((said, word) for said, word in template.answers.items())
    said = _announced(text, answers, template.verdict) if template.verdict else _read(text, answers)
    return Reply(said, text)


def read_recorded(text: str) -> Said:
    """The verdict in a reply recorded elsewhere: 'Output (a)', 'Output (b) is better.', '[[A]]', '2', 'Tie'.

    Where LLMBar's phrase stands in it, it is read by that benchmark's own rule (princeton-nlp/LLMBar, LLMEvaluator/evaluate.py): the
    phrase alone decides, (a) before (b), whatever is around it. Its figures come out by no other.
    """
    for said, phrase in (("first", "Output (a) is better"), ("second", "Output (b) is better")):
        if phrase in text:
            return said  # type: ignore[return-value]
    return _read(text.replace("[[C]]", "[[tie]]"), RECORDED)


def read_score(text: str, template: PromptTemplate) -> float | None:
    """A score within the template's bounds: a number by itself, out of the highest ('7/10'), or after its announcement."""
    number = rf"(-?\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*{template.highest})?"
    if template.verdict:
        found = re.findall(rf"{_spaced(template.verdict)}{_OPEN}{number}{_CLOSE}(?=[.,;!]?(?:\s|$))", text, re.IGNORECASE)
        told = len(re.findall(_spaced(template.verdict), text, re.IGNORECASE))
        found = found if told == len(found) else []
    else:
        line = re.compile(rf"{_OPEN}(?:(?:score|rating)(?: is|:)?{_OPEN})?{number}{_CLOSE}\.?{_CLOSE}", re.IGNORECASE)
        found = [match[1] for match in map(line.fullmatch, _lines(text)[:1] + _lines(text)[-1:]) if match]
    scores = {float(n) for n in found}
    return scores.pop() if len(scores) == 1 and template.lowest <= min(scores) <= template.highest else None


def from_logprobs(logprobs: Mapping[str, float], template: PromptTemplate, raw: str = "", unseen: float | None = None) -> Reply:
    """The reply that the answers' log-probabilities give.

    Of a pair, the log-odds of the two answers, a tie's probability shared between them; of a score, its expectation. Where the
    answers' probabilities add up to less than FLOOR the judge did not answer, and the reply is unparsed.

    Args:
        logprobs: of the template's answer words, as far as they are known.
        template: says what the answers mean.
        raw: what the judge would write.
        unseen: an upper bound for answers that are not in `logprobs`, such as the smallest of the twenty best: it makes the
            odds no larger than they are. Without one they are taken for impossible, which a pair's answers cannot both be.
    """
    known = {word: logprobs[word] for word in template.answer_words if word in logprobs}
    kept = dict(known)
    if not known or sum(map(math.exp, known.values())) < FLOOR:
        return Reply("unparsed", raw, logprobs=kept or None)
    if unseen is not None:
        known |= {word: unseen for word in template.answer_words if word not in known}
    p = {word: math.exp(logprob) for word, logprob in known.items()}
    if template.kind == "score":
        return Reply("tie", raw, logprobs=kept, score=sum(int(word) * p[word] for word in p) / sum(p.values()))
    tie = known.get(template.tie or "", -math.inf)
    sides = [_log_sum(known.get(word, -math.inf), tie - math.log(2)) for word in (template.first, template.second)]
    if -math.inf in sides:
        return Reply("unparsed", raw, logprobs=kept)
    log_odds = sides[0] - sides[1]
    said: Said = "first" if log_odds > 0 else "second" if log_odds < 0 else "tie"
    if tie >= max(known.get(template.first, -math.inf), known.get(template.second, -math.inf)):
        said = "tie"
    return Reply(said, raw, log_odds=log_odds, logprobs=kept)


def answer_logprobs(tokens: Mapping[str, float], template: PromptTemplate) -> dict[str, float]:
    """Log-probabilities of the answers out of those of an endpoint's first token.

    Tokens that differ in white space around them count together. Empty where one answer begins another (1 and 10), or where the
    judge reasons first: the first token is no answer then.
    """
    words = template.answer_words
    if template.reasons or any(word != other and other.startswith(word) for word in words for other in words):
        return {}
    found: dict[str, float] = {}
    for token, logprob in tokens.items():
        if (word := token.strip()) in words:
            found[word] = _log_sum(found.get(word, -math.inf), logprob)
    return found


def _log_sum(x: float, y: float) -> float:
    """log(exp x + exp y)."""
    high, low = max(x, y), min(x, y)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _spaced(words: str) -> str:
    """A pattern for words of the user's, whatever white space and emphasis is around them; a colon may follow, or must if they have one."""
    plain, colon = words.rstrip(":"), ":" if words.endswith(":") else ":?"
    return r"[\s*_]*".join([*map(re.escape, plain.split()), colon]) + r"[\s*_]*"


@lru_cache(maxsize=64)
def _patterns(answers: tuple[tuple[Said, str], ...]) -> list[tuple[Said, dict[str, re.Pattern[str]]]]:
    """For each answer word the patterns of the ways to say it."""
    some = "|".join(re.escape(word) for _, word in answers)
    alternative = rf"(?!\s*[,/&]\s*(?:and |or )?{_NOUN}?{_OPEN}(?:{some})(?!\w))"
    found = []
    for said, word in answers:
        bare = rf"{_OPEN}{_NOUN}?{_OPEN}{re.escape(word)}(?!\w){_CLOSE}"
        answer = rf"{bare}{_END}{alternative}"
        # Without a noun before it a letter is read only as it is written, for 'a' is an article.
        named = rf"(?:(?i:{_NOUN}{_OPEN}{re.escape(word)})|(?<![\w(]){re.escape(word)})(?!\w){_CLOSE}"
        ways = {
            "alone": re.compile(rf"(?:{_OPEN}{_LABEL})?{answer}[.!]?{_CLOSE}", re.IGNORECASE),
            "leading": re.compile(rf"{bare}[.:](?:\s|$)", re.IGNORECASE),
            "bracketed": re.compile(rf"\[\[\s*{re.escape(word)}\s*\]\]", re.IGNORECASE),
            "labelled": re.compile(rf"{_LABEL}{answer}", re.IGNORECASE),
            "declared": re.compile(rf"{named}{_BETTER}"),
            "answer": re.compile(answer, re.IGNORECASE),
        }
        found.append((said, ways))
    return found


def _read(text: str, answers: tuple[tuple[Said, str], ...]) -> Said:
    """The one answer that a reply gives, or unparsed."""
    lines = _lines(text)
    patterns = _patterns(answers)
    told = {said for said, ways in patterns if ways["bracketed"].search(text) or _told(text, ways["labelled"], ways["declared"])}
    alone = {said for said, ways in patterns if any(ways["alone"].fullmatch(line) or ways["leading"].match(line) for line in lines)}
    if not (len(alone) > 1 and told):  # lines that begin with either are headings where something else is said
        told |= alone
    return told.pop() if len(told) == 1 else "unparsed"


def _told(text: str, *ways: re.Pattern[str]) -> bool:
    """Whether it is said in one of these ways, with no doubt cast on it in the clause before ('it is not clear that ...')."""
    matches = (match for way in ways for match in way.finditer(text))
    return any(not _DOUBTED.search(_CLAUSE.split(text[max(0, match.start() - 80) : match.start()])[-1]) for match in matches)


def _announced(text: str, answers: tuple[tuple[Said, str], ...], words: str) -> Said:
    """The answer after the announcement. Every announcement must be followed by the same one."""
    found: set[Said] = set()
    for announcement in re.finditer(_spaced(words), text, re.IGNORECASE):
        here = {said for said, ways in _patterns(answers) if ways["answer"].match(text, announcement.end())}
        found |= here or {"unparsed"}
    return found.pop() if len(found) == 1 else "unparsed"
