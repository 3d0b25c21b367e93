"""RLAIF: a judge labels the policy's own completions, a reward model learns from the labels, PPO from the reward model.

The judge here is a reward model trained on people's preferences, because a 135M model is no judge of text: the audit refuses it.
With a better one: --set label.judge=http://localhost:8000/v1#MODEL
"""

from align import Recipe

recipe = Recipe("rlaif", base="embedded")
sft = recipe.sft(data="datasets/chat.jsonl")
judge = recipe.reward(name="judge", policy=sft, preferences="datasets/preferences.jsonl")
completions = recipe.sample(policy=sft, prompts="datasets/prompts.jsonl", max_new_tokens=64)
labels = recipe.label(completions=completions, judge=judge, gold="datasets/preferences.jsonl")
reward_model = recipe.reward(policy=sft, preferences=labels)
ppo = recipe.ppo(policy=sft, reward_model=reward_model, prompts="datasets/prompts.jsonl", iterations=7, learning_rate=1e-3, kl_coef=0.03)
recipe.evaluate(policies=[sft, ppo], prompts="datasets/heldout_prompts.jsonl", reward_model=judge)

if __name__ == "__main__":
    recipe.main()
