"""TRL's own trainers as oracles: the same rows and the same LoRA weights give the same loss and the same gradients.

Run with -s to see the largest differences. TRL pads every sequence on the right and computes each prompt once a completion.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import randomise, read_records
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from align import Lora
from align.chat import Chat
from align.learn.optimise import train
from align.model.load import Trainee
from align.model.packing import make_row, pack
from align.model.trunk import Head, Role, Trunk
from align.progress import Meter
from align.settings import DPOSettings, RewardSettings, SFTSettings
from align.stages.dpo import DirectPreference, reference_logps
from align.stages.reward import BradleyTerry
from align.stages.sft import Likelihood
from datasets import Dataset

TURNS = [
    ["hi", "hello"],
    ["what is red?", "a colour", "and blue?", "another", "and ten?", "a number of things"],
    ["say nothing", "no", "please", "well then"],
    ["one more", "a somewhat longer answer than the others"],
]
PAIRS = [("red", "der"), ("blue", "eulb eulb"), ("a longer reply", "no"), ("grey", "gray")]
MARGINS = [0.0, 0.5, 1.0, -0.25]
ASSISTANT_TURNS_MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    "{{ '\\n' }}{% else %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
DPO_LOSSES = ["sigmoid", "ipo", "hinge", "apo_zero", "sigmoid_norm"]
SURE = 0.8  # the uniform probability of the soft-label comparison


def conversation_rows():
    return [{"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]} for turns in TURNS]


def preference_rows():
    return [
        {
            "prompt": [{"role": "user", "content": f"say {i}"}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
            "margin": margin,
        }
        for i, ((chosen, rejected), margin) in enumerate(zip(PAIRS, MARGINS, strict=True))
    ]


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def four_rows(path, longest, fits):
    """The first four rows of a data file that are short enough."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if len(json.dumps(row)) < longest and fits(row)][:4]


@pytest.fixture(scope="session")
def tiny(tiny_base):
    """The tiny model with the rows above."""
    return SimpleNamespace(folder=tiny_base, chat=Chat.load(tiny_base), conversations=conversation_rows(), pairs=preference_rows())


@pytest.fixture(scope="session")
def smol(smollm2):
    """SmolLM2-135M-Instruct in float32 with four rows each of datasets/; the conversations include one of several turns."""
    datasets = Path(__file__).parents[2] / "datasets"
    several = four_rows(datasets / "chat.jsonl", 500, lambda row: len(row["messages"]) > 2)[:2]
    one = four_rows(datasets / "chat.jsonl", 500, lambda row: len(row["messages"]) == 2)[:2]
    pairs = four_rows(datasets / "preferences.jsonl", 450, lambda row: True)
    pairs = [{**row, "margin": margin} for row, margin in zip(pairs, MARGINS, strict=True)]
    return SimpleNamespace(folder=smollm2, chat=Chat.load(smollm2), conversations=several + one, pairs=pairs)


# Both sides -------------------------------------------------------------------------------------------------------------


def make_trainee(case, head=False):
    """An adapter with random A and B on the base; the reference is the base."""
    trunk = Trunk.load(case.folder, torch.float32)
    trunk.add_adapter("stage", Lora(rank=4, alpha=8.0), seed=0)
    randomise(trunk, "stage", seed=1, spread=0.05)
    if head:
        torch.manual_seed(2)
        trunk.heads["stage"] = Head(trunk.hidden_size)
    parameters = trunk.parameters_of("stage", "stage" if head else None)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return Trainee(trunk, case.chat, Role(), Role(("stage",), "stage" if head else None), "stage", parameters)


def trl_trainer(kind, config, case, rows, folder, trainee, tokenizer=None, **settings):
    """TRL's trainer on the same model, with the trainee's LoRA weights (and head) copied in."""
    arguments = config(
        output_dir=str(folder),
        per_device_train_batch_size=len(rows),
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        max_length=None,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="SEQ_CLS" if kind is RewardTrainer else "CAUSAL_LM",
    )
    trainer = kind(
        model=str(case.folder),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer or AutoTokenizer.from_pretrained(case.folder),
        peft_config=lora,
    )
    with torch.no_grad():
        for name, theirs in their_parameters(trainer, trainee).items():
            theirs.copy_(trainee.parameters[name].view(theirs.shape))
    return trainer


