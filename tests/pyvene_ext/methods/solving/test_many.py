"""Many specs at once: the texts of one spec at a time, and of plain hooks, whatever enters and leaves the batch."""

from __future__ import annotations

import copy
import io
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from tqdm import tqdm

from pyvene_ext.engine.compile import Compiled, compile_spec
from pyvene_ext.engine.decode import rows as rows_module
from pyvene_ext.engine.resolve import resolve
from pyvene_ext.intervenable.statistics import Reference
from pyvene_ext.methods.solving import decoding, many
from pyvene_ext.methods.solving.evaluate import evaluate
from pyvene_ext.methods.solving.evaluation import Evaluation
from pyvene_ext.methods.solving.many import ProblemRows
from pyvene_ext.methods.solving.replacing import Scope
from pyvene_ext.methods.solving.texts import Solution
from pyvene_ext.models.devices import processes
from pyvene_ext.models.hooks import attention_can_be_seen
from pyvene_ext.specs.ablation import Ablation
from pyvene_ext.specs.addition import Addition
from pyvene_ext.specs.base import ModelShape
from pyvene_ext.specs.joint import members
from tests.pretended_devices import PretendedDevices, spread
from tests.pyvene_ext.engine.sweep.test_processes import Launch
from tests.pyvene_ext.methods.solving.test_evaluate import (
    END,
    LENGTHS,
    NEW,
    SILENT,
    SPECS,
    asked,
    marks_and_ends,
    model_of,
    tokenizer,
    transcripts,
    written_by_hand,
    zeros,
)
from tests.tiers import first_only
from tests.tiny_random import FAMILIES, MORE_FAMILIES

JOINT = (Ablation(kind="zero", site="z", layer=0, heads=(1,)), Ablation(kind="zero", site="z", layer=1, heads=(0, 2)))
KINDS: list[Any] = [
    None,
    SPECS["one layer"],
    JOINT,
    Ablation(kind="mean", site="scores", layer=1, heads=(1,)),  # uniform attention
    Ablation(kind="zero", site="scores", layer=0, heads=(1, 2)),
    *(Ablation(kind="zero", site=site, layer=1, heads=(0,)) for site in ("k", "v")),
    *(Ablation(kind="zero", site=site, layer=0) for site in ("attn_out", "mlp_out", "resid_pre", "resid_mid")),
    Ablation(kind="zero", site="embed"),
]


def mark_and_end(model: Any) -> tuple[int, int]:
    """Tokens that the untouched model writes in some texts, so that reasoning and texts end at several places."""
    texts = evaluate(model, tokenizer(end=None), asked(), max_new_tokens=NEW).ids
    mark = next(t for text in texts for t in text[2:5] if t not in SILENT)
    return mark, next((t for text in texts for t in text[6:] if t not in (mark, *text[:4], *SILENT)), END)


def same(some: Evaluation, other: Evaluation) -> bool:
    np.testing.assert_allclose(some.confidence, other.confidence, rtol=1e-4)
    return some.ids == other.ids and some.ended.tolist() == other.ended.tolist()


