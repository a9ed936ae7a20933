# Everything that a contributor or CI runs; `make` alone lists it.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip --no-input -qq
PROTOS = $(wildcard fedcore/wire/v1/*.proto)
# $(call protoc,DIR) writes the code of every .proto file below DIR, at its import path.
protoc = $(BIN)/python -m grpc_tools.protoc -I. --python_out=$1 --pyi_out=$1 --grpc_python_out=$1 $(PROTOS)

# Without bytecode every process that the demo and the tests start would compile torch anew, ten seconds each.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help dev demo test test-full check bench chaos docs proto clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

dev: $(INSTALLED) ## make .venv with everything that development needs

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("fedcore needs Python 3.11 or newer, but \
	$(PYTHON) is %d.%d; run: make dev PYTHON=python3.12" % sys.version_info[:2])'
	@echo "Installing into .venv (a few minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

demo: dev ## simulate a task, deploy it on this machine, compare the two models
	@$(BIN)/fedcore demo

test: dev ## the quick tests
	@$(BIN)/pytest -q

test-full: dev ## every test, on SQLite and PostgreSQL, then the minutes that each folder took
	@PYTHONPATH=tests/tools $(BIN)/pytest -q -m "" -p minutes --postgres

check: dev ## lint, types, import rules, generated code, the built wheel
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@rm -rf build/proto && mkdir -p build/proto && $(call protoc,build/proto)
	@diff -ru -x '*.proto' -x __init__.py -x __pycache__ build/proto/fedcore/wire/v1 fedcore/wire/v1 \
		|| { echo "The generated code differs from the .proto files; run: make proto"; exit 1; }
	@$(BIN)/pytest -q -m "" tests/packaging

bench: dev ## the figures of the README, as JSON lines
	@for job in digits-mlp-100 digits-mlp-1000 digits-cnn-100 mnist-cnn-100; do for engine in sequential auto; do \
		$(BIN)/fedcore bench simulate $$job --engine $$engine || exit 1; done; done
	@$(BIN)/fedcore bench aggregators
	@for job in digits-mlp-100 digits-cnn-100; do $(BIN)/fedcore bench privacy $$job || exit 1; done
	@$(BIN)/fedcore bench noise
	@$(BIN)/fedcore bench ledger
	@for degree in 40 99; do $(BIN)/fedcore bench secagg --degree $$degree || exit 1; done
	@for encryption in tls sealed secagg; do $(BIN)/fedcore bench deploy --params 100000 --clients 8 --rounds 20 \
		--encryption $$encryption || exit 1; done
	@$(BIN)/fedcore bench deploy --params 1000 --clients 2 --rounds 20
	@$(BIN)/fedcore bench deploy --params 1000 --clients 10 --rounds 60
	@$(BIN)/fedcore bench deploy --params 10000000 --clients 2 --rounds 8
	@$(BIN)/fedcore bench deploy --params 100000000 --clients 2 --rounds 1
	@$(BIN)/fedcore bench load
	@$(BIN)/fedcore bench scale

chaos: dev ## hundreds of kills at random, after which nothing may be lost
	@$(BIN)/fedcore bench chaos

docs: dev ## the documents, into site/
	@# No --quiet: it drops the warnings before --strict counts them, and the build is green.
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

proto: dev ## regenerate the code of the wire format
	@$(call protoc,.)

clean: ## remove what the targets made
	@rm -rf .venv build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
