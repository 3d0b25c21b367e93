"""Instruction tuning, a reward model, PPO against it, and a comparison: the whole chain on a model that needs no download."""

from align import Recipe

recipe = Recipe("quickstart", base="embedded")
sft = recipe.sft(data="datasets/chat.jsonl")
reward_model = recipe.reward(policy=sft, preferences="datasets/preferences.jsonl")
ppo = recipe.ppo(policy=sft, reward_model=reward_model, prompts="datasets/prompts.jsonl", iterations=9, learning_rate=1.5e-3, kl_coef=0.02)
recipe.evaluate(policies=[sft, ppo], prompts="datasets/heldout_prompts.jsonl", reward_model=reward_model)

if __name__ == "__main__":
    recipe.main()
