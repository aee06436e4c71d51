"""At what depth does a model know the answer, and which components write it? Logit lens and direct logit attribution.

    python experiments/logit_lens.py
    python experiments/logit_lens.py --model google/gemma-2-2b --dataset ioi_zh --answers first_difference
    python experiments/logit_lens.py --model path/to/folder --dataset pairs.json --out outputs/my_lens
    python experiments/logit_lens.py --position s2

Method. Each prompt has two answers, right (IO) and wrong (S). The logit lens (nostalgebraist 2020) reads the residual stream at
`--position` with the model's own final norm and unembedding (soft-cap and scale included): LD = logit(IO) - logit(S), and
probability and rank of IO in the whole vocabulary. Depth 0 is what enters the first block, depth k the stream after k blocks;
at the last token the last depth is what the model says.

Direct logit attribution (Elhage et al. 2021; Wang et al. 2022, section 3.1) splits LD, and logit(IO) alone, at the last token
into what every head, every MLP, the embedding and the biases add, with the scales of the final norm and of post-norms frozen at
the clean run. The parts sum to the logit before any soft-cap; a run in which they do not is an error. This is not causal:
what a part does through later parts is not in its contribution.

Means over prompts have percentile bootstrap 95% intervals. Control: the same parts split the LD of another prompt's two answers,
each prompt's taken once, at random; a head that only prefers one name to another, whatever the prompt, shows it there too.

Written, in the folder OUT: config.yaml (running it again gives the same); lens_logits.npy [depth answer prompt], IO first;
lens_probability.npy and lens_rank.npy [depth prompt]; for NAME in logit_diff, logit and control: NAME_heads.npy [layer head
prompt], NAME_mlps.npy [layer prompt], NAME_embed.npy, NAME_bias.npy, NAME_total.npy and NAME_capped.npy (after the soft-cap)
[prompt]; depths.csv, heads.csv, parts.csv; figures; and last summary.json: where it is, the rest is.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

import pyvene_ext as px

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 10  # heads in the table on the terminal
RESAMPLES = 2000
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Config(px.flags.Model, px.flags.Prompts):
    out: px.flags.Out = None
    position: str = "last"
    """where the lens reads: last, or a named position of the prompts (end, io, s1, s2, subject); attribution is always at last"""

    def check_flags(self) -> None:
        if self.position == "all":
            raise ValueError(
                "--position all: the lens reads one position of every prompt; name one, and run it again for another."
            )


def main(config: Config) -> None:
    if not px.is_main_process():
        return  # a few forward passes per prompt are no work to share
    # Everything that can be wrong is found before the first forward pass.
    run = px.RunFolder(config, "logit_lens", config.model, config.dataset)
    prompt_set = config.load_prompts()
    model, tokenizer = config.load_model()
    prompts = config.tokenize(prompt_set, model, tokenizer)
    if len(prompts) < 2:
        raise ValueError(f"{config.dataset} has one prompt; a mean with an interval over prompts needs at least two.")
    others = with_answers_of_others(prompts, config.seed)
    for prompt in range(len(prompts)):
        px.prompts.token_indices(prompts, prompt, config.position)
    seconds = 3 * px.runs.seconds_a_pass(model, prompts)
    if not run.announce(
        f"logit lens and attribution on {px.io.counted(len(prompts), 'prompt')}", seconds, n=len(prompts)
    ):
        return

    # At every depth, what the model would say; at the end, what each part adds to it, and to another prompt's answers.
    lens = px.methods.logit_lens(model, prompts, config.position, batch_size=config.batch_size, progress=True)
    found, control = (
        px.methods.direct_logit_attribution(model, some, batch_size=config.batch_size, progress=True)
        for some in (prompts, others)
    )

    # Means over prompts, with intervals.
    depths = depth_table(lens, config.seed)
    heads = head_table(found, control.logit_diff, config.seed)
    facts = px.metadata(
        model,
        model=config.model,
        dataset=config.dataset,
        prompts_hash=prompts.hash,
        n=len(prompts),
        position=config.position,
        answers=config.answers,
        seed=config.seed,
        **totals(found.logit_diff),
        depth_ahead=depth_ahead(depths),
    )

    print(summary(config, px.runs.answer_names(prompt_set), facts, depths, heads))
    with run.writing(facts, [evidence(len(prompts), heads[0])]):
        run.table("depths", depths)
        run.table("heads", heads)
        run.table("parts", part_table(found.logit_diff, config.seed))
        for measure in ("logits", "probability", "rank"):
            run.array(f"lens_{measure}", getattr(lens, measure))
        for name, parts in (("logit_diff", found.logit_diff), ("logit", found.logit), ("control", control.logit_diff)):
            for part, array in vars(parts).items():
                run.array(f"{name}_{part}", array)
        for name, figure in drawn(config.position, run.of, depths, found).items():
            run.figure(name, figure)


def with_answers_of_others(prompts: px.TokenizedPrompts, seed: int) -> px.TokenizedPrompts:
    """The same prompts, each with the answers of another one; no two share theirs."""
    order = px.rng(seed, "control").permutation(len(prompts))
    donor = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
    return replace(prompts, answers=tuple(prompts.answers[donor[prompt]] for prompt in range(len(prompts))))


# -- statistics --------------------------------------------------------------------------------------------------------


def mean(name: str, values: Float[np.ndarray, " prompt"], seed: int, *draw: str | int) -> dict[str, float]:
    """The cells of a mean over prompts with its interval."""
    draws = px.rng(seed, "bootstrap", *draw)
    return px.stats.interval_columns(name, px.stats.bootstrap_mean(values, draws, RESAMPLES))


def depth_table(lens: px.methods.Lens, seed: int) -> Rows:
    """One row per depth."""
    return [
        {"depth": depth}
        | mean("logit_diff", lens.logit_diff[depth], seed, "logit_diff", depth)
        | mean("probability", lens.probability[depth], seed, "probability", depth)
        | mean("rank", lens.rank[depth], seed, "rank", depth)
        | {"io_over_s": float((lens.logit_diff[depth] > 0).mean()), "top": float((lens.rank[depth] == 1).mean())}
        for depth in range(len(lens.logits))
    ]


def head_table(found: px.methods.Attribution, control: px.methods.Parts, seed: int) -> Rows:
    """One row per head, largest mean contribution to LD first."""
    heads = found.logit_diff.heads
    rows = [
        {"layer": layer, "head": head}
        | mean("logit_diff", heads[layer, head], seed, "head", layer, head)
        | mean("control", control.heads[layer, head], seed, "control", layer, head)
        | {
            "logit": float(found.logit.heads[layer, head].mean()),
            "positive": float((heads[layer, head] > 0).mean()),
        }
        for layer, head in np.ndindex(heads.shape[:2])
    ]
    return sorted(rows, key=lambda row: -abs(row["logit_diff"]))


def part_table(parts: px.methods.Parts, seed: int) -> Rows:
    """One row for every part but single heads, for each layer's heads together, and for the total."""
    values: dict[str, Float[np.ndarray, " prompt"]] = {"embedding": parts.embed, "biases": parts.bias}
    for layer, (of_heads, of_mlp) in enumerate(zip(parts.heads.sum(1), parts.mlps, strict=True)):
        values |= {f"heads of layer {layer}": of_heads, f"MLP {layer}": of_mlp}
    values["total"] = parts.total
    return [{"part": part} | mean("logit_diff", of_part, seed, part) for part, of_part in values.items()]


