"""Labelling speed of a local judge, both orders of each pair, against two ways that transformers offers, in one run.

    python benchmarks/labelling.py                              about 5 minutes on two cores
    python benchmarks/labelling.py --data hh --pairs 16 --repetitions 3
    python benchmarks/labelling.py --written 64 --unsorted      as a plain script would do it

(a) writes the verdict: `generate` on padded batches, greedy, 16 tokens at most, then the text is read.
(b) reads log-probabilities: one padded forward pass for each order, logits of the last token only.

Both get questions sorted by length, so that little is padded, and the best of several batch sizes; all three tokenise what they are
given. The log-odds of ours and (b) are compared: they differ by rounding alone.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.base import find_base, local_model
from align.data.mix import load_data
from align.data.sources import Source
from align.judge.judgement import Pair, Question, Reply
from align.judge.local import LocalJudge
from align.judge.verdict import from_logprobs, read_reply
from align.prompts import PromptTemplate
from align.settings import JudgeSettings

ROOT = Path(__file__).resolve().parents[1]
SETS = {
    "preferences": ROOT / "datasets/preferences.jsonl",
    "hh": ROOT.parent / "shared/data/preference/hh_harmless_test_a.jsonl.gz",
}
BATCH_SIZES = (4, 8, 16)
TEMPLATE = PromptTemplate.load("prompts/judge_pair.txt")
Judging = Callable[[list[Question]], list[Reply]]


def questions_of(path: Path, pairs: int) -> list[Question]:
    data = load_data((Source(str(path)),), "preference", "labelling")
    rows = list(data.records())
    spread = [rows[i * len(rows) // pairs] for i in range(pairs)]
    return [question for row in spread for question in Pair(row["prompt"], row["chosen"], row["rejected"]).questions()]


def ours(judge: LocalJudge) -> Judging:
    def run(questions: list[Question]) -> list[Reply]:
        found: dict[int, Reply] = {}
        judge.ask(questions, found.__setitem__)
        return [found[i] for i in range(len(questions))]

    return run


class Transformers:
    """The same questions through transformers alone."""

    def __init__(self, folder: str, dtype: torch.dtype, written: int, is_sorted: bool):
        self.written, self.is_sorted = written, is_sorted
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.columns = {word: self.tokenizer.encode(word, add_special_tokens=False)[0] for word in TEMPLATE.answer_words}

    def _batches(self, questions: list[Question], size: int) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
        messages = [TEMPLATE.fill(**question.fields()) for question in questions]
        ids = [self.tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=False) for m in messages]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]) if self.is_sorted else i)
        for start in range(0, len(order), size):
            places = order[start : start + size]
            yield places, self.tokenizer.pad({"input_ids": [ids[i] for i in places]}, return_tensors="pt")

    def generate(self, size: int) -> Judging:
        """(a), some questions at a time."""

        @torch.inference_mode()
        def run(questions: list[Question]) -> list[Reply]:
            found: dict[int, Reply] = {}
            for places, batch in self._batches(questions, size):
                written = self.model.generate(
                    **batch, max_new_tokens=self.written, do_sample=False, pad_token_id=self.tokenizer.pad_token_id
                )
                texts = self.tokenizer.batch_decode(written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
                found |= {place: read_reply(text, TEMPLATE) for place, text in zip(places, texts, strict=True)}
            return [found[i] for i in range(len(questions))]

        return run

    def forward(self, size: int) -> Judging:
        """(b), some questions at a time."""

        @torch.inference_mode()
        def run(questions: list[Question]) -> list[Reply]:
            found: dict[int, Reply] = {}
            for places, batch in self._batches(questions, size):
                positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
                logits = self.model(**batch, position_ids=positions, use_cache=False, logits_to_keep=1).logits[:, -1].float()
                logprobs = logits.log_softmax(-1)[:, list(self.columns.values())].tolist()
                for place, row in zip(places, logprobs, strict=True):
                    found[place] = from_logprobs(dict(zip(self.columns, row, strict=True)), TEMPLATE)
            return [found[i] for i in range(len(questions))]

        return run


def timed(run: Judging, questions: list[Question]) -> tuple[float, list[Reply]]:
    begun = time.perf_counter()
    replies = run(questions)
    return time.perf_counter() - begun, replies


def best_size(way: Callable[[int], Judging], questions: list[Question]) -> int:
    return min(BATCH_SIZES, key=lambda size: timed(way(size), questions)[0])


def measure(name: str, path: Path, judge: LocalJudge, peer: Transformers, pairs: int, repetitions: int) -> dict:
    questions = questions_of(path, pairs)
    few = questions[:16]
    ours(judge)(few)
    peer.forward(4)(few[:4])
    sizes = {"a": best_size(peer.generate, few), "b": best_size(peer.forward, few)}
    ways = {"ours": ours(judge), "a": peer.generate(sizes["a"]), "b": peer.forward(sizes["b"])}
    times: dict[str, list[float]] = {way: [] for way in ways}
    said: dict[str, list[Reply]] = {}
    for _ in range(repetitions):
        for way, run in ways.items():
            took, said[way] = timed(run, questions)
            times[way].append(took)
    mine, theirs, written = said["ours"], said["b"], said["a"]
    odds = [(x.log_odds, y.log_odds) for x, y in zip(mine, theirs, strict=True)]
    differences = [abs(x - y) for x, y in odds if x is not None and y is not None]
    result = {
        "data": name,
        "pairs": pairs,
        "tokens_per_question": sum(reply.prompt_tokens or 0 for reply in mine) / len(mine),
        "batch_sizes": sizes,
        "pairs_per_second": {way: pairs / median(found) for way, found in times.items()},
        "seconds": times,
        "largest_difference_of_log_odds": max(differences, default=None),
        "spread_of_log_odds": max((abs(y.log_odds) for y in theirs if y.log_odds is not None), default=None),
        "unreadable_when_written": sum(reply.said == "unparsed" for reply in written) / len(written),
    }
    result["ratio"] = {way: median(t / o for t, o in zip(times[way], times["ours"], strict=True)) for way in ("a", "b")}
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--data", choices=list(SETS), action="append", help="only these; both unless given")
    parser.add_argument("--dtype", default=None, choices=["float32", "bfloat16"])
    parser.add_argument("--written", type=int, default=16, help="tokens that (a) may write; the embedded model answers in a sentence")
    parser.add_argument("--unsorted", action="store_true", help="batches of (a) and (b) as the questions come")
    options = parser.parse_args()
    base = find_base("embedded")
    judge = LocalJudge(base, None, TEMPLATE, JudgeSettings(), options.dtype)
    trunk = judge._loaded[0]
    peer = Transformers(local_model(base), trunk.model.dtype, options.written, not options.unsorted)
    results = []
    for name in options.data or SETS:
        path = SETS[name]
        if not path.is_file():
            print(f"{name}: not here ({path})")
            continue
        found = measure(name, path, judge, peer, options.pairs, options.repetitions)
        results.append(found)
        rate, ratio = found["pairs_per_second"], found["ratio"]
        print(
            f"{name}: {rate['ours']:.2f} pairs/s, both orders ({found['tokens_per_question']:.0f} tokens a question, {trunk.model.dtype}); "
            f"(a) generate {rate['a']:.2f}, so {ratio['a']:.1f} times as fast; "
            f"(b) padded forward {rate['b']:.2f}, so {ratio['b']:.2f} times; "
            f"log-odds differ from (b)'s by {found['largest_difference_of_log_odds']:.2g} at most; "
            f"{found['unreadable_when_written']:.0%} of what (a) wrote could not be read"
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
