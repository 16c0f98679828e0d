# make demo   install into .venv, then train and compare with and without the plug-in on the bundled data
# make test   install into .venv, then run the whole test suite
# make lint   ruff
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt

# glibc gives large blocks back to the system and asks for them again in every operation: a third of the time
KEEP_MEMORY := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000 MALLOC_TOP_PAD_=268435456

.PHONY: demo test lint clean
demo: $(VENV)/installed
	$(KEEP_MEMORY) $(BIN)/spotlighter demo

test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

lint: $(VENV)/installed-test
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) *.egg-info

# openai-clip is a source package that needs pkg_resources to build: it is built with this environment's own
# setuptools (< 81) instead of with the newest one in isolation.
$(VENV)/installed: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed, $(PYTHON) is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) "setuptools<81" wheel
	$(PIP) --no-build-isolation --editable .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) --no-build-isolation --editable ".[test]"
	@touch $@
