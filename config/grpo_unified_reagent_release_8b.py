# Reagent-U as the released script has it, where it differs from the paper (and from our defaults): lr 5e-6, 32 questions
# a step, answers of 11,000 tokens. Its clipping (0.2 / 0.34) is our default; its sampling (top_p 0.95) is not taken over.
lr = 5e-6
prompts_per_step = 32
max_tokens_per_attempt = 11_000
tokens_per_microbatch = 28_000
out_dir = "out/u_release"
