# make train   run the main job (make train ARGS="optimizer=adam trainer.epochs=5")
# make test    run the tests
# make check   format, lint and types, then the tests
# make clean   remove what the others made, but no runs

PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/installed

.PHONY: train test check clean

train: $(INSTALLED)
	$(BIN)/python -m experiments $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

# torch is pinned to a release whose CPU build is small
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(INSTALLED)
