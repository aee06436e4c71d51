"""The sweep engine gives the numbers of the plain one, whatever is edited, however the work is cut."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from modelcards import n_heads, n_layers
from pyvene_ext.engine.measure import METRICS, Metric, MetricLike
from pyvene_ext.engine.metrics import logit_diff, next_token_loss, token_kl
from pyvene_ext.engine.plain import reference_for, run
from pyvene_ext.engine.results import Result
from pyvene_ext.engine.sweep import plan_sweep, sweep
from pyvene_ext.engine.sweep.execute import GroupState
from pyvene_ext.engine.sweep.run import SweepBar
from pyvene_ext.engine.sweep.store import Store
from pyvene_ext.models import loading
from pyvene_ext.models.replay import Past, Replay
from pyvene_ext.prompts.sets import PromptSet
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.specs.ablation import Ablation, all_heads
from pyvene_ext.specs.joint import Spec
from tests.pyvene_ext.engine.test_compile import EDITS, SITES, kv_specs
from tests.random_prompts import random_prompts
from tests.tiers import first_only
from tests.tiny_random import FAMILIES, FEWER, UNLIKE, random_model
from tests.traces import traces

torch.set_num_threads(1)

PROMPTS = random_prompts((9, 6, 7, 9, 6, 7))


def _with_common_beginnings() -> TokenizedPrompts:
    """Of 14 tokens: three that begin with the same 9, in which "s1" lies for two of them, two with the same 10, one alone."""
    prompts = random_prompts((14, 14, 14, 14, 14, 14))
    ids = [list(row) for row in prompts.input_ids]
    for row in (2, 5):
        ids[row][:9] = ids[0][:9]
    ids[4][:10] = ids[1][:10]
    positions = [dict(named) for named in prompts.positions]
    for row, s1 in ((0, -6), (2, -4), (5, -6), (1, -9), (4, -9)):
        positions[row]["s1"] = s1
    return replace(prompts, input_ids=tuple(map(tuple, ids)), positions=tuple(positions))


BEGINNINGS = _with_common_beginnings()
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
EAGER = [pytest.param(f"{family}/eager", marks=pytest.mark.slow) for family in ("llama3_1", "gpt2")]
WITH_EAGER = [*FAMILIES, *EAGER]  # Gemma 2 has no other
FEWER_WITH_EAGER = [*FEWER, *EAGER]


@cache
def _model(family: str):
    """The tiny model of a family; "family/eager" chooses the attention implementation."""
    name, _, implementation = family.partition("/")
    return random_model(name, attn_implementation=implementation or None)


def _at(site: str, layer: int) -> dict:
    where: dict = {} if site == "embed" else {"layer": layer}
    return where | ({"heads": (0, 3)} if site in ("z", "scores") else {})


def _every_spec() -> list[Spec]:
    """Every kind at every site, layer and position choice."""
    positions = ("all", "last", "s1", (0,), ("s1", -2, 0))
    specs: list[Spec] = [
        Ablation(site=site, positions=where, **edit, **_at(site, layer))
        for site in SITES
        for edit in EDITS
        for where in positions
        for layer in ((0,) if site == "embed" else (0, 1, 2))
    ]
    specs += [
        Ablation(site=site, kind="mean", mean="per_position", positions=where, **_at(site, layer))
        for site in SITES
        for where in positions[1:]
        for layer in ((0,) if site == "embed" else (0, 2))
    ]
    return specs + [
        Ablation(site="scores", kind=kind, positions=where, **_at("scores", layer))
        for kind in ("zero", "mean")
        for where in positions
        for layer in (0, 1, 2)
    ]


def _joint_specs() -> list[Spec]:
    """Several edits at once: in several layers, in one layer at several sites, at one place twice."""
    z = {"site": "z", "heads": (1,)}
    noise = {"kind": "noise", "noise": "norm_matched"}
    return [
        tuple(Ablation(kind="zero", site="z", layer=layer, heads=(head,)) for layer in (0, 2) for head in (0, 3)),
        (Ablation(kind="zero", layer=0, **z), Ablation(kind="mean", layer=2, positions="last", **z)),
        (Ablation(kind="zero", layer=2, **z), Ablation(kind="mean", site="scores", layer=2, heads=(0,))),
        (Ablation(kind="mean", site="scores", layer=1, heads=(1,)), Ablation(layer=1, positions="s1", **noise, **z)),
        (
            Ablation(kind="zero", site="scores", layer=1, heads=(1,)),
            Ablation(kind="mean", layer=1, positions="last", **z),
        ),
        (Ablation(kind="mean", layer=1, **z), Ablation(kind="zero", layer=1, positions="last", **z)),
        (Ablation(kind="mean", layer=1, **z), Ablation(layer=1, positions="last", **noise, **z)),
        (
            Ablation(kind="mean", site="resid_pre", layer=1, positions="s1"),
            Ablation(kind="zero", layer=1, positions="last", **z),
            Ablation(kind="resample", site="attn_out", layer=1, positions="last"),
            Ablation(site="resid_mid", layer=1, positions="last", **noise),
            Ablation(site="mlp_out", layer=1, positions="s1", **noise),
            Ablation(site="resid_post", layer=1, positions="s1", **noise),
        ),
        (
            Ablation(kind="mean", site="embed", positions=(0,)),
            Ablation(site="resid_pre", layer=0, positions=(0,), **noise),
        ),
        (
            Ablation(kind="mean", site="resid_post", layer=0, positions="last"),
            Ablation(site="resid_pre", layer=1, **noise),
        ),
        (Ablation(kind="zero", site="resid_post", layer=2), Ablation(kind="mean", site="mlp_out", layer=2)),
        (Ablation(kind="zero", site="resid_post", layer=2, positions=(0,)), Ablation(kind="zero", layer=2, **z)),
    ]


def _compare(
    family: str, specs: list[Spec], metric: MetricLike = "logit_diff", prompts: TokenizedPrompts = PROMPTS, **options
) -> Result:
    model = _model(family)
    reference = reference_for(model, specs, prompts, progress=False)
    slow = run(model, specs, prompts, metric, reference, progress=False)
    fast = sweep(model, specs, prompts, metric, reference, progress=False, **options)
    assert fast.names == slow.names and fast.metric == slow.metric
    np.testing.assert_allclose(fast.baseline, slow.baseline, **CLOSE)
    for name, got, expected in zip(fast.names, fast.intervened, slow.intervened, strict=True):
        of_size = 1e-5 * max(1, np.abs(expected).max())  # logits of size 4 are rounded to 4 times as much
        np.testing.assert_allclose(got, expected, err_msg=name, rtol=1e-5, atol=of_size)
    return fast


def _check_every(family, every):
    first = FAMILIES.index(family.partition("/")[0]) % every
    result = _compare(family, _every_spec()[first::every])
    assert (np.abs(result.delta).max(1) > 1e-3).mean() > 0.6  # and not because nothing is changed


@pytest.mark.parametrize("family", WITH_EAGER)
def test_every_ablation_gives_what_the_plain_engine_gives(family):
    """A sixteenth of them, on each family others."""
    _check_every(family, 16)


@pytest.mark.slow
@pytest.mark.parametrize("family", UNLIKE)
def test_so_does_every_single_one(family):
    _check_every(family, 1)


@pytest.mark.parametrize("family", FEWER_WITH_EAGER)
def test_ablated_keys_and_values_give_what_the_plain_engine_gives(family):
    specs = kv_specs(family.partition("/")[0])
    result = _compare(family, specs)
    assert (np.abs(result.delta).max(1) > 1e-3).mean() > 0.7
    _compare(family, specs, prompts=BEGINNINGS)


@pytest.mark.parametrize("family", FEWER_WITH_EAGER)
def test_joint_ablations_give_what_the_plain_engine_gives(family):
    _compare(family, _joint_specs())


@pytest.mark.parametrize("not_in", range(3))
def test_an_edit_of_a_joint_one_that_reaches_some_prompts_only(not_in):
    """In the last layer an edit counts at the last token alone, which "here" is in two of these prompts."""
    prompts = random_prompts((9, 9, 9))
    places = [{**of_prompt, "here": -3 if i == not_in else -1} for i, of_prompt in enumerate(prompts.positions)]
    everywhere = Ablation(kind="zero", site="z", layer=0, heads=(0,), positions="last")
    last = n_layers(_model("llama3_1").config) - 1
    specs = [(everywhere, Ablation(kind="zero", site="z", layer=last, heads=(1,), positions="here"))]
    _compare("llama3_1", specs, prompts=replace(prompts, positions=tuple(places)))


def _check_beginnings(family, every, memory=None):
    # Positions behind their last token differ between prompts: 0 and 3 lie in the common beginning of all.
    specs = [*_every_spec()[::every], *_joint_specs()]
    for site, layer in (("z", 0), ("z", 1), ("resid_pre", 2), ("scores", 1), ("mlp_out", 0)):
        for positions in ((3,), (3, 12), (0, "s1")):
            specs += [Ablation(site=site, kind="mean", positions=positions, **_at(site, layer))]
            specs += [
                (
                    Ablation(kind="zero", site="mlp_out", layer=0, positions=early),
                    Ablation(site=site, kind="mean", positions=positions, **_at(site, layer)),
                    Ablation(kind="zero", site="attn_out", layer=2, positions=late),
                )
                for early, late in (("last", (3,)), ((5,), "last"))
            ]
    _compare(family, specs, prompts=BEGINNINGS, memory=memory)


@pytest.mark.parametrize("family", FEWER_WITH_EAGER)
def test_what_prompts_begin_with_is_run_once_and_the_numbers_are_the_same(family):
    _check_beginnings(family, every=23)


@pytest.mark.slow
@pytest.mark.parametrize("family", UNLIKE)
def test_so_they_are_of_more_specs_with_little_memory(family):
    _check_beginnings(family, every=4, memory=500_000)


def test_common_beginnings_are_not_run_again_and_again():
    model = _model("llama3_1")
    unlike = random_prompts((14, 14, 14, 14, 14, 14))
    for positions in ("all", "last"):
        specs = all_heads(model.config, positions=positions)
        alike, apart = (plan_sweep(model, specs, prompts).token_layers for prompts in (BEGINNINGS, unlike))
        assert alike < 0.9 * apart


@pytest.mark.parametrize("metric", [name for name, metric in METRICS.items() if not metric.per_token])
@pytest.mark.parametrize(("family", "every"), first_only([("gemma2", 4), ("gpt2", 1)]))
def test_every_metric_is_the_plain_engines(family, every, metric):
    specs = [*all_heads(_model(family).config, positions="last"), *_joint_specs()]
    _compare(family, specs[::every], metric)


AT_EVERY_TOKEN = {
    "loss and KL": Metric(
        lambda logits, prompts: token_kl(logits, prompts) + next_token_loss(logits, prompts).nan_to_num(),
        name="loss and KL",
        of_tokens=True,
        needs=("clean",),
    ),
    "answers": Metric(
        lambda logits, prompts: logit_diff(logits[:, -1], prompts)[:, None] + logits[:, :, 0],
        name="answers",
        of_tokens=True,
        ids="answers",
    ),
}


def _check_at_every_token(family, every):
    specs = [*_every_spec()[::23], *_joint_specs(), *kv_specs(family.partition("/")[0])[::5]][::every]
    _compare(family, specs, AT_EVERY_TOKEN["loss and KL"])
    # What is edited in the common beginning of some prompts is read there; it may, or may not, change the columns after it.
    for positions in ((0, 5), (3, 12), (2, -1)):
        for layer in (0, 1, 2):
            early = Ablation(kind="zero", site="resid_post", layer=layer, positions=positions)
            specs += [early, (early, Ablation(kind="mean", site="z", layer=2, heads=(0,), positions=(4, -1)))]
    for metric, memory in (("loss and KL", None), ("answers", 800_000)):
        _compare(family, specs, AT_EVERY_TOKEN[metric], BEGINNINGS, memory=memory)


@pytest.mark.parametrize("family", FEWER_WITH_EAGER)
def test_metrics_at_every_token_are_the_plain_engines(family):
    _check_at_every_token(family, every=4)


@pytest.mark.slow
@pytest.mark.parametrize("family", UNLIKE)
def test_so_they_are_of_more_specs(family):
    _check_at_every_token(family, every=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_themselves_are_the_models(family):
    model = _model(family)
    ids = torch.tensor([PROMPTS.input_ids[0], PROMPTS.input_ids[3]])
    replay = Replay(model)
    with torch.inference_mode():
        expected = model(ids).logits[:, -1]
        hidden = replay.embed(ids)
        for layer in range(replay.n_layers):
            hidden = replay.block(layer, hidden, (0, 9), Past())
        torch.testing.assert_close(replay.logits(hidden[:, -1]), expected, **CLOSE)
        some = torch.tensor([[3, 5, 8], [9, 2, 2]])
        torch.testing.assert_close(replay.logits(hidden[:, -1], some), expected.gather(1, some), **CLOSE)


@pytest.mark.parametrize(("family", "memory"), first_only([("gemma2", 220_000), ("qwen2_5", 260_000)]))
def test_however_little_memory_there_is_the_numbers_are_the_same(family, memory):
    specs = [*_every_spec()[::13], *_joint_specs()]
    assert len(plan_sweep(_model(family), specs, PROMPTS, memory=memory).waves) > 3
    _compare(family, specs, memory=memory)


@pytest.mark.parametrize("family", FEWER)
@pytest.mark.parametrize("positions", ["all", "last"])
def test_attention_taken_out_whole_leaves_no_rounding_for_a_norm_to_blow_up(family, positions):
    model = _model(family)
    heads = tuple(range(n_heads(model.config)))
    specs = [
        Ablation(kind=kind, site=site, layer=layer, heads=heads, positions=positions)
        for layer in range(n_layers(model.config))
        for site, kind in (("z", "zero"), ("scores", "zero"), ("z", "mean"))
    ]
    _compare(family, specs)


@pytest.mark.parametrize("subset", [[], [True, False], ["0"], [1.0], [0, 0], [6], [-1], 3, None])
def test_prompts_are_chosen_by_their_numbers(subset):
    model = _model("qwen2_5")
    specs = all_heads(model.config)[:2]
    if subset is None:
        chosen = sweep(model, specs, PROMPTS, subset=np.arange(2, 4), progress=False)
        assert np.array_equal(chosen.baseline, sweep(model, specs, PROMPTS, subset=[2, 3], progress=False).baseline)
        return
    with pytest.raises(ValueError, match="by number, 0 to 5, each once"):
        sweep(model, specs, PROMPTS, subset=subset)


@pytest.mark.parametrize("memory", [0, -1, 1e6, float("nan"), "1", True])
def test_memory_is_a_number_of_bytes(memory):
    model = _model("qwen2_5")
    with pytest.raises(ValueError, match="memory must be a whole number of bytes above 0"):
        sweep(model, all_heads(model.config), PROMPTS, memory=memory)


def test_too_little_memory_is_refused_before_anything_runs():
    model = _model("qwen2_5")
    with pytest.raises(
        ValueError, match=r"0\.0 MiB of working memory are too little for prompts of 6 tokens; allow at least 0\.2 MiB"
    ):
        sweep(model, all_heads(model.config), PROMPTS, memory=1000)


@pytest.mark.parametrize("limit", [40, 1000])
def test_running_out_of_memory_makes_smaller_batches_for_the_rest_and_the_same_numbers(monkeypatch, limit):
    model = _model("mistral")
    specs = [*all_heads(model.config), *_joint_specs()]
    calls, refused = [], []
    block, init = Replay.block, GroupState.__init__

    def small(self, layer, hidden, *args, **kwargs):
        calls.append(len(hidden))
        if hidden.shape[0] * hidden.shape[1] > limit:
            refused.append(len(hidden))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return block(self, layer, hidden, *args, **kwargs)

    def few(self, executor, wave, group, length, trunk):
        if len(group.specs) * len(group.prompts) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        init(self, executor, wave, group, length, trunk)

    expected = run(model, specs, PROMPTS, progress=False)
    monkeypatch.setattr(Replay, "block", small)
    monkeypatch.setattr(GroupState, "__init__", few)
    result = sweep(model, specs, PROMPTS, progress=False)
    np.testing.assert_allclose(result.intervened, expected.intervened, **CLOSE)
    assert len(refused) < 12 < len(calls) or limit == 1000


def test_not_even_one_row_fits_is_said_in_one_sentence(monkeypatch):
    def never(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Replay, "block", never)
    model = _model("mistral")
    with pytest.raises(
        ValueError, match="one intervention on a prompt of 6 tokens does not fit in memory; use shorter"
    ):
        sweep(model, all_heads(model.config), PROMPTS, progress=False)


@pytest.mark.parametrize("family", FEWER)
def test_a_projection_that_cannot_be_taken_apart_is_run_as_it_is(family, monkeypatch):
    monkeypatch.setattr("pyvene_ext.models.replay.output_weight", lambda projection: None)
    _compare(family, [*_every_spec()[::14], *_joint_specs()[::2]])


def test_a_subset_keeps_reference_and_donors_of_all_prompts():
    model = _model("gpt2")
    specs = [Ablation(kind="resample", site="z", layer=1, heads=(2,), positions="last"), *_every_spec()[:40]]
    whole = sweep(model, specs, PROMPTS, progress=False)
    part = sweep(model, specs, PROMPTS, subset=[4, 0], progress=False)
    np.testing.assert_allclose(part.intervened, whole.intervened[:, [4, 0]], **CLOSE)
    np.testing.assert_allclose(part.baseline, whole.baseline[[4, 0]], **CLOSE)


def test_what_the_plain_engine_refuses_is_refused():
    model = _model("gpt2")
    with pytest.raises(ValueError, match="unknown metric 'loss'"):
        sweep(model, all_heads(model.config), PROMPTS, "loss")
    with pytest.raises(ValueError, match="layer 7 is out of range"):
        plan_sweep(model, Ablation(kind="zero", site="mlp_out", layer=7), PROMPTS)


@pytest.mark.parametrize("family", FEWER)
def test_nothing_is_left_on_the_model_after_a_sweep_or_an_error(family, monkeypatch):
    model = random_model(family).train()
    before = traces(model)
    specs = [*_every_spec()[::19], *_joint_specs()[::4]]
    sweep(model, specs, PROMPTS, progress=False)
    assert traces(model) == before
    for name, module in model.named_modules():
        if "norm" in name or "ln_" in name or name.endswith(("mlp", "attn")):
            handle = module.register_forward_hook(_fail)
            with pytest.raises(RuntimeError, match="in the middle"):
                sweep(model, specs, PROMPTS, progress=False)
            handle.remove()
            assert traces(model) == before, name


@pytest.mark.slow
@pytest.mark.parametrize("family", FEWER)
def test_compiled_mlps_give_the_same_numbers_and_are_gone_afterwards(family, monkeypatch):
    compiled = []
    make = torch.compile

    def without_a_compiler(function, **options):  # the same graphs, run by torch itself: a real backend takes minutes
        compiled.append(function)
        return make(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", without_a_compiler)
    before = traces(_model(family))
    _compare(family, _every_spec()[::40] + _joint_specs()[:4], compile=True)
    assert len(compiled) == n_layers(_model(family).config)
    assert traces(_model(family)) == before


def test_a_store_of_compiled_numbers_is_another_one(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    specs = _every_spec()[:2]
    sweep(_model("gpt2"), specs, PROMPTS, store=tmp_path, compile=True, progress=False)
    with pytest.raises(ValueError, match="compiled"):
        sweep(_model("gpt2"), specs, PROMPTS, store=tmp_path, progress=False)


def test_a_model_on_several_devices_is_not_compiled():
    model = random_model("gpt2")
    model.hf_device_map = {"": "cpu"}
    with pytest.raises(ValueError, match="several"):
        sweep(model, _every_spec()[:1], PROMPTS, compile=True, progress=False)


def _fail(*_):
    raise RuntimeError("in the middle")


def test_logits_that_are_not_finite_name_the_prompt_and_the_intervention():
    model = random_model("gpt2")
    specs = [Ablation(kind="mean", site="mlp_out", layer=1, positions="last")]
    reference = reference_for(model, specs, PROMPTS, progress=False)
    assert reference is not None
    reference.tensors["mean/mlp_out.1"][0] = torch.inf
    with pytest.raises(ValueError, match=r"the logits of prompt 1 under mlp_out\.1@last:mean are not finite"):
        sweep(model, specs, PROMPTS, reference=reference, progress=False)
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = torch.nan
    with pytest.raises(ValueError, match="the logits of prompt 1 are not finite"):
        sweep(model, all_heads(model.config), PROMPTS, progress=False)


def test_only_what_the_plan_counts_is_computed(monkeypatch):
    """Tokens in blocks, counted as they are called, are the plan's; far fewer than one forward pass an intervention."""
    model = _model("llama3_1")
    tokens = []
    block = Replay.block

    def counted(self, layer, hidden, *args, **kwargs):
        tokens.append(hidden.shape[0] * hidden.shape[1])
        return block(self, layer, hidden, *args, **kwargs)

    monkeypatch.setattr(Replay, "block", counted)
    for positions, most in (("all", 0.6), ("last", 0.2)):
        specs = all_heads(model.config, positions=positions)
        plan = plan_sweep(model, specs, PROMPTS)
        tokens.clear()
        sweep(model, specs, PROMPTS, progress=False)
        assert sum(tokens) == plan.token_layers
        assert plan.token_layers < most * plan.plain_token_layers


