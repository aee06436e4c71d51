"""Path patching, the plain way: as defined, through `IntervenableModel`, one path at a time.

Wang et al. 2022 (appendix B), sender h to receivers R. The base prompts are run with every head's z frozen to what it is there,
but the sender, which takes its value from the source prompts; MLPs and norms are computed anew (or MLPs frozen too, the view of
Goldowsky-Dill et al. 2023). What the receivers hold then is recorded. The base prompts are run once more with the receivers
set to it. So only what goes from h to R past no other head counts, and all of what R does with it.

`sweep_paths` is the fast engine of the same; `direct` has the direct term alone, for either engine;
`pyvene_ext.patch` runs them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from pyvene import CollectIntervention, IntervenableConfig, RepresentationConfig, VanillaIntervention
from torch import Tensor

from modelcards import COMPONENTS, FIELD_NAMES, dimensions, n_layers
from pyvene_ext.engine.metrics import last_logits
from pyvene_ext.engine.resolve import Resolved
from pyvene_ext.intervenable.model import IntervenableModel
from pyvene_ext.prompts.tokenized import Batch
from pyvene_ext.specs.graph import (
    Node,
)
from pyvene_ext.specs.patch import ActivationPatch
from pyvene_ext.specs.path import PathPatch


def new_value(
    sender: ActivationPatch, old: Float[Tensor, "pos d"], prompt: int, resolved: Resolved
) -> Float[Tensor, "pos d"]:
    """What a sender's patch puts in place of `old` in one prompt."""
    values = resolved.replacements(sender, [prompt])
    assert values is not None  # a patch has values
    return sender.apply(old, values[0] if sender.heads is None else values[0][:, 0])


class PlainPaths:
    """Runs paths, whose senders' patches are resolved, through `IntervenableModel`; keeps the models it has built."""

    def __init__(self, resolved: Resolved) -> None:
        self.resolved, self.model, model = resolved, resolved.model, resolved.model
        self.layers, self.sizes = n_layers(model.config), dimensions(model.config)
        self._built: dict[tuple, IntervenableModel] = {}

    def logits(self, path: PathPatch, batch: Batch) -> Tensor:
        """Logits of the answer's position, `batch vocab`, with the path patched."""
        columns = list(range(batch.input_ids.shape[1]))
        frozen = [("attention_value_output", layer) for layer in range(self.layers)]
        if path.freeze_mlps:
            frozen += [("mlp_contribution", layer) for layer in range(self.layers)]
        sender, (site, layer, head) = path.sender_patch, path.sender_node
        place = {"z": "attention_value_output", "mlp_out": "mlp_contribution", "embed": "embeddings"}[site], layer or 0
        if place not in frozen:
            frozen.append(place)
        values = self._collected(frozen, batch)
        x = values[frozen.index(place)].clone()
        for row, (prompt, length) in enumerate(zip(batch.index, batch.lengths, strict=True)):
            start = len(columns) - length if batch.padding_side == "left" else 0
            (tokens,) = self.resolved.tokens_of(sender, [prompt])
            at = [start + token for token in tokens]
            d_head = self.sizes["d_head"]
            width = slice(None) if head is None else slice(head * d_head, (head + 1) * d_head)
            x[row, at, width] = new_value(sender, x[row, at, width], prompt, self.resolved)
        values[frozen.index(place)] = x

        read = [node for node in path.receiver_nodes if node.site != "logits"]
        received, output = self._run(frozen, values, read, batch)
        if read:
            receivers = [(FIELD_NAMES[node.site], node.layer or 0) for node in read]
            _, output = self._run(receivers, received, [], batch, [node.head for node in read])
        return last_logits(output.logits, batch)

    def _collected(self, places: list[tuple[str, int]], batch: Batch) -> list[Tensor]:
        """What an untouched run has at these places."""
        nodes = [(component, layer, None) for component, layer in places]
        iv = self._model([], nodes)
        (_, found), _ = iv(self._inputs(batch), unit_locations={"base": self._where([], nodes, batch)})
        return [x.clone() for x in found]

    def _run(
        self,
        places: Sequence[tuple[str, int]],
        values: list[Tensor],
        read: list[Node],
        batch: Batch,
        heads: list[int | None] | None = None,
    ) -> tuple[list[Tensor], Any]:
        """Run with values set at places, at every position; what is then at the nodes to read, and the output."""
        set_at = [(*place, head) for place, head in zip(places, heads or [None] * len(places), strict=True)]
        nodes = [(FIELD_NAMES[node.site], node.layer or 0, node.head) for node in read]
        iv = self._model(set_at, nodes)
        sources = dict(zip(iv.sorted_keys, values, strict=False))
        found, output = iv(
            self._inputs(batch),
            unit_locations={"base": self._where(set_at, nodes, batch)},
            source_representations=sources,
        )
        return ([x.clone() for x in found[1]] if read else []), output

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        return {**batch.inputs(), "use_cache": False}

    def _model(self, set_at: list[tuple], read: list[tuple]) -> IntervenableModel:
        key = tuple((component, layer) for component, layer, _ in (*set_at, *read)), len(set_at)
        if key not in self._built:
            representations = [
                RepresentationConfig(
                    layer, component, COMPONENTS[component].units[0], intervention_type=VanillaIntervention
                )
                for component, layer, _ in set_at
            ]
            representations += [
                RepresentationConfig(
                    layer,
                    component,
                    COMPONENTS[component].units[0],
                    intervention=CollectIntervention(keep_last_dim=True),
                )
                for component, layer, _ in read
            ]
            self._built[key] = IntervenableModel(IntervenableConfig(representations), self.model)
        return self._built[key]

    def _where(self, set_at: list[tuple], read: list[tuple], batch: Batch) -> list[list[list[int]]]:
        columns = list(range(batch.input_ids.shape[1]))
        return [[columns if head is None else [head]] * len(batch.index) for _, _, head in (*set_at, *read)]
