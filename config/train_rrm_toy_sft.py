# The toy's reward model: SFT on the rule annotator's judgments, verdict tokens weighted up.
stage = "sft"
model = "data/toy/model"
data = "data/toy/rrm_sft.jsonl"
eval_data = "data/toy/rrm_test.jsonl"
judgments_per_step = 32
steps = 300
lr = 3e-3
warmup_steps = 20
lr_end = 0.05
verdict_weight = 4.0
max_judgment_tokens = 48
max_context = 1024
engine = "hf"
policy = dict(tokens_per_microbatch=16_384, checkpoint_activations=False)
eval_interval = 1000
log_interval = 50
save_interval = 1000
timeout_s = 300.0
out_dir = "out/toy/rrm_sft"