def their_parameters(trainer, trainee):
    """TRL's trained parameters under our names."""
    found = {}
    for name in trainee.parameters:
        theirs = "score.modules_to_save.default.weight" if name.startswith("head.") else name.replace(".stage.", ".default.")
        found[name] = trainer.model.get_parameter("base_model.model." + theirs)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert len(trained) == len(found)
    return found


def their_step(trainer, trainee):
    """Loss and gradients of TRL's own loss on the whole data set, through its data loader and collator."""
    trainer.model.train().zero_grad()
    (batch,) = list(trainer.get_train_dataloader())
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
    loss.backward()
    return float(loss.detach()), {name: parameter.grad.flatten().clone() for name, parameter in their_parameters(trainer, trainee).items()}


def our_step(objective, trainee, examples):
    """The same of one packed row, or as many as fit."""
    totals, loss = objective.totals(examples), 0.0
    for row in pack(examples, 1024):
        share, _ = objective(row, totals)
        share.backward()
        loss += float(share.detach())
    gradients = {name: parameter.grad.flatten().clone() for name, parameter in trainee.parameters.items()}
    for parameter in trainee.parameters.values():
        parameter.grad = None
    return loss, gradients


def compare(what, ours, theirs, relative=1e-4):
    """Loss within 1e-5, and every parameter's gradient within `relative` of its largest element."""
    (loss, gradients), (their_loss, their_gradients) = ours, theirs
    scales = {name: float(gradient.abs().max()) for name, gradient in their_gradients.items()}
    off = {name: float((gradients[name] - gradient).abs().max()) / scales[name] for name, gradient in their_gradients.items()}
    print(f"\nparity {what}: loss {loss:.6f}, off {abs(loss - their_loss):.1e}; {len(off)} gradients, off {max(off.values()):.1e} relative")
    assert loss == pytest.approx(their_loss, abs=1e-5, rel=1e-5)
    assert min(scales.values()) > 0
    assert max(off.values()) <= relative, max(off, key=off.get)


# The cases --------------------------------------------------------------------------------------------------------------


def sft_case(case, folder):
    """TRL renders, tokenises and masks the conversations itself where the template marks the assistant's turns."""
    rows = read_records(written(folder / "chat.jsonl", case.conversations), "conversation")
    examples = [case.chat.conversation(i, row["messages"]) for i, row in enumerate(rows)]
    trainee = make_trainee(case)
    return trainee, examples, Likelihood(trainee)


def preference_examples(case, folder, probability=1.0):
    rows = read_records(written(folder / "pairs.jsonl", [{**row, "chosen_probability": probability} for row in case.pairs]), "preference")
    return rows, [case.chat.preference(i, row["prompt"], row["chosen"], row["rejected"]) for i, row in enumerate(rows)]


def labels(rows, name):
    return torch.tensor([float(row[name]) for row in rows])


def text_pairs(case):
    """Prompt, chosen and rejected as text, each reply up to and with the token that ends it; TRL tokenises them."""
    tokenizer = case.chat.tokenizer
    end = tokenizer.convert_ids_to_tokens(case.chat.end_of_turn)
    return [
        {
            "prompt": tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True),
            "chosen": row["chosen"][0]["content"] + end,
            "rejected": row["rejected"][0]["content"] + end,
            "margin": row["margin"],
        }
        for row in case.pairs
    ]


def assert_same_tokens(trainer, examples):
    """TRL's pairs are ours, to the id."""
    for theirs, ours in zip(trainer.train_dataset, examples, strict=True):
        prompt = tuple(theirs.get("prompt_ids", ()))
        for side, completion in zip(("chosen_ids", "rejected_ids"), ours.completions, strict=True):
            assert prompt + tuple(theirs[side]) == ours.prompt + completion


def dpo_objective(trainee, rows, examples, folder, **settings):
    settings = DPOSettings(**settings)
    reference = reference_logps(trainee, [make_row([example]) for example in examples], len(rows), folder / "reference.safetensors")
    return DirectPreference(trainee, labels(rows, "chosen_probability"), reference, settings)


def reward_objective(trainee, rows, margins=True):
    settings = RewardSettings(margins=margins, centering=0.05)
    return BradleyTerry(trainee, labels(rows, "chosen_probability"), labels(rows, "margin"), settings)


def soft_sigmoid(probability):
    """TRL has no label smoothing for its sigmoid loss, but mixes losses: 2 p S - (2 p - 1) R is p S + (1 - p) F.

    S is the loss of the pair, F that of the swapped pair, R = (p S - (1 - p) F) / (2 p - 1) TRL's `robust` with smoothing 1 - p.
    """
    return {"loss_type": ["sigmoid", "robust"], "loss_weights": [2 * probability, 1 - 2 * probability], "label_smoothing": 1 - probability}


