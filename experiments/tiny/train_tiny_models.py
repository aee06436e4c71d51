"""Train the tiny models that ship with the package: Qwen2.5-, Gemma 2- and Llama 3.1-style, each under 4 MB.

    python experiments/tiny/train_tiny_models.py                        # all three, into pyvene_ext/tiny
    python experiments/tiny/train_tiny_models.py --model tiny-gemma2 --out my_models

Method. One word-level tokenizer serves all three. A step takes a batch from every task of `tiny_tasks`, plus random
blocks of tokens that repeat; a text's loss is the mean over its answer tokens (on a repeated block: the tokens that can be
predicted) plus a small share for its other tokens. AdamW, linear warm-up, cosine decay. One prompt in ten, by a hash of
its text, is kept for evaluation and never trained on. A model is written aside and moved to its place when it is complete.

The same seed gives the same batches everywhere; weights repeat bit for bit only on the same processor, torch version and
number of threads.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

import pyvene_ext as px
from pyvene_ext.prompts import tiny_tasks
from pyvene_ext.prompts.tiny_tasks import Example

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SHIPPED = Path(__file__).resolve().parents[2] / "pyvene_ext" / "tiny"
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
PAD, BOS, EOS = 0, 1, 2
MAX_POSITIONS = 256
BLOCK_SIZES = (8, 40)  # of the repeated sequences, both ends included
REPEATED = "repeated"
TASK_NAMES = (*tiny_tasks.TASKS, REPEATED)
# What the shipped models must reach on held-out prompts.
REQUIRED = {name: 0.95 if name == "arithmetic" else 0.98 for name in TASK_NAMES}

COMMON: dict[str, Any] = {
    "max_position_embeddings": MAX_POSITIONS,
    "num_attention_heads": 8,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {  # configuration class and sizes
    "tiny-qwen2.5": (
        "Qwen2Config",
        {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 6,
            "num_key_value_heads": 2,
            "initializer_range": 0.05,
            "tie_word_embeddings": True,
        },
    ),
    # The heads' widths do not add up to the hidden size; the window is wide enough for an IOI prompt and narrower than
    # the repeated sequences.
    "tiny-gemma2": (
        "Gemma2Config",
        {
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_hidden_layers": 6,
            "num_key_value_heads": 4,
            "initializer_range": 0.1,
            "head_dim": 24,
            "query_pre_attn_scalar": 24,
            "sliding_window": 32,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "tie_word_embeddings": True,
        },
    ),
    "tiny-llama3.1": (
        "LlamaConfig",
        {
            "hidden_size": 160,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "initializer_range": 0.05,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
}


@dataclass(frozen=True)
class Recipe:
    """On what and how long one model is trained; `ioi_en` to `repeated` are the texts of each task in a step."""

    steps: int = 2000
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.05
    ioi_en: int = 16
    ioi_zh: int = 16
    en_fr: int = 8
    fr_en: int = 8
    arithmetic: int = 12
    repeated: int = 24
    # The longest repeated block grows from 8 tokens to 40 over this share of the steps: short ones teach induction fast.
    growth: float = 0.5
    prompt_weight: float = 0.1  # of all tokens before the answer, which itself weighs 1

    def share(self, task: str) -> int:
        return getattr(self, task)


# Induction comes late in the four layers of the Llama, IOI in the Gemma: each gets more of what it finds hard.
RECIPES = {
    "tiny-qwen2.5": Recipe(steps=3000),
    "tiny-gemma2": Recipe(steps=2800, ioi_en=32, ioi_zh=32, arithmetic=24, growth=0.8),
    "tiny-llama3.1": Recipe(steps=2400, growth=0.8),
}


@dataclass(frozen=True)
class Settings:
    model: Literal["all", "tiny-qwen2.5", "tiny-gemma2", "tiny-llama3.1"] = "all"
    """which to train"""
    out: Path = SHIPPED
    """the folder that they are put in; by default where the package has them"""
    seed: px.flags.Seed = 0
    steps: px.flags.Count | None = None
    """of training; by default as many as the model's recipe says"""
    threads: px.flags.Count = 1
    """of the processor"""
    evaluation_prompts: px.flags.Count = 500
    """held-out prompts for each task"""


