"""Constitutional AI: the policy rewrites its own answers by principles and learns from them, then from a judge that goes by them.

Bai et al. 2022 (arXiv 2212.08073): supervised learning on revisions, then preferences by a principle drawn for each pair.
"""

from align import Recipe

CONSTITUTION = "prompts/constitution.txt"

recipe = Recipe("constitutional", base="embedded")
sft = recipe.sft(data="datasets/chat.jsonl")
drafts = recipe.sample(name="drafts", policy=sft, prompts="datasets/prompts.jsonl", completions_per_prompt=1)
revisions = recipe.revise(completions=drafts, policy=sft, constitution=CONSTITUTION)
revised = recipe.sft(name="revised", policy=sft, data=revisions)
completions = recipe.sample(policy=revised, prompts="datasets/prompts.jsonl", seed=1)
labels = recipe.label(
    completions=completions,
    judge="embedded",
    template="prompts/judge_principle.txt",
    constitution=CONSTITUTION,
    trust_judge=True,
    undecided="keep",
)
dpo = recipe.dpo(policy=revised, preferences=labels, learning_rate=2e-4)
judge = recipe.reward(name="judge", policy=sft, preferences="datasets/preferences.jsonl")
recipe.evaluate(policies=[sft, revised, dpo], prompts="datasets/heldout_prompts.jsonl", reward_model=judge)

if __name__ == "__main__":
    recipe.main()
