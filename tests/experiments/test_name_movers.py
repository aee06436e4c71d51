"""The name-mover study against a hand recomputation on a shipped model, what it finds on all of them, and bad input."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import name_movers as study
import numpy as np
import pytest
import torch
import yaml
from scipy.stats import pearsonr

import pyvene_ext as px
from pyvene_ext.io.cli import run as run_study
from pyvene_ext.methods.heads import name_roles
from pyvene_ext.methods.heads.lens import direct_logit_attribution
from pyvene_ext.methods.patching.patch import patch
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.sets import PromptSet
from pyvene_ext.prompts.shipped import PROMPTS
from pyvene_ext.runs import figures
from pyvene_ext.runs import folder as folders
from pyvene_ext.specs.path import PathPatch

N = 6
NAMED = 40  # prompts on which the shipped models' heads are judged


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with the first shipped prompts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "RESAMPLES", 100)
    monkeypatch.setattr(study, "SHOWN", 2)
    for name, count in (("few", N), ("ioi", NAMED)):
        save(shipped("ioi_en")[:count], tmp_path / f"{name}.json")
    save(shipped("recent_tiny")[:NAMED], tmp_path / "recent.json")
    return tmp_path


def shipped(name: str) -> list[dict[str, Any]]:
    return json.loads((PROMPTS / f"{name}.json").read_text(encoding="utf-8"))["pairs"]


def save(pairs: list[dict[str, Any]], path: str | Path) -> None:
    Path(path).write_text(json.dumps(pairs), encoding="utf-8")


def command(*flags: Any) -> int:
    return run_study(study.main, study.Config, [str(flag) for flag in flags])


def table(path: str | Path) -> list[dict[str, str]]:
    with Path(path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def heads_in(out: str | Path) -> dict[tuple[int, int], dict[str, Any]]:
    """heads.csv by head, numbers as numbers."""
    return {
        (int(row["layer"]), int(row["head"])): {
            name: value if name == "role" else float(value or "nan") for name, value in row.items()
        }
        for row in table(Path(out) / "heads.csv")
    }


def facts_in(out: str | Path) -> dict[str, Any]:
    return json.loads((Path(out) / "summary.json").read_text(encoding="utf-8"))


# -- the numbers -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(pairs: list[dict[str, Any]], head: tuple[int, int]) -> dict[str, np.ndarray]:
    """Of one head of tiny-qwen2.5, one prompt at a time: both axes for IO and S, where it looks, and the copied names' ranks."""
    model, tokenizer = load_model("tiny-qwen2.5", attn_implementation="eager")
    layer, number = head
    config, block = model.config, model.model.layers[layer]
    size = config.hidden_size // config.num_attention_heads
    kv_head = number // (config.num_attention_heads // config.num_key_value_heads)
    own, own_kv = slice(number * size, (number + 1) * size), slice(kv_head * size, (kv_head + 1) * size)
    weight = block.self_attn.o_proj.weight[:, own]
    found: dict[str, list[Any]] = {
        "attention": [],
        "projection": [],
        "s2": [],
        "first": [],
        "ranks": [],
        "negative": [],
        "own_ranks": [],
        "own_negative": [],
    }
    for pair in pairs:
        ids = tokenizer(pair["clean"])["input_ids"]
        io, s = (tokenizer(pair[name], add_special_tokens=False)["input_ids"][0] for name in ("io_name", "s_name"))
        z: list[torch.Tensor] = []
        handle = block.self_attn.o_proj.register_forward_pre_hook(lambda _, args, z=z: z.append(args[0][0, -1]))
        output = model(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
        handle.remove()
        row = output.attentions[layer][0, number, -1].numpy()
        found["attention"].append([row[[i for i, token in enumerate(ids) if token == name]].sum() for name in (io, s)])
        found["projection"].append([float(z[0][own] @ weight.T @ model.lm_head.weight[name]) for name in (io, s)])
        found["s2"].append(row[max(i for i, token in enumerate(ids) if token == s)])
        found["first"].append(row[0])
        for depth, sign, kind in (
            (1, 1, "ranks"), (1, -1, "negative"), (layer, 1, "own_ranks"), (layer, -1, "own_negative"),
        ):  # fmt: skip
            ranks = []
            mentions = [ids.index(io), ids.index(s), max(i for i, token in enumerate(ids) if token == s)]
            for token in mentions:
                x = block.input_layernorm(output.hidden_states[depth][0, token])
                v = block.self_attn.v_proj(x)[own_kv]
                logits = model.lm_head(model.model.norm(sign * (weight @ v)))
                ranks.append(int((logits >= logits[ids[token]]).sum()))
            found[kind].append(ranks)
    return {name: np.array(value) for name, value in found.items()}


@pytest.mark.parametrize("head", [(4, 0), pytest.param((2, 5), marks=pytest.mark.slow)])
def test_arrays_and_tables_equal_a_hand_recomputation(head: tuple[int, int]) -> None:
    wanted = by_hand(shipped("ioi_en")[:N], head)
    assert command("--dataset", "few.json", "--out", "x", "--batch_size", 4, "--top", 3) == 0
    facts = facts_in("x")
    assert facts["kinds"] == ["io", "s", "s1", "s2"] and facts["pooled_kinds"] == ["io", "s"] and facts["n"] == N
    attention, projection, looks, ranks = (
        np.load(f"x/{name}.npy") for name in ("attention", "projection", "looks", "copy_ranks")
    )
    np.testing.assert_allclose(attention[:2, *head].T, wanted["attention"], atol=1e-5)
    np.testing.assert_allclose(attention[3, *head], wanted["s2"], atol=1e-5)
    np.testing.assert_allclose(attention[1], attention[2] + attention[3], atol=1e-5)
    np.testing.assert_allclose(projection[:2, *head].T, wanted["projection"], atol=1e-4)
    np.testing.assert_array_equal(projection[1], projection[2])
    assert facts["places"] == ["io", "s1", "s2", "first", "end-1", "end", "other"]
    np.testing.assert_allclose(looks.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(looks[0, 3, *head], wanted["first"], atol=1e-5)
    assert facts["copy_places"] == ["io", "s1", "s2"]
    np.testing.assert_array_equal(ranks[0, 0, 0, *head].T, wanted["ranks"].clip(max=101))
    np.testing.assert_array_equal(ranks[0, 1, 0, *head].T, wanted["negative"].clip(max=101))
    np.testing.assert_array_equal(ranks[2, 0, 0, *head].T, wanted["own_ranks"].clip(max=101))
    np.testing.assert_array_equal(ranks[2, 1, 0, *head].T, wanted["own_negative"].clip(max=101))

    row = heads_in("x")[head]
    assert row["copy"] == pytest.approx((wanted["ranks"] <= 3).mean())
    assert row["copy_negative"] == pytest.approx((wanted["negative"] <= 3).mean())
    assert row["copy_own"] == pytest.approx((wanted["own_ranks"] <= 3).mean())
    assert row["copy_own_negative"] == pytest.approx((wanted["own_negative"] <= 3).mean())
    assert row["copy_own_control"] == pytest.approx((ranks[2, 0, 1, *head] <= 3).mean())
    assert row["copy_control"] == pytest.approx((ranks[0, 0, 1, *head] <= 3).mean())
    assert row["copy_embed_negative"] == pytest.approx((ranks[1, 1, 0, *head] <= 3).mean())
    assert row["attention_s"] == pytest.approx(wanted["attention"][:, 1].mean(), abs=1e-5)
    for kind, x, y in (
        ("io", wanted["attention"][:, 0], wanted["projection"][:, 0]),
        ("pooled", wanted["attention"].T.ravel(), wanted["projection"].T.ravel()),
    ):
        r, p = pearsonr(x, y)
        if kind == "io":  # of six prompts p is exact: the share of orders whose |r| is as large
            orders = [abs(np.corrcoef(x, np.array(order))[0, 1]) for order in itertools.permutations(y)]
            p = np.mean(np.array(orders) >= abs(r) - 1e-9)
        assert row[f"r_{kind}"] == pytest.approx(r, abs=1e-3) and row[f"p_{kind}"] == pytest.approx(p, abs=1e-3)
        (of_kind,) = [
            line
            for line in table("x/correlations.csv")
            if (int(line["layer"]), int(line["head"]), line["kind"]) == (*head, kind)
        ]
        assert float(of_kind["r"]) == pytest.approx(r, abs=1e-3) and int(of_kind["n"]) == len(x)
    for line in table("x/looks.csv"):
        if (int(line["layer"]), int(line["head"]), line["query"]) == (*head, "end"):
            assert float(line["s2"]) == pytest.approx(wanted["s2"].mean(), abs=1e-5)


@pytest.mark.slow
def test_direct_effects_are_attribution_and_path_patching() -> None:
    assert command("--dataset", "few.json", "--out", "x") == 0
    model, tokenizer = load_model("tiny-qwen2.5")
    prompts = PromptSet.load("few.json")
    clean, corrupt = prompts.tokenize(tokenizer), prompts.tokenize(tokenizer, "corrupt")
    split = direct_logit_attribution(model, clean, progress=False)
    np.testing.assert_allclose(np.load("x/attribution.npy"), split.logit_diff.heads, atol=1e-4)
    np.testing.assert_allclose(np.load("x/attribution_io.npy"), split.logit.heads, atol=1e-4)
    np.testing.assert_allclose(np.load("x/logit_diff.npy"), split.logit_diff.capped, atol=1e-4)
    rows = heads_in("x")
    for layer, head in ((0, 7), (4, 2)):
        path = PathPatch(sender=f"z.{layer}.{head}", receivers=("logits",), positions="last")
        drop = patch(model, [path], clean, corrupt, engine="plain", progress=False).delta[0]
        np.testing.assert_allclose(np.load("x/path_effect.npy")[layer, head], drop, atol=1e-4)
        row = rows[layer, head]
        assert row["path_effect"] == pytest.approx(drop.mean(), abs=1e-4)
        assert row["path_effect_low"] <= row["path_effect"] <= row["path_effect_high"]
        assert row["attribution"] == pytest.approx(split.logit_diff.heads[layer, head].mean(), abs=1e-4)
        assert row["attribution_io"] == pytest.approx(split.logit.heads[layer, head].mean(), abs=1e-4)
    sizes = [abs(float(row["attribution"])) for row in table("x/heads.csv")]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == 48


@pytest.mark.slow
def test_the_final_norm_can_be_folded_in() -> None:
    flags = ["--dataset", "few.json", "--model", "tiny-gemma2", "--no_path_patching"]
    assert command(*flags, "--out", "plain") == 0 and command(*flags, "--fold_norm", "--out", "folded") == 0
    folded = np.load("folded/projection.npy")
    # With it, what is written towards IO less what is towards S is the attribution.
    np.testing.assert_allclose(folded[0] - folded[1], np.load("folded/attribution.npy"), atol=1e-4)
    assert np.abs(folded - np.load("plain/projection.npy")).max() > 0.1
    assert not Path("plain/path_effect.npy").exists() and "path_effect" not in table("plain/heads.csv")[0]


# -- what it finds -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_name_movers_of_tiny_gemma2_copy_look_at_io_and_have_a_direct_effect() -> None:
    flags = ["--model", "tiny-gemma2", "--dataset", "ioi.json", "--out", "x"]
    assert command(*flags) == 0
    rows, roles = heads_in("x"), facts_in("x")["roles"]
    # The causal measure asks for more: MLPs and the final norm react, and make up for most of what name movers write.
    assert roles["writes against S"] == ["0.1"] and rows[0, 1]["path_effect_low"] > 4
    assert 0 < rows[3, 4]["path_effect"] < rows[3, 4]["attribution"] / 2 and len(roles["name mover"]) <= 3
    assert command(*flags, "--no_path_patching") == 0
    rows, roles = heads_in("x"), facts_in("x")["roles"]
    assert {"3.0", "3.4", "3.7"} <= set(roles["name mover"])
    movers = [(3, 0), (3, 4), (3, 7)]
    rest = [row for head, row in rows.items() if head not in movers]
    for head in movers:
        row = rows[head]
        assert row["copy"] > 0.8 and row["copy_control"] < 0.1 and row["copy_negative"] == 0
        assert row["attention_io"] > 0.75 and row["attention_s"] < 0.15 and row["r_pooled"] > 0.7
        assert row["attribution_low"] > 0.25
    assert np.mean([row["copy"] for row in rest]) < 0.5 and np.median([row["attribution"] for row in rest]) < 0.15
    assert roles["writes against S"] == ["0.1"] and rows[0, 1]["attribution"] > 2 and rows[0, 1]["copy_negative"] > 0.9
    assert rows[0, 1]["attention_s"] > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny-qwen2.5", "tiny-llama3.1"])
def test_in_the_other_models_heads_with_high_copy_scores_raise_both_names(model: str) -> None:
    """They copy both names alike and write against S: no head of theirs is a name mover, whatever its copy score."""
    assert command("--model", model, "--dataset", "ioi.json", "--out", "x", "--no_path_patching") == 0
    rows, roles = heads_in("x").values(), facts_in("x")["roles"]
    total = np.load("x/attribution.npy").mean(-1)
    copying = [row for row in rows if row["copy_own"] >= 0.8]
    assert len(copying) > 8 and not roles["name mover"] and len(roles["raises both names"]) > 8
    rest = [row for row in rows if max(row["copy_own"], row["copy_own_negative"]) < 0.5]
    both = [row for row in rows if f"{row['layer']:.0f}.{row['head']:.0f}" in roles["raises both names"]]
    for name in ("attribution_io", "attribution_s"):  # of the two names alike, and clearly above the rest
        assert np.mean([row[name] for row in both]) > 0.2 + np.mean([row[name] for row in rest])
        assert all(row[f"{name}_low"] > 0 for row in both)
    assert max(abs(row["attribution"]) for row in copying) < 0.02 * total.sum() * 2
    against = [row for row in rows if f"{row['layer']:.0f}.{row['head']:.0f}" in roles["writes against S"]]
    assert len(against) > 4 and all(row["copy_own_negative"] > 0.5 and row["attribution_low"] > 0.2 for row in against)
    if model == "tiny-qwen2.5":
        assert {"4.0", "4.2"} <= set(roles["writes against S"])
        top = table("x/heads.csv")[:2]
        assert {(row["layer"], row["head"]) for row in top} == {("4", "0"), ("4", "2")}
        assert all(float(row["attention_s"]) > 0.9 and float(row["r_pooled"]) < -0.8 for row in top)


@pytest.mark.slow
def test_a_task_that_the_model_cannot_do_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--dataset", "recent.json", "--out", "x", "--no_path_patching") == 0
    facts = facts_in("x")
    assert facts["kinds"] == ["io", "s", "s1", "s2", "earlier1", "earlier2"] and not facts["does_the_task"]
    assert facts["pooled_kinds"] == ["io", "s", "earlier1", "earlier2"]
    assert facts["clean_logit_diff_high"] < 0 and facts["clean_io_over_s"] < 0.3
    assert not any(facts["roles"].values()) and not any(row["role"] for row in table("x/heads.csv"))
    shown = capsys.readouterr().out
    assert "the model does not do this task" in shown and "name movers" not in shown
    assert "earlier2" in shown


def test_roles_join_copy_scores_and_direct_effects() -> None:
    base = {
        "copy_own": 0.9, "copy_own_negative": 0.0, "attention_io": 0.8, "attention_s": 0.1,
        "attribution": 1.0, "attribution_low": 0.5,
        "attribution_high": 1.5, "path_effect_low": 0.2, "path_effect_high": 0.9,
        "attribution_io": 0.1, "attribution_io_low": 0.05, "attribution_s": 0.1, "attribution_s_low": 0.05,
    }  # fmt: skip
    none = {"attribution": 0.1, "attribution_low": -0.05}
    of_io, of_s = ({f"attribution_{name}": 0.3, f"attribution_{name}_low": 0.2} for name in ("io", "s"))
    negative = {"copy_own": 0.0, "copy_own_negative": 0.9}
    elsewhere = {"attention_io": 0.02, "attention_s": 0.02}
    below = {"attribution": -1.0, "attribution_low": -1.5, "attribution_high": -0.5} | {
        "path_effect_low": -0.9,
        "path_effect_high": -0.2,
    }
    at_s = {"attention_io": 0.1, "attention_s": 0.8}
    for changes, wanted in (
        ({}, "name mover"),
        (at_s, "name mover"),
        (below, "moves the wrong name"),
        (negative | at_s, "writes against S"),
        (negative | below, "negative name mover"),
        (negative, ""),
        (elsewhere, ""),
        ({"attention_io": 0.1}, "name mover"),
        (below | elsewhere, ""),
        (negative | below | {"attention_io": 0.09, "attention_s": 0.01}, ""),
        (negative | {"attention_io": 0.01, "attention_s": 0.09}, ""),
        (none | of_io | of_s | elsewhere, "copies to no effect"),
        (negative | below | at_s, ""),
        ({"copy_own": 0.49, "copy": 1.0}, ""),
        ({"attribution": 0.1, "attribution_low": 0.05}, "copies to no effect"),
        ({"attribution_low": -0.1}, "copies to no effect"),
        ({"path_effect_low": -0.1}, "copies to no effect"),
        (below | {"path_effect_high": 0.1}, "copies to no effect"),
        (below | {"attribution_high": 0.1}, "copies to no effect"),
        (negative | {"attribution": 0.1}, "copies to no effect"),
        (none | of_io | of_s, "raises both names"),
        (none | of_io | of_s | {"attribution_s": 0.19}, "copies to no effect"),
        (none | of_io | of_s | {"attribution_io_low": -0.1}, "copies to no effect"),
        (none | of_io, "copies to no effect"),
        (negative | none | of_io | of_s, "copies to no effect"),
        (of_io | of_s, "name mover"),
    ):
        assert name_roles.role({**base, **changes}, 10.0) == wanted, changes
    without = {name: value for name, value in base.items() if not name.startswith("path")}
    assert (
        name_roles.role(without, 10.0) == "name mover"
        and name_roles.role(without | below, 10.0) == "moves the wrong name"
    )
    assert name_roles.role(base, None) == ""
    assert (
        name_roles.role(base, 10.0, copies=0.95) == ""
        and name_roles.role(base, 10.0, matters=0.11) == "copies to no effect"
    )
    by_threshold = {
        (row["copy_score"], row["share_of_logit_diff"]): row for row in name_roles.count_roles([base, base], 30.0)
    }
    assert by_threshold[0.8, 0.02]["name_mover"] == 2 and by_threshold[0.8, 0.05]["name_mover"] == 0
    assert by_threshold[0.8, 0.05]["copies_to_no_effect"] == by_threshold[0.8, 0.05]["copy"] == 2
    assert by_threshold[0.95, 0.02]["copy"] == 0


# -- files and flags ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
def test_what_is_written_and_that_its_config_repeats_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--dataset", "few.json", "--heads", "5.1", "0.7") == 0
    out = folder / "outputs/name_movers/tiny-qwen2.5_few"
    arrays = (
        "attention",
        "projection",
        "looks",
        "copy_ranks",
        "attribution",
        "attribution_io",
        "path_effect",
        "logit_diff",
    )
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == {
        "config.yaml", "summary.json", "heads.csv", "correlations.csv", "looks.csv", "logit_diff_before_cap.npy",
        "attention.json",
        *(f"{name}.npy" for name in arrays),
        *(f"figures/{name}.{ending}" for ending in ("png", "pdf")
          for name in ("scatter_5.1", "scatter_0.7", "copies_and_effects", "looks", "copy", "copy_negative")),
    }  # fmt: skip
    facts = facts_in(out)
    assert facts["shown"] == ["5.1", "0.7"] and facts["dropped"] == []
    assert {"model", "revision", "command", "seed", "versions", "weight_hash", "prompts_hash", "top"} <= set(facts)
    shown = capsys.readouterr().out
    assert "where they look" in shown and str(out.relative_to(folder)) in shown

    config = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    (folder / "again.yaml").write_text(yaml.safe_dump({**config, "out": "again"}), encoding="utf-8")
    assert command("--config", "again.yaml") == 0
    for path in out.glob("*.npy"):
        assert np.array_equal(np.load(path), np.load(folder / "again" / path.name)), path.name
    for path in out.glob("*.csv"):
        assert path.read_text() == (folder / "again" / path.name).read_text()
    # Other heads in the same folder: nothing is left of those of before.
    assert command("--dataset", "few.json", "--heads", "1.1", "--no_path_patching") == 0
    assert {path.name for path in out.glob("figures/scatter*")} == {"scatter_1.1.png", "scatter_1.1.pdf"}
    assert not (out / "path_effect.npy").exists()


@pytest.mark.slow
def test_names_of_several_tokens_are_kept_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    """A surname makes two tokens of a name; its first tells the names apart, so that nothing else changes but the attention."""
    pairs = shipped("ioi_en")[:N]
    for longer in (0, 3):
        name = pairs[longer]["io_name"]
        pairs[longer]["clean"] = pairs[longer]["clean"].replace(name, f"{name} Clara")
        pairs[longer] |= {"io_name": f"{name} Clara", "io_token": f" {name} Clara"}
    save(pairs, "mixed.json")
    assert command("--dataset", "mixed.json", "--no_path_patching", "--out", "x") == 0
    facts = facts_in("x")
    assert not facts["dropped"] and facts["names_of_several_tokens"] == [0, 3] and facts["n"] == N
    assert "2 prompts with a name of several tokens: the token that tells" in capsys.readouterr().out
    model, tokenizer = load_model("tiny-qwen2.5", attn_implementation="eager")
    attention, projection = np.load("x/attention.npy"), np.load("x/projection.npy")
    for number, pair in enumerate(pairs):
        ids = tokenizer(pair["clean"])["input_ids"]
        first, *rest = tokenizer(pair["io_name"], add_special_tokens=False)["input_ids"]
        assert len(rest) == (number in (0, 3))
        start = ids.index(first)
        with torch.no_grad():
            pattern = model(torch.tensor([ids]), output_attentions=True).attentions[4][0, 2, -1]
        wanted = float(pattern[start : start + 1 + len(rest)].sum())
        assert attention[0, 4, 2, number] == pytest.approx(wanted, abs=1e-5)
        assert np.isfinite(projection[..., number]).all()


@pytest.mark.slow
def test_names_that_begin_alike_are_told_apart_by_their_next_token() -> None:
    """What both names begin with belongs to the prompt, as with first_difference."""
    pairs = shipped("ioi_en")[:N]
    for pair in pairs:
        for name in ("io_name", "s_name"):
            pair["clean"] = pair["clean"].replace(pair[name], f"Clara {pair[name]}")
        pair |= {"io_token": f" Clara {pair['io_name']}"} | {n: f"Clara {pair[n]}" for n in ("io_name", "s_name")}
    save(pairs, "alike.json")
    assert command("--dataset", "alike.json", "--no_path_patching", "--out", "x") == 0
    model, tokenizer = load_model("tiny-qwen2.5")
    prompts = PromptSet.load("alike.json").tokenize(tokenizer, answers="first_difference")
    clara = tokenizer(" Clara", add_special_tokens=False)["input_ids"]
    assert all(list(ids[-len(clara) :]) == clara for ids in prompts.input_ids)
    split = direct_logit_attribution(model, prompts, progress=False)
    np.testing.assert_allclose(np.load("x/attribution.npy"), split.logit_diff.heads, atol=1e-4)
    np.testing.assert_allclose(np.load("x/logit_diff.npy"), split.logit_diff.capped, atol=1e-4)
    projection = np.load("x/projection.npy")
    for number, (io, s) in enumerate(prompts.answer_ids):
        assert [len(prompts.input_ids), io != s] == [N, True]
        with torch.no_grad():
            z: list[torch.Tensor] = []
            output = model.model.layers[4].self_attn.o_proj
            handle = output.register_forward_pre_hook(lambda _, args, z=z: z.append(args[0][0, -1]))
            model(torch.tensor([prompts.input_ids[number]]))
            handle.remove()
            size = model.config.hidden_size // model.config.num_attention_heads
            own = slice(2 * size, 3 * size)
            written = output.weight[:, own] @ z[0][own]
            wanted = [float(written @ model.lm_head.weight[token]) for token in (io, s)]
        np.testing.assert_allclose(projection[:2, 4, 2, number], wanted, atol=1e-4)


def test_the_plan_is_told_and_nothing_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--dataset", "few.json", "--out", "x", "--dry_run") == 0
    assert "all heads on 6 prompts: under a minute" in capsys.readouterr().out and not Path("x").exists()


def test_the_evidence_is_that_of_the_largest_name_mover() -> None:
    rows = [
        {"layer": 0, "head": head, "attribution": size, "attribution_low": size - 1, "attribution_high": size + 1,
         "copy_own": 0.9, "copy_own_control": 0.1}
        for head, size in enumerate((5.0, 3.0, 2.0))
    ]  # fmt: skip
    for movers, wanted in (
        (["0.1", "0.2"], "0.1, the largest of 2 name movers, adds to the logit difference"),
        (["0.2"], "0.2, the only name mover, adds to the logit difference"),
        ([], "no name mover; 0.0, the largest of all 3 heads, adds to the logit difference"),
    ):
        evidence = study.evidence({"roles": {"name mover": movers}, "n": 4}, rows)
        assert evidence.effect == wanted and evidence.control == "copies its own name 0.90, another of the prompt 0.10"


@pytest.mark.slow
def test_a_limit_takes_the_first_prompts() -> None:
    for flags in (
        ("--dataset", "ioi.json", "--limit", N, "--out", "limited"),
        ("--dataset", "few.json", "--out", "few"),
    ):
        assert command(*flags, "--no_path_patching") == 0
    for path in Path("few").glob("*.npy"):
        np.testing.assert_array_equal(np.load(path), np.load(Path("limited") / path.name))


@pytest.mark.slow
def test_prompts_may_name_others(capsys: pytest.CaptureFixture[str]) -> None:
    pairs = shipped("recent_tiny")[:N]
    for pair in pairs:
        pair["positions"] = {
            "friend": pair["positions"]["earlier2"],
            "verb": [len(pair["clean"]) - 6, len(pair["clean"])],
        }
    save(pairs, "friends.json")
    flags = ["--dataset", "friends.json", "--no_path_patching", "--out", "x"]
    assert command(*flags) == 0 and facts_in("x")["kinds"] == ["io", "s", "s1", "s2"]
    assert command(*flags, "--names", "friend") == 0 and facts_in("x")["kinds"] == ["io", "s", "s1", "s2", "friend"]
    assert command(*flags, "--names", "foe") == 2
    assert "prompt 0 of friends has no position 'foe' for a name" in capsys.readouterr().err


def test_figures_show_what_they_say() -> None:
    rows = [
        {"layer": layer, "head": head, "copy_own": 0.5, "copy_own_negative": 0.0, "attribution": 1.0 - head, "role": ""}
        for layer in range(2)
        for head in range(3)
    ]
    left, right = figures.copies_and_effects(rows, "a title " * 20).axes
    assert left.get_xlabel() == "copy score" and right.get_xlabel() == "negative copy score"
    np.testing.assert_allclose(left.collections[0].get_offsets()[:2], [[0.5, 1.0], [0.5, 0.0]])
    matrix = study.by_head(rows[::-1], "attribution")
    assert matrix.tolist() == [[1, 0, -1], [1, 0, -1]]


def test_a_run_that_stops_while_it_writes_leaves_no_summary(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--dataset", "few.json", "--out", "x", "--no_path_patching"]
    assert command(*flags) == 0
    with monkeypatch.context() as patched:
        patched.setattr(folders, "write_config", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left", "x")))
        assert command(*flags) == 2
    assert not (folder / "x/summary.json").exists()
    assert command(*flags) == 0
    assert (folder / "x/summary.json").exists()
    assert not [path for path in (folder / "x").rglob(".*")]


def test_only_the_main_process_works(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(px, "is_main_process", lambda: False)
    assert command("--dataset", "few.json", "--out", "x") == 0
    assert not (folder / "x").exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--batch_size", 0], "--batch_size must be 1 or more, not 0."),
        (["--top", 0], "--top must be from 1 to 100, not 0."),
        (["--limit", "-1"], "--limit must be 0 or more, not -1."),
        (["--heads", "4.0", "4.0"], "--heads names each once, not 4.0 4.0."),
        (["--names", "friend", "friend"], "--names names each once, not friend friend."),
        (["--heads", "4"], "--heads names heads as layer.head, such as 2.5, not '4'."),
        (["--heads", "6.0"], "--heads 6.0: tiny-qwen2.5 has layers 0 to 5, each with heads 0 to 7."),
        (["--heads", "0.8"], "--heads 0.8: tiny-qwen2.5 has layers 0 to 5, each with heads 0 to 7."),
        (["--names", "friend"], "prompt 0 of few has no position 'friend' for a name; it has none of its own."),
        (["--dataset", "ioi_enn"], "there is no prompt set 'ioi_enn'; did you mean 'ioi_en'?"),
        (
            ["--dataset", "recent_en"],
            "the tokenizer does not know 'is', 'teacher', 'student', 'The', 'child';",
        ),
        (
            ["--dataset", "lone.json"],
            "prompt 1 of lone has no corrupt text, which path patching needs; add it, or leave",
        ),
        (
            ["--dataset", "absent.json"],
            "prompt 0 of absent: 'Zoe', the place 'io', does not occur as a word of its own in the text.",
        ),
        (
            ["--dataset", "long.json"],
            "none of the 2 prompts of long has names that tokens tell apart (prompt 0: the tokens of one of 'Lisa Clara' and",
        ),
        (
            ["--dataset", "one.json"],
            "only one of the 2 prompts of one has names that tokens tell apart; a mean with an",
        ),
        (["--out", "few.json/x"], "few.json is not a folder one may write in"),
        (["--model", "tiny-qwen3"], "tiny-qwen3"),
        (["--dataset", "none.json"], "none.json"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: list[Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(name_roles, "attention_to", None)
    pairs = shipped("ioi_en")[:2]
    save([pairs[0], {**pairs[1], "corrupt": None}], "lone.json")
    save([{**pairs[0], "io_name": "Zoe", "io_token": " Zoe"}], "absent.json")
    text = "When Lisa Clara and Lisa went to the store, Lisa gave the book to"
    long = {"clean": text, "corrupt": text, "io_name": "Lisa Clara", "s_name": "Lisa"}
    save([long, long], "long.json")
    save([long, pairs[0]], "one.json")
    before = sorted(folder.rglob("*"))
    assert command("--dataset", "few.json", *flags) == 2
    captured = capsys.readouterr()
    error = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and told in error[0] and captured.out == ""
    assert sorted(folder.rglob("*")) == before
