# A reward model of the agent's size on 8,000 judgments of the atlas's annotator, by SFT. Untried on
# a GPU; what 3,648 of them did on a CPU, and what earlier rows hid: docs/measured.md.
stage = "sft"
model = "data/atlas/model"
data = "data/atlas/rrm_sft.jsonl"
eval_data = "data/atlas/rrm_test.jsonl"
judgments_per_step = 32
steps = 250
lr = 5e-4
warmup_steps = 10
lr_end = 0.1
max_judgment_tokens = 160
max_context = 2560
engine = dict(kind="vllm", sleep=False, memory_share=0.3)
policy = dict(tokens_per_microbatch=17_500, checkpoint_activations=False)
eval_interval = 125
save_interval = 125
out_dir = "out/atlas/rrm_sft"
