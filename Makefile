# make demo: see syncd mirror a simulated practice.   make test: every check and test that needs no root.
# make coverage: the same tests, with every branch that none of them took; it takes twice as long.
# make test-faults (root): every crash, power cut and I/O error, simulated years, planted bugs.
#   SYNCD_FAULTS=nightly make test-faults: ten times as much of it.
# make test-boot (root): Debian, made by debootstrap and booted, with syncd installed as the README says.
#   SYNCD_BOOT_SUITES="bookworm trixie": on both; SYNCD_BOOT_CACHE: where roots are kept between runs.
PY   ?= python3
VENV ?= .venv
BIN  := $(VENV)/bin
comma := ,
space := $() $()
WORKERS := $(shell expr $$(nproc) + 1)# tests wait about as often as they work
PYTEST = $(BIN)/pytest -n $(WORKERS) --dist worksteal --ignore=tests/faults
PIP  := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip

unexport PYTHONDONTWRITEBYTECODE# else each of a thousand processes compiles the product and its tests anew

.PHONY: demo test coverage test-faults test-boot check quick licences lock upgrade clean

demo: $(VENV)/.ready
	$(BIN)/syncd demo

DECISIONS  := agenda answers changes config diff faces gallery guards metrics naming notices pacing report
NOTHING_LOST := archive identity index mirror scrub

# A trace doubles a test's time: only the decisions' own tests have it here.
DECIDED := $(DECISIONS:%=tests/test_%.py)

test: check
	$(PYTEST) --cov --cov-report= $(DECIDED)
	$(BIN)/coverage report --include='$(subst $(space),$(comma),$(DECISIONS:%=syncd/%.py))' --fail-under=100
	$(PYTEST) $(DECIDED:%=--ignore=%)

coverage: $(VENV)/.ready
	$(PYTEST) --cov --cov-report=term
	$(BIN)/coverage report --include='$(subst $(space),$(comma),$(DECISIONS:%=syncd/%.py) $(NOTHING_LOST:%=syncd/%.py))' --fail-under=100

test-faults: $(VENV)/.ready
	$(BIN)/python -m tests.faults.mutants
	$(BIN)/pytest -n $(WORKERS) --maxschedchunk 1 tests/faults -m "not racing" $(if $(filter nightly,$(SYNCD_FAULTS)),-vv)
	$(if $(filter nightly,$(SYNCD_FAULTS)),$(BIN)/pytest -p no:xdist tests/faults -m racing)

# In order, by one process, in a network of its own.
test-boot: $(VENV)/.ready
	$(BIN)/python -m tests.boot.machine
	unshare --net $(BIN)/pytest -p no:randomly -p no:xdist --timeout 400 tests/boot

quick: $(VENV)/.ready
	$(PYTEST) -m "not slow"

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/vulture

# One lock for every Python from 3.11 and every platform, hashes only: nothing unlocked is ever installed.
LOCK = uv pip compile -q $(UPGRADE) --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	--no-emit-find-links --no-header --no-annotate --no-strip-extras --extra build
lock:
	$(LOCK) pyproject.toml -o requirements.txt
	$(LOCK) --extra demo --group dev pyproject.toml -o requirements-dev.txt

# The newest of everything, in one command: locked anew, installed, its licences looked at, and every test.
upgrade:
	$(MAKE) lock UPGRADE=--upgrade
	$(MAKE) licences test

licences: $(VENV)/.ready
	$(BIN)/python -m tests.licences

# Works with python3 and python3-venv; and, where python3-venv is missing but python3-pip is there, by letting the
# system's pip install into an environment that has none of its own.
$(VENV)/.ready: requirements-dev.txt pyproject.toml
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'syncd needs Python 3.11 or newer: make PY=python3.11'; exit 1; }
	@rm -rf $(VENV)
	@if $(PY) -m venv $(VENV) >/dev/null 2>&1; then :; \
	elif rm -rf $(VENV) && $(PY) -m venv --without-pip $(VENV) && $(PY) -m pip --python $(BIN)/python install -q --disable-pip-version-check pip; then :; \
	else echo 'No virtual environment can be made here: apt install python3-venv'; exit 1; fi
	$(PIP) install -q --require-hashes --only-binary :all: -r requirements-dev.txt
	$(PIP) install -q --no-deps --no-build-isolation --editable .
	@touch $@

clean:
	rm -rf $(VENV)
