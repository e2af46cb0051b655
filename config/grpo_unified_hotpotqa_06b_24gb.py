# Reagent-U on HotpotQA's own paragraphs (data/hotpotqa/prepare.py; no search key):
# Qwen3-0.6B, all weights, on one GPU of 24 GB. Untried.
# Memory by plan: rollout 22.3 GB, training 17.6 GB.
# The reward model is served elsewhere; --variant=rule needs none.
model = "Qwen/Qwen3-0.6B"
data = "data/hotpotqa/train.jsonl"
tools = "search,browse"
prompts_per_step = 32
temperature = 1.0
max_turns = 8
max_new_tokens_per_turn = 1024
max_tokens_per_attempt = 4096
max_context = 10_240
lr = 1e-6
steps = 200
policy = dict(tokens_per_microbatch=10_240)
engine = dict(memory_share=0.5)
out_dir = "out/hotpotqa_06b_24gb"
