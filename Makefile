# Everything runs in .venv, which the first target that needs it makes. PYTHON=python3.12 make test chooses another Python for it.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# one thread a process: the tests and the daemons are themselves several processes
export OMP_NUM_THREADS ?= 1
# of those processes each would compile the package anew
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install demo test slow soak lint examples bench fuzz dist clean

SECONDS ?= 60
SEED ?= 0
COVERAGE ?=

help: ## What can be made
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /  make \1\t/' | expand -t 18

install: $(INSTALLED) ## Make .venv with p2pfl in it, editable, and all that the tests need

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "p2pfl needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing into .venv; torch is the largest part and takes a few minutes on a slow line."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -m pip check --disable-pip-version-check
	@touch $@

demo: $(INSTALLED) ## Five hospital daemons learn one model; prints each alone, in the network, with all data pooled
	@out=runs/demo-$$(date +%Y%m%d-%H%M%S)-$$$$; \
	echo "$(BIN)/p2pfl up examples/breast_cancer.yaml --out $$out"; \
	$(BIN)/p2pfl up examples/breast_cancer.yaml --out "$$out"

test: $(INSTALLED) ## The tests but the slow ones; COVERAGE=yes measures what they run of p2pfl/, and takes a third longer
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(if $(COVERAGE),--cov --cov-report=term:skip-covered --cov-fail-under=90)

slow: $(INSTALLED) ## The slow tests alone; those that measure attacks have the machine for themselves
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not alone"
	@$(BIN)/python -m pytest -m alone

soak: $(INSTALLED) ## Tests that take many minutes each: large models over slow links, the attacks of the slow tests in full, hours of chaos
	@P2PFL_SOAK=1 $(BIN)/python -m pytest -s tests/node/test_slow_links.py
	@P2PFL_SOAK=1 $(BIN)/python -m pytest -s -m slow tests/transports/test_door.py tests/node/test_floods.py tests/node/test_lying_members.py
	@P2PFL_SOAK=1 $(BIN)/python -m pytest -s tests/testing/test_chaos_soak.py

lint: $(INSTALLED) ## Format, style, types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

examples: $(INSTALLED) ## Run every file of examples/ as it is, in the simulator
	@set -e; cd examples; for file in *.yaml; do \
		echo "examples/$$file"; \
		if [ -z "$$P2PFL_DATA" ] && ! said=$$(../$(BIN)/p2pfl simulate "$$file" --allow-task custom_task:stroke --dry-run 2>&1 >/dev/null); then \
			case "$$said" in *"data fetch"*) echo "left out: $$said"; continue;; esac; \
		fi; \
		../$(BIN)/p2pfl simulate "$$file" --allow-task custom_task:stroke --out "../runs/example-$${file%.yaml}-$$$$"; \
	done

bench: $(INSTALLED) ## The simulator's speed in ratios, beside those recorded; fails where one has dropped by more than 15 %
	@OMP_NUM_THREADS= $(BIN)/python benchmarks/compare.py

fuzz: $(INSTALLED) ## Search for inputs that a parser does not survive, for SECONDS=60 in all; what is found is kept in runs/fuzz
	@if $(BIN)/python -c "import atheris" 2>/dev/null; then PYTHONPATH=tests $(BIN)/python -m fuzz.drive --seconds $(SECONDS) --seed $(SEED); \
		else echo "left out: atheris has no wheel for this system"; fi

dist: $(INSTALLED) ## What is released, in dist/: source, wheel, the list of software in it (CycloneDX), and the hashes of all of them
	@rm -rf dist build
	@SOURCE_DATE_EPOCH=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct)} PIP_CONSTRAINT=constraints.txt $(BIN)/python -m build --outdir dist . >/dev/null
	@$(BIN)/python release/sbom.py dist
	@cd dist && sha256sum * > SHA256SUMS && cat SHA256SUMS

clean: ## Remove .venv, runs and what tools left behind
	rm -rf .venv runs build dist htmlcov tests/interop/node_modules *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f .coverage .coverage.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
