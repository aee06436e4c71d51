"""Where heads look: collected as the model has it, written and read, shown in a browser, and what is refused."""

from __future__ import annotations

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
from pyvene_ext.runs.attention import FILE, View, look, read_views, write_views
from tests.browser import in_browser, needs_browser
from tests.random_prompts import random_prompts
from tests.saved_models import shipped_tokenizer
from tests.tiny_random import FAMILIES, random_model

PATTERN = np.array([[1, 0, 0], [0.25, 0.75, 0], [0.125, 0.375, 0.5]])
TOKENS = ["<bos>", " a", "\n "]
VIEWS = [
    View("prompt 0", TOKENS, {"0.1": PATTERN, "2.3": np.eye(3)}),
    View(
        "prompt <b>", ["x", "</script>"], {"9.9": np.array([[1, 0], [0.9, 0.1]]), "2.3": np.array([[1, 0], [0.5, 0.5]])}
    ),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_collected_is_the_models_own_attention(family: str) -> None:
    model, tokenizer = random_model(family), shipped_tokenizer()
    eager = random_model(family, attn_implementation="eager")
    prompts = random_prompts((9, 6, 7, 12, 6, 8)).input_ids
    heads = [(2, 1), (0, n_heads(model.config) - 1), (2, 1)]
    views = look(model, tokenizer, prompts, heads)
    assert [view.name for view in views] == [f"prompt {i}" for i in range(5)]
    for view, ids in zip(views, prompts, strict=False):
        with torch.no_grad():
            wanted = eager(torch.tensor([ids]), output_attentions=True).attentions
        assert view.tokens == [tokenizer.decode([token]) for token in ids]
        assert list(view.patterns) == ["2.1", f"0.{heads[1][1]}"]
        for (layer, head), pattern in zip(heads, view.patterns.values(), strict=False):
            np.testing.assert_allclose(pattern, wanted[layer][0, head], atol=1e-5)
    some = look(model, tokenizer, prompts, heads, which=[4, 1], names=list("abcdef"))
    assert [view.name for view in some] == ["e", "b"]
    np.testing.assert_array_equal(some[1].patterns["2.1"], views[1].patterns["2.1"])


def test_prompts_that_would_make_the_file_large_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = random_model("llama3_1"), shipped_tokenizer()
    prompts = random_prompts((9, 6, 12, 6)).input_ids
    monkeypatch.setattr(attention_view, "CELLS", 2 * (45 + 21 + 21))
    assert [view.name for view in look(model, tokenizer, prompts, [(0, 0), (1, 1)])] == [
        "prompt 0",
        "prompt 1",
        "prompt 3",
    ]
    monkeypatch.setattr(attention_view, "CELLS", 2 * 21 - 1)
    assert look(model, tokenizer, prompts, [(0, 0), (1, 1)]) == []


@pytest.mark.parametrize("family", ["gptj", "falcon", "bloom", "flash"])
def test_a_model_that_shows_no_attention_has_no_views_and_does_not_run(family: str) -> None:
    model = random_model("llama3_1" if family == "flash" else family)
    if family == "flash":
        model.config._attn_implementation_internal = "flash_attention_2"
    model.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    model.base_model.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    assert look(model, shipped_tokenizer(), random_prompts((9, 6)).input_ids, [(0, 0)]) == []


def test_what_is_written_is_read_again_rounded_and_none_leaves_no_file(tmp_path: Path) -> None:
    pattern = np.array([[1, 0.5, 0], [0.12345, 0.87655, 0], [1 / 3, 1 / 3, 1 / 3]])  # what is ahead is not kept
    write_views(tmp_path, [View("é", TOKENS, {"3.10": pattern})])
    text = (tmp_path / FILE).read_text(encoding="utf-8")
    assert text == (
        '{"prompts":[{"name":"é","tokens":["<bos>"," a","\\n "],"heads":{"3.10":[[1.0],[0.123,0.877],[0.333,0.333,0.333]]}}]}\n'
    )
    (view,) = read_views(tmp_path / FILE)
    assert (view.name, view.tokens) == ("é", TOKENS) and list(view.patterns) == ["3.10"]
    np.testing.assert_array_equal(view.patterns["3.10"], [[1, 0, 0], [0.123, 0.877, 0], [0.333] * 3])
    write_views(tmp_path, [])
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"second: the pattern of 2 tokens is \[2 2\], not of shape \(3, 3\)"):
        write_views(tmp_path, [View("second", ["x", "y"], {"0.0": PATTERN})])
    assert not list(tmp_path.iterdir())


