# Thin targets: each sets up what it needs (tests/bootstrap.py; nothing is done where all is there) and runs one tool.

PYTHON ?= python3
BIN := .venv/bin
SETUP = @$(PYTHON) tests/bootstrap.py

.DEFAULT_GOAL := help
.PHONY: help demo test model qemu interop check lint types imports spelling docs bench bench-remote safety fault wheels pins clean \
	setup-check setup-docs setup-test

help: ## list the targets
	@echo "usage: make TARGET [PYTHON=python3.12]"
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1\t\2/p' Makefile | expand -t 16

demo: ## move a running guest between two hosts on this machine
	$(SETUP) demo
	@$(BIN)/python -m tests.demo

test: setup-test ## run the tests
	$(BIN)/python -m pytest -n 3 --dist loadfile

check: setup-check lint types imports spelling docs test ## run everything that must pass before a change lands

lint: setup-check ## check the code and its format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup-check ## check the types
	$(BIN)/mypy

imports: setup-check ## check who imports whom
	$(BIN)/lint-imports --no-logo --no-cache

spelling: setup-check ## check the spelling
	$(BIN)/codespell

docs: setup-docs ## build the documentation into docs/_build/html
	$(BIN)/python -m sphinx -E -a -n -W -q -b html docs docs/_build/html

model: setup-test ## explore the handover, and mutants of it, in every state of small worlds
	@$(BIN)/python -m tests.model

qemu: setup-test ## every option, cuts of copied disks, and every definition, on real QEMU
	@$(BIN)/python -m tests.options.summary

interop: setup-test ## stock virsh and libvirt-python against the daemon, every message of a migration broken
	@$(BIN)/python -m tests.interop

bench: ## measure migrations, starts and counters, and those of others
	$(SETUP) bench
	@$(BIN)/python -m tests.bench
	@$(BIN)/python -m tests.bench.domains

bench-remote: ## measure the daemon beside stock libvirtd, driven by the same client
	$(SETUP) bench
	@$(BIN)/python -m tests.bench.remote

safety: ## measure what the journal costs
	$(SETUP) bench
	@$(BIN)/python -m tests.bench.safety

fault: setup-test ## kill and cut at every step of migrations; SAMPLE=40 SEED=1 picks cases
	@$(BIN)/python -m tests.fault $(if $(SAMPLE),--sample $(SAMPLE)) $(if $(SEED),--seed $(SEED))

wheels: setup-test ## build the wheels of all distributions into dist/
	for folder in core plugins/qemu plugins/xen plugins/remote; do \
		$(BIN)/python -m build --wheel --no-isolation --outdir dist $$folder || exit 1; done

pins: ## resolve tests/constraints.txt anew (needs uv)
	$(SETUP) pins

clean: ## remove all that the targets made
	rm -rf .venv .cache dist docs/_build .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find core plugins tests docs -name __pycache__ -type d -prune -exec rm -rf {} +

setup-check:
	$(SETUP) check

setup-docs:
	$(SETUP) docs

setup-test:
	$(SETUP) test
