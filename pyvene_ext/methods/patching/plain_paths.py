"""Path patching by its definition: through `IntervenableModel`, one path at a time.

Wang et al. 2022 (appendix B), sender h to receivers R. The base prompts are run with every head's z frozen at its base value,
except the sender, which takes its value from the source prompts; MLPs and norms are recomputed (or MLPs frozen too, as in
Goldowsky-Dill et al. 2023). The receivers' inputs are recorded in this run. Then the base prompts are run once more with the
receivers set to the recorded values. So only paths from h to R that pass through no other head count, with everything that R does
downstream.

`sweep_paths` computes the same fast; `direct` computes the direct term alone, on either engine; `pyvene_ext.patch` runs them all.
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


def patched_value(
    sender: ActivationPatch, old: Float[Tensor, "pos d"], prompt: int, resolved: Resolved
) -> Float[Tensor, "pos d"]:
    """Apply a sender's patch in one prompt.

    Args:
        sender: the sender's patch.
        old: its base values at the patched positions.
        prompt: index of the pair.
        resolved: the senders' patches on the pairs, with statistics.

    Returns:
        The patched values.
    """
    values = resolved.replacements(sender, [prompt])
    assert values is not None  # a patch has values
    return sender.apply(old, values[0] if sender.heads is None else values[0][:, 0])


class PlainPaths:
    """Runs paths through `IntervenableModel`, and caches the models it builds.

    Args:
        resolved: the senders' patches on the pairs, with statistics.
    """

    def __init__(self, resolved: Resolved) -> None:
        self.resolved, self.model, model = resolved, resolved.model, resolved.model
        self.layers, self.sizes = n_layers(model.config), dimensions(model.config)
        self._built: dict[tuple, IntervenableModel] = {}

    def logits(self, path: PathPatch, batch: Batch) -> Tensor:
        """Run a batch with a path patched.

        Args:
            path: the path.
            batch: some of the base prompts.

        Returns:
            The logits at each prompt's last token, `batch vocab`.
        """
        frozen = [("attention_value_output", layer) for layer in range(self.layers)]
        if path.freeze_mlps:
            frozen += [("mlp_contribution", layer) for layer in range(self.layers)]
        sender, (site, layer, head) = path.sender_patch, path.sender_node
        place = {"z": "attention_value_output", "mlp_out": "mlp_contribution", "embed": "embeddings"}[site], layer or 0
        if place not in frozen:
            frozen.append(place)
        values = self._collected(frozen, batch)
        x = values[frozen.index(place)].clone()
        for row, (prompt, start) in enumerate(zip(batch.index, batch.starts, strict=True)):
            (tokens,) = self.resolved.tokens_of(sender, [prompt])
            at = [start + token for token in tokens]
            d_head = self.sizes["d_head"]
            width = slice(None) if head is None else slice(head * d_head, (head + 1) * d_head)
            x[row, at, width] = patched_value(sender, x[row, at, width], prompt, self.resolved)
        values[frozen.index(place)] = x

        read = [node for node in path.receiver_nodes if node.site != "logits"]
        received, output = self._run(frozen, values, read, batch)
        if read:
            receivers = [(FIELD_NAMES[node.site], node.layer or 0) for node in read]
            _, output = self._run(receivers, received, [], batch, [node.head for node in read])
        return last_logits(output.logits, batch)

    def _collected(self, places: list[tuple[str, int]], batch: Batch) -> list[Tensor]:
        """The activations of an untouched run at these places."""
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
        """Run with places set to values at every position; return the activations at the nodes to read, and the output."""
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
        return {**batch.inputs(), "use_cache": False, "logits_to_keep": batch.logits_to_keep}

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
