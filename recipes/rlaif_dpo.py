"""RLAIF without PPO: rounds of sampling, labelling and DPO, each from the policy of the round before."""

from align import Recipe

ROUNDS = 2

recipe = Recipe("rlaif_dpo", base="embedded")
sft = recipe.sft(data="datasets/chat.jsonl")
judge = recipe.reward(name="judge", policy=sft, preferences="datasets/preferences.jsonl")
policies = [sft]
for number in range(1, ROUNDS + 1):
    completions = recipe.sample(
        name=f"sample{number}", policy=policies[-1], prompts="datasets/prompts.jsonl", max_new_tokens=64, seed=number
    )
    labels = recipe.label(name=f"label{number}", completions=completions, judge=judge, gold="datasets/preferences.jsonl")
    policies.append(recipe.dpo(name=f"dpo{number}", policy=policies[-1], preferences=labels, learning_rate=2e-4))
recipe.evaluate(policies=policies, prompts="datasets/heldout_prompts.jsonl", reward_model=judge)

if __name__ == "__main__":
    recipe.main()
