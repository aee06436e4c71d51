"""Write docs/results.md again: what the studies print on the shipped models (`make results`)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = "outputs/results"
STUDIES: dict[str, list[str]] = {
    "Which heads matter for indirect object identification, in English": [
        "experiments/activation_frequencies_ifr.py", "--kind", "mean", "--mean", "per_position", "--positions", "last",
        "--tau", "1", "--out", f"{OUT}/ioi_en.npy",
    ],
    "... in Chinese": [
        "experiments/activation_frequencies_ifr.py", "--kind", "mean", "--mean", "per_position", "--positions", "last",
        "--tau", "1", "--dataset", "ioi_zh", "--out", f"{OUT}/ioi_zh.npy",
    ],
    "... and whether they are the same": [
        "experiments/crosslingual_head_corr.py", "--a", f"{OUT}/ioi_en.npy", "--b", f"{OUT}/ioi_zh.npy",
        "--name_a", "English", "--name_b", "Chinese", "--out_json", f"{OUT}/correlation.json",
        "--scatter_png", f"{OUT}/scatter.png", "--layer_png", f"{OUT}/layers.png",
    ],
    "At what depth the answer is known": ["experiments/logit_lens.py", "--out", f"{OUT}/logit_lens"],
    "Activation patching": ["experiments/activation_patching.py", "--site", "z", "--limit", "20", "--out", f"{OUT}/patching"],
    "Name movers": ["experiments/name_movers.py", "--out", f"{OUT}/name_movers"],
    "Induction heads": ["experiments/induction_scores.py", "--output_dir", f"{OUT}/induction"],
    "Memory by lag without induction heads": ["experiments/run_ablations.py", "--output_dir", f"{OUT}/lag"],
    "Translation heads": ["experiments/translation_heads.py", "--out", f"{OUT}/translation_heads"],
    "... ablated, against random heads": ["experiments/translation_ablation.py", "--out", f"{OUT}/translation_ablation"],
    "Which heads look critical in reasoning": [
        "experiments/critical_heads/rank_heads.py", "--limit", "100", "--out", f"{OUT}/rank_heads",
    ],
    "... and what ablating them costs": [
        "experiments/critical_heads/ablate_heads.py", "--limit", "100", "--out", f"{OUT}/ablate_heads",
    ],
}  # fmt: skip

HEAD = """# Results on the shipped models

What the studies print on the tiny models that ship with the package, at the commands shown. The models are trained on a small
grammar of their own, so that these numbers show how the studies work, not what language models do. `make results` writes this
page again.
"""


def section(title: str, command: list[str]) -> str:
    """Run a study and quote what it prints."""
    print(f"{title}: python {' '.join(command)}", file=sys.stderr)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    printed = done.stdout.partition("\nwritten:")[0].strip("\n").replace(f"{ROOT}/", "")
    return f"## {title}\n\n    python {' '.join(command)}\n\n```text\n{printed}\n```\n"


if __name__ == "__main__":
    page = "\n".join([HEAD, *(section(title, command) for title, command in STUDIES.items())])
    (ROOT / "docs/results.md").write_text(page, encoding="utf-8")
