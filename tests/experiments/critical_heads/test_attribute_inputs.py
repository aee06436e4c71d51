"""The study of integrated gradients against gradients of plain embeddings, a problem at a time; interrupted; given bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from critical_heads import attribute_inputs as study

import pyvene_ext as px
from pyvene_ext.io.cli import run as run_study
from pyvene_ext.io.files import write_csv
from pyvene_ext.methods.attribution import readings
from pyvene_ext.methods.attribution.by_tag import AttributedHead, head_rows, tag_rows
from pyvene_ext.methods.attribution.inputs import InputAttribution, Target
from pyvene_ext.prompts.token_tags import tag_tokens
from pyvene_ext.runs import reasoning
from pyvene_ext.runs.figures.inputs import tag_shares
from pyvene_ext.stats import accuracy
from tests.experiments.critical_heads import by_hand
from tests.interrupted import stop_at
from tests.tiers import first_only

N = 4
MODEL = "tiny-llama3.1"
STEPS = 8


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(accuracy, "RESAMPLES", 100)
    return tmp_path


def command(*flags: Any) -> int:
    steps = ["--steps", str(STEPS), "--most_steps", str(STEPS)]
    common_flags = ["--limit", str(N), "--models", MODEL, *steps]
    return run_study(study.main, study.Config, [*common_flags, *map(str, flags)])


def by_gradients(
    layer: int, head: int, target: str, query: str, hub: int = 0
) -> tuple[list[np.ndarray], list[float], list[float]]:
    """Attributions of every token, and the number with the tokens and with mean embeddings."""
    model, tokenizer, problems = by_hand.blocks(MODEL, N, attn_implementation="eager")
    weight = model.model.embed_tokens.weight.detach()
    nodes, sizes = np.polynomial.legendre.leggauss(STEPS)
    o_proj = model.model.layers[layer].self_attn.o_proj
    d_head = o_proj.weight.shape[1] // 8
    found: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
    for ids, block, _ in problems:
        queries = {"block_mean": list(block), "block_last": [block[-1]], "end": [len(ids) - 1]}[query]
        if target == "attention":
            queries = [at for at in queries if at > block[hub]]

        def number(x: torch.Tensor, of: list[int] = queries, ids: Any = ids, block: range = block) -> torch.Tensor:
            seen = {}
            hook = o_proj.register_forward_pre_hook(lambda _, args: seen.update(z=args[0]))
            out = model(inputs_embeds=x[None], output_attentions=True)
            hook.remove()
            if target == "attention":
                return out.attentions[layer][0, head, of, block[hub]].mean()
            own = slice(head * d_head, (head + 1) * d_head)
            result = seen["z"][0, :, own] @ o_proj.weight[:, own].T
            with torch.no_grad():
                answer = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            return (result @ model.lm_head.weight[answer])[of].mean()

        end = weight[ids]
        start = weight.mean(0).repeat(len(ids), 1)
        start[0] = end[0]  # <bos>
        total = torch.zeros_like(end)
        for node, size in zip((nodes + 1) / 2, sizes / 2, strict=True):
            x = (start + node * (end - start)).requires_grad_()
            total += size * torch.autograd.grad(number(x), x)[0]
        found[0].append((total * (end - start)).sum(-1).numpy()[: queries[-1] + 1])
        found[1].append(float(number(end).detach()))
        found[2].append(float(number(start).detach()))
    assert tokenizer.bos_token_id == problems[0][0][0]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "of"),
    first_only(
        [
            ((), ("attention", "block_mean")),
            (("--query", "end"), ("attention", "end")),
            (
                ("--query", "block_last", "--target", "projection", "--direction", "answer"),
                ("projection", "block_last"),
            ),
        ]
    ),
)
@pytest.mark.usefixtures("drawn")
def test_the_tables_are_made_of_gradients_summed_by_hand(
    folder: Path, flags: tuple[str, ...], of: tuple[str, str]
) -> None:
    hub = ("--hub", 3) if of[0] == "attention" else ()
    assert command("--out", "x", "--heads", "1.3", "--random_heads", 1, "--batch_size", 3, *hub, *flags) == 0
    _, tokenizer, problems = by_hand.blocks(MODEL, N)
    tokens, values, bases = by_gradients(1, 3, *of, hub=3)

    rows = by_hand.table(folder / "x/tokens.csv")
    tags: list[list[str]] = []
    for number, (ids, *_) in enumerate(problems):
        mine = [row for row in rows if row["problem"] == str(number)]
        assert [int(row["token"]) for row in mine] == list(range(len(tokens[number])))
        np.testing.assert_allclose([float(row["attribution"]) for row in mine], tokens[number], atol=1e-5)
        tags.append(["special", *tag_tokens(ids, tokenizer)[0][1 : len(mine)]])
        assert [row["tag"] for row in mine] == tags[-1]
        assert mine[0]["text"] == "<bos>" and mine[1]["text"].strip() == "Question"

    own = [row for row in by_hand.table(folder / "x/problems.csv") if not row["control_of"]]
    np.testing.assert_allclose([float(row["value"]) for row in own], values, atol=1e-5)
    np.testing.assert_allclose([float(row["at_baseline"]) for row in own], bases, atol=1e-5)
    errors = [abs(some.sum() - (a - b)) / abs(a - b) for some, a, b in zip(tokens, values, bases, strict=True)]
    np.testing.assert_allclose([float(row["error"]) for row in own], errors, atol=1e-3, rtol=1e-2)
    complete = np.array(errors) < 0.05
    assert [row["complete"] == "True" for row in own] == complete.tolist()
    head = by_hand.table(folder / "x/heads.csv")[0]
    assert float(head["change"]) == pytest.approx(np.mean(np.subtract(values, bases)), abs=1e-5)
    assert int(head["complete"]) == complete.sum()
    listed = json.loads((folder / "x/summary.json").read_text())["models"][MODEL]["incomplete"]["1.3"]
    assert listed == np.flatnonzero(~complete).tolist()
    if of[0] == "attention" and complete.any():
        on_hub = [
            abs(some[block[3]]) / np.abs(some).sum() for some, (_, block, _) in zip(tokens, problems, strict=True)
        ]
        assert float(head["hub_share"]) == pytest.approx(np.mean(np.array(on_hub)[complete]), abs=1e-4)

    for row in by_hand.table(folder / "x/tags.csv"):
        if complete.sum() < 2:
            assert row["share"] == ""
            continue
        shares, counts = [], []
        for number in np.flatnonzero(complete):
            here = np.array([tag == row["tag"] for tag in tags[number]])
            shares.append(np.abs(tokens[number])[here].sum() / np.abs(tokens[number]).sum())
            counts.append(here.sum() / (len(here) - 1))  # <bos> is no token of the problem
        assert float(row["share"]) == pytest.approx(np.mean(shares), abs=1e-4)
        assert float(row["token_share"]) == pytest.approx(np.mean(counts))
        assert float(row["more_than_tokens"]) == pytest.approx(np.mean(shares) - np.mean(counts), abs=1e-4)
        assert float(row["share_low"]) <= float(row["share"]) <= float(row["share_high"])
    assert (folder / "x/figures/by_tag.png").stat().st_size > 5000
    assert (folder / f"x/figures/{MODEL}_1.3.png").stat().st_size > 5000


@pytest.mark.slow
def test_random_heads_are_of_the_same_layer_and_asked_the_same(folder: Path) -> None:
    assert command("--out", "x", "--heads", "2.1", "2.4", "--hub", 2, "--random_heads", 2) == 0
    rows = by_hand.table(folder / "x/problems.csv")
    for head in ("2.1", "2.4"):
        others = list(dict.fromkeys(row["head"] for row in rows if row["control_of"] == head))
        assert len(others) == 2
        for other in others:
            assert other.startswith("2.") and other not in ("2.1", "2.4")
            _, values, bases = by_gradients(2, int(other[2:]), "attention", "block_mean", hub=2)
            mine = [row for row in rows if (row["head"], row["control_of"]) == (other, head)]
            np.testing.assert_allclose([float(row["value"]) for row in mine], values, atol=1e-5)
            np.testing.assert_allclose([float(row["at_baseline"]) for row in mine], bases, atol=1e-5)


def one(
    head: InputAttribution, controls: dict[tuple[int, int], InputAttribution], tags: list[list[str]]
) -> AttributedHead:
    target = Target(0, 0, [[1]] * len(tags), [0] * len(tags))
    return AttributedHead("m", (0, 0), head, controls, 0, target, tuple(range(len(tags))), tags, tags)


def of(*rows: list[float], missed: tuple[int, ...] = ()) -> InputAttribution:
    """Complete attributions, but for those that miss."""
    value = np.array([sum(row) * (2 if number in missed else 1) for number, row in enumerate(rows)])
    return InputAttribution(tuple(map(np.array, rows)), value, np.zeros(len(rows)), np.full(len(rows), 50))


def test_shares_are_compared_over_the_problems_that_are_complete_for_both() -> None:
    tags = [["special", "number", "number", "other"]] * 3
    head = of([0, -3, 0, 1], [0, 1, 1, 2], [0, 5, 0, 5], missed=(2,))
    controls = {
        (0, 1): of([0, 1, 0, 3], [0, 0, 0, 1], [0, 1, 0, 0]),
        (0, 2): of([0, 1, 0, 1], [0, 0, 0, 1], [0, 1, 0, 0], missed=(1,)),
    }
    number = next(row for row in tag_rows(one(head, controls, tags), 0) if row["tag"] == "number")
    assert number["problems"] == 2 and number["token_share"] == pytest.approx(2 / 3)
    assert number["share"] == pytest.approx((0.75 + 0.5) / 2)
    assert number["more_than_tokens"] == pytest.approx(0.625 - 2 / 3)
    assert number["random_share"] == pytest.approx((0.375 + 0 + 1) / 3)
    assert number["more_than_random"] == pytest.approx((0.375 + 0.5) / 2)


def test_what_is_attributable_is_said_plainly() -> None:
    tags = [["number", "other", "other", "other"]] * 12
    config = study.Config(hub=0)

    def verdict(head: InputAttribution, controls: dict[tuple[int, int], InputAttribution]) -> str:
        found = one(head, controls, tags)
        (line,) = study.verdicts_of(head_rows(found, 0), tag_rows(found, 0), config)
        return line

    plain = of(*[[6.0, 1.0, 1.0, 0.0]] * 12)
    line = verdict(plain, {(0, 1): of(*[[2.0, 1.0, 1.0, 0.0]] * 12)})
    assert "m, 0.0: attention to token 0 of the block 8.000, 0.000 with baselines" in line
    assert "[8.000, 8.000] is the tokens' doing; the hub's own token has 75% of |attribution|" in line
    assert line.endswith("number has 75% of it with 25% of the tokens, more than with random heads (50%)")
    line = verdict(plain, {(0, 1): of(*[[8.0, 1.0, 1.0, 0.0]] * 12)})
    assert "no more than with random heads (80%)" in line
    missed = verdict(of(*[[6.0, 1.0, 1.0, 0.0]] * 12, missed=tuple(range(11))), {})
    assert missed.endswith(
        "not attributable: 11 of 12 problems incomplete with 450 steps, take more than --most_steps 450"
    )
    faint = verdict(of(*[[0.006, 0.001, 0.0, 0.0]] * 12, missed=tuple(range(12))), {})
    assert faint.endswith("as the head hardly attends to it (0.014); leave out --hub, or take other --heads")
    some = verdict(of(*[[6.0, 1.0, 1.0, 0.0]] * 12, missed=(3,)), {})
    assert some.endswith("1 of 12 problems incomplete and left out")
    signs = [[4.0 * (-1) ** i, 4.0 * (-1) ** i, 4.0 * (-1) ** i, 4.0 * (-1) ** i] for i in range(12)]
    line = verdict(of(*signs), {})
    assert "is not established as the tokens' doing" in line and "no tag has more than its share" in line


def test_the_evidence_says_in_how_many_problems_the_random_heads_are_complete() -> None:
    tags = [["number", "other", "other", "other"]] * 12
    controls = {(0, 1): of(*[[2.0, 1.0, 1.0, 0.0]] * 12, missed=(3,)), (0, 2): of(*[[1.0, 1.0, 1.0, 0.0]] * 12)}
    found = one(of(*[[6.0, 1.0, 1.0, 0.0]] * 12), controls, tags)
    said = study.evidence_of(found, tag_rows(found, 0))
    assert said.sample == "12 of 12 problems complete" and said.interval == pytest.approx((0.5, 0.5, 0.5))
    assert said.control.startswith("0.34 [") and said.control.endswith(
        "more than with 2 random heads of the layer (complete: 11, 12 problems)"
    )


def test_heads_and_hubs_come_from_the_ranking_made_here(folder: Path) -> None:
    kept = []
    own = px.methods.block_scores

    def keeps(*args: Any, **kwargs: Any) -> Any:
        kept.append(own(*args, **kwargs))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reasoning, "block_scores", keeps)
        assert command("--out", "x", "--random_heads", 0, "--n_heads", 2, "--sample", 3) == 0
    (scores,) = kept
    best = np.argsort(-scores.of("hub"), axis=None, kind="stable")[:2]
    rows = by_hand.table(folder / "x/heads.csv")
    assert [row["head"] for row in rows] == [f"{at // 8}.{at % 8}" for at in best]
    assert scores.flow is None, "the ranking is by hub"
    starts = [block.start for _, block, _ in by_hand.blocks(MODEL, N)[2]]
    for at, row in zip(best, rows, strict=True):
        hubs = scores.hub_at.reshape(len(scores.hub), -1)[:3, at]
        mine = [each for each in by_hand.table(folder / "x/problems.csv") if each["head"] == row["head"]]
        assert [int(each["hub_token"]) for each in mine] == [
            start + hub for start, hub in zip(starts, hubs, strict=False)
        ]
        assert row["hub"] == ""
    assert [row["problems"] for row in rows] == ["3", "3"]
    assert by_hand.table(folder / "x/tags.csv")[0]["random_share"] == ""


@pytest.mark.slow
def test_rankings_name_the_heads(folder: Path) -> None:
    rows = [{"scores": -i, "layer": i // 8, "head": (i + 3) % 8} for i in range(32)]
    write_csv(folder / "heads.csv", rows)
    assert command("--out", "x", "--rankings", "heads.csv", "--hub", 1, "--random_heads", 0, "--n_heads", 3) == 0
    assert [row["head"] for row in by_hand.table(folder / "x/heads.csv")] == ["0.3", "0.4", "0.5"]


def test_the_same_command_gives_the_same_and_goes_on_where_it_stopped(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--out", "x", "--heads", "1.3", "2.1", "--hub", 2, "--random_heads", 1)
    made = stop_at(monkeypatch, 3, readings, "integrated_gradients")
    assert command(*flags) == 130
    assert sorted(path.name for path in (folder / "x").iterdir()) == ["unfinished"]
    assert command(*flags) == 0
    assert len(made) == 2 + 1 + 2  # two of four were left
    verdicts = json.loads((folder / "x/summary.json").read_text())["verdicts"]
    assert len(verdicts) == 2 and all(line in capsys.readouterr().out for line in verdicts[:1])
    assert not (folder / "x/unfinished").exists()
    whole = {
        name: (folder / "x" / name).read_bytes() for name in ("tokens.csv", "tags.csv", "heads.csv", "problems.csv")
    }
    assert yaml.safe_load((folder / "x/config.yaml").read_text())["hub"] == 2
    assert run_study(study.main, study.Config, ["--config", "x/config.yaml"]) == 0
    assert {name: (folder / "x" / name).read_bytes() for name in whole} == whole


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--steps", "0"), "--steps must be 1 or more, not 0"),
        (("--sample", "1"), "--sample must be 2 or more"),
        (("--random_heads", "-1"), "--random_heads must be 0 or more"),
        (("--shown", "0"), "--shown must be 1 or more"),
        (("--heads", "2"), "--heads names heads as layer.head, such as 2.5, not '2'"),
        (("--heads", "1.2", "1.2"), "--heads names each once, not 1.2 1.2."),
        (("--heads", "4.0"), "--heads 4.0: tiny-llama3.1 has layers 0 to 3, each with heads 0 to 7"),
        (("--n_heads", "33"), "--n_heads asks for 33 heads and tiny-llama3.1 has 32"),
        (("--heads", "1.2", "--rankings", "a.csv"), "--heads and --rankings both say which heads"),
        (("--rankings", "a.csv", "b.csv"), "--rankings names 2 files for 1 models"),
        (("--heads", "1.2", "--hub", "99"), "0 problems of tiny-llama3.1 have a token 99 in their block"),
        (("--heads", "1.2", "--hub", "-1"), "0 problems of tiny-llama3.1 have a token -1 in their block, and one after it"),
        (("--target", "projection", "--hub", "1"), "--hub is a token that heads look at"),
        (("--direction", "answer"), "--direction answer is for --target projection"),
        (("--dtype", "float16"), "too small for float16; load the model in bfloat16 or float32"),
        (("--limit", "-1"), "--limit must be 0 or more"),
        (("--baseline", "noise"), "invalid choice"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str
) -> None:
    try:
        code = command("--out", "x", *flags)
    except SystemExit as stopped:  # tyro's own
        code = stopped.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not [path for path in (folder / "x").rglob("*") if path.is_file() and "unfinished" not in path.parts]


def test_a_figure_of_one_head_holds_its_legend() -> None:
    numbers = dict.fromkeys(
        [f"{name}{end}" for name in ("share", "random_share") for end in ("", "_low", "_high")] + ["token_share"], 0.2
    )
    drawing = tag_shares([{"model": "m", "head": "0.1", "tag": tag, **numbers} for tag in ("number", "other")])
    drawing.draw_without_rendering()
    box = drawing.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= drawing.bbox.width
