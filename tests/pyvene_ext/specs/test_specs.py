from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyvene_ext.specs.ablation import Ablation, all_heads, heads_together
from pyvene_ext.specs.files import (
    from_yaml,
    load_specs,
    save_specs,
    to_yaml,
)
from pyvene_ext.specs.forced_attention import ForcedAttention
from pyvene_ext.specs.graph import Node
from pyvene_ext.specs.joint import (
    Spec,
    members,
    needs,
    spec_name,
)
from pyvene_ext.specs.patch import ActivationPatch
from pyvene_ext.specs.path import PathPatch
from pyvene_ext.specs.sources import Needs
from tests.tiny_random import random_model, tiny_config

HEAD: dict[str, Any] = {"kind": "zero", "site": "z", "layer": 2, "heads": (5,)}
SPECS: list[Spec] = [
    Ablation(**HEAD),
    Ablation(kind="mean", site="z", layer=0, heads=(4, 1), mean="per_position", positions=("主语", -2, 0)),
    Ablation(kind="noise", site="embed", noise="norm_matched", seed=7, positions="last"),
    Ablation(kind="resample", site="resid_mid", layer=1, seed=3),
    Ablation(kind="mean", site="scores", layer=1, heads=(0,), positions="end"),
    (Ablation(**HEAD), Ablation(kind="mean", site="mlp_out", layer=3)),
    Ablation(kind="noise", site="k", layer=1, heads=(0,), positions="s1"),
]


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_specs_survive_a_file_unchanged(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"specs.{suffix}"
    save_specs(path, SPECS)
    assert load_specs(path) == SPECS
    assert from_yaml(to_yaml(SPECS)) == SPECS


def test_numbers_as_numpy_gives_them_are_plain_numbers_in_a_spec() -> None:
    chosen = np.argsort([0.1, 0.9, 0.5])[:0:-1]  # heads 1 and 2
    given = {"kind": "noise", "site": "z", "layer": np.int64(2), "heads": chosen, "seed": np.int32(3)}
    spec = Ablation(**given, positions=np.array([0, -1]))  # type: ignore[arg-type]
    assert spec == Ablation(kind="noise", site="z", layer=2, heads=(1, 2), positions=(0, -1), seed=3)
    assert from_yaml(to_yaml([spec])) == [spec]
    assert heads_together(np.array([[2, 5], [2, 1]])) == (Ablation(kind="zero", site="z", layer=2, heads=(1, 5)),)
    forced = {"shape": "hub", "layer": np.int64(1), "heads": chosen, "block": (np.int64(0), 3), "hub": np.int64(2)}
    assert ForcedAttention(**forced) == ForcedAttention(shape="hub", layer=1, heads=(1, 2), block=(0, 3), hub=2)
    path = {"sender": "z.0.1", "receivers": ("logits",)}
    assert PathPatch(**path, positions=(np.int64(3),)) == PathPatch(**path, positions=(3,))


@pytest.mark.parametrize("layer", [np.float64(2), np.bool_(True), np.array([2]), np.array(2.0), np.int64(-1)])
def test_what_is_no_whole_number_in_numpy_is_none_in_a_spec(layer: Any) -> None:
    with pytest.raises(ValueError, match=r"^(layer must be a whole number|layer: layers count from 0)"):
        Ablation(kind="zero", site="z", layer=layer, heads=(1,))


def test_yaml_is_short_and_readable() -> None:
    assert to_yaml([Ablation(**HEAD, positions="last")]) == (
        "- kind: zero\n  site: z\n  layer: 2\n  heads:\n  - 5\n  positions: last\n"
    )


def test_one_head_position_or_receiver_needs_no_list() -> None:
    path = PathPatch(sender="z.0.1", receivers=("q.1.0",), positions=(-1,))
    assert PathPatch(sender=Node("z", 0, 1), receivers="q.1.0", positions=-1) == path  # type: ignore[arg-type]
    assert PathPatch(sender="z.0.1", receivers=[Node("q", 1, 0)], positions=torch.tensor([-1])) == path  # type: ignore[arg-type]
    spec = Ablation(**HEAD, positions=(-1,))
    for heads in (5, range(5, 6), np.int64(5), torch.tensor(5), torch.tensor([5]), {5}, (torch.tensor(5),)):
        for position in (-1, np.int64(-1), torch.tensor(-1), range(-1, 0)):
            assert Ablation(**HEAD | {"heads": heads}, positions=position) == spec  # type: ignore[arg-type]
    assert ActivationPatch(site="z", layer=0, heads=0) == ActivationPatch(site="z", layer=0, heads=(0,))  # type: ignore[arg-type]


def test_specs_are_immutable_and_hashable() -> None:
    with pytest.raises(ValueError, match="layer cannot be changed; make a changed copy"):
        SPECS[0].layer = 3  # type: ignore[union-attr, misc]
    assert len({Ablation(**HEAD), Ablation(**HEAD)}) == 1


def test_different_specs_have_different_names() -> None:
    names = [spec_name(spec) for spec in SPECS]
    assert names == [
        "z.2.5",
        "z.0.1,4@主语,-2,0:mean/per_position",
        "embed@last:noise/norm_matched/seed7",
        "resid_mid.1:resample/seed3",
        "scores.1.0@end:mean",
        "z.2.5+mlp_out.3:mean",
        "k.1.0@s1:noise",
    ]


def test_one_spelling_for_one_meaning() -> None:
    assert Ablation(**HEAD | {"heads": [3, 1]}) == Ablation(**HEAD | {"heads": (1, 3)})
    assert Ablation(**HEAD, positions=("s1",)) == Ablation(**HEAD, positions="s1")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "remove"}, "kind must be 'zero', 'mean', 'resample' or 'noise', not 'remove'."),
        ({"site": "mlp_uot"}, "site: no ablation of 'mlp_uot'; did you mean 'mlp_out'?"),
        ({"site": "blocks.3.attn.hook_z"}, "no ablation of 'blocks.3.attn.hook_z'; did you mean 'z'?"),
        ({"site": "nonsense"}, "choose among z, attn_out"),
        ({"site": "pattern"}, "no ablation of 'pattern'"),
        ({"layer": None}, "z needs a layer"),
        ({"heads": "all"}, "heads are numbers, unlike 'all'; for all n heads of a layer write range(n)"),
        ({"heads": 1.5}, "heads must be a list or tuple, not 1.5"),
        ({"positions": None}, "a position is a name or a whole number, not None"),
        ({"positions": ("s1", 1.5)}, "a position is a name or a whole number, not 1.5"),
        ({"kind": "zreo"}, "not 'zreo'; did you mean 'zero'?"),
        ({"layer": -1}, "layer: layers count from 0, unlike -1"),
        ({"layer": True}, "layer must be a whole number, not True"),
        ({"heads": None}, "z needs heads"),
        ({"heads": ()}, "heads: name one or more heads, each once and counted from 0, not []"),
        ({"heads": (1, 1)}, "each once and counted from 0, not [1, 1]"),
        ({"heads": (-1,)}, "counted from 0, not [-1]"),
        ({"site": "mlp_out"}, "mlp_out has no heads: leave heads out"),
        ({"site": "embed", "heads": None}, "embed exists once: leave layer out"),
        ({"site": "scores", "kind": "noise"}, "scores has no noise ablation; choose zero or mean"),
        ({"positions": ()}, "positions: name one or more positions"),
        ({"positions": ""}, "positions: name one or more positions"),
        ({"positions": ("s1", "s1")}, "each once"),
        ({"positions": ("all", 3)}, 'for every position write positions: "all"'),
        ({"mean": "per_position"}, "mean='per_position' does not apply to a zero ablation of z"),
        ({"noise": "norm_matched"}, "noise='norm_matched' does not apply to a zero ablation"),
        ({"seed": -1}, "seed must be greater than or equal to 0, not -1"),
        ({"head": (5,)}, "there is no field 'head'; did you mean 'heads'?"),
    ],
)
def test_what_no_model_could_run_is_refused_in_one_sentence(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Ablation(**HEAD | fields)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: zero", "specs are a list of interventions, not dict"),
        ("", "specs are a list of interventions, not NoneType"),
        ("- kind: [", "not valid YAML"),
        ("- 3", "spec 0: it must be a dict of fields, not 3."),
        ("- {kind: zreo, site: mlp_out, layer: 1}", "spec 0: there is no kind 'zreo'; did you mean 'zero'?"),
        ("- {kind: forec, site: mlp_out, layer: 1}", "spec 0: there is no kind 'forec'; did you mean 'force'?"),
        ("- {kind: zero, site: mlp_out, layer: 1}\n- {kind: zero, site: z, layer: 1}", "spec 1: z needs heads"),
        ("- []", "spec 0: a joint intervention names one or more places"),
        ("- [{kind: zero, site: mlp_out, layer: 1}, {kind: mean, site: mlp_out, layer: 1}]", "each once"),
    ],
)
def test_a_bad_file_is_named_with_the_entry_that_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        load_specs(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_loading_specs_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text("- !!python/object/apply:os.mkdir [made]")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_specs(path)


def test_a_place_is_edited_once_in_a_joint_ablation() -> None:
    with pytest.raises(ValueError, match="each once"):
        members((Ablation(**HEAD), Ablation(**HEAD | {"heads": (1, 5)})))
    assert len(members((Ablation(**HEAD), Ablation(**HEAD | {"heads": (1,)})))) == 2


def test_all_heads_names_every_query_head() -> None:
    specs = all_heads(tiny_config("llama3_1"), kind="mean", positions="last")
    assert len(specs) == 3 * 6
    assert [spec.name for spec in specs[:7]] == [f"z.{i // 6}.{i % 6}@last:mean" for i in range(7)]
    assert [spec.name for spec in all_heads(tiny_config("llama3_1"), site="k")[:4]] == [
        "k.0.0",
        "k.0.1",
        "k.0.2",
        "k.1.0",
    ]


def test_check_names_what_the_model_has() -> None:
    model = random_model("gemma2")
    Ablation(**HEAD | {"heads": (3,)}).check(model)
    with pytest.raises(
        ValueError, match=r"head 5 is out of range, the model has 4 query heads \(0 to 3\) sharing 1 K/V heads"
    ):
        Ablation(**HEAD).check(model)
    with pytest.raises(ValueError, match=r"layer 3 is out of range, the model has layers 0 to 2"):
        Ablation(**HEAD | {"layer": 3}).check(model)


def test_needs_collects_what_the_reference_set_must_give() -> None:
    assert needs(SPECS) == Needs(
        places=(("z", 0), ("resid_mid", 1), ("mlp_out", 3), ("k", 1)), position_means=("主语", -2, 0), bank=("all",)
    )
    assert needs(SPECS[:1]) == Needs()
