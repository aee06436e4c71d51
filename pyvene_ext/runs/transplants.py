"""Hosts that answer after their own reasoning (`runs.reasoning`), with a donor's heads in place of their own.

Conditions run one after the other, and not all at once as those of other studies do (`solving.evaluate` with a list). A
transplanted head is no edit of what the host computes at a token: it attends with keys and values of its own, which the donor
computes from the host's stream at all earlier tokens, and `engine.decode` keeps neither that stream nor a donor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelcards import dimensions
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.reasoning.block_scores import Score, block_scores, needs_flow
from pyvene_ext.methods.reasoning.transplant import (
    LayerPair,
    Maps,
    Method,
    Paired,
    Transplant,
    fit_maps,
    pair_texts,
    transplanted,
)
from pyvene_ext.methods.solving.evaluate import evaluate
from pyvene_ext.methods.solving.evaluation import Evaluation
from pyvene_ext.models.identity import identity_of
from pyvene_ext.models.latent_steps import format_of
from pyvene_ext.models.sizes import n_heads, n_positions
from pyvene_ext.prompts.problems import Questions, as_text
from pyvene_ext.runs.reasoning import Asked, Setting, top_heads
from pyvene_ext.stats.controls import Head, head_label, random_heads_in_place


@dataclass(frozen=True)
class Host:
    """One host, with the donor's heads to transplant into it.

    Attributes:
        setting: the host, on problems that the maps were not fitted on.
        donor: the donor model.
        pairs: each host head to replace and the donor's head for it, in the order of the ranking.
        random: random control sets of donor heads of the same layers.
        maps: fitted maps by (host layer, donor layer).
        depends_on: everything else that the answers depend on.
    """

    setting: Setting
    donor: PreTrainedModel
    pairs: tuple[tuple[Head, Head], ...]
    random: list[tuple[Head, ...]]
    maps: dict[LayerPair, Maps]
    depends_on: dict[str, Any]

    @property
    def facts(self) -> dict[str, Any]:
        """Facts for the summary: number of problems, heads, and what the answers depend on."""
        pairs = [f"{head_label(place)} <- {head_label(head)}" for place, head in self.pairs]
        return {"solved": len(self.setting.questions), "heads": pairs, **self.depends_on}

    @property
    def fits(self) -> list[dict[str, Any]]:
        """Goodness of fit, one row per map."""
        return [
            {"model": self.setting.name, "host_layer": host, "donor_layer": donor, "map": name, **fit.as_dict()}
            for (host, donor), maps in self.maps.items()
            for name, fit in (("A", maps.into.fit), ("B", maps.back.fit))
            if fit is not None
        ]

    @property
    def same_sizes(self) -> bool:
        """Whether host and donor have the same sizes, so that heads can also be transplanted without maps."""
        sizes = [dimensions(model.config) for model in (self.setting.model, self.donor)]
        return all(sizes[0][name] == sizes[1][name] for name in ("d_model", "d_head"))

    def transplants(self, heads: Sequence[Head], mapped: bool = True) -> list[Transplant]:
        """Put donor heads in the first places.

        Args:
            heads: (layer, head) of the donor, one a place.
            mapped: whether to use the fitted maps.

        Returns:
            The transplants, for `transplanted`.
        """
        return [
            Transplant(place, self.donor, head, self.maps[place[0], head[0]] if mapped else None)
            for (place, _), head in zip(self.pairs, heads, strict=False)
        ]

    def answers(self, n: int) -> Iterator[tuple[str, tuple[Head, ...], Evaluation]]:
        """Answer the problems with the first n heads replaced, under every condition.

        Args:
            n: number of heads.

        Yields:
            tuple[str, tuple[Head, ...], Evaluation]: the condition, the donor's heads in it, and the answers. First "zero",
                nothing in their place; then "self", "without_maps" where the sizes are the same, "transplant", and "random" for
                each random set.
        """
        places, heads = zip(*self.pairs[:n], strict=True)
        yield "zero", (), self.run("zero", [], places)
        yield "self", (), self.run("self", [Transplant(place, self.setting.model, place) for place in places])
        if self.same_sizes:
            yield "without_maps", heads, self.run("without_maps", self.transplants(heads, mapped=False))
        yield "transplant", heads, self.run("transplant", self.transplants(heads))
        for some in dict.fromkeys(some[:n] for some in self.random):
            yield "random", some, self.run("transplant", self.transplants(some))

    def n_answers(self, n: int) -> int:
        """How many `answers` there are."""
        return 3 + self.same_sizes + len({some[:n] for some in self.random})

    def run(self, condition: str, transplants: Sequence[Transplant], without: Sequence[Head] = ()) -> Evaluation:
        """Answer the problems under a condition; results are kept for resuming.

        Args:
            condition: name of the condition.
            transplants: heads to transplant.
            without: host heads to zero.

        Returns:
            The answers.
        """
        setting, flags = self.setting, self.setting.flags
        questions = setting.bare if setting.anew else setting.questions
        key = {
            **self.depends_on,
            "condition": condition,
            "transplants": [[*one.head, *one.donor_head] for one in transplants],
            "without": [list(head) for head in without],
            "new": setting.new_tokens,
            "prompts": questions.prompts.hash,
        }

        def measure() -> Evaluation:
            with transplanted(setting.model, transplants, without=without, new_tokens=setting.anew):
                return evaluate(
                    setting.model,
                    setting.tokenizer,
                    questions,
                    max_new_tokens=setting.new_tokens,
                    batch_size=flags.batch_size,
                    rule=flags.rule,
                )

        return setting.results.get(key, measure)


def check_number(problems: int, fit_problems: int) -> None:
    """Raise ValueError if fitting the maps leaves fewer problems than an interval needs."""
    if problems < fit_problems + 2:
        raise ValueError(
            f"there are {problems} problems, and --fit_problems {fit_problems} leaves fewer than the two that an interval needs; "
            "give fewer, or more problems."
        )


def check_donor(
    asked: Asked, donor: PreTrainedModel, donor_name: str, tokenizer: PreTrainedTokenizerBase, heads_given: bool
) -> None:
    """Check that a host can take a donor's heads, before anything is run.

    Args:
        asked: the host and its problems.
        donor: the donor.
        donor_name: the value of --donor.
        tokenizer: the donor's.
        heads_given: whether the donor's heads are named or ranked by a file.

    Raises:
        ValueError: the host thinks in latent steps and the donor not in the same, or the donor cuts texts into other tokens, or
            has other ids for them and its heads are to be ranked.
    """
    form = format_of(asked.model)
    if form is not None and format_of(donor) != form:
        raise ValueError(
            f"{asked.name} thinks in latent steps that {Path(donor_name).name} does not know; use a donor with the same ones."
        )
    if tokenizer.get_vocab() == asked.tokenizer.get_vocab():
        return
    if not heads_given:
        raise ValueError(
            f"{donor_name} has another vocabulary than {asked.name}, so that its heads cannot be ranked on the same tokens; "
            "name --donor_heads or a --donor_ranking."
        )
    pair_texts([as_text(ids, asked.tokenizer) for ids in asked.questions.prompts.input_ids], asked.tokenizer, tokenizer)


def prepare(
    setting: Setting,
    donor: PreTrainedModel,
    donor_name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    host_heads: tuple[Head, ...],
    donor_heads: tuple[Head, ...],
    wanted: int,
    by: Score,
    random_sets: int,
    fit_problems: int,
    method: Method,
    alpha: float | None,
    test_share: float,
) -> Host:
    """Pair heads of host and donor, and fit the maps on problems that are then excluded from everything else.

    Args:
        setting: the host and all problems.
        donor: the model whose heads are transplanted.
        donor_name: the value of --donor.
        tokenizer: the donor's tokenizer.
        host_heads: host heads to replace; if empty, they are ranked here.
        donor_heads: the donor head for each; if empty, they are ranked here.
        wanted: number of heads to rank.
        by: score that ranks them.
        random_sets: number of random control sets.
        fit_problems: number of problems for fitting and testing the maps.
        method: how the maps are fitted (`fit_maps`).
        alpha: ridge penalty; None for the default of `fit_maps`.
        test_share: share of the fit problems that tests the maps.

    Returns:
        The host, on the remaining problems.

    Raises:
        ValueError: too few problems, prompts too long for the donor, heads that cannot be ranked on the donor's tokens, or
            too few other heads for the controls.
    """
    everything, seed, batch_size = setting.questions, setting.flags.seed, setting.flags.batch_size
    if len(everything) < fit_problems + 2:
        raise ValueError(
            f"{setting.name} reasons about {len(everything)} problems; --fit_problems {fit_problems} leaves fewer than "
            "the two that an interval needs."
        )
    same = tokenizer.get_vocab() == setting.tokenizer.get_vocab()
    longest, context = max(map(len, everything.prompts.input_ids)), n_positions(donor.config)
    if longest > context:
        raise ValueError(
            f"a problem with its reasoning has {longest} tokens and {donor_name} takes {context}; use another donor, or a "
            "smaller --max_new_tokens."
        )
    places = host_heads or rank(setting.model, everything, by, wanted, batch_size)
    pairs = tuple(zip(places, donor_heads or rank(donor, everything, by, wanted, batch_size), strict=True))
    draw = rng(seed, "random donor heads")
    try:
        random = random_heads_in_place([head for _, head in pairs], n_heads(donor.config), random_sets, draw)
    except ValueError as error:
        raise ValueError(f"{str(error).removesuffix('.')}, or take --random_sets 0.") from None

    fitted = everything.take(range(fit_problems))
    texts = [as_text(ids, setting.tokenizer) for ids in fitted.prompts.input_ids]
    paired = Paired(fitted.prompts, fitted.prompts) if same else pair_texts(texts, setting.tokenizer, tokenizer)
    how: dict[str, Any] = {"method": method, "alpha": alpha, "test_share": test_share, "seed": seed}
    layers = [(place[0], head[0]) for place, head in pairs]
    maps = fit_maps(setting.model, donor, paired, layers, batch_size=batch_size, **how)
    depends_on = {
        "donor": donor_name,
        **{f"donor {name}": value for name, value in identity_of(donor).items()},
        "maps": {"fitted on": paired.host.hash, **how},
    }
    solved = range(fit_problems, len(everything))
    others = replace(setting, questions=everything.take(solved), clean=setting.clean.take(solved))
    return Host(others, donor, pairs, random, maps, depends_on)


def rank(model: PreTrainedModel, questions: Questions, by: Score, wanted: int, batch_size: int) -> tuple[Head, ...]:
    """Rank heads by a score within the block of reasoning.

    Args:
        model: host or donor.
        questions: problems with their reasoning.
        by: the score.
        wanted: number of heads.
        batch_size: prompts per forward pass.

    Returns:
        The first `wanted` heads.
    """
    scores = block_scores(model, questions, flow=needs_flow(by), batch_size=batch_size, progress=True)
    return top_heads(scores.of(by), wanted)
