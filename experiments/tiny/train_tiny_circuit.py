"""Trains tiny-circuit, a transformer whose circuit is known because training put it there: two minutes on a CPU.

    python experiments/tiny/train_tiny_circuit.py                    # into pyvene_ext/tiny/tiny-circuit
    python experiments/tiny/train_tiny_circuit.py --out my_models --seed 1

The task. A prompt is <bos>, four different letters of a to h, two digits of 1 to 4, and "=". The larger digit says which of the
letters comes next:

    d a c b 2 3 =    ->    c

The causal model computes four variables, each at one node of the network (`VARIABLES`), along seven edges (`EDGES`):

    first   z.0.1      v: embed                      the first digit, at the end
    second  z.0.2      v: embed                      the second digit, at the end
    larger  mlp_out.0  z.0.1, z.0.2                  the larger of the two
    letter  z.1.3      q: mlp_out.0, v: embed        the letter there; read by the logits

Keys are no part of it: heads attend by position, which is the same in all prompts. The digits come last, so that the letters
cannot know them: else the MLP may mark the right letter in its key, and the last token needs no query.

Method. Strict interchange intervention training (SIIT; Gupta et al. 2024, InterpBench, arXiv 2407.14494): beside prompts as they
are (behaviour), prompts run with activations exchanged for those of other prompts, where the causal model says what must come
out. A third each: the node of one variable is exchanged (interchange intervention training, Geiger et al. 2022); nodes without a
variable are, which must change nothing (strict); and, as that fixes nodes alone, edges are: any of those outside of the circuit,
which must change nothing, and some of the seven, which are the causal model's own. `circuits.run_circuits` defines a run with
exchanged edges. The loss is cross-entropy at the last token with smoothed labels, so that the logits have one optimum for runs
of all kinds.

Written to OUT/tiny-circuit: a folder that `load_model` takes, and circuit.json, which `circuits.load_circuit` reads; its facts
have what was measured. The same seed gives the same batches; weights repeat bit for bit only on the same processor, torch
version and number of threads.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from tqdm import trange

import pyvene_ext as px

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SHIPPED = Path(__file__).resolve().parents[2] / "pyvene_ext" / "tiny"
NAME = "tiny-circuit"
DIGITS, LETTERS = "1234", "abcdefgh"
WORDS = ("<pad>", "<bos>", "<eos>", "<unk>", "=", *DIGITS, *LETTERS)
PAD, BOS, EOS, _, EQUALS = range(5)
DIGIT, LETTER = WORDS.index(DIGITS[0]), WORDS.index(LETTERS[0])

VARIABLES = {"first": "z.0.1", "second": "z.0.2", "larger": "mlp_out.0", "letter": "z.1.3"}
EDGES = (
    "embed->v.0.1",
    "embed->v.0.2",
    "z.0.1->mlp_in.0",
    "z.0.2->mlp_in.0",
    "mlp_out.0->q.1.3",
    "embed->v.1.3",
    "z.1.3->logits",
)
HEADS = 4
SHAPE: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "n_embd": 48,
    "n_inner": 96,
    "n_layer": 2,
    "n_head": HEADS,
    "n_positions": 32,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
KINDS = ("variable", "strict", "edges")  # of exchange, a third of a batch each
SMOOTHING = 0.05
# What the shipped model must reach on fresh prompts.
REQUIRED = {"accuracy": 0.99, "interchange": 0.98, "strict": 0.98}


@dataclass(frozen=True)
class Settings:
    out: Path = SHIPPED
    """the folder that it is put in; by default where the package has the others"""
    seed: px.flags.Seed = 0
    """of weights, prompts and exchanges"""
    steps: px.flags.Count = 600
    """of training; the learning rate rises over the first hundred, then falls to 0"""
    batch_size: px.flags.Count = 256
    """prompts per step, each run as it is and with an exchange"""
    learning_rate: float = 2e-3
    """at its highest"""
    threads: px.flags.Count = 1
    """of the processor"""
    evaluation_prompts: px.flags.Count = 1000
    """fresh prompts for each figure"""


# --- the task and its causal model ------------------------------------------------------------------------------------

Prompts = Int[np.ndarray, "prompt pos"]


def drawn(count: int, rng: np.random.Generator) -> Prompts:
    """Prompts at random, as tokens."""
    digits = DIGIT + rng.integers(len(DIGITS), size=(count, 2))
    letters = LETTER + rng.random((count, len(LETTERS))).argsort(1)[:, : len(DIGITS)]
    return np.concatenate([np.full((count, 1), BOS), letters, digits, np.full((count, 1), EQUALS)], 1)


def causal(
    base: Prompts, source: Prompts | None = None, exchanged: Bool[np.ndarray, "prompt edge"] | None = None
) -> dict[str, np.ndarray]:
    """Run the causal model.

    Args:
        base: the prompts.
        source: as many prompts, which exchanged edges carry the values of.
        exchanged: which of `EDGES` those are; by default none.

    Returns:
        The value of every variable as a token, and the answer.
    """
    there = {} if source is None else causal(source)

    def along(edge: str, here: np.ndarray, of_source: np.ndarray | None) -> np.ndarray:
        """What an edge carries."""
        if exchanged is None or of_source is None:
            return here
        those = exchanged[:, EDGES.index(edge)]
        return np.where(those.reshape(-1, *[1] * (here.ndim - 1)), of_source, here)

    other = base if source is None else source
    first = along("embed->v.0.1", base[:, -3], other[:, -3])
    second = along("embed->v.0.2", base[:, -2], other[:, -2])
    both = [along("z.0.1->mlp_in.0", first, there.get("first")), along("z.0.2->mlp_in.0", second, there.get("second"))]
    larger = np.maximum(*both)
    place = along("mlp_out.0->q.1.3", larger, there.get("larger")) - DIGIT
    letter = along("embed->v.1.3", base[:, 1:-3], other[:, 1:-3])[np.arange(len(base)), place]
    answer = along("z.1.3->logits", letter, there.get("letter"))
    return {"first": first, "second": second, "larger": larger, "letter": letter, "answer": answer}


# --- the network, edge by edge ----------------------------------------------------------------------------------------

Exchanged = Bool[np.ndarray, "*prompt sender receiver"]


class Graph(NamedTuple):
    """The network's edges by sender and receiver, which of them are the circuit's, and where each of `EDGES` is."""

    senders: list[str]
    exists: Exchanged
    circuit: Exchanged
    places: tuple[np.ndarray, np.ndarray]

    @classmethod
    def of(cls, config: Any) -> Graph:
        """That of a model with the circuit of `EDGES`."""
        writing, reading = (list(map(str, of(config))) for of in (px.specs.senders, px.specs.receivers))
        exists, circuit = px.circuits.Circuit.full(config), px.circuits.Circuit(frozenset(EDGES))
        ends = [edge.split("->") for edge in EDGES]
        rows, columns = np.array([[writing.index(s), reading.index(r)] for s, r in ends]).T
        return cls(writing, exists.matrix(config), circuit.matrix(config), (rows, columns))

    def nodes(self, which: Bool[np.ndarray, "*prompt sender"]) -> Exchanged:
        """Every edge of some senders, which is to exchange the senders themselves."""
        return which[..., None] & self.exists

    @property
    def spare(self) -> Bool[np.ndarray, " sender"]:
        """The heads and MLPs that compute no variable."""
        return np.array([sender not in VARIABLES.values() and sender != "embed" for sender in self.senders])

    def answers(self, base: Prompts, source: Prompts, exchanged: Exchanged) -> Int[np.ndarray, " prompt"]:
        """What the causal model answers with these edges exchanged."""
        return causal(base, source, exchanged[:, *self.places])["answer"]


def forward(
    model: Any,
    ids: Prompts,
    exchanged: Exchanged | None = None,
    source: Float[Tensor, "batch sender pos d_model"] | None = None,
) -> tuple[Float[Tensor, "batch vocab"], Float[Tensor, "batch sender pos d_model"]]:
    """Run a GPT-2 with a stream for each receiver: the sum of what senders add, in `source` if the edge is exchanged.

    Returns:
        The logits at the last token, and what each sender adds. Gradients flow through all of it.
    """
    import torch

    length, read = ids.shape[1], 0
    body = model.transformer
    stream = body.wte(torch.from_numpy(ids)) + body.wpe(torch.arange(length))
    future = torch.full((length, length), -torch.inf).triu(1)
    weights = None if exchanged is None else torch.from_numpy(exchanged).float()
    added = [stream]

    def streams(count: int) -> Float[Tensor, "batch receiver pos d_model"]:
        """Those of the next receivers."""
        nonlocal read
        read += count
        if weights is None or source is None:
            return stream[:, None].expand(-1, count, -1, -1)
        change = source[:, : len(added)] - torch.stack(added, 1)
        into = weights[:, : len(added), read - count : read]
        return stream[:, None] + torch.einsum("bsr,bspd->brpd", into, change)

    for block in body.h:
        attention = block.attn
        size = attention.head_dim
        weight, bias = attention.c_attn.weight.unflatten(1, (-1, size)), attention.c_attn.bias.unflatten(0, (-1, size))
        normed = block.ln_1(streams(3 * HEADS))
        q, k, v = (torch.einsum("brpd,dre->brpe", normed, weight) + bias[:, None]).split(HEADS, 1)
        z = torch.softmax(q @ k.transpose(-1, -2) / size**0.5 + future, -1) @ v
        shares = torch.einsum("bhpe,hed->bhpd", z, attention.c_proj.weight.unflatten(0, (HEADS, size)))
        added += shares.unbind(1)
        stream = stream + shares.sum(1) + attention.c_proj.bias
        added.append(block.mlp(block.ln_2(streams(1)[:, 0])))
        stream = stream + added[-1]
    return model.lm_head(body.ln_f(streams(1)[:, 0, -1])), torch.stack(added, 1)


# --- training ---------------------------------------------------------------------------------------------------------


def exchange(kind: str, count: int, graph: Graph, rng: np.random.Generator) -> Exchanged:
    """Which edges are exchanged in runs of one of `KINDS`, at random for each prompt."""
    share = np.where(rng.random(count) < 0.5, 1.0, rng.random(count))  # all, or some
    if kind == "variable":
        rows = np.array([graph.senders.index(node) for node in VARIABLES.values()])
        return graph.nodes(np.eye(len(graph.senders), dtype=bool)[rng.choice(rows, count)])
    if kind == "strict":
        return graph.nodes(graph.spare & (rng.random((count, len(graph.spare))) < share[:, None]))
    few = np.where(rng.random(count) < 0.5, 0.0, rng.random(count) ** 2)
    chances = np.where(graph.circuit, few[:, None, None], share[:, None, None])
    return graph.exists & (rng.random((count, *graph.exists.shape)) < chances)


def new_model(seed: int) -> PreTrainedModel:
    """The model before training."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(**SHAPE)).eval()  # eval: no dropout


