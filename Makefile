# make demo     a head-importance study on a shipped model, from nothing
# make test     style, types and tests
# make lint     style and types only
# make format   let ruff rewrite the files
# make clean    remove the environment and what runs wrote

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := outputs/demo
# Each head's output at the last token, where the answer is read, replaced by its mean there over the prompts.
ABLATION := --kind mean --mean per_position --positions last --tau 1

.PHONY: demo test lint format clean

demo: $(VENV)/installed
	$(BIN)/python experiments/activation_frequencies_ifr.py $(ABLATION) --dataset ioi_en --out $(DEMO)/ioi_en.npy
	$(BIN)/python experiments/activation_frequencies_ifr.py $(ABLATION) --dataset ioi_zh --out $(DEMO)/ioi_zh.npy
	$(BIN)/python experiments/crosslingual_head_corr.py --a $(DEMO)/ioi_en.npy --b $(DEMO)/ioi_zh.npy \
		--name_a English --name_b Chinese --out_json $(DEMO)/correlation.json \
		--scatter_png $(DEMO)/scatter.png --layer_png $(DEMO)/layers.png

test: lint
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) outputs

# The exact versions of constraints.txt; the ranges that should work are in pyproject.toml.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pyvene-ext needs Python 3.11 or newer: make PYTHON=/path/to/python")'
	$(PYTHON) -m venv $(VENV)
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
