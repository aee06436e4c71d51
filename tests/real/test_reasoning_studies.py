"""Studies of critical heads on real weights, against plain hooks, one problem at a time, written token by token."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from critical_heads import ablate_heads, attribute_inputs, patch_hub, stratify_difficulty, transplant_head
from torch import Tensor

from pyvene_ext.io.cli import run as run_study
from pyvene_ext.io.seeds import rng
from pyvene_ext.runs import folder, reasoning
from pyvene_ext.runs.flags import Problems
from tests.ground_truth import transplant as slow
from tests.real.conftest import Real

pytestmark = pytest.mark.filterwarnings("ignore")
NEW = 32
NEEDED = [
    (17, 8),
    (19, 3),
    (16, 0),
    (2, 1),
    (1, 2),
    (3, 8),
    (14, 2),
    (3, 0),
    (4, 3),
    (16, 2),
    (10, 1),
    (18, 5),
]  # of SmolLM2
Row = dict[str, str]
Head = tuple[int, int]
Change = Callable[[Tensor], Tensor]  # of a module's input or output at the tokens of one forward pass [pos d]
Places = dict[tuple[str, bool], Change]  # by the module's name, and whether its input is changed


def study(module: Any, out: Path, flags: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run a study; its summary, and what it keeps of every run in case that it is interrupted."""
    flags = f"{flags} --max_new_tokens {NEW} --out {out}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder, "discard", lambda _: None)
        assert run_study(module.main, module.Config, flags.split()) == 0
    kept = [json.loads(path.read_text(encoding="utf-8")) for path in (out / "unfinished").glob("*.json")]
    return json.loads((out / "summary.json").read_text(encoding="utf-8")), kept


