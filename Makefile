# Every target sets up .venv by itself when it is missing or when pyproject.toml or constraints.txt have changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEV := $(VENV)/.dev
PEERS := $(VENV)/.peers
DOCS := $(VENV)/.docs

DEMO_ARGS ?=
TEST_ARGS ?= -n 2 --dist loadfile
BENCH_ARGS ?=
TRITONS ?= 3.6.0 newest
VERSIONS ?= lowest newest
CORE_TESTS := $(foreach name,logits/test_statistics tokens/test_masks tokens/test_entropy_quantile losses/test_losses \
	lm_head/test_lm_head_statistics trl/test_trainer,tests/$(name).py)

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-peers test-triton test-versions bench bench-pytest docs lint clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-13s %s\n", $$1, $$2}'
	@echo "Settings: PYTHON=$(PYTHON), DEMO_ARGS, TEST_ARGS=$(TEST_ARGS), BENCH_ARGS, TRITONS=$(TRITONS), VERSIONS=$(VERSIONS)"

demo: $(READY) ## train a small model with GRPO, plain and with the remedies; write report.html
	$(BIN)/rlloss demo $(DEMO_ARGS)

# pytest-benchmark switches itself off under xdist and warns, so it is not loaded here.
test: $(DEV) ## run the tests of the product
	$(BIN)/python -m pytest -p no:benchmark -m "not slow" $(TEST_ARGS)

test-all: $(DEV) ## run all tests: also long sweeps, every compile target, more ranks and the benchmarks' programs
	$(BIN)/python -m pytest -p no:benchmark $(TEST_ARGS)

test-peers: $(PEERS) ## run the tests against Liger's and verl's own functions
	$(BIN)/python -m pytest -p no:benchmark $(TEST_ARGS) tests/losses/test_peers.py tests/entropy/test_diagnostics.py tests/rewards/test_resolution.py

bench: $(PEERS) ## test, time everything against its peers, write tables and plots to benchmarks/results/
	$(BIN)/python -m benchmarks.run $(BENCH_ARGS)

bench-pytest: $(PEERS) ## the same contenders one after the other under pytest-benchmark
	$(BIN)/python -m pytest benchmarks/bench.py --benchmark-only $(BENCH_ARGS)

# Each version into a folder of its own, which Python finds before the installed one.
test-triton: $(DEV) ## compile every kernel under other versions of Triton: TRITONS="3.6.0 newest"
	@for version in $(TRITONS); do \
		$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/triton-$$version \
			triton$$([ $$version = newest ] || echo "==$$version") || exit 1; \
		PYTHONPATH=$(VENV)/triton-$$version $(BIN)/python -m benchmarks.compiler.report --check || exit 1; \
	done

# An environment of its own for each: lowest by constraints-lowest.txt, newest without constraints.
# TRL before 1.15 imports requests and does not ask for it.
test-versions: ## run the core tests with other versions of torch, Triton, TRL and transformers: VERSIONS="lowest newest"
	@for version in $(VERSIONS); do \
		$(PYTHON) -m venv $(VENV)/$$version && \
		$(VENV)/$$version/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager \
			$$([ $$version = newest ] || echo "-c constraints-$$version.txt") \
			-e ".[trl]" requests pytest pytest-xdist hypothesis || exit 1; \
		$(VENV)/$$version/bin/python -m pytest -p no:benchmark $(TEST_ARGS) $(CORE_TESTS) || exit 1; \
	done

docs: $(DOCS) ## build the site to build/docs; a broken link or a warning is an error
	$(BIN)/python -m sphinx -q -W --keep-going -E -d build/doctrees docs build/docs
	@echo "build/docs/index.html"

lint: $(DEV) ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean: ## remove .venv, caches and build products
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written last, so an interrupted installation is taken up again.
$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "rlloss needs Python >= 3.10, but '$(PYTHON)' was not found; try: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "rlloss needs Python >= 3.10, but '$(PYTHON)' is $$($(PYTHON) -V 2>&1); try: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ".[trl]"
	@touch $@

$(DEV): $(READY)
	$(BIN)/python -m pip install -c constraints.txt -e ".[trl,dev]"
	@touch $@

$(DOCS): $(DEV)
	$(BIN)/python -m pip install -c constraints.txt -e ".[trl,dev,docs]"
	@touch $@

# --no-deps: a peer must not move the versions under test. What compares with a peer that is missing is left out.
$(PEERS): $(DEV)
	$(BIN)/python -m pip install --no-deps -c constraints.txt liger-kernel verl==0.9.1 cut-cross-entropy \
		&& touch $@ || echo "a peer could not be installed: what compares with it is left out"
