"""Every study on every family, by its own command line: it writes what it should in finite numbers, or refuses as a table says.

The models are tiny and random, in folders with the shipped tokenizer; prompts are few. What the engines make of a family is held
to plain hooks in tests/pyvene_ext/test_every_family.py; here it is that nothing between the command line and the files assumes
another family. Every study takes those of `CORE_FAMILIES` that are unlike each other, in shapes and in what they lack, and a
quarter of the others; these are more of the same, and each of them takes a quarter of the studies, by turns. Every refusal is
tried.

Random models solve no word problem and write no `####`. The studies of critical heads are therefore given the problems' own
solutions in place of what the model wrote: there is a block, and everything behind it is the study's. Their accuracies are
those of models that know nothing.

Figures are made and have a label on every axis, but are not drawn. Left out: crosslingual_head_corr.py, which takes arrays and
no model.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from modelcards import n_heads, n_kv_heads, n_layers, window
from pyvene_ext.io.cli import run as run_study
from pyvene_ext.methods.circuits.circuit import exists
from pyvene_ext.prompts.problems import Questions, with_reasoning
from pyvene_ext.prompts.shipped import PROMPTS
from pyvene_ext.runs import ablated, figures, reasoning
from pyvene_ext.stats import accuracy
from tests.labels import unlabelled
from tests.saved_models import save_random_model
from tests.tiny_random import ALIKE, CORE_FAMILIES, FAMILIES, MORE_FAMILIES

EVERY = (*FAMILIES, *MORE_FAMILIES)
PARALLEL = ("cohere", "gpt_neox", "gptj", "falcon")
WRITTEN_OUT = ("gptj", "falcon", "bloom")

N = 3  # prompts and problems
SENTENCES = 15
SETTING = "--problems tiny --limit 3 --answer_tokens 2 --max_new_tokens 3 --out x --models"


class Sizes(NamedTuple):
    layers: int
    heads: int
    kv_heads: int
    edges: int
    near: bool  # every layer looks back a few tokens only, so that what heads see further back is 0


Shape = Callable[[Sizes], tuple[int, ...]]


@dataclass(frozen=True)
class Study:
    """A command line that ends before the model's folder; arrays with their shapes, and tables with their rows and columns."""

    flags: str
    arrays: dict[str, Shape]
    tables: dict[str, tuple[Callable[[Sizes], int], str]] = field(default_factory=dict)


def by_head(of: Sizes) -> tuple[int, ...]:
    return of.layers, of.heads


def by_layer(of: Sizes) -> tuple[int, ...]:
    return of.layers, 1


def by_head_and_prompt(of: Sizes) -> tuple[int, ...]:
    return of.layers, of.heads, N


def by_sentence_and_head(of: Sizes) -> tuple[int, ...]:
    return SENTENCES, of.layers, of.heads


