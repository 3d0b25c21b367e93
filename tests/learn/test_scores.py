"""Rewards from outside the trunk: sequence classifiers of another tokenizer, and functions."""

import pytest
import torch
from conftest import TEMPLATE, make_tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification

from align.errors import AlignError
from align.judge.judgement import Reply
from align.learn.prompts import PromptRow
from align.learn.rollouts import Sampled
from align.learn.scores import ClassifierReward, FunctionReward, JudgedReward, RewardFailure, score_parts
from align.model.generate import Completion
from align.model.packing import Example
from align.settings import JudgeSettings

OTHER = TEMPLATE.replace("<|{{ m.role }}|>\n", "<|{{ m.role }}|> ").replace("<|assistant|>\n", "<|assistant|> ")
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 261,
    "max_position_embeddings": 256,
    "pad_token_id": 1,  # the token that ends a turn, as many reward models have it
    "num_labels": 1,
}


def classifier(folder, kind="llama", template=OTHER, **changes):
    """A random reward model with a template of its own."""
    torch.manual_seed(5)
    config = AutoConfig.for_model(kind, **{**SIZES, **changes})
    model = AutoModelForSequenceClassification.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.0 if "score" in name or "classifier" in name else 0.2)
    model.save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return model.eval(), tokenizer


def sampled(*texts, messages=None, cut=()):
    """One prompt with completions of these texts; those whose number is in `cut` never ended."""
    messages = messages or [{"role": "user", "content": "say red"}]
    completions = [Completion((5,), (0.0,), number not in cut) for number in range(len(texts))]
    example = Example(0, (3,), tuple(completion.ids for completion in completions))
    return Sampled(PromptRow((3,), messages, None, {"answer": "red"}, 0), example, completions, list(texts))


def opened(folder, **changes):
    classifier(folder, **changes)
    return ClassifierReward("kind", str(folder), torch.float32, torch.device("cpu"))


def test_a_classifier_sees_the_conversation_in_its_own_template(tmp_path):
    _, tokenizer = classifier(tmp_path)
    reward = ClassifierReward("kind", str(tmp_path), torch.float32, torch.device("cpu"))
    one = sampled("red", "blue")
    assert tokenizer.decode(reward.render(one.prompt, "red", ended=True)) == "<|user|> say red<|end|>\n<|assistant|> red<|end|>\n"


@pytest.mark.parametrize("text", ["red", "say", "a b"])
def test_a_completion_that_was_cut_is_not_given_an_end(text, tmp_path):
    _, tokenizer = classifier(tmp_path)
    reward = ClassifierReward("kind", str(tmp_path), torch.float32, torch.device("cpu"))
    assert tokenizer.decode(reward.render(sampled(text).prompt, text, ended=False)) == f"<|user|> say red<|end|>\n<|assistant|> {text}"


def test_an_empty_completion_that_was_cut_ends_where_the_reply_begins(tmp_path):
    _, tokenizer = classifier(tmp_path)
    reward = ClassifierReward("kind", str(tmp_path), torch.float32, torch.device("cpu"))
    assert tokenizer.decode(reward.render(sampled("").prompt, "", ended=False)) == "<|user|> say red<|end|>\n<|assistant|> "


@pytest.mark.parametrize(("kind", "changes"), [("llama", {}), ("qwen2", {}), ("bert", {"type_vocab_size": 2})])
def test_scores_are_those_of_each_text_alone_without_padding(kind, changes, tmp_path):
    """Decoders are pooled at the last token, whatever token that is; encoders as their own forward does."""
    model, tokenizer = classifier(tmp_path, kind, template=OTHER.rstrip("\n"), **changes)
    reward = ClassifierReward("kind", str(tmp_path), torch.float32, torch.device("cpu"))
    texts = ["red", "a much longer completion than the other ones", "", "blue green", *"abcdefg"]
    found = reward([sampled(*texts, cut={1, 3})], [])
    for number, text in enumerate(texts):
        ids = torch.tensor([reward.render(sampled(text).prompt, text, number not in {1, 3})])
        with torch.no_grad():
            if kind == "bert":
                expected = model(ids).logits[0, 0]
            else:
                expected = model.score(model.model(ids).last_hidden_state[0, -1])[0]
        assert float(found[number]) == pytest.approx(float(expected), abs=1e-5), text
    assert len({round(score, 3) for score in found.tolist()}) > 8


