# Stage 1 on one GPU of 80 GB with Qwen3-1.7B. Untried: no GPU was at hand.
model = "Qwen/Qwen3-1.7B"
policy = dict(tokens_per_microbatch=16_384)
out_dir = "out/sft_17b"