def train(settings: Settings) -> PreTrainedModel:
    """Train the model."""
    import torch
    from transformers import get_cosine_schedule_with_warmup

    model = new_model(settings.seed)
    graph, rng = Graph.of(model.config), px.rng(settings.seed, "training")
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, 100, settings.steps)
    kind_of = np.arange(settings.batch_size) % len(KINDS)
    loss_of = torch.nn.CrossEntropyLoss(label_smoothing=SMOOTHING, reduction="none")
    for step in (bar := trange(1, settings.steps + 1, desc=NAME, unit="step", mininterval=2)):
        base = drawn(settings.batch_size, rng)
        source = np.roll(base, 1, 0)
        exchanged = np.choose(kind_of[:, None, None], [exchange(kind, len(base), graph, rng) for kind in KINDS])
        logits, added = forward(model, base)
        behaviour = loss_of(logits, torch.from_numpy(causal(base)["answer"]))
        logits, _ = forward(model, base, exchanged, added.roll(1, 0))
        of_exchanges = loss_of(logits, torch.from_numpy(graph.answers(base, source, exchanged)))
        optimizer.zero_grad()
        (behaviour.mean() + len(KINDS) * of_exchanges.mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            losses = {kind: f"{of_exchanges[kind_of == i].mean():.2f}" for i, kind in enumerate(KINDS)}
            bar.set_postfix({"behaviour": f"{behaviour.mean():.2f}"} | losses)
    return model


# --- what was learned -------------------------------------------------------------------------------------------------


def pairs(count: int, rng: np.random.Generator) -> tuple[Prompts, Prompts]:
    """Clean and corrupt prompts such that each of `EDGES`, exchanged alone, changes the answer; and so does everything."""
    clean, corrupt = (drawn(20 * count + 200, rng) for _ in range(2))
    right = causal(clean)["answer"]
    changes = causal(corrupt)["answer"] != right
    for edge in np.eye(len(EDGES), dtype=bool):
        changes &= causal(clean, corrupt, np.tile(edge, (len(clean), 1)))["answer"] != right
    chosen = np.flatnonzero(changes)[:count]
    return clean[chosen], corrupt[chosen]


def measure(model: PreTrainedModel, count: int, rng: np.random.Generator) -> dict[str, Any]:
    """The facts of circuit.json, on fresh prompts and others to exchange with.

    Accuracy is always the share of answers that the causal model gives in the same run. kl is the mean divergence of a run's
    next token from that of the prompts as they are, in nats.
    """
    import torch

    graph = Graph.of(model.config)
    base, source = drawn(count, rng), drawn(count, rng)
    with torch.no_grad():
        clean, _ = forward(model, base)
        _, added = forward(model, source)

    def run(edges: Exchanged) -> dict[str, float]:
        exchanged = np.broadcast_to(edges, (count, *graph.exists.shape)).copy()
        with torch.no_grad():
            logits, _ = forward(model, base, exchanged, added)
        log_p, log_q = clean.log_softmax(-1), logits.log_softmax(-1)
        right = logits.argmax(-1).numpy() == graph.answers(base, source, exchanged)
        return {"accuracy": float(right.mean()), "kl": float((log_p.exp() * (log_p - log_q)).sum(-1).mean())}

    def worst(sets: list[Exchanged]) -> dict[str, float]:
        runs = [run(edges) for edges in sets]
        return {"accuracy": min(each["accuracy"] for each in runs), "kl": max(each["kl"] for each in runs)}

    def singles(edges: Exchanged) -> list[Exchanged]:
        places = np.argwhere(edges)
        each = np.zeros((len(places), *edges.shape), bool)
        each[np.arange(len(places)), *places.T] = True
        return list(each)

    outside, none = graph.exists & ~graph.circuit, np.zeros_like(graph.exists)
    of_node = dict(zip(graph.senders, graph.nodes(np.eye(len(graph.senders), dtype=bool)), strict=True))
    return {
        "accuracy": run(none)["accuracy"],
        "interchange": {name: run(of_node[node])["accuracy"] for name, node in VARIABLES.items()},
        "interchange_edges": worst(singles(graph.circuit))["accuracy"],
        "nodes_outside": run(graph.nodes(graph.spare)),
        "worst_node_outside": worst([of_node[node] for node in np.array(graph.senders)[graph.spare]]),
        "edges_outside": run(outside),
        "worst_edge_outside": worst(singles(outside)),
    }


def unmet(figures: dict[str, Any]) -> list[str]:
    """What is below `REQUIRED`."""
    found = {
        "accuracy": figures["accuracy"],
        "interchange": min(*figures["interchange"].values(), figures["interchange_edges"]),
        "strict": min(figures[name]["accuracy"] for name in figures if name.endswith("outside")),
    }
    return [f"{name} is {found[name]:.3f}, required {least}" for name, least in REQUIRED.items() if found[name] < least]


# --- writing ----------------------------------------------------------------------------------------------------------


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each digit and letter, with or without spaces between them; <bos> comes first."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    characters = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), characters])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
    )
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    options: dict[str, Any] = {"padding_side": "left", "model_max_length": SHAPE["n_positions"]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **options)


