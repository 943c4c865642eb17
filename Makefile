# Every target sets up .venv by itself when it is missing or when pyproject.toml or constraints.txt have changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := $(VENV)/.peers

DEMO_ARGS ?=
TEST_ARGS ?= -n 2 --dist loadgroup
BENCH_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-peers bench lint clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'
	@echo "Settings: PYTHON=$(PYTHON), DEMO_ARGS, TEST_ARGS=$(TEST_ARGS), BENCH_ARGS"

demo: $(READY) ## train a small model with GRPO, plain and with the remedies; write report.html
	$(BIN)/rlloss demo $(DEMO_ARGS)

# pytest-benchmark switches itself off under xdist and warns, so it is not loaded here.
test: $(READY) ## run the tests
	$(BIN)/python -m pytest -p no:benchmark $(TEST_ARGS)

test-peers: $(PEERS) ## run the tests against Liger's and verl's own functions
	$(BIN)/python -m pytest -p no:benchmark $(TEST_ARGS) tests/test_peers.py tests/test_diagnostics.py tests/test_reward_resolution.py

bench: $(PEERS) ## time the kernels against their peers
	$(BIN)/python -m pytest benchmarks --benchmark-only $(BENCH_ARGS)

lint: $(READY) ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean: ## remove .venv, caches and build products
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an interrupted installation is taken up again.
$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "rlloss needs Python >= 3.10, but '$(PYTHON)' was not found; try: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "rlloss needs Python >= 3.10, but '$(PYTHON)' is $$($(PYTHON) -V 2>&1); try: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ".[trl,dev]"
	@touch $@

# --no-deps: a peer must not move the versions under test. What compares with a peer that is missing is left out.
$(PEERS): $(READY)
	$(BIN)/python -m pip install --no-deps -c constraints.txt liger-kernel verl==0.9.1 \
		&& touch $@ || echo "liger-kernel and verl could not be installed: what compares with them is left out"
