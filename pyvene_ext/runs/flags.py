"""The flags that studies share, in groups: what each means, how far it may go, and what it is for.

    @dataclass(frozen=True)
    class Config(px.flags.Model, px.flags.Prompts, px.flags.Sweep):
        position: str = "last"
        \"\"\"where the lens reads\"\"\"

A group is a base class of a study's config, not a part of it, because the same flat names then hold in the program
(`config.limit`), on the command line (`--limit`) and in config.yaml (`limit:`), and a study can give a flag another default by
one line. `--help` shows each base as a group. Types carry bounds and words (`Limit`, `Count` ...), so that a study that calls a
flag otherwise, because a published script does, still describes it once: `model_name: px.flags.ModelName`.

Nothing heavy is imported before a group is asked for what it is for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt, Unit
from typing_extensions import Doc

from pyvene_ext.io.bounds import EachOnce, Form, OneOrMore

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pyvene_ext.prompts.sets import PromptSet
    from pyvene_ext.prompts.tokenized import TokenizedPrompts

__all__ = [
    "BatchSize",
    "Count",
    "Dataset",
    "EachOnce",
    "Head",
    "Limit",
    "Loading",
    "Memory",
    "Model",
    "ModelName",
    "OneOrMore",
    "Out",
    "Problems",
    "Prompts",
    "Seed",
    "Sweep",
    "TranslatedWords",
    "Translation",
    "TranslationHeads",
    "check_rankings",
]

Count = Annotated[int, Ge(1)]
ModelName = Annotated[str, Doc("a shipped tiny model, a folder, or a name on the hub")]
BatchSize = Annotated[int, Ge(1), Doc("prompts a forward pass")]
Limit = Annotated[Annotated[int, Ge(1)] | None, Doc("only the first so many; by default all")]
Out = Annotated[Path | None, Doc("the folder that is written; by default outputs/STUDY/MODEL_DATASET")]
Seed = Annotated[int, Ge(0), Doc("of every random draw")]
Head = Annotated[str, Form(r"\d+\.\d+", "heads as layer.head, such as 2.5")]


@dataclass(frozen=True)
class Loading:
    """How models are loaded."""

    device: str | None = None
    """cpu, cuda ..., or auto to spread the model over what there is; by default a GPU if there is one"""
    dtype: str = "auto"
    """of the weights; auto keeps the checkpoint's"""
    revision: str | None = None
    """branch, tag or commit of a model on the hub; by default the newest"""

    def load(self, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """A model and its tokenizer (`models.loading.load_model` says what is refused)."""
        from pyvene_ext.models.devices import choose_device
        from pyvene_ext.models.loading import load_model

        return load_model(name, dtype=self.dtype, device=choose_device(self.device), revision=self.revision)


@dataclass(frozen=True)
class Model(Loading):
    """One model, and the seed of what is drawn for it."""

    model: ModelName = "tiny-qwen2.5"
    seed: Seed = 0

    def load_model(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model and its tokenizer."""
        return self.load(self.model)


@dataclass(frozen=True)
class Dataset:
    """Prompts."""

    dataset: str = "ioi_en"
    """ioi_en, ioi_zh, a .json or .jsonl file, a saved `datasets` folder, or a name on the hub"""
    limit: Limit = None
    batch_size: BatchSize = 16

    def load_prompts(self) -> PromptSet:
        """The prompt set, or its first --limit prompts."""
        from pyvene_ext.prompts.sets import PromptSet

        found = PromptSet.load(self.dataset)
        return replace(found, prompts=found.prompts[: self.limit])


@dataclass(frozen=True)
class Prompts(Dataset):
    """Prompts with two answers each."""

    answers: Literal["first_token", "first_difference"] = "first_token"
    """first_difference for names of several tokens that begin alike: the shared tokens join the prompt"""

    def tokenize(
        self, prompts: PromptSet, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> TokenizedPrompts:
        """The clean texts as tokens; ValueError for one that is too long for the model."""
        from pyvene_ext.models.sizes import n_positions

        return prompts.tokenize(tokenizer, answers=self.answers, max_length=n_positions(model.config))

    def tokenize_pairs(
        self, prompts: PromptSet, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[TokenizedPrompts, TokenizedPrompts]:
        """The clean and the corrupt texts as tokens."""
        from pyvene_ext.methods.patching.pairs import both_texts

        return both_texts(prompts, model, tokenizer, self.answers)


@dataclass(frozen=True)
class Memory:
    """What interventions may take, where many run at once."""

    memory: Annotated[float, Gt(0), Unit("GiB")] | None = None
    """GiB besides the weights, from which batches of interventions follow; by default half of the weights, at least 0.25"""

    @property
    def memory_bytes(self) -> int | None:
        """--memory in bytes."""
        return None if self.memory is None else min(int(self.memory * 2**30), 2**60)


@dataclass(frozen=True)
class Sweep(Memory):
    """How a sweep runs."""

    compile: bool = False
    """let torch.compile fuse the MLPs: a minute at the start, for long runs on a GPU"""
    dry_run: bool = False
    """show what would be done, and neither run nor write anything"""


@dataclass(frozen=True)
class Problems(Loading):
    """Word problems that one or more models reason about (`runs.reasoning`)."""

    models: OneOrMore[str] = ("tiny-qwen2.5",)
    """one or more of: a shipped tiny model, a folder, a name on the hub"""
    problems: str = "tiny"
    """tiny (held-out word problems of the tiny models), gsm8k, or a .jsonl or .json file in GSM8K's form"""
    out: Annotated[
        Path | None, Doc("the folder that is written; by default outputs/critical_heads/STUDY/PROBLEMS_MODELS")
    ] = None
    limit: Limit = None
    shots: Annotated[int, Ge(0)] = 0
    """so many solved problems are put before each question, for models that are no instruct models"""
    shots_from: str | None = None
    """where they are taken from, as in --problems; by default problems that tiny or gsm8k train on, or a file's other problems"""
    chat: bool = False
    """ask in the chat template of the model's tokenizer, for instruct models"""
    max_new_tokens: Count = 32
    """where the reasoning is cut, with its answer"""
    answer_tokens: Count = 8
    """where the answer is cut, once the reasoning is given"""
    batch_size: Count = 64
    """problems a forward pass"""
    seed: Seed = 0

    def check_flags(self) -> None:
        """Raise ValueError for two models of one name. A study's own `check_flags` calls it."""
        if len({Path(name).name for name in self.models}) < len(self.models):
            raise ValueError("--models names one or more models, each once.")


@dataclass(frozen=True)
class Translation(Loading):
    """Sentences with their translations, and from which score on a head counts as found (`runs.translation`)."""

    model: ModelName = "tiny-gemma2"
    dataset: str | None = None
    """a .tsv or .jsonl file, en_fr, or a name on the hub; by default opus-100, and en_fr with a shipped model"""
    split: str | None = None
    """of a data set on the hub; by default train[:1000], and test for pairs without English"""
    template: str = "{source_label}: {source} {target_label}: {target}"
    """of a prompt"""
    criterion: Literal["difference", "translation"] | None = None
    """what must be above the threshold: translation - control, or translation itself, the default with a shipped model"""
    threshold: float | None = None
    """by default the published one of the model, else 0.05 (of translation itself 0.13)"""
    thresholds: tuple[str, ...] = ()
    """of single languages, as in ja=0.03"""
    known: Path | None = None
    """a file of published heads and thresholds; by default that of the literature"""
    batch_size: BatchSize = 8

    def load_model(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model and its tokenizer."""
        return self.load(self.model)


@dataclass(frozen=True)
class TranslatedWords(Translation):
    """Prompts that each ask for one word of a translation (`runs.translation`)."""

    pair: str = "en-fr"
    """the languages, source first"""
    words: OneOrMore[Annotated[int, Ge(0)]] = (1, 2)
    """which words of the translation are asked for, the first being 0"""
    limit: Annotated[int, Ge(4)] = 40
    """at most so many prompts of each word, two a swap"""
    seed: Seed = 0


@dataclass(frozen=True)
class TranslationHeads(TranslatedWords):
    """The heads that are held to cause a translation."""

    heads: EachOnce[Head] = ()
    """the heads, as in 4.5; by default those found by their attention"""


def check_rankings(rankings: tuple[str, ...], models: tuple[str, ...]) -> None:
    """Raise ValueError unless there is a ranking for each model, or none at all."""
    if rankings and len(rankings) != len(models):
        raise ValueError(f"--rankings names {len(rankings)} files for {len(models)} models; give one each.")