def test_a_text_that_ends_with_the_pad_token_is_pooled_at_that_token(tmp_path):
    """The template ends a turn with token 1, which pads: the model's own forward would pool a token before it."""
    ends_with_pad = OTHER.replace("<|end|>\n", "<|end|>")
    model, _ = classifier(tmp_path, template=ends_with_pad)
    reward = ClassifierReward("kind", str(tmp_path), torch.float32, torch.device("cpu"))
    one = sampled("red")
    ids = reward.render(one.prompt, "red", ended=True)
    assert ids[-1] == model.config.pad_token_id == 1
    with torch.no_grad():
        own = float(model(torch.tensor([ids])).logits)
        right = float(model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1]))
    assert float(reward([one], [])) == pytest.approx(right, abs=1e-5)
    assert abs(own - right) > 1e-3


REFUSED = {
    "no head in its files": ("causal", "has no score.weight; expected a reward model"),
    "several outputs": ({"num_labels": 3}, "has 3 outputs; expected a reward model, that is a classifier with one output"),
    "no chat template": ({"template": None}, "has no chat template"),
    "nothing there": (None, "cannot be loaded as a sequence classifier"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_reward_model_is_refused(case, tiny_base, tmp_path):
    made, message = REFUSED[case]
    folder = tiny_base if made == "causal" else tmp_path / "model"
    if isinstance(made, dict):
        classifier(folder, **made)
    with pytest.raises(AlignError, match="reward 'kind'") as error:
        ClassifierReward("kind", str(folder), torch.float32, torch.device("cpu"))
    assert message in str(error.value)


def test_a_conversation_that_is_too_long_for_a_classifier_is_told(tmp_path):
    reward = opened(tmp_path, max_position_embeddings=40)
    with pytest.raises(RewardFailure, match="a conversation has 1.. of its tokens; it takes 40. Lower the stage's max_prompt_tokens"):
        reward([sampled("x" * 100)], [])


def test_a_template_that_changes_the_reply_cannot_show_a_cut_one(tmp_path):
    reward = opened(tmp_path, template=OTHER.replace("m.content", "m.content | upper"))
    assert len(reward([sampled("red")], [])) == 1
    with pytest.raises(RewardFailure, match="its chat template changes the reply 'red', so a cut one cannot be shown"):
        reward([sampled("red", cut={0})], [])


class Rubric:
    """Gives these scores, one question after the other; none where its reply says none."""

    name, model, template, pointwise = "rubric", "", "", True

    def __init__(self, *scores):
        self.scores, self.asked = scores, []

    def ask(self, questions, on_reply):
        self.asked += questions
        for place, score in reversed(list(enumerate(self.scores))):
            on_reply(place, Reply("tie" if score else "unparsed", f"I say {score}", score=score))


def judged_by(*scores, **settings):
    return JudgedReward("judge", Rubric(*scores), JudgeSettings(template="prompts/judge_score.txt", **settings))


FOUR = [sampled("red", "blue"), sampled("green", "", cut=(1,))]


def test_a_judge_s_scores_go_from_minus_1_to_1():
    scorer = judged_by(1.0, 10.0, 5.5, 7.0)
    assert scorer(FOUR, []).tolist() == pytest.approx([-1, 1, 0, 1 / 3])
    assert [question.first[0]["content"] for question in scorer.judge.asked] == ["red", "blue", "green", ""]
    assert all(question.second is None for question in scorer.judge.asked)


def test_a_completion_that_the_judge_does_not_score_gets_the_mean_of_the_others():
    assert judged_by(None, 10.0, 10.0, 1.0, max_unparsed=0.5)(FOUR, []).tolist() == pytest.approx([1 / 3, 1, 1, -1])


@pytest.mark.parametrize("scores", [(None, None, 3.0, 4.0), (None, None, None, None)])
def test_too_many_replies_without_a_score_stop_the_run(scores):
    unread = scores.count(None)
    with pytest.raises(RewardFailure, match=rf"reward 'judge': of 4 replies of the judge {unread} say no score, such as 'I say None'"):
        judged_by(*scores)(FOUR, [])


def test_a_function_gets_messages_text_and_row():
    seen = []
    reward = FunctionReward("f", lambda *given: seen.append(given) or True, lambda prompt: "here:1")
    assert reward([sampled("red", "blue")], []).tolist() == [1.0, 1.0]
    messages = [{"role": "user", "content": "say red"}]
    assert seen == [(messages, "red", {"answer": "red"}), (messages, "blue", {"answer": "red"})]


def test_a_score_that_is_no_number_names_row_reward_and_completion():
    numbers = iter([1.0, float("-inf")])
    scorers = {"f": FunctionReward("f", lambda *given: next(numbers), lambda prompt: "x")}
    with pytest.raises(RewardFailure, match=r"^here:7: reward 'f' is -inf; expected a finite number. The completion: 'blue'"):
        score_parts(scorers, [sampled("red", "blue")], [], lambda prompt: "here:7")
