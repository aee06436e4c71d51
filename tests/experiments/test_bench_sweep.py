"""The benchmark: its bound against a count by hand, its engines against single-prompt hooks, its files, and bad input."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import bench_sweep as bench
import numpy as np
import pytest
import torch
import yaml

from pyvene_ext.io.cli import run as run_study
from pyvene_ext.specs.ablation import Ablation, donors
from tests.ground_truth import ablations as slow
from tests.tiers import first_only

SMALL = ("--layers", 3, "--hidden", 24, "--heads", 4, "--kv_heads", 2, "--d_mlp", 17, "--vocab", 41)
FEW = ("--prompts", 3, "--tokens", 5, "--threads", 1)
CONFIG = bench.Config(layers=3, hidden=24, heads=4, kv_heads=2, d_mlp=17, vocab=41, prompts=3, tokens=5, device="cpu")
FAMILIES = {
    "default": CONFIG,
    "gemma-2-2b": bench.dataclasses.replace(CONFIG, size="gemma-2-2b"),
    "llama-3.1-8b": bench.dataclasses.replace(CONFIG, size="llama-3.1-8b"),
}


def command(*flags: Any) -> int:
    return run_study(bench.main, bench.Config, [str(flag) for flag in flags])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in this process, timed no longer than it takes."""

    def here(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
        return {**function(*arguments), "startup": 0.0}

    monkeypatch.setattr(bench, "in_a_process_of_its_own", here)
    monkeypatch.setattr(bench, "LONG_ENOUGH", 1e-9)
    monkeypatch.setattr(bench.gc, "collect", lambda: 0)  # slow beside all that a test session holds


# -- the bound ---------------------------------------------------------------------------------------------------------

PROMPTS, TOKENS, D, HEADS, KV, D_HEAD, MLP = 3, 5, 24, 4, 2, 6, 17


def products(tokens: float, width: int, out: int) -> float:
    """A matrix product for this many tokens of every prompt; a multiplication and an addition are two operations."""
    return 2 * PROMPTS * tokens * width * out


def by_hand(tokens: float, kv_tokens: float | None = None) -> float:
    """One layer for this many tokens of every prompt, keys and values for so many; queries see every token."""
    kv = products(tokens if kv_tokens is None else kv_tokens, D, 2 * KV * D_HEAD)
    attention = 2 * HEADS * products(tokens, D_HEAD, TOKENS)  # scores, then values
    return kv + products(tokens, D, HEADS * D_HEAD) + attention + products(tokens, HEADS * D_HEAD, D) + mlp(tokens)


def mlp(tokens: float) -> float:
    return 3 * products(tokens, D, MLP)


PLAIN = 3 * by_hand(TOKENS) + products(TOKENS, D, 41)
HEAD = products(1, D_HEAD, D)
LAST = by_hand(1, kv_tokens=5)  # the last layer, where all tokens have changed


@cache
def pieces_of_config() -> bench.Pieces:
    return bench.count_pieces(bench.model_config(CONFIG), PROMPTS, TOKENS)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (Ablation(kind="zero", site="z", layer=0, heads=(1,)), 5 * HEAD + mlp(5) + by_hand(5) + LAST),
        (Ablation(kind="mean", site="z", layer=1, heads=(1,)), 5 * HEAD + mlp(5) + LAST),
        (Ablation(kind="resample", site="z", layer=2, heads=(3,)), HEAD + mlp(1)),
        (Ablation(kind="zero", site="z", layer=0, heads=(0,), positions="last"), HEAD + mlp(1) + 2 * by_hand(1)),
        (Ablation(kind="zero", site="z", layer=2, heads=(0,), positions="last"), HEAD + mlp(1)),
        (Ablation(kind="zero", site="mlp_out", layer=0, positions=(2,)), by_hand(3) + by_hand(1, kv_tokens=3)),
        (Ablation(kind="zero", site="resid_post", layer=1, positions=(0,)), LAST),
        (Ablation(kind="zero", site="resid_mid", layer=1, positions=(3,)), mlp(2) + by_hand(1, kv_tokens=2)),
        (Ablation(kind="zero", site="resid_mid", layer=2, positions=(4,)), mlp(1)),
        (Ablation(kind="zero", site="resid_mid", layer=2, positions=(3,)), 0),
        (Ablation(kind="zero", site="mlp_out", layer=2, positions=(4,)), 0),
        (Ablation(kind="zero", site="resid_pre", layer=1, positions=(3,)), by_hand(2) + by_hand(1, kv_tokens=2)),
        (Ablation(kind="zero", site="resid_pre", layer=2, positions=(1,)), by_hand(1, kv_tokens=4)),
    ],
    ids=lambda value: value.name if isinstance(value, Ablation) else "",
)
def test_the_bound_of_an_intervention_is_the_count_by_hand(spec: Ablation, expected: float) -> None:
    pieces = pieces_of_config()
    assert pieces.plain == PLAIN
    assert bench.own_arithmetic(spec, pieces, TOKENS) == pytest.approx(expected)
    clean = 3 * by_hand(TOKENS)
    assert bench.bound([spec], pieces, CONFIG) == pytest.approx((clean + expected) / PLAIN)


