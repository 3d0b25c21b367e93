"""A policy sampled by a server: a real one over HTTP, with vLLM's interface and the tiny model behind it."""

import gc
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import make_model, randomise

from align import Lora, Recipe
from align.artifact import Artifact
from align.errors import AlignError
from align.model.generate import sample
from align.model.served import ServedSampler
from align.model.trunk import Role, Trunk

STOPS = frozenset({1})


class Server(ThreadingHTTPServer):
    """Samples from whatever adapters it has been handed. `faults` maps a path's last part to (status, body) to answer instead."""

    def __init__(self, model=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.trunk, self.asked, self.faults = Trunk(model or make_model()), [], {}
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer(200, {"data": [{"id": "tiny"}]})

    def do_POST(self):
        what = self.path.rsplit("/", 1)[-1]
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((what, body))
        if what in self.server.faults:
            self.answer(*self.server.faults[what])
        elif what == "load_lora_adapter":
            self.server.trunk.load_adapter(body["lora_name"], Path(body["lora_path"]))
            self.answer(200, "Success: LoRA adapter added")
        elif what == "unload_lora_adapter":
            self.answer(200, "Success: LoRA adapter removed")
        else:
            self.answer(200, self.completions(body))

    def completions(self, body):
        with self.server.trunk.switched_to(Role((body["model"],))):
            found = sample(
                self.server.trunk.model,
                body["prompt"],
                body["n"],
                body["max_tokens"],
                body["temperature"],
                frozenset(body["stop_token_ids"]),
                body["seed"],
            )
        each = [completion for of_prompt in found for completion in of_prompt]
        return {
            "choices": [
                {
                    "index": i,
                    "token_ids": c.ids,
                    "logprobs": {"token_logprobs": c.logprobs},
                    "finish_reason": "stop" if c.ended else "length",
                }
                for i, c in reversed(list(enumerate(each)))
            ]
        }

    def answer(self, status, body):
        text = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def server():
    found = Server()
    yield found
    found.shutdown()


def stacked(trunk, tmp_path):
    """A policy of a trained adapter on a frozen one, and the folder of that one."""
    trunk.add_adapter("below", Lora(rank=3), 0)
    randomise(trunk, "below", seed=1)
    trunk.save_adapter("below", tmp_path / "below")
    trunk.add_adapter("ppo-new", Lora(rank=2), 0)
    randomise(trunk, "ppo-new", seed=2)
    return Role(("below", "ppo-new")), [tmp_path / "below"]


def test_the_server_samples_the_policy_as_it_is_now(server, trunk, tmp_path):
    role, below = stacked(trunk, tmp_path)
    sampler, prompts = ServedSampler(server.url, trunk, below), [(5, 6, 7), (9, 8)]
    for seed in (0, 1):
        randomise(trunk, "ppo-new", seed=seed + 5)
        served = sampler.sample(role, prompts, 2, 8, 0.7, STOPS, seed=seed)
        with trunk.switched_to(role):
            local = sample(trunk.model, prompts, 2, 8, 0.7, STOPS, seed)
        assert [[c.ids for c in cs] for cs in served] == [[c.ids for c in cs] for cs in local]
        assert [[c.ended for c in cs] for cs in served] == [[c.ended for c in cs] for cs in local]
        for ours, theirs in zip(local, served, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4, rtol=1e-4)
    handed = [(what, body["lora_name"]) for what, body in server.asked if what != "completions"]
    assert [what for what, _ in handed] == ["load_lora_adapter", "load_lora_adapter", "unload_lora_adapter"]
    assert handed[0][1] == handed[2][1] != handed[1][1]
    (request,) = [body for what, body in server.asked if what == "completions"][:1]
    assert (request["top_p"], request["top_k"], request["min_p"], request["repetition_penalty"]) == (1.0, 0, 0.0, 1.0)
    assert request["stop_token_ids"] == [1]
    folder = sampler.folder
    assert sorted(path.name for path in folder.iterdir()) == sorted([handed[1][1], "own"])
    del sampler
    gc.collect()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (
            {"load_lora_adapter": (404, "Not Found")},
            r"load_lora_adapter was refused \(404\): Not Found\n.*VLLM_ALLOW_RUNTIME_LORA_UPDATING=True",
        ),
        ({"completions": (400, '{"message": "max_tokens"}')}, r"completions was refused \(400\)"),
        ({"completions": (200, {"choices": []})}, r"gave 0 completions; expected 2"),
        ({"completions": (200, {"choices": [{"index": 0, "text": "red"}] * 2})}, r"a choice has no 'token_ids'; expected token_ids and"),
        ({"completions": (200, "garbage")}, r"a choice has no 'choices'"),
    ],
)
def test_a_server_that_cannot_be_sampled_from_is_told(server, trunk, tmp_path, fault, told):
    role, below = stacked(trunk, tmp_path)
    sampler = ServedSampler(server.url, trunk, below)
    server.faults = fault
    with pytest.raises(AlignError, match=f"(?s)sampler {server.url}: {told}"):
        sampler.sample(role, [(5, 6)], 2, 4, 0.7, STOPS, seed=0)


def test_where_no_server_answers_the_message_says_how_to_start_one(trunk):
    with pytest.raises(AlignError, match=r"(?s)no server answers there \(.*refused.*\)\. Start one: .*vllm serve.*sampler=local"):
        ServedSampler("http://127.0.0.1:9/v1", trunk, [])


def test_ppo_against_a_server(small_run, tiny_base, data, tmp_path):
    from transformers import AutoModelForCausalLM

    server = Server(AutoModelForCausalLM.from_pretrained(tiny_base))
    recipe = Recipe("served", base=str(tiny_base), dtype="float32")
    recipe.ppo(
        policy=recipe.load(small_run / "sft"),
        reward_model=recipe.load(small_run / "reward"),
        prompts=data / "prompts.jsonl",
        lora=Lora(rank=4),
        iterations=2,
        prompts_per_iteration=3,
        completions_per_prompt=4,
        epochs=2,
        minibatches=3,
        max_new_tokens=6,
        row_tokens=64,
        sampler=server.url,
    )
    run = recipe.run(tmp_path / "run")
    rounds = [json.loads(line) for line in (run / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert max(line["sampler_mismatch"] for line in rounds) < 1e-4
    assert rounds[0]["kl"] == 0
    assert Artifact.open(run / "ppo").facts["checks"]["ratio_off_1_at_start"] == 0
    server.shutdown()
