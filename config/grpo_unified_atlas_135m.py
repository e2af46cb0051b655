# Reagent-U on the atlas with SmolLM2-135M: 40 steps of 16 questions x 2 x 16 attempts, the rule
# annotator as reward model. Untried on a GPU.
model = "out/atlas/sft/step-000100"
data = "data/atlas/rl_train.jsonl"
eval_data = "data/atlas/rl_test.jsonl"
rrm = dict(source="data/atlas/annotator.py", max_context=2560, max_tokens=256)
prompt_file = "data/atlas/prompt.txt"
tools = "search"
prompts_per_step = 16
prompts_per_minibatch = 16
group_size = 16
temperature = 1.0
max_turns = 8
max_new_tokens_per_turn = 80
max_tokens_per_attempt = 900
max_context = 2560
lr = 2e-5  # at 1e-4 a quarter of the attempts ended at the turn limit
lr_end = 0.1
steps = 40
engine = dict(kind="vllm", sleep=False, memory_share=0.3)
policy = dict(tokens_per_microbatch=17_500, checkpoint_activations=False)
eval_interval = 20
save_interval = 20
out_dir = "out/atlas/u"
