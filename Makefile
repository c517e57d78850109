# bdtrain: every target sets up .venv by itself when it is missing or stale.
#
#   PYTHON=python3.12 make test       another Python (3.11 or 3.12)
#   TORCH=cpu|cuda|installed          which torch; default: cuda where nvidia-smi is, else cpu; kept once chosen
#   TORCH_INDEX_URL=URL               an index that offers torch's CPU builds, where pip's settings know none
#   INPUT=path                        text for make quickstart: a file or a folder
#   RANKS=2                           processes that train together in make quickstart
#   REFIT=ray|inline|process|off      where make quickstart fits its noise plan again; installs Ray for ray
#   RUN=runs/my-run                   the run that make dashboard shows
#   WORKERS=2                         processes that test at a time (0: in pytest's own process, for --pdb)
#   ARGS="-k name -x"                 more arguments for pytest

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help quickstart test check fmt fmt-check lint types test-unit test-kernels test-dist \
	test-reliability test-e2e bench clean \
	dashboard env-run env-ray env-dev env-dashboard

TORCH ?= auto
INPUT ?=
RANKS ?= 1
REFIT ?=
RUN ?= runs/quickstart/run
WORKERS ?= 2
ARGS ?=
PY := .venv/bin/python

# Spinning threads of OpenMP make two processes on two cores many times slower; no extension is ever compiled.
export OMP_WAIT_POLICY := passive
export DS_BUILD_OPS := 0

# A .venv keeps its Python. Others are tried by running them: a version manager leaves names on the path that fail when called.
define FIND_PYTHON
fits() { "$$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1; }; \
found=; \
for candidate in $(if $(PYTHON),"$(PYTHON)",.venv/bin/python python3.11 python3.12 python3 python); do \
	if fits "$$candidate"; then found="$$candidate"; break; fi; \
done; \
if [ -z "$$found" ]; then \
	echo "bdtrain needs Python 3.11 or 3.12 with its venv module; found: $$($(if $(PYTHON),"$(PYTHON)",python3) --version 2>&1 | head -1)." \
		"Install one and name it: PYTHON=python3.11 make $(or $(firstword $(MAKECMDGOALS)),help)" >&2; \
	exit 2; \
fi
endef

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

env-run:
	@$(FIND_PYTHON); "$$found" tools/set_up_venv.py --torch "$(TORCH)"

env-ray:
	@$(FIND_PYTHON); "$$found" tools/set_up_venv.py --torch "$(TORCH)" --extras ray

env-dev:
	@$(FIND_PYTHON); "$$found" tools/set_up_venv.py --torch "$(TORCH)" --extras dev

env-dashboard:
	@$(FIND_PYTHON); "$$found" tools/set_up_venv.py --torch "$(TORCH)" --extras mlflow

quickstart: $(if $(filter ray,$(REFIT)),env-ray,env-run) ## from text to a trained model in minutes (INPUT=your text, RANKS=2, REFIT=ray)
	$(PY) tools/quickstart.py --ranks $(RANKS) $(if $(INPUT),--input "$(INPUT)") \
		$(if $(REFIT),$(if $(filter off,$(REFIT)),refit.mode=off,refit.placement=$(REFIT)))

dashboard: env-dashboard ## MLflow's page on a run (RUN=runs/my-run), on this machine only; Ctrl-C ends it
	@$(PY) tools/open_dashboard.py "$(RUN)"

# One pytest for all folders, so that one summary counts everything. What cannot be shared out (a folder whose tests start
# processes goes to one worker) comes first, so that no worker is left with ten minutes of it at the end.
TEST_FOLDERS = tests/reliability tests/distributed tests/e2e tests/kernels tests/unit
TEST := -m pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

test: env-dev ## all tests
	$(PY) $(TEST) $(TEST_FOLDERS) $(ARGS)

check: fmt-check lint types test ## format, lint, types, import layers, tests

fmt: env-dev ## rewrite the format
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix-only --quiet .

fmt-check: env-dev
	$(PY) -m ruff format --check .

lint: env-dev ## ruff, generated files, import layers
	$(PY) -m ruff check .
	$(PY) tools/config_reference.py --check
	$(PY) -m pytest -q tests/unit/test_import_layers.py

types: env-dev ## mypy
	$(PY) -m mypy

test-unit: env-dev ## tests without processes
	$(PY) $(TEST) tests/unit $(ARGS)

test-kernels: env-dev ## kernels against their reference
	$(PY) $(TEST) tests/kernels $(ARGS)

test-dist: env-dev ## real ranks against one process
	$(PY) -m pytest tests/distributed $(ARGS)

test-reliability: env-dev ## kills, signals, damaged files (ARGS="-m soak" for the long ones)
	$(PY) -m pytest tests/reliability $(ARGS)

test-e2e: env-dev ## the launchers on tiny configs
	$(PY) -m pytest tests/e2e $(ARGS)

bench: env-dev ## time of a training step against a twin of the published computation
	$(PY) tools/bench/train_step.py $(ARGS)

clean: ## remove .venv and caches; runs/ stays
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
