"""The flags that studies share, in groups, each with its meaning and bounds.

    @dataclass(frozen=True)
    class Config(px.flags.Model, px.flags.Prompts, px.flags.Sweep):
        position: str = "last"
        \"\"\"where the lens reads\"\"\"

A group is a base class of a study's config rather than a field of it. The same flat name then works in the program
(`config.limit`), on the command line (`--limit`) and in config.yaml (`limit:`), and a study overrides a default in one line.
`--help` shows each base class as a group. Types carry bounds and descriptions (`Limit`, `Count` ...), so that a study whose
published script names a flag differently still shares the description: `model_name: px.flags.ModelName`.

Heavy imports wait until a method of a group is called.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt, Unit
from typing_extensions import Doc

from pyvene_ext.io.bounds import EachOnce, Matches, OneOrMore

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pyvene_ext.prompts.sets import PromptSet
    from pyvene_ext.prompts.tokenized import TokenizedPrompts
    from pyvene_ext.stats.stopping import Stopping

__all__ = [
    "Ablations",
    "BatchSize",
    "Count",
    "Dataset",
    "Deciding",
    "EachOnce",
    "HeadLabel",
    "Limit",
    "Loading",
    "Memory",
    "Model",
    "ModelName",
    "OneOrMore",
    "Out",
    "Problems",
    "Prompts",
    "Ranking",
    "Regeneration",
    "Rule",
    "Run",
    "Score",
    "Seed",
    "Sweep",
    "TranslatedWords",
    "Translation",
    "TranslationHeads",
    "check_rankings",
]

Count = Annotated[int, Ge(1)]
ModelName = Annotated[str, Doc("a shipped or fetched model, folder, GGUF file, or hub name")]
BatchSize = Annotated[int, Ge(1), Doc("prompts per forward pass")]
Limit = Annotated[
    Annotated[int, Ge(0)] | None, Doc("use only the first N, 0 for all; by default as many as ten minutes allow here")
]
Out = Annotated[Path | None, Doc("folder to write; by default outputs/STUDY/MODEL_DATASET")]
Seed = Annotated[int, Ge(0), Doc("seed of every random draw")]
HeadLabel = Annotated[str, Matches(r"\d+\.\d+", "heads as layer.head, such as 2.5")]
Score = Literal["flow", "hub", "skip", "composite"]  # of `methods.reasoning.block_scores`
Rule = Literal["flexible-extract", "strict-match", "last-of-line"]  # of `methods.solving.answers`


@dataclass(frozen=True)
class Run:
    """Whether the study runs at all."""

    dry_run: bool = False
    """say what would be done and how long it takes, without running the study or writing anything"""


@dataclass(frozen=True)
class Loading(Run):
    """How models are loaded."""

    device: str | None = None
    """cpu, cuda ..., or auto to spread the model over all devices; by default a GPU if there is one"""
    dtype: str = "auto"
    """dtype of the weights; auto keeps the checkpoint's"""
    revision: str | None = None
    """branch, tag or commit of a model on the hub; by default the newest"""

    def load(self, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load a model and its tokenizer with these flags.

        Args:
            name: a shipped or fetched model, a folder, a GGUF file, or a name on the hub.

        Returns:
            Model, in evaluation mode, and tokenizer.

        Raises:
            ValueError: see `models.loading.load_model`.
        """
        from pyvene_ext.models.devices import choose_device, fits_beside
        from pyvene_ext.models.loading import load_model
        from pyvene_ext.runs.plans import once

        how: dict[str, Any] = {"dtype": self.dtype, "device": choose_device(self.device), "revision": self.revision}
        return once(
            ("model", name, *how.values()), lambda: load_model(name, **how), lambda loaded: fits_beside(loaded[0])
        )


@dataclass(frozen=True)
class Model(Loading):
    """One model, and the seed of random draws."""

    model: ModelName = "tiny-qwen2.5"
    seed: Seed = 0

    def load_model(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load the model of --model and its tokenizer."""
        return self.load(self.model)


@dataclass(frozen=True)
class Dataset:
    """Prompts."""

    dataset: str = "ioi_en"
    """a shipped set (ioi_en, capitals_en, ...), a .json or .jsonl file, a saved `datasets` folder, or a hub id (owner/name)"""
    limit: Limit = None
    batch_size: BatchSize = 16

    def load_prompts(self) -> PromptSet:
        """Load the prompt set, or its first --limit prompts."""
        from pyvene_ext.prompts.sets import PromptSet

        return PromptSet.load(self.dataset)[: self.limit or None]


@dataclass(frozen=True)
class Prompts(Dataset):
    """Prompts with two answers each."""

    answers: Literal["first_token", "first_difference"] = "first_token"
    """first_difference: for answers whose first tokens are the same, append the shared tokens to the prompt"""

    def tokenize(
        self, prompts: PromptSet, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> TokenizedPrompts:
        """Tokenize the clean texts.

        Args:
            prompts: what `load_prompts` returns.
            model: the model that will run them.
            tokenizer: the model's.

        Returns:
            The clean texts, with the positions and answers of each prompt.

        Raises:
            ValueError: a prompt is too long for the model, or its answers cannot be told apart (see --answers).
        """
        from pyvene_ext.models.sizes import n_positions

        return prompts.tokenize(tokenizer, answers=self.answers, max_length=n_positions(model.config))

    def tokenize_pairs(
        self, prompts: PromptSet, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[TokenizedPrompts, TokenizedPrompts]:
        """Tokenize the clean and the corrupt texts.

        Args:
            prompts: what `load_prompts` returns.
            model: the model that will run them.
            tokenizer: the model's.

        Returns:
            Clean and corrupt texts, in the same order.

        Raises:
            ValueError: as `tokenize`, and where a prompt has no corrupt text.
        """
        from pyvene_ext.methods.patching.pairs import both_texts

        return both_texts(prompts, model, tokenizer, self.answers)


@dataclass(frozen=True)
class Memory:
    """Memory of interventions that run together in one batch."""

    memory: Annotated[float, Gt(0), Unit("GiB")] | None = None
    """GiB besides the weights, which sets the size of batches; by default half of the weights, at least 0.25 (circuits: 0.5),
    and where texts are written as much as the weights, at least 1"""

    @property
    def memory_bytes(self) -> int | None:
        """The value of --memory in bytes."""
        return None if self.memory is None else min(int(self.memory * 2**30), 2**60)


@dataclass(frozen=True)
class Sweep(Memory):
    """How a sweep runs."""

    compile: bool = False
    """let torch.compile fuse the MLPs: takes a minute at the start and pays in long runs on a GPU"""


@dataclass(frozen=True)
class Problems(Loading, Memory):
    """Word problems that one or more models reason about (`runs.reasoning`)."""

    models: OneOrMore[str] = ("tiny-qwen2.5",)
    """one or more of: a shipped or fetched model, a folder, a GGUF file, a name on the hub"""
    problems: str | None = None
    """tiny (held-out, of the tiny models), plain (held-out, in plain English), gsm8k, or a .jsonl or .json file like it; by
    default tiny for shipped tiny models and plain for others"""
    problem_steps: EachOnce[Count] = ()
    """only problems whose own solutions have this many steps; by default 1 for plain, which has 1 and 2, and any for others"""
    out: Annotated[Path | None, Doc("folder to write; by default outputs/critical_heads/STUDY/PROBLEMS_MODELS")] = None
    limit: Annotated[
        Annotated[int, Ge(0)] | None,
        Doc("only the first N, 0 for all; by default 400 tiny, 32 plain, or all, or as many as ten minutes allow here"),
    ] = None
    shots: Annotated[int, Ge(0)] | None = None
    """number of solved problems put before each question; by default 3, and none for tiny models and with --chat"""
    shots_from: str | None = None
    """source of the solved problems, as --problems; by default the training problems of the same source, or a file's others"""
    calculations: Literal["keep", "drop"] | None = None
    """what becomes of <<...>> in solved problems; by default drop for plain, keep for others"""
    chat: bool = False
    """ask in the chat template of the model's tokenizer, for instruct models"""
    answer_rule: Rule | None = None
    """how answers are read (`methods.solving.answers`); by default last-of-line for tiny models, else flexible-extract"""
    max_new_tokens: Count | None = None
    """limit of the reasoning, with its answer; by default 32 for tiny models, 48 for plain problems, 256 otherwise (--chat)"""
    answer_tokens: Count = 8
    """limit of the answer alone, where the reasoning is given"""
    batch_size: Count = 64
    """problems a forward pass"""
    seed: Seed = 0

    def check_flags(self) -> None:
        """Raise ValueError for two models of the same name; a study's own `check_flags` must call this."""
        if len({Path(name).name for name in self.models}) < len(self.models):
            raise ValueError("--models names one or more models, each once.")

    @property
    def tiny(self) -> bool:
        """Whether all models are shipped tiny ones, which other defaults are for."""
        from pyvene_ext.models.loading.names import TINY_MODELS

        return all(Path(name).name in TINY_MODELS for name in self.models)

    @property
    def source(self) -> str:
        """Where the problems are from: --problems or its default."""
        return self.problems or ("tiny" if self.tiny else "plain")

    @property
    def small(self) -> bool:
        """Whether the models or the problems are tiny ones, whose reasoning is short and in one form."""
        return self.tiny or self.source == "tiny"

    @property
    def n_shots(self) -> int:
        """--shots or its default."""
        return self.shots if self.shots is not None else 0 if self.small or self.chat else 3

    @property
    def n_steps(self) -> tuple[int, ...]:
        """--problem_steps or its default; () for any number."""
        return self.problem_steps or ((1,) if self.source == "plain" else ())

    @property
    def keeps_calculations(self) -> bool:
        """--calculations or its default."""
        return (self.calculations or ("drop" if self.source == "plain" else "keep")) == "keep"

    @property
    def rule(self) -> Rule:
        """--answer_rule or its default."""
        return self.answer_rule or ("last-of-line" if self.small else "flexible-extract")

    @property
    def new_tokens(self) -> int:
        """--max_new_tokens or its default."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return 32 if self.small else 48 if self.source == "plain" and not self.chat else 256


@dataclass(frozen=True)
class Regeneration(Problems):
    """What a model writes under an intervention in its reasoning (`runs.reasoning`)."""

    regenerate: Literal["answer", "reasoning"] | None = None
    """what is regenerated: the answer after the given reasoning, or reasoning too; by default answer for tiny models, else
    reasoning"""

    @property
    def anew(self) -> bool:
        """Whether reasoning is regenerated."""
        default = "answer" if self.small else "reasoning"
        return (self.regenerate or default) == "reasoning"


@dataclass(frozen=True)
class Ranking:
    """Ranking of critical heads by their scores within the block of reasoning (rank_heads.py)."""

    by: Score = "flow"
    """score that ranks the heads, if neither heads nor rankings are given"""
    rankings: tuple[str, ...] = ()
    """one CSV scores,layer,head for each model, as rank_heads.py writes it"""

    def ranking_of(self, number: int) -> str | None:
        """The ranking file of the model at this index of --models, if there is one."""
        return self.rankings[number] if self.rankings else None


@dataclass(frozen=True)
class Ablations:
    """Ablation of heads while a model writes its own solutions (`runs.ablated`)."""

    random_sets: Annotated[int, Ge(0)] | None = None
    """random sets of other heads of the same layers; 0 for none; by default 20, or fewer where ten minutes do not allow so many
    here for 8 problems"""
    donors: Annotated[int, Ge(2)] = 64
    """number of problems from which mean and resampled activations are taken"""

    @property
    def n_random(self) -> int:
        """--random_sets or its default."""
        return 20 if self.random_sets is None else self.random_sets


@dataclass(frozen=True)
class Deciding:
    """When a set of heads needs no more problems (`stats.stopping`); by default all sets take all problems."""

    decide: tuple[float, ...] = ()
    """two numbers of points, such as 10 2: once the drop is known to be above the first, or below the second, or it is certain
    that the problems left cannot tell"""
    width: Annotated[float, Gt(0), Lt(200), Unit("points")] | None = None
    """once the interval of the drop is at most this many points wide; may be given with --decide"""

    @property
    def stops(self) -> bool:
        """Whether sets may stop before the last problem."""
        return bool(self.decide) or self.width is not None

    @property
    def thresholds(self) -> tuple[float, float]:
        """Points above which a drop is causal, and below which it is redundant."""
        from pyvene_ext.stats.thresholds import CAUSAL, REDUNDANT, check_thresholds

        return check_thresholds(self.decide or (CAUSAL, REDUNDANT), "--decide")

    def stopping(self, seed: int) -> Stopping | None:
        """When a set of heads stops.

        Args:
            seed: of the order of the problems.

        Returns:
            The rule; None if sets take all problems.
        """
        from pyvene_ext.stats.stopping import Stopping

        return Stopping(self.thresholds if self.decide else None, self.width, seed=seed) if self.stops else None

    def check_deciding(self) -> None:
        """Raise ValueError for thresholds that are none; a study's own `check_flags` must call this."""
        above, below = self.thresholds
        if above == below:
            raise ValueError(f"--decide takes two different thresholds, the upper one first, not {above:g} twice.")


@dataclass(frozen=True)
class Translation(Loading):
    """Sentences with their translations, and from which score on a head counts as found (`runs.translation`)."""

    model: ModelName = "tiny-gemma2"
    dataset: str | None = None
    """a .tsv or .jsonl file, a shipped set (en_fr, sentences), or a name on the hub; by default en_fr with a shipped model,
    sentences (64 of plain English and French) with a fetched one, else opus-100"""
    split: str | None = None
    """of a data set on the hub; by default train[:1000], and test for pairs without English"""
    template: str = "{source_label}: {source} {target_label}: {target}"
    """of a prompt"""
    max_length_difference: Annotated[int, Ge(0)] = 5
    """most tokens by which a sentence and its translation may differ in length; 5 as published"""
    criterion: Literal["difference", "translation"] | None = None
    """what must be above the threshold: translation - control, or translation itself, the default with a shipped model"""
    threshold: float | None = None
    """by default the published one of the model; for others 0.05 (of translation itself 0.13), a convention of ours"""
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
    contrast: Literal["swap", "rival"] | None = None
    """the wrong word: that of a sentence whose translation agrees up to there (two prompts per swap), or the strongest rival of
    the right one; by default swaps where there are four or more"""
    limit: Annotated[int, Ge(0)] | None = None
    """at most this many prompts of each word, 4 or more, or 0 for all; by default 40, or as many as ten minutes allow here"""
    seed: Seed = 0


@dataclass(frozen=True)
class TranslationHeads(TranslatedWords):
    """The heads that are held to cause a translation."""

    heads: EachOnce[HeadLabel] = ()
    """the heads, as in 4.5; by default those found by their attention"""


def check_rankings(rankings: tuple[str, ...], models: tuple[str, ...]) -> None:
    """Check that there is one ranking per model, or none at all.

    Args:
        rankings: the files of --rankings.
        models: the names of --models.

    Raises:
        ValueError: the numbers differ.
    """
    if rankings and len(rankings) != len(models):
        raise ValueError(f"--rankings names {len(rankings)} files for {len(models)} models; give one file per model.")
