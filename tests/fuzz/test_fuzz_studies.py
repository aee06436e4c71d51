"""What must hold of maps, probes, circuits, statistics, tags and parallel text whatever they are given."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pyvene_ext import stats
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.circuits.choosing import top_edges
from pyvene_ext.methods.circuits.circuit import Circuit, exists
from pyvene_ext.methods.circuits.running import run_circuits
from pyvene_ext.methods.heads.scores import read_head_scores, write_head_scores
from pyvene_ext.methods.reasoning.probes import cross_validated, deal_folds, shuffled
from pyvene_ext.methods.reasoning.transplant import Paired, fit_maps
from pyvene_ext.prompts.parallel import (
    SentencePair,
    filter_pairs,
    swap_neighbours,
    tokenize_pairs,
    word_prompts,
)
from pyvene_ext.prompts.token_tags import (
    TAGS,
    spans_of,
    tag_tokens,
    tags_of,
)
from tests.fuzz.outcomes import few, outcome
from tests.random_prompts import random_prompts
from tests.saved_models import shipped_tokenizer
from tests.tiny_random import FAMILIES, random_model, tiny_config

SEED = st.integers(0, 2**32)
TOKENIZER = shipped_tokenizer()
TOKENIZER.unk_token = "<unk>"


@cache
def _model(family: str) -> Any:
    return random_model(family)


# -- maps between residual streams -------------------------------------------------------------------------------------

MANY = random_prompts((9, 5, 7) * 12)


@given(
    families=st.tuples(st.sampled_from(FAMILIES), st.sampled_from(FAMILIES)),
    layers=st.lists(st.tuples(st.integers(-1, 3), st.integers(-1, 3)), min_size=1, max_size=2),
    method=st.sampled_from(["ridge", "ridge", "procrustes", "x"]),
    alpha=st.none() | st.floats(1e-6, 1e3) | st.sampled_from([0.0, -1.0, math.nan, math.inf]),
    share=st.sampled_from([0.25, 0.5, 0.01, 0.99, 0.0, 1.0, math.nan]),
    n=st.sampled_from([1, 2, 5, 36]),
    seed=SEED,
)
@few(1)
@example(families=("gpt2", "gpt2"), layers=[(0, 0)], method="ridge", alpha=1.0, share=0.5, n=-1, seed=0)
def test_maps_explain_what_they_say(
    families: Any, layers: Any, method: Any, alpha: Any, share: float, n: int, seed: int
) -> None:
    texts = MANY.take(range(n)) if n > 0 else random_prompts((1, 1))  # one token to fit
    paired = Paired(texts, texts)
    host, donor = map(_model, families)
    options = {"method": method, "alpha": alpha, "test_share": share, "seed": seed}
    maps = outcome(lambda: fit_maps(host, donor, paired, layers, **options))
    sensible = all(0 <= layer < 3 for pair in layers for layer in pair) and 0 < share < 1 and method != "x"
    if maps is None or not sensible or not (alpha is None or 0 < alpha < math.inf):
        assert maps is None
        return
    for pair in layers:
        for one in maps[pair]:
            assert one.fit is not None
            assert one.weight.isfinite().all() and -1e-9 <= one.fit.r2_train <= 1 and one.fit.r2_test <= 1
            assert one.fit.train_tokens + one.fit.test_tokens <= sum(map(len, texts.input_ids))
            if method == "procrustes":  # a rotation of what fits into the narrower stream, times a scale
                narrow = one.weight if one.weight.shape[0] >= one.weight.shape[1] else one.weight.T
                gram = (narrow.T @ narrow).double()
                scale = gram.diagonal().mean()
                torch.testing.assert_close(gram / scale, torch.eye(len(gram)).double(), atol=1e-4, rtol=0)
    again = fit_maps(host, donor, paired, layers[::-1], batch_size=5, **options)
    for pair in layers:
        for one, other in zip(maps[pair], again[pair], strict=True):
            torch.testing.assert_close(one.weight, other.weight, rtol=1e-2, atol=1e-3)
    if method == "ridge" and alpha is not None:
        tighter = fit_maps(host, donor, paired, layers, **options | {"alpha": alpha * 10})
        for pair in layers:
            for one, other in zip(maps[pair], tighter[pair], strict=True):
                assert other.fit.r2_train <= one.fit.r2_train + 1e-9  # type: ignore[union-attr]


@pytest.mark.parametrize("method", ["ridge", "procrustes"])
def test_models_whose_streams_never_change_have_no_map(method: Any) -> None:
    donor = random_model("mistral")
    with torch.no_grad():
        for parameter in donor.parameters():
            parameter.zero_()
    for pair in ((donor, _model("gpt2")), (_model("gpt2"), donor)):
        with pytest.raises(ValueError, match="the same at every token"):
            fit_maps(*pair, Paired(MANY, MANY), [(0, 0)], method=method)


# -- probes ------------------------------------------------------------------------------------------------------------


@given(groups=st.lists(st.integers(0, 8), max_size=20), n_folds=st.integers(2, 6), seed=SEED)
def test_folds_hold_whole_groups(groups: list[int], n_folds: int, seed: int) -> None:
    folds = outcome(deal_folds, groups, n_folds, rng(seed))
    if folds is None or len(set(groups)) < n_folds:
        assert folds is None and len(set(groups)) < n_folds
        return
    assert len({(group, fold) for group, fold in zip(groups, folds, strict=True)}) == len(set(groups))
    sizes = np.bincount(folds, minlength=n_folds)
    assert len(sizes) == n_folds and sizes.min() > 0
    assert sizes.max() - sizes.min() <= max(Counter(groups).values())


@given(
    groups=hnp.arrays(np.int64, st.integers(1, 15), elements=st.integers(0, 5)), columns=st.integers(1, 3), seed=SEED
)
def test_shuffled_labels_are_those_of_whole_groups(groups: np.ndarray, columns: int, seed: int) -> None:
    y = np.arange(len(groups) * columns).reshape(len(groups), columns)
    given = shuffled(y, groups, rng(seed))
    assert sorted(given.ravel()) == sorted(y.ravel()) and (given % columns == y % columns).all()
    sizes = Counter(groups.tolist())
    if len(set(sizes.values())) == 1:  # then a group's labels are those of another
        for group in sizes:
            assert len({groups[row] for row in given[groups == group][:, 0] // columns}) == 1


@st.composite
def studies(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, targets of two trials, and folds."""
    generator = np.random.default_rng(draw(SEED))
    n, d, columns = draw(st.integers(12, 40)), draw(st.integers(1, 60)), draw(st.integers(1, 3))
    x = generator.normal(size=(n, d)) * 10.0 ** draw(st.integers(-6, 6)) + draw(st.sampled_from([0.0, 1.0, -1e3]))
    y = generator.normal(size=(2, n, columns)) * 10.0 ** draw(st.integers(-3, 6)) + draw(st.sampled_from([0.0, 7.0]))
    if draw(st.booleans()):
        x[:, 0] = draw(st.sampled_from([0.0, 3.5]))
    return x, y, generator.permutation(np.arange(n) % draw(st.integers(3, 5)))


