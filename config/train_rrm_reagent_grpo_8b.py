# Stage 2b at the paper's size: GRPO of the reward model on the released 90K rows (our defaults),
# asked as in stage 2a.
prompt_file = "data/reagent/prompts/rrm_sft.system.txt"
request_file = "data/reagent/prompts/rrm_sft.request.txt"
