import json
import shutil
import sys
from pathlib import Path

import psutil
import pytest
import torch
from conftest import make_model, small_recipe, write_rows
from processes import align

from align import Lora, memory
from align.base import find_base
from align.errors import AlignError
from align.model import gated
from align.model.forward import forward
from align.model.generate import ROOM, SEQUENCES
from align.model.packing import Example, make_row
from align.model.trunk import Role, native_dtype
from align.plan import make_plan
from align.show import show_plan


@pytest.fixture(scope="module")
def shape(tiny_base):
    return memory.shape_of(find_base(str(tiny_base)))


def bytes_of(recipe, folder="never", dtype="float32"):
    return memory.estimates(make_plan(recipe, Path(folder)), dtype)


# The shape --------------------------------------------------------------------------------------------------------------------


def test_the_shape_is_the_model_s(shape):
    model = make_model()
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    linear = [module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "layers" in name]
    assert sum(n * m for _, n, m in shape.linear) == sum(module.weight.numel() for module in linear)
    assert (shape.layers, shape.hidden, shape.intermediate, shape.queries, shape.keys, shape.vocabulary) == (2, 64, 96, 64, 32, 261)


@pytest.mark.parametrize("lora", [Lora(rank=4), Lora(rank=3, dora=True), Lora(rank=2, targets=("q_proj", "down_proj"))], ids=str)
def test_an_adapter_has_as_many_numbers_as_peft_gives_it(lora, shape, trunk):
    trunk.add_adapter("mine", lora, seed=0)
    assert shape.adapter(lora) == sum(parameter.numel() for parameter in trunk.parameters_of("mine").values())


def test_a_training_step_keeps_the_activations_that_are_counted(shape, trunk, monkeypatch):
    trunk.add_adapter("mine", Lora(rank=4), seed=0)
    for parameter in trunk.parameters_of("mine").values():
        parameter.requires_grad_(True)
    weights = {parameter.untyped_storage().data_ptr() for parameter in trunk.model.parameters()}
    row = make_row([Example(i, tuple(range(5, 69)), (tuple(range(5, 69)),)) for i in range(4)])
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks

    def within(pack, unpack):  # of hooks within hooks only the inner ones are called
        return hooks(lambda tensor: keep(left) if isinstance(left := pack(tensor), torch.Tensor) else left, unpack)

    monkeypatch.setattr(gated, "saved_tensors_hooks", within)
    with hooks(keep, lambda tensor: tensor):
        forward(trunk, Role(("mine",)), row)
    held = sum(size for size, _ in kept.values()) / len(row.ids)
    assert held == pytest.approx(shape.activations(ranks=7 * 4, itemsize=4), rel=0.25)  # with what is not of a layer


@pytest.mark.skipif(sys.platform != "linux", reason="memory is given back where the C library is glibc")
def test_freed_memory_goes_back_to_the_system():
    """The newest piece lies on top of 200 MB of freed ones, which by itself would keep them all."""
    pieces = [bytearray(100_000) for _ in range(2000)]
    newest = pieces.pop()
    del pieces
    before = psutil.Process().memory_info().rss
    memory.give_back_memory()
    assert psutil.Process().memory_info().rss < before - 100e6
    assert len(newest) == 100_000


@pytest.mark.parametrize("damage", ["a config of another kind", "weights cut short", "no numbers of heads"])
def test_a_base_of_another_layout_has_no_shape_and_no_estimate(damage, tiny_base, data, tmp_path):
    base = find_base(str(tiny_base))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_base / name).read_bytes())
    if damage == "weights cut short":
        (tmp_path / "model.safetensors").write_bytes(b"\x08")
    elif damage == "a config of another kind":
        (tmp_path / "config.json").write_text("[1, 2]")
    else:
        config = (tmp_path / "config.json").read_text().replace("num_attention_heads", "heads")
        (tmp_path / "config.json").write_text(config)
    assert memory.shape_of(type(base)(base.source, "folder", str(tmp_path), None, base.identity)) is None


def test_what_is_known_without_torch_is_what_the_model_path_does():
    assert (memory.SIDE_BY_SIDE, memory.ROOM) == (SEQUENCES, ROOM)
    assert memory._computes_in_bfloat16(None) == (native_dtype(torch.device("cpu")) == torch.bfloat16)


# The estimate -----------------------------------------------------------------------------------------------------------------