def model_card(facts: dict[str, Any]) -> str:
    """The folder's README."""
    figures, recipe = facts["figures"], facts["recipe"]
    about = (__doc__ or "").partition("The task. ")[2].partition("\n\nWritten to OUT")[0]
    rows = {
        "none": figures["accuracy"],
        **{f"{node} ({name})": figures["interchange"][name] for name, node in VARIABLES.items()},
        "the edge of the circuit that does worst": figures["interchange_edges"],
        "all nodes without a variable": figures["nodes_outside"]["accuracy"],
        "all edges outside of the circuit": figures["edges_outside"]["accuracy"],
        "the node, or edge, outside that matters most": min(
            figures[f"worst_{what}_outside"]["accuracy"] for what in ("node", "edge")
        ),
    }
    return (
        f"""# {NAME}

A trained transformer whose circuit is known, as ground truth for methods that look for circuits. GPT2LMHeadModel, \
{SHAPE["n_layer"]} layers of {HEADS} heads, hidden size {SHAPE["n_embd"]}, MLPs of {SHAPE["n_inner"]}; \
{facts["parameters"]:,} parameters (float32). It can do nothing else.

## Task

{about}

## Figures

Share of {facts["prompts"]} fresh prompts on which the most likely token is the causal model's answer in the same run:

| exchanged for those of other prompts | accuracy |
|---|---|
"""
        + "".join(f"| {what} | {value:.3f} |\n" for what, value in rows.items())
        + f"""
## Training

Seed {recipe["seed"]}, {recipe["steps"]} steps of {recipe["batch_size"]} prompts, AdamW, learning rate \
{recipe["learning_rate"]}, {facts["cpu_minutes"]} CPU minutes on {recipe["threads"]} thread(s).

    python experiments/tiny/train_tiny_circuit.py

reproduces it (torch {facts["versions"]["torch"]}, transformers {facts["versions"]["transformers"]}). The weights are \
reproduced bit for bit only on the same processor, torch version and number of threads.
"""
    )


