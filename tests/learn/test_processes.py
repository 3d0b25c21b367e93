"""Two real processes (gloo) share the rows of every optimizer step and end with the adapter of one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

SCRIPT = """
import os
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
sys.path.insert(0, sys.argv[1])
from conftest import make_model
from align.learn.optimise import train
from align.model.forward import forward
from align.model.packing import Example
from align.model.trunk import Role, Trunk
from align.progress import Meter
from align.settings import Lora, SFTSettings

folder = Path(sys.argv[2])
trunk = Trunk(make_model())
trunk.add_adapter("a-new", Lora(rank=4), 0)
parameters = trunk.parameters_of("a-new")
for p in parameters.values():
    p.requires_grad_(True)
generator = torch.Generator().manual_seed(0)
ids = lambda n: tuple(torch.randint(5, 261, (n,), generator=generator).tolist())
examples = [Example(i, ids(3 + i % 4), (ids(2 + i % 5),)) for i in range(12)]

class Objective:
    def totals(self, examples):
        return {"tokens": sum(e.trained_tokens for e in examples)}
    def __call__(self, row, totals):
        nll = -forward(trunk, Role(("a-new",)), row).logprobs.sum()
        return nll / totals["tokens"], {"nll": (float(nll), len(row.targets))}

settings = SFTSettings(batch_size=6, row_tokens=16, epochs=3.0, learning_rate=0.01)
work = folder / str(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0)
work.mkdir(parents=True, exist_ok=True)
train(Objective(), parameters, examples, [], settings, work, Meter("t", work, ()), ["x"] * 12)
rank = os.environ.get("RANK", 0)
save_file({n: p.detach().contiguous() for n, p in parameters.items()}, folder / f"adapter-{rank}.safetensors")
"""


def run(folder, world):
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for rank in range(world):
        more = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)} if world > 1 else {}
        command = [sys.executable, str(script), str(Path(__file__).parents[1]), str(folder)]
        started.append(subprocess.Popen(command, env={**env, **more}))
    assert [process.wait(timeout=200) for process in started] == [0] * world
    return [load_file(folder / f"adapter-{rank}.safetensors") for rank in range(world)]


def test_two_processes_learn_what_one_learns(tmp_path):
    (alone,) = run(tmp_path / "one", 1)
    first, second = run(tmp_path / "two", 2)
    for name in alone:
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], alone[name], rtol=1e-4, atol=1e-6)
    assert any(float(tensor.abs().max()) > 1e-3 for name, tensor in alone.items() if "lora_B" in name)