def test_the_clean_run_is_shared_by_all_interventions() -> None:
    pieces = pieces_of_config()
    specs = bench.workload("a", bench.model_config(CONFIG), TOKENS)
    own = np.mean([bench.own_arithmetic(spec, pieces, TOKENS) for spec in specs])
    assert len(specs) == 12
    assert bench.bound(specs, pieces, CONFIG) == pytest.approx((3 * by_hand(TOKENS) / 12 + own) / PLAIN)


@pytest.mark.slow
@pytest.mark.parametrize(("letter", "expected"), [("a", 0.444), ("b", 0.0177)])
def test_the_bounds_at_the_default_size(letter: bench.Letter, expected: float) -> None:
    config = bench.Config()
    shape = bench.model_config(config)
    pieces = bench.count_pieces(shape, config.prompts, config.tokens)
    found = bench.bound(bench.workload(letter, shape, config.tokens), pieces, config)
    assert found == pytest.approx(expected, rel=3e-3)


# -- the engines -------------------------------------------------------------------------------------------------------


def expected_values(case: bench.Case, spec: Ablation) -> np.ndarray:
    """The logit difference of every prompt, one at a time, by the hooks of the other tests."""
    model, prompts = case.model, case.prompts
    layer, tokens = spec.layer or 0, list(range(*bench.columns(spec, case.tokens).indices(case.tokens)))

    z = [slow.activation(model, ids, "z", layer) for ids in prompts.input_ids]
    givers = donors(prompts, prompts, spec.positions, spec.seed) if spec.kind == "resample" else []

    def new(x: torch.Tensor, prompt: int) -> torch.Tensor:
        if spec.kind == "zero":
            return torch.zeros_like(x)
        return z[givers[prompt]] if spec.kind == "resample" else slow.statistics(z)[0].expand_as(x)

    values = []
    for prompt, (ids, (io, s)) in enumerate(zip(prompts.input_ids, prompts.answer_ids, strict=True)):
        change = slow.replaced(tokens, spec.heads, lambda x, prompt=prompt: new(x, prompt))
        logits = slow.logits(model, ids, [(spec.site, layer, change)])[-1]
        values.append(float(logits[io] - logits[s]))
    return np.array(values)