@pytest.mark.parametrize("scope", [*first_only(["reasoning", "prompt", "new"]), "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_list_of_specs_writes_what_plain_hooks_write(family: str, scope: Scope) -> None:
    model, specs = model_of(family), [SPECS["joint"], None, SPECS["one layer"]]
    assert attention_can_be_seen(model), "so that they run together"
    mark, end = marks_and_ends(model, zeros(SPECS["joint"]), scope)
    found = evaluate(model, tokenizer(mark, end), asked(), specs, scope, max_new_tokens=NEW, batch_size=3)
    options: dict[str, Any] = {"mark": mark, "end": end}
    for spec, of_spec in zip(specs, found, strict=True):
        for which, ids in enumerate(asked().prompts.input_ids):
            edits = [] if spec is None else zeros(spec)
            tokens, _, ended = written_by_hand(
                model, ids, edits, None if spec is None else scope, range(len(ids)), **options
            )
            assert of_spec.ids[which] == tuple(tokens) and of_spec.ended[which] == ended
    assert len({of_spec.ids for of_spec in found}) == 3


@pytest.mark.parametrize(
    ("family", "scope"),
    [*((family, "both") for family in (*FAMILIES, *MORE_FAMILIES)), *((family, "reasoning") for family in FAMILIES)],
)
def test_every_site_and_family_writes_what_one_spec_at_a_time_writes(family: str, scope: Scope) -> None:
    model = model_of(family)
    shape = ModelShape.of(model)
    specs = [
        spec for spec in KINDS if spec is None or all(edit.component.name in shape.components for edit in members(spec))
    ]
    words = tokenizer(*mark_and_end(model))
    found = evaluate(model, words, asked(), specs, scope, max_new_tokens=4)
    for spec, of_spec in zip(specs, found, strict=True):
        assert same(of_spec, evaluate(model, words, asked(), spec, scope, max_new_tokens=4)), spec


@pytest.mark.parametrize("family", FAMILIES)
def test_means_other_texts_activations_and_vectors_reach_their_rows(family: str) -> None:
    model = model_of(family)
    width = model.config.hidden_size
    specs: list[Any] = [tuple(e.model_copy(update={"kind": kind}) for e in JOINT) for kind in ("mean", "resample")]
    steered = Addition(site="resid_post", layer=0, vector=torch.randn(width, generator=torch.manual_seed(1)), scale=3)
    questions, given, _ = transcripts(model, tuple(specs[1]))
    for scope in ("new", "both"):
        listed = [*specs, steered, None]
        found = evaluate(model, tokenizer(), questions, listed, scope, max_new_tokens=NEW, reference=given)
        for spec, of_spec in zip(listed, found, strict=True):
            alone = evaluate(model, tokenizer(), questions, spec, scope, max_new_tokens=NEW, reference=given)
            assert same(of_spec, alone)
        assert len({of_spec.ids for of_spec in found}) == 4


@pytest.mark.parametrize(
    ("family", "scope"),
    [
        ("gemma2", "both"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("gpt2", "both"), ("llama3_1", "new"))),
    ],
)
def test_rows_that_end_leave_and_others_enter_whatever_the_memory(
    family: str, scope: Scope, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, specs = model_of(family), [None, *SPECS.values()]
    words = tokenizer(*mark_and_end(model))
    lengths = (54, 3, 30, 54, 10, 44, 9, 6)
    questions = asked((0,) * len(lengths), lengths)
    whole = evaluate(model, words, questions, specs, scope, max_new_tokens=NEW)
    sizes: list[list[int]] = []
    step = rows_module._Writer.step
    monkeypatch.setattr(rows_module._Writer, "step", lambda self: (sizes[-1].append(len(self.rows)), step(self))[1])
    for memory in (1, 60_000, 200_000):
        sizes.append([])
        few = evaluate(model, words, questions, specs, scope, max_new_tokens=NEW, memory=memory)
        assert all(map(same, whole, few)), memory
    changes = [np.sign(np.diff(some)) for some in sizes]
    assert any({1, -1} <= {*some.tolist()} for some in changes), "some enter and some leave while others write"
    assert max(sizes[0]) == 1 and max(sizes[1]) < max(sizes[-1])


@pytest.mark.parametrize("kind", first_only(["resample", "zero", "mean"]))
@pytest.mark.parametrize("place", ["spread", "offloaded"])
def test_a_model_on_several_devices_or_offloaded(place: str, kind: str) -> None:
    model = model_of("llama3_1")
    spec: Any = tuple(edit.model_copy(update={"kind": kind}) for edit in JOINT)
    questions, given, _ = transcripts(model, spec if kind != "zero" else JOINT[0].model_copy(update={"kind": "mean"}))
    options: dict[str, Any] = {"max_new_tokens": 6, "reference": given if kind != "zero" else None}
    listed = [None, spec]
    expected = evaluate(model, tokenizer(), questions, listed, "both", **options)
    model = copy.deepcopy(model)
    with PretendedDevices() if place == "spread" else nullcontext():
        moved = spread(model) if place == "spread" else cpu_offload(model, torch.device("cpu"))
        found = evaluate(moved, tokenizer(), questions, listed, "both", **options)
    assert all(map(same, expected, found)) and found[0].ids != found[1].ids


def test_prompts_are_read_once_for_all_specs_that_leave_them_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = model_of("llama3_1"), list[str]()
    for name in ("read_untouched", "read_edited"):
        own = getattr(many, name)
        monkeypatch.setattr(many, name, lambda *args, n=name, own=own: (read.append(n), own(*args))[1])
    evaluate(model, tokenizer(), asked(), [None, *SPECS.values()], "new", max_new_tokens=4)
    assert read == ["read_untouched"]
    evaluate(model, tokenizer(), asked(), [None, *SPECS.values()], "both", max_new_tokens=4)
    assert read[1:] == ["read_untouched", "read_edited", "read_edited"]


def test_what_prompts_begin_with_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "SHORTEST", 3)
    model, questions = model_of("qwen2_5"), asked()
    object.__setattr__(
        questions.prompts, "input_ids", tuple((7, 11, 5, *ids[3:]) for ids in questions.prompts.input_ids)
    )
    often, once = (
        evaluate(model, tokenizer(), questions, [None, JOINT], "new", max_new_tokens=6, read_once=read)
        for read in (False, True)
    )
    assert all(map(same, often, once))


def test_logits_of_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = model_of("gemma2"), []
    own = rows_module.most_likely
    monkeypatch.setattr(
        rows_module, "most_likely", lambda logits, never: (read.append(len(logits)), own(logits, never))[1]
    )
    specs = [None, *SPECS.values()]
    evaluate(model, tokenizer(end=None), asked(), specs, "new", max_new_tokens=3, memory=2**20)
    assert max(read) == len(specs) * len(LENGTHS)
    monkeypatch.setattr(rows_module, "LOGIT_COPIES", 500)
    read.clear()
    few = evaluate(model, tokenizer(end=None), asked(), specs, "new", max_new_tokens=3, memory=2**20)
    assert max(read[1:]) < 4
    assert all(map(same, few, evaluate(model, tokenizer(end=None), asked(), specs, "new", max_new_tokens=3)))


def test_memory_that_runs_out_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, specs = model_of("llama3_1"), [None, *SPECS.values()]
    whole = evaluate(model, tokenizer(), asked(), specs, "new", max_new_tokens=NEW)
    step, most = rows_module._Writer.step, [5]

    def limited(self: Any) -> None:
        if len(self.rows) > most[0]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        step(self)

    monkeypatch.setattr(rows_module._Writer, "step", limited)
    options: dict[str, Any] = {"max_new_tokens": NEW, "memory": 10**6}
    assert all(map(same, whole, evaluate(model, tokenizer(), asked(), specs, "new", **options)))
    most[0] = 0
    with pytest.raises(ValueError, match="one text of 9 and 10 new tokens does not fit in memory"):
        evaluate(model, tokenizer(), asked(), specs, "new", **options)


# -- kept as they come ---------------------------------------------------------------------------------------------------


def test_an_interrupted_evaluation_goes_on_with_the_texts_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, specs = model_of("mistral"), [None, *SPECS.values()]
    words = tokenizer(*mark_and_end(model))
    whole = evaluate(model, words, asked(), specs, "new", max_new_tokens=NEW)
    own, steps = rows_module._Writer.step, [0]

    def interrupted(self: Any) -> None:
        steps[0] += 1
        if steps[0] == 8:
            raise KeyboardInterrupt
        own(self)

    options: dict[str, Any] = {"max_new_tokens": NEW, "store": tmp_path / "texts"}
    monkeypatch.setattr(rows_module._Writer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, words, asked(), specs, "new", **options)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(m.config is model.config for m in model.modules() if hasattr(m, "config"))
    (file,) = (tmp_path / "texts").glob("*/*.jsonl")
    kept = len(file.read_text().splitlines()) - 1
    assert 0 < kept < len(specs) * len(LENGTHS)
    file.write_text(file.read_text() + '["cut by a k')

    written: list[Solution] = []
    begin = ProblemRows.text
    monkeypatch.setattr(ProblemRows, "text", lambda *args: (written.append(begin(*args)), written[-1])[1])
    monkeypatch.setattr(rows_module._Writer, "step", own)
    resumed = evaluate(model, words, asked(), specs, "new", **options)
    assert all(map(same, whole, resumed)) and len(written) == len(specs) * len(LENGTHS) - kept
    assert all(map(same, whole, evaluate(model, words, asked(), specs, "new", **options)))
    assert len(written) == len(specs) * len(LENGTHS) - kept, "nothing is written a second time"

    # A changed text is not trusted, and nothing is taken for another scope or model.
    lines = file.read_text().splitlines()
    changed = lines[1].replace("false", "true") if "false" in lines[1] else lines[1].replace("true", "false")
    file.write_text("\n".join([changed, *lines[2:]]) + "\n")
    assert all(map(same, whole, evaluate(model, words, asked(), specs, "new", **options)))
    assert len(written) == len(specs) * len(LENGTHS) - kept + 1
    evaluate(model, words, asked(), specs, "reasoning", **options)
    again = 2 * len(LENGTHS)  # the untouched model's are the same for any scope
    assert len(written) == len(specs) * len(LENGTHS) - kept + 1 + again


# -- what runs in another way, and what is refused -----------------------------------------------------------------------


def test_functions_run_together_on_the_prompt_and_one_by_one_elsewhere() -> None:
    model, questions = model_of("mistral"), asked()
    spec = Ablation(kind="noise", site="resid_pre", layer=1, positions="last")
    reference = Reference.compute(model, questions.prompts, [("resid_pre", 1)])
    resolved = resolve([spec, JOINT], model, questions.prompts, reference=reference)

    def noise(batch: Any) -> Compiled:
        return compile_spec(spec, batch, resolved)

    def joint(batch: Any) -> Compiled:
        return compile_spec(JOINT, batch, resolved)

    for scope, made in (("prompt", noise), ("new", joint)):
        found = evaluate(model, tokenizer(), questions, [made, None], scope, max_new_tokens=4)  # type: ignore[arg-type]
        assert same(found[0], evaluate(model, tokenizer(), questions, made, scope, max_new_tokens=4))  # type: ignore[arg-type]
        assert found[0].ids != found[1].ids
    with pytest.raises(ValueError, match="under a function cannot be told from another function's"):
        evaluate(model, tokenizer(), questions, [noise], "prompt", max_new_tokens=4, store="nowhere")


def test_another_end_of_texts_is_another_text_in_the_store(tmp_path: Path) -> None:
    model, specs = model_of("llama3_1"), [None, JOINT]
    options: dict[str, Any] = {"max_new_tokens": NEW, "store": tmp_path}
    evaluate(model, tokenizer(end=None), asked(), specs, "new", **options)
    ending = tokenizer(*mark_and_end(model))
    expected = evaluate(model, ending, asked(), specs, "new", max_new_tokens=NEW)
    assert all(map(same, expected, evaluate(model, ending, asked(), specs, "new", **options)))
    model.generation_config.suppress_tokens = [expected[0].ids[0][0]]
    assert evaluate(model, ending, asked(), specs, "new", **options)[0].ids != expected[0].ids
    model.generation_config.suppress_tokens = None


@pytest.mark.parametrize("family", ["bloom", "mistral"])
def test_the_store_serves_one_spec_and_models_whose_specs_run_one_by_one(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    options: dict[str, Any] = {"max_new_tokens": 4, "store": tmp_path}
    expected = evaluate(model, tokenizer(end=None), asked(), [None, JOINT, JOINT], "new", max_new_tokens=4)
    assert same(evaluate(model, tokenizer(end=None), asked(), JOINT, "new", **options), expected[1])
    written: list[Solution] = []
    own = Solution.add
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Solution, "add", lambda self, *args: (written.append(self), own(self, *args))[1])
        found = evaluate(model, tokenizer(end=None), asked(), [None, JOINT, JOINT], "new", **options)
    assert all(map(same, found, expected)) and len(written) == 4 * len(LENGTHS), "only those of the untouched model"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"spec": []}, "there are no specs; give at least one"),
        ({"questions": ["2+2?"]}, "questions must be Questions, not list; make them with tokenize_problems"),
        ({"memory": 0}, "memory must be a whole number of bytes above 0, not 0"),
        ({"memory": True}, "memory must be a whole number of bytes above 0, not True"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"rule": "exact"}, "there is no rule 'exact' by which answers are read; choose among flexible-extract"),
        (
            {"spec": None, "memory": 10**9},
            "memory is for a list of specs, whose texts are written at once; for one spec",
        ),
        ({"baseline": "nonsense"}, "baseline is what stop compares with; give stop too"),
        ({"store": __file__}, "is a file; name a folder in which texts are kept"),
    ],
)
def test_bad_input_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(model_of("gpt2"), tokenizer(), **{"questions": asked(), "spec": [None], "max_new_tokens": 4, **given})