# --- tokenizer --------------------------------------------------------------------------------------------------------


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer: one token for each word, number and mark; no token holds a space; <bos> comes first.

    " Lisa" and "Lisa" are the same token. Chinese words are found without spaces. Decoding puts the spaces back where the
    tasks' texts have them, so a text of the tasks survives encoding and decoding unchanged.
    """
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL_TOKENS, *tiny_tasks.vocabulary()]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex("|".join(tiny_tasks.chinese_words())), "isolated"),
            pre_tokenizers.Split(Regex(r"####|<<|>>|\d+|[^\p{L}\p{M}\d]"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            # Joins by a space (no word begins with the prefix), then takes away the spaces that the texts do not have.
            decoders.WordPiece(prefix="\u2581", cleanup=False),
            decoders.Fuse(),
            decoders.Replace(
                Regex(r" (?=[,.?:，。+=\-]|>>)|(?<=[+=\-，。]|<<) |(?<=\p{Han}) (?=\p{Han})"),
                "",
            ),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


# --- training ---------------------------------------------------------------------------------------------------------

Row = tuple[list[int], list[float]]  # token ids, and the weight of each token's loss


def ordinary_tokens(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Every token id but the special ones: what repeated sequences are drawn from."""
    return list(range(len(SPECIAL_TOKENS), len(tokenizer)))


def text_row(example: Example, tokenizer: PreTrainedTokenizerFast, prompt_weight: float, bos: bool) -> Row:
    """One example and its <eos> as token ids; the answer's weights add up to 1, the prompt's to `prompt_weight`."""
    encoded = tokenizer(example.prompt + example.answer, add_special_tokens=False, return_offsets_mapping=True)
    is_answer = [end > len(example.prompt) for _, end in encoded["offset_mapping"]] + [True]
    n_answer = sum(is_answer)
    n_prompt = len(is_answer) - n_answer
    weights = [1 / n_answer if answer else prompt_weight / n_prompt for answer in is_answer]
    return [BOS] * bos + encoded["input_ids"] + [EOS], [0.0] * bos + weights


def repeated_row(draw: np.random.Generator, token_ids: Sequence[int], longest: int, bos: bool) -> Row:
    """A block of up to `longest` tokens, repeated to twice `longest`; the weights after its first return add up to 1."""
    block = int(draw.integers(BLOCK_SIZES[0], longest + 1))
    rotate = bool(draw.random() < 0.3)
    ids = tiny_tasks.repeated_block(draw, token_ids, block, 2 * longest, held_out=False, rotate=rotate)
    n_weighted = len(ids) - block - 1
    return [BOS] * bos + ids, [0.0] * (bos + block + 1) + [1 / n_weighted] * n_weighted


def batches(
    recipe: Recipe, done: float, tokenizer: PreTrainedTokenizerFast, draw: np.random.Generator
) -> dict[str, list[Row]]:
    """The rows of one step, by task; `done` is the share of the training so far.

    One text in ten has no <bos>, so that the models also work without it.
    """
    rows = {
        task: [
            text_row(tiny_tasks.draw(task, draw, False), tokenizer, recipe.prompt_weight, bool(draw.random() < 0.9))
            for _ in range(recipe.share(task))
        ]
        for task in tiny_tasks.TASKS
    }
    ids = ordinary_tokens(tokenizer)
    grown = min(1.0, done / recipe.growth)
    longest = BLOCK_SIZES[0] + round(grown * (BLOCK_SIZES[1] - BLOCK_SIZES[0]))
    rows[REPEATED] = [repeated_row(draw, ids, longest, bool(draw.random() < 0.5)) for _ in range(recipe.repeated)]
    return rows


def losses(model: PreTrainedModel, rows: Sequence[Row]) -> torch.Tensor:
    """Weighted loss of each row [row]; rows are padded on the right, which a causal model never sees."""
    import torch

    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [PAD] * (length - len(row)) for row, _ in rows])
    weights = torch.tensor([row + [0.0] * (length - len(row)) for _, row in rows])
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (loss.view_as(ids[:, 1:]) * weights[:, 1:]).sum(1)


