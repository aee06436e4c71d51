"""All studies in one go: each for real on few problems; and, with studies that only pretend, order, interruptions, errors."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from critical_heads import run_all as study

from pyvene_ext.io.cli import run as run_study
from pyvene_ext.io.cli import write_config
from pyvene_ext.io.files import write_json
from pyvene_ext.models import loading
from pyvene_ext.runs.plans import note_seconds
from pyvene_ext.stats import accuracy
from tests.tiers import first_only

FEW = {
    "ablate_heads": {"n_heads": [1], "scope": ["reasoning"], "random_sets": 1},
    "patch_hub": {"sites": ["embed"], "seeds": 1, "places": 2, "min_problems": 2},
    "force_attention": {"shapes": ["uniform"], "sweep": False},
    "transplant_head": {"n_heads": [1], "random_sets": 1, "fit_problems": 12, "alpha": 1.0},
    "probe_layers": {
        "positions": ["block_last"],
        "targets": ["answer"],
        "shuffles": 19,
        "min_problems": 10,
        "folds": 3,
    },
    "attribute_inputs": {"n_heads": 1, "random_heads": 0, "sample": 2, "shown": 1, "steps": 50},
    "stratify_difficulty": {"random_sets": 1, "quantiles": 2, "min_problems": 2},
}
NAMES = [
    "rank_heads",
    "ablate_heads",
    "patch_hub",
    "force_attention",
    "transplant_head_tiny-qwen2.5",
    "transplant_head_tiny-llama3.1",
    "probe_layers",
    "attribute_inputs",
    "stratify_difficulty",
]


WHY_NOT = study.why_not_transplanted


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(accuracy, "RESAMPLES", 100)
    Path("few.yaml").write_text(yaml.safe_dump(FEW))
    return tmp_path


def command(*flags: Any) -> int:
    return run_study(study.main, study.Config, ["--out", "out", *map(str, flags)])


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Studies that only write a config and a verdict; the names of those that ran."""
    ran: list[str] = []

    def run(part: study.Part) -> None:
        ran.append(part.folder.name)
        write_config(part.folder / "config.yaml", part.flags)
        write_json(part.folder / "summary.json", {"verdicts": [f"{part.folder.name} found"]})

    monkeypatch.setattr(study.Part, "run", run)
    monkeypatch.setattr(study.Part, "plan", lambda part: note_seconds(240.0))
    monkeypatch.setattr(study, "why_not_transplanted", lambda config, problems: "")
    return ran


@pytest.mark.slow
def test_every_study_runs_on_both_models_and_one_page_holds_them_all():
    assert command("--limit", 24, "--settings", "few.yaml") == 0
    summary = json.loads(Path("out/summary.json").read_text())
    assert (summary["done"], summary["failed"]) == (NAMES, {}) and summary["evidence"]
    page = Path("out/report.html").read_text(encoding="utf-8")
    for name in NAMES:
        assert f">{name}</h2>" in page
        config = yaml.safe_load(Path("out", name, "config.yaml").read_text())
        assert config["limit"] == 24 and set(config["models"]) <= {"tiny-qwen2.5", "tiny-llama3.1"}
        own = FEW.get(name.removesuffix("_tiny-qwen2.5").removesuffix("_tiny-llama3.1"), {})
        assert {flag: config[flag] for flag in own} == own
    with Path("out/verdicts.csv").open(encoding="utf-8") as file:
        rows = [(row["study"], row["verdict"]) for row in csv.DictReader(file)]
    assert rows == [
        (name, verdict)
        for name in NAMES
        for verdict in json.loads(Path("out", name, "summary.json").read_text()).get("verdicts", [])
    ]
    assert {name for name, _ in rows} >= {"ablate_heads", "patch_hub", "force_attention", "probe_layers"}
    assert not Path("out/unfinished.json").exists()


def test_heads_come_from_the_ranking_each_study_is_about(pretended):
    assert command("--by", "composite") == 0
    assert pretended == NAMES

    def flag(name: str, flag: str) -> Any:
        return yaml.safe_load(Path("out", name, "config.yaml").read_text())[flag]

    of = "out/rank_heads/heads/{}_{}.csv"
    both = [of.format(model, "composite") for model in ("tiny-qwen2.5", "tiny-llama3.1")]
    assert flag("ablate_heads", "rankings") == flag("stratify_difficulty", "rankings") == both
    assert flag("attribute_inputs", "rankings") == [path.replace("composite", "hub") for path in both]
    assert flag("transplant_head_tiny-qwen2.5", "models") == ["tiny-qwen2.5"]
    assert flag("transplant_head_tiny-qwen2.5", "donor") == "tiny-llama3.1"
    assert flag("transplant_head_tiny-qwen2.5", "rankings") == both[:1]
    assert flag("transplant_head_tiny-qwen2.5", "donor_ranking") == both[1]
    assert flag("transplant_head_tiny-llama3.1", "donor") == "tiny-qwen2.5"


