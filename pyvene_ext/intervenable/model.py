"""pyvene's IntervenableModel with the same signature and without its silent failures.

Differences from `pyvene.IntervenableModel`:

* Locations, units, heads, layers, groups and sources are checked before anything runs (`locations`, `checks`); after a run, every
  intervention must have fired.
* Edits are made on a copy and returned, so that they never reach the caller's tensors, other outputs or autograd's saved values.
* Only its own hooks are removed. Construction and every call, even one that raises, leave the model as it was: hooks, train mode,
  grad flags, config, attention implementation.
* Negative positions count back from each example's last real token (attention mask), under either padding side. Where a model
  would count padding (GPT-2's learned positions), position ids that are not given follow from the mask, as in `generate`.
* `generate` intervenes on the prompt, on new tokens or on both, by position, the same with and without a cache.
* Trainable interventions get the component's exact width, whatever the head size.

A model without a card runs as pyvene's mappings describe it (`config`): locations and sources are checked and hooks removed in
the same way, but what the mappings name has not been verified.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, reduce
from pathlib import Path
from typing import Any

import pyvene
import torch
from huggingface_hub import create_repo, snapshot_download, upload_folder
from huggingface_hub.errors import HFValidationError
from pyvene import CollectIntervention, IntervenableConfig, RepresentationConfig, TrainableIntervention
from pyvene.models.modeling_utils import HandlerList
from torch import Tensor, nn

from modelcards import Card, Taps, find_card, register
from pyvene_ext.intervenable.calls import Calls, by_key
from pyvene_ext.intervenable.checks import check_activation
from pyvene_ext.intervenable.config import as_config, check_config, in_pyvenes_names, with_exact_widths
from pyvene_ext.intervenable.generation import Generation, copy_nested, n_source_positions
from pyvene_ext.intervenable.locations import with_position_ids
from pyvene_ext.intervenable.saving import intervention_class, load_interventions, read_weights, save_interventions
from pyvene_ext.models.hooks import refuse_compiled
from pyvene_ext.models.latent_steps import is_unrolling
from pyvene_ext.models.modes import restoring_flags

# The residual stream between attention and MLP enters a norm and, later, a sum: no hook can give both a new tensor. It is a fresh
# sum that nothing else refers to and autograd does not save, so here, and only here, the edit is in place.
EDITED_IN_PLACE = frozenset({"resid_mid"})


class IntervenableModel(pyvene.IntervenableModel):
    """pyvene's IntervenableModel, checked, and exact for models with a card."""

    intervention_hooks: dict[str, Callable[..., Any]]

    def __init__(self, config: Any, model: nn.Module, **kwargs: Any) -> None:
        """Build the interventions of a config.

        Args:
            config: an `IntervenableConfig`, or a representation or list of them as pyvene takes it; components may be called by
                the names of their sites ("z", "resid_post").
            model: a transformers model of a class that `modelcards` covers, or a subclass of one; any other model as far as
                pyvene's own mappings, or paths of modules, describe it.
            **kwargs: pyvene's. `use_fast` is accepted and has no effect: the general path is as fast and never wrong.

        Raises:
            ValueError: `config` has something that this model does not have or that pyvene would misread.
        """
        card = find_card(model)
        config = as_config(config)
        if card is not None:
            register(type(model))
            config = in_pyvenes_names(config)
        check_config(config, model, card)
        places = [(item.component, item.layer) for item in config.representations]
        taps = nullcontext() if card is None else Taps(model, card, places)
        kwargs.pop("use_fast", None)
        with taps, restoring_flags(model):
            super().__init__(with_exact_widths(config, model, card), model, **kwargs)
        self.config = config
        self.config.model_type = str(type(model))
        self._card: Card | None = card
        self._taps: AbstractContextManager[Any] = taps
        self._calls = Calls(
            model,
            card,
            self.mode,
            self.sorted_keys,
            self._intervention_group,
            self.representations,
            self.interventions,
        )
        self._handles: list[Any] = []
        self._attached: set[tuple[str, str]] = set()
        self._fired: set[tuple[str, str]] = set()
        self._active = False
        self._reading = False
        self._hook_device: torch.device | None = None
        self._generation: Generation | None = None
        self.intervention_hooks = {
            key: self._hook_type(key, register_hook) for key, register_hook in self.intervention_hooks.items()
        }

    # -- running ----------------------------------------------------------------------------------------------------------

    def forward(
        self,
        base: Mapping[str, Any],
        sources: Any = None,
        unit_locations: Mapping[str, Any] | None = None,
        source_representations: Any = None,
        subspaces: Any = None,
        labels: Tensor | None = None,
        output_original_output: bool | None = False,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        intervention_additional_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the model on `base` with the interventions; arguments and result are pyvene's.

        Args:
            base: a tokenised batch, the keyword arguments of the model's forward.
            sources: a source batch, or a list with one per group of interventions (None for a group without).
            unit_locations: where to intervene, as pyvene takes it (`locations.resolve_locations`); None: every position and head.
                An example with fewer places than another lists one of its places again, which is edited once. None for an
                intervention whose source is None leaves it out.
            source_representations: source activations instead of source batches, by key or in the order of the keys.
            subspaces: the subspaces of each intervention, as pyvene takes them: as many dimensions for every example.
            labels: for the model's loss.
            output_original_output: also run the model without interventions.
            return_dict: return pyvene's output object instead of a tuple.
            use_cache: as for the model.
            intervention_additional_kwargs: passed to the interventions.

        Returns:
            `(original or None, intervened)`, or `((original or None, collected), intervened)` if the config collects.

        Raises:
            ValueError: a location that does not exist or is ambiguous, a missing source, or an intervention that never fired.
        """
        call = self._calls.checked(
            base,
            sources,
            source_representations,
            unit_locations,
            subspaces,
            labels=labels,
            twice=output_original_output,
        )
        base = with_position_ids(base, self._card)
        # Run here and not by pyvene, so that the original is the user's own model, without taps.
        original = self.model(**base) if output_original_output else None
        with self._running():
            outcome = super().forward(
                base,
                call.sources,
                call.locations,
                source_representations,
                subspaces,
                labels,
                False,
                return_dict,
                use_cache,
                intervention_additional_kwargs,
            )
        if return_dict:
            outcome.original_outputs = original
            return outcome
        first, intervened = outcome
        return ((original, first[1]), intervened) if self.return_collect_activations else (original, intervened)

    def generate(
        self,
        base: Mapping[str, Any],
        sources: Any = None,
        unit_locations: Mapping[str, Any] | None = None,
        source_representations: Any = None,
        intervene_on_prompt: bool = False,
        subspaces: Any = None,
        output_original_output: bool | None = False,
        intervention_additional_kwargs: dict[str, Any] | None = None,
        *,
        intervene_on_new_tokens: bool | None = None,
        new_token_rows: Callable[[int], Tensor] | None = None,
        decode: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate with the interventions on the prompt, on the new tokens, or on both.

        An intervention belongs to a position, not to a decoding step, so the same tokens come out with and without a cache. New
        tokens need a source of exactly one position; or a source that has, after the prompt's positions, one for each new token.

        Args:
            base: the tokenised prompts, keyword arguments of the model's `generate`.
            sources: as for `forward`.
            unit_locations: heads, and positions of the prompt. None: every position and head.
            source_representations: as for `forward`.
            intervene_on_prompt: intervene at the prompt's positions in `unit_locations`.
            subspaces: as for `forward`.
            output_original_output: also generate without interventions.
            intervention_additional_kwargs: passed to the interventions.
            intervene_on_new_tokens: intervene at the position of every token generated so far; heads are taken from
                `unit_locations`, its positions do not matter. Default: the opposite of `intervene_on_prompt`, as in pyvene. The
                first new token depends on the prompt alone, so only interventions on the prompt change it.
            new_token_rows: given a new token's index, 0 for the first, the examples to intervene on there (`batch`, bool);
                default all.
            decode: called instead of the model's `generate`, with the same arguments; it runs the model step by step.
            **kwargs: passed to the model's own `generate`.

        Returns:
            `(original or None, intervened)`, as pyvene does; if the config collects, `((original or None, collected),
            intervened)`, where every forward pass adds its activations, which with a cache are those of the new columns only.

        Raises:
            ValueError: as for `forward`; nothing to intervene on; a mode or option that generation does not support; or a source
                that does not fit the new tokens.
        """
        if intervene_on_new_tokens is None:
            intervene_on_new_tokens = not intervene_on_prompt
        if not (intervene_on_prompt or intervene_on_new_tokens):
            raise ValueError("nothing to intervene on: set intervene_on_prompt or intervene_on_new_tokens.")
        if self.mode != "parallel":
            raise ValueError("generate needs mode='parallel'.")
        if kwargs.get("prefill_chunk_size"):
            raise ValueError("generate with interventions cannot split the prompt: leave out prefill_chunk_size.")
        if self.as_adaptor or self._intervention_pointers:
            raise ValueError("generate takes no as_adaptor and no intervention_link_key: intervene in forward passes.")
        if not getattr(self.model, "can_generate", bool)():
            raise ValueError(f"{type(self.model).__name__} cannot generate; load the model as a causal language model.")
        if self._card is None and (getattr(self.model_config, "is_encoder_decoder", False) or "input_ids" not in base):
            raise ValueError(
                f"generate of {type(self.model).__name__} needs a card, which says where its tokens are: intervene in forward "
                "passes."
            )
        call = self._calls.checked(
            base,
            sources,
            source_representations,
            unit_locations,
            subspaces,
            twice=output_original_output,
            generating=True,
        )
        inputs = call.inputs
        self._cleanup_states()
        self.full_intervention_outputs.clear()
        original = self.model.generate(**base, **kwargs) if output_original_output else None
        try:
            with self._running():
                self._wait_for_forward_with_parallel_intervention(
                    call.sources,
                    self._broadcast_unit_locations(inputs.batch, call.locations),
                    self._broadcast_source_representations(source_representations),
                    self._broadcast_subspaces(inputs.batch, subspaces),
                    intervention_additional_kwargs,
                )
                self._generation = Generation(
                    inputs.length, inputs.batch, intervene_on_prompt, intervene_on_new_tokens, new_token_rows
                )
                self._check_new_token_sources(call.locations["sources->base"][1])
                self._handles.append(self.model.register_forward_pre_hook(self._generation.count, with_kwargs=True))
                intervened = (decode or self.model.generate)(**base, **kwargs)
                if (
                    kwargs.get("max_new_tokens") != 1
                    and self._generation.total == inputs.length
                    and not intervene_on_prompt
                ):
                    self._attached.clear()  # every text has ended with its first token, and no new token was run
            collected = [
                activation
                for key in self.sorted_keys
                if isinstance(self.interventions[key], CollectIntervention)
                for activation in self.activations[key]
            ]
        finally:
            self._generation = None
            self._cleanup_states(skip_activation_gc=True)
        return ((original, collected), intervened) if self.return_collect_activations else (original, intervened)

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Install the taps, check that every intervention fires, and remove all hooks at the end."""
        if self._active:
            raise RuntimeError(
                "this intervenable model is running already: finish that call first, or build a second one."
            )
        refuse_compiled(self.model)
        self._active = True
        self._attached.clear()
        self._fired.clear()
        try:
            with self._taps:
                yield
                silent = sorted({key for _, key in self._attached - self._fired})
                if silent:
                    raise ValueError(
                        f"the intervention {', '.join(silent)} never fired: the model did not run that module on this input "
                        "(embeddings are skipped when inputs_embeds is given; one new token needs no step on new tokens)."
                    )
        finally:
            self._active = False
            self._remove_forward_hooks()

    def _check_new_token_sources(self, locations: list[Any]) -> None:
        assert self._generation is not None
        if not self._generation.on_new_tokens:
            return
        by_key = dict(zip(self.sorted_keys, locations, strict=True))
        for key, activation in self.activations.items():
            n_prompt = self._generation.n_prompt_positions(by_key[key], self.representations[key].unit)
            if 1 < n_source_positions(activation) <= n_prompt:
                raise ValueError(
                    f"{key} has a source of {activation.shape[-2]} positions, and every new token takes exactly one: give a "
                    "source of one position (unit 'pos' or 'h.pos'), or intervene on the prompt only."
                )

    # -- pyvene's own steps, corrected ------------------------------------------------------------------------------------

    def _broadcast_unit_locations(self, batch_size: int, unit_locations: Any) -> Any:
        """Return locations that are resolved already: pyvene's version would set `use_fast`, which breaks later calls."""
        if unit_locations is not None:
            return unit_locations
        nowhere = [None] * len(self.interventions)
        return {"sources->base": (nowhere, nowhere)}

    def _broadcast_source_representations(self, source_representations: Any) -> Any:
        """Return a dict of our own: pyvene empties the caller's after the call."""
        return None if source_representations is None else by_key(source_representations, self.sorted_keys)

    def _reconcile_stateful_cached_activations(self, key: str, base: Tensor, locations: Any) -> Any:
        """Return the source in the precision in which the base is edited, if that is wider."""
        given = self.activations.get(key)
        one_vector = (
            isinstance(given, Tensor) and given.ndim == 1
        )  # pyvene would look for steps of a recurrent model in it
        source = given if one_vector else super()._reconcile_stateful_cached_activations(key, base, locations)
        return source.to(_widest(source, base)) if isinstance(source, Tensor) else source

    def _scatter_intervention_output(self, output: Any, intervened: Tensor, key: str, unit_locations: Any) -> Tensor:
        """Write a step of a recurrent model, of which pyvene can do so for one example only, as for several."""
        if self.representations[key].unit == "t" and unit_locations is not None:
            intervened = intervened.unsqueeze(1)
        return super()._scatter_intervention_output(output, intervened, key, unit_locations)

    def _remove_forward_hooks(self) -> None:
        """Remove our own hooks only; pyvene's version removes all hooks of the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _intervention_getter(self, keys: list[str], unit_locations: Any) -> HandlerList:
        self._reading, self._live = True, copy_nested(unit_locations[0])
        try:
            return super()._intervention_getter(keys, [self._live])
        finally:
            self._reading = False

    def _intervention_setter(self, keys: list[str], unit_locations_base: Any, *args: Any, **kwargs: Any) -> HandlerList:
        # pyvene's callback refers to this very list; during generation the hook refills it for each part of the sequence.
        self._live = copy_nested(unit_locations_base[0])
        return super()._intervention_setter(keys, [self._live], *args, **kwargs)

    def get_device(self) -> torch.device:
        """The device of the module being intervened on (modules may be on different ones), else the model's."""
        return self._hook_device or super().get_device()

    def _hook_type(self, key: str, register_hook: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the function by which pyvene hooks a module: its callback edits in place, so it gets a copy, which is returned."""
        before_module = "pre_hook" in register_hook.__name__
        intervention = self.interventions[key]
        in_place = self.representations[key].component in EDITED_IN_PLACE

        def attach(callback: Callable[..., Any], with_kwargs: bool = True) -> Any:
            reads = self._reading or isinstance(intervention, CollectIntervention)
            use = ("get" if self._reading else "set", key)
            live = self._live
            self._attached.add(use)

            def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any = None) -> Any:
                if reads and is_unrolling(self.model):
                    return None
                tensor, put_back = _first_tensor((args, kwargs) if before_module else output, before_module)
                if self._card is None and self._generation is not None:
                    self._generation.check_columns(tensor, key)
                self._hook_device = tensor.device
                if reads and self._generation is None:
                    edited = tensor.contiguous()
                else:
                    edited = tensor.clone(memory_format=torch.contiguous_format)
                if (
                    not reads
                ):  # in the precision of the intervention's own weights, which not all of pyvene's classes convert to
                    edited = edited.to(_widest(tensor, *intervention.parameters()))
                # pyvene's SkipIntervention looks for the module's input among the positional arguments.
                inputs = args or tuple(kwargs.values())[:1]

                def apply(part: Tensor) -> None:
                    if self._card is None:
                        check_activation(part, live, self.representations[key], self.model, self._calls.widths.get(key))
                    state = self._intervention_state[key]
                    edits = state.setter_version()
                    callback(module, inputs, kwargs, part)
                    # If the intervention returns None, pyvene's callback makes no edit.
                    if reads or state.setter_version() > edits:
                        self._fired.add(use)
                    if self.is_model_stateless:
                        state.reset()
                    elif use[0] == "set" and state.setter_version() == edits:
                        state.inc_setter_version()  # which counts steps

                # Of a recurrent model pyvene reads and edits every step.
                step = self._intervention_state[key].setter_version()
                passed = [] if self.is_model_stateless or live is None else [step not in row for row in live]
                if reads and use[0] == "set" and passed and all(passed):
                    self._intervention_state[key].inc_setter_version()
                    return None
                try:
                    if self._generation is None or use[0] == "get":
                        apply(edited)
                    else:
                        self._generation.apply(
                            apply, edited, live, self.representations[key].unit, self.activations, key
                        )
                finally:
                    self._hook_device = None
                if reads:
                    return None
                if any(passed):
                    edited[passed] = tensor[passed]
                if in_place:
                    tensor.copy_(edited)
                    return None
                return put_back(edited.to(tensor.dtype))

            handle = register_hook(hook, with_kwargs=True)
            self._handles.append(handle)
            return handle

        return attach

    # -- public methods ---------------------------------------------------------------------------------------------------

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters of the trainable interventions, and the model's own only after `enable_model_gradients()`.

        Construction does not freeze the user's model, so the model's grad flags do not tell what is to be trained here.
        """
        return [parameter for _, parameter in self.named_parameters()]

    def named_parameters(self, recurse: bool = True) -> list[tuple[str, nn.Parameter]]:
        """The trainable parameters with their names.

        Args:
            recurse: ignored, as in pyvene.

        Returns:
            The names and the parameters of `get_trainable_parameters`.
        """
        trainable = {  # by identity: a linked intervention has several keys
            id(intervention): (key, intervention)
            for key, intervention in reversed(self.interventions.items())
            if isinstance(intervention, TrainableIntervention)
        }
        named = [
            (f"{key}.{name}", parameter)
            for key, intervention in trainable.values()
            for name, parameter in intervention.named_parameters()
        ]
        if self.model_has_grad:
            named += [(f"model.{name}", p) for name, p in self.model.named_parameters() if p.requires_grad]
        return named

    def save(
        self,
        save_directory: str,
        save_to_hf_hub: bool = False,
        hf_repo_name: str = "my-awesome-model",
        include_model: bool = False,
    ) -> None:
        """Save the interventions, so that `load` gives the same ones; arguments are pyvene's.

        Args:
            save_directory: the folder.
            save_to_hf_hub: also upload the folder.
            hf_repo_name: the repository on the hub, created if it does not exist.
            include_model: also save the model's own parameters that require a gradient.

        Raises:
            ValueError: before anything is written: an intervention is a function, of a class from elsewhere, or one that could
                not be built again.
        """
        save_interventions(save_directory, self.interventions, self.representations, self.mode)
        if include_model:
            trained = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
            torch.save(trained, Path(save_directory) / "pytorch_model.bin")
        if save_to_hf_hub:
            create_repo(hf_repo_name, exist_ok=True)
            upload_folder(repo_id=hf_repo_name, folder_path=save_directory)

    @staticmethod
    def load(
        load_directory: str,
        model: nn.Module,
        local_directory: str | None = None,
        from_huggingface_hub: bool = False,
        include_model: bool = False,
    ) -> IntervenableModel:
        """Load an intervenable model that `save` wrote; arguments are pyvene's.

        Only intervention classes of pyvene and of this package are instantiated, and weights are read without executing code.

        Args:
            load_directory: a folder, or a repository on the hub.
            model: the model to intervene on.
            local_directory: where to put files from the hub.
            from_huggingface_hub: take `load_directory` for a repository even if there is such a folder.
            include_model: also load the model's own weights, in place.

        Returns:
            The intervenable model.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: an intervention class from elsewhere, a folder without interventions, or interventions of another width
                than the model's.
        """
        if from_huggingface_hub or not Path(load_directory).exists():
            try:
                load_directory = snapshot_download(load_directory, local_dir=local_directory)
            except HFValidationError:
                raise FileNotFoundError(f"there is no folder {load_directory}; check the path.") from None
        if not (Path(load_directory) / "config.json").is_file():
            raise ValueError(f"{load_directory} holds no intervenable model; give the folder that save has written.")
        config = load_interventions(load_directory)
        loaded = _load_pyvenes(load_directory, model) if config is None else IntervenableModel(config, model)
        if include_model:
            weights = Path(load_directory) / "pytorch_model.bin"
            model.load_state_dict(read_weights(weights), strict=False)
        return loaded

    def __deepcopy__(self, memo: dict[int, Any]) -> IntervenableModel:
        raise TypeError("an intervenable model cannot be copied: copy the model and build a new one from the config.")

    def __str__(self) -> str:
        """The interventions as JSON."""
        return json.dumps(
            {
                "model_type": self.model_type.__name__,
                "interventions": {key: str(intervention) for key, intervention in self.interventions.items()},
                "mode": self.mode,
            },
            indent=4,
        )


def _load_pyvenes(folder: str | Path, model: nn.Module) -> IntervenableModel:
    """Load what pyvene's own `save` has written."""
    saved = IntervenableConfig.from_pretrained(folder)
    kinds = [intervention_class(name) for name in saved.intervention_types]
    representations = [RepresentationConfig(*item) for item in saved.representations]
    config = IntervenableConfig(representations=representations, intervention_types=kinds, mode=saved.mode)
    loaded = IntervenableModel(config, model)
    facts = zip(saved.intervention_constant_sources, saved.intervention_dimensions, strict=True)
    for (key, intervention), (is_constant, dimension) in zip(loaded.interventions.items(), facts, strict=True):
        intervention.is_source_constant = is_constant
        if dimension is not None:
            intervention.set_interchange_dim(dimension)
        weights = Path(folder) / f"intkey_{key}.bin"
        if not weights.exists():
            continue
        state = read_weights(weights)
        if "source_representation" in state:
            vars(intervention).pop("source_representation", None)  # None, in whose place pyvene registers no buffer
            intervention.set_source_representation(state.pop("source_representation"))
        intervention.load_state_dict(state, strict=False)
    return loaded


def _widest(*tensors: Tensor) -> torch.dtype:
    """The narrowest floating-point type that holds all of these."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors if tensor.is_floating_point()))


def _first_tensor(value: Any, before_module: bool) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The tensor that a hook edits, chosen as pyvene does, and a function that puts an edited one back."""
    if before_module:
        args, kwargs = value
        if args:
            return args[0], lambda new: ((new, *args[1:]), kwargs)
        name = next(iter(kwargs))
        return kwargs[name], lambda new: (args, {**kwargs, name: new})
    if isinstance(value, tuple):
        return value[0], lambda new: (new, *value[1:])
    if isinstance(value, dict):
        name = next(iter(value))
        return value[name], partial(_with_entry, value, name)
    return value, lambda new: new


def _with_entry(output: dict, name: str, new: Tensor) -> dict:
    output[name] = new  # a model output of this very call, which nothing else refers to yet
    return output
