# make demo: simulate, train, predict, evaluate; the report is runs/demo/report.html
# make test: what CI runs; make studies and make slow: the rest, which CI runs every night
# Both make .venv first. PYTHON: the interpreter to make it from (3.11 or later).
# TORCH_INDEX: where to take torch from, for instance https://download.pytorch.org/whl/cpu for a build without CUDA.
PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin
# -qq: errors only. pip would compile on one core, and the tests of every package as well.
PIP := $(BIN)/pip install -qq --disable-pip-version-check --no-compile -c constraints.txt
DATA := data/demo
RUN := runs/demo
SHIPPED := $(RUN)/pretrained
MINUTES ?= 4

.PHONY: install demo test studies slow notebooks readme docs clean audit constraints

install: .venv/.installed

.venv/.installed: setup.py settings.ini constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or \
	sys.exit("Python 3.11 or later is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(PIP) $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX)) torch
	$(PIP) -e '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 -x 'site-packages/.*/tests?/' .venv/lib || true
	touch $@

# Each step continues what an earlier run left: a complete data set is kept, a run is resumed, a finished one stays.
demo: install
	$(BIN)/iceaggr simulate --events 20000 --out $(DATA)
	$(BIN)/iceaggr train --data $(DATA) --out $(RUN) --preset small --minutes $(MINUTES) --resume
	$(BIN)/iceaggr predict --run $(RUN) --data $(DATA) --batches last --out $(RUN)/predictions.parquet
	$(BIN)/iceaggr predict --run small --data $(DATA) --batches last --out $(SHIPPED)/predictions.parquet
	$(BIN)/iceaggr evaluate --predictions $(RUN)/predictions.parquet --data $(DATA) --out $(RUN)
	$(BIN)/iceaggr evaluate --predictions $(SHIPPED)/predictions.parquet --data $(DATA) --out $(SHIPPED)
	$(BIN)/iceaggr display --data $(DATA) --event brightest --predictions $(SHIPPED)/predictions.parquet \
	    --out $(RUN)/event.html
	@$(BIN)/python tools/demo_results.py $(RUN) $(SHIPPED)

test: install
	PATH=$(CURDIR)/$(BIN):$$PATH bash .ci/check

# The notebooks of the studies: a nightly workflow runs them. Also the notebooks that `make test` runs without
# ICEAGGR_PPC, with its events where it is set.
NBDEV_TEST := PATH=$(CURDIR)/$(BIN):$$PATH OMP_NUM_THREADS=1 MPLBACKEND=agg nbdev_test --n_workers 2
studies: install
	$(NBDEV_TEST) --path nbs/studies
	$(NBDEV_TEST) --path nbs/tutorials
	$(NBDEV_TEST) --file_re '^1[0-9]_'

# The tests that take minutes: a nightly workflow runs them.
slow: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow -rs tests

# Known vulnerabilities of the pinned versions. Without the service that lists them nothing is audited; on a CI
# server that is a failure.
AUDIT ?= $(BIN)/pip-audit
NO_ANSWER := "could not be audited|not found on PyPI|connection|max retries|name resolution|timed out|proxy"
audit:
	@command -v $(AUDIT) >/dev/null || { \
	    echo "pip-audit is not installed: pip install pip-audit, or make audit AUDIT=/path/to/pip-audit" >&2; \
	    exit 1; }
	@$(AUDIT) --strict -r constraints.txt --no-deps --disable-pip > .audit 2>&1; code=$$?; tail -n 20 .audit; \
	if [ $$code -ne 0 ] && grep -qiE $(NO_ANSWER) .audit; then \
	    echo "NOT AUDITED: the service that lists vulnerabilities did not answer"; code=$${CI:+1}; \
	fi; \
	rm -f .audit; exit $${code:-0}

# The newest versions within the bounds of settings.ini, into constraints.txt; then `make test`.
constraints:
	TORCH_INDEX=$(TORCH_INDEX) $(PYTHON) tools/refresh_constraints.py

notebooks: install
	$(BIN)/python tools/execute_notebooks.py $(NB)
	$(BIN)/nbdev_clean

readme: install
	$(BIN)/python tools/make_readme.py

# README.md is touched so that nbdev_docs leaves it alone: tools/make_readme.py makes it.
docs: install
	$(BIN)/python tools/check_docs.py
	@command -v quarto >/dev/null || { \
	    echo "The checks above passed. Quarto 1.7 or later makes the pages, and no package registry has it:" \
	        "install it from https://quarto.org/docs/get-started, then run 'make docs' again." >&2; \
	    exit 1; }
	touch README.md
	PATH=$(CURDIR)/$(BIN):$$PATH nbdev_docs

clean:
	rm -rf build dist _docs _pages _proc nbs/nbdev.yml *.egg-info
