# Reagent-U as the released script has it, where it differs from the paper (and from our defaults):
# lr 5e-6, 32 questions a step, pools of all-zero or all-full rewards dropped. Its limits and its
# clipping (0.2 / 0.34) are our defaults; its sampling (top_p 0.95) and dual clip (3.0) are not
# taken over. For 8 GPUs of 80 GB.
lr = 5e-6
prompts_per_step = 32
drop = "release"
out_dir = "out/u_release"
# the prompts that stand in the rows of the released sets (data/reagent/prepare.py)
prompt_file = "data/reagent/prompts/sft.system.txt"
rrm = dict(
    prompt_file="data/reagent/prompts/rrm_sft.system.txt",
    request_file="data/reagent/prompts/rrm_sft.request.txt",
)
