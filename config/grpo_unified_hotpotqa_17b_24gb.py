# Reagent-U on HotpotQA's own paragraphs (data/hotpotqa/prepare.py; no search key):
# Qwen3-1.7B by LoRA on one GPU of 24 GB. Untried.
# Memory by plan: rollout 21.5 GB, training 12.9 GB.
# The reward model is served elsewhere; --variant=rule needs none.
model = "Qwen/Qwen3-1.7B"
data = "data/hotpotqa/train.jsonl"
tools = "search,browse"
prompts_per_step = 32
temperature = 1.0
max_turns = 8
max_new_tokens_per_turn = 1024
max_tokens_per_attempt = 4096
max_context = 10_240
lr = 1e-5  # about ten times that of all weights
steps = 200
policy = dict(lora_rank=32, tokens_per_microbatch=10_240)
engine = dict(memory_share=0.6)
out_dir = "out/hotpotqa_17b_24gb"