def test_no_logits_but_those_of_the_answers_are_made():
    model = _model("qwen2_5")
    made = []
    handle = model.get_output_embeddings().register_forward_hook(lambda module, args, out: made.append(out.shape))
    sweep(model, all_heads(model.config), PROMPTS, progress=False)
    handle.remove()
    assert made and all(shape[1:] == (1, 2) for shape in made)


def test_the_plan_says_how_much_there_is_to_do(tmp_path, capsys):
    model = _model("qwen2_5")
    text = plan_sweep(model, all_heads(model.config), PROMPTS).summary()
    assert "18 interventions x 6 prompts" in text and "token-layers" in text and "memory: up to 256 MiB" in text
    sweep(model, all_heads(model.config)[0], PROMPTS.take([0]), store=tmp_path / "unfinished")
    said = capsys.readouterr().err
    assert "1 intervention x 1 prompt in 1 batch\n" in said and re.search(
        r"^1 intervention x 1 prompt in \d+\.\d s$", said, re.M
    )
    assert "unfinished" not in said  # a study removes the folder afterwards


@pytest.mark.slow
def test_a_trained_model_gives_the_same_too():
    model, tokenizer = loading.load_model("tiny-gemma2")
    prompts = PromptSet.load("pyvene_ext/prompts/data/ioi_en.json").tokenize(tokenizer)
    specs = all_heads(model.config, "mean", positions="last", mean="per_position")[::5]
    reference = reference_for(model, specs, prompts, progress=False)
    slow = run(model, specs, prompts, reference=reference, progress=False)
    fast = sweep(model, specs, prompts, reference=reference, progress=False)
    np.testing.assert_allclose(fast.intervened, slow.intervened, rtol=1e-4, atol=1e-4)