def test_heads_that_the_settings_name_come_in_place_of_a_ranking(pretended):
    Path("own.yaml").write_text(
        "stratify_difficulty: {heads: ['1.2']}\ntransplant_head: {heads: ['0.1'], n_heads: [1]}\n"
    )
    assert command("--settings", "own.yaml") == 0
    config = yaml.safe_load(Path("out/stratify_difficulty/config.yaml").read_text())
    assert config["heads"] == ["1.2"] and config["rankings"] == []
    config = yaml.safe_load(Path("out/transplant_head_tiny-llama3.1/config.yaml").read_text())
    assert config["heads"] == ["0.1"] and config["donor_ranking"].endswith("tiny-qwen2.5_flow.csv")
    assert config["models"] == ["tiny-llama3.1"]


def test_rankings_are_made_where_they_are_needed(pretended):
    assert command("--only", "stratify_difficulty") == 0
    assert pretended == ["rank_heads", "stratify_difficulty"]
    pretended.clear()
    assert command("--only", "patch_hub") == 0
    assert pretended == ["patch_hub"]


def test_an_interrupted_run_goes_on_with_the_study_in_which_it_was(pretended, monkeypatch):
    whole = study.Part.run

    def killed(part: study.Part) -> None:
        if part.study == "force_attention":
            raise KeyboardInterrupt
        whole(part)

    monkeypatch.setattr(study.Part, "run", killed)
    assert command() == 130
    assert pretended == NAMES[:3] and not Path("out/summary.json").exists()
    monkeypatch.setattr(study.Part, "run", whole)
    assert command() == 0
    assert pretended == NAMES  # the first three only once
    assert command() == 0
    assert pretended == [*NAMES, *NAMES]  # a finished run is no half of another


def test_what_is_left_of_a_run_with_other_flags_is_not_taken(pretended, monkeypatch):
    whole = study.Part.run
    monkeypatch.setattr(study.Part, "run", lambda part: whole(part) if part.study == "rank_heads" else _stop())
    assert command("--limit", 30) == 130
    monkeypatch.setattr(study.Part, "run", whole)
    pretended.clear()
    assert command("--limit", 31) == 0
    assert pretended == NAMES


def test_what_is_left_of_a_run_on_other_problems_or_lost_is_not_taken(pretended, monkeypatch):
    whole = study.Part.run

    def until(last: str) -> None:
        monkeypatch.setattr(study.Part, "run", lambda part: _stop() if part.study == last else whole(part))

    one, other = ({"question": f"Ann has {n} pens?", "answer": f"#### {n}"} for n in (3, 4))
    Path("p.jsonl").write_text(json.dumps(one) + "\n")
    until("patch_hub")
    assert command("--problems", "p.jsonl") == 130
    Path("p.jsonl").write_text(json.dumps(other) + "\n")
    assert command("--problems", "p.jsonl") == 130
    assert pretended == 2 * NAMES[:2]
    Path("out/ablate_heads/summary.json").unlink()
    until("force_attention")
    assert command("--problems", "p.jsonl") == 130
    assert pretended == [*NAMES[:2], *NAMES[:2], "ablate_heads", "patch_hub"]


def test_problems_that_cannot_be_read_are_said_once_before_anything_runs(pretended, capsys):
    Path("p.jsonl").write_text('{"question": "Ann has 3 pens?", "answer": "3"}\n')
    assert command("--problems", "p.jsonl") == 2
    assert "p.jsonl, line 1: the answer has no ####" in capsys.readouterr().err
    assert not pretended and not Path("out/rank_heads").exists()
    Path("own.yaml").write_text("rank_heads: {top: 0}\n")
    assert command("--settings", "own.yaml") == 2
    assert "--top must be 1 or more, not 0." in capsys.readouterr().err and not pretended


@pytest.mark.parametrize("text", first_only(['{"done": 3, "facts": "x"}', '{"facts": 1}', "", "{", "[1]", "[" * 9999]))
def test_what_is_left_of_a_run_may_be_damaged(pretended, text):
    Path("out").mkdir()
    Path("out/unfinished.json").write_text(text)
    assert command() == 0
    assert pretended == NAMES


def _stop() -> None:
    raise KeyboardInterrupt


def test_a_study_that_cannot_be_done_says_why_and_the_others_go_on(pretended, monkeypatch, capsys):
    whole = study.Part.run

    def fails(part: study.Part) -> None:
        if part.study == "probe_layers":
            raise ValueError("there are too few\nproblems.")
        whole(part)

    monkeypatch.setattr(study.Part, "run", fails)
    assert command() == 0
    summary = json.loads(Path("out/summary.json").read_text())
    assert summary["failed"] == {"probe_layers": "there are too few problems."}
    assert summary["done"] == [name for name in NAMES if name != "probe_layers"]
    assert "probe_layers: not done: there are too few problems." in capsys.readouterr().out
    monkeypatch.setattr(study.Part, "run", lambda part: (_ for _ in ()).throw(ValueError("nothing works")))
    assert command() == 2