@pytest.mark.parametrize(
    "size", ["default", *(pytest.param(size, marks=pytest.mark.slow) for size in list(FAMILIES)[1:])]
)
@pytest.mark.parametrize("letter", first_only("abcd"))
def test_every_engine_here_gives_the_results_of_single_prompts(
    size: str, letter: bench.Letter, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, make = FAMILIES[size], bench.make_case

    def louder(config: bench.Config) -> bench.Case:
        """Weights that make every intervention count."""
        case = make(config)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in case.model.named_parameters():
                parameter.copy_(0.3 * torch.randn_like(parameter) + ("norm" in name))
        return case

    monkeypatch.setattr(bench, "make_case", louder)
    case = louder(config)
    specs = bench.workload(letter, case.model.config, config.tokens)
    specs = [specs[i] for i in bench.draw(specs, 12, config)]
    expected = np.stack([expected_values(case, spec) for spec in specs])
    clean = expected_values(case, Ablation(kind="zero", site="mlp_out", layer=2, positions=(0,)))  # changes nothing
    effects = np.abs(expected - clean).max(1)
    assert (effects > 1e-2).sum() >= 8 and len({spec.kind for spec in specs}) == (2 if letter == "c" else 1)
    for engine in (bench.HOOKS, "pyvene", bench.OURS):
        timing = bench.measure(config, engine, {letter: specs})["workloads"][letter]
        np.testing.assert_allclose(timing["values"], expected, atol=1e-4, rtol=1e-5, err_msg=engine)
        assert timing["n"] == 12 and min(timing["seconds"]) > 0 and min(timing["plain"]) > 0


def test_no_engine_leaves_a_hook_on_the_model() -> None:
    case = bench.make_case(CONFIG)
    specs = bench.workload("d", case.model.config, CONFIG.tokens)[::9]
    with torch.inference_mode():
        before = case.plain()
        last_logits = bench.bare_hooks(case, specs)
        for spec in specs:
            last_logits(spec)
        assert torch.equal(case.plain(), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in case.model.modules())


def test_a_twin_has_the_same_weights_in_other_modules() -> None:
    case = bench.make_case(CONFIG)
    twin = case.twin()
    assert all(a is b for a, b in zip(case.model.parameters(), twin.parameters(), strict=True))
    assert not set(map(id, case.model.modules())) & set(map(id, twin.modules()))


# -- samples, budgets, slopes ------------------------------------------------------------------------------------------


def test_a_draw_takes_one_of_each_stretch_and_all_if_there_are_no_more() -> None:
    specs = bench.workload("a", bench.model_config(CONFIG), 5)
    assert bench.draw(specs, 12, CONFIG) == bench.draw(specs, 99, CONFIG) == list(range(12))
    drawn = bench.draw(specs, 5, CONFIG, "a")
    assert drawn == bench.draw(specs, 5, CONFIG, "a") == sorted(set(drawn))
    assert [index in range(i * 12 // 5, (i + 1) * 12 // 5) for i, index in enumerate(drawn)] == [True] * 5


def test_what_does_not_fit_the_budget_is_cut_c_and_d_first() -> None:
    sizes: dict[bench.Letter, int] = {"a": 100, "b": 100, "c": 200, "d": 1000}
    costs: dict[bench.Letter, float] = {"a": 1.0, "b": 0.1, "c": 1.0, "d": 0.5}
    assert bench.affordable(sizes, costs, 10_000, least=10) == sizes
    assert bench.affordable(sizes, costs, 165, least=10) == {"a": 100, "b": 100, "c": 30, "d": 50}
    assert bench.affordable(sizes, costs, 75, least=10) == {"a": 50, "b": 100, "c": 10, "d": 10}
    assert bench.affordable(sizes, costs, -1, least=10) == dict.fromkeys("abcd", 10)


def test_slopes_are_those_of_log_time_against_log_size() -> None:
    def points(axis: str, power: float, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
        return [{"axis": axis, axis: size, "seconds": 3 * size**power} for size in sizes]

    fitted = bench.slopes(
        points("prompts", 1, (2, 4, 8)) + points("heads", 0.5, (2, 4, 8, 16)) + points("tokens", 1, (5,))
    )
    assert fitted["prompts"]["slope"] == pytest.approx(1) and fitted["heads"]["slope"] == pytest.approx(0.5)
    assert fitted["tokens"]["slope"] is None and len(fitted["heads"]["points"]) == 4


# -- the whole ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_process_of_its_own_measures_the_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = bench.workload("b", bench.model_config(CONFIG), CONFIG.tokens)[:2]
    config = bench.dataclasses.replace(CONFIG, threads=1)
    there = bench.in_a_process_of_its_own(bench.measure, config, bench.HOOKS, {"b": specs})
    monkeypatch.setattr(bench, "LONG_ENOUGH", 1e-9)
    here = bench.measure(config, bench.HOOKS, {"b": specs})
    assert there["metadata"]["weight_hash"] == here["metadata"]["weight_hash"]
    np.testing.assert_allclose(there["workloads"]["b"]["values"], here["workloads"]["b"]["values"], atol=1e-5)
    assert there["startup"] > 0 and there["threads"] == 1


def test_a_run_writes_results_a_table_and_its_config(
    tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench"
    assert command(*SMALL, *FEW, "--workload", "b", "--sample", 2, "--memory", 0.1, "--out", out) == 0
    assert sorted(path.name for path in out.iterdir()) == ["config.yaml", "result.json", "table.md"]
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    rows = {row["engine"]: row for row in result["results"]}
    assert {bench.HOOKS, "pyvene", bench.OURS} <= set(rows)
    assert rows[bench.HOOKS]["difference"] == 0 and rows[bench.HOOKS]["faster_than_hooks"] == 1
    assert (rows[bench.HOOKS]["n"], rows[bench.OURS]["n"], rows[bench.OURS]["of"]) == (2, 12, 12)
    for row in rows.values():
        assert row["difference"] < 1e-4 and 0 < row["bound"] < 1
        assert row["ratio"] == pytest.approx(row["seconds"] / row["plain_seconds"])
        assert row["peak_memory"] is None or row["peak_memory"] > 2**20
    assert {"processor", "cores", "threads", "gpu", "torch"} == set(result["machine"])
    assert result["machine"]["threads"] == 1 and result["weight_hash"] and result["flops"]["plain"] == PLAIN
    table = (out / "table.md").read_text(encoding="utf-8")
    assert table.strip() in capsys.readouterr().out
    assert all(f"| (b) | {engine} |" in table for engine in rows) and "| all 12 |" in table
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert saved["workload"] == ["b"] and saved["heads"] == 4 and saved["device"] in ("cpu", "cuda")


def test_a_pretrained_model_is_measured_with_its_own_weights(tmp_path: Path, quick: None) -> None:
    flags = ("--model", "tiny-llama3.1", "--tokens", 5, "--prompts", 2, "--workload", "b", "--sample", 2)
    assert command(*flags, "--threads", 1, "--processor_time", "--out", tmp_path / "bench") == 0
    result = json.loads((tmp_path / "bench/result.json").read_text(encoding="utf-8"))
    assert result["weight_hash"] == bench.metadata(bench.px.load_model("tiny-llama3.1")[0])["weight_hash"]
    assert all(row["difference"] < 1e-4 for row in result["results"]) and result["results"][0]["of"] == 32
    assert "float32, tiny-llama3.1; 2 prompts" in (tmp_path / "bench/table.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_config_yaml_runs_the_same_again(tmp_path: Path, quick: None) -> None:
    assert command(*SMALL, *FEW, "--workload", "a", "d", "--budget_minutes", 1, "--out", tmp_path / "one") == 0
    again = ("--config", tmp_path / "one/config.yaml", "--out", tmp_path / "two")
    assert command(*again) == 0
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert one["weight_hash"] == two["weight_hash"]
    same = ("workload", "engine", "n", "of", "bound")
    assert [[row[name] for name in same] for row in one["results"]] == [
        [row[name] for name in same] for row in two["results"]
    ]


def test_what_the_budget_cannot_hold_is_cut_and_said(tmp_path: Path, quick: None) -> None:
    out = tmp_path / "bench"
    flags = ("--workload", "a", "b", "--sample", 2, "--budget_minutes", 1e-4, "--out", out)
    assert command(*SMALL, *FEW, *flags) == 0
    rows = json.loads((out / "result.json").read_text())["results"]
    assert all(row["n"] < row["of"] for row in rows) and "| all " not in (out / "table.md").read_text()


def test_an_engine_that_fails_is_noted_and_the_rest_goes_on(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(case: bench.Case, specs: Any) -> Any:
        raise RuntimeError("does not\nwork here")

    others = {
        bench.HOOKS: bench.OTHERS[bench.HOOKS],
        "broken": ("torch", broken),
        "absent": ("no_such_package", broken),
    }
    monkeypatch.setattr(bench, "OTHERS", others)
    assert command(*SMALL, *FEW, "--workload", "b", "--out", tmp_path / "bench") == 0
    result = json.loads((tmp_path / "bench/result.json").read_text())
    assert result["notes"] == ["broken failed: does not work here", "absent is not installed."]
    assert [row["engine"] for row in result["results"]] == [bench.HOOKS, bench.OURS]
    assert "broken failed: does not work here" in (tmp_path / "bench/table.md").read_text()


@pytest.mark.slow
def test_growth_is_measured_against_prompts_heads_and_lengths(tmp_path: Path, quick: None) -> None:
    flags = (*SMALL, "--prompts", 8, "--tokens", 4, "--threads", 1, "--growth")
    assert command(*flags, "--out", tmp_path / "growth") == 0
    growth = json.loads((tmp_path / "growth/result.json").read_text())["growth"]
    sizes = {
        axis: [(point["prompts"], point["tokens"], point["heads"]) for point in fitted["points"]]
        for axis, fitted in growth.items()
    }
    assert sizes["prompts"] == [(8, 4, 12), (16, 4, 12), (32, 4, 12), (64, 4, 12)]
    assert sizes["heads"] == [(8, 4, 1), (8, 4, 3), (8, 4, 6), (8, 4, 12)]
    assert sizes["tokens"] == [(8, 4, 12), (4, 8, 12), (2, 16, 12), (1, 32, 12)]
    assert all(np.isfinite(fitted["slope"]) for fitted in growth.values())
    assert "| tokens | 1 | 32 | 12 |" in (tmp_path / "growth/table.md").read_text()


# -- bad input ---------------------------------------------------------------------------------------------------------


@contextmanager
def untouched(folder: Path) -> Iterator[None]:
    before = sorted(folder.rglob("*"))
    yield
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--prompts", 0), "--prompts must be 1 or more, not 0"),
        (("--layers", 0), "--layers must be 1 or more, not 0"),
        (("--sample", 0), "--sample must be 1 or more, not 0"),
        (("--budget_minutes", 0), "--budget_minutes must be above 0, not 0.0."),
        (("--memory", -1), "--memory must be above 0, in GiB, not -1.0."),
        (("--threads", 0), "--threads must be 1 or more, not 0."),
        (("--heads", 13), "--heads 13 must be a multiple of --kv_heads 2 and divide --hidden 896 into even parts"),
        (("--hidden", 42, "--heads", 14), "into even parts"),
        (("--vocab", 3), "--vocab must be 4 or more"),
        (("--model", "tiny-llama3.1", "--layers", 3), "--model has a size of its own"),
        (("--workload", "a", "a"), "--workload names one or more, each once, not a a."),
        (("--device", "nonsense"), "--device nonsense cannot be used here"),
        ((*SMALL, "--prompts", 1), "prompt 0 cannot be resampled"),
        (("--out", __file__), "is not a folder one may write in"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    flags: tuple[Any, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "in_a_process_of_its_own", lambda *_: pytest.fail("it ran"))
    with untouched(tmp_path):
        assert command(*flags) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
