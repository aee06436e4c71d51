"""Hosts that answer after their own reasoning (`runs.reasoning`) with a donor's heads in the place of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelcards import dimensions
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.reasoning.block_scores import Score, block_scores
from pyvene_ext.methods.reasoning.evaluate import Evaluation, evaluate
from pyvene_ext.methods.reasoning.transplant import (
    Layers,
    Maps,
    Method,
    Paired,
    Transplant,
    fit_maps,
    pair_texts,
    transplanted,
)
from pyvene_ext.models.identity import config_hash, weight_hash
from pyvene_ext.models.sizes import n_heads, n_positions
from pyvene_ext.prompts.problems import Questions, as_text
from pyvene_ext.runs.reasoning import Setting, top_heads
from pyvene_ext.stats.controls import Head, head_label, random_heads_in_place


@dataclass(frozen=True)
class Host:
    """One host, with the donor's heads that are to be transplanted into it.

    Attributes:
        setting: the host on the problems that the maps were not fitted on.
        pairs: a place in the host and the donor's head that is meant for it, in the order of the ranking.
        random: sets of other heads of the donor, of the same layers.
        maps: by the layers of host and donor.
        depends_on: what else the answers depend on.
    """

    setting: Setting
    donor: PreTrainedModel
    pairs: tuple[tuple[Head, Head], ...]
    random: list[tuple[Head, ...]]
    maps: dict[Layers, Maps]
    depends_on: dict[str, Any]

    @property
    def facts(self) -> dict[str, Any]:
        """For the summary: what was solved, with which heads, and what that depends on."""
        pairs = [f"{head_label(place)} <- {head_label(head)}" for place, head in self.pairs]
        return {"solved": len(self.setting.questions), "heads": pairs, **self.depends_on}

    @property
    def fits(self) -> list[dict[str, Any]]:
        """A row a map: how well it fits."""
        return [
            {"model": self.setting.name, "host_layer": host, "donor_layer": donor, "map": name, **fit.as_dict()}
            for (host, donor), maps in self.maps.items()
            for name, fit in (("A", maps.into.fit), ("B", maps.back.fit))
            if fit is not None
        ]

    @property
    def same_sizes(self) -> bool:
        """Whether the donor's heads can also be transplanted without maps."""
        sizes = [dimensions(model.config) for model in (self.setting.model, self.donor)]
        return all(sizes[0][name] == sizes[1][name] for name in ("d_model", "d_head"))

    def own(self, n: int) -> list[Transplant]:
        """The host's own heads in the first n places, without maps."""
        return [Transplant(place, self.setting.model, place) for place, _ in self.pairs[:n]]

    def transplants(self, heads: Sequence[Head], n: int, mapped: bool = True) -> list[Transplant]:
        """These heads of the donor in the first n places."""
        return [
            Transplant(place, self.donor, head, self.maps[place[0], head[0]] if mapped else None)
            for (place, _), head in zip(self.pairs[:n], heads[:n], strict=True)
        ]

    def run(self, condition: str, transplants: Sequence[Transplant], without: Sequence[Head] = ()) -> Evaluation:
        """The answers under a condition; kept between runs."""
        setting, flags = self.setting, self.setting.flags
        key = {
            **self.depends_on,
            "condition": condition,
            "transplants": [[*one.head, *one.donor_head] for one in transplants],
            "without": [list(head) for head in without],
            "new": flags.answer_tokens,
            "prompts": setting.questions.prompts.hash,
        }

        def measure() -> Evaluation:
            with transplanted(setting.model, transplants, without=without):
                return evaluate(
                    setting.model,
                    setting.tokenizer,
                    setting.questions,
                    max_new_tokens=flags.answer_tokens,
                    batch_size=flags.batch_size,
                )

        return setting.results.get(key, measure)


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
    """Pair heads of host and donor, and fit the maps, on problems that are then skipped by everything else.

    Args:
        setting: the host.
        donor: whose heads are transplanted.
        donor_name: of --donor.
        tokenizer: the donor's.
        host_heads: the places; none where they are to be ranked here.
        donor_heads: the head for each place, likewise.
        wanted: how many, where they are ranked.
        by: which score ranks them.
        random_sets: how many controls.
        fit_problems: how many problems the maps are fitted and tested on.
        method: how they are fitted (`fit_maps`).
        alpha: the penalty of ridge.
        test_share: how many of the fit problems are for the test.

    Returns:
        The model with its questions, heads and control sets, ready to run.

    Raises:
        ValueError: too few problems, prompts too long for the donor, heads that cannot be ranked on its tokens, or
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
    if not donor_heads and not same:
        raise ValueError(
            f"{donor_name} has another vocabulary than {setting.name}, so that its heads cannot be ranked on the same tokens; "
            "name --donor_heads or a --donor_ranking."
        )
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
        "donor weights": weight_hash(donor),
        "donor config": config_hash(donor),
        "maps": {"fitted on": paired.host.hash, **how},
    }
    solved = range(fit_problems, len(everything))
    others = replace(setting, questions=everything.take(solved), clean=setting.clean.take(solved))
    return Host(others, donor, pairs, random, maps, depends_on)


def rank(model: PreTrainedModel, questions: Questions, by: Score, wanted: int, batch_size: int) -> tuple[Head, ...]:
    """The first heads by their scores inside the block of reasoning."""
    return top_heads(block_scores(model, questions, batch_size=batch_size).of(by), wanted)