def totals(parts: px.methods.Parts) -> dict[str, float]:
    """The logit difference, and what each kind of part adds to it: means over prompts."""
    return {
        "clean_logit_diff": float(parts.capped.mean()),
        "clean_io_over_s": float((parts.capped > 0).mean()),
        "logit_diff_before_cap": float(parts.total.mean()),
        "from_heads": float(parts.heads.sum((0, 1)).mean()),
        "from_mlps": float(parts.mlps.sum(0).mean()),
        "from_embedding": float(parts.embed.mean()),
        "from_biases": float(parts.bias.mean()),
    }


def depth_ahead(depths: Rows) -> int | None:
    """The depth from which on the interval of LD lies above 0; None if it does not at the last."""
    ahead = None
    for row in reversed(depths):
        if row["logit_diff_low"] <= 0:
            break
        ahead = row["depth"]
    return ahead


# -- what is shown -----------------------------------------------------------------------------------------------------


def drawn(position: str, of: str, depths: Rows, found: px.methods.Attribution) -> dict[str, Figure]:
    """The figures by name: the lens against depth, and maps of heads."""
    figures = {}
    for measure, label, scale in (
        ("logit_diff", "logit(IO) - logit(S)", "linear"),
        ("probability", "probability of IO", "linear"),
        ("rank", "rank of IO (1 is the top)", "log"),
    ):
        curve = px.Interval(*(np.array([row[f"{measure}{end}"] for row in depths]) for end in ("", "_low", "_high")))
        figures[f"lens_{measure}"] = px.figures.depth_curve(curve, f"Logit lens at {position}: {of}", label, scale)
    for measure, what in (("logit_diff", "logit(IO) - logit(S)"), ("logit", "logit(IO)")):
        heads = getattr(found, measure).heads.mean(-1)
        title, label = f"Direct attribution to heads: {of}", f"mean contribution to {what}"
        figures[f"heads_{measure}"] = px.figures.head_heatmap(heads, title, label, diverging=True)
    return figures


