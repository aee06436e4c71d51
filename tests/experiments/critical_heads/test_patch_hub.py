"""The study of noise at one token against plain hooks, one problem at a time; interrupted; given bad input."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from critical_heads import patch_hub as study

from pyvene_ext.io.cli import run as run_study
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.solving.results import Texts
from pyvene_ext.stats import accuracy
from tests.experiments.critical_heads import by_hand
from tests.ground_truth import ablations as slow
from tests.interrupted import stop_at

N = 6
MODEL = "tiny-qwen2.5"
LAYERS, KV_HEADS = 6, 2


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(accuracy, "RESAMPLES", 100)
    return tmp_path


def command(*flags: Any) -> int:
    return run_study(
        study.main, study.Config, ["--limit", str(N), "--models", MODEL, "--min_problems", "2", *map(str, flags)]
    )


@cache
def statistics_at(site: str, layer: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation over all tokens of all problems."""
    model, _, problems = by_hand.blocks(MODEL, N)
    return slow.statistics([slow.activation(model, ids, site, layer) for ids, *_ in problems])


def correct_by_hand(
    places: list[tuple[str, int | None]], position: int, seed: int, matched: bool = False, anew: int = 0
) -> list[bool]:
    """Which of the problems that have this token are right with noise there, at (site, layer) pairs.

    With `anew`, nothing is given behind that token, and so many tokens are written.
    """
    model, tokenizer, problems = by_hand.blocks(MODEL, N)
    statistics = {place: statistics_at(*place) for place in places}
    right = []
    having = [problem for problem in problems if position < len(problem[1])]
    for number, (ids, block, gold) in enumerate(having):
        changes = []
        for site, layer in places:
            mean, std = statistics[site, layer]
            heads: Any = range(KV_HEADS) if site in ("k", "v") else [None]
            draws = [rng(seed, "noise", site, str(layer), str(head), number) for head in heads]
            drawn = [torch.from_numpy(draw.standard_normal((len(ids), mean.shape[-1]))).float() for draw in draws]
            eps = (torch.stack(drawn, 1) if site in ("k", "v") else drawn[0])[block[position]]

            def noised(
                x: torch.Tensor, at: int = block[position], new: Any = mean + std * eps, eps: Any = eps
            ) -> torch.Tensor:
                x = x.clone()
                x[at] = eps / eps.norm(dim=-1, keepdim=True) * x[at].norm(dim=-1, keepdim=True) if matched else new
                return x

            changes.append((site, layer, noised))
        given = ids[: block[position] + 1] if anew else ids
        out = by_hand.written(
            model, tokenizer, given, lambda tokens, c=changes: slow.logits(model, tokens, c)[-1], anew or 4
        )
        right.append(by_hand.number(tokenizer.decode([*given, *out])) == gold)
    return right


PLACES: dict[str, list[tuple[str, int | None]]] = {
    "embed": [("embed", None)],
    "resid.1": [("resid_post", 1)],
    "kv": [(site, layer) for layer in range(LAYERS) for site in ("k", "v")],
}


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
def test_drops_are_those_of_noise_by_plain_hooks(folder: Path) -> None:
    assert command("--out", "x", "--seeds", 2, "--layers", 1, "--answer_tokens", 4, "--seed", 3) == 0
    rows = {(row["site"], int(row["position"])): row for row in by_hand.table(folder / "x/positions.csv")}
    _, _, problems = by_hand.blocks(MODEL, N)
    lengths = sorted(len(block) for _, block, _ in problems)
    assert list(rows) == [(site, position) for site in PLACES for position in range(lengths[-2])]
    seen = set()
    for site, places in PLACES.items():
        drops = by_hand.table(folder / f"x/drop_{site}.csv")
        assert list(drops[0]) == ["position", f"{MODEL}_drop"]
        for position in (5, 12):
            right = np.array([correct_by_hand(places, position, seed) for seed in (3, 4)])
            row = rows[site, position]
            assert int(row["problems"]) == right.shape[1] == sum(length > position for length in lengths)
            assert float(row["drop"]) == pytest.approx(100 - 100 * right.mean()), (site, position)
            assert float(drops[position][f"{MODEL}_drop"]) == float(row["drop"])
            assert float(row["sd_over_seeds"]) == pytest.approx(100 * right.mean(1).std(ddof=1))
            lost = (~right).sum(1).min()
            assert float(row["mcnemar_p"]) == pytest.approx(min(1.0, 2 * 0.5**lost))
            assert float(row["q"]) >= float(row["mcnemar_p"]) or float(row["q"]) == 1
            seen.add(float(row["drop"]))
    assert len(seen) > 2  # else little was compared
    assert (folder / "x/figures/drop_by_position.png").stat().st_size > 5000