def test_a_bar_of_a_longer_run_counts_every_text(tmp_path: Path) -> None:
    model = model_of("gpt2")
    for _ in range(2):  # the second time all texts are there
        with tqdm(total=2 * len(LENGTHS), disable=False, file=io.StringIO()) as bar:
            evaluate(model, tokenizer(), asked(), [None, JOINT], "new", max_new_tokens=4, store=tmp_path, progress=bar)
            assert bar.n == 2 * len(LENGTHS)


# -- several processes ---------------------------------------------------------------------------------------------------


def solved(store: Path | None = None) -> dict[str, np.ndarray]:
    found = evaluate(
        model_of("llama3_1"), tokenizer(end=None), asked(), [None, JOINT], "new", max_new_tokens=NEW, store=store
    )
    return {str(number): np.array(of_spec.ids) for number, of_spec in enumerate(found)}


@pytest.mark.processes
def test_processes_share_the_problems_and_all_have_the_whole(tmp_path: Path) -> None:
    expected = solved()
    for number, store in enumerate((None, tmp_path / "texts")):
        for found in Launch(tmp_path / str(number), solved, store).both:
            assert all((found[name] == ids).all() for name, ids in expected.items())
    lines = [len(path.read_text().splitlines()) - 1 for path in sorted((tmp_path / "texts").glob("*/*"))]
    assert lines == [4, 4], "each process kept its half"


def differently(rank: int) -> dict[str, np.ndarray]:
    """Processes that were given different specs."""
    specs = [SPECS["joint"] if processes().process_index else SPECS["one layer"]]
    return {
        "ids": np.array(
            evaluate(model_of("llama3_1"), tokenizer(end=None), asked(), specs, "new", max_new_tokens=4)[0].ids
        )
    }


@pytest.mark.processes
def test_processes_with_different_specs_are_refused(tmp_path: Path) -> None:
    launch = Launch(tmp_path / "launch", differently, 0)
    assert not launch.results and len(launch.sentences) == 2
    assert all("were given different specs" in sentence for sentence in launch.sentences)
