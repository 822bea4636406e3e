# make demo: simulate, train, predict, evaluate; the report is runs/demo/report.html
# make test: what CI runs
# Both make .venv first. PYTHON: the interpreter to make it from (3.11 or 3.12).
# TORCH_INDEX: where to take torch from, for instance https://download.pytorch.org/whl/cpu for a build without CUDA.
PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin
DATA := data/demo
RUN := runs/demo
WEIGHTS := iceaggr/pretrained/small.safetensors
MINUTES ?= 4

.PHONY: install demo test notebooks readme docs clean

install: .venv/.installed

.venv/.installed: setup.py settings.ini constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info[:2] in ((3, 11), (3, 12)), "Python 3.11 or 3.12 is needed: make PYTHON=python3.12 ..."'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

# Each step takes up what an earlier run left: a complete data set is kept, a run is resumed (a finished one is left as it is).
demo: install
	$(BIN)/iceaggr simulate --events 20000 --geometry $(WEIGHTS) --out $(DATA)
	$(BIN)/iceaggr train --data $(DATA) --out $(RUN) --preset small --minutes $(MINUTES) $$(test -f $(RUN)/settings.json && echo --resume)
	$(BIN)/iceaggr predict --run $(RUN) --data $(DATA) --batches last --out $(RUN)/predictions.parquet
	$(BIN)/iceaggr predict --run $(WEIGHTS) --data $(DATA) --batches last --out $(RUN)/pretrained/predictions.parquet
	@echo "the model trained here:"
	@$(BIN)/iceaggr evaluate --predictions $(RUN)/predictions.parquet --data $(DATA) --out $(RUN)
	@echo "the model that comes with the package:"
	@$(BIN)/iceaggr evaluate --predictions $(RUN)/pretrained/predictions.parquet --data $(DATA) --out $(RUN)/pretrained
	$(BIN)/iceaggr display --data $(DATA) --event brightest --predictions $(RUN)/pretrained/predictions.parquet --out $(RUN)/event.html

test: install
	PATH=$(CURDIR)/$(BIN):$$PATH bash .ci/check

notebooks: install
	$(BIN)/python data_scripts/execute_notebooks.py $(NB)
	$(BIN)/nbdev_clean

readme: install
	$(BIN)/python data_scripts/make_readme.py

# README.md is touched so that nbdev_docs leaves it alone: data_scripts/make_readme.py makes it.
docs: install
	$(BIN)/python data_scripts/check_docs.py
	@command -v quarto >/dev/null || { echo "The pages themselves are made by Quarto, 1.5 or later, which no package registry has: get it from https://quarto.org/docs/get-started and run 'make docs' again. Checked without it: what nbdev makes of every notebook, the sidebar, front matter, internal links, captions, documentation." >&2; exit 1; }
	touch README.md
	PATH=$(CURDIR)/$(BIN):$$PATH nbdev_docs

clean:
	rm -rf build dist _docs _proc nbs/nbdev.yml *.egg-info
