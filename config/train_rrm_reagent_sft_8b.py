# Stage 2a at the paper's size: SFT of the reward model on 28K judgments, 2 epochs of batches of 32,
# lr as the agent's SFT. For 8 GPUs of 80 GB.
stage = "sft"
model = "Qwen/Qwen3-8B"
data = "data/reagent/rrm_sft.jsonl"
steps = 1750
lr = 1e-5
warmup_steps = 50
lr_end = 0.1
prompt_file = "data/reagent/prompts/rrm_sft.system.txt"  # as it stands in the rows
request_file = "data/reagent/prompts/rrm_sft.request.txt"
out_dir = "out/rrm_sft"
