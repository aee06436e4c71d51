"""NumPy's integers, such as those of argmax, are taken wherever a whole number is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pyvene import CollectIntervention, IntervenableConfig, RepresentationConfig

import pyvene_ext as px
from pyvene_ext.circuits import faithfulness_curve, random_circuits
from pyvene_ext.edges import edge_attribution
from pyvene_ext.io.bounds import whole_number
from pyvene_ext.methods.patching.subspace import concept_directions
from pyvene_ext.specs import heads_together
from tests.random_prompts import random_prompts
from tests.tiny_random import random_model

ONE, TWO = np.int64(1), np.int32(2)
BASE = random_prompts((5, 5))
SOURCE = replace(BASE, input_ids=random_prompts((5, 5), seed=1).input_ids)


def test_numpys_integers_are_taken_as_pythons_are() -> None:
    model: Any = random_model("llama3_1")
    config = model.config
    assert heads_together(np.array([[0, 1], [2, 0], [2, 3]])) == heads_together([(0, 1), (2, 0), (2, 3)])
    specs = px.all_heads(config)[:2]
    with px.progress(False):
        ours, theirs = (px.sweep(model, specs, BASE, memory=memory) for memory in (np.int64(2**28), 2**28))
        np.testing.assert_array_equal(ours.intervened, theirs.intervened)
        scores = edge_attribution(model, BASE, SOURCE, method="eap_ig_inputs", steps=TWO)
        expected = edge_attribution(model, BASE, SOURCE, method="eap_ig_inputs", steps=2)
        np.testing.assert_array_equal(scores.per_prompt, expected.per_prompt)
        assert random_circuits(scores.matrix, TWO, config, TWO) == random_circuits(scores.matrix, 2, config, 2)
        faithfulness_curve(model, scores.matrix, BASE, SOURCE, sizes=np.array([2, 20]), random=ONE)
        lenses = [px.methods.logit_lens(model, BASE, position) for position in (-TWO, -2)]
        np.testing.assert_array_equal(*(lens.rank for lens in lenses))
        patch = px.ActivationPatch(site="mlp_out", layer=ONE, positions="last", subspace=True)
        concept_directions(model, [patch], BASE, SOURCE, rank=ONE)
    where = RepresentationConfig(ONE, "mlp_output", "pos", intervention_type=CollectIntervention)
    inputs = next(BASE.batches(2)).inputs()
    px.IntervenableModel(IntervenableConfig([where]), model)(inputs, unit_locations={"base": np.int64(-1)})


@pytest.mark.parametrize("value", [True, 1.0, "1", 0, np.float32(1), None])
def test_what_is_no_whole_number_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"^steps must be a whole number of 1 or more, not "):
        whole_number("steps", value, 1)
