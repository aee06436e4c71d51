"""Generation with an intervention in place: the plain engine for new tokens."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from numbers import Integral
from typing import Any, Literal, get_args

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from modelcards import n_positions
from pyvene_ext.engine.compile import Compiled, compile_spec, for_generation
from pyvene_ext.engine.resolve import resolve
from pyvene_ext.intervenable.model import IntervenableModel
from pyvene_ext.intervenable.statistics import Reference
from pyvene_ext.io.errors import counted
from pyvene_ext.models.devices import input_device, no_gradients
from pyvene_ext.models.modes import evaluating
from pyvene_ext.prompts.tokenized import TokenizedPrompts, check_tokenized
from pyvene_ext.specs.joint import Spec, members

GenerationScope = Literal["prompt", "new", "both"]
# Options of transformers' generate that would not do what they say, and why.
OWN = {
    **dict.fromkeys(("input_ids", "inputs", "inputs_embeds", "attention_mask", "position_ids"), "which takes prompts"),
    **dict.fromkeys(
        ("num_return_sequences", "return_dict_in_generate"), "which returns the tokens of one text per prompt"
    ),
    "max_length": "which takes max_new_tokens",
}


def generate(
    model: PreTrainedModel,
    spec: Spec | None,
    prompts: TokenizedPrompts,
    *,
    max_new_tokens: int = 20,
    scope: GenerationScope = "both",
    reference: Reference | None = None,
    batch_size: int = 8,
    **options: Any,
) -> list[list[int]]:
    """Generate from each prompt, greedily by default, with an intervention in place.

    An intervention is tied to positions, so that the text is the same with and without a cache. The first new token is computed
    at the prompt's last token, and so depends on edits of the prompt alone.

    Args:
        model: a causal language model with a card; used in eval mode and restored afterwards, also after an error.
        spec: one edit, or a tuple of them (made jointly); None: the untouched model.
        prompts: of any lengths.
        max_new_tokens: most tokens per text.
        scope: edit the positions of the prompt that the spec names ("prompt"), every new token ("new"), or both, as steering
            usually does. At new tokens a spec's heads apply and its positions do not. (pyvene's own `generate` edits either new
            tokens, by default, or the prompt, never both: with its defaults the first new token is that of the untouched model.)
        reference: statistics that replacements are computed from; by default those of `prompts`, where they are needed.
        batch_size: prompts per forward pass.
        **options: passed to transformers' `generate` (`do_sample`, `temperature`, `num_beams` ...).

    Returns:
        The new tokens of each prompt, without padding after the end of a text.

    Raises:
        ValueError: before the model runs: an unknown scope, no new tokens or more than the model takes, an option that has no
            meaning here, or a spec that does not fit the model, the prompts or new tokens.
    """
    if scope not in get_args(GenerationScope):
        raise ValueError(f"unknown scope {scope!r}; choose among {', '.join(get_args(GenerationScope))}.")
    if not isinstance(max_new_tokens, Integral) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be 1 or more, not {max_new_tokens!r}.")
    if max_new_tokens == 1 and spec is not None and scope == "new":
        raise ValueError(
            "the only new token depends on edits of the prompt alone; generate more tokens, or choose another scope."
        )
    check_tokenized(model, prompts)
    if not model.can_generate():
        raise ValueError(f"{type(model).__name__} cannot generate; load the model as a causal language model.")
    _check_options(options)
    longest, context = max(map(len, prompts.input_ids), default=0), n_positions(model.config)
    if longest + max_new_tokens - 1 > context:
        raise ValueError(
            f"the longest prompt has {counted(longest, 'token')}, which with {max_new_tokens} new ones are more than the "
            f"{context} that the model takes; give shorter prompts, or generate fewer."
        )
    resolved = None if spec is None else resolve([spec], model, prompts, reference=reference, directions={})
    for edit in () if spec is None or scope == "prompt" else members(spec):
        if not edit.on_new_tokens or edit.kind == "resample":
            raise ValueError(
                f"{edit.name}: this intervention is not defined at generated tokens; add a vector, ablate by zero or by the mean "
                "over tokens, or choose the scope prompt."
            )
    resolved = None if resolved is None else resolved.with_statistics(batch_size=batch_size, progress=False)
    options = {"do_sample": False, "max_new_tokens": max_new_tokens, "pad_token_id": prompts.pad_id, **options}
    found: dict[int, list[int]] = {}
    with evaluating(model), no_gradients(model):
        for batch in prompts.batches(batch_size):
            base = batch.inputs(input_device(model))
            if resolved is None:
                tokens = model.generate(**base, **options)
            else:
                compiled = for_generation(compile_spec(resolved.specs[0], batch, resolved), scope, max_new_tokens)
                tokens = _intervened(model, base, compiled, scope, options)
            for prompt, row in zip(batch.index, tokens[:, batch.input_ids.shape[1] :].tolist(), strict=True):
                found[prompt] = _until_end(row, model)
    return [found[prompt] for prompt in range(len(prompts))]


def _check_options(options: Iterable[str]) -> None:
    known = {**vars(GenerationConfig()), **inspect.signature(GenerationMixin.generate).parameters}
    for option in options:
        if option in OWN:
            raise ValueError(f"{option} cannot be an option of generate, {OWN[option]}.")
        if option not in known and (close := difflib.get_close_matches(option, known, n=1)):
            raise ValueError(f"generate has no option {option!r}; did you mean {close[0]!r}?")


def _intervened(
    model: PreTrainedModel, base: dict[str, Tensor], compiled: Compiled, scope: str, options: dict[str, Any]
) -> Tensor:
    iv = IntervenableModel(compiled.config, model)
    _, tokens = iv.generate(
        base,
        unit_locations=compiled.unit_locations,
        source_representations=compiled.source_representations(iv.sorted_keys),
        intervene_on_prompt=scope != "new",
        intervene_on_new_tokens=scope != "prompt",
        **options,
    )
    return tokens


def _until_end(tokens: list[int], model: PreTrainedModel) -> list[int]:
    """The tokens before the first end-of-text token."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = set(ends if isinstance(ends, list) else [ends])
    return tokens[: next((at for at, token in enumerate(tokens) if token in ends), len(tokens))]