WORDS = "--dataset few.tsv --limit 4 --threshold 0 --out x"
STUDIES: dict[str, Study] = {
    "activation_frequencies_ifr": Study("--dataset few.json --out x/f.npy --model", {"f.npy": by_head}),
    "activation_frequencies_ifr, screened": Study(
        "--dataset few.json --out x/f.npy --screen atp --tau 0.1 --model", {"f/estimates.npy": by_head_and_prompt}
    ),
    "activation_patching": Study(
        "--dataset few.json --positions last --out x --model",
        {"z.npy": by_head, "mlp_out.npy": by_layer, "resid_pre.npy": by_layer},
    ),
    "path_patching": Study("--dataset few.json --out x --model", {"heads.npy": by_head}),
    "path_patching, pairs": Study(
        "--dataset few.json --out x --pairs --model", {"patched.npy": lambda of: (of.edges, N)}
    ),
    "attribution_patching": Study(
        "--dataset few.json --out x --steps 1 --edges eap --model",
        {},
        {
            "nodes.csv": (lambda of: of.layers * (2 * of.heads + 2 * of.kv_heads + 1), "exact atp qk_fix abs_atp_star"),
            "edges.csv": (lambda of: of.edges, "eap"),
        },
    ),
    "circuit_localization": Study(
        "--dataset few.json --out x --methods flow random --metric kl --removed 2 --random_circuits 2 --model",
        {},
        {"methods.csv": (lambda of: 2, "cpr cmd faithfulness completeness")},
    ),
    "information_flow_routes": Study("--dataset few.json --out x --model", {"importance.npy": by_head}),
    "logit_lens": Study(
        "--dataset few.json --out x --model",
        {"lens_logits.npy": lambda of: (of.layers + 1, 2, N), "logit_diff_heads.npy": by_head_and_prompt},
    ),
    "induction_scores": Study(
        "--output_dir x --length 5 --repeats 2 --examples 2 --seeds 0 --model_name",
        {f"{kind}.npy": by_head for kind in ("induction", "previous_token", "duplicate_token", "copying")},
    ),
    "run_ablations": Study(
        "--output_dir x --permutations 2 --n_tokens 12 --to_abl 0-1 --random_draws 2 --model_name",
        {"arrays/{model}_perm2_abl1_zero_induction_full.npy": lambda of: (2, 12)},
    ),
    "translation_heads": Study(
        "--out x --dataset few.tsv --pairs en-fr --threshold 0 --model",
        {"en-fr_translation.npy": by_sentence_and_head, "en-fr_control.npy": by_sentence_and_head},
    ),
    "translation_ablation": Study(
        f"{WORDS} --heads 0.1 --other none --kinds mean --model",
        {},
        {
            # All others of its layer; of any layer 20, or all.
            "sets.csv": (lambda of: of.heads + min(20, of.layers * of.heads - 1), "drop low high logit_diff accuracy")
        },
    ),
    "translation_paths": Study(f"{WORDS} --heads 0.1 --model", {"source_standard.npy": by_head}),
    "translation_lens": Study(
        f"{WORDS} --heads 0.1 --model",
        {},
        {"lens.csv": (lambda of: of.layers + 1, "target_probability source_probability target_median_rank")},
    ),
    "translation_single_heads": Study(f"{WORDS} --words 1 2 --replacements zero --model", {"each_zero.npy": by_head}),
    "name_movers": Study(
        "--dataset few.json --out x --model",
        {
            "attribution.npy": by_head_and_prompt,
            "path_effect.npy": by_head_and_prompt,
            "attention.npy": lambda of: (4, of.layers, of.heads, N),
            "projection.npy": lambda of: (4, of.layers, of.heads, N),
        },
    ),
    "critical_heads.rank_heads": Study(
        SETTING, {}, {"scores.csv": (lambda of: of.layers * of.heads, "flow hub skip composite")}
    ),
    "critical_heads.ablate_heads": Study(
        f"--rankings ranking.csv --n_heads 1 --kind zero mean resample --scope reasoning new both --random_sets 2 {SETTING}",
        {},
        {"ablations.csv": (lambda of: 3 * 3 * 2, "accuracy low high drop drop_low drop_high")},
    ),
    "critical_heads.patch_hub": Study(
        f"--seeds 1 --places 1 --min_problems 2 {SETTING}",
        {},
        {"positions.csv": (lambda of: 3, "accuracy drop low high")},
    ),
    "critical_heads.force_attention": Study(
        f"--no_sweep --heads 0.1 --random_sets 1 {SETTING}", {}, {"patterns.csv": (lambda of: 9, "accuracy low high")}
    ),
    "critical_heads.transplant_head": Study(
        "--heads 0.1 --donor_heads 1.2 --fit_problems 3 --random_sets 1 --alpha 1 --limit 5 --answer_tokens 2 "
        "--problems tiny --max_new_tokens 3 --donor tiny-gemma2 --out x --models",
        {},
        {
            "maps.csv": (lambda of: 2, "r2_train r2_test"),
            "transplants.csv": (lambda of: 3, "accuracy drop gain"),
        },
    ),
    "critical_heads.probe_layers": Study(
        "--min_problems 10 --shuffles 19 --folds 3 --targets answer --positions mark --limit 12 --answer_tokens 2 "
        "--problems tiny --max_new_tokens 3 --out x --models",
        {},
        {"probes.csv": (lambda of: of.layers + 1, "r2 r2_low r2_high question p")},
    ),
    "critical_heads.attribute_inputs": Study(
        f"--heads 0.1 --hub 0 --steps 2 --random_heads 1 --sample 2 {SETTING}",
        {},
        {"heads.csv": (lambda of: 2, "value at_baseline change"), "problems.csv": (lambda of: 4, "attributed")},
    ),
    "critical_heads.stratify_difficulty": Study(
        f"--heads 0.1 --random_sets 2 --min_problems 2 {SETTING}",
        {},
        {"drop_by_steps.csv": (lambda of: 2, "{model}_drop")},
    ),
}

# The studies that write where their heads look, if the family lets it be seen.
SHOWING = (
    "activation_frequencies_ifr",
    "activation_patching",
    "information_flow_routes",
    "induction_scores",
    "translation_heads",
    "name_movers",
    "critical_heads.rank_heads",
)

# What is refused: study, family, and what the sentence says. Everything else must run.
LOOKING = (
    "attribution_patching",
    "information_flow_routes",
    "induction_scores",
    "run_ablations",
    "translation_heads",
    "translation_paths",
    "translation_lens",
    "name_movers",
    "critical_heads.rank_heads",
    "critical_heads.force_attention",
    "critical_heads.attribute_inputs",
)
BETWEEN = (
    "path_patching, pairs",
    "attribution_patching",
    "circuit_localization",
    "information_flow_routes",
    "critical_heads.rank_heads",
)
REFUSED: dict[tuple[str, str], str] = {
    **{(study, family): "run attention and MLP side by side" for study in BETWEEN for family in PARALLEL},
    **{(study, family): "attention does not go through" for study in LOOKING for family in WRITTEN_OUT},
}