def test_what_needs_more_is_expected_to(tiny_base, data):
    def need(stage, *overrides):
        recipe = small_recipe(tiny_base, data)
        for text in overrides:
            recipe.override(text)
        return bytes_of(recipe)[stage]

    plain = need("sft")
    assert need("sft", "sft.row_tokens=512") > plain > need("sft", "sft.row_tokens=32")
    assert need("sft", "sft.row_tokens=8192") == need("sft", "sft.row_tokens=4096")  # which no step fills
    assert need("sft", "sft.row_tokens=8192", "sft.batch_size=12") > need("sft", "sft.row_tokens=8192")
    assert need("sft", "sft.row_tokens=8192", "sft.max_length=16") < need("sft", "sft.row_tokens=8192")
    assert need("sft", "sft.lora.rank=64") > plain > need("sft", "sft.gradient_checkpointing=true")
    assert need("sft", "sft.lora=none") > plain
    assert need("reward") > need("dpo", "sft.lora.rank=1")
    assert need("ppo") > need("ppo", "ppo.estimator=rloo")
    assert need("ppo") > need("ppo", "ppo.merged_sampler=false")
    assert need("evaluate", "evaluate.best_of=16") > need("evaluate")


def test_long_prompts_take_more_up_to_those_that_are_left_out(tiny_base, data, tmp_path):
    def need(words, *overrides):
        for name in ("chat", "preferences"):
            shutil.copy(data / f"{name}.jsonl", tmp_path)
        rows = [{"prompt": [{"role": "user", "content": f"{i} " + "red " * words}]} for i in range(4)]
        for name in ("prompts", "heldout"):
            write_rows(tmp_path / f"{name}.jsonl", rows)
        recipe = small_recipe(tiny_base, tmp_path)
        recipe.sample(policy=recipe.base, prompts=tmp_path / "prompts.jsonl")
        for text in overrides:
            recipe.override(text)
        return bytes_of(recipe)

    short, long = need(10), need(400)
    assert all(long[stage] > short[stage] for stage in ("ppo", "evaluate", "sample"))
    assert long["sft"] == short["sft"]
    left_out = need(400, "ppo.max_prompt_tokens=100", "sample.max_prompt_tokens=100")
    assert left_out["ppo"] == short["ppo"]
    assert left_out["sample"] < long["sample"]
    assert need(400, "evaluate.max_prompts=1")["evaluate"] < long["evaluate"]


def test_four_bits_take_less_than_sixteen_and_those_less_than_thirty_two(tiny_base, data):
    recipe = small_recipe(tiny_base, data)
    four, sixteen, all_of_them = (bytes_of(recipe, dtype=dtype)["evaluate"] for dtype in ("nf4", "bfloat16", "float32"))
    assert sixteen < all_of_them
    assert four < all_of_them


def test_stages_of_which_nothing_is_known_are_left_out(tiny_base, data):
    recipe = small_recipe(tiny_base, data)
    recipe.label(completions=recipe.sample(policy=recipe.base, prompts=data / "prompts.jsonl"), judge=recipe.base, trust_judge=True)
    assert set(bytes_of(recipe)) == {"sft", "reward", "dpo", "ppo", "evaluate", "sample"}


def test_on_a_machine_with_a_gpu_nothing_is_claimed(tiny_base, data, monkeypatch):
    monkeypatch.setattr(memory, "_has_gpu", lambda: True)
    assert bytes_of(small_recipe(tiny_base, data)) == {}


def test_a_plan_shows_what_was_measured_of_what_is_done_and_about_what_the_rest_needs(tiny_base, data, finished, capsys):
    recipe = small_recipe(tiny_base, data)
    recipe.override("ppo.iterations=9")
    plans = make_plan(recipe, finished)
    show_plan(recipe, plans, finished)
    shown = "".join(capsys.readouterr().out.split())
    needed = memory.estimates(plans, "float32")
    assert f"{plans[0].former.facts['peak_memory_gb']:.2f}GB" in shown
    assert shown.count("about") == 3  # ppo's and evaluate's memory, and the minutes
    assert f"{needed['ppo'] / 1e9:.1f}" in shown


# Too little of it -------------------------------------------------------------------------------------------------------------


