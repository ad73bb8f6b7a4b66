# make compare   train each model pair with and without the kernels and write the report
# make test      the whole test suite (no GPU needed; uses one if there is one)
# make check     lint, types and the quick tests: under a minute on two cores, before each commit
# They create .venv on the first call (about 3 minutes) and reuse it afterwards: with Python 3.12 or newer and Axolotl
# 0.21 where such a Python runs, else with 3.11 or 3.10 and Axolotl 0.19. PYTHON=python3.11: that one, in .venv-3.11.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHONS := 3.12 3.13 3.14 3.11 3.10
ifeq ($(origin PYTHON),undefined)
VENV := .venv
else
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
$(if $(VERSION),,$(error PYTHON=$(PYTHON) does not run))
VENV := .venv-$(VERSION)
endif
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NEWEST := $(VENV)-newest
NEWEST_READY := $(NEWEST)/.ready
# What `make compare` compares: mixtral, qwen2-moe, deepseek-v3 or all.
FAMILY ?= all
# Further arguments, e.g. make compare ARGS="--steps 40 --fresh".
ARGS ?=
# The newest transformers the integration is tested with, and the two packages it pins.
NEWEST_TRANSFORMERS := transformers==5.24.0 tokenizers==0.23.3 huggingface_hub==1.33.0

.PHONY: help ready compare check test test-quick test-main test-runs test-compiled test-hopper test-newest test-stack test-stack-main test-stack-runs fuzz mutants sanitize wheel lint docs clean
help:
	@sed -n '1,5p' Makefile
	@echo "# make lint | docs | fuzz | mutants | sanitize | wheel"
	@echo "# make clean     deletes .venv, .venv-* and artifacts/: models, data, trainings and reports too"

# torch goes first and alone: axolotl's dependencies look at the installed torch.
# The constraints follow the torch that came: the plain wheel on a machine with a GPU, a CPU build elsewhere.
# An environment that is there keeps its Python, and the constraints follow that.
$(READY): pyproject.toml constraints-cpu.txt constraints-cuda.txt
	@echo "== setting up $(VENV) (first call only, a few minutes)"
	$(BIN)/python -c 'import pip' 2>/dev/null || \
	{ python="$(or $(PYTHON),$$(.ci/find-python $(PYTHONS)))"; "$$python" -m venv --clear $(VENV); }
	$(BIN)/python -m pip install --upgrade pip setuptools wheel
	@echo "== torch"
	$(BIN)/python -m pip install torch -c constraints-cuda.txt
	@echo "== axolotl, this project and the development tools"
	constraints=$$($(BIN)/python -c 'import torch; print("constraints-cuda.txt" if torch.version.cuda else "constraints-cpu.txt")'); \
	$(BIN)/python -m pip install -e '.[axolotl,dev]' -c "$$constraints"
	touch $@

$(NEWEST_READY): $(READY)
	@echo "== the newest transformers, beside the one axolotl pins"
	$(BIN)/python -m pip install --upgrade --no-deps --target $(NEWEST) $(NEWEST_TRANSFORMERS)
	touch $@

ready: $(READY)

compare: $(READY)
	$(BIN)/python -m moe_kernels compare $(FAMILY) $(ARGS)

# Side by side unasked: mypy without its cache takes as long as the tests.
check: $(READY)
	@$(MAKE) --no-print-directory -j2 --output-sync=target test-quick lint

# The rules and the pages, every step of the Triton backend, the layer's own numbers, the plugin's keys and the verdicts
# of `compare`. Less what takes seconds a test.
QUICK := tests/test_layout.py tests/test_stacks.py tests/test_shapes.py tests/cli/test_docs.py tests/cli/test_errors_page.py tests/core/test_kernels.py \
	$(addprefix tests/core/test_experts.py::test_,activations the_partials_are_autograds integers_are_bitwise_exact hostile_routings) \
	tests/integrations/test_axolotl_args.py tests/compare/test_compare_judge.py tests/compare/test_compare_metrics.py tests/telemetry/test_router_load.py

test-quick: $(READY)
	$(BIN)/python -m pytest -q $(QUICK) -k "not many_rows and not entry_point and not torch.float16"

# `make -j2 test` runs two of the four at a time: each keeps one core busy. The longest come first.
test: test-runs test-main test-newest test-compiled

# Those that start trainings, several ranks, or kill what they started; and first, before anything is interpreted in this
# process, those that compile: the interpreter leaves its marks on triton.language.
RUNS := tests/core/test_launch.py tests/integrations/test_axolotl_train.py tests/integrations/test_axolotl_checkpoints.py tests/compare/test_compare_end_to_end.py tests/distributed tests/fuzz

# Without a GPU the kernels run in triton's interpreter (tests/conftest.py).
test-main: $(READY)
	@echo "== the suite"
	$(BIN)/python -m pytest tests --ignore=tests/aot $(RUNS:%=--ignore=%)

# transformers' own engines run under its newest release alone (test-newest).
test-runs: $(READY)
	@echo "== trainings, several ranks, fuzzing"
	$(BIN)/python -m pytest $(RUNS) --ignore=tests/distributed/test_transformers_engines.py

