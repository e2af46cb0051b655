# SmolLM2-135M on the atlas: lazy demonstrations of real geography, one GPU or (smaller) a CPU.
model = "data/atlas/model"
data = "data/atlas/sft.jsonl"
rows_per_step = 32
steps = 100
lr = 5e-4  # 30 steps of 3 rows sufficed for one hop on a CPU core
warmup_steps = 10
max_tokens_per_row = 1536
policy = dict(tokens_per_microbatch=17_500, checkpoint_activations=False)
out_dir = "out/atlas/sft"
