"""`transformers serve` on the embedded model, started here on loopback, as an endpoint judge: in both orders, to its end."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from align.errors import AlignError
from align.judge.ask import judge_pairs
from align.judge.endpoint import KEYS
from align.judge.judgement import Pair
from align.judge.ledger import Ledger
from align.judge.open import open_judge
from align.prompts import PromptTemplate
from align.settings import JudgeSettings

SETTINGS = JudgeSettings(max_new_tokens=12, concurrency=2, timeout=120.0, max_unparsed=1.0, prompt_price=1.0, completion_price=2.0)
WORDS = ("Paris is the capital of France.", "I do not know.", "Blue is a colour.", "2 + 2 is 4.")


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    """No key and no proxy of whoever runs the tests."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def url(smollm2, tmp_path_factory):
    missing = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"transformers serve needs {', '.join(missing)}: pip install 'transformers[serving]'")
    with served(smollm2, tmp_path_factory.mktemp("served") / "server.log") as url:
        yield url


@contextmanager
def served(model, log):
    """The url of `transformers serve` for this model, on a free port of loopback; it is ended as by Ctrl-C."""
    command = [Path(sys.executable).parent / "transformers", "serve", model, "--host", "127.0.0.1", "--port", "0", "--dtype", "float32"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_COLOR": "1"}
    with log.open("w") as file:
        server = subprocess.Popen(map(str, command), stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + 300
        while not (found := re.search(r"running on (http://127\.0\.0\.1:\d+)", log.read_text())):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"{found[1]}/v1"
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def make_pairs():
    def said(text):
        return [{"role": "assistant", "content": text}]

    prompts = ("What is the capital of France?", "Name a colour.", "How much is 2 + 2?")
    return [Pair([{"role": "user", "content": prompt}], said(WORDS[i]), said(WORDS[i + 1])) for i, prompt in enumerate(prompts)]


def written_here(folder, template, questions):
    """What the model writes to each question, token by token the likeliest, without any server."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = []
    for question in questions:
        messages = template.fill(**question.fields())
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=SETTINGS.max_new_tokens)[0, inputs["input_ids"].shape[1] :]
        texts.append((tokenizer.decode(ids, skip_special_tokens=True).strip(), inputs["input_ids"].shape[1]))
    return texts


@pytest.mark.slow
def test_a_served_model_judges_pairs_in_both_orders(url, smollm2, tmp_path, capsys):
    pairs = make_pairs()
    judge = open_judge(f"{url}#{smollm2}", SETTINGS)
    with closing(Ledger(tmp_path / "ledger.sqlite")) as ledger:
        judgements = judge_pairs(judge, pairs, ledger, SETTINGS)
        assert judge_pairs(judge, pairs, ledger, SETTINGS, replay=True) == judgements
    assert capsys.readouterr().out.count("gives no log-probabilities") == 1
    replies = [reply for judgement in judgements for reply in judgement.replies]
    questions = [question for pair in pairs for question in pair.questions()]
    expected = written_here(smollm2, PromptTemplate.load(SETTINGS.template), questions)
    assert [(reply.raw.strip(), reply.prompt_tokens) for reply in replies] == expected
    for reply in replies:
        assert (reply.log_odds, reply.logprobs) == (None, None)
        assert 0 < reply.completion_tokens <= SETTINGS.max_new_tokens
        assert reply.price == pytest.approx((reply.prompt_tokens + 2 * reply.completion_tokens) / 1e6)
        assert reply.seconds > 0
    assert any(reply.said != "unparsed" for reply in replies)


@pytest.mark.slow
def test_a_model_that_the_server_does_not_have_is_named(url, tmp_path):
    judge = open_judge(f"{url}#another/model", SETTINGS)
    expected = r"endpoint http://127.0.0.1:\d+/v1, model 'another/model': HTTP 400: .*requested 'another/model'"
    with closing(Ledger(tmp_path / "ledger.sqlite")) as ledger, pytest.raises(AlignError, match=expected):
        judge_pairs(judge, make_pairs(), ledger, SETTINGS)