# What depends most on the versions of torch, triton, transformers, PEFT and Axolotl, for a second stack (.ci/run):
# without fuzzing, reports, benchmarks, whole comparisons and the like (of tests/core SAME), which are our own code on
# every stack, and of several ranks only LoRA. CI has 90 minutes on machines of very different speed.
test-stack: test-stack-runs test-stack-main test-hopper
STACK_RUNS := $(filter-out tests/fuzz tests/distributed tests/compare/%,$(RUNS)) tests/distributed/test_lora.py \
	tests/distributed/test_scaling.py::test_axolotl_trains_a_large_models_adapter_on_two_ranks
SAME := $(addprefix tests/core/test_,$(addsuffix .py,mutations add_a_backend properties derivatives sanitized nonfinite ambient \
	factors packed fp8_activations without_data))
STACK := core router integrations conformance telemetry tuning cli test_configs.py test_stacks.py

test-stack-main: $(READY)
	$(BIN)/python -m pytest $(STACK:%=tests/%) $(RUNS:%=--ignore=%) $(SAME:%=--ignore=%)

test-stack-runs: $(READY)
	$(BIN)/python -m pytest $(STACK_RUNS)

# A process of its own: the interpreter is chosen when a kernel is defined, and the compiler needs it off.
test-compiled: $(READY)
	@echo "== every kernel compiled ahead of time for sm_80, sm_90 and sm_100"
	MOE_KERNELS_AOT=1 $(BIN)/python -m pytest tests/aot

HOPPER := tests/aot -m "not one_triton"
test-hopper: $(READY)
	@echo "== every kernel for Hopper compiled ahead of time"
	MOE_KERNELS_AOT=1 $(BIN)/python -m pytest $(HOPPER)

# Under another triton than the installed one, in a folder beside it: make test-triton-3.7.1
test-triton-%: $(VENV)-triton-%/.ready
	@echo "== every kernel for Hopper compiled, and launched on a driver that only remembers, with triton $*"
	PYTHONPATH=$(VENV)-triton-$* MOE_KERNELS_AOT=1 $(BIN)/python -m pytest $(HOPPER)
	PYTHONPATH=$(VENV)-triton-$* $(BIN)/python -m pytest tests/core/test_launch.py

# With a torch that no Axolotl takes yet, the triton that it brings, and without Axolotl: make test-torch-2.15.0
test-torch-%: $(VENV)-torch-%/.ready
	@echo "== the op, the router, transformers' newest release and PEFT with torch $*"
	$(VENV)-torch-$*/bin/python -m pytest tests/core/test_launch.py
	$(VENV)-torch-$*/bin/python -m pytest $(addprefix tests/,core router integrations conformance telemetry tuning) \
	$(RUNS:%=--ignore=%) tests/distributed/test_transformers_engines.py

.PRECIOUS: $(VENV)-triton-%/.ready $(VENV)-torch-%/.ready
$(VENV)-triton-%/.ready: $(READY)
	$(BIN)/python -m pip install --upgrade --no-deps --target $(@D) triton==$*
	touch $@

$(VENV)-torch-%/.ready:
	python="$(or $(PYTHON),$$(.ci/find-python $(PYTHONS)))"; "$$python" -m venv --clear $(@D)
	$(@D)/bin/python -m pip install torch==$*
	$(@D)/bin/python -m pip install -e '.[dev,report]' $(NEWEST_TRANSFORMERS) peft==0.21.2 accelerate bitsandbytes datasets
	touch $@

test-newest: $(NEWEST_READY)
	@echo "== the transformers integration and every experts class of $(firstword $(NEWEST_TRANSFORMERS))"
	PYTHONPATH=$(NEWEST) $(BIN)/python -m pytest tests/integrations/test_transformers.py tests/integrations/test_peft.py tests/integrations/test_quantized.py tests/integrations/test_fp8.py tests/integrations/test_mxfp4.py tests/integrations/test_resume.py tests/bench/test_fp8_peers.py tests/conformance tests/router/test_router_models.py tests/router/test_router.py::test_as_close_to_the_truth_as_the_model_itself tests/distributed/test_transformers_engines.py tests/distributed/test_scaling.py::test_a_tiny_model_on_two_ranks

# More than 10,000 inputs, new ones each time (about 20 minutes on two cores); the suite tries some hundreds of them.
fuzz: $(READY)
	MOE_KERNELS_FUZZ=600 $(BIN)/python -m pytest tests/fuzz -q --timeout=7200 $(ARGS)

# Breaks each kernel in several ways and shows that the tests notice every one. ARGS=--gpu: the kernels for Hopper.
mutants: $(READY)
	$(BIN)/python tests/core/mutations.py $(ARGS)

# Every kernel under NVIDIA's compute-sanitizer (needs a GPU; under three minutes on one H200).
sanitize: $(READY)
	$(BIN)/python -m pip install -e '.[sanitize]'
	$(BIN)/python benchmarks/sanitize.py $(ARGS)

# A wheel as it is released, and the test that what it must hold is in it and works.
wheel: $(READY)
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .
	$(BIN)/python -m pytest tests/integrations/test_axolotl_train.py -q -k wheel

lint: $(READY)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

docs: $(READY)
	$(BIN)/python -m pip install -e '.[docs]'
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf .venv .venv-* site artifacts build dist
