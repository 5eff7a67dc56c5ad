# Creates the environment and runs the checks. Requires only Python 3.10 or newer with venv, and a package index.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test lint types doctest docs dist clean

demo: $(READY)  ## distill a student from a teacher on real digits, in less than a minute
	$(BIN)/lkd fit --config configs/digits/kd.yaml
	@echo "To run lkd commands in this shell, first activate the environment:  . $(BIN)/activate"

test: $(READY)  ## run the tests, one process per core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

lint: $(READY)  ## run the linter and check the formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## check the types
	$(BIN)/mypy

doctest: $(READY)  ## run the doctests
	$(BIN)/python -m pytest --doctest-modules lkd

docs: $(READY)  ## build the documentation in build/docs; a broken link or an undocumented name is an error
	$(BIN)/python docs/build.py

dist: $(READY)  ## build and check wheel and source distribution
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "lkd requires Python 3.10 or newer; select an interpreter with: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

clean:  ## remove the environment
	rm -rf .venv