@given(study=studies(), shift=st.sampled_from([0.0, 1.0, -50.0]), data=st.data())
def test_probes_know_no_order_and_fit_at_least_the_mean(study: Any, shift: float, data: st.DataObject) -> None:
    x, y, folds = study
    (fit,) = cross_validated(x, [y], folds)
    assert np.isfinite(fit.predicted).all()
    for trial in range(2):
        assert -1e-9 <= stats.r_squared(y[trial], fit.in_sample[trial]) <= 1 + 1e-9, "no worse than the mean"
        assert stats.r_squared(y[trial], fit.predicted[trial]) <= 1
    order = np.random.default_rng(data.draw(SEED)).permutation(len(x))
    (other,) = cross_validated(x[order], [y[:, order] + shift], folds[order])
    if (other.alphas == fit.alphas).all():  # of penalties that are as good as one another rounding chooses
        scale = np.abs(y).max()
        np.testing.assert_allclose(other.predicted, fit.predicted[:, order] + shift, rtol=1e-5, atol=1e-6 * scale)


@given(seed=SEED, d=st.integers(1, 200))
@few(4)
def test_noise_is_in_sample_alone(seed: int, d: int) -> None:
    generator = np.random.default_rng(seed)
    n = 60
    x, y = generator.normal(size=(n, d)), generator.normal(size=(20, n, 1))
    (fit,) = cross_validated(x, [y], deal_folds(range(n), 5, generator))
    found, in_sample = (
        np.mean([stats.r_squared(y[i], of[i]) for i in range(20)]) for of in (fit.predicted, fit.in_sample)
    )
    assert found < 0.05 and found < in_sample + 1e-9


