"""Linear probes: what can be decoded from the residual stream, and how much of that the probe itself contributes.

    residuals = read_residuals(model, prompts, {"last": tokens}, questions)
    folds = deal_folds(groups, 5, rng(0, "folds"))
    (fit,) = cross_validated(residuals.at["last"][depth], [targets], folds)

A probe is a ridge regression in closed form, in float64, on features that are standardised on the problems that it is fitted on.
Its penalty is chosen without the problems that it is tested on (nested cross-validation): with K folds, the probe tested on fold
k has the penalty that does best on the other folds, each predicted by a fit without that fold and without k. Problems of one
group are in one fold. In-sample predictions, for the problems that a probe was fitted on, are given for comparison: with more
dimensions than problems they are almost perfect for any labels.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float, Float32, Int, Num
from torch import Tensor
from transformers import PreTrainedModel

from modelcards import Taps, card_of, dimensions, n_layers
from pyvene_ext.io.bars import progress_bar
from pyvene_ext.models.devices import input_device, no_gradients
from pyvene_ext.models.hooks import Where, hook_component
from pyvene_ext.models.latent_steps import is_unrolling
from pyvene_ext.models.modes import evaluating
from pyvene_ext.prompts.tokenized import TokenizedPrompts

ALPHAS = tuple(10.0**power for power in range(-5, 5))  # penalties, each times the number of problems fitted


# -- what a model holds ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Residuals:
    """The residual stream at some tokens of every prompt, at every place from the embedding to after the last block.

    Attributes:
        places: names of the places, such as resid_pre.0 (what enters the first block), resid_mid.0, resid_pre.1 ... resid_post.5.
        at: by the name of the token; NaN where a prompt has no such token.
        question: the mean over the tokens of each prompt's question, at the same places.
    """

    places: tuple[str, ...]
    at: dict[str, Float32[np.ndarray, "place prompt d"]]
    question: Float32[np.ndarray, "place prompt d"]


def read_residuals(
    model: PreTrainedModel,
    prompts: TokenizedPrompts,
    tokens: Mapping[str, Sequence[int | None]],
    questions: Sequence[range],
    *,
    mid: bool = False,
    batch_size: int = 8,
    progress: bool = False,
) -> Residuals:
    """Read the residual stream in one forward pass over every prompt.

    Args:
        model: a model with a card; used in eval mode and restored afterwards, also after an error.
        prompts: the prompts.
        tokens: by name, which token of each prompt, counted from its first; None where it has none.
        questions: the tokens of each prompt that are its question.
        mid: read between attention and MLP too.
        batch_size: prompts per forward pass.
        progress: show a bar.

    Returns:
        The residual stream at these tokens, and its mean over each question.

    Raises:
        ValueError: before the model runs, for a token outside its prompt, an empty question, and a place that the model lacks.
    """
    for prompt, (ids, question) in enumerate(zip(prompts.input_ids, questions, strict=True)):
        wanted = [at for named in tokens.values() if (at := named[prompt]) is not None]
        if not question or not all(0 <= at < len(ids) for at in [*wanted, question[0], question[-1]]):
            raise ValueError(f"prompt {prompt} has {len(ids)} tokens; its question or a token to be read lies outside.")
    where = places_of(model, mid)
    shape = len(where), len(prompts), dimensions(model.config)["d_model"]
    found = {name: np.full(shape, np.nan, np.float32) for name in tokens}
    mean = np.empty(shape, np.float32)
    bar = progress_bar(len(prompts), "prompt", "residual stream", shown=progress)
    with bar, evaluating(model), no_gradients(model):
        for batch in prompts.batches(batch_size):
            starts = batch.starts
            rows = list(zip(batch.index, starts, strict=True))

            def keep(place: int, x: Float[Tensor, "batch pos d"], rows: list[tuple[int, int]] = rows) -> None:
                if is_unrolling(model):
                    return
                for row, (prompt, start) in zip(x, rows, strict=True):
                    question = row[[start + at for at in questions[prompt]]].float().mean(0)
                    mean[place, prompt] = question.cpu().numpy()
                    for name, array in found.items():
                        if (at := tokens[name][prompt]) is not None:
                            array[place, prompt] = row[start + at].float().cpu().numpy()

            with ExitStack() as hooks, Taps(model, card_of(model), where.values()):
                for number, place in enumerate(where.values()):
                    hook_component(model, place, partial(keep, number), hooks)
                model.base_model(**batch.inputs(input_device(model)), use_cache=False)
            bar.update(len(batch.index))
    return Residuals(tuple(where), found, mean)


def places_of(model: PreTrainedModel, mid: bool = False) -> dict[str, Where]:
    """The places that `read_residuals` reads.

    Args:
        model: a model with a card.
        mid: include the residual stream between attention and MLP.

    Returns:
        Component and layer by the place's name, in the order of the forward pass.

    Raises:
        ValueError: the model has no residual stream between attention and MLP, and `mid` asks for it.
    """
    last = n_layers(model.config) - 1
    where: dict[str, Where] = {}
    for layer in range(last + 1):
        where[f"resid_pre.{layer}"] = ("block_input", layer)
        if mid:
            where[f"resid_mid.{layer}"] = ("resid_mid", layer)
    where[f"resid_post.{last}"] = ("block_output", last)
    for component, _ in where.values():
        card_of(model).component(model, component)
    return where


# -- probes ------------------------------------------------------------------------------------------------------------


# Not scikit-learn's, which takes twice the time for the same numbers (ten times, if each penalty is fitted separately), and whose
# StandardScaler turns a dimension that varies by float32's rounding only into a feature.
class Ridge:
    """Ridge regression on some problems, for any penalties and targets, from one decomposition of the features.

    Args:
        x: the features.

    Raises:
        ValueError: the features are not finite.
    """

    def __init__(self, x: Num[np.ndarray, "problem d"]) -> None:
        x = np.asarray(x, np.float64)
        if not np.isfinite(x).all():
            raise ValueError("the features are not finite; load the model in bfloat16 or float32.")
        self.mean, spread = x.mean(0), x.std(0)
        # A dimension that is constant up to rounding carries no information.
        constant = spread <= 1e-7 * np.abs(x).max(0)
        self.scale = np.where(constant, 0.0, 1 / np.where(constant, 1.0, spread))
        self.left, self.sizes, self.right = np.linalg.svd((x - self.mean) * self.scale, full_matrices=False)

    def predict(
        self, x: Num[np.ndarray, "new d"], y: Float[np.ndarray, "problem column"], alphas: Sequence[float]
    ) -> Float[np.ndarray, "alpha new column"]:
        """Fit targets and predict them from new features.

        Args:
            x: the new features.
            y: the targets of the fitted problems.
            alphas: penalties, each multiplied by the number of problems.

        Returns:
            The predictions by penalty.
        """
        centre, squares = y.mean(0), self.sizes**2
        penalties = np.asarray(alphas, np.float64)[:, None] * len(y)
        shrunk = (self.sizes / (squares + penalties))[..., None] * (self.left.T @ (y - centre))
        return centre + ((x - self.mean) * self.scale @ self.right.T) @ shrunk


@dataclass(frozen=True)
class ProbeFit:
    """Predictions of one target by probes; a trial is a set of labels, such as the real or shuffled ones.

    Attributes:
        predicted: for each problem, by a fit without its fold.
        in_sample: by one fit to all problems, with the median of the penalties chosen in the first trial.
        alphas: the penalty chosen for each fold.
    """

    predicted: Float[np.ndarray, "trial problem column"]
    in_sample: Float[np.ndarray, "trial problem column"]
    alphas: Float[np.ndarray, "trial fold"]


def cross_validated(
    x: Num[np.ndarray, "problem d"],
    targets: Sequence[Num[np.ndarray, "trial problem column"]],
    folds: Int[np.ndarray, " problem"],
    alphas: Sequence[float] = ALPHAS,
) -> list[ProbeFit]:
    """Fit probes for several targets on the same features, with nested cross-validation; each trial chooses its own penalties.

    Args:
        x: the features.
        targets: one column for a number; for a class one column per class, 1 or 0.
        folds: the fold 0, 1 ... of each problem; three or more folds.
        alphas: penalties to choose from, each multiplied by the number of problems fitted.

    Returns:
        The predictions of each target.

    Raises:
        ValueError: the features are not finite, or there are fewer than three folds.
    """
    x, n_folds = np.asarray(x, np.float64), int(folds.max()) + 1
    if n_folds < 3:
        raise ValueError("probes need three folds or more: one to test, one to choose the penalty, one to fit.")
    y = np.concatenate([np.moveaxis(target, 1, 0).reshape(len(x), -1) for target in targets], 1).astype(np.float64)

    # A fit without two folds serves both: predictions of one fold choose the penalty of the probe that is tested on the other.
    errors = np.zeros((n_folds, len(alphas), y.shape[1]))
    for pair in itertools.combinations(range(n_folds), 2):
        out = np.isin(folds, pair)
        squared = (Ridge(x[~out]).predict(x[out], y[~out], alphas) - y[out]) ** 2
        for chosen_on, tested_on in (pair, pair[::-1]):
            errors[tested_on] += squared[:, folds[out] == chosen_on].sum(1)
    by_fold = []
    for fold in range(n_folds):
        here = folds == fold
        by_fold.append(Ridge(x[~here]).predict(x[here], y[~here], alphas))
    whole = Ridge(x)

    fits, start = [], 0
    for target in targets:
        trials, _, columns = target.shape
        mine = slice(start, start + trials * columns)
        start = mine.stop
        best = errors[:, :, mine].reshape(n_folds, len(alphas), trials, columns).sum(-1).argmin(1)  # fold trial
        predicted = np.empty(target.shape)
        for fold, every in enumerate(by_fold):
            of_fold = every[:, :, mine].reshape(len(alphas), -1, trials, columns)
            for trial in range(trials):
                predicted[trial, folds == fold] = of_fold[best[fold, trial], :, trial]
        middle = alphas[int(np.median(best[:, 0]))]
        fitted = whole.predict(x, y[:, mine], [middle])[0].reshape(len(x), trials, columns)
        fits.append(ProbeFit(predicted, np.moveaxis(fitted, 1, 0), np.asarray(alphas)[best.T]))
    return fits


def seconds_to_fit(n: int, d: int, targets: int, trials: int, folds: int) -> float:
    """Time `cross_validated` on random features.

    Args:
        n: number of problems.
        d: number of features.
        targets: number of targets, each a number.
        trials: sets of labels of each.
        folds: number of folds.

    Returns:
        Seconds.
    """
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(n, d)), [draw.normal(size=(trials, n, 1)) for _ in range(targets)]
    start = time.perf_counter()
    cross_validated(x, y, np.arange(n) % folds)
    return time.perf_counter() - start


def deal_folds(groups: Sequence[Hashable], n_folds: int, generator: np.random.Generator) -> Int[np.ndarray, " problem"]:
    """Draw random folds of similar size, with each group in one fold.

    Args:
        groups: the group of each problem.
        n_folds: how many folds.
        generator: source of randomness.

    Returns:
        The fold of each problem.

    Raises:
        ValueError: there are fewer groups than folds.
    """
    members: dict[Hashable, list[int]] = {}
    for which, group in enumerate(groups):
        members.setdefault(group, []).append(which)
    if len(members) < n_folds:
        raise ValueError(
            f"{len(groups)} problems in {len(members)} groups cannot be divided into {n_folds} folds; give more problems."
        )
    folds, sizes, lists = np.empty(len(groups), int), np.zeros(n_folds, int), list(members.values())
    # Not scikit-learn's GroupKFold, whose folds are either drawn at random or of one size.
    order = generator.permutation(len(lists))
    # Large groups first, so that the last ones even out the folds.
    for number in sorted(order, key=lambda number: -len(lists[number])):
        fold = int(sizes.argmin())
        folds[lists[number]] = fold
        sizes[fold] += len(lists[number])
    return folds


def shuffled(
    y: Num[np.ndarray, "problem column"], groups: Int[np.ndarray, " problem"], generator: np.random.Generator
) -> Num[np.ndarray, "problem column"]:
    """Shuffle labels across problems, keeping those of a group together, so that shuffled labels are as clustered as real ones.

    Args:
        y: labels.
        groups: the group of each problem.
        generator: source of randomness.

    Returns:
        The shuffled labels.
    """
    at = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    permuted = [at[group] for group in generator.permutation(len(at))]
    new = np.empty_like(y)
    new[np.concatenate(at)] = y[np.concatenate(permuted)]
    return new
