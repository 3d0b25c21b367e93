"""A tiny random model with a tokenizer of its own, built once; and small data files."""

import gc
import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are slower on two; `smollm2` takes all again
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

LONGEST = ("test_ppo_learning", "test_run", "test_ppo_recipe", "test_ppo", "test_cli", "test_export", "test_endpoint", "test_inspect")
LONGEST += ("test_processes", "test_data_in_recipes", "test_artifact", "test_harness", "test_label")


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that no process is left alone with one of them at the end."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def make_tokenizer():
    """A byte-level tokenizer with the control tokens of TEMPLATE; pad and end are different ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*special, *alphabet])}, merges=[]))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    fast.add_special_tokens({"additional_special_tokens": special[2:]})
    fast.chat_template = TEMPLATE
    return fast


def make_model(kind="llama", seed=0, **changes):
    """Two random layers, 64 wide, in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 261,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": None,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**sizes, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3 if "embed" in name else 0.15)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """A folder with the tiny model, as a recipe's base. It ends a turn within a few tokens, often but not always."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    model = make_model()
    model.get_input_embeddings().weight.data[model.config.eos_token_id] *= 2  # tied: what the logit of the end is made with
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def trunk():
    """The tiny model as a trunk of its own, to be changed at will."""
    from align.model.trunk import Trunk

    return Trunk(make_model())


@pytest.fixture(scope="session")
def chat(tiny_base):
    """The tiny tokenizer."""
    from align.chat import Chat

    return Chat.load(tiny_base)


@pytest.fixture(scope="session")
def smollm2():
    """The folder of the real model, converted once. From here on torch may use every core."""
    import torch

    from align.base import find_base, local_model

    torch.set_num_threads(os.cpu_count() or 1)
    return Path(local_model(find_base("embedded")))


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real data beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"real data is not here: {SHARED} is missing")
    return SHARED / "data"


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Small data files: chat.jsonl, preferences.jsonl, prompts.jsonl, heldout.jsonl."""
    folder = tmp_path_factory.mktemp("data")
    colours = ["red", "blue", "green", "grey", "pink", "black", "white", "brown", "gold", "teal", "plum", "lime"]
    user = [[{"role": "user", "content": f"say {colour}"}] for colour in colours]
    write_rows(
        folder / "chat.jsonl",
        [{"messages": [*u, {"role": "assistant", "content": c}]} for u, c in zip(user, colours, strict=True)],
    )
    write_rows(
        folder / "preferences.jsonl",
        [
            {
                "prompt": u,
                "chosen": [{"role": "assistant", "content": c}],
                "rejected": [{"role": "assistant", "content": c[::-1] + "?" * (i % 3)}],
                "chosen_probability": 1.0 if i % 4 else 0.8,
            }
            for i, (u, c) in enumerate(zip(user, colours, strict=True))
        ],
    )
    write_rows(folder / "prompts.jsonl", [{"prompt": u} for u in user[:8]])
    write_rows(folder / "heldout.jsonl", [{"prompt": u} for u in user[8:]])
    return folder


def said(capsys, *arguments):
    """Exit code, stdout and stderr of `align ARGUMENTS` in this process."""
    from align.cli import main

    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    streams = capsys.readouterr()
    return ended.value.code, streams.out, streams.err


def read_records(path, kind):
    """All records of a file, through the front door."""
    from align.data.mix import load_data
    from align.data.sources import Source

    return list(load_data((Source(str(path)),), kind, "test").records())


def heldout_records(path, kind, share, seed=0):
    """(place, record) of those that the split holds out."""
    from align.data.mix import is_heldout, load_data
    from align.data.sources import Source

    data = load_data((Source(str(path)),), kind, "test")
    held = is_heldout(data.column("key"), share, seed)
    return [(i, record) for i, record in enumerate(data.records()) if held[i]]


SMALL = {"batch_size": 4, "row_tokens": 64, "save_every": 1, "eval_every": 2, "holdout": 0.2}


def small_recipe(base, data, name="small", **recipe_settings):
    """Every stage on the tiny model: seconds in all."""
    from align import Lora, Recipe

    recipe = Recipe(name, base=str(base), dtype="float32", **recipe_settings)
    lora = Lora(rank=4)
    sft = recipe.sft(data=data / "chat.jsonl", lora=lora, **SMALL)
    reward = recipe.reward(policy=sft, preferences=data / "preferences.jsonl", lora=lora, **SMALL)
    dpo = recipe.dpo(policy=sft, preferences=data / "preferences.jsonl", lora=lora, **SMALL)
    ppo = recipe.ppo(
        policy=sft,
        reward_model=reward,
        prompts=data / "prompts.jsonl",
        lora=lora,
        iterations=3,
        prompts_per_iteration=4,
        completions_per_prompt=4,
        epochs=2,
        minibatches=3,
        max_new_tokens=12,
        row_tokens=64,
    )
    recipe.evaluate(policies=[recipe.base, sft, dpo, ppo], reward_model=reward, prompts=data / "heldout.jsonl", max_new_tokens=12)
    return recipe


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The tiny model's products are so small that a second thread only waits: on a busy machine, ten times the time."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def no_curves():
    """Drawing them is a third of the seconds of a tiny run. `finished` has them, from processes of its own."""
    from align import run

    run.draw = lambda *_: None
    gc.collect()
    gc.freeze()  # the libraries are garbage in no test: half a second of every stage's collection


def randomise(trunk, adapter, seed=0, spread=0.1):
    """Give an adapter's B random numbers, so that it changes something and A has gradients."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in trunk.parameters_of(adapter).items():
            if "lora_B" in name:
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))