# -- circuits ----------------------------------------------------------------------------------------------------------

BASE = random_prompts((8, 6, 8))
SOURCE = replace(random_prompts((8, 6, 8), seed=1), answers=BASE.answers)


@given(family=st.sampled_from(FAMILIES), seed=SEED, density=st.floats(0, 1))
@few(3)
def test_circuits_go_from_nothing_to_the_model(family: str, seed: int, density: float) -> None:
    model = _model(family)
    config = model.config
    there = exists(config)
    some = there & (np.random.default_rng(seed).random(there.shape) < density)
    circuit = Circuit.of(some, config)
    assert (circuit.matrix(config) == some).all() and len(circuit) == some.sum()
    assert not (circuit.complement(config).matrix(config) & some).any()
    assert circuit.pruned(config).edges <= circuit.edges
    assert circuit.pruned(config).pruned(config) == circuit.pruned(config)
    wanted = [Circuit.full(config), Circuit(frozenset()), circuit, circuit.pruned(config)]
    found = run_circuits(model, wanted, BASE, SOURCE, progress=False)
    np.testing.assert_allclose(found.faithfulness[:2], [1, 0], atol=1e-4)
    np.testing.assert_allclose(found.circuits[0], found.clean, atol=1e-4)
    np.testing.assert_allclose(found.circuits[1], found.empty, atol=1e-4)
    if family != "gemma2":  # whose post-norm over all heads lets one head change the shares of the others
        np.testing.assert_allclose(found.circuits[2], found.circuits[3], atol=1e-4)


@given(family=st.sampled_from(FAMILIES), seed=SEED, data=st.data())
def test_larger_circuits_hold_the_smaller(family: str, seed: int, data: st.DataObject) -> None:
    config = tiny_config(family)
    there = exists(config)
    scores = np.random.default_rng(seed).normal(size=there.shape)
    if data.draw(st.booleans()):
        scores = scores.round()  # many ties
    sizes = sorted(data.draw(st.lists(st.integers(-1, int(there.sum()) + 1), min_size=2, max_size=4)))
    before: frozenset[str] = frozenset()
    for n in sizes:
        circuit = outcome(top_edges, scores, n, config)
        assert (circuit is not None) == (0 <= n <= there.sum())
        if circuit is not None:
            assert before <= circuit.edges and len(circuit) <= n
            assert top_edges(-scores, n, config) == circuit
            before = circuit.edges
    assert top_edges(scores, int(there.sum()), config) == Circuit.full(config)
    row, column = np.argwhere(there)[data.draw(st.integers(0, int(there.sum()) - 1))]
    scores[row, column] = math.nan
    assert outcome(top_edges, scores, 1, config) is None


@given(
    edge=st.text(alphabet="zqkvmlp_inoutembdgs.012->+ ", max_size=16)
    | st.builds("{}->{}".format, *(2 * [st.text(alphabet="zq.01", max_size=5)]))
)
@example(edge="z.0.0->q.1.0")
@example(edge="embed->logits")
@example(edge="z.0.²->logits")
def test_names_of_edges_are_edges_or_refused(edge: str) -> None:
    circuit = outcome(Circuit, frozenset([edge]), names=None)
    if circuit is not None:
        assert Circuit(circuit.edges) == circuit and len(circuit) == 1


# -- statistics --------------------------------------------------------------------------------------------------------

NUMBER = st.floats(-1e6, 1e6).map(lambda x: round(x, 3))


