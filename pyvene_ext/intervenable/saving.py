"""Interventions as files: what `save` writes loads without loss; what would not is refused before anything is written.

The folder is pyvene's: `config.json`, and in `intkey_<key>.bin` the weights of each intervention that has any. pyvene's config
does not say what an intervention was built with (a rank, a width that was set later, a vector), so it has one more field here,
with all of that.
"""

from __future__ import annotations

import importlib
import json
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyvene
import torch
from pyvene import IntervenableConfig, RepresentationConfig
from torch import Tensor, nn

from pyvene_ext.io.files import atomic_path
from pyvene_ext.io.hashes import tensors_hash

FIELD = "pyvene_ext"  # of config.json
INTERNAL = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class InterventionParts:
    """An intervention apart from its tensors, as JSON-able data.

    Attributes:
        kind: its class, as pyvene writes it.
        arguments: of its constructor.
        attributes: those that are no parameters or buffers.
        has_weights: whether it has tensors that its constructor does not make of the arguments.
    """

    kind: str
    arguments: dict[str, int]
    attributes: dict[str, Any]
    has_weights: bool = True


def save_interventions(
    folder: str | Path,
    interventions: Mapping[str, nn.Module],
    representations: Mapping[str, RepresentationConfig],
    mode: str,
) -> None:
    """Write interventions to a folder.

    Args:
        folder: created if it does not exist.
        interventions: by key.
        representations: of each key.
        mode: parallel or serial.

    Raises:
        ValueError: an intervention is a function, of a class from elsewhere, or one that could not be built again.
    """
    parts = [_parts(key, intervention) for key, intervention in interventions.items()]
    plain = [
        representations[key]._replace(
            intervention=None,
            intervention_type=None,
            source_representation=None,
            hidden_source_representation="source_representation" in intervention.state_dict() or None,
            subspace_partition=one.attributes.get("subspace_partition"),
        )
        for (key, intervention), one in zip(interventions.items(), parts, strict=True)
    ]
    Path(folder).mkdir(parents=True, exist_ok=True)
    for (key, intervention), one in zip(interventions.items(), parts, strict=True):
        if one.has_weights:
            with atomic_path(Path(folder) / f"intkey_{key}.bin") as temporary:
                torch.save(intervention.state_dict(), temporary)
    IntervenableConfig(
        representations=plain,
        intervention_types=[one.kind for one in parts],
        mode=mode,
        sorted_keys=list(interventions),
        # The dimensions and whether sources are constant, for pyvene's own `load`.
        intervention_dimensions=[_plain(getattr(one, "interchange_dim", None)) for one in interventions.values()],
        intervention_constant_sources=[one.attributes["is_source_constant"] for one in parts],
        **{FIELD: [asdict(one) for one in parts]},
    ).save_pretrained(folder)


def load_interventions(folder: str | Path) -> IntervenableConfig | None:
    """Build the interventions that `save_interventions` has written, with their weights, executing no code from the files.

    Args:
        folder: the folder.

    Returns:
        A config with an instance for every representation; None if pyvene wrote the folder.

    Raises:
        ValueError: an intervention class from elsewhere.
    """
    saved = IntervenableConfig.from_pretrained(folder)
    if not hasattr(saved, FIELD):
        return None
    representations = []
    for item, key, fields in zip(saved.representations, saved.sorted_keys, getattr(saved, FIELD), strict=True):
        parts, weights = InterventionParts(**fields), Path(folder) / f"intkey_{key}.bin"
        tensors = read_weights(weights) if parts.has_weights else {}
        item = RepresentationConfig(*item)._replace(hidden_source_representation=None)
        representations.append(item._replace(intervention=_built(parts, tensors)))
    return IntervenableConfig(representations=representations, mode=saved.mode)


