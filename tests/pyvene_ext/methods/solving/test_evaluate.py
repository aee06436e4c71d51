"""Generation under intervention against step-by-step recomputation without cache, by plain hooks, one problem at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyvene import RepresentationConfig, ZeroIntervention
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from modelcards import n_layers, window
from pyvene_ext.engine.compile import Compiled, compile_spec
from pyvene_ext.engine.resolve import resolve
from pyvene_ext.intervenable.model import IntervenableModel
from pyvene_ext.intervenable.statistics import Reference
from pyvene_ext.methods.solving import decoding
from pyvene_ext.methods.solving import evaluate as module
from pyvene_ext.methods.solving.evaluate import evaluate
from pyvene_ext.methods.solving.evaluation import Evaluation
from pyvene_ext.methods.solving.replacing import Scope, Transcripts, condition_of
from pyvene_ext.methods.solving.results import Results, facts_of
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.problems import (
    Problem,
    Questions,
    tokenize_problems,
    with_reasoning,
)
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.specs.ablation import Ablation, donors
from pyvene_ext.specs.joint import Spec, members
from tests.ground_truth import ablations as slow
from tests.random_prompts import random_prompts
from tests.tiers import first_only
from tests.tiny_random import FAMILIES, VOCAB, random_model

LENGTHS = (9, 6, 7, 5)
NEW = 10
MARK, LINE, END = 41, 43, 47  # the ids of what they say
SILENT = (0, LINE)  # tokens that say no number


def tokenizer(mark: int = MARK, end: int | None = END) -> Any:
    """Every token is its number; but one is `####`, one ends texts and one ends lines."""
    words = {f"{at}": at for at in range(VOCAB) if at not in (mark, end, LINE)} | {"####": mark, "\n": LINE}
    more = {}
    if end is not None:
        words["<end>"] = end
        more["eos_token"] = "<end>"
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="0")), pad_token="0", **more)


def asked(gold: Sequence[float] = (0,) * len(LENGTHS), lengths: tuple[int, ...] = LENGTHS) -> Questions:
    prompts = random_prompts(lengths)
    problems = tuple(Problem(question="?", solution="", answer=answer, steps=1) for answer in gold)
    nothing = (range(0),) * len(lengths)
    return Questions(problems, prompts, lengths, nothing, tuple(range(len(lengths))))


def model_of(family: str) -> Any:
    model = random_model(family)
    model.generation_config.eos_token_id = None
    if family == "gemma3":  # its large, tied embeddings make it write its last token for ever, whatever is done to it
        own = model.get_output_embeddings()
        own.weight = torch.nn.Parameter(torch.randn(own.weight.shape, generator=torch.Generator().manual_seed(0)))
    return model


def written_by_hand(
    model: Any,
    prompt: Sequence[int],
    edits: Sequence[tuple[int, tuple[int, ...], Any]],
    scope: Scope | None,
    positions: Sequence[int] = (),
    *,
    mark: int = MARK,
    end: int | None = END,
    new: int = NEW,
) -> tuple[list[int], list[float], bool]:
    """Greedy decoding, everything recomputed at each step: tokens, their probabilities, and whether the text ended.

    `edits` are (layer, heads, what z becomes [pos head d]); `positions` those of the prompt.
    """
    ids, probabilities = list(prompt), []
    while len(ids) < len(prompt) + new:
        fresh = list(range(len(prompt), len(ids)))
        reasoning = [at for at in fresh if mark not in ids[len(prompt) : at + 1]]
        where = {"prompt": [*positions], "new": fresh, "reasoning": reasoning, "both": [*positions, *fresh], None: []}
        changes = [("z", layer, slow.replaced(where[scope], heads, z)) for layer, heads, z in edits]
        chances = slow.logits(model, ids, changes)[-1].float().softmax(-1)
        token = int(chances.argmax())
        if token == end:
            return ids[len(prompt) :], probabilities, True
        ids.append(token)
        probabilities.append(float(chances[token]))
        text = ids[len(prompt) :]
        if token == LINE and mark in text and set(text[text.index(mark) + 1 :]) - {*SILENT, mark}:
            return text, probabilities, True
    return ids[len(prompt) :], probabilities, False


SPECS: dict[str, Spec] = {
    "one layer": Ablation(kind="zero", site="z", layer=1, heads=(0, 2)),
    "joint": (
        Ablation(kind="zero", site="z", layer=0, heads=(1,)),
        Ablation(kind="zero", site="z", layer=2, heads=(0, 3)),
    ),
}


def zeros(spec: Spec) -> list[tuple[int, tuple[int, ...], Any]]:
    return [(edit.layer or 0, edit.heads or (), lambda z: 0 * z) for edit in members(spec)]


def marks_and_ends(model: Any, edits: Any, scope: Scope) -> tuple[int, int]:
    """Tokens that this model writes in some texts and not first: so that reasoning and texts really end, at other places."""
    texts = [written_by_hand(model, ids, edits, scope, mark=-1, end=None)[0] for ids in asked().prompts.input_ids]
    mark = next(t for text in texts for t in text[2:5] if t not in SILENT)
    end = next((t for text in texts for t in text[6:] if t not in (mark, *text[:4], *SILENT)), END)
    return mark, end


# -- generation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", [*first_only(["reasoning", "prompt", "new"]), "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_step_by_step_recomputation(family: str, scope: Scope) -> None:
    model, spec = model_of(family), SPECS["joint"]
    mark, end = marks_and_ends(model, zeros(spec), scope)
    questions = asked()
    found = evaluate(model, tokenizer(mark, end), questions, spec, scope, max_new_tokens=NEW, batch_size=3)
    clean, gated = 0, 0
    for which, ids in enumerate(questions.prompts.input_ids):
        options: dict[str, Any] = {"mark": mark, "end": end}
        tokens, chances, ended = written_by_hand(model, ids, zeros(spec), scope, range(len(ids)), **options)
        assert found.ids[which] == tuple(tokens) and found.ended[which] == ended
        if found.answers[which] is not None and mark not in tokens:
            last = max(at for at, token in enumerate(tokens) if token not in SILENT)
            assert found.confidence[which] == pytest.approx(chances[last], rel=1e-4)
        clean += tokens == written_by_hand(model, ids, [], None, **options)[0]
        gated += tokens == written_by_hand(model, ids, zeros(spec), "new", **options)[0]
    assert clean < len(LENGTHS), "the edit changes something"
    if scope == "both":
        assert gated < len(LENGTHS)


def test_the_four_scopes_differ_and_reasoning_ends_at_the_mark() -> None:
    model, spec, questions = model_of("llama3_1"), SPECS["one layer"], asked()
    mark, _ = marks_and_ends(model, zeros(spec), "new")
    texts = {
        scope: evaluate(model, tokenizer(mark, None), questions, spec, scope, max_new_tokens=NEW).ids
        for scope in ("prompt", "new", "reasoning", "both")
    }
    assert len(set(texts.values())) == 4
    for new, reasoning in zip(texts["new"], texts["reasoning"], strict=True):
        until = new.index(mark) + 1 if mark in new else NEW
        assert new[:until] == reasoning[:until]
    assert any(mark in text[:-2] for text in texts["reasoning"])


def test_named_positions_of_the_prompt_and_every_new_token() -> None:
    model, questions = model_of("qwen2_5"), asked()
    spec = Ablation(kind="zero", site="z", layer=1, heads=(0, 2), positions=("s1", -2))
    for scope in ("prompt", "both"):
        found = evaluate(model, tokenizer(end=None), questions, spec, scope, max_new_tokens=6, batch_size=5)
        for which, ids in enumerate(questions.prompts.input_ids):
            places = [len(ids) + questions.prompts.positions[which]["s1"], len(ids) - 2]
            edits = zeros(spec)
            by_hand = written_by_hand(model, ids, edits, scope, places, end=None, new=6)[0]
            assert found.ids[which] == tuple(by_hand)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_in_place_is_plain_greedy_decoding(family: str) -> None:
    model, questions = model_of(family), asked()
    found = evaluate(model, tokenizer(end=None), questions, max_new_tokens=5, batch_size=2)
    for ids, text in zip(questions.prompts.input_ids, found.ids, strict=True):
        assert text == tuple(written_by_hand(model, ids, [], None, end=None, new=5)[0])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def transcripts(model: Any, spec: Spec, few: int = len(LENGTHS)) -> tuple[Questions, Transcripts, list[list[int]]]:
    questions = asked()
    clean = evaluate(model, tokenizer(), questions, max_new_tokens=6)
    some = questions.take(range(few))
    given = Transcripts.compute(model, some, clean.take(range(few)), [spec])
    assert given is not None
    texts = [[*ids, *new] for ids, new in zip(questions.prompts.input_ids, clean.ids, strict=True)]
    return questions, given, texts[:few]


@pytest.mark.parametrize("scope", ["reasoning", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_means_are_over_all_tokens_of_the_untouched_texts(family: str, scope: Scope) -> None:
    model = model_of(family)
    spec = tuple(edit.model_copy(update={"kind": "mean"}) for edit in members(SPECS["joint"]))
    questions, given, texts = transcripts(model, spec)
    edits = []
    for edit in spec:
        mean, _ = slow.statistics([slow.activation(model, text, "z", edit.layer) for text in texts])
        edits.append((edit.layer, edit.heads, lambda z, mean=mean: mean.expand_as(z)))
    found = evaluate(model, tokenizer(), questions, spec, scope, max_new_tokens=NEW, batch_size=3, reference=given)
    for which, ids in enumerate(questions.prompts.input_ids):
        assert found.ids[which] == tuple(written_by_hand(model, ids, edits, scope, range(len(ids)))[0])


@pytest.mark.parametrize(("scope", "few"), [("new", len(LENGTHS)), ("both", 3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_resampling_takes_anothers_token_at_the_same_distance_from_the_questions_end(
    family: str, scope: Scope, few: int
) -> None:
    model = model_of(family)
    spec = tuple(edit.model_copy(update={"kind": "resample", "seed": 3}) for edit in members(SPECS["joint"]))
    questions, given, texts = transcripts(model, spec, few)
    found = evaluate(model, tokenizer(), questions, spec, scope, max_new_tokens=NEW, batch_size=3, reference=given)
    givers = donors(questions.prompts, given.questions.prompts, "last", 3)
    assert all(giver != which for which, giver in enumerate(givers)) and max(givers) < few
    for which, ids in enumerate(questions.prompts.input_ids):
        text, shift = texts[givers[which]], LENGTHS[givers[which]] - len(ids)
        edits = []
        for edit in spec:
            its = slow.activation(model, text, "z", edit.layer)

            def new(z: torch.Tensor, its: torch.Tensor = its, shift: int = shift) -> torch.Tensor:
                return torch.stack([its[min(max(at + shift, 0), len(its) - 1)] for at in range(len(z))])

            edits.append((edit.layer, edit.heads, new))
        assert found.ids[which] == tuple(written_by_hand(model, ids, edits, scope, range(len(ids)))[0])


def test_resampling_at_named_positions_of_the_prompt() -> None:
    model = model_of("gemma2")
    spec = Ablation(kind="resample", site="resid_post", layer=1, positions=("s1", "last"))
    questions, given, texts = transcripts(model, spec)
    found = evaluate(model, tokenizer(end=None), questions, spec, "both", max_new_tokens=4, reference=given)
    givers = donors(questions.prompts, questions.prompts, "last", 0)
    for which, prompt in enumerate(questions.prompts.input_ids):
        ids = list(prompt)
        its, shift = slow.activation(model, texts[givers[which]], "resid_post", 1), LENGTHS[givers[which]] - len(ids)
        places = [len(prompt) + questions.prompts.positions[which]["s1"], len(prompt) - 1]
        for _ in range(4):

            def new(x: torch.Tensor, its: torch.Tensor = its, shift: int = shift) -> torch.Tensor:
                return torch.stack([its[min(max(at + shift, 0), len(its) - 1)] for at in range(len(x))])

            where = [*places, *range(len(prompt), len(ids))]
            logits = slow.logits(model, ids, [("resid_post", 1, slow.replaced(where, None, new))])
            ids.append(int(logits[-1].argmax()))
        assert found.ids[which] == tuple(ids[len(prompt) :])


def test_the_prompts_scope_is_what_compile_makes_of_a_spec() -> None:
    """Kinds that new tokens do not have: noise at a position, with a reference of its own."""
    model, questions = model_of("mistral"), asked()
    spec = Ablation(kind="noise", site="resid_pre", layer=1, positions="last")
    reference = Reference.compute(model, questions.prompts, [("resid_pre", 1)])
    found = evaluate(model, tokenizer(end=None), questions, spec, "prompt", max_new_tokens=1, reference=reference)
    for batch in questions.prompts.batches(8):
        compiled = compile_spec(spec, batch, resolve([spec], model, questions.prompts, reference=reference))
        iv = IntervenableModel(compiled.config, model)
        sources = compiled.source_representations(iv.sorted_keys)
        with torch.no_grad():
            _, out = iv(batch.inputs(), None, compiled.unit_locations, source_representations=sources)
        assert [found.ids[i][0] for i in batch.index] == out.logits[:, -1].argmax(-1).tolist()


def test_what_is_compiled_elsewhere_runs_too() -> None:
    """Any pyvene config: here heads of its own for each problem."""
    model, questions = model_of("llama3_1"), asked()
    representation = RepresentationConfig(1, "head_attention_value_output", "h", intervention_type=ZeroIntervention)

    def compiled(batch: Any) -> Compiled:
        from pyvene import IntervenableConfig

        return Compiled(IntervenableConfig([representation]), {"base": [[[i % 4] for i in batch.index]]}, (None,))

    found = evaluate(model, tokenizer(end=None), questions, compiled, "both", max_new_tokens=6)
    for which, ids in enumerate(questions.prompts.input_ids):
        edits = [(1, (which % 4,), lambda z: 0 * z)]
        assert found.ids[which] == tuple(
            written_by_hand(model, ids, edits, "both", range(len(ids)), end=None, new=6)[0]
        )


def test_texts_that_end_at_once_and_batches_of_any_size() -> None:
    model, questions = model_of("gpt2"), asked()
    firsts = {int(slow.logits(model, ids)[-1].argmax()) for ids in questions.prompts.input_ids}
    model.generation_config.eos_token_id = [*firsts, END]
    found = evaluate(model, tokenizer(end=None), questions, SPECS["one layer"], "new", max_new_tokens=4)
    assert found.ids == ((),) * len(LENGTHS) and found.ended.all() and not found.parsed.any()
    assert np.isnan(found.confidence).all() and found.summary()["unparsed"] == len(LENGTHS)
    model.generation_config.eos_token_id = None
    one, all_at_once = (
        evaluate(model, tokenizer(), questions, SPECS["joint"], "both", max_new_tokens=NEW, batch_size=size)
        for size in (1, 8)
    )
    assert one.ids == all_at_once.ids
    np.testing.assert_allclose(one.confidence, all_at_once.confidence, rtol=1e-5)


@pytest.mark.parametrize("scope", ["prompt", "new", "reasoning", None])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_all_prompts_begin_with_is_read_once(
    family: str, scope: Scope | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "SHORTEST", 3)
    model, questions = model_of(family), asked()
    rows = tuple((7, 11, 5, *ids[3:]) for ids in questions.prompts.input_ids)
    questions = replace(questions, prompts=replace(questions.prompts, input_ids=rows))
    spec = None if scope is None else Ablation(kind="zero", site="z", layer=1, heads=(0, 2), positions="last")
    seen: list[Any] = []
    beginning = decoding.read_beginning
    monkeypatch.setattr(module, "read_beginning", lambda *args: seen.append(beginning(*args)) or seen[-1])
    options: dict[str, Any] = {"max_new_tokens": 6, "batch_size": 4}
    often, once = (
        evaluate(model, tokenizer(end=None), questions, spec, scope or "both", read_once=read, **options)
        for read in (False, True)
    )
    assert often.ids == once.ids and len(set(often.ids)) > 1
    np.testing.assert_allclose(once.confidence, often.confidence, rtol=1e-5)
    windows = any(window(model.config, layer) for layer in range(n_layers(model.config)))
    assert len(seen) == 1 and (seen[0] is None) == windows
    if seen[0] is not None:
        assert seen[0].length == 3


def test_what_is_edited_is_not_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "SHORTEST", 2)
    model = model_of("llama3_1")
    rows = ((7, 11, 5, 3, 9), (7, 11, 5, 3, 8, 2))
    batch = next(TokenizedPrompts(rows, pad_id=0).batches(2))
    for place, length in ((3, 3), (2, 2), (0, None)):
        spec = Ablation(kind="zero", site="resid_post", layer=1, positions=place)
        resolved = resolve([spec], model, TokenizedPrompts(rows, pad_id=0), reference=None, directions={})
        found = decoding.read_beginning(model, batch, "prompt", spec, resolved, 4)
        assert (None if found is None else found.length) == length
        assert decoding.read_beginning(model, batch, "both", spec, resolved, 4) is None
    assert decoding.read_beginning(model, batch, "both", None, None, 4).length == 4  # type: ignore[union-attr]
    assert decoding.read_beginning(model, next(batch_of_one(rows)), "both", None, None, 4) is None


def batch_of_one(rows: Any) -> Any:
    return TokenizedPrompts(rows, pad_id=0).batches(1)


def test_a_text_ends_where_another_question_begins() -> None:
    words = ["####", "12", "\nQuestion", ":", "so", "13", "\n", "<end>"]
    joined = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(
            WordLevel({word: at for at, word in enumerate(words)} | {f"<{i}>": i for i in range(8, VOCAB)}, "so")
        ),
        pad_token="so",
        eos_token="<end>",
    )
    joined.decode = lambda ids, **_: "".join(joined.convert_ids_to_tokens(ids))  # type: ignore[method-assign]
    model: Any = Writes([[4, 1, 2, 3, 5, 0, 5], [4, 5, 2, 5, 3, 4, 1], [2, 3, 1, 1, 1, 1, 1]])
    found = evaluate(model, joined, asked((12,) * 3, (5,) * 3), max_new_tokens=7)
    assert found.texts == ("so12", "so13\nQuestion13:so12", "") and found.ended.tolist() == [True, False, True]
    assert found.answers == (12, None, None) and found.ids[0] == (4, 1, 2, 3)


def test_answers_follow_the_rule_that_is_named() -> None:
    texts = ([7, 12], [MARK, 12, 5])
    for rule, answers in (("flexible-extract", (12, 12)), ("strict-match", (None, 12)), ("last-of-line", (12, 5))):
        model: Any = Writes(texts)
        found = evaluate(model, tokenizer(), asked((12,) * 2, (5,) * 2), max_new_tokens=6, rule=rule)  # type: ignore[arg-type]
        assert found.answers == answers and found.rule == found.summary()["rule"] == rule
        assert Evaluation.from_dict(json.loads(json.dumps(found.as_dict()))).rule == rule


# -- what becomes of the texts -------------------------------------------------------------------------------------------


class Writes(LlamaForCausalLM):
    """A model that writes given texts, with the probability 0.9 for even tokens and 0.6 for odd ones."""

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        super().__init__(random_model("llama3_1").config)
        self.texts, self.steps = texts, 0
        self.generation_config.eos_token_id = END

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, **_: Any) -> Any:
        logits = torch.full((len(self.texts), 1, VOCAB), -100.0)
        for row, text in enumerate(self.texts):
            token = text[self.steps] if self.steps < len(text) else END
            chance = 0.9 if token % 2 == 0 else 0.6
            logits[row, 0] = math.log((1 - chance) / (VOCAB - 1))
            logits[row, 0, token] = math.log(chance)
        self.steps += 1
        return type("Out", (), {"logits": logits, "past_key_values": ()})()


def solved(*texts: Sequence[int], gold: float = 12, given: tuple[int, ...] = (), new: int = 6) -> Evaluation:
    questions = asked((gold,) * len(texts), (5,) * len(texts))
    if given:
        prompts = questions.prompts
        rows = tuple((*ids, *given) for ids in prompts.input_ids)
        questions = Questions(
            questions.problems,
            type(prompts)(rows, prompts.answers, prompts.positions, 0),
            questions.lengths,
            questions.blocks,
            questions.index,
        )
    model: Any = Writes(texts)
    return evaluate(model, tokenizer(), questions, max_new_tokens=new)


def test_answers_are_right_wrong_or_unparsed_and_texts_that_do_not_end_are_cut() -> None:
    found = solved([MARK, 12], [MARK, 13], [MARK], [7, 12], [12, 9, 8, 7, 6, 5, 4])
    assert found.texts == ("#### 12", "#### 13", "####", "7 12", "12 9 8 7 6 5")
    assert found.answers == (12, 13, None, 12, None)  # the last one may lack more than an answer
    assert found.correct.tolist() == [True, False, False, True, False]
    assert found.parsed.tolist() == [True, True, False, True, False]
    assert found.ended.tolist() == [True, True, True, True, False]
    counts = {"problems": 5, "accuracy": 0.4, "correct": 2, "wrong": 1, "unparsed": 2, "cut": 1}
    assert found.summary() == counts | {"rule": "flexible-extract"} and found.accuracy == 0.4


def test_confidence_is_that_of_the_answers_tokens_alone() -> None:
    found = solved([7, MARK, 12], [7, MARK, 13], [MARK], [MARK, 12, 7, LINE, 5])
    np.testing.assert_allclose(found.confidence, [0.9, 0.6, np.nan, 0.9], rtol=1e-5)


def test_a_number_of_several_tokens_has_the_geometric_mean_of_their_probabilities() -> None:
    pieces = {"1": 4, "2": 5, "x": 6, "####": MARK, "0": 0, "<end>": END}
    pieces |= {f"<{at}>": at for at in range(VOCAB) if at not in pieces.values()}
    joined = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(pieces, unk_token="0")), pad_token="0", eos_token="<end>"
    )
    joined.decode = lambda ids, **_: "".join(joined.convert_ids_to_tokens(ids))  # type: ignore[method-assign]
    model: Any = Writes([[6, MARK, 4, 5, 4, 6]])
    found = evaluate(model, joined, asked((121,), (5,)), max_new_tokens=6)
    assert found.texts == ("x####121x",) and found.answers == (121,) and found.correct.all()
    assert found.confidence[0] == pytest.approx((0.9 * 0.6 * 0.9) ** (1 / 3), rel=1e-5)


def test_a_text_ends_with_its_answers_line() -> None:
    found = solved([MARK, LINE, 12, LINE, 5, 6], [LINE, 12, LINE, MARK, 12, 5])
    assert found.ids == ((MARK, LINE, 12, LINE), (LINE, 12, LINE, MARK, 12, 5))
    assert found.answers == (12, 12) and found.ended.tolist() == [True, False]


def test_what_the_prompt_holds_of_a_solution_is_part_of_its_text() -> None:
    found = solved([12], [13, LINE, 12], [END], given=(7, MARK))
    assert found.texts == ("7 #### 12", "7 #### 13 \n", "7 ####") and found.answers == (12, 13, None)
    assert found.ids == ((12,), (13, LINE), ())
    again = solved([END], given=(7, MARK, 12))
    assert again.answers == (12,) and np.isnan(again.confidence[0])  # no token of the answer was generated


# -- kept between runs -----------------------------------------------------------------------------------------------------


def test_evaluations_are_kept_and_damaged_or_other_ones_measured_again(tmp_path: Path) -> None:
    found = solved([MARK, 12], [MARK], [12, 9, 8, 7, 6, 5, 4])
    calls = []

    def measure() -> Evaluation:
        calls.append(1)
        return found

    def same(a: Evaluation, b: Evaluation) -> bool:
        np.testing.assert_array_equal(a.confidence, b.confidence)
        return a.as_dict() == b.as_dict() and a.ids == b.ids and a.correct.tolist() == b.correct.tolist()

    store = Results(tmp_path / "kept", {"model weights": "a"})
    assert same(store.get({"spec": [1]}, measure), found) and len(calls) == 1
    assert same(Results(tmp_path / "kept", {"model weights": "a"}).get({"spec": [1]}, measure), found)
    assert len(calls) == 1
    store.get({"spec": [2]}, measure)
    Results(tmp_path / "kept", {"model weights": "b"}).get({"spec": [1]}, measure)
    assert len(calls) == 3 and len(list((tmp_path / "kept").glob("*.json"))) == 3
    for damage in (lambda text: text[:-30], lambda text: text.replace("12", "13"), lambda text: "[]"):
        for path in (tmp_path / "kept").glob("*.json"):
            path.write_text(damage(path.read_text()))
        before = len(calls)
        assert same(store.get({"spec": [1]}, measure), found) and len(calls) == before + 1

    def fails() -> Evaluation:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        store.get({"spec": [9]}, fails)
    assert len(list((tmp_path / "kept").iterdir())) == 3


def test_facts_name_all_that_a_result_depends_on() -> None:
    model, questions = model_of("llama3_1"), asked()
    facts = facts_of(model, questions, 8)
    json.dumps(facts)
    others = [facts_of(model, asked((1,) * len(LENGTHS)), 8), facts_of(model, questions, 9)]
    others += [facts_of(model, questions.take([0, 1]), 8), facts_of(model_of("gpt2"), questions, 8)]
    with torch.no_grad():
        next(model.parameters()).add_(1)
    others.append(facts_of(model, questions, 8))
    assert all(other != facts for other in others)
    spec = Ablation(kind="mean", site="z", layer=1, heads=(0,))
    model = model_of("llama3_1")
    given, few = transcripts(model, spec)[1], transcripts(model, spec, 3)[1]
    zero = Ablation(kind="zero", site="z", layer=1, heads=(1,))
    conditions = [condition_of(spec, "new", given), condition_of(spec, "both", given), condition_of(spec, "new", few)]
    conditions += [
        condition_of(None, "new"),
        condition_of(zero, "new", given),
        condition_of((spec, zero), "new", given),
    ]
    assert len({json.dumps(condition) for condition in conditions}) == 6
    assert condition_of(zero, "new", given) == condition_of(zero, "new") == condition_of(zero, "new", few)
    assert condition_of(None, "new") == condition_of(None, "both")


# -- bad input -------------------------------------------------------------------------------------------------------------

Z = {"site": "z", "layer": 1, "heads": (0,)}
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("scope", {"scope": "answer"}, "unknown scope 'answer'; choose among prompt, new, reasoning, both"),
    ("empty", {"questions": asked().take([])}, "no problems to solve"),
    ("no tokens", {"max_new_tokens": 0}, "max_new_tokens must be 1 or more"),
    ("one token", {"max_new_tokens": 1, "scope": "new"}, "the only new token depends on edits of the prompt alone"),
    ("context", {"max_new_tokens": 56}, "problem 0 has 9 tokens, which with 56 new ones are more than the 64"),
    ("layer", {"spec": Ablation(kind="zero", site="z", layer=9, heads=(0,))}, "layer 9 is out of range"),
    ("head", {"spec": Ablation(kind="zero", site="z", layer=1, heads=(6,))}, "head 6 is out of range"),
    (
        "noise",
        {"spec": Ablation(kind="noise", **Z), "scope": "new"},
        "this intervention is not defined at generated tokens",
    ),
    (
        "per position",
        {"spec": Ablation(kind="mean", mean="per_position", **Z)},
        "this intervention is not defined at generated tokens",
    ),
    ("no reference", {"spec": Ablation(kind="mean", **Z)}, "needs the texts of an untouched run; give Transcripts"),
    ("position", {"spec": Ablation(kind="zero", positions="s9", **Z), "scope": "prompt"}, "has no position 's9'"),
    ("no spec", {"spec": "z.1.0"}, "is not an ablation"),
]


@pytest.mark.parametrize(("changes", "told"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_input_is_one_sentence_before_the_model_runs(
    changes: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("llama3_1")
    monkeypatch.setattr(type(model), "forward", None)
    given: dict[str, Any] = {
        "questions": asked(),
        "spec": SPECS["joint"],
        "scope": "both",
        "max_new_tokens": 4,
        **changes,
    }
    with pytest.raises(ValueError, match=told) as error:
        evaluate(model, tokenizer(), **given)
    assert "\n" not in str(error.value)


def test_references_that_do_not_fit() -> None:
    model, questions = model_of("llama3_1"), asked()
    mean = Ablation(kind="mean", site="z", layer=1, heads=(0,))
    _, given, _ = transcripts(model, mean)
    other = Ablation(kind="mean", site="z", layer=2, heads=(0,))
    resample = Ablation(kind="resample", site="z", layer=1, heads=(0,))
    for spec, told in ((other, "without z.2 in places"), (resample, "without all in bank")):
        with pytest.raises(ValueError, match=told):
            evaluate(model, tokenizer(), questions, spec, "new", max_new_tokens=4, reference=given)
    with pytest.raises(ValueError, match="give Transcripts"):
        evaluate(model, tokenizer(), questions, mean, "new", max_new_tokens=4, reference=given.reference)
    with pytest.raises(ValueError, match="differs in model weights"):
        evaluate(random_model("llama3_1", seed=1), tokenizer(), questions, mean, max_new_tokens=4, reference=given)
    assert Transcripts.compute(model, questions, None, [SPECS["joint"]]) is None  # type: ignore[arg-type]


def test_after_an_exception_the_model_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, questions = model_of("llama3_1").train(), asked()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pyvene_ext.methods.solving.decoding.BatchDecoding.take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tokenizer(), questions, SPECS["joint"], max_new_tokens=4)
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_sources_for_too_few_new_tokens_are_refused() -> None:
    model, questions = model_of("llama3_1"), asked()
    spec = Ablation(kind="mean", site="z", layer=1, heads=(0,))
    _, given, _ = transcripts(model, spec)

    def short(batch: Any) -> Compiled:
        compiled = compile_spec(spec, batch, resolve([spec], model, questions.prompts, reference=given.reference))
        (values,) = compiled.replacements
        assert values is not None
        more = torch.cat([values, values[..., :2, :]], -2)  # for two new tokens
        return Compiled(compiled.config, compiled.unit_locations, (more,))

    assert len(evaluate(model, tokenizer(end=None), questions, short, "both", max_new_tokens=2)) == len(LENGTHS)
    with pytest.raises(ValueError, match="a source for 2 new tokens, but there are more"):
        evaluate(model, tokenizer(end=None), questions, short, "both", max_new_tokens=6)


# -- a trained model ---------------------------------------------------------------------------------------------------------


def test_a_shipped_model_solves_its_problems_and_reads_the_answer_off_given_reasoning() -> None:
    model, words = load_model("tiny-qwen2.5")
    story = "Lisa has {} apples. David gives Lisa {} apples. How many apples does Lisa have?"
    pairs = [(7, 5), (11, 9), (4, 8), (13, 6)]
    problems = [Problem(question=story.format(a, b), solution=f"#### {a + b}", answer=a + b, steps=1) for a, b in pairs]
    questions = tokenize_problems(problems, words)
    found = evaluate(model, words, questions, max_new_tokens=24)
    assert found.texts[0] == "<<7+5=12>> #### 12" and found.accuracy == 1 and found.ended.all()
    assert (found.confidence > 0.9).all()
    reasoned = with_reasoning(questions, found.ids, words)
    assert [len(block) for block in reasoned.blocks] == [7] * 4
    answered = evaluate(model, words, reasoned, max_new_tokens=4)
    assert answered.texts == found.texts and [words.decode(ids) for ids in answered.ids] == ["12", "20", "12", "19"]
    np.testing.assert_allclose(answered.confidence, found.confidence, rtol=1e-4)
