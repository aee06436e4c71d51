"""What somebody does first with an installed pyvene-ext: `python first_use.py [EXTRA ...]`, naming the extras that are installed.

Every module is imported, a shipped model swept, patched and taken apart; what needs an extra works with it, and without it says
in one sentence how to get it. The last line printed is where the package came from, and its version.
"""

from __future__ import annotations

import pkgutil
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import numpy as np

import modelcards
import pyvene_ext
from pyvene_ext import Prompt, PromptSet, all_heads, all_patches, all_paths, load_model, patch, run, sweep
from pyvene_ext.io.files import write_csv, write_yaml
from pyvene_ext.io.packages import EXTRAS, MissingExtra
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.attribution.atp import atp
from pyvene_ext.methods.attribution.edges import edge_attribution
from pyvene_ext.methods.attribution.inputs import Target, integrated_gradients
from pyvene_ext.methods.circuits.choosing import top_edges
from pyvene_ext.methods.circuits.running import faithfulness
from pyvene_ext.report import write_report
from pyvene_ext.runs.figures import head_heatmap, save
from pyvene_ext.stats.intervals import paired_bootstrap

for package in (modelcards, pyvene_ext):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            import_module(module.name)

model, tokenizer = load_model("tiny-qwen2.5")
texts = [
    ("When Lisa and David went to the store, David gave the book to", "Lisa", "David"),
    ("When David and Lisa went to the store, Lisa gave the book to", "David", "Lisa"),
]
prompts = PromptSet(
    [
        Prompt(clean=text, corrupt=text.replace(f"{s} gave", f"{io} gave"), io_name=io, s_name=s, io_token=f" {io}")
        for text, io, s in texts
    ]
)
clean, corrupt = (prompts.tokenize(tokenizer, text=text) for text in ("clean", "corrupt"))

heads = all_heads(model.config, positions="last")
swept = sweep(model, heads, clean, progress=False)
np.testing.assert_allclose(swept.intervened, run(model, heads, clean).intervened, atol=1e-4)
assert abs(swept.delta).max() > 1, "no head does anything"
strongest = swept.intervened[swept.delta.mean(1).argmax()]
print(paired_bootstrap(swept.baseline, strongest, rng(0, "bootstrap"), n_resamples=200))
print(patch(model, all_paths(model.config, ("logits",), direct=True), base=clean, source=corrupt).mean_score.max())
print(atp(model, all_patches(model.config, "z"), clean, corrupt).max())
edges = edge_attribution(model, clean, corrupt).matrix
print(faithfulness(model, top_edges(edges, 200, model.config), clean, corrupt))


def report(folder: Path) -> None:
    write_yaml(folder / "config.yaml", {"model": "tiny-qwen2.5"})
    means = swept.delta.mean(1).reshape(model.config.num_hidden_layers, -1)
    write_csv(folder / "heads.csv", [{"layer": i, "head": j, "delta": x} for (i, j), x in np.ndenumerate(means)])
    save(head_heatmap(means, "heads", "delta"), folder / "figures" / "heads.png")
    write_report([folder], folder / "report.html")


def gradients(folder: Path) -> None:
    integrated_gradients(model, clean, Target(layer=0, head=0, queries=[[3]] * len(texts)), steps=2)


for extra, use in {"report": report, "input-attribution": gradients}.items():
    with tempfile.TemporaryDirectory() as folder:
        try:
            use(Path(folder))
        except MissingExtra as error:
            assert extra not in sys.argv[1:], error
            assert str(error) == f"{EXTRAS[extra]} is not installed; pip install 'pyvene-ext[{extra}]' brings it."
        else:
            assert extra in sys.argv[1:], f"{extra} was not to be there"

print(Path(pyvene_ext.__file__).parent, pyvene_ext.__version__)
