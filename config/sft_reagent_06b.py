# Stage 1 on one GPU of 80 GB with Qwen3-0.6B. Untried: no GPU was at hand.
model = "Qwen/Qwen3-0.6B"
policy = dict(tokens_per_microbatch=16_384, checkpoint_activations=False)
# a longer row would stand alone; one of 32,768 tokens needs 80 GB by the plan
max_tokens_per_row = 16_384
out_dir = "out/sft_06b"
