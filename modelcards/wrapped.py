"""Models that torch, peft and others have wrapped, so that hooks would miss part of what they compute: what to give instead."""

from __future__ import annotations

from typing import Any

from torch import nn


def what_is_wrapped(model: Any) -> str | None:
    """Say what to give instead of a wrapper, known by the attributes that torch and peft give it.

    Args:
        model: a module without a card.

    Returns:
        The end of a sentence about the model; None if it is no wrapper.
    """
    if hasattr(model, "_orig_mod"):
        return "is compiled, and compiled code calls no hooks; give the model that went into torch.compile"
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


def check_parts(model: nn.Module) -> None:
    """Check that every part of a model calls hooks, and computes a prompt's numbers whatever else is in its batch.

    Args:
        model: the model.

    Raises:
        ValueError: a part is compiled, whether replaced or in place, or quantised by what the batch holds; names it.
    """
    for name, module in model.named_modules():
        own = vars(module)
        if (
            own.get("_compiled_call_impl") is not None
            or "_orig_mod" in own["_modules"]
            or hasattr(own.get("forward"), "_torchdynamo_orig_callable")
        ):
            raise ValueError(
                f"{name or 'the model'} is compiled, and compiled code calls no hooks; load the model anew and compile nothing "
                "(sweep has compile=True)."
            )
        # LLM.int8 (bitsandbytes) keeps the columns of a batch that hold an outlier in half precision.
        if getattr(own.get("state"), "threshold", 0.0) and type(module).__name__ == "Linear8bitLt":
            raise ValueError(
                f"{name} is quantised so that a prompt's numbers depend on the others in its batch; load the model with "
                "BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0), or in 4 bits."
            )