def test_a_stage_that_would_not_fit_is_refused_before_anything_is_loaded(tiny_base, data, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 0.3e9)
    recipe = small_recipe(tiny_base, data)
    recipe.override("sft.gradient_checkpointing=false")
    plans = make_plan(recipe, tmp_path)
    with pytest.raises(AlignError) as refusal:
        memory.fit_memory(plans, "float32")
    needed = memory.estimates(plans, "float32")["sft"]
    assert str(refusal.value) == (
        f"sft: needs about {needed / 1e9:.1f} GB of memory, and 0.3 GB are free. Close other programs, or have it need less: "
        "--set sft.gradient_checkpointing=true, --set recipe.quantize=nf4."
    )


def test_a_run_says_so_too_and_ends_with_exit_code_2(script, tmp_path):
    ended = align("run", script, "--out", "out", "--set", "sft.row_tokens=4096", folder=tmp_path, before=_little_memory)
    assert ended.code == 2
    assert "error: sft: needs about" in ended.err
    assert "--set sft.row_tokens=2048" in ended.err
    assert not (tmp_path / "out" / "sft").exists()


def _little_memory():
    memory.available_memory = lambda: 0.2e9


def test_a_stage_that_may_not_fit_is_a_warning(tiny_base, data, tmp_path, monkeypatch, capsys):
    plans = make_plan(small_recipe(tiny_base, data), tmp_path)
    needed = memory.estimates(plans, "float32")
    monkeypatch.setattr(memory, "available_memory", lambda: max(needed.values()) / 1.1)
    memory.fit_memory(plans, "float32")
    assert "of memory, and" in capsys.readouterr().out


def test_a_stage_that_fits_with_less_is_run_with_less(tiny_base, data, tmp_path, monkeypatch, capsys):
    recipe = small_recipe(tiny_base, data)
    recipe.override("sft.row_tokens=16384")
    recipe.override("sft.batch_size=64")
    plans = make_plan(recipe, tmp_path)
    plain = memory.estimates(plans, "float32")["sft"]
    recipe.override("sft.gradient_checkpointing=true")
    less = memory.estimates(make_plan(recipe, tmp_path), "float32")["sft"]
    monkeypatch.setattr(memory, "available_memory", lambda: (plain + less) / 2)
    fitted = memory.fit_memory(plans, "float32")
    assert [planned.stage.settings.gradient_checkpointing for planned in fitted[:4]] == [True, None, None, None]
    assert [planned.identity for planned in fitted] == [planned.identity for planned in plans]
    told = " ".join(capsys.readouterr().out.split())
    assert f"sft: would need about {plain / 1e9:.1f} GB of memory, and {(plain + less) / 2e9:.1f} GB are free." in told
    assert f"With gradient_checkpointing it needs {less / 1e9:.1f} GB" in told


def test_a_run_with_little_memory_makes_the_same_bytes(tiny_base, data, small_run, tmp_path, monkeypatch):
    recipe = small_recipe(tiny_base, data)
    needed = memory.estimates(make_plan(recipe, tmp_path), "float32")
    monkeypatch.setattr(memory, "available_memory", lambda: 0.95 * min(needed.values()))
    run = recipe.run(tmp_path / "little")
    for stage in ("sft", "reward", "dpo", "ppo"):
        assert json.loads((run / stage / "artifact.json").read_text())["settings"]["gradient_checkpointing"] is True
        for file in sorted((small_run / stage).rglob("*.safetensors")):
            assert (run / file.relative_to(small_run)).read_bytes() == file.read_bytes(), file


def test_enough_memory_or_an_unknown_amount_is_no_matter(tiny_base, data, tmp_path, monkeypatch, capsys):
    plans = make_plan(small_recipe(tiny_base, data), tmp_path)
    for there in (64e9, None):
        monkeypatch.setattr(memory, "available_memory", lambda there=there: there)
        memory.fit_memory(plans, "float32")
    assert capsys.readouterr().out == ""


def test_memory_that_is_there_is_no_more_than_the_machine_has():
    there = memory.available_memory()
    assert there is None or 0 < there < 1e13


def test_a_container_s_limit_counts_and_its_cached_files_do_not(tmp_path):
    assert memory._left_of_limit(tmp_path) == float("inf")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("3000000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 500000000\n")
    assert memory._left_of_limit(tmp_path) == float("inf")
    (tmp_path / "memory.max").write_text("4000000000\n")
    assert memory._left_of_limit(tmp_path) == 1.5e9