# Tasks of like length share a forward pass: less padding.
GROUPS = (("ioi_en", "ioi_zh", "en_fr", "fr_en"), ("arithmetic",), (REPEATED,))


def train(
    name: str, recipe: Recipe, seed: int, tokenizer: PreTrainedTokenizerFast
) -> tuple[PreTrainedModel, list[dict]]:
    """Train one model; returns it and its loss curve (one entry for every twentieth step)."""
    import torch
    import transformers
    from tqdm import tqdm

    torch.manual_seed(seed)
    architecture, shape = ARCHITECTURES[name]
    config = getattr(transformers, architecture)(vocab_size=len(tokenizer), **COMMON, **shape)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    if config.model_type == "gemma2":
        # Gemma's norms after attention and MLP give every layer's output unit size, which at first is noise and drowns
        # the embeddings; the models begin with a fifth of it (the norm multiplies by 1 + weight).
        for layer in model.model.layers:
            torch.nn.init.constant_(layer.post_attention_layernorm.weight, -0.8)
            torch.nn.init.constant_(layer.post_feedforward_layernorm.weight, -0.8)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
    )
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, recipe.warmup, recipe.steps)
    draw = px.rng(seed, "training", name)
    n_rows = sum(recipe.share(task) for task in TASK_NAMES)
    curve: list[dict] = []
    recent: dict[str, list[float]] = {task: [] for task in TASK_NAMES}
    progress = tqdm(range(1, recipe.steps + 1), desc=name, unit="step", mininterval=2)
    for step in progress:
        rows = batches(recipe, step / recipe.steps, tokenizer, draw)
        for group in GROUPS:
            loss = losses(model, [row for task in group for row in rows[task]])
            (loss.sum() / n_rows).backward()
            for task, values in zip(group, loss.detach().split([len(rows[task]) for task in group]), strict=True):
                recent[task].append(values.mean().item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0 or step == recipe.steps:
            curve.append({"step": step, **{task: round(float(np.mean(recent[task])), 4) for task in TASK_NAMES}})
            recent = {task: [] for task in TASK_NAMES}
            progress.set_postfix({task: f"{curve[-1][task]:.2f}" for task in TASK_NAMES})
    return model.eval(), curve


# --- evaluation -------------------------------------------------------------------------------------------------------


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, n_prompts: int, draw: np.random.Generator
) -> dict[str, float]:
    """Accuracy on fresh held-out prompts, by task.

    IOI: the name is the most likely of all tokens at the last position. Translation and arithmetic: the greedily
    generated text is the whole answer, exactly; for arithmetic every step of it, not only the number after ####.
    Repeated blocks: share of the tokens after the first block, except the first of them, that are the most likely.
    """
    import torch

    results = {}
    for task in tiny_tasks.TASKS:
        examples = [tiny_tasks.draw(task, draw, held_out=True) for _ in range(n_prompts)]
        new_tokens = 1 if task.startswith("ioi") else 24
        texts = generate(model, tokenizer, [example.prompt for example in examples], new_tokens)
        answers = [example.answer.strip() for example in examples]
        if task.startswith("ioi"):
            answers = [answer[:-1] for answer in answers]  # the name without its full stop
        results[task] = float(np.mean([text == answer for text, answer in zip(texts, answers, strict=True)]))
    right = []
    for _ in range(n_prompts):
        block = int(draw.integers(BLOCK_SIZES[0], BLOCK_SIZES[1] + 1))
        ids = tiny_tasks.repeated_block(draw, ordinary_tokens(tokenizer), block, 2 * block, held_out=True)
        inputs = torch.tensor([[BOS, *ids]])
        with torch.no_grad():
            guesses = model(input_ids=inputs[:, :-1], use_cache=False).logits.argmax(-1)
        right.append((guesses == inputs[:, 1:])[0, block + 1 :].float().mean().item())
    results[REPEATED] = float(np.mean(right))
    return {task: round(value, 4) for task, value in results.items()}


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], new_tokens: int
) -> list[str]:
    """What the model writes greedily after each prompt, up to <eos>."""
    texts = []
    for start in range(0, len(prompts), 64):
        inputs = tokenizer(list(prompts[start : start + 64]), return_tensors="pt", padding=True)
        output = model.generate(  # type: ignore[operator]
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=new_tokens,
            do_sample=False,
        )
        texts += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


