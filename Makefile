# `make` lists the verbs. They create .venv on first use and update it when the dependencies change.

PYTHON ?= python3
PYTEST_ARGS ?=
TEST_PROCESSES ?= 2

VENV := .venv
BIN := $(VENV)/bin
BENCHMARKS := pretrain_step finetune_step resolution segmentation_inference scaling input_pipeline startup tokenizer predict
DEMO_RUNS := dvae pretrain finetune-pretrained finetune-scratch segmentation/pretrained segmentation/scratch
REQUIREMENTS := pyproject.toml requirements.txt setup.py

# Tests of a file stay in one process: they share expensive fixtures. TEST_PROCESSES=0 runs everything in one process.
# In the order of the folders: else files of a single test, which are those that wait longest, would come last.
# A crashed worker ends the run, since xdist would wait forever for a restarted one. What is compiled is kept, whatever
# the environment says: pytest rewrites every test, and whole commands import the library again and again.
PYTEST = PYTHONDONTWRITEBYTECODE= \
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder --max-worker-restart=0 \
	$(PYTEST_ARGS)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-fast lint docs bench bench-gpu clean

help: ## list the verbs
	@echo "make VERB [PYTHON=python3.12] [PYTEST_ARGS='-k masking']"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' Makefile | expand -t 14

demo: $(VENV)/installed-demo ## train a small BEiT on this machine, with pictures and a report in demo/
	$(BIN)/python -m examples.demo --output_dir demo
	$(BIN)/python -m beit report $(DEMO_RUNS:%=demo/%) --title 'What the demo learnt' \
		--pictures demo/reconstructions.png demo/segmentation.png --results demo/summary.json -o demo/report.html

test: $(VENV)/installed-test ## run all tests
	$(PYTEST)

test-fast: $(VENV)/installed-test ## run all tests but whole commands and kill tests
	$(PYTEST) -m "not slow"

lint: $(VENV)/installed-test ## check style and types, change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed-test ## build the documentation in site/; a dead link or anchor is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "Open site/index.html, or serve it to search it: python3 -m http.server --directory site"

bench: $(VENV)/installed-test ## run every speed benchmark against its peers and write docs/speed.md
	@for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python benchmarks/$$name.py || exit 1; done
	$(BIN)/python benchmarks/summary.py

bench-gpu: $(VENV)/installed-test ## run the benchmarks of models on a GPU, in about ten minutes
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("PyTorch finds no GPU here")'
	@for run in "pretrain_step --batch_size 64" "finetune_step --batch_size 64" "segmentation_inference --images 4" \
		"resolution --batch_size 8 --precision bf16" predict; do set -- $$run; name=$$1; shift; \
		echo "== $$run"; $(BIN)/python benchmarks/$$name.py "$$@" --repeats 3 || exit 1; done
	$(BIN)/python benchmarks/summary.py

clean: ## delete build and test output; keep .venv, demo/ and your runs
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

# venv installs pip last: an incomplete environment is created again.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or \
		sys.exit("Python 3.10 or newer is needed, %s is %d.%d: make VERB PYTHON=..." % (sys.executable, *v[:2]))'
	@echo "Creating the environment $(VENV) ..."
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-demo: $(REQUIREMENTS) | $(BIN)/pip
	@echo "Installing the library and what the demo needs; the first time this downloads PyTorch ..."
	$(BIN)/python -m pip install -e '.[demo]'
	@touch $@

$(VENV)/installed-test: $(REQUIREMENTS) | $(BIN)/pip
	@echo "Installing the library and what the tests need; the first time this downloads PyTorch ..."
	$(BIN)/python -m pip install -e '.[test]'
	@# OpenAI's package, to compare with, goes in a folder of its own: it is called dall_e too and would shadow ours.
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/peers 'DALL-E==0.1'
	@touch $@ $(VENV)/installed-demo
