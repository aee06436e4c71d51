"""One sentence for each error of transformers, safetensors and the hub."""

from __future__ import annotations

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassFieldValidationError,
)
from safetensors import SafetensorError

from pyvene_ext.models.loading import names
from pyvene_ext.models.loading.fetch import PUBLISHED
from pyvene_ext.models.loading.names import listed


def explained(error: Exception, name: str, revision: str | None, otherwise: str) -> Exception:
    """Word an error of transformers, safetensors or the hub in one sentence that says what to do.

    Args:
        error: the error.
        name: what the user calls the model.
        revision: the revision asked for.
        otherwise: what is wrong with the model if the error is of no known kind, such as "cannot be loaded".

    Returns:
        The error to raise from it.
    """
    causes: list[BaseException] = [error]
    while following := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(following)

    def caused_by(*kinds: type[BaseException]) -> str:
        """The first line of the first cause of these kinds."""
        return next((first_line(cause) for cause in causes if isinstance(cause, kinds)), "")

    instead = (
        f"use a local folder, a shipped model ({listed(names.SHIPPED_MODELS)}), or one that "
        f"`python -m pyvene_ext.models fetch NAME` gets ({listed(PUBLISHED)})"
    )
    if caused_by(GatedRepoError):
        return PermissionError(
            f"{name} is a gated model: accept its licence at https://huggingface.co/{name}, then set HF_TOKEN or run `hf auth "
            f"login`, or {instead}."
        )
    if caused_by(RevisionNotFoundError):
        return ValueError(f"{name} has no revision {revision!r}; give a branch, tag or commit of the repository.")
    if caused_by(RepositoryNotFoundError):
        return FileNotFoundError(
            f"there is no folder and no public hub repository {name}; check the name, set HF_TOKEN if it is private, or "
            f"{instead}."
        )
    if isinstance(error, OSError) and "named model.safetensors" in str(error):
        return ValueError(
            f"{name} has no weights in safetensors format, and pickled ones can run code when read; if you trust them, convert "
            "them once with AutoModelForCausalLM.from_pretrained(..., use_safetensors=False).save_pretrained(FOLDER)."
        )
    if reason := caused_by(HfHubHTTPError):
        return OSError(f"the hub refused {name} ({reason}); try again later, or {instead}.")
    if caused_by(OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError):
        return ConnectionError(
            f"{name} is not in the local cache and the hub cannot be reached; go online (and unset HF_HUB_OFFLINE), or {instead}."
        )
    if isinstance(error, ImportError):
        return ValueError(
            f"{name} needs a package that is not installed ({first_line(error)}); install it, or get the plain weights."
        )
    if "ignore_mismatched_sizes" in str(error):
        return ValueError(
            f"{name} has weights whose shapes differ from its config.json; get files that belong together."
        )
    if reason := caused_by(SafetensorError):
        return ValueError(f"the weights of {name} are broken ({reason}); copy or download them again.")
    kind = OSError if isinstance(error, OSError) else ValueError
    return kind(f"{name} {otherwise} ({first_line(error)}).")


def first_line(error: BaseException) -> str:
    """Shorten an error to the first line of its text.

    Args:
        error: the error.

    Returns:
        The line without its full stop; with the kind of a KeyError, whose text is only the key.
    """
    if isinstance(error, StrictDataclassFieldValidationError):  # its first line names the field, the second the error
        return " ".join(str(error).split())
    line = str(error).strip().split("\n")[0].rstrip(" .:")
    return f"{type(error).__name__}: {line}" if isinstance(error, KeyError) and line else line or type(error).__name__
