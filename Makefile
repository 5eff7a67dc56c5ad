# Everything from nothing but Python (3.10 or newer, with venv) and a package index.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test lint types doctest docs dist clean

demo: $(READY)  ## train a student from a teacher on real digits, in less than a minute
	$(BIN)/lkd fit --config configs/digits/kd.yaml
	@echo "for the commands above, first:  . $(BIN)/activate"

test: $(READY)  ## run the tests, a process for each core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

doctest: $(READY)  ## run the examples in the docstrings
	$(BIN)/python -m pytest --doctest-modules lkd

docs: $(READY)  ## build the documentation in build/docs; a broken link or an undocumented name is an error
	$(BIN)/python docs/build.py

dist: $(READY)  ## build and check wheel and source distribution
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "lkd needs Python 3.10 or newer; name one with: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv
