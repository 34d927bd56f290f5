# Everything runs in .venv, which `make setup`, and any target that needs it, makes once and renews when pyproject.toml changes.
# Only PYTHON and PIP_ARGS are also read from the environment; what decides about numbers is said on the command line.

PYTHON   ?= python3
PIP_ARGS ?=
CONFIG   := configs/tiny-nvfp4.toml
NGPU     := 1
GPU      := b200
ARGS     :=
RUN      :=
A        :=
B        :=
NVIDIA   := $(firstword $(wildcard /proc/driver/nvidia/version /dev/nvidia[0-9]*) \
                        $(shell nvidia-smi -L >/dev/null 2>&1 && echo nvidia-smi))
DEVICE   := $(if $(NVIDIA),cuda,cpu)

$(if $(filter-out 1,$(words $(filter cpu cuda,$(DEVICE)))),$(error DEVICE=$(DEVICE): cpu or cuda, or leave it out))
why   := $(if $(filter command,$(origin DEVICE)),DEVICE=$(DEVICE),$(if $(NVIDIA),NVIDIA driver found ($(NVIDIA)),no NVIDIA driver found))
py    := .venv/bin/python
pip   := $(py) -m pip --disable-pip-version-check --no-input
ready := .venv/.ready-$(DEVICE)
# The requirements of the named groups in pyproject.toml, one a line.
groups = $(py) -c 'import sys, tomllib; table = tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]; \
	print(*(line for name in sys.argv[1:] for line in table[name]), sep="\n")'

.PHONY: help setup data train plan plot compare search eval inspect export import test test-all test-gpu kernels-check bench bench-gpu outcomes schema table lint resolve clean run-given config-exists
.DEFAULT_GOAL := help

help: ## this table
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-13s %s\n", $$1, $$2 }' Makefile

setup: $(ready) ## .venv with the pinned dependencies [PYTHON=python3.12 DEVICE=cpu|cuda PIP_ARGS="pip's options, e.g. a CPU wheel index"]

data: config-exists $(ready) ## prepare the data of a config and stop [CONFIG=configs/x.toml ARGS="key=value ..."]
	$(py) train.py $(CONFIG) $(ARGS) --data

train: config-exists $(ready) ## prepare the data and train [CONFIG=configs/x.toml NGPU=2 ARGS="train.steps=100 run.name=a ..."]
	$(py) $(if $(filter-out 1,$(NGPU)),launch.py $(NGPU)) train.py $(CONFIG) $(ARGS)

