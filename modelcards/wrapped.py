"""Models changed by peft, torch or bitsandbytes such that a study of them would mislead: what to give instead."""

from __future__ import annotations

from typing import Any

from torch import nn


def what_is_wrapped(model: Any) -> str | None:
    """Say what to give instead of a wrapper, known by the attributes that peft and torch give it.

    Args:
        model: a module without a card.

    Returns:
        The end of a sentence about the model; None if it is no wrapper.
    """
    if hasattr(model, "peft_config"):
        configs = model.peft_config.values() if isinstance(model.peft_config, dict) else ()
        if any(getattr(config, "is_prompt_learning", False) for config in configs):
            return "learns a prompt, which is no part of the model that its card describes, and is not supported"
        return (
            "wraps a model with adapters; give its get_base_model(), in which they stay active, or the plain model that "
            "merge_and_unload() returns, which methods that read weights need"
        )
    if isinstance(inner := getattr(model, "module", None), nn.Module) and hasattr(inner, "config"):
        return "wraps a model to run it on several devices; give its .module"
    return None


def refuse_mixed_batches(model: nn.Module) -> None:
    """Refuse LLM.int8 (bitsandbytes): a column with an outlier in any row of a batch stays in half precision for all.

    Args:
        model: the model.

    Raises:
        ValueError: names a layer that is so quantised.
    """
    # Asked whenever a card is looked up, so without `modules()`, which takes ten times as long.
    rest: list[Any] = [model]
    while rest:
        module = rest.pop()
        rest += [child for child in module._modules.values() if child is not None]
        if type(module).__name__ == "Linear8bitLt" and getattr(getattr(module, "state", None), "threshold", False):
            name = next(name for name, other in model.named_modules() if other is module)
            raise ValueError(
                f"{name} is quantised so that a prompt's numbers depend on the others in its batch; load the model with "
                "BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0), or in 4 bits."
            )