# Tiny model, float32 ------------------------------------------------------------------------------------------------------


def test_sft_is_trl_s_assistant_only_loss(tiny, tmp_path):
    """TRL gets the messages; its tokens and its assistant mask are ours, but for the newline after the last turn."""
    trainee, examples, objective = sft_case(tiny, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder)
    tokenizer.chat_template = ASSISTANT_TURNS_MARKED
    settings = {"assistant_only_loss": True}
    trainer = trl_trainer(SFTTrainer, SFTConfig, tiny, tiny.conversations, tmp_path, trainee, tokenizer, **settings)
    newline = tokenizer.encode("\n")
    for theirs, ours in zip(trainer.train_dataset, examples, strict=True):
        assert theirs["input_ids"] == [*ours.prompt, *ours.completions[0], *newline]
        assert [label != -100 for label in theirs["labels"]] == [*[False] * len(ours.prompt), *ours.trained[0], False]
    compare("sft, tiny", our_step(objective, trainee, examples), their_step(trainer, trainee))


@pytest.mark.parametrize("margins", [False, True])
def test_the_reward_model_is_trl_s(margins, tiny, tmp_path):
    """TRL pools the last token that is not padding, a token of its own here; its score layer is our head."""
    rows, examples = preference_examples(tiny, tmp_path)
    trainee = make_trainee(tiny, head=True)
    texts = [{k: v for k, v in row.items() if margins or k != "margin"} for row in text_pairs(tiny)]
    trainer = trl_trainer(RewardTrainer, RewardConfig, tiny, texts, tmp_path, trainee, center_rewards_coefficient=0.05)
    assert_same_tokens(trainer, examples)
    assert trainer.processing_class.pad_token_id != tiny.chat.end_of_turn
    ours = our_step(reward_objective(trainee, rows, margins), trainee, examples)
    compare(f"reward{', margins' if margins else ''}, tiny", ours, their_step(trainer, trainee))


@pytest.mark.parametrize("loss", DPO_LOSSES)
def test_dpo_losses_are_trl_s(loss, tiny, tmp_path):
    """TRL's reference is the base with its adapter off, as ours here."""
    rows, examples = preference_examples(tiny, tmp_path)
    trainee = make_trainee(tiny)
    trainer = trl_trainer(DPOTrainer, DPOConfig, tiny, text_pairs(tiny), tmp_path, trainee, loss_type=[loss], beta=0.3)
    assert_same_tokens(trainer, examples)
    objective = dpo_objective(trainee, rows, examples, tmp_path, loss=loss, beta=0.3)
    compare(f"dpo {loss}, tiny", our_step(objective, trainee, examples), their_step(trainer, trainee))


def test_dpo_with_soft_labels_is_trl_s_label_smoothing(tiny, tmp_path):
    rows, examples = preference_examples(tiny, tmp_path, SURE)
    trainee = make_trainee(tiny)
    trainer = trl_trainer(DPOTrainer, DPOConfig, tiny, text_pairs(tiny), tmp_path, trainee, beta=0.3, **soft_sigmoid(SURE))
    objective = dpo_objective(trainee, rows, examples, tmp_path, loss="sigmoid", beta=0.3)
    compare(f"dpo sigmoid, probability {SURE}, tiny", our_step(objective, trainee, examples), their_step(trainer, trainee))


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_three_steps_of_training_move_the_adapter_as_trl_s_do(kind, tiny, tmp_path):
    """The whole loops: AdamW, linear decay, gradients clipped to norm 1. Each step is one batch of all rows."""
    schedule = {"learning_rate": 1e-3, "max_grad_norm": 1.0, "weight_decay": 0.01}
    theirs = {**schedule, "max_steps": 3, "lr_scheduler_type": "linear", "warmup_steps": 0}
    ours = {**schedule, "epochs": 3.0, "batch_size": 4, "warmup": 0.0, "decay": "linear"}
    trainee = make_trainee(tiny, head=kind == "reward")
    rows, examples = preference_examples(tiny, tmp_path)
    if kind == "sft":
        examples = sft_case(tiny, tmp_path)[1]
        tokenizer = AutoTokenizer.from_pretrained(tiny.folder)
        tokenizer.chat_template = ASSISTANT_TURNS_MARKED
        trainer = trl_trainer(
            SFTTrainer, SFTConfig, tiny, tiny.conversations, tmp_path, trainee, tokenizer, assistant_only_loss=True, **theirs
        )
        objective, settings = Likelihood(trainee), SFTSettings(**ours)
    elif kind == "reward":
        trainer = trl_trainer(
            RewardTrainer, RewardConfig, tiny, text_pairs(tiny), tmp_path, trainee, center_rewards_coefficient=0.05, **theirs
        )
        objective, settings = reward_objective(trainee, rows), RewardSettings(**ours)
    else:
        trainer = trl_trainer(DPOTrainer, DPOConfig, tiny, text_pairs(tiny), tmp_path, trainee, beta=0.3, **theirs)
        objective, settings = dpo_objective(trainee, rows, examples, tmp_path, beta=0.3), DPOSettings(**ours)
    start = {name: parameter.detach().flatten().clone() for name, parameter in trainee.parameters.items()}
    trainer.train()
    folder = tmp_path / "ours"
    folder.mkdir()
    train(objective, trainee.parameters, examples, [], settings, folder, Meter(kind, folder, ()), ["x"] * 4)
    worst = 0.0
    for name, parameter in their_parameters(trainer, trainee).items():
        moved, expected = trainee.parameters[name].detach().flatten() - start[name], parameter.detach().flatten() - start[name]
        assert float(expected.norm()) > 0
        worst = max(worst, float((moved - expected).norm() / expected.norm()))
    print(f"\nparity {kind}, three steps of training, tiny: moved weights off {worst:.1e} relative")
    assert worst < 1e-2


