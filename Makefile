# demo, test, ... build .venv first if it is missing, broken or older than what it was made from.
# PYTHON is any Python 3.11+.  OP=token_logp limits `make bench`; TESTS=tests/kernels limits the tests.

PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/.installed
BUILT_FROM := pyproject.toml setup.py constraints.txt $(shell find csrc -type f)
export PYTHONSAFEPATH := 1

ifneq ($(shell { $(PY) -c "import fastrl._C; print(1)"; } 2>/dev/null),1)  # no interpreter, or no built package in it
$(shell rm -f $(STAMP))
endif

.PHONY: demo demo-seeds learning grpo-loop test test-slow mutants ptx lint type compile-table sass bench gpu-check check clean

demo: $(STAMP)
	$(PY) -m fastrl.bench.studies.demo --output-dir demo

demo-seeds: $(STAMP)
	$(PY) -m fastrl.bench.studies.demo --output-dir demo --seeds 3 --page docs/results.md

learning: $(STAMP)
	$(PY) -m fastrl.bench.studies.learning --output-dir runs/learning --seeds 3 --results bench/results --page docs/results.md

grpo-loop: $(STAMP)
	$(PY) -m fastrl.recipes.grpo_loop

# Kernels also compile with older Tritons, installed beside the newest.  There is none outside Linux, where these tests are skipped.
ifeq ($(shell uname -s),Linux)
OLDEST := .triton/3.6.0
endif

.triton/%: | $(STAMP)
	rm -rf $@.part
	$(PY) -m pip install --target $@.part --no-deps triton==$*
	mv $@.part $@

test: $(STAMP) $(OLDEST)
	$(PY) -m pytest -n auto --dist worksteal -m "not gpu and not slow and not multigpu and not ptx" $(TESTS)

test-slow: $(STAMP)
	$(PY) -m pytest -m "slow and not gpu and not multigpu" $(TESTS)

# faults planted one at a time in a copy of the tree, each of which a test must find; WORDS=sampler chooses some
mutants: $(STAMP)
	$(PY) tests/mutants.py $(WORDS)

# the GPU code that is interpreted in `make test`, on more shapes, and its barriers taken away one by one
ptx: $(STAMP) $(OLDEST)
	$(PY) -m pytest -n auto --dist worksteal tests/ptx

lint: $(STAMP)
	$(PY) -m ruff check
	$(PY) -m ruff format --check

type: $(STAMP)
	$(PY) -m mypy

ifdef OLDEST
compile-table: $(STAMP) $(OLDEST) .triton/3.7.1
	$(PY) -m fastrl.bench.compile_table --arch 90 80 100 --beside 3.6.0 3.7.1 --out bench/results/compile.json

sass: $(STAMP) $(OLDEST)
	$(PY) -m fastrl.bench.sass --beside 3.6.0 --out bench/results/sass.json
else
compile-table sass:
	@echo "$@: skipped, there is no Triton for $$(uname -s)"
endif

bench: $(STAMP)
	$(PY) -m fastrl.bench.run $(OP) --output bench/results

check: lint type test

# With the Python, torch and nvcc of the GPU machine itself: no virtual environment, no network.  Everything that a
# GPU has to show, in BUDGET seconds, the build included; the same command again continues.
BUDGET ?= 480
OUT ?= runs/gpu-check
gpu-check:
	PYTHONPATH=. $(PYTHON) -m fastrl.bench.gpu_check --budget $(BUDGET) --out $(OUT) $(if $(RESUME),--resume $(RESUME))

clean:
	rm -rf .venv build dist *.egg-info fastrl/_C*.so

$(STAMP): $(BUILT_FROM)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastrl needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	{ $(PY) -c "import pip"; } 2>/dev/null || { rm -rf .venv && $(PYTHON) -m venv .venv; }
	$(PY) -m pip install -c constraints.txt torch
	$(PY) -m pip install -c constraints.txt -e ".[test,peers]"
	touch $@
