# Stage 1 on one GPU of 80 GB with Qwen3-1.7B. About 34.0 GB to train. Untried: no GPU was at hand.
model = "Qwen/Qwen3-1.7B"
tokens_per_microbatch = 16_384
out_dir = "out/sft_17b"
