# Reagent-U by the paper's recipe (our defaults), from checkpoints of the released sets: agent and
# reward model are asked with the prompts that stand in the rows they were trained on, as
# data/reagent/prepare.py wrote them. The released weights were made with these too.
prompt_file = "data/reagent/prompts/sft.system.txt"
rrm = dict(
    prompt_file="data/reagent/prompts/rrm_sft.system.txt",
    request_file="data/reagent/prompts/rrm_sft.request.txt",
)