def make_trainee(chat, lora=None, head=False, name="stage"):
    """A float32 trainee on the tiny model: a frozen random adapter `sft`, a fresh adapter on top, and perhaps a head."""
    import torch

    from align import Lora
    from align.model.load import Trainee
    from align.model.trunk import Head, Role, Trunk

    trunk = Trunk(make_model())
    trunk.add_adapter("sft", Lora(rank=4), seed=1)
    randomise(trunk, "sft", seed=1)
    trunk.add_adapter(name, lora or Lora(rank=4), seed=2)
    if head:
        torch.manual_seed(3)
        trunk.heads[name] = Head(trunk.hidden_size)
    parameters = trunk.parameters_of(name, name if head else None)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    trunk.set_dropout(False)
    return Trainee(trunk, chat, Role(("sft",)), Role(("sft", name), name if head else None), name, parameters)


@pytest.fixture(scope="session")
def small_run(tiny_base, data, tmp_path_factory):
    """The folder of `small_recipe`, run once in this process."""
    return small_recipe(tiny_base, data).run(tmp_path_factory.mktemp("small") / "run")


@pytest.fixture(scope="session")
def script(tiny_base, data, tmp_path_factory):
    """A recipe script: `small_recipe`, to be run from the command line."""
    path = tmp_path_factory.mktemp("script") / "small.py"
    path.write_text(
        f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\nfrom conftest import small_recipe\n"
        f"recipe = small_recipe({str(tiny_base)!r}, Path({str(data)!r}))\n"
        "if __name__ == '__main__':\n    recipe.main()\n"
    )
    return path


@pytest.fixture(scope="session")
def finished(script, tmp_path_factory):
    """The folder of a whole run of `small_recipe`, to be read only."""
    from processes import align

    folder = tmp_path_factory.mktemp("finished")
    ended = align("run", script, "--out", "small", folder=folder, curves=True)
    assert ended.code == 0, ended.err
    return folder / "small"


@pytest.fixture
def finished_copy(finished, tmp_path):
    """The same, to be changed."""
    import shutil

    return Path(shutil.copytree(finished, tmp_path / "small"))
