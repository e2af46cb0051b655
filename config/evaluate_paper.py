# The paper's protocol (appendix C.3), to measure a released checkpoint on the paper's scale: 30
# turns with tools, 32,768 tokens an attempt, every set judged by an LLM (there
# Qwen2.5-72B-Instruct: give its server by --judge=http://…/v1), and the system prompt that stands
# in the rows of the SFT set (python data/reagent/prepare.py --set=sft writes it). Without this
# preset GAIA, maths and QA are scored by rule, which is another scale. The paper's 12 benchmarks:
# gaia_text, webwalker, hle, xbench, hotpotqa, 2wiki, bamboogle, musique, aime24, aime25, math500,
# gsm8k.
max_turns = 30
max_tokens_per_attempt = 32_768
temperature = 0.6
top_p = 0.95
judged = "all"
prompt_file = "data/reagent/prompts/sft.system.txt"
out_dir = "out/eval_paper"
