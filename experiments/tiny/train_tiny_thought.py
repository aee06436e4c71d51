"""Teaches a shipped tiny model to think in six latent steps instead of words: some minutes on a CPU.

    python experiments/tiny/train_tiny_thought.py
    python experiments/critical_heads/force_attention.py --models outputs/tiny-thought

The task is the word problems of the tiny models, `tiny_tasks.arithmetic`. In words a solution is "<<7+5=12>> <<12-3=9>> #### 9";
here the six latent steps take the place of its six numbers (the last number of a solution of one step four times), and the answer
comes right after them. The loss is that of the answer, and of each step's number read from its state by the model's own
unembedding, as in step-supervised training (SIM-CoT, arXiv 2509.20317). (What teaches the thoughts in CODI, arXiv 2502.21074, is
that the states before the answer are to be those of the model that reasons in words.) Gradients go through all steps.

Written to OUT: a folder that `load_model`, and so every study, takes (`pyvene_ext.models.latent_steps`), with training.csv, the
loss and the share of held-out problems solved on the way.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Gt

import pyvene_ext as px
from pyvene_ext.prompts.tiny_tasks import Example, draw

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STEPS = 6
TEMPLATE = "Question: {question} Answer:"


@dataclass(frozen=True)
class Config:
    base: str = "tiny-qwen2.5"
    """the shipped tiny model to begin with"""
    out: Path | None = None
    """the folder that is written; by default outputs/tiny-thought"""
    steps: px.flags.Count = 600
    """of training"""
    batch_size: px.flags.Count = 48
    """problems a step of training"""
    learning_rate: Annotated[float, Gt(0)] = 2e-3
    """at its highest, nearly; it rises over the first steps and falls to nothing"""
    seed: px.flags.Seed = 0
    """of the problems and of the new weights"""


def main(config: Config) -> None:
    from pyvene_ext.models.latent_steps import save

    folder = px.io.output_path(config.out, "outputs/tiny-thought")
    model, tokenizer = px.load_model(config.base)
    curve = teach(model, tokenizer, config)
    save(model, tokenizer, folder)
    px.io.write_csv(folder / "training.csv", curve)
    print(f"{100 * curve[-1]['solved']:.1f}% of held-out problems solved\nwritten:\n  {folder}/")


def teach(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: Config) -> list[dict[str, float]]:
    """Give a model latent steps and train it; the loss and the share of problems solved, now and then."""
    import torch
    from tqdm import trange

    from pyvene_ext.models.latent_steps import Format, attach, projection

    torch.manual_seed(config.seed)
    words, d_model = model.config.vocab_size, model.config.hidden_size
    model.resize_token_embeddings(words + 3, mean_resizing=False)
    form = Format(opening=(words,), latent=words + 1, closing=(words + 2,), steps=STEPS, template=TEMPLATE)
    attach(model, form, projection(d_model, d_model))
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: min(10 * (at + 1), config.steps - at) / config.steps)
    draws, curve = px.rng(config.seed, "training"), []
    for step in (bar := trange(1, config.steps + 1, unit="step")):
        loss = loss_of(model, tokenizer, [draw("arithmetic", draws, held_out=False) for _ in range(config.batch_size)])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        bar.set_postfix(loss=f"{float(loss.detach()):.3f}")
        if step % max(config.steps // 6, 1) == 0 or step == config.steps:
            curve.append({"step": step, "loss": float(loss.detach()), "solved": solved(model, tokenizer)})
    return curve


def loss_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> Tensor:
    """The mean loss of the numbers at the latent steps, of the answer and of the end after it."""
    import torch

    form: Any = px.models.format_of(model)
    steps: Any = model.latent_steps
    batch = tokenizer([example.prompt for example in examples], padding=True, padding_side="left", return_tensors="pt")

    def column(texts: Sequence[str]) -> Tensor:
        return torch.tensor([tokenizer.convert_tokens_to_ids(text) for text in texts])[:, None]

    numbers = [re.findall(r"\d+", example.answer.partition("####")[0]) for example in examples]
    thoughts = [column([(found + [found[-1]] * STEPS)[step] for found in numbers]) for step in range(STEPS)]
    answer = column([example.answer.split()[-1] for example in examples])
    end = torch.full_like(answer, tokenizer.eos_token_id)

    # The question with what begins the thought, then each latent step by itself, then what is after them: all in one cache.
    closing = torch.tensor([form.closing]).expand(len(answer), -1)
    ids = torch.cat([batch["input_ids"], torch.tensor([form.opening]).expand(len(answer), -1)], 1)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, ids.shape[1] - batch["input_ids"].shape[1]), value=1)
    positions, past, inputs, found = (mask.cumsum(-1) - 1).clamp(min=0), None, {"input_ids": ids}, []
    for step in range(STEPS + 2):
        out = model.base_model(
            **inputs, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True
        )
        past, states = out.past_key_values, out.last_hidden_state
        if step > 0:
            found.append(states)
        if step < STEPS:
            inputs = {"inputs_embeds": steps.projection(states[:, -1:])}
        else:
            inputs = {"input_ids": torch.cat([closing, answer], 1)}
        new = next(iter(inputs.values())).shape[1]
        mask = torch.nn.functional.pad(mask, (0, new), value=1)
        positions = positions[:, -1:] + torch.arange(1, new + 1)
    logits = model.get_output_embeddings()(torch.cat([*found[:STEPS], found[-1][:, -2:]], 1))
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.cat([*thoughts, answer, end], 1).flatten())


def solved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int = 200) -> float:
    """The share of held-out problems with the right answer."""
    problems = px.prompts.tiny_problems(count, px.rng(0, "word problems"), held_out=True)
    questions = px.prompts.with_latents(px.prompts.tokenize_problems(problems, tokenizer, TEMPLATE), model)
    return px.methods.evaluate(model, tokenizer, questions, max_new_tokens=2, batch_size=100).accuracy


if __name__ == "__main__":
    sys.exit(px.io.run(main, Config))
