"""Path patching, the plain way: as defined, through `IntervenableModel`, one path at a time.

Wang et al. 2022 (appendix B), sender h to receivers R. The base prompts are run with every head's z frozen to what it is there,
but the sender, which takes its value from the source prompts; MLPs and norms are computed anew (or MLPs frozen too, the view of
Goldowsky-Dill et al. 2023). What the receivers hold then is recorded. The base prompts are run once more with the receivers
set to it. So only what goes from h to R past no other head counts, and all of what R does with it.

`pyvene_ext.sweep.paths` is the fast engine of the same; `pyvene_ext.direct` has the direct term alone, for either engine;
`pyvene_ext.patching.patch` runs them all.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, StrictInt, StrictStr, field_validator, model_validator
from pyvene import CollectIntervention, IntervenableConfig, RepresentationConfig, VanillaIntervention
from torch import Tensor
from transformers import PreTrainedModel

from modelcards import COMPONENTS, FIELD_NAMES, card_of, dimensions, n_layers
from pyvene_ext.compile import replacements_of
from pyvene_ext.graph import RECEIVERS, SENDERS, Node, reaches
from pyvene_ext.intervenable import IntervenableModel
from pyvene_ext.interventions import DirectionIntervention
from pyvene_ext.metrics import last_logits
from pyvene_ext.reference import Directions, Place, Positions, Reference, token_indices
from pyvene_ext.specs import ActivationPatch, plain
from pyvene_ext.tokenized import Batch, TokenizedPrompts


class PathPatch(BaseModel):
    """Patch what one sender tells some receivers, past all other heads.

    Attributes:
        sender: "embed", "z.LAYER.HEAD" or "mlp_out.LAYER" (`pyvene_ext.graph`).
        receivers: one or more of "q.LAYER.HEAD", "k.LAYER.KV_HEAD", "v.LAYER.KV_HEAD", "mlp_in.LAYER", "resid_pre.LAYER",
            "resid_mid.LAYER" and "resid_post.LAYER"; or "logits" alone, which is the stream behind the last block. All are set
            together. Query heads that share a K/V head receive its k and v together.
        positions: where the sender takes the source's value, as in `ActivationPatch`.
        freeze_mlps: MLPs keep their base value too, so that only the direct path counts.
        direct: the direct term alone: the receivers get their base value and what the sender's change adds to it, the scales of
            the norms on its way frozen at base (of the receiver's norm or the final one, and of a post-norm behind attention).
        subspace: the sender changes along the concept direction only (`pyvene_ext.subspace`).

    Raises pydantic's ValidationError (a ValueError) for nodes that do not exist, and for a receiver that reads before the sender
    writes: there is no path.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["path"] = "path"
    sender: StrictStr
    receivers: tuple[StrictStr, ...]
    positions: StrictStr | tuple[StrictStr | StrictInt, ...] = "all"
    freeze_mlps: bool = False
    direct: bool = False
    subspace: bool = False

    _plain = field_validator("*", mode="before")(plain)

    @field_validator("sender")
    @classmethod
    def _spelt_one_way(cls, sender: str) -> str:
        return str(Node.parse(sender))

    @field_validator("receivers")
    @classmethod
    def _in_order(cls, receivers: tuple[str, ...]) -> tuple[str, ...]:
        nodes = {Node.parse(receiver) for receiver in receivers}
        if not receivers or len(nodes) < len(receivers):
            raise ValueError(f"name one or more receivers, each once, not {list(receivers)}.")
        return tuple(map(str, sorted(nodes, key=lambda node: (node.layer or 0, node.site, node.head or 0))))

    @model_validator(mode="after")
    def _some_path(self) -> PathPatch:
        if self.sender_node.site not in SENDERS:
            raise ValueError(f"{self.sender} sends nothing; a sender is embed, z.LAYER.HEAD or mlp_out.LAYER.")
        for receiver in self.nodes:
            if receiver.site not in RECEIVERS:
                raise ValueError(f"{receiver} receives nothing; receivers are {', '.join(RECEIVERS)}.")
            if not reaches(self.sender_node, receiver):
                raise ValueError(
                    f"the path {self.sender}->{receiver} is empty: {receiver} reads before {self.sender} writes."
                )
        if "logits" in self.receivers and len(self.receivers) > 1:
            raise ValueError("logits cannot be set together with other receivers, whose effect they would override.")
        if self.direct and self.freeze_mlps:
            raise ValueError("the direct term passes no MLP: leave freeze_mlps out.")
        self.sending  # what it must fulfil as a patch  # noqa: B018
        return self

    @property
    def sender_node(self) -> Node:
        """The sender."""
        return Node.parse(self.sender)

    @property
    def nodes(self) -> list[Node]:
        """The receivers."""
        return [Node.parse(receiver) for receiver in self.receivers]

    @property
    def sending(self) -> ActivationPatch:
        """The sender's own patch."""
        site, layer, head = self.sender_node
        heads = None if head is None else (head,)
        return ActivationPatch(site=site, layer=layer, heads=heads, positions=self.positions, subspace=self.subspace)

    @property
    def source_name(self) -> str:
        """The sender and how it is patched: paths that share it record the same run."""
        return self._sent + self._how

    @property
    def name(self) -> str:
        """A short name: "z.0.1@last->k.1.0", "z.0.1/subspace->q.2.0", "z.0.1->logits, MLPs frozen"."""
        return f"{self._sent}->{'+'.join(self.receivers)}{self._how}"

    @property
    def one_place(self) -> bool:
        """Whether no receiver can change what another one is given where the sender is not patched."""
        sites = {(node.layer, node.site in ("q", "k", "v") or node.site) for node in self.nodes}
        return self.positions == "all" or len(sites) == 1

    def received(self, positions: Positions, path: str) -> tuple[ActivationPatch, ...]:
        """The receivers' patches, heads of one place together."""
        by_place: dict[Place, list[Node]] = {}
        for node in self.nodes:
            by_place.setdefault((node.site, node.layer), []).append(node)
        return tuple(
            ActivationPatch(
                site=site,
                layer=layer,
                heads=tuple(node.head for node in nodes if node.head is not None) or None,
                positions=positions,
                path=path,
            )
            for (site, layer), nodes in by_place.items()
        )

    @property
    def _sent(self) -> str:
        return self.sending.where + ("/subspace" if self.subspace else "")

    @property
    def _how(self) -> str:
        return ", MLPs frozen" if self.freeze_mlps else ", direct" if self.direct else ""

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError if the model has no such nodes."""
        for node in (self.sender_node, *self.nodes):
            node.check(model.config)
        card = card_of(model)
        for node in self.nodes:
            if card.parallel and node.site in ("mlp_in", "resid_mid"):
                raise ValueError(
                    f"{self.name}: blocks of {card.family} run attention and MLP side by side, so that no head of a layer is on "
                    f"the way to {node}; name another receiver."
                )
            if node.site != "logits":
                card.component(model, FIELD_NAMES[node.site])


def new_value(
    sender: ActivationPatch,
    old: Float[Tensor, "pos d"],
    prompt: int,
    tokens: list[int],
    base: TokenizedPrompts,
    model: PreTrainedModel,
    reference: Reference,
) -> Float[Tensor, "pos d"]:
    """What a sender's patch puts in place of `old` in one prompt."""
    (value,) = replacements_of(sender, [prompt], [tokens], base, model, reference)
    value = value if sender.heads is None else value[:, 0]
    return DirectionIntervention()(old, value) if sender.subspace else value.to(old)


@dataclass(frozen=True)
class Recorded(Reference):
    """What receivers are to be given, in place of a reference set's statistics."""

    values: Callable[[str, Place, int, tuple[int, ...] | None], Tensor] | None = None

    @classmethod
    def of(
        cls, model: PreTrainedModel, prompts: TokenizedPrompts, values: Callable[..., Tensor], directions: Directions
    ) -> Recorded:
        """`values` takes what `recorded` takes; `prompts` is where positions are looked up; `directions` made the values."""
        return cls(prompts, (), directions=directions, _model=weakref.ref(model), values=values)

    def recorded(
        self, path: str, place: Place, prompt: int, heads: tuple[int, ...] | None
    ) -> Float[Tensor, "pos *head d"]:
        """What a place is to be given."""
        assert self.values is not None
        return self.values(path, place, prompt, heads)

    def require(self, *_: Any, **__: Any) -> None:
        """Nothing: receivers are no places of which statistics were asked for."""


class PlainPaths:
    """Runs paths through `IntervenableModel`; keeps the models it has built."""

    def __init__(self, model: PreTrainedModel, base: TokenizedPrompts, reference: Reference) -> None:
        self.model, self.base, self.reference = model, base, reference
        self.layers, self.sizes = n_layers(model.config), dimensions(model.config)
        self._built: dict[tuple, IntervenableModel] = {}

    def logits(self, path: PathPatch, batch: Batch) -> Tensor:
        """Logits of the answer's position, `batch vocab`, with the path patched."""
        columns = list(range(batch.input_ids.shape[1]))
        frozen = [("attention_value_output", layer) for layer in range(self.layers)]
        if path.freeze_mlps:
            frozen += [("mlp_contribution", layer) for layer in range(self.layers)]
        sender, (site, layer, head) = path.sending, path.sender_node
        place = {"z": "attention_value_output", "mlp_out": "mlp_contribution", "embed": "embeddings"}[site], layer or 0
        if place not in frozen:
            frozen.append(place)
        values = self._collected(frozen, batch)
        x = values[frozen.index(place)].clone()
        for row, (prompt, length) in enumerate(zip(batch.index, batch.lengths, strict=True)):
            start = len(columns) - length if batch.padding_side == "left" else 0
            tokens = token_indices(self.base, prompt, sender.positions)
            at = [start + token for token in tokens]
            d_head = self.sizes["d_head"]
            width = slice(None) if head is None else slice(head * d_head, (head + 1) * d_head)
            x[row, at, width] = new_value(
                sender, x[row, at, width], prompt, tokens, self.base, self.model, self.reference
            )
        values[frozen.index(place)] = x

        read = [node for node in path.nodes if node.site != "logits"]
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