def write(model: PreTrainedModel, facts: dict[str, Any], out: Path) -> None:
    """Write the model's folder aside, then put it in place."""
    with px.io.atomic_folder(out / NAME) as folder:
        model.save_pretrained(folder)
        (folder / "model.safetensors").chmod(0o644)
        build_tokenizer().save_pretrained(folder)
        px.circuits.save_circuit(px.circuits.Circuit(frozenset(EDGES)), folder / "circuit.json", model, **facts)
        (folder / "README.md").write_text(model_card(facts), encoding="utf-8")


def main(settings: Settings) -> None:
    import torch
    import transformers

    torch.set_num_threads(settings.threads)
    started = time.process_time()
    model = train(settings)
    minutes = (time.process_time() - started) / 60
    figures = measure(model, settings.evaluation_prompts, px.rng(settings.seed, "evaluation"))
    facts = {
        "variables": VARIABLES,
        "figures": figures,
        "prompts": settings.evaluation_prompts,
        "parameters": model.num_parameters(),
        "cpu_minutes": round(minutes, 1),
        "recipe": {name: value for name, value in asdict(settings).items() if name != "out"},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    write(model, facts, settings.out)
    for name, figure in figures.items():
        print(f"{name:20} {figure}")
    print(f"written:\n  {settings.out / NAME}/")
    for what in unmet(figures):
        print(f"{what}: train longer (--steps), or with another --seed.")


if __name__ == "__main__":
    sys.exit(px.io.run(main, Settings))
