"""Where heads look: collected as the model has it, written and read, shown in a browser, and what is refused."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plotly.offline import get_plotlyjs

from modelcards import n_heads
from pyvene_ext.report.attention import attention_html, attention_page
from pyvene_ext.runs import attention as attention_view
from pyvene_ext.runs.attention import FILE, View, as_json, look, read_views, within, write_views
from tests.browser import in_browser, needs_browser
from tests.random_prompts import random_prompts
from tests.saved_models import shipped_tokenizer
from tests.tiny_random import FAMILIES, random_model

TOKENS = ["<bos>", " a", "\n "]
# Of each head the rows of 3 tokens: 255 times the weight.
LAYER = np.array(
    [
        [[255, 0, 0], [64, 191, 0], [32, 96, 127]],
        [[255, 0, 0], [0, 255, 0], [0, 0, 255]],
        [[255, 0, 0], [255, 0, 0], [51, 102, 102]],
    ],
    np.uint8,
)
VIEWS = [
    View("prompt 0", TOKENS, {0: LAYER[:2], 2: LAYER}, [(2, 1), (0, 0)]),
    View("prompt <b>", ["x", "</script>"], {2: LAYER[:, :2, :2]}),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_collected_is_the_models_own_attention_of_every_head(family: str) -> None:
    model, tokenizer = random_model(family), shipped_tokenizer()
    eager = random_model(family, attn_implementation="eager")
    prompts = random_prompts((9, 6, 7, 12, 6, 8)).input_ids
    heads = [(2, 1), (0, n_heads(model.config) - 1), (2, 1)]
    views = look(model, tokenizer, prompts, heads)
    assert [view.name for view in views] == [f"prompt {i}" for i in range(6)]
    for view, ids in zip(views, prompts, strict=True):
        with torch.no_grad():
            wanted = eager(torch.tensor([ids]), output_attentions=True).attentions
        assert view.tokens == [tokenizer.decode([token]) for token in ids]
        assert list(view.first) == heads[:2] and view.left_out == "" and list(view.patterns) == list(range(len(wanted)))
        for layer, patterns in view.patterns.items():
            assert patterns.dtype == np.uint8
            np.testing.assert_allclose(patterns / 255, wanted[layer][0], atol=0.5 / 255 + 1e-5)
    some = look(model, tokenizer, prompts, heads, which=[4, 1], names=list("abcdef"))
    assert [view.name for view in some] == ["e", "b"]
    np.testing.assert_array_equal(some[1].patterns[2], views[1].patterns[2])


def test_what_would_make_the_file_large_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, tokenizer = random_model("llama3_1"), shipped_tokenizer()
    prompts = random_prompts((9, 6, 12, 6)).input_ids
    heads, layers = n_heads(model.config), model.config.num_hidden_layers
    some = [(0, 0), (1, 1)]
    monkeypatch.setattr(attention_view, "CELLS", layers * heads * (45 + 21 + 78 + 21))
    assert [len(view.patterns) for view in look(model, tokenizer, prompts, some)] == [layers] * 4
    monkeypatch.setattr(
        attention_view, "CELLS", layers * heads * (45 + 21 + 78 + 21) - 1
    )  # only the layers of these heads
    views = look(model, tokenizer, prompts, some)
    assert [list(view.patterns) for view in views] == [[0, 1]] * 4
    assert {view.left_out for view in views} == {"all layers but 0, 1"}
    monkeypatch.setattr(attention_view, "CELLS", 2 * heads * (45 + 21 + 21))
    views = look(model, tokenizer, prompts, some)
    assert [view.name for view in views] == ["prompt 0", "prompt 1", "prompt 3"]
    assert {view.left_out for view in views} == {"all layers but 0, 1 and 1 of 4 prompts"}
    monkeypatch.setattr(attention_view, "CELLS", 2 * heads * 21 - 1)
    assert look(model, tokenizer, prompts, some) == []
    # What turns out too large after compression is left out at the end of the file.
    one = len(as_json(within(VIEWS)[0]).encode())
    assert [kept["name"] for kept in within(VIEWS, one)] == ["prompt 0"]
    assert within(VIEWS, one)[0]["left_out"] == "1 of 2 prompts" and len(within(VIEWS, 2 * one)) == 2
    assert "Left out, to keep the file small: all layers" in attention_html(views)
    assert "Left out" not in attention_html(VIEWS)


@pytest.mark.parametrize("family", ["gptj", "falcon", "bloom", "flash"])
def test_a_model_that_shows_no_attention_has_no_views_and_does_not_run(family: str) -> None:
    model = random_model("llama3_1" if family == "flash" else family)
    if family == "flash":
        model.config._attn_implementation_internal = "flash_attention_2"
    model.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    model.base_model.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    assert look(model, shipped_tokenizer(), random_prompts((9, 6)).input_ids, [(0, 0)]) == []


def test_what_is_written_is_read_again_and_none_leaves_no_file(tmp_path: Path) -> None:
    ahead = LAYER.copy()
    ahead[0, 0, 2] = 7  # what is ahead is not kept
    write_views(tmp_path, [View("é", TOKENS, {3: ahead}, [(3, 2)])])
    content = json.loads((tmp_path / FILE).read_text(encoding="utf-8"))
    packed = content["prompts"][0].pop("layers")
    assert content == {"prompts": [{"name": "é", "tokens": TOKENS, "first": ["3.2"], "left_out": ""}]}
    assert list(packed) == ["3"]
    rows = gzip.decompress(base64.b64decode(packed["3"]))
    assert list(rows) == [int(LAYER[head, q, k]) for head in range(3) for q in range(3) for k in range(q + 1)]
    (view,) = read_views(tmp_path / FILE)
    assert (view.name, view.tokens, list(view.first)) == ("é", TOKENS, [(3, 2)]) and list(view.patterns) == [3]
    np.testing.assert_array_equal(view.patterns[3], LAYER)
    write_views(tmp_path, [])
    assert not list(tmp_path.iterdir())
    with pytest.raises(
        ValueError, match=r"second: the patterns of 2 tokens are \[head 2 2\], not of shape \(3, 3, 3\)"
    ):
        write_views(tmp_path, [View("second", ["x", "y"], {0: LAYER})])
    assert not list(tmp_path.iterdir())


def packed(*values: int) -> str:
    return base64.b64encode(gzip.compress(bytes(values))).decode()


GOOD: dict[str, Any] = {
    "name": "p",
    "tokens": ["a", "b"],
    "first": ["0.0"],
    "left_out": "",
    "layers": {"0": packed(255, 0, 255)},
}
BOMB = base64.b64encode(gzip.compress(bytes(40_000_000))).decode()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must be a dict of fields"),
        (GOOD | {"tokens": ["a", "b", "c"]}, "of p are damaged .3 weights are not those of whole heads on 3 tokens"),
        (GOOD | {"layers": {"0": packed(255, 0)}}, "2 weights are not those of whole heads"),
        (GOOD | {"layers": {"0": packed()}}, "0 weights are not those"),
        (GOOD | {"layers": {"0": "!"}}, "are damaged"),
        (GOOD | {"layers": {"0": base64.b64encode(b"no gzip").decode()}}, "are damaged"),
        (GOOD | {"layers": {"0": packed(255, 0, 255)[:-8]}}, "are damaged"),
        (GOOD | {"layers": {"0": BOMB}}, "are damaged .too many weights"),
        (GOOD | {"layers": {"<b>": packed(255, 0, 255)}}, "should match pattern"),
        (GOOD | {"first": ["<b>"]}, "should match pattern"),
        (GOOD | {"layers": {}}, "at least 1 item"),
        ({"name": "p", "tokens": ["a"]}, "first is missing"),
    ],
)
def test_a_file_of_anything_else_is_named_in_one_sentence(tmp_path: Path, prompt: Any, message: str) -> None:
    (tmp_path / FILE).write_text(prompt if isinstance(prompt, str) else json.dumps({"prompts": [prompt]}))
    with pytest.raises(ValueError, match=message) as caught:
        read_views(tmp_path / FILE)
    assert str(caught.value).startswith(str(tmp_path / FILE)) and "\n" not in str(caught.value)


def test_a_page_needs_no_network_and_shows_nothing_as_code() -> None:
    page = attention_page(VIEWS, "some & <i>more")
    assert not re.search(r"<(script|link)[^>]+(src|href)\s*=", page)
    ours = page.replace(get_plotlyjs(), "")
    assert len(ours) < 14_000 and "<title>some &amp; &lt;i&gt;more</title>" in ours
    assert ours.count("</script>") == ours.count("<script") and "\\u003c/script>" in ours
    with pytest.raises(ValueError, match="no patterns to show"):
        attention_html([])


@needs_browser
def test_in_a_browser_every_head_is_shown_and_a_token_shows_where_it_looks(tmp_path: Path) -> None:
    script = """
      const [prompt, layer] = document.querySelectorAll("select"), plot = document.querySelector(".plot");
      const options = menu => [...menu.options].map(o => o.text);
      const grid = () => [...document.querySelectorAll(".grid button")];
      const chosen = () => grid().filter(button => button.classList.contains("chosen")).map(button => button.textContent);
      const spans = () => [...document.querySelectorAll(".text span")], shares = () => spans().map(span => span.title);
      const state = () => ({layer: layer.value, heads: grid().map(button => button.textContent), chosen: chosen()});
      const pixel = (head, q, k) => [...grid()[head].querySelector("canvas").getContext("2d").getImageData(k, q, 1, 1).data];
      const press = async button => { button.click(); await wait(300) };
      const start = {...state(), prompts: options(prompt), layers: options(layer), shares: shares()};
      await press(document.querySelectorAll(".first button")[1]);
      const second = {...state(), shares: shares(), text: spans().map(span => span.textContent),
                      pixels: [pixel(0, 2, 2), pixel(0, 0, 2)],
                      under: [await under(plot, 1, 2), await under(plot, 0, 2), await under(plot, 2, 0)],
                      axes: ["xaxis", "yaxis"].map(name => plot.layout[name].ticktext)};
      spans()[1].dispatchEvent(new MouseEvent("mouseenter"));
      const pointed = [shares(), document.querySelector(".told").textContent];
      spans()[1].dispatchEvent(new MouseEvent("mouseleave"));
      const left = shares();
      spans()[0].click();
      spans()[1].dispatchEvent(new MouseEvent("mouseenter"));
      spans()[1].dispatchEvent(new MouseEvent("mouseleave"));
      const kept = shares();
      await choose(layer, 1);
      await press(grid()[2]);
      const third = {...state(), under: await under(plot, 1, 2)};
      await choose(prompt, 1);
      return {start, second, pointed, left, kept, third, fourth: {...state(), shares: shares(), under: await under(plot, 0, 1)},
              colours: [plot.data[0].colorscale[0][1], plot.data[0].zmin, plot.data[0].zmax]};
    """
    said, wrong = in_browser(attention_page(VIEWS, "title"), script, tmp_path)
    assert wrong == []
    start, second = said["start"], said["second"]
    assert start["prompts"] == ["prompt 0: <bos> a \\n␣", "prompt <b>: x </script>"] and start["layers"] == ["0", "2"]
    # The first head to look at, and where its last token looks.
    assert (start["layer"], start["heads"], start["chosen"]) == ("2", ["2.0", "2.1", "2.2"], ["2.1"])
    assert start["shares"] == ["0.000", "0.000", "1.000"]
    assert (second["layer"], second["heads"], second["chosen"]) == ("0", ["0.0", "0.1"], ["0.0"])
    assert second["shares"] == ["0.125", "0.376", "0.498"] and second["text"] == ["<bos>", " a", "↵\n "]
    np.testing.assert_allclose(
        second["pixels"], [[33, 144, 140, 255], [240, 240, 240, 255]], atol=3
    )  # half-way, and ahead
    weight, of_bos, ahead = second["under"]
    assert (
        weight == "\\n␣ (2) → a (1)attention 0.376" and of_bos == "\\n␣ (2) → <bos> (0)attention 0.125" and ahead == ""
    )
    assert second["axes"] == [["&lt;bos>", "a", "\\n␣"]] * 2
    assert said["pointed"][0] == ["0.251", "0.749", ""] and said["pointed"][1].startswith("Head 0.0: where a (1) looks")
    assert said["left"] == second["shares"] and said["kept"] == ["1.000", "", ""]  # a click stays
    assert said["third"]["chosen"] == ["2.2"] and said["third"]["under"] == "\\n␣ (2) → a (1)attention 0.400"
    # Another prompt keeps layer and head where it has them.
    assert (said["fourth"]["layer"], said["fourth"]["chosen"]) == ("2", ["2.2"])
    assert said["fourth"]["shares"] == ["1.000", "0.000"]
    assert said["fourth"]["under"] == "</script> (1) → x (0)attention 1.000"
    assert said["colours"] == ["#440154", 0, 1]