@pytest.mark.parametrize(
    ("flags", "text", "message"),
    [
        (("--models", "tiny-qwen2.5"), "", "two models"),
        (("--models", "tiny-qwen2.5", "x/tiny-qwen2.5"), "", "each once"),
        (("--only", "patch_hub", "patch_hub"), "", "each once"),
        (("--limit", "-1"), "", "--limit must be 0 or more"),
        (("--settings", "no.yaml"), "", "no.yaml"),
        (("--settings", "own.yaml"), "a: [", "not valid YAML"),
        (("--settings", "own.yaml"), "no_study: {a: 1}", "flags by study"),
        (("--settings", "own.yaml"), "patch_hub: 3", "flags by study"),
        (
            ("--settings", "own.yaml"),
            "patch_hub: {sedes: 3}",
            "patch_hub has an unknown flag 'sedes'; did you mean 'seeds'?",
        ),
        (("--settings", "own.yaml"), "patch_hub: {seeds: many}", "patch_hub: seeds"),
        (("--settings", "own.yaml"), "patch_hub: {seeds: 0}", "--seeds must be 1 or more"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_runs(pretended, capsys, flags, text, message):
    Path("own.yaml").write_text(text)
    assert command(*flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("error: ")
    assert pretended == [] and not Path("out").exists()


def test_a_dry_run_asks_every_study_for_its_plan_and_writes_nothing(
    folder: Path, pretended: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags: list[Any] = []
    monkeypatch.setattr(study.Part, "plan", lambda part: flags.append(part.flags))
    before = sorted(folder.rglob("*"))
    assert command("--dry_run", "--limit", 30) == 0
    assert len(flags) == len(NAMES) and all(one.dry_run for one in flags)
    assert not any(getattr(one, "rankings", ()) for one in flags), "there are none yet"
    assert (
        sorted(folder.rglob("*")) == before and "9 studies of tiny-qwen2.5 and tiny-llama3.1" in capsys.readouterr().out
    )


def test_the_sum_of_all_studies_is_said_before_the_first_runs(
    pretended: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command() == 0
    said, _, rest = capsys.readouterr().out.partition("\n=== rank_heads (1 of 9)")
    assert "patch_hub: about 4 minutes" in said and said.endswith("\nall together: at most about 36 minutes\n") and rest
    assert command("--dry_run") == 0
    assert capsys.readouterr().out.endswith("\nall together: at most about 36 minutes\n") and len(pretended) == 9


def test_models_are_loaded_once_for_all_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    load = loading.load_model
    monkeypatch.setattr(loading, "load_model", lambda name, **how: (loaded.append(name), load(name, **how))[1])
    assert command("--dry_run", "--limit", 30) == 0
    assert sorted(loaded) == ["tiny-llama3.1", "tiny-qwen2.5"]


def test_heads_are_not_transplanted_between_models_that_cut_texts_differently(
    pretended: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = loading.load_model

    def other_tokens(name: str, **how: Any) -> Any:
        model, tokenizer = load(name, **how)
        return model, load("tiny-circuit")[1] if name == "tiny-llama3.1" else tokenizer

    monkeypatch.setattr(loading, "load_model", other_tokens)
    monkeypatch.setattr(study, "why_not_transplanted", WHY_NOT)
    assert command() == 0
    out = capsys.readouterr().out
    assert pretended == [name for name in NAMES if not name.startswith("transplant_head")]
    assert "left out: transplant_head_tiny-qwen2.5, transplant_head_tiny-llama3.1: t" in out.partition("\n===")[0]
    assert set(json.loads(Path("out/summary.json").read_text())["failed"]) == set(NAMES) - set(pretended)


def test_the_evidence_of_all_studies_is_shown_at_the_end(
    folder: Path, pretended: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(part: study.Part) -> None:
        write_config(part.folder / "config.yaml", part.flags)
        own = study.px.runs.Evidence(
            "7 problems", "something", study.px.Interval(2.0, float("nan"), 3.0), "none", "more"
        )
        write_json(part.folder / "summary.json", {"evidence": [own.facts]})

    monkeypatch.setattr(study.Part, "run", run)
    assert command("--only", "rank_heads", "patch_hub") == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("evidence: ")]
    assert [line.partition(" 2, without an interval")[0] for line in said] == [
        f"evidence: 7 problems; {name}: something" for name in ("rank_heads", "patch_hub")
    ]
