# Reagent-U on one GPU of 80 GB with Qwen3-1.7B; the engine stays awake beside the training.
# Untried: no GPU was at hand.
model = "out/sft_17b/step-003476"
prompts_per_step = 16
prompts_per_minibatch = 4
max_tokens_per_attempt = 8000
max_context = 20_000
engine = dict(memory_share=0.45, sleep=False)
policy = dict(tokens_per_microbatch=16_384)
out_dir = "out/u_17b"
# the prompts that stand in the rows of the released sets (data/reagent/prepare.py)
prompt_file = "data/reagent/prompts/sft.system.txt"
rrm = dict(
    prompt_file="data/reagent/prompts/rrm_sft.system.txt",
    request_file="data/reagent/prompts/rrm_sft.request.txt",
)