@given(
    pair=st.integers(1, 4).flatmap(
        lambda side: st.tuples(*(2 * [hnp.arrays(np.float64, (side, 5), elements=NUMBER | st.just(math.nan))]))
    ),
    seed=SEED,
)
@few(1)
def test_correlations_know_no_order_within_layers(pair: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    a, b = pair
    order = np.array([np.random.default_rng([seed, row]).permutation(5) for row in range(len(a))])
    other = [np.take_along_axis(x, order, 1) for x in pair]
    one, two, swapped = (stats.correlate_heads(*given, n_resamples=20) for given in (pair, other, (b, a)))
    for name in ("pearson", "spearman"):
        for same in (two, swapped):
            np.testing.assert_allclose(getattr(one, name).r, getattr(same, name).r, atol=1e-6)


@given(values=hnp.arrays(np.float64, st.integers(2, 30), elements=NUMBER), seed=SEED)
def test_paired_intervals_hold_their_mean(values: np.ndarray, seed: int) -> None:
    zero = np.zeros_like(values)
    found = stats.paired_bootstrap(values, zero, rng(seed), n_resamples=400)
    slack = 1e-9 * (1 + np.abs(values).max())
    assert found.low - slack <= found.mean <= found.high + slack
    there = stats.paired_bootstrap(zero, values, rng(seed), n_resamples=400)
    np.testing.assert_allclose([there.mean, there.low, there.high], [-found.mean, -found.high, -found.low], atol=1e-6)
    ratio = stats.ratio_of_means(values[None], np.ones(len(values)), rng(seed), resamples=400)
    assert ratio.low[0] - slack <= ratio.mean[0] <= ratio.high[0] + slack
    np.testing.assert_allclose(ratio.mean[0], values.mean(), atol=slack)


@given(active=hnp.arrays(np.bool_, st.integers(1, 40)), seed=SEED)
def test_frequencies_lie_in_their_intervals(active: np.ndarray, seed: int) -> None:
    found = stats.frequency_interval(active.astype(float), 0)
    assert 0 <= found.low <= found.mean <= found.high <= 1
    other = stats.frequency_interval(rng(seed).permutation(active).astype(float), 0)
    np.testing.assert_allclose(found, other)
    opposite = stats.frequency_interval(1.0 - active, 0)
    np.testing.assert_allclose([opposite.low, opposite.high], [1 - found.high, 1 - found.low], atol=1e-12)


@given(
    values=hnp.arrays(np.float64, st.integers(2, 12), elements=st.integers(0, 3).map(float)), data=st.data(), seed=SEED
)
def test_strata_know_no_order(values: np.ndarray, data: st.DataObject, seed: int) -> None:
    strata = data.draw(st.lists(st.sampled_from("abc"), min_size=len(values), max_size=len(values)))
    found = stats.strata_test(values, strata, rng(seed), 200)
    assert 0 < found.p <= 1 and found.each.keys() == set(strata) and all(0 < p <= 1 for p in found.each.values())
    if len(set(strata)) == 1 or len(set(values)) == 1:
        assert found.p == 1 and set(found.each.values()) == {1.0}
    named = stats.strata_test(values, [stratum.upper() for stratum in strata], rng(seed), 200)
    assert named.p == found.p and list(named.each.values()) == list(found.each.values())


@given(p=hnp.arrays(np.float64, st.integers(0, 10), elements=st.floats(0, 1)), seed=SEED)
def test_q_values_know_no_order(p: np.ndarray, seed: int) -> None:
    order = rng(seed).permutation(len(p))
    np.testing.assert_allclose(stats.q_values(p)[order], stats.q_values(p[order]))


@given(y=hnp.arrays(np.float64, st.tuples(st.integers(1, 8), st.integers(1, 2)), elements=NUMBER))
@example(y=np.array([[1e6], [1e6 + 1.5], [1e6 + 2.5]]))
def test_r_squared_of_the_mean_is_nothing(y: np.ndarray) -> None:
    mean, perfect = stats.r_squared(y, np.broadcast_to(y.mean(0), y.shape)), stats.r_squared(y, y)
    if math.isnan(perfect):
        assert math.isnan(mean) and np.ptp(y, 0).max() <= 1e-5 * (1 + np.abs(y).max())
    else:
        assert perfect == 1 and abs(mean) < 1e-6


# -- tags of tokens ----------------------------------------------------------------------------------------------------

WORDY = st.lists(
    st.sampled_from(
        ["Anna", "anna's", "six", "Two", " ", " ", "  ", "\n", "6", "1,000.5", "+", "-", "²", "ß", "İ", "eggs"]
    )
    | st.text(max_size=3),
    max_size=12,
).map("".join)


@given(text=WORDY)
@example(text="6 ſ")
@example(text="٣ eggs")
def test_every_character_has_a_tag(text: str) -> None:
    tags = tags_of(text)
    assert len(tags) == len(text) and {*tags} <= {*TAGS}
    assert all(tag == "number" for character, tag in zip(text, tags, strict=True) if character in "0123456789")
    assert all(tag == "other" for character, tag in zip(text, tags, strict=True) if character.isspace())


@given(ids=st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=12))
@few(1)
def test_every_token_has_a_tag(ids: list[int]) -> None:
    tokenizer = TOKENIZER
    text, spans = spans_of(ids, tokenizer)
    assert text == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    tags, texts = tag_tokens(ids, tokenizer)
    assert len(tags) == len(texts) == len(spans) == len(ids) and {*tags} <= {*TAGS}
    assert all(0 <= start <= end <= len(text) for start, end in spans)