def test_a_store_keeps_to_the_batches_it_began_with(tmp_path, monkeypatch):
    model = _model("qwen2_5")
    specs = all_heads(model.config)
    expected = sweep(model, specs, PROMPTS, memory=220_000, progress=False)
    few, kept = [], Store.add

    def stop(self, number, arrays):
        kept(self, number, arrays)
        few.append(number)
        if len(few) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Store, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        sweep(model, specs, PROMPTS, memory=220_000, store=tmp_path / "kept", progress=False)
    result = sweep(model, specs, PROMPTS, store=tmp_path / "kept", progress=False)  # with all the memory it wants
    assert few[2:] and not set(few[:2]) & set(few[2:])
    assert np.array_equal(result.intervened, expected.intervened) and np.array_equal(result.baseline, expected.baseline)


def test_a_store_of_another_version_s_batches_is_refused(tmp_path, monkeypatch):
    model = _model("qwen2_5")
    specs = all_heads(model.config)
    monkeypatch.setattr(Store, "add", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sweep(model, specs, PROMPTS, store=tmp_path, progress=False)
    monkeypatch.setattr("pyvene_ext.engine.sweep.plan.CLEAN_TOKENS", 9)
    with pytest.raises(ValueError, match="was begun by a version that cut the work differently; delete the folder"):
        sweep(model, specs, PROMPTS, store=tmp_path, progress=False)


def test_rounding_does_not_take_the_bar_past_its_end() -> None:
    """tqdm warns of a share above 1."""
    plan = plan_sweep(_model("llama3_1"), all_heads(_model("llama3_1").config), PROMPTS)
    total = len(PROMPTS) * len(plan.resolved.specs)
    with warnings.catch_warnings(), SweepBar(plan, range(len(plan.waves)), "sweep", shown=True) as bar:
        warnings.simplefilter("error")
        bar.advance(total - 0.5)
        bar.advance(0.5 + 1e-6)
        bar._bar.refresh()
        assert bar._bar.n == total
