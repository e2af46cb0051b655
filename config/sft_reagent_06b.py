# Stage 1 on one GPU of 80 GB with Qwen3-0.6B. About 58.7 GB to train. Untried: no GPU was at hand.
model = "Qwen/Qwen3-0.6B"
tokens_per_microbatch = 16_384
max_tokens_per_row = (
    16_384  # a longer row would stand alone and, without checkpointing, take 107 GB at 32,768
)
checkpoint_activations = False
out_dir = "out/sft_06b"