plan: $(ready) ## memory, time and cost of a run before it runs: CONFIG=... NGPU=32 GPU=b200|gb200|h200|... [ARGS="key=value --check"]
	$(if $(wildcard $(CONFIG)),,$(error CONFIG=$(CONFIG): no such file; there are $(wildcard configs/*.toml)))
	$(py) plan.py $(CONFIG) --gpus $(NGPU) --gpu $(GPU) $(ARGS)

plot: run-given $(ready) ## pictures of runs: loss, which formats were chosen where, gaps [RUN="out/A out/B"]
	$(py) plot.py $(RUN)

compare: $(ready) ## why did it diverge: two configs or runs side by side, operand by operand: A=... B=... [ARGS="--steps 5 ..."]
	$(if $(and $(A),$(B)),,$(error make compare needs A=... and B=..., configs or run folders))
	$(py) compare.py $(A) $(B) $(ARGS)

search: $(ready) ## a policy from measured errors: RUN=config, run or checkpoint [ARGS="--out FILE ..."]
	$(if $(RUN),,$(error make search needs RUN=..., a config, a run folder or a checkpoint))
	$(py) search.py $(RUN) $(ARGS)

eval: run-given $(ready) ## evaluate checkpoints, compare several: RUN="out/A out/B" [ARGS="--weights nvfp4 --sweep ..."]
	$(py) evaluate.py $(RUN) $(ARGS)

inspect: $(ready) ## what a checkpoint holds, and how far another is from it: STEP=out/NAME[/step_N] [OTHER=...]
	$(if $(STEP),,$(error make inspect needs STEP=..., a run or one of its steps))
	$(py) contents.py $(STEP) $(OTHER)

export: run-given $(ready) ## a Hugging Face folder: RUN=out/NAME FORMAT=nvfp4|nvfp4a16|mxfp8|mixed|bf16 [LAYOUT=modelopt]
	$(py) export.py $(RUN) $(if $(FORMAT),--format $(FORMAT)) $(if $(LAYOUT),--layout $(LAYOUT)) $(ARGS)

import: $(ready) ## a run from a Hugging Face folder in BF16, NVFP4 or MXFP8: DIR=... [OUT=out/NAME]
	$(if $(DIR),,$(error make import needs DIR=..., a folder with config.json and safetensors))
	$(py) importer.py $(DIR) $(if $(OUT),--out $(OUT))

test: $(ready) ## run the tests, without the slow ones; those of the kernels also in Triton's interpreter [ARGS="-k words"]
	$(py) -m pytest $(ARGS)
	TRITON_INTERPRET=1 $(py) -m pytest tests/test_kernels.py tests/test_mor_kernels.py tests/test_matmul.py

test-all: $(ready) ## run the tests, with the slow ones
	$(py) -m pytest -m '' $(ARGS)

kernels-check: $(ready) ## compile every kernel for every GPU, inspect it, execute its PTX; needs none [ARGS="100 --only nvfp4"]
	$(py) -m testing.check $(ARGS)

# Where the driver, the device or torch's CUDA is missing, all of it is skipped and says why.
test-gpu: $(ready) ## the kernel tests on this GPU, and what only hardware answers [ARGS="-k words"]
	$(py) -m pytest --gpu -rs tests/test_kernels.py tests/test_matmul.py tests/test_moments.py tests/test_gpu.py $(ARGS)
	$(py) -m testing.settle

bench-gpu: $(ready) ## time the kernels on this GPU for the Linears of three models, against BF16 and a copy [ARGS="--repeats 20"]
	$(py) bench.py gpu $(ARGS)

bench: $(ready) ## time the quantiser and a Linear, as ratios within one run [ARGS="--size 4096"]
	$(py) bench.py $(ARGS)

outcomes: $(ready) ## train every recipe on the small model, an hour [ARGS="NAME ... --jobs 2"]
	$(py) -m studies.recipes $(ARGS)

schema: $(ready) ## write configs/schema.json, by which editors complete and check the configs
	$(py) -m configs.schema

table: $(ready) ## write the table of recipes in README.md, from configs/ and docs/measured.json
	$(py) -m configs.table

lint: $(ready) ## ruff
	$(py) -m ruff check

# fast-deps reads what a wheel asks for without fetching it whole.
resolve: $(ready) ## ask the package index for both sets of dependencies, CPU and CUDA; installs nothing [PIP_ARGS=...]
	@set -e; for device in cpu cuda; do \
	    $(groups) base $$device dev > .venv/resolve.txt; \
	    $(pip) install -qq --dry-run --ignore-installed --use-feature=fast-deps $(PIP_ARGS) --report .venv/resolve.json -r .venv/resolve.txt; \
	    $(py) -c 'import json; found = [package["metadata"] for package in json.load(open(".venv/resolve.json"))["install"]]; \
	        print("'$$device': resolves to", len(found), "packages with", \
	            *sorted(p["name"] + " " + p["version"] for p in found if p["name"] in ("torch", "triton")))'; \
	done

clean: ## delete .venv and caches; out/ and data/cache/ stay
	@for path in .venv .pytest_cache .ruff_cache .hypothesis \
	    $$(find . \( -path ./.venv -o -path ./out -o -path ./data/cache -o -path ./.git \) -prune -o -name __pycache__ -print); do \
	    if [ -e "$$path" ] || [ -L "$$path" ]; then echo "deleting $$path"; rm -rf "$$path"; fi; \
	done

config-exists:
	$(if $(wildcard $(CONFIG)),,$(error CONFIG=$(CONFIG): no such file; there are $(wildcard configs/*.toml)))
	@:

run-given:
	$(if $(RUN),,$(error make $(MAKECMDGOALS) needs RUN=out/NAME; there are $(or $(wildcard out/*),no runs yet)))
	$(foreach run,$(RUN),$(if $(wildcard $(run)),,$(error RUN=$(run): no such folder; there are $(or $(wildcard out/*),no runs yet))))
	@:

# The stamp is written last and `unfinished` stands until then: after a failure or an interruption the next make starts .venv anew
# instead of trusting half-installed packages. A .venv that somebody else made is used as it is.
$(ready): pyproject.toml
	@set -e; start=$$(date +%s); rm -f .venv/.ready-*; \
	fail() { echo "set-up: $$*" >&2; exit 1; }; \
	if [ -e .venv/.unfinished ] || ! $(py) -m pip --version >/dev/null 2>&1; then \
	    version=$$($(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) || \
	        fail "PYTHON=$(PYTHON) does not run; Python 3.11 or newer is needed"; \
	    $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	        fail "Python 3.11 or newer is needed and $(PYTHON) is $$version; name another: make setup PYTHON=python3.12"; \
	    $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	        fail "$(PYTHON) lacks venv or ensurepip; Debian and Ubuntu have them in the package python3-venv"; \
	    $(PYTHON) -m venv --clear .venv; \
	fi; \
	$(py) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail ".venv has a Python older than 3.11; make clean removes it"; \
	touch .venv/.unfinished; \
	$(groups) base $(DEVICE) dev > .venv/requirements.txt; \
	echo "set-up: $(why): $$(grep '^torch==' .venv/requirements.txt) for $(if $(filter cuda,$(DEVICE)),CUDA,the CPU) into .venv (takes minutes, once)"; \
	$(pip) install -q $(PIP_ARGS) -r .venv/requirements.txt || fail "pip failed; the next make starts again"; \
	$(py) -c 'import torch, triton; print(f"set-up: torch {torch.__version__}, triton {triton.__version__}"); \
	    cuda, seen = torch.version.cuda, "$(DEVICE)" == "cuda" and torch.cuda.is_available(); \
	    "$(DEVICE)" == "cuda" and not seen and print("set-up: torch sees no GPU: compare the driver with CUDA", cuda, "or use DEVICE=cpu"); \
	    "$(DEVICE)" == "cpu" and cuda and print("set-up: this torch carries CUDA, gigabytes that a CPU does not need;", \
	        "to save them: make clean, then make setup PIP_ARGS=\"--extra-index-url URL\" with an index of CPU wheels")'; \
	mv .venv/.unfinished $@; echo "set-up: done in $$(($$(date +%s) - start)) s"
