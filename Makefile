# `make demo` and `make test` need nothing but Python 3.10 or newer; both install into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-fast package floors newest clients fuzz lint format types public-types bench site clean

demo: $(VENV)/.installed
	$(BIN)/python examples/digits.py

test: lint types
	$(BIN)/python -m pytest

test-fast: lint types
	$(BIN)/python -m pytest -m "not slow"

# Builds sdist and wheel, and uses both as a stranger would.
package: $(VENV)/.installed
	$(BIN)/python -m tests.package

# The quicker tests with other versions, in environments made anew: the lowest that pyproject.toml allows; the newest there are.
# Another Python by PYTHON=python3.13, another torch by TORCH=2.13.0; TESTS narrows what is run.
TESTS ?= tests -m "not slow"
floors newest:
	$(PYTHON) -m venv --clear .venv-$@
	sed $(if $(TORCH),-e 's/^torch==.*/torch==$(TORCH)/') $(if $(filter newest,$@),-e '/^torch==$(TORCH)$$/!d') constraints/floors.txt > .venv-$@/constraints.txt
	.venv-$@/bin/python -m pip install --quiet --constraint .venv-$@/constraints.txt torch
	.venv-$@/bin/python -m pip install --quiet --constraint .venv-$@/constraints.txt --editable '.[test]'
	.venv-$@/bin/python -m pytest $(TESTS) $(addprefix -W default::,DeprecationWarning PendingDeprecationWarning FutureWarning)

# Needs no .venv: each client has an environment of its own.
clients:
	$(PYTHON) -m tests.clients.run

fuzz: $(VENV)/.installed
	$(BIN)/python -m tests.random_programs --programs 10000

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

# Whether every public name has its type written out; needs node.
public-types: $(VENV)/.installed
	cd / && PATH="$(CURDIR)/$(BIN):$$PATH" npx --yes pyright@1.1.414 --verifytypes lightning_gradnorm --ignoreexternal

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/overhead.py

# Every page and the API reference, strictly: a link that leads nowhere ends it. Open build/site/index.html.
site: $(VENV)/.installed
	$(BIN)/python -m sphinx -q -W --keep-going -c docs . build/site

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or newer is needed; say which with make PYTHON=python3.12"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) .venv-* dist runs lightning_logs