def summary(
    config: Config,
    answers: tuple[str, str],
    facts: dict[str, Any],
    depths: list[dict[str, Any]],
    heads: list[dict[str, Any]],
) -> str:
    """What the terminal shows: the lens by depth, what each kind of part contributes, and the heads with the largest."""
    ahead = facts["depth_ahead"]
    right, wrong = answers
    on_top = f"{right} on top"
    lines = [
        f"{config.model} on {config.dataset}: {px.io.counted(facts['n'], 'prompt')}; mean logit difference "
        f"{facts['clean_logit_diff']:.2f}, {right} above {wrong} on {facts['clean_io_over_s']:.1%}",
        f"\nlogit lens at {config.position}: the logit difference is "
        + ("not above 0 at the last depth" if ahead is None else f"above 0 from depth {ahead} on")
        + " (95% interval)",
        f"\n  depth  logit diff    95% interval  probability   mean rank  {on_top}",
    ]
    for row in depths:
        interval = f"[{row['logit_diff_low']:.2f}, {row['logit_diff_high']:.2f}]"
        lines.append(
            f"{row['depth']:>7} {row['logit_diff']:11.2f} {interval:>15} {row['probability']:12.3f} {row['rank']:11.1f} "
            f"{row['top']:{1 + len(on_top)}.1%}"
        )
    lines += [
        f"\nattribution of the logit difference before any soft-cap, {facts['logit_diff_before_cap']:.2f}: "
        f"heads {facts['from_heads']:.2f}, MLPs {facts['from_mlps']:.2f}, embedding "
        f"{facts['from_embedding']:.2f}, biases {facts['from_biases']:.2f}",
        "\n   head  contribution    95% interval  positive on  control  95% interval",
    ]
    for row in heads[:SHOWN]:
        interval, of_others = (
            f"[{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]" for name in ("logit_diff", "control")
        )
        lines.append(
            f"{row['layer']:>4}.{row['head']:<2} {row['logit_diff']:13.3f} {interval:>15} {row['positive']:12.1%} "
            f"{row['control']:8.3f} {of_others:>13}"
        )
    return "\n".join(lines)


def evidence(n: int, head: dict[str, Any]) -> px.runs.Evidence:
    """The largest contribution of a head, beside what the same head adds to other prompts' answers."""
    values, control = (
        px.Interval(*(head[f"{name}{end}"] for end in ("", "_low", "_high"))) for name in ("logit_diff", "control")
    )
    other = f"{control.mean:.2f} [{control.low:.2f}, {control.high:.2f}] for another prompt's answers"
    effect = f"{px.stats.head_label((head['layer'], head['head']))} adds to the logit difference"
    return px.runs.Evidence(px.io.counted(n, "prompt"), effect, values, other, "a larger --limit or --dataset")


if __name__ == "__main__":
    sys.exit(px.io.run(main, Config))
