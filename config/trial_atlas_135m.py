# Trials on the atlas: the limits of its stages, greedy.
data = "data/atlas/rl_test.jsonl"
rrm = dict(source="data/atlas/annotator.py", max_context=2560, max_tokens=256)
prompt_file = "data/atlas/prompt.txt"
tools = "search"
temperature = 0.0
max_turns = 8
max_new_tokens_per_turn = 80
max_tokens_per_attempt = 900
max_context = 2560
engine = dict(kind="vllm", sleep=False, memory_share=0.3)