PAIRS = [
    (family, study)
    for number, family in enumerate(EVERY)
    for turn, study in enumerate(STUDIES)
    if family in {*CORE_FAMILIES} - {*ALIKE} or (study, family) in REFUSED or (number + turn) % 4 == 0
]


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Sizes]]:
    """The folder of a family's model, made when it is first asked for, and its sizes."""
    made: dict[str, tuple[Path, Sizes]] = {}

    def get(family: str) -> tuple[Path, Sizes]:
        if family not in made:
            folder = tmp_path_factory.mktemp("models") / family
            config = save_random_model(family, folder, positions=160).config
            layers = n_layers(config)
            near = all(window(config, layer) is not None for layer in range(layers))
            made[family] = folder, Sizes(layers, n_heads(config), n_kv_heads(config), int(exists(config).sum()), near)
        return made[family]

    return get


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a few prompts, sentences and a ranking; figures are not drawn, and intervals of few resamples."""
    monkeypatch.chdir(tmp_path)
    pairs = json.loads((PROMPTS / "ioi_en.json").read_text(encoding="utf-8"))["pairs"][:N]
    (tmp_path / "few.json").write_text(json.dumps(pairs), encoding="utf-8")
    lines = (PROMPTS / "en_fr.tsv").read_text(encoding="utf-8").splitlines()[: SENTENCES + 1]
    (tmp_path / "few.tsv").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "ranking.csv").write_text("scores,layer,head\n1.0,0,1\n", encoding="utf-8")
    monkeypatch.setattr(figures, "save", labelled)
    monkeypatch.setattr(accuracy, "RESAMPLES", 20)
    for module in (reasoning, ablated):
        monkeypatch.setattr(module, "with_reasoning", with_solutions)
    return tmp_path


def labelled(figure: Figure, path: Path) -> None:
    """In place of drawing."""
    assert not unlabelled(figure), f"{path}: {unlabelled(figure)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def with_solutions(questions: Questions, _: Any, tokenizer: Any) -> Questions:
    """The questions with their own solutions, whatever the model wrote."""
    written = [tokenizer(one.solution, add_special_tokens=False)["input_ids"] for one in questions.problems]
    return with_reasoning(questions, written, tokenizer)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Filled with the modules that run, but for the few tokens that `load_model` tries."""
    monkeypatch.setattr("pyvene_ext.models.loading.load.check_runs", lambda *_: None)
    seen: list[str] = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: seen.append(type(module).__name__)
    )
    yield seen
    hook.remove()


@pytest.mark.parametrize(("family", "study"), PAIRS)
def test_a_study_runs_on_a_family_or_refuses_it_as_the_table_says(
    family: str,
    study: str,
    model_of: Callable[[str], tuple[Path, Sizes]],
    folder: Path,
    ran: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module: Any = import_module(study.partition(",")[0])
    if hasattr(module, "RESAMPLES"):
        monkeypatch.setattr(module, "RESAMPLES", 20)
    model, sizes = model_of(family)
    there = set(folder.rglob("*"))
    ran.clear()
    code = run_study(module.main, module.Config, [*STUDIES[study].flags.split(), str(model)])
    said = capsys.readouterr().err.strip().splitlines()
    if (study, family) in REFUSED:
        assert (
            code == 2 and said[-1].startswith("error: ") and REFUSED[study, family] in said[-1] and family in said[-1]
        )
        assert not ran and set(folder.rglob("*")) == there
        return
    assert code == 0, said[-1:]
    assert not (folder / "x/unfinished").exists()
    looks = [path.name for path in folder.glob("x/**/attention.json")]
    assert looks == ["attention.json"] * (study.split(",")[0] in SHOWING and family not in WRITTEN_OUT)
    for name, shape in STUDIES[study].arrays.items():
        found = np.load(folder / "x" / name.format(model=family))
        assert found.shape == shape(sizes) and np.isfinite(found).all() and (found.any() or sizes.near), name
    for name, (rows, columns) in STUDIES[study].tables.items():
        with (folder / "x" / name.format(model=family)).open(encoding="utf-8", newline="") as file:
            table = list(csv.DictReader(file))
        assert len(table) == rows(sizes), name
        for column in columns.format(model=family).split():
            assert np.isfinite([float(row[column] or "nan") for row in table]).all(), f"{name}, {column}"


def test_the_table_of_refusals_names_what_there_is() -> None:
    assert all(study in STUDIES and family in EVERY for study, family in REFUSED)
