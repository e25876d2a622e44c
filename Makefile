# Every target sets up `.venv` itself; the second time that takes no time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
THREADS ?= $(shell nproc)

.PHONY: setup demo test test-lowest browser test-all gpu-check docs lint clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "unidiff needs Python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $(STAMP)

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	touch $(DOCS_STAMP)

demo: setup
	$(BIN)/unidiff demo --out out

# Two processes of one thread each: on two cores in half the time. The second one's report is shown when both are done.
DEVICE := $(addprefix tests/device/test_,training.py image_tokenizers.py evaluation.py commands.py)
HALF := tests/train tests/data tests/evaluation tests/worlds tests/recipes tests/cli tests/tokens $(DEVICE)
define FAST_TESTS
	@log=$$(mktemp); export OMP_NUM_THREADS=1; \
	$(1)/bin/python -m pytest $(HALF) > $$log 2>&1 & half=$$!; \
	$(1)/bin/python -m pytest $(addprefix --ignore=,$(HALF)); first=$$?; \
	wait $$half; second=$$?; cat $$log; rm -f $$log; \
	[ $$first -eq 0 ] && [ $$second -eq 0 ]
endef

test: setup
	$(call FAST_TESTS,$(VENV))

# The lowest version that pyproject.toml allows of each package it names, in an environment of its own; torch is several GB.
LOWEST := .venv-lowest
UV = $(LOWEST)/bin/uv pip
$(LOWEST)/.installed: pyproject.toml
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet uv
	$(UV) compile --quiet --resolution lowest-direct --extra dev --python $(LOWEST)/bin/python pyproject.toml -o $(LOWEST)/versions.txt
	$(UV) install --quiet --python $(LOWEST)/bin/python -r $(LOWEST)/versions.txt
	$(UV) install --quiet --python $(LOWEST)/bin/python --no-deps -e .
	touch $@

test-lowest: $(LOWEST)/.installed
	$(call FAST_TESTS,$(LOWEST))

# The page of the studio is tested in a browser; where none can be installed, these tests say so and are left out.
browser: $(VENV)/.browser

$(VENV)/.browser: $(STAMP)
	$(BIN)/python -m pip install --quiet -e '.[dev,demo,browser]'
	command -v chromium || command -v chromium-browser || command -v google-chrome \
		|| (apt-get update -qq && apt-get install -qq -y chromium) || echo "no chromium: the tests of the page are skipped"
	touch $@

test-all: browser $(DOCS_STAMP)
	$(BIN)/python -m pytest -m 'slow or not slow'

# On a GPU machine, at most 8 minutes; a second call goes on. Elsewhere tiny shapes show that the checks run.
gpu-check: setup
	$(BIN)/python inference/gpu_check.py --out out/gpu-check

# The site, in out/site; a warning is an error. `$(BIN)/python -m mkdocs serve` shows it while you write.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(LOWEST) out build dist *.egg-info
