# The toy's cold start: 250 steps of 48 rows. The demonstrations are lazy, so it ends near 10-20 %.
model = "data/toy/model"
data = "data/toy/sft.jsonl"
rows_per_step = 48
steps = 250
lr = 3e-3
warmup_steps = 20
max_tokens_per_row = 1024
policy = dict(tokens_per_microbatch=16_384, checkpoint_activations=False)
save_interval = 1000
log_interval = 50
timeout_s = 120.0
out_dir = "out/toy/sft"
