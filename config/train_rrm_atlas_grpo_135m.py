# The atlas's reward model, second half: a short GRPO on its own judgments. Untried at this size;
# what a smaller one did: docs/measured.md.
model = "out/atlas/rrm_sft/step-000250"
data = "data/atlas/rrm_rl.jsonl"
eval_data = "data/atlas/rrm_test.jsonl"
judgments_per_step = 32
group_size = 8
steps = 20
lr = 2e-5
lr_end = 0.1
max_judgment_tokens = 160
max_context = 2560
engine = dict(kind="vllm", sleep=False, memory_share=0.3)
policy = dict(tokens_per_microbatch=17_500, checkpoint_activations=False)
eval_interval = 10
save_interval = 20
out_dir = "out/atlas/rrm"
