"""Induction scores and memory by lag on pretrained weights, against transformers' own attention and plain hooks."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import run_ablations as study
import torch
from torch import Tensor

import pyvene_ext as px
from pyvene_ext.io.cli import run as run_study
from pyvene_ext.runs import figures
from tests.real.conftest import Real

pytestmark = pytest.mark.filterwarnings("ignore")
BLOCK, N, PERMUTATIONS, ABLATED = 25, 20, 3, 5
KNOWN = {  # induction scores on 25 tokens twice
    "llama": {(18, 6): 0.91, (17, 4): 0.79, (17, 5): 0.78, (17, 3): 0.76},
    "gemma3_text": {(5, 1): 0.83, (11, 2): 0.58, (5, 2): 0.53},
}


@pytest.fixture(params=["smollm2", "gemma3"])
def real(request: pytest.FixtureRequest) -> Real:
    return request.getfixturevalue(request.param)


def test_induction_scores_are_those_of_transformers_attention_and_find_the_known_heads(real: Real) -> None:
    bos = tuple(real.tokenizer("")["input_ids"])
    assert bos == px.methods.leading_bos(real.tokenizer)
    tokens = px.methods.usable_tokens(real.model, real.tokenizer)
    ids = px.methods.random_tokens(tokens, BLOCK, 2, examples=4, rng=np.random.default_rng(0), bos=bos)
    found = px.methods.attention_scores(real.model, ids, BLOCK, first=len(bos), progress=False).induction
    before = real.model.config._attn_implementation
    real.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            patterns = real.model(ids, output_attentions=True, logits_to_keep=1).attentions
    finally:
        real.model.set_attn_implementation(before)
    at = range(len(bos) + BLOCK, len(bos) + 2 * BLOCK)
    for layer, pattern in enumerate(patterns):
        expected = np.mean([pattern[:, :, i, i - BLOCK + 1].numpy() for i in at], axis=0)
        np.testing.assert_allclose(found[:, layer], expected, atol=1e-5)
    known = KNOWN[real.model.config.model_type]
    mean = found.mean(0)
    assert set(known) <= {
        tuple(divmod(i, mean.shape[1])) for i in np.argsort(-mean, axis=None)[: len(known) + 1].tolist()
    }
    np.testing.assert_allclose([mean[head] for head in known], list(known.values()), atol=0.12)


def probabilities(model: Any, ids: list[int], heads: list[list[int]]) -> Tensor:
    """Of the next token, with what some heads send to the output projection set to 0 at every token."""
    width = model.config.head_dim

    def without(own: list[int]) -> Any:
        def hook(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
            z = args[0].clone()
            for head in own:
                z[..., head * width : (head + 1) * width] = 0
            return (z,)

        return hook

    with ExitStack() as stack, torch.no_grad():
        for layer in {layer for layer, _ in heads}:
            projection = model.model.layers[layer].self_attn.o_proj
            hook = without([head for at, head in heads if at == layer])
            stack.callback(projection.register_forward_pre_hook(hook).remove)
        return model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1].softmax(-1)


def test_memory_by_lag_is_what_hooks_find_and_vanishes_with_the_induction_heads(
    real: Real, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(figures, "save", lambda *_: None)
    monkeypatch.setattr(study.Config, "load", lambda *_: (real.model, real.tokenizer))  # already loaded
    flags = ["--model_name", real.folder, "--n_tokens", N, "--permutations", PERMUTATIONS, "--random_draws", 1]
    flags += ["--to_abl", f"0-{ABLATED}", "--output_dir", tmp_path]
    assert run_study(study.main, study.Config, [str(flag) for flag in flags]) == 0
    bos = real.tokenizer("")["input_ids"]
    tokens = px.methods.usable_tokens(real.model, real.tokenizer)
    rng = np.random.default_rng(42)
    chosen = rng.choice(tokens, N, replace=False)
    lists = [rng.permutation(chosen).tolist() for _ in range(PERMUTATIONS)]
    curves = {}
    for n in (0, ABLATED):
        name = f"{Path(real.folder).name}_perm{PERMUTATIONS}_abl{n}_zero_induction_full"
        heads = json.loads((tmp_path / f"heads/{name}.json").read_text())["heads"]
        by_hand = [probabilities(real.model, [*bos, *ids, ids[N // 2]], heads)[ids].numpy() for ids in lists]
        curves[n] = np.load(tmp_path / f"arrays/{name}.npy")
        np.testing.assert_allclose(curves[n], by_hand, atol=1e-5, rtol=1e-3)
    assert {tuple(head) for head in heads} >= set(KNOWN[real.model.config.model_type])
    before, after = (curve[:, N // 2 + 1] for curve in curves.values())
    assert (after < before / 4).all() and before.mean() > 5 * np.delete(curves[0], [N // 2, N // 2 + 1], 1).mean()
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("untouched: "))
    assert f"p(+1) {before.mean():.4f} ± " in line