GOOD: dict[str, Any] = {"name": "p", "tokens": ["a", "b"], "heads": {"0.0": [[1], [0.5, 0.5]]}}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must be a dict of fields"),
        (GOOD | {"tokens": ["a"]}, "head 0.0 on p must have rows of 1, 2 and so on up to 1 "),
        (GOOD | {"heads": {"0.0": [[1], [0.5, 0.5, 0]]}}, "must have rows of 1, 2 and so on"),
        (GOOD | {"heads": {"0.0": [[1], [1.5, 0.5]]}}, r"heads.0.0.1.0 must be less than or equal to"),
        (GOOD | {"heads": {"0.0": [[1], [-0.5, 0.5]]}}, "greater than or equal to 0"),
        (GOOD | {"heads": {"<b>": [[1], [0.5, 0.5]]}}, "should match pattern"),
        (GOOD | {"heads": {}}, "at least 1 item"),
        ({"name": "p", "tokens": []}, "heads is missing"),
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
    assert len(ours) < 10_000 and "<title>some &amp; &lt;i&gt;more</title>" in ours
    assert ours.count("</script>") == ours.count("<script") and "\\u003c/script>" in ours
    assert '"2.3":[[1.0],[0.0,1.0],[0.0,0.0,1.0]]' in ours
    with pytest.raises(ValueError, match="no patterns to show"):
        attention_html([])


@needs_browser
def test_in_a_browser_the_menus_choose_and_the_mouse_brings_up_the_weight(tmp_path: Path) -> None:
    script = """
      const [prompt, head] = document.querySelectorAll("select"), plot = document.querySelector(".plot");
      const menus = () => [[...prompt.options].map(o => o.text), [...head.options].map(o => o.text), head.value];
      const first = [menus(), await under(plot, 1, 2), await under(plot, 0, 2), await under(plot, 2, 0)];
      const axes = ["xaxis", "yaxis"].map(name => plot.layout[name].ticktext);
      await choose(head, 1);
      const second = [head.value, await under(plot, 1, 2), await under(plot, 2, 2)];
      await choose(prompt, 1);
      const third = [menus(), await under(plot, 0, 1)];
      await choose(head, 0);
      return {first, axes, second, third, fourth: await under(plot, 1, 1),
              colours: [plot.data[0].colorscale[0][1], plot.data[0].zmin, plot.data[0].zmax]};
    """
    said, wrong = in_browser(attention_page(VIEWS, "title"), script, tmp_path)
    assert wrong == []
    menus, weight, of_bos, ahead = said["first"]
    assert menus == [["prompt 0: <bos> a \\n␣", "prompt <b>: x </script>"], ["0.1", "2.3"], "0.1"]
    assert (
        weight == "\\n␣ (2) → a (1)attention 0.375" and of_bos == "\\n␣ (2) → <bos> (0)attention 0.125" and ahead == ""
    )
    assert said["axes"] == [["&lt;bos>", "a", "\\n␣"]] * 2
    assert said["second"] == ["2.3", "\\n␣ (2) → a (1)attention 0.000", "\\n␣ (2) → \\n␣ (2)attention 1.000"]
    # Another prompt keeps the head where it has it, whatever its place.
    assert (
        said["third"][0][1:] == [["9.9", "2.3"], "2.3"] and said["third"][1] == "</script> (1) → x (0)attention 0.500"
    )
    assert said["fourth"] == "</script> (1) → </script> (1)attention 0.100"
    assert said["colours"] == ["#440154", 0, 1]