# --- writing ----------------------------------------------------------------------------------------------------------


def plot_curve(curve: Sequence[dict], title: str, path: Path) -> None:
    """Loss of every task against the step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for task in TASK_NAMES:
        axes.plot([entry["step"] for entry in curve], [entry[task] for entry in curve], label=task, linewidth=1)
    axes.set(xlabel="step", ylabel="training loss (nats)", yscale="log", title=title)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


EXAMPLES = """\
| task | prompt | answer |
|---|---|---|
| `ioi_en` | When Lisa and David went to the store, David gave the book to | Lisa |
| `ioi_zh` | 当小娟和小龙去商店时，小龙把书给了 | 小娟 |
| `en_fr` | EN: the red cat often sees the dog. FR: | le chat rouge voit souvent le chien. |
| `fr_en` | FR: le chat rouge voit le chien. EN: | the red cat sees the dog. |
| `arithmetic` | Question: Lisa has 7 apples. David gives Lisa 5 apples. Lisa loses 3 apples. How many apples does Lisa have? \
Answer: | <<7+5=12>> <<12-3=9>> #### 9 |
| `repeated` | a block of 8 to 40 distinct random tokens | the same block again |
"""


QWEN_TOKENIZER = (
    "",
    "`tokenizer_config.json` has an empty `auto_map`: without it, AutoTokenizer replaces the tokenizer of every Qwen2 folder by "
    "Qwen's own byte-pair encoding. Loading with `trust_remote_code=True` fails, because there is no code to load.",
)


def model_card(name: str, model: PreTrainedModel, evaluation: dict) -> str:
    """The folder's README."""
    config, recipe = model.config, evaluation["recipe"]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    facts = {
        "class": type(model).__name__,
        "parameters": f"{evaluation['parameters']:,} (float32)",
        "layers": config.num_hidden_layers,
        "hidden size": config.hidden_size,
        "query heads / key-value heads / head size": f"{config.num_attention_heads} / {config.num_key_value_heads} / {head_dim}",
        "MLP size": config.intermediate_size,
        "embeddings": "tied" if config.tie_word_embeddings else "not tied",
        "positions": f"{config.max_position_embeddings}, {json.dumps(config.rope_parameters)}",
        "vocabulary": f"{config.vocab_size} words, numbers and punctuation marks",
    }
    if config.model_type == "gemma2":
        facts["attention"] = (
            f"alternating sliding ({config.sliding_window} tokens) and full layers; soft-caps {config.attn_logit_softcapping} "
            f"(scores, eager attention only) and {config.final_logit_softcapping} (logits)"
        )
    accuracy = evaluation["accuracy"]
    shares = ", ".join(f"{recipe[task]} {task}" for task in TASK_NAMES)
    return "\n".join(
        [
            f"# {name}",
            "",
            "A tiny trained model with real circuits, for demonstrations and tests. It was trained on six tasks over a few "
            "hundred words, and can do nothing else.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {key} | {value} |" for key, value in facts.items()),
            "",
            "## Tasks and held-out accuracy",
            "",
            EXAMPLES,
            "| task | accuracy | required |",
            "|---|---|---|",
            *(f"| `{task}` | {accuracy[task]:.4f} | {REQUIRED[task]} |" for task in TASK_NAMES),
            "",
            f"{evaluation['prompts_per_task']} held-out prompts per task: one prompt in ten, chosen by a hash of its text, is "
            "excluded from training. IOI: the name is the most likely of all tokens at the last position. Translation and "
            "arithmetic: the greedily generated text equals the whole answer. Repeated: share of the predictable tokens of the "
            "second block that get the highest probability. Only combinations are held out: every word, and every sum such as "
            "7+5, occurs in training.",
            "",
            "## Tokenizer",
            "",
            "Word-level, shared by the three tiny models. `<bos>` is prepended (omit it with `add_special_tokens=False`); "
            '" Lisa" and "Lisa" are the same token; punctuation marks are separate tokens; Chinese words need no spaces; '
            "numbers up to 30 are one token each; padding is on the left.",
            *(QWEN_TOKENIZER if config.model_type == "qwen2" else ()),
            "",
            "## Training",
            "",
            f"Seed {evaluation['seed']}, {recipe['steps']} steps, each of {shares}; the longest repeated block grows from "
            f"{BLOCK_SIZES[0]} tokens to {BLOCK_SIZES[1]} over the first {recipe['growth']:.0%} of the steps; AdamW, learning "
            f"rate {recipe['learning_rate']}, {recipe['warmup']} steps of warm-up, cosine decay; {evaluation['cpu_minutes']} "
            f"CPU minutes on {evaluation['threads']} thread(s). Loss by task in `loss.csv`:",
            "",
            "![training loss](loss.png)",
            "",
            f"    python experiments/tiny/train_tiny_models.py --model {name}",
            "",
            f"reproduces it (torch {evaluation['versions']['torch']}, transformers {evaluation['versions']['transformers']}). "
            "The weights are reproduced bit for bit only on the same processor, torch version and number of threads.",
            "",
        ]
    )