@pytest.mark.slow
def test_what_follows_the_noise_is_written_anew(folder: Path) -> None:
    flags = ("--regenerate", "reasoning", "--layers", 1, "--max_new_tokens", 18, "--places", 3, "--seed", 3)
    assert command("--out", "x", *flags) == 0
    rows = by_hand.table(folder / "x/positions.csv")
    assert len(rows) == 3 * len(PLACES)  # one draw each
    seen = set()
    for row in rows:
        right = correct_by_hand(PLACES[row["site"]], int(row["position"]), 3, anew=18)
        assert float(row["accuracy"]) == pytest.approx(100 * np.mean(right)), row
        assert float(row["clean_accuracy"]) == 100
        seen.add(sum(right))
    assert len(seen) > 2
    evidence = json.loads((folder / "x/summary.json").read_text())["evidence"]
    assert len(evidence) == 1 and evidence[0]["interval"][0] == max(float(row["drop"]) for row in rows)


def test_norm_matched_noise_in_some_layers_by_plain_hooks(folder: Path) -> None:
    flags = ("--sites", "kv", "--kv_layers", 0, 1, "--noise", "norm_matched", "--seeds", 1, "--answer_tokens", 4)
    assert command("--out", "x", *flags, "--places", 2) == 0
    rows = by_hand.table(folder / "x/positions.csv")
    assert [row["position"] for row in rows] == ["0", "13"] and {row["sd_over_seeds"] for row in rows} == {""}
    places: list[tuple[str, int | None]] = [(site, layer) for layer in (0, 1) for site in ("k", "v")]
    for row in rows:
        right = correct_by_hand(places, int(row["position"]), 0, matched=True)
        assert float(row["accuracy"]) == pytest.approx(100 * np.mean(right))


def test_the_verdicts_name_the_worst_token_of_every_site(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--out", "x", "--seeds", 1, "--sites", "resid", "embed", "--layers", 0, 3, "--places", 3) == 0
    out = capsys.readouterr().out
    facts = json.loads((folder / "x/summary.json").read_text())
    rows = by_hand.table(folder / "x/positions.csv")
    sites = list(dict.fromkeys(row["site"] for row in rows))
    assert sites == ["embed", "resid.0", "resid.3"] and len(facts["verdicts"]) == 3
    for site, line in zip(sites, facts["verdicts"], strict=True):
        worst = max((row for row in rows if row["site"] == site), key=lambda row: float(row["drop"]))
        words = f"largest drop is at token {worst['position']} ({worst['problems']} problems): {float(worst['drop']):.1f} points"
        assert line.startswith(f"{MODEL}, {site}: ") and words in line and line in out


def test_noise_that_breaks_the_text_is_not_called_causal() -> None:
    row = {
        "model": "m",
        "site": "embed",
        "position": 0,
        "problems": 9,
        "q": 0.1,
        "drop": 50.0,
        "low": 30.0,
        "high": 70.0,
    }
    (said,) = study.verdicts_of([{**row, "unparsed": 90.0}, {**row, "unparsed": 10.0, "drop": 40.0}])
    assert "1 of 2 tokens causal" in said and said.endswith("text broken, no verdict (90% of answers unparsed)")


def test_an_interrupted_run_goes_on_where_it_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--sites", "embed", "--seeds", 2, "--places", 2)
    kept = stop_at(monkeypatch, 5, Texts, "add")
    assert command("--out", "x", *flags) == 130
    assert command("--out", "x", *flags) == 0
    texts = 2 * sum(int(row["problems"]) for row in by_hand.table(folder / "x/positions.csv"))
    assert len(kept) == texts + 1  # the one that was interrupted is written again
    assert command("--out", "y", *flags) == 0
    assert (folder / "y/positions.csv").read_bytes() == (folder / "x/positions.csv").read_bytes()
    assert not (folder / "x/unfinished").exists()


def test_a_start_is_the_middle_layer_and_all_tokens() -> None:
    model, *_ = by_hand.blocks(MODEL, 0)
    specs = study.specs_of(study.Config(), model, 4)
    assert list(specs) == ["embed", "resid.2", "kv"]
    assert [spec.name for spec in specs["kv"]][:3] == [f"{at}.0,1@hub:noise/seed4" for at in ("k.0", "v.0", "k.1")]  # type: ignore[union-attr]
    assert len(specs["kv"]) == 2 * LAYERS  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--layers", "6"), "--layers 6: tiny-qwen2.5 has layers 0 to 5"),
        (("--kv_layers", "1", "9"), "--kv_layers 9: tiny-qwen2.5 has layers 0 to 5"),
        (("--kv_layers", "1", "1"), "--kv_layers names each once"),
        (("--sites", "mlp"), "invalid choice"),
        (("--seeds", "0"), "--seeds must be 1 or more"),
        (("--places", "0"), "--places must be 1 or more"),
        (("--min_problems", "1"), "--min_problems must be 2 or more"),
        (
            ("--min_problems", "9"),
            "--min_problems 9: there are only 6 problems; give a larger --limit, or --min_problems 6 or less.",
        ),
        (("--batch_size", "0"), "--batch_size must be 1 or more"),
        (("--answer_tokens", "300"), "generate fewer"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str
) -> None:
    try:
        code = command("--out", "x", *flags)
    except SystemExit as stopped:  # tyro's own
        code = stopped.code  # type: ignore[assignment]
    assert code == 2
    assert message in capsys.readouterr().err
    assert not [path for path in (folder / "x").rglob("*") if path.is_file() and "unfinished" not in path.parts]
