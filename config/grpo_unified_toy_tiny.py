# Reagent-U on the toy: 40 steps of 8 questions x 2 x 16 attempts; the trained toy reward model is
# the judge.
model = "out/toy/sft/step-000250"
data = "data/toy/rl_train.jsonl"
eval_data = "data/toy/rl_test.jsonl"
# --rrm=data/toy/prepare.py is the rule annotator
rrm = dict(source="out/toy/rrm/step-000030", max_context=1024, max_tokens=256, seconds=120.0)
tools = "search"
prompts_per_step = 8
prompts_per_minibatch = 8
group_size = 16
temperature = 1.0
max_turns = 8
max_new_tokens_per_turn = 12  # a call has 6 tokens, an answer 4
max_tokens_per_attempt = 400
max_context = 1024
lr = 2e-4  # at 4e-4 seed 0 falls into calls without end after step 10, which the judge cannot read
lr_end = 0.1
steps = 40
max_dlogp = 5e-3  # fp32 stays under 1e-4; bf16 on a GPU began at .0011 and fell to .0002
engine = "hf"
policy = dict(tokens_per_microbatch=16_384, checkpoint_activations=False)
eval_interval = 20
save_interval = 20
timeout_s = 300.0
out_dir = "out/toy/u"
