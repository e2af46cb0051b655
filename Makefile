# make demo      the toy from nothing to a Reagent-U trained agent, with a table and transcripts at the end
# make ablation  what each part of Reagent-U is worth: 90 runs of one to five CPU-minutes
# make test      everything that CI runs;  make test-slow  the long ones
PY := .venv/bin/python
export OMP_NUM_THREADS := 1
export VLLM_ENABLE_V1_MULTIPROCESSING := 0
export TOKENIZERS_PARALLELISM := false
TORCHRUN := .venv/bin/torchrun --nproc_per_node=2
SEED ?= 0
OUT := out/toy

.venv/installed: requirements.txt
	python3.11 -m venv .venv || python3 -m venv .venv
	$(PY) -m pip install -q torch==2.13.0
	$(PY) -m pip install -q -r requirements.txt
	touch $@

.venv/test-installed: requirements-test.txt .venv/installed
	$(PY) -m pip install -q -r requirements-test.txt
	$(PY) -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

data/toy/rl_test.jsonl: data/toy/prepare.py .venv/installed
	$(PY) data/toy/prepare.py

# two ranks need two cards: what runs on two ranks here runs on the CPU, also where there is a GPU
demo ablation test test-slow: export CUDA_VISIBLE_DEVICES :=

demo: data/toy/rl_test.jsonl
	$(TORCHRUN) sft.py config/sft_toy_tiny.py --seed=$(SEED) --out_dir=$(OUT)/sft
	$(TORCHRUN) train_rrm.py config/train_rrm_toy_sft.py --seed=$(SEED) --out_dir=$(OUT)/rrm_sft
	$(TORCHRUN) train_rrm.py config/train_rrm_toy_grpo.py --seed=$(SEED) --model=$(OUT)/rrm_sft/step-000300 --out_dir=$(OUT)/rrm
	$(TORCHRUN) grpo_unified.py config/grpo_unified_toy_tiny.py --seed=$(SEED) --model=$(OUT)/sft/step-000250 --rrm=$(OUT)/rrm/step-000030 --out_dir=$(OUT)/u
	$(PY) evaluate.py page $(OUT)/u
	$(PY) data/toy/trial.py $(OUT)/sft/step-000250 $(OUT)/u/step-000040 --rrm=$(OUT)/rrm/step-000030 --seed=$(SEED)

ablation: out/toy/sft/step-000250
	$(PY) data/toy/ablation.py

out/toy/sft/step-000250:
	$(MAKE) demo

lint: .venv/test-installed
	$(PY) -m ruff format --check -q .
	$(PY) -m ruff check -q .

test: lint
	$(PY) -m pytest -q -m "not slow" tests

test-slow: .venv/test-installed
	$(PY) -m pytest -q -m slow tests

clean:
	rm -rf out data/toy/*.jsonl data/toy/model

.PHONY: lint demo ablation test test-slow clean
