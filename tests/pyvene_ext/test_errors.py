"""What a user of the Python API does wrong is said in one sentence of ours, not by pydantic, torch, transformers or pyvene."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyvene import (
    AdditionIntervention,
    CollectIntervention,
    IntervenableConfig,
    LowRankRotatedSpaceIntervention,
    RepresentationConfig,
    RotatedSpaceIntervention,
    VanillaIntervention,
    ZeroIntervention,
)
from transformers import BertConfig, BertModel

import pyvene_ext as px
from pyvene_ext import (
    Ablation,
    ActivationPatch,
    Addition,
    IntervenableModel,
    PathPatch,
    generate,
    patch,
    plan_sweep,
    run,
    steering_vector,
    sweep,
)
from tests.random_prompts import random_prompts
from tests.tiny_random import random_inputs, random_model

PROMPTS = random_prompts((6, 8))
SOURCE = replace(random_prompts((6, 8), seed=1), answers=PROMPTS.answers)
ZERO = Ablation(kind="zero", site="z", layer=0, heads=(0,))
MEAN = Ablation(kind="mean", site="mlp_out", layer=1)
ADDED = Addition(site="resid_post", layer=0, vector=torch.ones(42))
PATCH = ActivationPatch(site="z", layer=0, heads=(0,))
PATH = PathPatch(sender="z.0.0", receivers=("logits",))
SUBSPACE = ActivationPatch(site="z", layer=0, heads=(0,), subspace=True)


@cache
def model(family: str = "llama3_1") -> Any:
    return random_model(family)


@cache
def tokenizer() -> Any:
    return px.load_model("tiny-qwen2.5")[1]


def bert() -> BertModel:
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 13}
    return BertModel(BertConfig(vocab_size=61, **sizes))


def head(layer: int = 0, head: int = 0, site: str = "z", **fields: Any) -> Ablation:
    return Ablation(kind="zero", site=site, layer=layer, heads=(head,), **fields)


def activations() -> px.Activations:
    return px.read(model(), PROMPTS, "z", progress=False)


def refused(call: Callable[[], Any], said: str) -> None:
    with pytest.raises((ValueError, KeyError, FileNotFoundError, AttributeError)) as caught:
        call()
    sentence = str(caught.value)
    assert said in sentence, sentence
    assert "\n" not in sentence and len(sentence) < 700
    frames = [frame.path for frame in caught.traceback]
    assert "pyvene_ext" in str(frames[-1]) or "modelcards" in str(frames[-1]), frames[-1]


# -- run, sweep and plan_sweep, which refuse the same --------------------------------------------------------------------

ENGINES: list[Callable[..., Any]] = [
    lambda *args: run(*args, progress=False),
    lambda *args: sweep(*args, progress=False),
    plan_sweep,
]
RUNS: list[tuple[Callable[..., Any], str]] = [
    (lambda go: go(model(), "z.0.0", PROMPTS), "'z.0.0' is not an ablation, activation patch, addition or forced"),
    (lambda go: go(model(), None, PROMPTS), "None is not an ablation"),
    (lambda go: go(model(), Ablation, PROMPTS), "is not an ablation"),
    (lambda go: go(model(), [{"kind": "zero"}], PROMPTS), "{'kind': 'zero'} is not an ablation"),
    (lambda go: go(model(), [], PROMPTS), "nothing to run: give at least one spec and one prompt."),
    (lambda go: go(model(), ZERO, PROMPTS.take([])), "nothing to run: give at least one spec and one prompt."),
    (lambda go: go(model(), [[ZERO, MEAN]], PROMPTS), "edits that are made jointly are a tuple, not a list"),
    (lambda go: go(model(), [(ZERO, ZERO)], PROMPTS), "names one or more places, each once, not [z.0.0+z.0.0]"),
    (lambda go: go(model(), PATH, PROMPTS), "z.0.0->logits is a path, which is run alone and with pyvene_ext.patch."),
    (lambda go: go(model(), PATCH, PROMPTS), "z.0.0:patch takes its activations from source prompts; call pyvene_ext.pat"),
    (lambda go: go(model(), ZERO, "a text"), "not a str: PromptSet([...]).tokenize(tokenizer) makes them."),
    (lambda go: go(model(), ZERO, ["a text"]), "prompts must be tokenised, not a list"),
    (lambda go: go(model(), ZERO, torch.ones(2, 3).long()), "prompts must be tokenised, not a Tensor"),
    (lambda go: go(model(), PROMPTS, ZERO), "tokenised, not an Ablation: the arguments are swapped, which are (model, specs"),
    (lambda go: go(model(), PROMPTS, [ZERO]), "not a list: the arguments are swapped, which are (model, specs, prompts)."),
    (lambda go: go(model(), {"kind": "patch"}, PROMPTS), "nor a tuple of them: write ActivationPatch(**fields)."),
    (lambda go: go(model(), "z.2.3", PROMPTS), 'write Ablation(kind=..., site="z", layer=2, heads=3).'),
    (lambda go: go(ZERO, model(), PROMPTS), "expected a model, not Ablation; load one with model, tokenizer = pyvene_ext"),
    (lambda go: go(tokenizer(), ZERO, PROMPTS), "expected a model, not "),
    (lambda go: go("tiny-qwen2.5", ZERO, PROMPTS), "expected a model, not str; load one with"),
    (lambda go: go((model(), tokenizer()), ZERO, PROMPTS), "expected a model, not tuple"),
    (lambda go: go(type(model()), ZERO, PROMPTS), "LlamaForCausalLM is a class; load a model with"),
    (lambda go: go(bert(), ZERO, PROMPTS), "no model card covers BertModel; there are cards for qwen2_5"),
    (lambda go: go(model().model, ZERO, PROMPTS), "LlamaModel has no logits over a vocabulary; load the model as"),
    (lambda go: go(model(), MEAN, PROMPTS, "logit_diff", PROMPTS), "reference takes statistics and not TokenizedPrompts"),
    (lambda go: go(model(), head(7), PROMPTS), "z.7.0: layer 7 is out of range, the model has layers 0 to 2."),
    (lambda go: go(model(), head(0, 6), PROMPTS), "head 6 is out of range, the model has 6 query heads (0 to 5)"),
    (lambda go: go(model(), head(0, 3, "k"), PROMPTS), "k counts K/V heads, of which the model has 3 (0 to 2)"),
    (lambda go: go(model(), head(positions=6), PROMPTS), "position 6 lies outside prompt 0, which has 6 tokens."),
    (lambda go: go(model(), head(positions=(-1, 5)), PROMPTS), "two of these positions are the same token of prompt 0."),
    (lambda go: go(model(), head(positions="verb"), PROMPTS), "no position 'verb'; choose among end, last, s1, s2."),
    (lambda go: go(model(), Addition(site="embed", vector=[1]), PROMPTS), "the vector has 1 number, and embed has 42."),
]  # fmt: skip


@pytest.mark.parametrize("go", ENGINES, ids=["run", "sweep", "plan_sweep"])
@pytest.mark.parametrize(("wrong", "said"), RUNS, ids=[said for _, said in RUNS])
def test_the_engines_refuse_a_wrong_call_in_one_sentence(go: Callable[..., Any], wrong: Any, said: str) -> None:
    refused(lambda: wrong(go), said)


# -- the rest of the interface -------------------------------------------------------------------------------------------

CALLS: list[tuple[Callable[[], Any], str]] = [
    (lambda: run(model(), ZERO, PROMPTS, batch_size="8", progress=False), "batch_size must be at least 1, not '8'."),
    (lambda: sweep(model(), ZERO, PROMPTS, subset=[5]), "subset must list one or more of the prompts by number, 0 to 1"),
    (lambda: sweep(model(), ZERO, PROMPTS, subset=[[0], [0, 1]]), "subset must list one or more of the prompts"),
    (lambda: sweep(model(), ZERO, PROMPTS, memory="2G"), "memory must be a whole number of bytes above 0, not '2G'."),
    (lambda: PROMPTS.take(7), "there is no prompt 7 among 2 prompts, numbered from 0."),
    (lambda: px.PromptSet.load("ioi_en").tokenize(model()), "expected a tokenizer, not LlamaForCausalLM; load one with"),
    (lambda: px.PromptSet([px.Prompt("half \ud800")]).tokenize(tokenizer()), "holds half a character at 5, which no tokenizer"),
    (lambda: px.reference_for([MEAN], model(), PROMPTS), "expected a model, not list"),
    (lambda: px.reference_for(model(), [MEAN], "text"), "prompts must be tokenised, not a str"),
    (lambda: px.resolve(model(), [MEAN], PROMPTS), "expected a model, not list"),
    (lambda: px.save_specs("x.yaml", "z.0.0"), "'z.0.0' is not an ablation"),
    (lambda: px.all_heads(tokenizer()), "expected a model or its config, not "),
    (lambda: px.all_heads(model(), "zer"), "kind must be 'zero', 'mean', 'resample' or 'noise', not 'zer'; did you mean 'zero'?"),
    (lambda: px.all_heads(model(), position="last"), "there is no field 'position'; did you mean 'positions'?"),
    (lambda: px.all_heads(model(), site="mlp_out"), "mlp_out has no heads; for an ablation of each layer write [Ablation("),
    (lambda: px.all_heads(model(), layer=2), "makes the heads of all layers and takes no layer; for some write [Ablation("),
    (lambda: px.save_specs([ZERO], "x.yaml"), "the arguments are swapped: save_specs(path, specs)."),
    (lambda: px.load_specs("nope.yaml"), "there is no file of specs nope.yaml; check the path."),
    (lambda: Ablation("zero", "z", 2), "given by name: Ablation(site=..., layer=..., heads=..., positions=..., kind=..."),
    (lambda: Ablation(kind="zero", site="z", layer=2), "z needs heads: heads=3, or heads=range(8) for several; all_heads("),
    (lambda: Ablation(kind="zero", site="resid_post"), "resid_post needs a layer: layer=2."),
    (lambda: head(site="q"), "scores (ActivationPatch edits it and read reads it)."),
    (lambda: head(site="pattern"), "scores (ForcedAttention edits it and read reads it)."),
    (lambda: head(site="mlp_neurons"), "scores (read reads it)."),
    (lambda: Addition(site="embed", vector=[1, np.nan]), "vector: number 1 of 2 must be a finite number, not nan."),
    (lambda: Addition(site="embed", vector=["1"] * 9), "vector: number 0 of 9 must be a finite number, not '1'."),
    (lambda: Addition(site="embed", vector=[1], scale="2"), "scale must be a number, not '2'."),
    (lambda: px.Prompt("x", ""), "answer: '' should be a text or several, none of them empty."),
    (lambda: px.Metric(lambda logits, prompts: logits, [1, 2]), "the name of a metric is a string, not [1, 2]."),
    (lambda: run(model(), ZERO, PROMPTS, "acc"), "unknown metric 'acc'; did you mean 'accuracy'?"),
    (lambda: px.read(model(), PROMPTS, None), "sites are one or more names, such as 'z' or ['z', 'resid_post'], not None."),
    (lambda: px.read(model(), PROMPTS, "z", positions=slice(3)), "positions are names and whole numbers, such as range(3)"),
    (lambda: px.read(model(), PROMPTS, "z", dtype="half precision"), "unknown dtype 'half precision'; give one such as"),
    (lambda: px.logit_lens, "it is pyvene_ext.methods.logit_lens."),
    (lambda: activations()["z"], "'z' has layers: acts['z', 0] is layer 0, acts.stack('z') all"),
    (lambda: activations()["blocks.1.attn.hook_z"], "acts['z', 1] is layer 1, acts.stack('z') all"),
    (lambda: activations()["z", 1, 2], "('z', 1, 2) was not read; there are z 0-2 [pos head d]"),
    (lambda: px.all_patches(model(), "zz"), "no patch of 'zz'; choose among q, k, v"),
    (lambda: px.force(model(), [-1], shape="uniform", block=(0, 1)), "layers count from 0, unlike -1"),
    # patch
    (lambda: patch(model(), ZERO, PROMPTS, SOURCE), "z.0.0 is not a patch; run it with pyvene_ext.run or sweep."),
    (lambda: patch(model(), ADDED, PROMPTS, SOURCE), "is not a patch; run it with pyvene_ext.run or sweep."),
    (lambda: patch(model(), "z.0.0", PROMPTS, SOURCE), "'z.0.0' is not an ablation"),
    (lambda: patch(model(), None, PROMPTS, SOURCE), "None is not an ablation"),
    (lambda: patch(model(), PROMPTS, SOURCE, PATCH), "base and source must be tokenised"),
    (lambda: patch(model(), PATCH, PROMPTS, None), "base and source must be tokenised"),
    (lambda: patch(tokenizer(), PATCH, PROMPTS, SOURCE), "expected a model, not "),
    (lambda: patch(model(), PATCH, PROMPTS, SOURCE.take([0])), "there are 2 base and 1 source prompts"),
    (lambda: patch(model(), PATCH, PROMPTS, SOURCE, engine="fast"), "unknown engine 'fast'; choose sweep or plain."),
    (lambda: patch(model(), [(PATCH, PATH)], PROMPTS, SOURCE), "z.0.0->logits is a path, which is run alone"),
    (lambda: patch(model(), replaced(sender="z.9.0"), PROMPTS, SOURCE), "z.9.0: layer 9 is out of range"),
    (lambda: patch(model(), replaced(receivers="k.1.5"), PROMPTS, SOURCE), "k.1.5: head 5 is out of range; k counts K/V"),
    (lambda: patch(model(), SUBSPACE, PROMPTS, SOURCE, directions=[1]), "directions are a dict by place and positions"),
    (lambda: patch(model(), SUBSPACE, PROMPTS, SOURCE, directions={}), "directions has no tensor under (('z', 0), 'all')"),
    # generate and steering
    (lambda: generate(model(), ADDED, "a text"), "prompts must be tokenised, not a str"),
    (lambda: generate(model(), PROMPTS, ADDED), "prompts must be tokenised, not an Addition"),
    (lambda: generate(model(), [ADDED], PROMPTS), "edits that are made jointly are a tuple, not a list"),
    (lambda: generate(model(), PATH, PROMPTS), "z.0.0->logits is a path"),
    (lambda: generate(model(), ADDED.model_copy(update={"vector": (1, 2)}), PROMPTS), "has 2 numbers, and resid_post has 42."),
    (lambda: generate(model(), ADDED, PROMPTS, max_new_tokens="3"), "max_new_tokens must be 1 or more, not '3'."),
    (lambda: generate(model(), ADDED, PROMPTS, max_new_tokens=58), "8 tokens, which with 58 new ones are more than the 64"),
    (lambda: generate(model(), ADDED, PROMPTS, max_length=9), "max_length cannot be an option of generate"),
    (lambda: generate(model(), ADDED, PROMPTS, max_tokens=9), "generate has no option 'max_tokens'; did you mean 'max_new_"),
    (lambda: generate(model(), ADDED, PROMPTS, num_return_sequences=2), "returns the tokens of one text per prompt"),
    (lambda: generate(model().model, ADDED, PROMPTS), "LlamaModel cannot generate; load the model as a causal"),
    (lambda: steering_vector(PROMPTS, SOURCE, model(), "z", 0), "expected a model, not TokenizedPrompts"),
    (lambda: steering_vector(model(), PROMPTS, SOURCE, 0, "z"), "no addition of 0; choose among z"),
]  # fmt: skip


def replaced(**fields: Any) -> PathPatch:
    return PATH.model_copy(update=fields)


@pytest.mark.parametrize(("wrong", "said"), CALLS, ids=[said for _, said in CALLS])
def test_a_wrong_call_is_refused_in_one_sentence(wrong: Any, said: str) -> None:
    refused(wrong, said)


# -- IntervenableModel ---------------------------------------------------------------------------------------------------

BASE, OTHER = random_inputs((6, 8)), random_inputs((6, 8), seed=1)


def at(
    kind: Any = VanillaIntervention, component: Any = "block_output", layer: Any = 1, unit: Any = "pos", **more: Any
) -> Any:
    return RepresentationConfig(layer, component, unit, intervention_type=kind, **more)


def made(*representations: Any, **config: Any) -> IntervenableModel:
    return IntervenableModel(IntervenableConfig(list(representations), **config), model())


def added(source: Any, **call: Any) -> Any:
    intervenable = made(at(AdditionIntervention))
    return intervenable(BASE, source_representations={intervenable.sorted_keys[0]: source}, **call)


def rotated(subspaces: Any, **more: Any) -> Any:
    return made(at(RotatedSpaceIntervention, **more))(BASE, [OTHER], {"sources->base": 3}, subspaces=subspaces)


MODULE = RepresentationConfig(1, "model.layers[0].mlpp.output", "pos", intervention_type=ZeroIntervention)
LOW_RANK = "LowRankRotatedSpaceIntervention on block_output needs low_rank_dimension, a whole number of 1 to 42, not "
BUILT: list[tuple[Callable[[], Any], str]] = [
    (lambda: IntervenableModel(None, model()), "a config is an IntervenableConfig, a RepresentationConfig or a list of these"),
    (lambda: IntervenableModel("mlp_output", model()), "and str is none; ablations, patches and other specs are run by"),
    (lambda: IntervenableModel([ZERO], model()), "and Ablation is none; ablations, patches and other specs are run by"),
    (lambda: IntervenableModel(model(), IntervenableConfig([at()])), "expected a model, not IntervenableConfig"),
    (lambda: IntervenableModel([], model()), "the config names no representation"),
    (lambda: made(at(layer=-1)), "layer -1 of block_output is out of range: LlamaForCausalLM has layers 0 to 2."),
    (lambda: made(at(layer="1")), "the layer of block_output must be a whole number, not '1'."),
    (lambda: made(at(unit="h")), "unit 'h' is wrong for block_output (batch pos d_model); use 'pos'."),
    (lambda: made(at(kind="vanilla")), "is a class of interventions such as pyvene.VanillaIntervention, not 'vanilla'."),
    (lambda: made(at(kind=torch.nn.Linear)), "is a class of interventions such as pyvene.VanillaIntervention, not <class"),
    (lambda: made(RepresentationConfig(1, "block_output", "pos", intervention=VanillaIntervention)), "a class is given as in"),
    (lambda: made(RepresentationConfig(1), intervention_types=[ZeroIntervention] * 2), "2 intervention types for 1 represent"),
    (lambda: made(at(max_number_of_units="x")), "max_number_of_units on block_output must be a whole number of 1 or more"),
    (lambda: made(at(LowRankRotatedSpaceIntervention)), f"{LOW_RANK}None."),
    (lambda: made(at(LowRankRotatedSpaceIntervention, low_rank_dimension=99)), f"{LOW_RANK}99."),
    (lambda: made(at(subspace_partition=[[0, 5], [5, 99]])), "as a list of dimensions from 0 to 41, unlike [[0, 5], [5, 99]]."),
    (lambda: made(at(source_representation=3)), "the source_representation on block_output must be a tensor, not int."),
    (lambda: made(MODULE), "LlamaForCausalLM has no module 'model.layers[0].mlpp'"),
]  # fmt: skip
ZEROED: list[tuple[Any, str]] = [  # inputs and locations of a zero ablation
    (("a text", None), "base must be a tokenised batch with input_ids [batch pos] or inputs_embeds [batch pos d], such as"),
    (({"input_ids": BASE["input_ids"].tolist()}, None), "base must be a tokenised batch"),
    (({"input_ids": BASE["input_ids"].float()}, None), "the input_ids of base are torch.float32; token ids are whole numbers."),
    (({"input_ids": BASE["input_ids"] + 100}, None), "but the model embeds 61 tokens; use its own tokenizer."),
    (({"input_ids": BASE["input_ids"][:0]}, None), "base has no tokens: its input_ids are empty."),
    (({**BASE, "attention_mask": BASE["attention_mask"][0]}, None), "the attention_mask of base must be a tensor [batch pos]."),
    (({**BASE, "attention_mask": BASE["attention_mask"][:1]}, None), "the attention_mask of base is (1, 8) for tokens (2, 8)"),
    (({**BASE, "position_ids": BASE["position_ids"][:, :3]}, None), "the position_ids of base are for 3 tokens, and there"),
    (({**BASE, "inputs_embeds": torch.zeros(2, 8, 42)}, None), "base has both input_ids and inputs_embeds: give one of them."),
    (({"inputs_embeds": torch.zeros(2, 8, 7)}, None), "the inputs_embeds of base have 7 dimensions, and the model's have 42."),
    ((BASE, 3), "unit_locations must be a dict with one entry, 'base' or 'sources->base'"),
    ((BASE, {"bas": 3}), "unit_locations has an entry 'bas'; use 'base' or 'sources->base'."),
    ((BASE, {"base": "last"}), "a unit location must be a whole number, not 'last'."),
    ((BASE, {"base": 9}), "position 9 of block_output at layer 1 is out of range: example 0 of base has 6 tokens in 8 columns."),
    ((BASE, {"base": 0}), "position [0] of block_output at layer 1 is padding in example 0 of base"),
    ((BASE, {"base": [1, 2]}), "two numbers under 'base' are ambiguous"),
    ((BASE, {"base": [[3], [3]]}), "'base' lists locations for 2 representations, but there are 1"),
    ((BASE, {"base": [[[[3]], [[3]]]]}), "must be [example][pos] lists of whole numbers, such as [[3]] * batch_size"),
    ((BASE, {"base": [[[3]] * 3]}), "block_output at layer 1 has locations for 3 examples, but base has 2"),
    ((BASE, {"base": [[[3], [3, 4]]]}), "the examples of base have [1, 2] locations in block_output at layer 1"),
]  # fmt: skip
SWAPPED: list[tuple[Callable[[], Any], str]] = [
    (lambda: made(at())(BASE), "needs a source and has none: give sources, or source_representations for this key."),
    (lambda: made(at())(BASE, ["a text"]), "source 0 must be a tokenised batch"),
    (lambda: made(at())(BASE, [random_inputs()]), "source 0 has 3 examples and base 2: give as many of each."),
    (lambda: made(at())(BASE, [OTHER] * 2), "2 sources were given for 1 group of interventions: give one each."),
    (lambda: made(at())(BASE, [OTHER], {"sources->base": ([[[3, 4]] * 2], [[[3]] * 2])}), "2 places in the source and 1"),
    (lambda: made(at())(BASE, [OTHER], {"sources->base": (19, 3)}), "example 0 of source 0 has 6 tokens in 8 columns."),
    (lambda: added(torch.ones(7)), "has shape (7,), but block_output needs (42,) or (2, 8, 42)."),
    (lambda: added(torch.ones(2, 2, 42), unit_locations={"base": 3}), "has shape (2, 2, 42), but block_output needs (42,)"),
    (lambda: added(np.ones(42)), "must be a tensor with an axis, not ndarray."),
    (lambda: made(at(AdditionIntervention))(BASE, source_representations="a"), "a dict of tensors by key, a list of tensors or"),
    (lambda: rotated([[[0, 99]] * 2]), "are out of range: there are subspaces 0 to 41."),
    (lambda: rotated([[[2]] * 2], subspace_partition=[[0, 5], [5, 42]]), "are out of range: there are subspaces 0 to 1."),
    (lambda: rotated("a"), "a subspace must be a whole number, not 'a'."),
    (lambda: rotated([[[0.5]] * 2]), "a subspace must be a whole number, not 0.5."),
    (lambda: rotated([[[0]] * 2] * 2), "subspaces hold entries for 2 interventions, and there are 1"),
    (lambda: rotated([[[0]]]), "has subspaces for 1 example, but base has 2: give one list per example."),
    (lambda: made(at(CollectIntervention)).generate("a text"), "base must be a tokenised batch"),
    (lambda: made(at(ZeroIntervention)).generate(random_inputs((6, 8), "right")), "base is padded on the right"),
    (lambda: IntervenableModel(at(ZeroIntervention), model().model).generate(BASE), "LlamaModel cannot generate"),
    (lambda: IntervenableModel(at(ZeroIntervention), model("gpt2"))({"input_ids": torch.ones(1, 65).long()}), "65 tokens but"),
    (lambda: IntervenableModel.load(str(Path(__file__).parent), model()), "holds no intervenable model"),
    (lambda: IntervenableModel.load("/no/folder", model()), "there is no folder /no/folder; check the path."),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "said"), [*BUILT, *SWAPPED], ids=[said for _, said in (*BUILT, *SWAPPED)])
def test_an_intervenable_model_refuses_a_wrong_call_in_one_sentence(wrong: Any, said: str) -> None:
    refused(wrong, said)


def test_a_subspace_of_another_width_is_refused_in_one_sentence(tmp_path: Path) -> None:
    made(at(LowRankRotatedSpaceIntervention, low_rank_dimension=2)).save(str(tmp_path))
    said = "has width 42, and block_output of this model 35; use the model that it was made for."
    refused(lambda: IntervenableModel.load(str(tmp_path), model("gpt2")), said)


@pytest.mark.parametrize(("call", "said"), ZEROED, ids=[said for _, said in ZEROED])
def test_an_intervenable_model_refuses_wrong_inputs_and_places_in_one_sentence(call: Any, said: str) -> None:
    base, locations = call
    refused(lambda: made(at(ZeroIntervention))(base, unit_locations=locations), said)
