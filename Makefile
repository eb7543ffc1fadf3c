# make train   run the main job (make train ARGS="optimizer=adam trainer.epochs=5")
# make test    run the tests
# make test-long   the proofs that take minutes: compiled steps, recipes, searches
# make check   format, lint and types, then the tests
# make test-hydra-1.4   the tests of what Hydra does, with the pre-release of Hydra 1.4
# make clean   remove what the others made, but no runs

PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/installed
NEXT_VENV = .venv-hydra-1.4
NEXT_INSTALLED = $(NEXT_VENV)/installed
HYDRA_TESTS = $(addprefix tests/test_,$(addsuffix .py,allow_list build cli config hydra_sweep \
	hydra_versions idioms plain readme references reproduce resolvers search secrets suggestions \
	sweep trust))

.PHONY: train test test-long test-hydra-1.4 check clean

train: $(INSTALLED)
	$(BIN)/python -m experiments $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

test-long: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --dist loadfile -m long $(ARGS)

test-hydra-1.4: $(NEXT_INSTALLED)
	$(NEXT_VENV)/bin/python -m pytest -n auto --dist loadfile -m 'long or not long' $(HYDRA_TESTS) $(ARGS)

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

clean:
	rm -rf $(VENV) $(NEXT_VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

# torch is pinned to a release whose CPU build is small
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(INSTALLED)

$(NEXT_INSTALLED): pyproject.toml constraints.txt constraints-hydra-1.4.txt
	$(PYTHON) -m venv $(NEXT_VENV)
	grep -vE '^(hydra-core|omegaconf)==' constraints.txt > $(NEXT_VENV)/constraints.txt
	$(NEXT_VENV)/bin/python -m pip install --quiet --editable '.[dev]' \
		--constraint $(NEXT_VENV)/constraints.txt --constraint constraints-hydra-1.4.txt
	touch $(NEXT_INSTALLED)
