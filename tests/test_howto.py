"""The how-to pages, run as they stand, against plain hooks: on shipped models here, and on a real one in `tests/real`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

import activation_frequencies_ifr as study
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pyvene_ext as px
from pyvene_ext.io.cli import run as run_study
from tests.ground_truth.paths import path_patch_by_hooks
from tests.processes import start

ROOT = Path(__file__).parents[1]

Names = dict[str, Any]


def sections(page: str, wanted: Sequence[str] = ()) -> str:
    """The text of a how-to page: what stands before its sections, and those with the titles wanted; by default all of it."""
    text = (ROOT / f"docs/howto/{page}.md").read_text(encoding="utf-8")
    if not wanted:
        return text
    parts = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    return "\n".join([text.split("\n## ")[0], *(parts[title] for title in wanted)])


def run_cells(text: str, folder: Path) -> Names:
    """Run a page's cells in order, in a folder; everything that they define."""
    found: Names = {"__name__": "page"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MPLBACKEND", "agg")
        for cell in re.findall(r"```\{code-cell\} ipython3\n(?!:tags: \[remove)(.*?)```", text, re.S):
            exec(compile(cell, "docs/howto", "exec"), found)
    return found | {"folder": folder}


@contextmanager
def hooked(module: nn.Module, edit: Callable[[Tensor], None], before: bool = False) -> Iterator[None]:
    """Edit what enters or leaves a module, in place."""

    def first(value: Any) -> Tensor:
        return value[0] if isinstance(value, tuple) else value

    if before:
        handle = module.register_forward_pre_hook(lambda _, args: edit(first(args)))
    else:
        handle = module.register_forward_hook(lambda _, args, out: edit(first(out)))
    try:
        yield
    finally:
        handle.remove()


def last_logits(model: Any, ids: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1]


def answer_logprob(model: Any, ids: tuple[int, ...], answer: tuple[int, ...], edit: Any = None) -> float:
    """Log-probability of the answer, token by token on the whole sequence; `edit` is made in the prompt only."""
    with torch.no_grad():
        logits = model(torch.tensor([[*ids, *answer[:-1]]])).logits[0]
    steps = logits.log_softmax(-1)[len(ids) - 1 :]
    return sum(float(step[token]) for step, token in zip(steps, answer, strict=True))


def head_width(model: Any) -> int:
    return getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads


def check_head_switched_off(names: Names) -> None:
    model, width = names["model"], head_width(names["model"])
    for prompt, ids in enumerate(names["mine"].input_ids):
        ((right,),), ((wrong,),) = names["mine"].answers[prompt]

        def zero(x: Tensor) -> None:
            x[:, -1, 3 * width : 4 * width] = 0

        clean = last_logits(model, ids)
        with hooked(model.model.layers[2].self_attn.o_proj, zero, before=True):
            edited = last_logits(model, ids)
        found = names["switched_off"]
        assert found.baseline[prompt] == pytest.approx(float(clean[right] - clean[wrong]), abs=1e-4)
        assert found.intervened[0, prompt] == pytest.approx(float(edited[right] - edited[wrong]), abs=1e-4)
    assert len(names["switched_off"].to_frame()) == 2


def contribution(model: Any, layer: int) -> nn.Module:
    """The module whose output the MLP adds to the stream."""
    block = model.model.layers[layer]
    return getattr(block, "post_feedforward_layernorm", block.mlp)


def check_mlps(names: Names) -> None:
    model, prompts = names["model"], names["twenty"]
    for layer in (0, names["layers"] - 1):
        outputs: list[Tensor] = []
        with hooked(contribution(model, layer), lambda x, outputs=outputs: outputs.append(x[0].clone())):
            for ids in prompts.input_ids:
                last_logits(model, ids)
        mean = torch.cat(outputs).double().mean(0).float()
        for prompt in (0, len(prompts) - 1):
            ids, (right,) = prompts.input_ids[prompt], prompts.answers[prompt].right

            def replace(x: Tensor, n: int = len(ids), mean: Tensor = mean) -> None:
                x[:, :n] = mean

            clean = answer_logprob(model, ids, right)
            with hooked(contribution(model, layer), replace):
                edited = answer_logprob(model, ids, right)
            found = names["without_mlp"]
            assert found.baseline[prompt] == pytest.approx(clean, abs=1e-4)
            assert found.intervened[layer, prompt] == pytest.approx(edited, abs=1e-4)


def check_das_elsewhere(names: Names, model_name: str) -> None:
    """The saved intervention gives the same logits in another process."""
    base, source, last = names["base"], names["source"], names["last"]
    with torch.no_grad():
        here = names["das"](base.inputs(), [source.inputs()], last)[1].logits[:, -1]
    folder = names["folder"]
    torch.save((base.inputs(), source.inputs(), last), folder / "inputs.pt")
    process = start(run_das, folder, model_name)
    process.join()
    assert process.exitcode == 0
    there = torch.load(folder / "logits.pt")
    assert torch.allclose(here, there, atol=1e-5)


def run_das(folder: Path, model_name: str) -> None:
    """The saved intervention on the saved inputs."""
    base, source, last = torch.load(folder / "inputs.pt")
    das = px.IntervenableModel.load(folder / "das", px.load_model(model_name)[0])
    with torch.no_grad():
        torch.save(das(base, [source], last)[1].logits[:, -1].clone(), folder / "logits.pt")


def check_reading(names: Names) -> None:
    model, width, ids = names["model"], head_width(names["model"]), names["prompts"].input_ids[0]
    acts = names["acts"]
    for layer in range(names["layers"]):
        z: list[Tensor] = []
        with hooked(model.model.layers[layer].self_attn.o_proj, lambda x, z=z: z.append(x[0].clone()), before=True):
            last_logits(model, ids)
        assert torch.allclose(acts["z", layer][0].flatten(1), z[0], atol=1e-5)
        weight = model.model.layers[layer].self_attn.o_proj.weight
        added = torch.stack(
            [
                weight[:, h * width : (h + 1) * width] @ z[0][-1, h * width : (h + 1) * width]
                for h in range(names["heads"])
            ]
        )
        if hasattr(model.model.layers[layer], "pre_feedforward_layernorm"):  # Gemma: a norm follows attention's output
            norm = model.model.layers[layer].post_attention_layernorm
            whole = (weight @ z[0][-1]).detach()
            scale = torch.rsqrt(whole.pow(2).mean() + norm.eps) * (1 + norm.weight)
            added = added * scale
        assert torch.allclose(names["norms"][layer], added.norm(dim=-1), rtol=1e-4, atol=1e-5)
    eager = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            patterns = model(torch.tensor([ids]), output_attentions=True).attentions
    finally:
        model.set_attn_implementation(eager)
    at_3 = torch.stack([pattern[0, :, -1, 3] for pattern in patterns])
    assert torch.allclose(names["at_token_3"], at_3, atol=1e-5)
    assert names["most"] == [divmod(i, names["heads"]) for i in at_3.flatten().topk(3).indices.tolist()]


def check_own_metric(names: Names) -> None:
    model, width, prompts = names["model"], head_width(names["model"]), names["twenty"]
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    for layer, head in ((0, 3), (layers - 1, 1)):
        for prompt in (0, len(prompts) - 1):

            def zero(x: Tensor, head: int = head) -> None:
                x[..., head * width : (head + 1) * width] = 0

            with hooked(model.model.layers[layer].self_attn.o_proj, zero, before=True):
                edited = last_logits(model, prompts.input_ids[prompt]).softmax(-1)[names["ids"]].sum()
            row = layer * heads + head
            assert names["by_head"].intervened[row, prompt] == pytest.approx(float(edited), abs=1e-5)


def check_steering(names: Names) -> None:
    """Each new token by hand, without a cache, with the vector added at every token from the prompt on."""
    model, (ids,) = names["model"], names["mine"].input_ids
    vector = torch.tensor(names["steer"].vector) * names["steer"].scale
    means = []
    for prompts in (names["chinese"], names["english"]):
        last: list[Tensor] = []
        with hooked(model.model.layers[2], lambda x, last=last: last.append(x[0, -1].clone())):
            for some in prompts.input_ids:
                last_logits(model, some)
        means.append(torch.stack(last).mean(0))
    assert torch.allclose(vector, 2 * (means[0] - means[1]), atol=1e-4)

    def add(x: Tensor) -> None:
        x += vector

    text, ends = list(ids), model.generation_config.eos_token_id
    with hooked(model.model.layers[2], add):
        while len(text) < len(ids) + 20:
            text.append(int(last_logits(model, text).argmax()))
            if text[-1] in (ends if isinstance(ends, list) else [ends]):
                text.pop()
                break
    assert names["tokens"] == text[len(ids) :]
    for options in ({}, {"use_cache": False}):
        (tokens,) = px.generate(model, names["steer"], names["mine"], max_new_tokens=20, **options)
        assert tokens == names["tokens"]
    (untouched,) = px.generate(model, None, names["mine"], max_new_tokens=20)
    assert untouched[0] != names["tokens"][0], "the text changes from the first new token on"


def check_path(names: Names) -> None:
    model = names["model"]
    for prompt in (0, 5):
        ids, other = (torch.tensor([names[text].input_ids[prompt]]) for text in ("clean", "corrupt"))
        (right,), (wrong,) = (answer[0] for answer in names["clean"].answers[prompt])
        for head in (1, 3):
            with torch.no_grad():
                (logits,) = path_patch_by_hooks(model, f"z.2.{head}", ("q.4.2",), ids, other, freeze_mlps=False)
            found = names["patched"].intervened[head, prompt]
            assert found == pytest.approx(float(logits[right] - logits[wrong]), abs=1e-4)


def check_study(names: Names, model_name: str) -> None:
    """The file that the page writes is read by the study; its numbers are those of hooks."""
    flags = ["--dataset", "mine.json", "--model", model_name, "--out", "ifr.npy", "--tau", "0.1"]
    with chdir(names["folder"]):
        assert run_study(study.main, study.Config, flags) == 0
    frequencies = np.load(names["folder"] / "ifr.npy")
    prompts = px.PromptSet.load(names["folder"] / "mine.json").tokenize(names["tokenizer"])
    model, width, layers = names["model"], head_width(names["model"]), names["model"].config.num_hidden_layers
    assert frequencies.shape == (layers, model.config.num_attention_heads)
    for layer, head in ((0, 2), (layers - 1, 3)):
        active = []
        for ids, answers in zip(prompts.input_ids, prompts.answers, strict=True):

            def zero(x: Tensor, head: int = head) -> None:
                x[..., head * width : (head + 1) * width] = 0

            clean = last_logits(model, ids)
            with hooked(model.model.layers[layer].self_attn.o_proj, zero, before=True):
                edited = last_logits(model, ids)
            right, wrong = ([tokens[0] for tokens in some] for some in answers)
            of_clean, of_edited = (x[right].logsumexp(0) - x[wrong].logsumexp(0) for x in (clean, edited))
            active.append(abs(float(of_clean - of_edited)) > 0.1)
        assert frequencies[layer, head] == pytest.approx(np.mean(active))


# What is checked, on which page, and the sections that it needs.
CHECKS: dict[Callable[[Names], None], tuple[str, tuple[str, ...]]] = {
    check_head_switched_off: ("ablate", ("A head, on sentences of your own",)),
    check_mlps: ("ablate", ("A head, on sentences of your own", "Every MLP")),
    check_reading: ("read", ("Which heads look at a token, and how much do they write?",)),
    check_path: ("paths", ("One path, beside its control",)),
    check_steering: ("steer", ()),
    check_own_metric: ("own_metric", ()),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_a_page_gives_what_plain_hooks_give(check: Callable[[Names], None], tmp_path: Path) -> None:
    page, titles = CHECKS[check]
    check(run_cells(sections(page, titles), tmp_path))


@pytest.mark.slow
def test_a_trained_intervention_gives_the_same_logits_in_another_process(tmp_path: Path) -> None:
    names = run_cells(sections("das"), tmp_path)
    check_das_elsewhere(names, "tiny-qwen2.5")
    assert torch.equal(names["before"], names["after"])


def test_the_parts_of_the_residual_stream_sum_to_it(tmp_path: Path) -> None:
    names = run_cells(sections("read", ("Split the residual stream into its parts",)), tmp_path)
    parts, acts = names["by_head"], names["acts"]
    assert list(parts)[:2] == ["embed", "result.0.0"] and "attn_rest.3" in parts
    torch.testing.assert_close(sum(parts.values()), acts["resid_post", 3], atol=1e-4, rtol=1e-5)


@pytest.mark.slow
def test_a_study_takes_prompts_of_ones_own(tmp_path: Path) -> None:
    check_study(run_cells(sections("own_prompts"), tmp_path), "tiny-gemma2")


@pytest.mark.slow
def test_pyvene_is_wrong_without_an_error_where_the_page_says_so_and_we_are_not() -> None:
    """In a process of its own, because `import pyvene_ext` replaces pyvene's cards."""
    cells = re.findall(r"```\{code-cell\} ipython3\n(?::tags: [^\n]*\n)?(.*?)```", sections("pyvene_errors"), re.S)
    code = "\n".join([*cells[:-1], "import json; print(json.dumps([plain, ours]))"])
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    plain, ours = json.loads(output.splitlines()[-1])
    assert len(plain) == len(ours) == 8  # the number that the page and the README give

    def wrong(answer: Any) -> bool:
        return not answer.startswith("refused") if isinstance(answer, str) else answer > 1e-3

    assert all(map(wrong, plain)), plain
    assert all(answer.startswith("refused") if isinstance(answer, str) else answer < 1e-5 for answer in ours), ours