def rows_of(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# -- by hand -----------------------------------------------------------------------------------------------------------


def asked(real: Real, n: int, steps: tuple[int, ...] = ()) -> list[tuple[list[int], float]]:
    """Token ids of one-step problems behind three solved ones, and the right answers, by the tokenizer alone."""
    flags = Problems(models=(real.folder,), limit=n, problem_steps=steps)
    shown = "".join(f"Question: {p.question}\nAnswer: {p.solution}\n\n" for p in reasoning.find_examples(flags)[:3])
    problems = reasoning.find_problems(flags)
    texts = [f"{shown}Question: {problem.question}\nAnswer:" for problem in problems]
    return [(real.tokenizer(text)["input_ids"], p.answer) for text, p in zip(texts, problems, strict=True)]


@contextmanager
def changed(model: Any, places: Places) -> Iterator[None]:
    with ExitStack() as stack:
        for (name, is_input), change in places.items():
            module = model.get_submodule(name)
            if is_input:
                hook = module.register_forward_pre_hook(lambda _, args, change=change: (change(args[0][0])[None],))
            else:

                def after(_: Any, __: Any, out: Any, change: Change = change) -> Any:
                    new = change(out[0] if isinstance(out, Tensor) else out[0][0])[None]
                    return new if isinstance(out, Tensor) else (new, *out[1:])

                hook = module.register_forward_hook(after)
            stack.callback(hook.remove)
        yield


@torch.no_grad()
def written(
    real: Real, ids: Sequence[int], places_at: Callable[[list[int]], Places] = lambda _: {}, new: int = NEW
) -> tuple[list[int], list[float]]:
    """What the model writes behind some tokens, greedily, and how likely each is; `places_at` of what is written so far."""
    out: list[int] = []
    likely: list[float] = []
    cache, given = None, torch.tensor([list(ids)])
    while len(out) < new:
        with changed(real.model, places_at(out)):
            found = real.model(given, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, probabilities = found.past_key_values, found.logits[0, -1].softmax(-1)
        token = int(probabilities.argmax())
        if token == real.tokenizer.eos_token_id:
            break
        out.append(token)
        likely.append(float(probabilities[token]))
        given = torch.tensor([[token]])
        text = real.tokenizer.decode([*ids, *out][len(ids) - 4 :])
        if re.search(r"####\s*\d[\d.,]*\s*\n", text) or "\nQuestion:" in text:
            break
    return out, likely


def answer(real: Real, ids: Sequence[int]) -> float | None:
    """The number behind ####."""
    found = re.search(r"####\s*(-?\d+(?:\.\d+)?)", real.tokenizer.decode(list(ids)))
    return float(found[1]) if found else None


def without(real: Real, heads: Sequence[Head], at: Callable[[list[int]], bool]) -> Callable[[list[int]], Places]:
    """z of some heads is 0 in the forward passes that are meant; a pass reads the prompt or the last token written."""

    def cut(mine: list[int]) -> Change:
        def zeroed(z: Tensor) -> Tensor:
            z = z.unflatten(-1, (real.model.config.num_attention_heads, -1)).clone()
            z[:, mine] = 0
            return z.flatten(-2)

        return zeroed

    layers = {layer: [head for at, head in heads if at == layer] for layer, _ in heads}
    places: Places = {(f"model.layers.{layer}.self_attn.o_proj", True): cut(mine) for layer, mine in layers.items()}
    return lambda out: places if at(out) else {}


def reasons(real: Real) -> Callable[[list[int]], bool]:
    """Whether what is read is a token of the reasoning: one that was written, and no #### so far."""
    return lambda out: bool(out) and "####" not in real.tokenizer.decode(out)


def with_block(real: Real, ids: Sequence[int]) -> tuple[list[int], range]:
    """A problem with the reasoning that the model writes, up to its ####, and which tokens are the reasoning."""
    out, _ = written(real, ids)
    marked = next(end for end in range(len(out) + 1) if "####" in real.tokenizer.decode(out[:end]))
    before = next(at for at, token in enumerate(out) if "#" in real.tokenizer.decode([token]))
    return [*ids, *out[:marked]], range(len(ids), len(ids) + before)


def heads_in(row: Row, column: str) -> list[Head]:
    return [(int(a), int(b)) for a, b in (name.split(".") for name in row[column].split())]


# -- heads ablated -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "heads"),
    [("smollm2", NEEDED), ("gemma3", [(2, 0), (5, 1), (8, 2), (11, 3)])],
)
def test_solutions_without_heads_are_those_of_hooks(
    name: str, heads: list[Head], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    real: Real = request.getfixturevalue(name)
    ranking = tmp_path / "heads.csv"
    lines = [f"{1 / (1 + at)},{layer},{head}" for at, (layer, head) in enumerate(heads)]
    ranking.write_text("\n".join(["scores,layer,head", *lines]) + "\n", encoding="utf-8")
    flags = f"--models {real.folder} --limit 2 --rankings {ranking} --n_heads {len(heads)} --random_sets 1"
    summary, kept = study(ablate_heads, tmp_path / "x", f"{flags} --scope reasoning both")

    problems = asked(real, 2)
    clean = [written(real, ids)[0] for ids, _ in problems]
    (random,) = {row["heads"] for row in rows_of(tmp_path / "x/random_sets.csv")}
    drawn = heads_in({"heads": random}, "heads")
    assert sorted(layer for layer, _ in drawn) == sorted(layer for layer, _ in heads) and not set(drawn) & set(heads)
    found = {}
    for record in kept:
        spec = record["facts"]["spec"]
        which = () if spec is None else tuple(sorted((s["layer"], h) for s in spec[0] for h in s["heads"]))
        found[which, record["facts"].get("scope") if spec else None] = record["results"]["ids"]
    expected: dict[Any, Any] = {((), None): clean}
    for scope, at in (("reasoning", reasons(real)), ("both", lambda _: True)):
        for some in (heads, drawn):
            edits = without(real, some, at)
            expected[tuple(sorted(some)), scope] = [written(real, ids, edits)[0] for ids, _ in problems]
    assert {key: found[key] for key in expected} == expected
    assert sum(new != clean for new in expected.values()) >= 2, "something is changed"

    right = {
        key: [answer(real, ids) == gold for ids, (_, gold) in zip(new, problems, strict=True)]
        for key, new in expected.items()
    }
    for row in rows_of(tmp_path / "x/ablations.csv"):
        key = ((), None) if row["n_heads"] == "0" else (tuple(sorted(heads)), row["scope"])
        assert float(row["accuracy"]) == 100 * np.mean(right[key]), row
        assert float(row["drop"]) == 100 * (np.mean(right[(), None]) - np.mean(right[key]))
    assert len(summary["verdicts"]) == 2


def test_drops_by_confidence_are_those_of_solutions_written_with_hooks(smollm2: Real, tmp_path: Path) -> None:
    heads = [(0, 1), (0, 4), (1, 2), (1, 3), (17, 8), (19, 3)]
    named = " ".join(f"{a}.{b}" for a, b in heads)
    flags = f"--models {smollm2.folder} --limit 3 --heads {named} --scope both --random_sets 0 --min_problems 2"
    summary, _ = study(stratify_difficulty, tmp_path, flags)
    model = next(iter(summary["models"]))
    right, sure = [], []
    for ids, gold in asked(smollm2, 3):
        both = [written(smollm2, ids), written(smollm2, ids, without(smollm2, heads, lambda _: True))]
        right.append([answer(smollm2, out) == gold for out, _ in both])
        # The number stands behind the mark, up to the new line, which is a token of its own.
        out, likely = both[0]
        mark = next(at for at, token in enumerate(out) if "#" in smollm2.tokenizer.decode([token]))
        digits = [
            p
            for at, (token, p) in enumerate(zip(out, likely, strict=True))
            if at > mark and smollm2.tokenizer.decode([token]).strip().isdigit()
        ]
        sure.append(float(np.exp(np.mean(np.log(digits)))))
    clean, after = np.array(right).T
    assert (clean != after).any(), "something is lost"
    rows = rows_of(tmp_path / f"problems/{model}.csv")
    assert [float(row["confidence"]) for row in rows] == pytest.approx(sure, abs=1e-4)
    assert [int(row["clean"]) for row in rows] == clean.tolist() and [
        float(row["after"]) for row in rows
    ] == after.tolist()
    parts = np.array(sure) >= np.median(sure)
    for row in rows_of(tmp_path / "strata.csv"):
        here = np.ones(3, bool) if row["split"] == "steps" else parts == (row["stratum"][:2] == "q2")
        assert int(row["problems"]) == here.sum()
        assert float(row["drop"]) == pytest.approx(100 * (clean[here].mean() - after[here].mean()))


# -- noise at one token ------------------------------------------------------------------------------------------------


def test_what_follows_noise_at_a_token_is_that_of_hooks(smollm2: Real, tmp_path: Path) -> None:
    flags = f"--models {smollm2.folder} --limit 2 --min_problems 2 --places 2"
    _, kept = study(patch_hub, tmp_path, flags)
    model, problems = smollm2.model, asked(smollm2, 2)
    texts = [with_block(smollm2, ids) for ids, _ in problems]

    # Mean and standard deviation of each place over all tokens of both problems with their reasoning.
    names: dict[tuple[str, int | None], tuple[str, bool]] = {
        ("embed", None): ("model.layers.0", True),
        ("resid_post", 14): ("model.layers.14", False),
        **{(at, layer): (f"model.layers.{layer}.self_attn.{at}_proj", False) for layer in range(30) for at in "kv"},
    }
    seen: dict[Any, list[Tensor]] = {place: [] for place in names}

    def keeps(place: Any) -> Change:
        def keep(x: Tensor) -> Tensor:
            seen[place].append(x.clone())
            return x

        return keep

    for ids, _ in texts:
        with changed(model, {name: keeps(place) for place, name in names.items()}), torch.no_grad():
            model.model(torch.tensor([ids]))
    sites = {
        "embed": [("embed", None)],
        "resid.14": [("resid_post", 14)],
        "kv": [place for place in names if place[0] in "kv"],
    }

    def noised(place: Any, number: int, token: int) -> Change:
        """The noise of one place at the last token of the prompt."""
        every = torch.cat(seen[place])
        heads = range(3) if place[0] in "kv" else [None]
        draws = [rng(0, "noise", *map(str, place), str(head), number) for head in heads]
        eps = torch.cat(
            [torch.from_numpy(draw.standard_normal((token + 1, every.shape[1] // len(draws)))[token]) for draw in draws]
        )
        new = every.mean(0) + every.std(0, correction=0) * eps.float()
        return lambda x: torch.cat([x[:-1], new[None]])

    rows = rows_of(tmp_path / "positions.csv")
    last = min(len(block) for _, block in texts) - 1
    assert [(row["site"], int(row["position"])) for row in rows] == [(site, at) for site in sites for at in (0, last)]
    all_written = [record["results"]["ids"] for record in kept if record["facts"]["spec"]]
    differ = 0
    for row in rows:
        found = []
        for number, (ids, block) in enumerate(texts):
            token = block[int(row["position"])]
            edits: Places = {names[place]: noised(place, number, token) for place in sites[row["site"]]}
            found.append(written(smollm2, ids[: token + 1], lambda out, edits=edits: {} if out else edits)[0])
        assert found in all_written, row
        given = [ids[: block[int(row["position"])] + 1] for ids, block in texts]
        golds = [gold for _, gold in problems]
        right = [
            answer(smollm2, [*before[len(ids) :], *new]) == gold
            for before, new, (ids, _), gold in zip(given, found, problems, golds, strict=True)
        ]
        assert float(row["accuracy"]) == 100 * np.mean(right), row
        differ += any(
            [*before, *new][: len(ids)] != ids for before, new, (ids, _) in zip(given, found, texts, strict=True)
        )
    assert differ >= 2, "the noise changes something"
    assert len(all_written) == len(rows)


# -- heads transplanted ------------------------------------------------------------------------------------------------


def ridge(x: Tensor, y: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Weight and offset by normal equations in double precision."""
    x, y = x.double(), y.double()
    mx, my = x.mean(0), y.mean(0)
    x, y = x - mx, y - my
    penalty = alpha * x.square().sum() / x.shape[1] * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(x.T @ x + penalty, x.T @ y)
    return weight, my - mx @ weight


def test_answers_with_transplanted_heads_are_those_of_heads_written_out(smollm2: Real, tmp_path: Path) -> None:
    """A head of the model itself in the place of another, with and without maps."""
    places, heads, alpha = [(1, 2), (3, 8)], [(2, 1), (0, 4)], 0.1
    named, donors = (" ".join(f"{layer}.{head}" for layer, head in some) for some in (places, heads))
    flags = f"--models {smollm2.folder} --donor {smollm2.folder} --heads {named} --donor_heads {donors} --limit 5"
    flags += f" --fit_problems 3 --alpha {alpha} --regenerate answer --answer_tokens 3 --random_sets 0"
    summary, kept = study(transplant_head, tmp_path, flags)
    found = {
        record["facts"]["condition"]: record["results"]["ids"] for record in kept if "condition" in record["facts"]
    }
    assert set(found) == {"zero", "self", "without_maps", "transplant"}

    model, problems = smollm2.model, asked(smollm2, 5)
    texts = [with_block(smollm2, ids)[0] for ids, _ in problems]
    train, test = slow.split(texts[:3], 1)
    moves, r2 = [], []
    for place, head in zip(places, heads, strict=True):
        host, donor = ([slow.streams(model, ids, layer) for ids in texts[:3]] for layer in (place[0], head[0]))

        def stacked(side: list[Any], stage: int, which: list[tuple[int, int]]) -> Tensor:
            return torch.stack([side[prompt][stage][at] for prompt, at in which])

        a, offset = ridge(stacked(host, 0, train), stacked(donor, 0, train), alpha)
        b, _ = ridge(stacked(donor, 1, train), stacked(host, 1, train), alpha)
        goal, mean = stacked(donor, 0, test), stacked(donor, 0, train).mean(0)
        error = (goal - stacked(host, 0, test) @ a - offset).square().sum()
        r2.append(float(1 - error / (goal - mean).square().sum()))
        a, offset, b = a.float(), offset.float(), b.float()
        moves.append((place, head, lambda x, a=a, offset=offset: x @ a + offset, lambda c, b=b: c @ b))
    fits = [row for row in rows_of(tmp_path / "maps.csv") if row["map"] == "A"]
    assert [float(row["r2_test"]) for row in fits] == pytest.approx(r2, abs=2e-3) and min(r2) > 0.5

    conditions = {
        "zero": [slow.Move(place, model, place, lambda x: x, torch.zeros_like) for place in places],
        "self": [],
        "without_maps": [
            slow.Move(place, model, head, lambda x: x, lambda c: c) for place, head in zip(places, heads, strict=True)
        ],
        "transplant": [slow.Move(place, model, head, a, b) for place, head, a, b in moves],
    }
    for condition, some in conditions.items():
        answers = []
        for ids in texts[3:]:
            out: list[int] = []
            while len(out) < 3 and (not out or "\n" not in smollm2.tokenizer.decode(out).lstrip()):
                out.append(int(slow.logits(model, [*ids, *out], some, len(ids))[-1].argmax()))
            answers.append(out)
        assert found[condition] == answers, condition
    assert found["self"] == [
        ids
        for record in kept
        if record["facts"].get("spec", 0) is None and record["facts"]["new"] == 3
        for ids in record["results"]["ids"][3:]
    ]
    assert len(summary["verdicts"]) == 1


# -- input attribution -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "head"), [("smollm2", (10, 1)), ("gemma3", (5, 1))])
def test_attributions_are_gradients_along_the_line_summed_by_hand(
    name: str, head: Head, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Attention to the block's first token, in two problems and four steps; Gemma's embeddings are scaled, and BOS stays."""
    real: Real = request.getfixturevalue(name)
    flags = f"--models {real.folder} --limit 2 --heads {head[0]}.{head[1]} --hub 0 --random_heads 0 --steps 4 --most_steps 4"
    study(attribute_inputs, tmp_path, flags)
    tokens, problems = rows_of(tmp_path / "tokens.csv"), rows_of(tmp_path / "problems.csv")

    model, (layer, number) = real.model, head
    weight = model.model.embed_tokens(torch.arange(model.config.vocab_size)).detach()
    nodes, sizes = np.polynomial.legendre.leggauss(4)
    model.set_attn_implementation("eager")
    try:
        for problem, (ids, _) in enumerate(asked(real, 2)):
            given, block = with_block(real, ids)
            text = real.tokenizer.decode(ids)
            own = next(
                at
                for at in range(len(ids))
                if len(real.tokenizer.decode(ids[: at + 1])) > text.rindex("Question: ") + 10
            )
            given = given[: block[-1] + 1]

            def attention(x: Tensor, block: range = block) -> Tensor:
                patterns = model.model(inputs_embeds=x[None], output_attentions=True).attentions
                return patterns[layer][0, number, list(block[1:]), block[0]].mean()

            end, start = weight[given], weight[given].clone()
            start[own:] = weight.mean(0)
            total = torch.zeros_like(end)
            for node, size in zip((nodes + 1) / 2, sizes / 2, strict=True):
                x = (start + float(node) * (end - start)).requires_grad_()
                total += float(size) * torch.autograd.grad(attention(x), x)[0]
            expected = (total * (end - start)).sum(-1)
            with torch.no_grad():
                value, base = float(attention(end)), float(attention(start))
            mine = [float(row["attribution"]) for row in tokens if row["problem"] == str(problem)]
            np.testing.assert_allclose(mine, expected.numpy(), atol=2e-5 * max(1, float(expected.abs().max())))
            row = problems[problem]
            assert (float(row["value"]), float(row["at_baseline"])) == pytest.approx((value, base), abs=1e-5)
            assert float(row["error"]) == pytest.approx(abs(sum(mine) - (value - base)) / abs(value - base), rel=1e-2)
            assert int(row["hub_token"]) == block[0] and max(map(abs, mine)) > 1e-4
    finally:
        model.set_attn_implementation("sdpa")