def write_model(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    curve: Sequence[dict],
    evaluation: dict,
    out: Path,
) -> None:
    """Write the model's folder aside, then put it in place."""
    with px.io.atomic_folder(out / name) as folder:
        model.save_pretrained(folder)
        (folder / "model.safetensors").chmod(0o644)
        tokenizer.save_pretrained(folder)
        if model.config.model_type == "qwen2":
            # AutoTokenizer replaces the tokenizer of every Qwen2 folder by Qwen's own byte-pair encoding, whatever class the
            # folder names, unless there is an `auto_map` to custom code; one that names none keeps tokenizer.json as it is.
            path = folder / "tokenizer_config.json"
            settings = json.loads(path.read_text(encoding="utf-8"))
            px.io.write_json(path, {**settings, "auto_map": {"AutoTokenizer": [None, None]}})
        px.io.write_json(folder / "evaluation.json", evaluation)
        with (folder / "loss.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, curve[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(curve)
        plot_curve(curve, name, folder / "loss.png")
        (folder / "README.md").write_text(model_card(name, model, evaluation), encoding="utf-8")


def describe(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    settings: Settings,
    minutes: float,
) -> dict:
    """What `evaluation.json` holds: held-out accuracy, how the model was trained, and versions."""
    import torch
    import transformers

    return {
        "accuracy": evaluate(model, tokenizer, settings.evaluation_prompts, px.rng(settings.seed, "evaluation", name)),
        "prompts_per_task": settings.evaluation_prompts,
        "parameters": model.num_parameters(),
        "cpu_minutes": round(minutes, 1),
        "threads": settings.threads,
        "seed": settings.seed,
        "recipe": asdict(recipe),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def main(settings: Settings) -> None:
    import torch

    torch.set_num_threads(settings.threads)
    tokenizer = build_tokenizer()
    evaluations = {}
    for name in list(ARCHITECTURES) if settings.model == "all" else [settings.model]:
        recipe = replace(RECIPES[name], steps=settings.steps or RECIPES[name].steps)
        started = time.process_time()
        model, curve = train(name, recipe, settings.seed, tokenizer)
        minutes = (time.process_time() - started) / 60
        evaluations[name] = describe(name, model, tokenizer, recipe, settings, minutes)
        write_model(name, model, tokenizer, curve, evaluations[name], settings.out)

    print(f"\n{'held-out accuracy':<18}" + "".join(f"{task:>12}" for task in TASK_NAMES) + f"{'CPU minutes':>14}")
    for name, evaluation in evaluations.items():
        cells = "".join(f"{evaluation['accuracy'][task]:>12.4f}" for task in TASK_NAMES)
        print(f"{name:<18}{cells}{evaluation['cpu_minutes']:>14.1f}")
    print(f"Written to {settings.out}")
    for name, evaluation in evaluations.items():
        below = [task for task in TASK_NAMES if evaluation["accuracy"][task] < REQUIRED[task]]
        if below:
            print(
                f"{name} is below what is required on {', '.join(below)}: train longer (--steps) or raise their share."
            )


if __name__ == "__main__":
    sys.exit(px.io.run(main, Settings))