def intervention_class(name: str) -> type:
    """Import an intervention class of pyvene or of this package.

    Args:
        name: as pyvene writes it, "<class 'pyvene.models.interventions.ZeroIntervention'>".

    Returns:
        The class.

    Raises:
        ValueError: it is from elsewhere, or there is none.
    """
    module, _, cls = name.removeprefix("<class '").removesuffix("'>").rpartition(".")
    try:
        found = (
            getattr(importlib.import_module(module), cls) if module.split(".")[0] in ("pyvene", "pyvene_ext") else None
        )
    except (ImportError, AttributeError):
        found = None
    if not (isinstance(found, type) and issubclass(found, pyvene.Intervention)):
        raise ValueError(
            f"{name} is not an intervention of pyvene or pyvene_ext: rebuild this model from its config in code."
        )
    return found


def _parts(key: str, intervention: nn.Module) -> InterventionParts:
    """Take an intervention apart; raises ValueError unless it could be put together again."""
    kind = type(intervention)
    refusal = f"{key} ({kind.__name__}) cannot be saved: "
    advice = "; keep the code that builds this model instead, or use a class of pyvene or pyvene_ext."
    try:
        intervention_class(str(kind))
    except ValueError:
        raise ValueError(
            f"{refusal}it is a function or a class of your own, and loading runs no such code{advice}"
        ) from None
    attributes: dict[str, Any] = {}
    for name, value in vars(intervention).items():
        if name not in INTERNAL:
            try:
                attributes[name] = _plain(value)
            except TypeError:
                raise ValueError(f"{refusal}its {name} is a {type(value).__name__}{advice}") from None
    parts = InterventionParts(str(kind), _arguments(intervention), attributes)
    try:
        with torch.random.fork_rng(devices=[]):  # constructors draw weights
            again, bare = _built(parts, intervention.state_dict()), _built(parts, {})
    except Exception as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{refusal}{kind.__name__}(...) fails with the values it has ({why}){advice}") from error
    facts = _facts(intervention)
    if _facts(again) != facts:
        raise ValueError(f"{refusal}built again with the values it has it would differ{advice}")
    return replace(parts, has_weights=_facts(bare) != facts)


def _arguments(intervention: Any) -> dict[str, int]:
    """What the constructors of pyvene's classes take, read off the instance."""
    width, encoder = getattr(intervention, "embed_dim", None), getattr(intervention, "autoencoder", None)
    weight = getattr(
        getattr(intervention, "rotate_layer", intervention), "weight", getattr(intervention, "W_enc", None)
    )
    found = {
        "embed_dim": None if width is None else int(width),
        "low_rank_dimension": None if weight is None else weight.shape[1],
        "latent_dim": None if encoder is None else encoder.encoder[0].out_features,
    }
    return {name: value for name, value in found.items() if value is not None}


def _built(parts: InterventionParts, tensors: Mapping[str, Tensor]) -> Any:
    """Put an intervention together."""
    intervention: Any = intervention_class(parts.kind)(**parts.arguments)
    parameters = dict(intervention.named_parameters())
    for name, tensor in tensors.items():
        if "." not in name and name not in parameters:  # buffers that came later, or have another shape by now
            vars(intervention).pop(name, None)
            intervention.register_buffer(name, tensor)
    if tensors:
        intervention.load_state_dict(tensors, assign=True)
    for name, value in parts.attributes.items():
        if name == "interchange_dim" and value is not None:
            intervention.set_interchange_dim(value)
        else:
            setattr(intervention, name, value)
    return intervention


def _facts(intervention: nn.Module) -> Any:
    attributes = {name: _plain(value) for name, value in vars(intervention).items() if name not in INTERNAL}
    tensors = ((name, tensor.detach().cpu()) for name, tensor in sorted(intervention.state_dict().items()))
    return attributes, tensors_hash(tensors)


def _plain(value: Any) -> Any:
    """A value as JSON gives it back; raises TypeError for what JSON cannot hold."""
    return json.loads(json.dumps(value, default=_listed))


def _listed(value: Any) -> Any:
    if isinstance(value, range):
        return list(value)
    if hasattr(value, "tolist"):  # tensors and arrays
        return value.tolist()
    raise TypeError


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read tensors that were saved.

    Args:
        path: a file of torch.

    Returns:
        The tensors by name, on the CPU.

    Raises:
        ValueError: it holds more than weights, and is not loaded, because that could run code.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds more than weights, and is not loaded, because that could run code; save the interventions again."
        ) from None
