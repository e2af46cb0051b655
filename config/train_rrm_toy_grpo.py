# The toy's reward model, second half: GRPO on its own judgments.
model = "out/toy/rrm_sft/step-000600"
data = "data/toy/rrm_rl.jsonl"
eval_data = "data/toy/rrm_test.jsonl"
judgments_per_step = 32
group_size = 8
steps = 40
lr = 2e-5
max_judgment_tokens = 48
max_context = 1024
max_dlogp = 1e-3
engine = "hf"
tokens_per_microbatch = 16_384
checkpoint_activations = False
eval_interval = 20
save_interval = 20
timeout_s = 300.0
out_dir = "out/toy/rrm"
