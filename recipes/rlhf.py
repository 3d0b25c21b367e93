"""RLHF: instruction tuning, a reward model on people's preferences, PPO against it, and a judge the policy never trained on.

The second reward model, from another seed, scores the comparison too: it tells a better policy from one that has only learned
its own reward model's mistakes. So does the best of four of SFT's answers, the plainest way to earn reward.

To expect, from a run with the former defaults of PPO on two cores with bfloat16 (13 minutes, 66 held-out prompts): PPO over SFT +0.11
(95% +0.03 to +0.20) by the reward model it learned from, better on 68% of prompts, and +0.14 (+0.06 to +0.22) by the unseen one, at a
KL of 4.0 nats; the best of four +0.14 (+0.06 to +0.23) and +0.13 (+0.04 to +0.21), at 0.6.

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
