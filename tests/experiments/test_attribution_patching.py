"""The study of attribution patching against the plain engine and SciPy, cut short, and given bad input."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import attribution_patching as study
import numpy as np
import pytest
from scipy.stats import spearmanr

import pyvene_ext as px
from pyvene_ext.engine.plain import run
from pyvene_ext.intervenable.statistics import Reference
from pyvene_ext.io.cli import run as run_study
from pyvene_ext.methods.attribution.atp import atp, atp_star
from pyvene_ext.methods.attribution.edges import edge_attribution
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.sets import PromptSet
from pyvene_ext.prompts.shipped import PROMPTS
from pyvene_ext.runs import figures
from pyvene_ext.runs import folder as run_folder
from pyvene_ext.specs.joint import needs
from pyvene_ext.specs.patch import ActivationPatch
from tests.saved_models import save_random_model

ARRAYS = {f"{name}.npy" for name in ("exact", "atp", "qk_fix", "atp_star", "eap", "eap_ig_inputs")}
TABLES = {"nodes.csv", "edges.csv", "agreement.csv", "config.yaml", "summary.json"}
FIGURES = {
    *(f"figures/{score}_{site}.png" for score in ("exact", "atp", "atp_star") for site in "zqkv"),
    *(
        f"figures/{name}.png"
        for name in ("qk_fix_q", "qk_fix_k", "eap", "eap_ig_inputs", "eap_edges", "eap_ig_inputs_edges")
    ),
    *(f"figures/{score}_against_exact.png" for score in ("atp", "qk_fix", "atp_star")),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first shipped English pairs, in one of which the corrupt prompt is shorter."""
    pairs = json.loads((PROMPTS / "ioi_en.json").read_text(encoding="utf-8"))["pairs"][:4]
    pairs[1] |= {"corrupt": pairs[1]["corrupt"].removeprefix("When ")}
    path = tmp_path_factory.mktemp("data") / "few.json"
    path.write_text(json.dumps(pairs), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def random_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models with random weights, with the shipped tokenizer."""
    folders = {family: tmp_path_factory.mktemp(family) for family in ("gemma2", "gpt2")}
    for family, folder in folders.items():
        save_random_model(family, folder)
    return folders


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Nothing is drawn; the names of what would be."""
    saved: set[str] = set()
    monkeypatch.setattr(figures, "save", lambda _, path: saved.add(f"figures/{Path(path).name}"))
    return saved


def command(*flags: Any) -> int:
    return run_study(study.main, study.Config, [str(flag) for flag in flags])


def written(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("family", "direction"), [("gemma2", "noise"), ("gpt2", "denoise")])
def test_what_is_written_equals_the_plain_engine_and_the_library(
    family: str,
    direction: str,
    dataset: Path,
    random_models: dict[str, Path],
    tmp_path: Path,
    no_figures: set[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ("--model", random_models[family], "--dataset", dataset, "--out", tmp_path, "--direction", direction)
    assert command(*flags, "--steps", 2, "--batch_size", 2) == 0
    assert written(tmp_path) == ARRAYS | TABLES and no_figures == FIGURES

    model, tokenizer = load_model(random_models[family])
    pairs = json.loads(dataset.read_text(encoding="utf-8"))
    (tmp_path / "three.json").write_text(json.dumps([pairs[i] for i in (0, 2, 3)]), encoding="utf-8")
    prompt_set = PromptSet.load(tmp_path / "three.json")
    base, source = prompt_set.tokenize(tokenizer), prompt_set.tokenize(tokenizer, "corrupt")
    if direction == "denoise":
        base, source = source, base

    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["n"] == 3 and summary["n_dropped"] == 1 and summary["pairs"] == [0, 2, 3]
    heads, kv_heads = model.config.num_attention_heads, getattr(model.config, "num_key_value_heads", None) or 5
    names = [
        f"{s}.{x}.{h}"
        for s, n in zip("zqkv", (heads, heads, kv_heads, kv_heads), strict=True)
        for x in range(3)
        for h in range(n)
    ]
    names += [f"mlp_out.{layer}" for layer in range(3)]
    nodes = rows_of(tmp_path / "nodes.csv")
    assert [row["patch"] for row in nodes] == names

    patches = []
    for name in names:
        site, layer, *head = name.split(".")
        patches.append(ActivationPatch(site=site, layer=int(layer), heads=tuple(map(int, head)) or None))
    wanted = needs(patches)._asdict()
    exact = run(model, patches, base, reference=Reference.compute(model, source, **wanted), progress=False)
    scores = {name: np.load(tmp_path / f"{name}.npy") for name in ("exact", *study.ESTIMATES)}
    assert all(values.dtype == np.float32 for values in scores.values())
    np.testing.assert_allclose(scores["exact"], exact.delta, atol=1e-4)
    assert summary["mean_base"] == pytest.approx(exact.baseline.mean(), abs=1e-5)
    for name, expected in (
        ("atp", atp(model, patches, base, source, progress=False)),
        ("qk_fix", atp_star(model, patches, base, source, grad_drop=False, progress=False)),
        ("atp_star", atp_star(model, patches, base, source, progress=False)),
    ):
        np.testing.assert_allclose(scores[name], expected, atol=1e-5)
        sizes = [float(row[f"abs_{name}"]) for row in nodes]
        np.testing.assert_allclose(sizes, np.abs(expected).mean(1), atol=1e-5)

    found = {
        (row["estimate"], row["of"], row["site"]): float(row["spearman"]) for row in rows_of(tmp_path / "agreement.csv")
    }
    for site in ("all", *study.SITES):
        chosen = [i for i, name in enumerate(names) if site == "all" or name.startswith(f"{site}.")]
        for name in study.ESTIMATES:
            sizes = spearmanr(*(np.abs(scores[x][chosen]).mean(1, dtype=float) for x in (name, "exact"))).statistic
            assert found[name, "size", site] == pytest.approx(sizes)
            if name != "atp_star":
                signed = spearmanr(*(scores[x][chosen].mean(1, dtype=float) for x in (name, "exact"))).statistic
                assert found[name, "signed", site] == pytest.approx(signed)
    assert ("atp_star", "signed", "all") not in found

    for method in ("eap", "eap_ig_inputs"):
        expected = edge_attribution(model, base, source, method=method, steps=2, progress=False)  # type: ignore[arg-type]
        array = np.load(tmp_path / f"{method}.npy")
        np.testing.assert_allclose(array, expected.per_prompt, atol=1e-5, rtol=1e-4)
        assert summary["senders"] == list(map(str, expected.senders))
        assert summary["receivers"] == list(map(str, expected.receivers))
        means = {row["edge"]: float(row[method]) for row in rows_of(tmp_path / "edges.csv")}
        assert means == pytest.approx(dict(expected.ranked()), abs=1e-5)
        of_heads = [i for i, name in enumerate(summary["senders"]) if name.startswith("z.")]
        sums = np.nansum(array[of_heads], 1, dtype=float).mean(1)
        right = scores["exact"][: len(of_heads)].mean(1, dtype=float)
        assert found[f"{method}, summed", "signed", "z"] == pytest.approx(spearmanr(sums, right).statistic)
    shown = capsys.readouterr().out
    assert "3 pairs, 1 left out" in shown and f"{found['atp', 'signed', 'q']:.3f}" in shown and str(tmp_path) in shown


@pytest.mark.slow
def test_a_sample_of_nodes_is_patched_exactly_and_agreement_is_of_these(
    dataset: Path, random_models: dict[str, Path], tmp_path: Path, no_figures: set[str], capsys: pytest.CaptureFixture
) -> None:
    flags = ("--model", random_models["gemma2"], "--dataset", dataset, "--steps", 1, "--edges", "eap")
    assert command(*flags, "--out", tmp_path / "all") == 0
    assert "nodes patched exactly" in capsys.readouterr().out
    assert command(*flags, "--out", tmp_path / "some", "--exact", 15) == 0
    shown = capsys.readouterr().out
    everything, some = (np.load(tmp_path / name / "exact.npy") for name in ("all", "some"))
    checked = np.isfinite(some).all(1)
    assert np.isfinite(everything).all() and np.array_equal(np.isfinite(some).any(1), checked)
    np.testing.assert_allclose(some[checked], everything[checked], atol=1e-5)
    sites = np.array([row["site"] for row in rows_of(tmp_path / "some/nodes.csv")])
    assert {site: int(checked[sites == site].sum()) for site in study.SITES} == dict.fromkeys(study.SITES, 3)
    patches = [px.all_patches(load_model(random_models["gemma2"])[0].config, site) for site in study.SITES]
    other = study.sampled([patch for of_site in patches for patch in of_site], 15, seed=1)
    assert not np.array_equal(np.flatnonzero(checked), other), "another seed draws other nodes"

    estimate = np.load(tmp_path / "some/atp.npy")
    np.testing.assert_array_equal(estimate, np.load(tmp_path / "all/atp.npy"))
    expected = spearmanr(*(values[checked].mean(1, dtype=float) for values in (estimate, some))).statistic
    row = next(row for row in rows_of(tmp_path / "some/agreement.csv") if row["estimate"] == "atp")
    assert (row["of"], row["site"], int(row["n"])) == ("signed", "all", 15)
    assert float(row["spearman"]) == pytest.approx(expected)
    summary = json.loads((tmp_path / "some/summary.json").read_text(encoding="utf-8"))
    (evidence,) = summary["evidence"]
    assert evidence["interval"] == pytest.approx([expected, float(row["low"]), float(row["high"])])
    assert summary["n_exact"] == 15 and f"over 15 of {len(some)} nodes" in shown and "a larger --exact" in shown


@pytest.mark.slow
def test_on_a_shipped_model_it_writes_every_figure_and_nothing_stays_of_an_earlier_run(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("outputs/attribution_patching/tiny-qwen2.5_few")
    (folder / "figures").mkdir(parents=True)
    for name in ("eap_ig_activations.npy", "figures/eap_ig_activations.png"):
        (folder / name).write_bytes(b"")
    assert command("--dataset", dataset) == 0
    assert written(folder) == ARRAYS | TABLES | FIGURES | {name.replace(".png", ".pdf") for name in FIGURES}


@pytest.mark.slow
def test_the_same_config_gives_the_same(dataset: Path, tmp_path: Path, no_figures: set[str]) -> None:
    flags = ("--metric", "probability", "--edges", "eap_ig_activations", "--steps", 1, "--model", "tiny-llama3.1")
    assert command("--dataset", dataset, "--out", tmp_path / "a", *flags) == 0
    assert command("--config", tmp_path / "a/config.yaml", "--out", tmp_path / "b") == 0
    assert written(tmp_path / "a") == (ARRAYS | TABLES | {"eap_ig_activations.npy"}) - {"eap.npy", "eap_ig_inputs.npy"}
    for name in written(tmp_path / "a") - {"summary.json", "config.yaml"}:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_run_cut_short_has_no_summary_and_goes_on(
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_figures: set[str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "summary.json").write_text("{}", encoding="utf-8")  # of an earlier run

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_csv", killed)
        assert command("--dataset", dataset, "--out", tmp_path) == 130
    assert "summary.json" not in written(tmp_path)
    assert (tmp_path / "unfinished").is_dir()
    capfd.readouterr()
    assert command("--dataset", dataset, "--out", tmp_path) == 0
    assert "interventions x 3 prompts in" not in capfd.readouterr().err  # the sweep was not run again
    assert written(tmp_path) == ARRAYS | TABLES


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--steps", 0), "--steps must be 1 or more, not 0."),
        (("--batch_size", 0), "--batch_size must be 1 or more, not 0."),
        (("--limit", "-1"), "--limit must be 0 or more, not -1."),
        (("--exact", 14), "--exact must be 15 or more, not 14."),
        (("--edges", "eap", "eap"), "--edges names one or more, each once, not eap eap."),
        (("--memory", 0), "--memory must be above 0, in GiB"),
        (("--model", "tiny-qwen"), "tiny-qwen2.5"),
        (("--dataset", "ioi_enn"), "did you mean 'ioi_en'?"),
        (("--out", f"{__file__}/out"), "cannot be written"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(
    flags: tuple, said: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--dataset", dataset, "--out", tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and said in error
    assert not (tmp_path / "out").exists()


def test_pairs_without_a_partner_of_their_length_are_refused(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = json.loads(dataset.read_text(encoding="utf-8"))[1]
    for pairs, said in (([pair], "no pair of"), ([{**pair, "corrupt": None}], "has no corrupt text")):
        (tmp_path / "one.json").write_text(json.dumps(pairs), encoding="utf-8")
        assert command("--dataset", tmp_path / "one.json", "--out", tmp_path / "out") == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