# -- parallel text -----------------------------------------------------------------------------------------------------

NAMES = ["Anna", "Mark", "Paul"]
SIDE = st.lists(st.sampled_from([*NAMES, "met", "gave", "the", "book", "EN", "FR", "7", "%", ":"]), max_size=6).map(
    " ".join
)
PAIRS = st.lists(st.builds(SentencePair, SIDE, SIDE), max_size=6)


@given(pairs=PAIRS)
@few(1)
def test_pairs_are_kept_dropped_and_swapped(pairs: list[SentencePair]) -> None:
    tokenizer = TOKENIZER
    kept, dropped = filter_pairs(pairs, tokenizer)
    assert len(kept) + dropped.total() == len(pairs) and [pair for pair in pairs if pair in kept] == kept
    assert filter_pairs(kept, tokenizer) == (kept, Counter())
    swapped = outcome(swap_neighbours, pairs, tokenizer)
    assert (swapped is None) == (len(pairs) < 2)
    if swapped is not None:
        assert len(swapped) <= len(pairs)
        assert all(new.target in [pair.target for pair in pairs] for new in swapped)
        assert not {*swapped} & {pair for pair in pairs if [p.source for p in pairs].count(pair.source) == 1}


@given(pairs=PAIRS.filter(bool), word=st.integers(-1, 3))
@few(1)
def test_prompts_of_pairs_say_what_they_should(pairs: list[SentencePair], word: int) -> None:
    tokenizer = TOKENIZER
    prompts = outcome(tokenize_pairs, tokenizer, pairs, ("en", "fr"))
    if prompts is not None:
        for pair, ids, places in zip(pairs, prompts.input_ids, prompts.positions, strict=True):
            behind = tokenizer.decode(ids[places["label"] + 1 :] if places["label"] < -1 else [])
            assert behind.replace(" ", "").endswith(pair.target.replace(" ", ""))
            assert tokenizer.decode(ids[places["label"]]).strip() in "FR:"
    asked = outcome(word_prompts, tokenizer, pairs, ("en", "fr"), word)
    if asked is not None:
        assert word >= 0 and len(asked.words) % 2 == 0 and len(asked.plus) == len(asked.words)
        for number, (right, wrong) in enumerate(asked.plus.answer_ids):
            assert right != wrong and asked.plus.answer_ids[number ^ 1] == (wrong, right)
        for minus in asked.minus.values():
            assert minus.answer_ids == asked.plus.answer_ids


# -- scores of heads in a file -----------------------------------------------------------------------------------------


@given(
    scores=hnp.arrays(
        np.float64, hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=6), elements=st.floats(width=64)
    )
)
@example(scores=np.array([[0.0, -0.0, 5e-324, 1.7976931348623157e308, 0.1]]))
def test_scores_survive_their_file(scores: np.ndarray, tmp_path: Any) -> None:
    path = tmp_path / "heads.csv"
    path.unlink(missing_ok=True)
    outcome(write_head_scores, path, scores)
    fits = scores.ndim == 2 and scores.size > 0 and np.isfinite(scores).all()
    assert path.exists() == fits
    if fits and scores.shape[0] <= 3 and scores.shape[1] <= 5:  # of a GPT-2 of tests
        found = read_head_scores(path, tiny_config("gpt2"))
        assert len(found) == scores.size and [row[0] for row in found] == sorted(scores.ravel(), reverse=True)
        assert all(scores[layer, head] == score for score, layer, head in found)
