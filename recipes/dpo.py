"""DPO: instruction tuning, then preferences straight into the policy, no sampling on the way; a reward model only to compare.

Your own data: --set sft.data=FILE, --set dpo.preferences=FILE. Another base: --set recipe.base=FOLDER or a hub id.
"""

from align import Recipe

recipe = Recipe("dpo", base="embedded")
sft = recipe.sft(data="datasets/chat.jsonl")
dpo = recipe.dpo(policy=sft, preferences="datasets/preferences.jsonl", epochs=2.0, learning_rate=2e-4)
reward_model = recipe.reward(policy=sft, preferences="datasets/preferences.jsonl")
recipe.evaluate(policies=[sft, dpo], prompts="datasets/heldout_prompts.jsonl", reward_model=reward_model)

if __name__ == "__main__":
    recipe.main()
