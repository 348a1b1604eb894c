# The usual verbs. Each is a script that says more in its first lines: scripts/README.md.
.PHONY: help setup lint types imports test quick bench docs lanes wheel
VENV = $(or $(XPUQUANT_VENV),.venv)
PYTHON = $(VENV)/bin/python

help:
	@echo "make setup    the development environment, .venv"
	@echo "make lint     ruff: format and lint"
	@echo "make types    mypy"
	@echo "make imports  who may import whom"
	@echo "make test     lint, imports, types, the default suite"
	@echo "make quick    the tests that are not slow"
	@echo "make lanes    the slow lanes: the lean install, IPEX, oldest versions, two huggingface_hubs, vLLM"
	@echo "make bench    every goal of conversion, in one table"
	@echo "make docs     the documentation site, in site/"
	@echo "make wheel    dist/*.whl and its bill of materials"

setup:
	scripts/setup dev,onednn,ark,transformers,ray

lint: setup
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .

types: setup
	scripts/lanes/types

imports: setup
	scripts/lanes/imports

test:
	scripts/test

quick:
	scripts/test -m "not slow"

lanes:
	scripts/lanes/lean
	scripts/lanes/ipex
	scripts/lanes/oldest
	scripts/lanes/hub
	scripts/lanes/vllm

bench: setup
	PYTHONSAFEPATH=1 $(PYTHON) scripts/bench/convert.py

docs:
	scripts/lanes/docs

wheel: setup
	rm -rf dist
	$(PYTHON) -m build --wheel --outdir dist .
	$(PYTHON) -P scripts/release/sbom.py dist/*.whl > dist/xpuquant.cdx.json