# SmolLM2-135M-Instruct, float32 ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sft_on_smollm2_is_trl_s(smol, tmp_path):
    """The template marks no turns of the assistant, so TRL gets ids and labels; the ids are the template's, but for its last newline."""
    trainee, examples, objective = sft_case(smol, tmp_path)
    for row, e in zip(smol.conversations, examples, strict=True):
        whole = smol.chat.tokenizer.apply_chat_template(row["messages"], return_dict=False)
        assert whole[:-1] == [*e.prompt, *e.completions[0]]
    rows = [
        {
            "input_ids": [*e.prompt, *e.completions[0]],
            "labels": [-100] * len(e.prompt) + [i if counts else -100 for i, counts in zip(e.completions[0], e.trained[0], strict=True)],
        }
        for e in examples
    ]
    trainer = trl_trainer(SFTTrainer, SFTConfig, smol, rows, tmp_path, trainee)
    compare("sft, SmolLM2", our_step(objective, trainee, examples), their_step(trainer, trainee))


@pytest.mark.slow
def test_the_reward_model_on_smollm2_is_trl_s(smol, tmp_path):
    """SmolLM2 pads with its end-of-turn token, which TRL would then never pool: padding gets a token of its own."""
    rows, examples = preference_examples(smol, tmp_path)
    trainee = make_trainee(smol, head=True)
    settings = {"center_rewards_coefficient": 0.05, "pad_token": "<|endoftext|>"}
    trainer = trl_trainer(RewardTrainer, RewardConfig, smol, text_pairs(smol), tmp_path, trainee, **settings)
    assert_same_tokens(trainer, examples)
    assert trainer.processing_class.pad_token_id != smol.chat.end_of_turn
    ours = our_step(reward_objective(trainee, rows), trainee, examples)
    compare("reward, SmolLM2", ours, their_step(trainer, trainee))


@pytest.mark.slow
def test_dpo_on_smollm2_is_trl_s(smol, tmp_path):
    """Four losses on one trainer, whose loss is changed in between; the reference is computed once."""
    trainee = make_trainee(smol)
    trainer = trl_trainer(DPOTrainer, DPOConfig, smol, text_pairs(smol), tmp_path, trainee, beta=0.1)
    for loss in ["sigmoid", "ipo", "apo_zero", "soft"]:
        rows, examples = preference_examples(smol, tmp_path, SURE if loss == "soft" else 1.0)
        assert_same_tokens(trainer, examples)
        mixed = soft_sigmoid(SURE) if loss == "soft" else {"loss_type": [loss], "loss_weights": [1.0], "label_smoothing": 0.0}
        trainer.loss_types, trainer.loss_weights, trainer.label_smoothing = mixed.values()
        objective = dpo_objective(trainee, rows, examples, tmp_path, loss="sigmoid" if loss == "soft" else loss, beta=0.1)
        compare(f"dpo {loss}, SmolLM2", our_step(objective, trainee, examples), their_step(trainer, trainee))
