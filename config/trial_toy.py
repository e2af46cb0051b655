# Trials on the toy: the limits of its stages, sampling at temperature 1.
data = "data/toy/rl_test.jsonl"
rrm = dict(source="out/toy/rrm/step-000030", max_context=1024, max_tokens=256)
tools = "search"
temperature = 1.0
max_turns = 8
max_new_tokens_per_turn = 12
max_tokens_per_attempt = 400
max_context = 1024
engine = "hf"
