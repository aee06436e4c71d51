"""Specs with any fields: refused in one sentence, or kept in files without loss and run by both engines to the same numbers."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from modelcards import n_heads, n_kv_heads, n_layers
from pyvene_ext.engine.plain import run
from pyvene_ext.engine.sweep import sweep
from pyvene_ext.methods.attribution.atp import atp
from pyvene_ext.methods.attribution.edges import edge_attribution
from pyvene_ext.methods.heads.flow import flow_routes
from pyvene_ext.methods.heads.lens import logit_lens
from pyvene_ext.methods.patching.patch import patch
from pyvene_ext.prompts.tokenized import TokenizedPrompts, answer_pairs
from pyvene_ext.specs.ablation import Ablation
from pyvene_ext.specs.files import (
    from_plain,
    from_yaml,
    load_specs,
    save_specs,
    to_plain,
    to_yaml,
)
from pyvene_ext.specs.joint import members, spec_name
from pyvene_ext.specs.patch import ActivationPatch
from pyvene_ext.specs.path import PathPatch
from tests.fuzz.outcomes import few, outcome
from tests.random_prompts import random_prompts
from tests.tiny_random import FAMILIES, MORE_FAMILIES, VOCAB, random_model

PROMPTS = random_prompts((8, 6, 8))
SOURCE = replace(random_prompts((8, 6, 8), seed=1), answers=PROMPTS.answers)


@cache
def _model(family: str) -> PreTrainedModel:
    return random_model(family)


# -- fields: mostly of the right kind, now and then of any -------------------------------------------------------------

SITES = [
    "z",
    "q",
    "k",
    "v",
    "attn_out",
    "mlp_in",
    "mlp_out",
    "resid_pre",
    "resid_mid",
    "resid_post",
    "embed",
    "scores",
    "pattern",
]
POSITION = st.one_of(st.integers(-9, 9), st.sampled_from(["s1", "s2", "last", "end"]))
POSITIONS = st.one_of(st.sampled_from(["all", "last", "s1"]), st.lists(POSITION, min_size=1, max_size=3))
WRONG = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(-2, 9), max_size=3),
)
NODE = st.one_of(
    st.sampled_from(
        ["embed", "logits", "z.0.1", "mlp_out.0", "q.2.3", "k.1.0", "v.2.0", "mlp_in.1", "resid_post.2", "z.2.0"]
    ),
    st.builds(lambda *of: ".".join(map(str, of)), st.sampled_from(SITES), st.integers(-1, 4), st.integers(-1, 7)),
    st.text(alphabet="zqkv.012 _", max_size=6),
)
PLAUSIBLE: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "ablation": {
        "kind": st.sampled_from(["zero", "mean", "resample", "noise"]),
        "site": st.sampled_from(SITES),
        "layer": st.integers(0, 3),
        "heads": st.lists(st.integers(0, 5), min_size=1, max_size=3),
        "positions": POSITIONS,
        "mean": st.sampled_from(["over_tokens", "per_position"]),
        "noise": st.sampled_from(["gaussian", "norm_matched"]),
        "seed": st.integers(0, 2**40),
    },
    "patch": {
        "kind": st.just("patch"),
        "site": st.sampled_from(SITES),
        "layer": st.integers(0, 3),
        "heads": st.lists(st.integers(0, 5), min_size=1, max_size=3),
        "positions": POSITIONS,
        "subspace": st.booleans(),
    },
    "force": {
        "kind": st.just("force"),
        "shape": st.sampled_from(["hub", "uniform", "sequential"]),
        "layer": st.integers(0, 2),
        "heads": st.lists(st.integers(0, 4), min_size=1, max_size=3),
        "block": st.tuples(POSITION, POSITION).map(list),
        "hub": POSITION,
        "hard": st.booleans(),
    },
    "path": {
        "kind": st.just("path"),
        "sender": NODE,
        "receivers": st.lists(NODE, min_size=1, max_size=2),
        "positions": POSITIONS,
        "freeze_mlps": st.booleans(),
        "direct": st.booleans(),
        "subspace": st.booleans(),
    },
}
# Without these nothing is valid; the others are left out as often as not.
NEEDED = {"kind", "site", "layer", "heads", "shape", "block", "sender", "receivers"}
HEADLESS = ("attn_out", "mlp_in", "mlp_out", "resid_pre", "resid_mid", "resid_post", "embed")


@st.composite
def edits(draw: st.DrawFn, kind: str, wrong: bool) -> dict[str, Any]:
    plausible = PLAUSIBLE[kind]
    fields = {name: draw(of) for name, of in plausible.items() if name in NEEDED or draw(st.integers(0, 3)) == 0}
    if fields.get("site") in HEADLESS:
        fields.pop("heads", None)
    if fields.get("site") == "embed":
        fields.pop("layer", None)
    if fields.get("shape") == "hub":
        fields.setdefault("hub", draw(POSITION))
    if wrong:
        name = draw(st.sampled_from([*fields, "head", "extra"]))
        fields[name] = draw(WRONG)
        if draw(st.booleans()):
            del fields[draw(st.sampled_from(sorted(fields)))]
    return fields


KIND = st.sampled_from(sorted(PLAUSIBLE))
FIELDS = KIND.flatmap(lambda kind: st.booleans().flatmap(lambda wrong: edits(kind, wrong)))
ENTRY = st.one_of(FIELDS, FIELDS, st.lists(FIELDS, max_size=2), WRONG)


@given(values=st.lists(ENTRY, max_size=3))
@example(values=[{"kind": "zero", "site": "mlp_out", "layer": 1, "positions": "\U0001f600"}])
@example(values=[{"kind": "path", "sender": "z.0.²", "receivers": ["logits"]}])
@example(values=[{"kind": "zero", "site": "z", "layer": 1, "heads": [0], "positions": ["²"]}])
@example(values=[{"kind": "zero", "site": "\ud800", "layer": 1}])
def test_specs_are_refused_or_survive_a_file(values: list[Any]) -> None:
    specs = outcome(from_plain, values, names=None)
    if specs is None:
        return
    assert from_plain(to_plain(specs)) == specs
    assert from_yaml(to_yaml(specs)) == specs
    with tempfile.TemporaryDirectory() as folder:
        for suffix in ("yaml", "json"):
            save_specs(Path(folder) / f"specs.{suffix}", specs)
            assert load_specs(Path(folder) / f"specs.{suffix}") == specs
    for spec in specs:
        assert spec_name(spec) if not isinstance(spec, PathPatch) else spec.name


@pytest.mark.parametrize("family", FAMILIES)
@given(values=st.lists(st.one_of(FIELDS, st.lists(FIELDS, min_size=1, max_size=2)), min_size=1, max_size=1))
@few(2)
def test_engines_agree_or_refuse_alike(family: str, values: list[Any]) -> None:
    specs = outcome(from_plain, values)
    if specs is not None:
        agree(_model(family), specs)


def agree(model: PreTrainedModel, specs: list[Any]) -> bool:
    """Whether both engines run these specs, and then to the same numbers, rather than refuse them."""
    edits = [edit for spec in specs for edit in ((spec,) if isinstance(spec, PathPatch) else members(spec))]
    if any(isinstance(edit, PathPatch | ActivationPatch) for edit in edits):

        def at(engine: str) -> Any:
            return patch(model, specs, PROMPTS, SOURCE, engine=engine, progress=False)

        plain, fast = (outcome(at, engine) for engine in ("plain", "sweep"))
    else:
        plain, fast = (
            outcome(lambda: run(model, specs, PROMPTS)),
            outcome(lambda: sweep(model, specs, PROMPTS, progress=False)),
        )
    assert (plain is None) == (fast is None)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    if plain is None:
        return False
    np.testing.assert_allclose(fast.baseline, plain.baseline, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(fast.intervened, plain.intervened, rtol=1e-4, atol=1e-4)
    assert np.isfinite(plain.intervened).all()
    return True


# -- specs that fit a model, alone and together ------------------------------------------------------------------------

ABLATED = ["z", "z", "k", "v", *HEADLESS[:1], *HEADLESS[2:]]
EACH = [["last"], ["s1", "end"], [-2, 0], ["s1", -6], [1, "s2"]]


@st.composite
def fitting(draw: st.DrawFn, config: Any, patches: bool) -> dict[str, Any]:
    """An edit that a model of this config takes, on these prompts."""
    kind = draw(st.sampled_from(["patch"] if patches else ["zero", "mean", "resample", "noise", "scores", "force"]))
    fields: dict[str, Any] = {"kind": kind, "layer": draw(st.integers(0, n_layers(config) - 1))}
    positions = draw(st.sampled_from(["all", "all", *EACH]))
    count = n_heads(config)
    match kind:
        case "force":
            block = draw(st.sampled_from([["s1", "s2"], [1, -2], [0, "end"], [-5, -1], ["s1", "s1"]]))
            shape = draw(st.sampled_from(["hub", "uniform", "sequential"]))
            fields |= {"shape": shape, "block": block, "hard": draw(st.booleans())}
            fields |= {"hub": block[0]} if shape == "hub" else {}
        case "scores":
            fields |= {"kind": draw(st.sampled_from(["zero", "mean"])), "site": "scores", "positions": positions}
        case _:
            site = draw(st.sampled_from([*HEADLESS, "z", "z", "q", "k", "v"] if patches else ABLATED))
            if kind == "resample":  # no other prompt is as long as the second
                positions = draw(st.sampled_from(EACH))
            fields |= {"site": site, "positions": positions}
            count = n_kv_heads(config) if site in ("k", "v") else count if site in ("z", "q") else 0
            if site == "embed":
                del fields["layer"]
            if kind == "mean" and positions != "all":
                fields["mean"] = draw(st.sampled_from(["over_tokens", "per_position"]))
            if kind == "noise":
                fields |= {
                    "noise": draw(st.sampled_from(["gaussian", "norm_matched"])),
                    "seed": draw(st.integers(0, 9)),
                }
            if kind == "patch":
                fields["subspace"] = draw(st.integers(0, 3)) == 0
    if count:
        fields["heads"] = draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=2, unique=True))
    return fields


def together(config: Any) -> st.SearchStrategy[list[Any]]:
    """One joint spec."""

    def of_kind(patches: bool) -> st.SearchStrategy[list[Any]]:
        each_once = {"unique_by": lambda fields: (fields.get("site"), fields.get("layer"))}
        return st.lists(fitting(config, patches), min_size=1, max_size=3, **each_once)

    return st.booleans().flatmap(of_kind)


@pytest.mark.parametrize("family", [*FAMILIES, "others"])
def test_joint_specs_are_run_alike(family: str) -> None:
    ran: list[bool] = []

    @given(data=st.data())
    @few(3)
    def one(data: st.DataObject) -> None:
        model = _model(data.draw(st.sampled_from(MORE_FAMILIES)) if family == "others" else family)
        specs = outcome(from_plain, [data.draw(together(model.config))])
        ran.append(specs is not None and agree(model, specs))

    one()
    assert sum(ran) > len(ran) * 0.8, "most fit"


# -- prompts that do not fit a model -----------------------------------------------------------------------------------


@given(
    data=st.data(),
    ids=st.lists(st.integers(-2, VOCAB + 1), min_size=1, max_size=6),
    length=st.sampled_from([0, 0, 0, 65, 80]),
)
@few(2)
@example(data=None, ids=[VOCAB], length=0)
@example(data=None, ids=[-1], length=0)
@example(data=None, ids=[3], length=65)
def test_prompts_are_run_alike_or_refused(data: Any, ids: list[int], length: int) -> None:
    """Ids that the model does not embed, and more tokens than it takes."""
    model = _model("gpt2")
    row = (*ids, *(5,) * (length - len(ids)))
    prompts = TokenizedPrompts((row, (3, 4)), answer_pairs(((0, 1),) * 2), ({"end": -1, "last": -1},) * 2, pad_id=0)
    source = replace(prompts, input_ids=(row, (4, 3)))
    fits = len(row) <= 64 and 0 <= min(row) <= max(row) < VOCAB
    spec, moved = Ablation(kind="zero", site="mlp_out", layer=1), ActivationPatch(site="mlp_out", layer=1)
    given = [
        outcome(study)
        for study in (
            lambda: run(model, spec, prompts, progress=False).intervened,
            lambda: sweep(model, spec, prompts, progress=False).intervened,
            lambda: patch(model, moved, prompts, source, progress=False).intervened,
            lambda: atp(model, moved, prompts, source, progress=False),
            lambda: edge_attribution(model, prompts, source, progress=False),
            lambda: logit_lens(model, prompts, progress=False),
            lambda: flow_routes(model, prompts, progress=False),
        )
    ]
    assert [found is not None for found in given] == [fits] * len(given)
    if fits:
        np.testing.assert_allclose(given[0], given[1], rtol=1e-4, atol=1e-4)
