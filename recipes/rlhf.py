"""RLHF: instruction tuning, a reward model on people's preferences, PPO against it, and a judge the policy never trained on.

The second reward model, from another seed, scores the comparison too: it tells a better policy from one that has only learned
its own reward model's mistakes. So does the best of four of SFT's answers, the plainest way to earn reward.

Your own data: --set sft.data=FILE, --set reward.preferences=FILE, --set ppo.prompts=FILE. Another base: --set recipe.base=...
"""

from align import Recipe

recipe = Recipe("rlhf", base="embedded")
sft = recipe.sft(data="datasets/chat.jsonl")
reward_model = recipe.reward(policy=sft, preferences="datasets/preferences.jsonl")
unseen_reward_model = recipe.reward(policy=sft, preferences="datasets/preferences.jsonl", seed=1, name="unseen_reward")
ppo = recipe.ppo(policy=sft, reward_model=reward_model, prompts="datasets/prompts.jsonl", iterations=12, learning_rate=1e-3, kl_coef=0.03)
recipe.evaluate(
    policies=[sft, ppo],
    prompts="datasets/heldout_prompts.jsonl",
    reward_model=reward_model,
    held_out=[unseen_reward_model],
    best_of=4,
)

if __name__ == "__main__":
    recipe.main()
