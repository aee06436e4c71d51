"""Path patches: the effect of one sender through the inputs of some receivers, bypassing all other heads (Wang et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import StrictStr, field_validator, model_validator
from transformers import PreTrainedModel

from modelcards import FIELD_NAMES, card_of
from pyvene_ext.intervenable.statistics import Place
from pyvene_ext.io.records import Record
from pyvene_ext.prompts.positions import Positions
from pyvene_ext.specs.base import Tokens
from pyvene_ext.specs.graph import (
    RECEIVERS,
    SENDERS,
    Node,
    reaches,
)
from pyvene_ext.specs.patch import ActivationPatch


class PathPatch(Record):
    """Patch the paths from one sender to some receivers that bypass all other heads.

    Attributes:
        kind: "path".
        sender: "embed", "z.LAYER.HEAD" or "mlp_out.LAYER", or a `Node` of `pyvene_ext.specs.graph`.
        receivers: one, or a tuple, of "q.LAYER.HEAD", "k.LAYER.KV_HEAD", "v.LAYER.KV_HEAD", "mlp_in.LAYER", "resid_pre.LAYER",
            "resid_mid.LAYER" and "resid_post.LAYER"; or "logits" alone, which is the stream after the last block. All are patched
            jointly. Query heads that share a K/V head receive its k and v together.
        positions: where the sender takes the source's value, as in `ActivationPatch`.
        freeze_mlps: MLPs keep their base value too, so that only the direct path counts.
        direct: the direct term alone: the receivers get their base value plus what the sender's change adds to it, with the
            scales of the norms on the path frozen at base (the receiver's norm or the final norm, and a post-norm after
            attention).
        subspace: the sender changes along the concept direction only (`pyvene_ext.methods.patching.subspace`).

    Raises:
        ValueError: for nodes that do not exist, and for a receiver that reads before the sender writes, because then there is no
            path.
    """

    kind: Literal["path"] = "path"
    sender: StrictStr
    receivers: tuple[StrictStr, ...]
    positions: Tokens = "all"
    freeze_mlps: bool = False
    direct: bool = False
    subspace: bool = False

    @field_validator("sender", mode="before")
    @classmethod
    def _by_name(cls, node: Any) -> Any:
        return str(node) if isinstance(node, str | Node) else node

    @field_validator("receivers", mode="before")
    @classmethod
    def _one_or_several(cls, receivers: Any) -> Any:
        if isinstance(receivers, str | Node) or not isinstance(receivers, Iterable):
            receivers = (receivers,)
        return tuple(map(cls._by_name, receivers))

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
            raise ValueError(f"{self.sender} is not a sender; a sender is embed, z.LAYER.HEAD or mlp_out.LAYER.")
        for receiver in self.receiver_nodes:
            if receiver.site not in RECEIVERS:
                raise ValueError(f"{receiver} is not a receiver; receivers are {', '.join(RECEIVERS)}.")
            if not reaches(self.sender_node, receiver):
                raise ValueError(
                    f"the path {self.sender}->{receiver} is empty: {receiver} reads before {self.sender} writes."
                )
        if "logits" in self.receivers and len(self.receivers) > 1:
            raise ValueError("logits cannot be patched jointly with other receivers, whose effect they would override.")
        if self.direct and self.freeze_mlps:
            raise ValueError("the direct term passes through no MLP: leave freeze_mlps out.")
        self.sender_patch  # validates positions and head  # noqa: B018
        return self

    @property
    def sender_node(self) -> Node:
        """The sender."""
        return Node.parse(self.sender)

    @property
    def receiver_nodes(self) -> list[Node]:
        """The receivers."""
        return [Node.parse(receiver) for receiver in self.receivers]

    @property
    def sender_patch(self) -> ActivationPatch:
        """The sender's own patch."""
        site, layer, head = self.sender_node
        heads = None if head is None else (head,)
        return ActivationPatch(site=site, layer=layer, heads=heads, positions=self.positions, subspace=self.subspace)

    @property
    def sender_name(self) -> str:
        """The sender and how it is patched; paths with the same name share one run in which receivers are recorded."""
        return self._sent + self._how

    @property
    def name(self) -> str:
        """A short name: "z.0.1@last->k.1.0", "z.0.1/subspace->q.2.0", "z.0.1->logits, MLPs frozen"."""
        return f"{self._sent}->{'+'.join(self.receivers)}{self._how}"

    @property
    def has_independent_receivers(self) -> bool:
        """Whether no receiver's patch can change another receiver's input at positions where the sender is not patched."""
        sites = {(node.layer, node.site in ("q", "k", "v") or node.site) for node in self.receiver_nodes}
        return self.positions == "all" or len(sites) == 1

    def receiver_patches(self, positions: Positions, path: str) -> tuple[ActivationPatch, ...]:
        """The patches that set the receivers to recorded values.

        Args:
            positions: where the receivers are patched.
            path: the name under which their values are recorded.

        Returns:
            One patch per site and layer, all its heads together.
        """
        by_place: dict[Place, list[Node]] = {}
        for node in self.receiver_nodes:
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
        return self.sender_patch.where + ("/subspace" if self.subspace else "")

    @property
    def _how(self) -> str:
        return ", MLPs frozen" if self.freeze_mlps else ", direct" if self.direct else ""

    def check(self, model: PreTrainedModel) -> None:
        """Check that a model has the path's nodes.

        Args:
            model: a causal language model with a card.

        Raises:
            ValueError: it lacks a node, or its blocks run attention and MLP in parallel and a receiver lies between the two.
        """
        for node in (self.sender_node, *self.receiver_nodes):
            node.check(model.config)
        card = card_of(model)
        for node in self.receiver_nodes:
            if card.parallel and node.site in ("mlp_in", "resid_mid"):
                raise ValueError(
                    f"{self.name}: blocks of {card.family} run attention and MLP side by side, so that no head of the "
                    f"layer writes to {node}; name another receiver."
                )
            if node.site != "logits":
                card.component(model, FIELD_NAMES[node.site])
