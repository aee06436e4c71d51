"""Cards and fixes on copies of the installed pyvene laid out as checkouts: what is written, exact there, and refused."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pyvene
from pyvene.models import constants
from pyvene.models.modeling_utils import get_dimension_by_component

from modelcards import CARDS, COMPONENTS, Card, dimensions
from modelcards.export import behaviour
from modelcards.export.__main__ import card_text, main
from modelcards.export.cards import NEWER, export
from modelcards.export.checkout import PACKAGE, REGISTRY, Checkout
from modelcards.export.edits import BASE, RESOLVER
from modelcards.export.fixes import FIXES, chosen, fixed
from modelcards.export.source import Source
from tests import upstream_suite
from tests.forked import forks

FAMILIES = ("gpt2", "llama3_1", "phi3", "cohere")  # two that upstream has, two that it has not
BESIDE_FIXES = ("llama3_1", "cohere")  # one of each
DEFECTS = {1, 2, 3, 7, 9, 11, 12, 15, 22, 23}  # 22: the tokenizer of create_llama; 23: a field that a config lacks
ONLY_MAIN = {23}

# Runs the tests whose files match, with the pyvene of the folder it runs in and nothing of this project.
TESTED = """
import json, sys, unittest
sys.modules.update(dict.fromkeys(("modelcards", "pyvene_ext")))
result = unittest.TextTestRunner(verbosity=0).run(unittest.TestLoader().discover(".", pattern=sys.argv[1]))
failed = [case.id().split(".")[-2] for case, _ in result.errors + result.failures]
said = [text for _, text in result.errors + result.failures]
names = {}
exec(sys.argv[2], names)
print("\\n" + json.dumps({"run": result.testsRun, "failed": failed, "said": said, "extra": names["answer"]}))
"""

# What the mappings of a checkout hold, by class, and whose names are still there.
MAPPINGS = """
import pyvene
from pyvene.models import intervenable_modelcard as cards
def spelled(entry):
    return [getattr(part, "__name__", part) if not isinstance(part, tuple) else
            [next((name for name, value in vars(cards).items() if value is part[0]), None), part[1]] for part in entry]
answer = {
    "file": pyvene.__file__,
    "places": {cls.__name__: {name: spelled(entry) for name, entry in mapping.items()}
               for cls, mapping in cards.type_to_module_mapping.items()},
    "widths": {cls.__name__: mapping for cls, mapping in cards.type_to_dimension_mapping.items()},
    "names": sorted(vars(cards)),
}
"""


# What main's resolver can do that 0.1.8's cannot, in our own words: products of fields. A proposal that names a field which the
# config lacks is an error there; a fix would pass it over.
PRODUCTS = """
def _resolve(config, proposal):
    numerator, _, denominator = proposal.partition("/")
    size = 1
    for factor in numerator.split("*"):
        size *= int(factor) if factor.isnumeric() else getattr_for_torch_module(config, factor)
    return size // (_resolve(config, denominator) if denominator else 1)


def get_dimension_by_component(model_type, model_config, component) -> int:
    if component not in type_to_dimension_mapping[model_type]:
        return None
    for proposal in type_to_dimension_mapping[model_type][component]:
        try:
            return _resolve(model_config, proposal)
        except PASSED_OVER:
            pass
    assert False
"""


RUN = subprocess.run  # a process from nothing


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def commit(folder: Path) -> None:
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "all")


@pytest.fixture(scope="module", autouse=True)
def processes_are_forks() -> Iterator[None]:
    """Each imports a pyvene that it has in its folder, but what all of these need is loaded once."""
    with forks() as run, pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", run)
        yield


@pytest.fixture(scope="module", autouse=True)
def each_pyvene_is_asked_once() -> Iterator[None]:
    """What a pyvene can do is found out by a process that imports it, for seconds; most of these checkouts hold the same one."""
    ask, known = behaviour._answers, dict[tuple[str, str], Any]()

    def answers(checkout: Checkout, questions: str) -> Any:
        asked = git(checkout.root, "rev-parse", "HEAD:pyvene").strip(), questions
        if asked not in known:
            known[asked] = ask(checkout, questions)
        return known[asked]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(behaviour, "_answers", answers)
        yield


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes checkouts of the installed pyvene, with empty packages of tests as upstream has them."""
    first = tmp_path_factory.mktemp("upstream") / "pyvene"
    installed = Path(pyvene.__file__).parent
    shutil.copytree(installed, first / "pyvene")
    for folder in ("tests", "tests/unit_tests", "tests/integration_tests"):
        (first / folder).mkdir(exist_ok=True)
        (first / folder / "__init__.py").touch()
    git(first, "init", "-q")
    git(first, "config", "core.autocrlf", "false")
    (first / ".git/info/exclude").write_text("__pycache__/")  # what is compiled already need not be again in each copy
    commit(first)

    def copy() -> Path:
        folder = tmp_path_factory.mktemp("copy") / "pyvene"
        shutil.copytree(first, folder)
        return folder

    return copy


@pytest.fixture(scope="module")
def make_main(make: Callable[[], Path]) -> Callable[[], Path]:
    """Makes stand-ins for pyvene's main: products are spelled, second proposals listed, and other lines stand around defects."""
    first = make()
    utilities = Source("utilities", (first / RESOLVER).read_text(encoding="utf-8"))
    resolve = utilities.function("get_dimension_by_component")
    utilities.replace(resolve.lineno - 1, resolve.end_lineno or 0, PRODUCTS.replace("PASSED_OVER", "()"))
    (first / RESOLVER).write_text(utilities.edited(), encoding="utf-8")
    fallback = '( "head_dim", "hidden_size/num_attention_heads" )'
    for family in ("qwen2", "gemma", "gemma2", "llama", "mistral", "gpt2"):
        (path,) = (first / "pyvene/models" / family).glob("model*ings_intervenable_*.py")
        text = (
            path.read_text(encoding="utf-8")
            .replace('("hidden_size",)', '( "hidden_size", )')
            .replace('eager"', 'eager"  # !')
        )
        path.write_text(text.replace('("head_dim",)', fallback) if family == "qwen2" else text, encoding="utf-8")
    base = (first / BASE).read_text(encoding="utf-8")
    base = base.replace(
        "module_hook = self.intervention_hooks[key]\n", "module_hook = self.intervention_hooks[key]  # hook\n"
    )
    base = base.replace(
        "self._key_setter_call_counter = dict.fromkeys(", "self._key_setter_call_counter = dict.fromkeys( ", 1
    )
    (first / BASE).write_text(
        base.replace(
            "            for k, v in self._intervention_state", "\n            for k, v in self._intervention_state"
        ),
        encoding="utf-8",
    )
    commit(first)

    def copy() -> Path:
        folder = make()
        shutil.copytree(first, folder, dirs_exist_ok=True)
        return folder

    return copy


@pytest.fixture(scope="module")
def trees(make: Callable[[], Path], make_main: Callable[[], Path]) -> dict[str, Path]:
    """Clean trees, each fix alone, and all fixes with cards on top."""
    trees = {"before": make(), "main before": make_main()}
    for fix in FIXES:
        for tree in ("before", "main before"):
            git(trees[tree], "apply", "--include=tests/*", str(fix.path))
        name = str(fix.numbers)
        trees[name] = make_main() if set(fix.numbers) & ONLY_MAIN else make()
        checkout = Checkout(trees[name])
        checkout.write(fixed(checkout, [fix])[1])
    trees["main"] = make_main()
    checkout = Checkout(trees["main"])
    checkout.write(fixed(checkout, list(FIXES))[1])
    trees["all"] = make()
    checkout = Checkout(trees["all"])
    checkout.write(fixed(checkout, list(FIXES))[1])
    commit(trees["all"])
    checkout = Checkout(trees["all"])
    checkout.write(export(checkout, [card_of(family) for family in BESIDE_FIXES])[1])
    return trees


@pytest.fixture(scope="module")
def sent(make: Callable[[], Path]) -> tuple[Path, str, list[list[Any]]]:
    """A checkout to which cards were exported by the command, what it printed, and what the checks gave."""
    folder = make()
    checks: list[list[Any]] = []
    try_out = Checkout.try_out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkout, "try_out", lambda *a: (checks.extend((found := try_out(*a))[0]), found)[1])
        code, printed, _ = called("--to", str(folder), "--family", *FAMILIES)
    assert code == 0
    return folder, printed, checks


@pytest.fixture(scope="module")
def outcomes(trees: dict[str, Path], sent: tuple[Path, str, list]) -> dict[str, Any]:
    """What unittest says in every tree, and what mappings these have."""
    asked = {name: (folder, "*TestCase.py") for name, folder in trees.items()}
    asked["cards"] = (sent[0], "Phi3ModelCardTestCase.py")  # the command has run the others
    outcomes = {}
    for name, (folder, pattern) in asked.items():
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", TESTED, pattern, MAPPINGS], cwd=folder)
        assert done.returncode == 0, done.stderr
        outcomes[name] = json.loads(done.stdout.splitlines()[-1])
    return outcomes


def called(*arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the command, run here."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as leaving:
            code = int(leaving.code or 0)
    return code, out.getvalue(), err.getvalue()


def card_of(family: str) -> Card:
    return next(card for card in CARDS if card.family == family)


def changed(folder: Path) -> set[str]:
    return {line[3:] for line in git(folder, "status", "--porcelain", "--untracked-files=all").splitlines()}


def snapshot(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and ".git" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# -- cards -------------------------------------------------------------------------------------------------------------


def test_only_cards_registry_and_tests_are_written(sent: tuple[Path, str, list]) -> None:
    new = {"phi3", "cohere"}
    expected = {f"pyvene/models/{name}/modelings_intervenable_{name}.py" for name in ("gpt2", "llama", *new)}
    expected |= {f"pyvene/models/{name}/__init__.py" for name in new} | {REGISTRY, PACKAGE, "tests/modelcard_utils.py"}
    expected |= {f"tests/integration_tests/{name}ModelCardTestCase.py" for name in ("Gpt2", "Llama", "Phi3", "Cohere")}
    assert changed(sent[0]) == expected
    for path in expected:
        text = (sent[0] / path).read_text(encoding="utf-8")
        assert not re.search("modelcards|pyvene_ext|tap_", text), path
        assert "Left out, as no module" in text or not re.search(r"(phi3|cohere)/modelings", path)
    removed = git(sent[0], "diff", "-U0", "--", "pyvene").split("\n-")[1:]
    entries = ("attention_value_output", "query_output", "key_output", "value_output")
    assert all(re.match(rf"""\s+"(head_)?({"|".join(entries)})": |-- a/""", line) for line in removed), (
        "only widths that are wrong are changed or removed"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_process_finds_what_our_card_says(family: str, outcomes: dict[str, Any], sent: tuple) -> None:
    outcome = outcomes["cards"]
    there = outcome["extra"]
    assert Path(there["file"]).is_relative_to(sent[0])
    own = {value: name for name, value in vars(constants).items() if callable(value)}
    for model_class, mapping in card_of(family).plain.items():
        places = there["places"][model_class.__name__]
        for component, (path, hook, *splits) in mapping.items():
            assert places.pop(component) == [path, hook, *([own[split], param] for split, param in splits)]
        assert set(places) <= {"attention_weight"}, "entries that no card has"


def right(model_class: type, component: str, proposals: list[str]) -> bool:
    """Whether pyvene reads the right width from proposals, for the class's default config."""
    config = model_class.config_class()  # type: ignore[attr-defined]
    sizes = dimensions(config)
    golden = math.prod(sizes[factor] for factor in (COMPONENTS[component].width or "").split("*"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(pyvene.type_to_dimension_mapping, model_class, {component: proposals})
        try:
            return get_dimension_by_component(model_class, config, component) == golden
        except AttributeError:
            return False


@pytest.mark.parametrize("family", ["llama3_1", "gpt2"])
def test_no_width_that_is_right_upstream_is_dropped(family: str, outcomes: dict[str, Any]) -> None:
    before, after = (outcomes[tree]["extra"]["widths"] for tree in ("before", "cards"))
    for model_class in card_of(family).plain:
        for component, proposals in before[model_class.__name__].items():
            if component in COMPONENTS and component != "attention_weight" and right(model_class, component, proposals):
                assert right(model_class, component, after[model_class.__name__].get(component, [])), component


@pytest.mark.parametrize("passed_over", ["()", "AttributeError"])
def test_widths_are_spelled_as_far_as_the_checkout_can(passed_over: str, make: Callable[[], Path]) -> None:
    """A stand-in for pyvene's main, without and with a fix."""
    folder = make()
    with (folder / "pyvene/models/modeling_utils.py").open("a", encoding="utf-8") as file:
        file.write(PRODUCTS.replace("PASSED_OVER", passed_over))
    commit(folder)
    checkout, cards = Checkout(folder), [card_of(family) for family in ("qwen2_5", "gemma2", "llama3_1", "phi3")]
    exported, files = export(checkout, cards)
    qwen2, gemma2, llama, phi3 = (one.widths for one in exported)
    assert qwen2.missing == gemma2.missing == llama.missing == []
    assert qwen2.mapping["head_key_output"] == ("hidden_size/num_attention_heads",), "Qwen2's config has no head_dim"
    assert qwen2.mapping["key_output"][-1] == "num_key_value_heads*hidden_size/num_attention_heads"
    for widths in (gemma2, llama):
        assert widths.mapping["query_output"][0] == "num_attention_heads*head_dim"
        assert widths.mapping["key_output"][0] == "num_key_value_heads*head_dim"
    if passed_over == "()":  # its config may or may not have the field, which cannot be spelled
        assert phi3.missing == ["attention_value_output", "head_attention_value_output"]
    else:
        assert phi3.mapping["attention_value_output"] == ("num_attention_heads*head_dim", "hidden_size")
    # Qwen2 and Phi-3 have every way to spell a width, and what cannot be spelled; the others' tests take seconds more.
    checkout.try_out(files, [one.test for one in exported if one.card.family in ("qwen2_5", "phi3")])


def test_names_of_upstream_stay_and_new_ones_follow_them(outcomes: dict[str, Any]) -> None:
    before, after = (set(outcomes[tree]["extra"]["names"]) for tree in ("before", "cards"))
    assert before <= after
    kinds = ("type_to_module_mapping", "type_to_dimension_mapping")
    new = {f"{name}{role}_{kind}" for name in ("phi3", "cohere") for role in ("", "_lm") for kind in kinds}
    new |= {f"phi3_classifier_{kind}" for kind in kinds} | {"create_phi3", "create_cohere"}
    assert after - before == new
    places = [outcomes[tree]["extra"]["places"]["GPT2Model"]["attention_weight"] for tree in ("before", "cards")]
    assert places[0] == places[1], "what cannot be carried stays as it was"


def test_exported_tests_pass_as_upstream_runs_them(outcomes: dict[str, Any]) -> None:
    assert outcomes["cards"]["failed"] == [], outcomes["cards"]["said"]
    assert outcomes["cards"]["run"] == 5


def test_the_table_says_what_was_checked(sent: tuple[Path, str, list]) -> None:
    _, printed, checks = sent
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \| (\S+) \|$", printed, re.MULTILINE)
    classes = [cls.__name__ for family in FAMILIES for cls in card_of(family).mappings]
    assert [row[0] for row in rows] == classes
    for name, components, number, largest in rows:
        own = [check for check in checks if check[0] == name]
        assert (int(components), int(number)) == (len({check[1] for check in own}), len(own))
        assert float(largest) == pytest.approx(max(check[4] for check in own), rel=0.1)
        assert float(largest) < 1e-5 < float(number)
        carried = next(set(m) for f in FAMILIES for cls, m in card_of(f).plain.items() if cls.__name__ == name)
        assert int(number) == n_checks(carried)
        for component in carried:
            assert {"collect", "zero", "vanilla"} <= {check[3] for check in own if check[1] == component}, component
    assert printed.startswith("[P1] Model cards of ")
    assert all(f"\n## {section}\n" in printed for section in ("Description", "Testing Done", "Checklist:"))
    assert re.search(r"phi3: left out, as no module .*`attention_pattern`", printed)
    assert re.search(r"gpt2: as they were, and not checked: `attention_weight`", printed)
    assert re.search(r"cohere: left out, as another module reads their tensors .*`attention_input`", printed)
    assert re.search(r"llama: with a width that is right for heads of the default config's.*`query_output`", printed)


def n_checks(components: set[str]) -> int:
    """Every unit in each of two layers read, in one of them set to zero and interchanged; every sum of the residual stream."""
    units = {component: len(COMPONENTS[component].units) for component in components}
    read = sum(number * (2 if COMPONENTS[component].per_layer else 1) for component, number in units.items())
    sums = 2 * (2 if "resid_mid" in components else 1) + 1
    return read + 2 * sum(units.values()) + sums


def test_a_second_export_changes_nothing(sent: tuple[Path, str, list], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, printed, checks = sent
    suite = re.search("^The suite, .*", printed, re.MULTILINE).group()  # type: ignore[union-attr]
    monkeypatch.setattr(Checkout, "try_out", lambda *_: (checks, suite))
    before = snapshot(folder)
    again = called("--to", str(folder), "--family", *FAMILIES)
    assert again[:2] == (0, printed) and "nothing written" in again[2]
    assert snapshot(folder) == before
    merged = folder.parent / "merged"
    shutil.copytree(folder, merged)
    commit(merged)
    assert called("--to", str(merged), "--family", *FAMILIES)[0] == 0
    assert snapshot(merged) == before and not changed(merged)
    assert called("--to", str(merged), "--family", "phi3")[0] == 0, "a part of what is there"
    assert not changed(merged)


def test_every_card_goes_out(make: Callable[[], Path]) -> None:
    checkout = Checkout(make())
    exported, files = export(checkout, list(CARDS))
    assert [one.card.family for one in exported] == [card.family for card in CARDS]
    assert len({one.card.name for one in exported}) == len(CARDS)
    for one in exported:
        assert {one.test, f"pyvene/models/{one.module.replace('.', '/')}.py"} <= set(files)
        for names in one.names.values():
            assert all(name in files[REGISTRY] for name in names)
    for path, text in files.items():
        ast.parse(text, path, feature_version=(3, 9))  # the oldest that pyvene supports
    written = [path for path in files if path.startswith("pyvene/models/mistral/")]
    assert written == ["pyvene/models/mistral/modellings_intervenable_mistral.py"], "upstream's own spelling"


# -- fixes -------------------------------------------------------------------------------------------------------------


def test_there_is_a_fix_for_every_defect_that_belongs_upstream() -> None:
    assert sorted(number for fix in FIXES for number in fix.numbers) == sorted(DEFECTS)
    for fix in FIXES:
        assert re.match(r"\[Bug Fix\] \S.{,60}$", fix.title)
        assert "## Description" in fix.text and "## Testing Done" in fix.text
        assert fix.tests and (fix.tests != fix.paths or fix.edit is not None)


@pytest.mark.parametrize("fix", FIXES, ids=lambda fix: fix.path.stem)
def test_a_fix_alone_mends_what_its_test_shows(fix: Any, outcomes: dict[str, Any]) -> None:
    alone = outcomes[str(fix.numbers)]
    (case,) = (Path(path).stem for path in fix.tests)
    assert case in outcomes["main before" if set(fix.numbers) & ONLY_MAIN else "before"]["failed"]
    assert alone["failed"] == [] and alone["run"] > 0, alone["said"]


def test_fixes_are_found_by_structure_in_another_version(
    outcomes: dict[str, Any], make_main: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {Path(path).stem for fix in FIXES for path in fix.tests}
    assert set(outcomes["main before"]["failed"]) == cases, "every defect is there"
    assert outcomes["main"]["failed"] == [], outcomes["main"]["said"]
    texts, files = fixed(Checkout(make_main()), list(FIXES))
    said = capsys.readouterr().err.strip()
    assert re.fullmatch(r"fix 1 does not apply to .*: .* falls back on .* already, which fix 23 lets work\.", said)
    assert [title for title, _ in texts] == [fix.title for fix in FIXES if fix.numbers != [1]]
    assert (
        files[RESOLVER].count("except (AttributeError, TypeError)") == 1 and "evaluate_dimension" not in files[RESOLVER]
    )
    assert not any("{change}" in text or "evaluates products" in text for _, text in texts)


def test_a_fix_that_is_not_needed_or_not_found_is_not_written(make: Callable[[], Path], untried: None) -> None:
    folder = make()
    refused(folder, "--fixes", "23", saying=r"fix 23 is not needed by .*: its cards list no field")
    change(
        folder, RESOLVER, "for proposal in dimension_proposals:", "while proposal := next(iter(dimension_proposals)):"
    )
    refused(
        folder, "--fixes", "2", saying=r"fix 2 and 3 does not apply to .*should go through the proposals in one loop"
    )
    change(folder, "pyvene/models/gpt2/modelings_intervenable_gpt2.py", '= "eager"', '= "lazy"')
    refused(folder, "--fixes", "7", saying=r"fix 7 does not apply to .*create_gpt2 should choose eager attention")


def test_all_fixes_and_cards_live_together(outcomes: dict[str, Any], trees: dict[str, Path]) -> None:
    assert outcomes["all"]["failed"] == [], outcomes["all"]["said"]
    assert outcomes["all"]["run"] >= 5 * len(BESIDE_FIXES) + len(FIXES) - len(ONLY_MAIN)
    there = outcomes["all"]["extra"]
    assert there["widths"]["LlamaForCausalLM"]["query_output"] == ["num_attention_heads*head_dim", "hidden_size"]
    assert set(there["places"]["LlamaForCausalLM"]) <= set(there["widths"]["LlamaForCausalLM"]) | {"logits"}
    assert "attention_input" in there["places"]["CohereModel"], "edits are made on copies now"
    assert "reorder_and_upcast_attn" in (trees["all"] / "pyvene/models/gpt2/modelings_intervenable_gpt2.py").read_text()


def test_the_command_writes_fixes_and_says_what_for(make: Callable[[], Path]) -> None:
    folder = make()
    code, printed, said = called("--to", str(folder), "--fixes", "3", "11")
    assert code == 0, said
    files = fixed(Checkout(make()), fixes := chosen([3, 11]))[1]
    assert changed(folder) == set(files) >= {path for fix in fixes for path in fix.tests}
    assert all(fix.title in printed for fix in fixes) and printed.count("[Bug Fix]") == 2
    assert "`get_dimension_by_component` evaluates products" in printed and "{change}" not in printed
    before = snapshot(folder)
    commit(folder)
    code, _, said = called("--to", str(folder), "--fixes", "2", "3", "11")
    assert code == 0 and "nothing written" in said
    assert snapshot(folder) == before


# -- what is refused ---------------------------------------------------------------------------------------------------


def refused(folder: Path, *arguments: str, saying: str) -> None:
    """The command ends with code 2 and one sentence, and the folder stays as it is."""
    before = snapshot(folder)
    code, printed, said = called("--to", str(folder), *arguments)
    assert (code, printed) == (2, "")
    assert re.search(saying, said), said
    assert len(said.strip().splitlines()) == 1 and "Traceback" not in said
    assert snapshot(folder) == before


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused without running anything."""

    def never(*_: Any) -> Any:
        raise AssertionError("tests were run")

    monkeypatch.setattr(Checkout, "try_out", never)


@pytest.mark.parametrize("path", ["pyvene/models/constants.py", "notes.txt", REGISTRY, "tests/modelcard_utils.py"])
@pytest.mark.parametrize("what", [("--family", "llama3_1"), ("--fixes", "9")])
def test_uncommitted_changes_are_refused(make: Callable, untried: None, path: str, what: tuple[str, ...]) -> None:
    folder = make()
    with (folder / path).open("a", encoding="utf-8") as file:
        file.write("\n# mine\n")
    refused(folder, *what, saying=rf"uncommitted changes \({path}\): commit or stash")


def test_a_folder_that_is_no_checkout_is_refused(make: Callable, untried: None, tmp_path: Path) -> None:
    refused(tmp_path, "--family", "llama3_1", saying="git finds no .* there")
    refused(tmp_path / "nowhere", "--all", saying="git finds no .* there")
    git(tmp_path, "init", "-q")
    refused(tmp_path, "--all", saying="git finds no commit there")
    (tmp_path / "other.py").touch()
    commit(tmp_path)
    refused(tmp_path, "--all", saying="not a checkout of pyvene: it has no pyvene/models/intervenable_modelcard.py")
    refused(make() / "pyvene", "--all", saying="is not the top folder")


def change(folder: Path, path: str, old: str, new: str) -> None:
    text = (folder / path).read_text(encoding="utf-8")
    assert old in text
    (folder / path).write_text(text.replace(old, new), encoding="utf-8")
    commit(folder)


LLAMA = "pyvene/models/llama/modelings_intervenable_llama.py"


@pytest.mark.parametrize(
    ("path", "old", "new", "saying"),
    [
        (REGISTRY, "type_to_dimension_mapping = {", "widths_by_type = {", "has another form than pyvene's"),
        (REGISTRY, "global type_to", "global global type_to", "is no Python"),
        (
            LLAMA,
            "llama_type_to_module_mapping = {",
            "llama_type_to_module_mapping = dict() or {",
            "should be a dictionary",
        ),
        (LLAMA, '"n_head": ("num_attention_heads",),', '"n_head": ("n",), "x": ("n",),', "should hold one entry"),
        (LLAMA, """_permute, "n_kv_head")),\n}""", """_permute, "n_kv_head"))\n}""", "has no comma"),
    ],
)
def test_files_not_as_known_are_refused(
    make: Callable, untried: None, path: str, old: str, new: str, saying: str
) -> None:
    folder = make()
    change(folder, path, old, new)
    refused(folder, "--family", "llama3_1", saying=saying)


def test_stale_defaults_give_way_to_the_checkpoint_that_the_card_is_for(make: Callable[[], Path]) -> None:
    checkout = Checkout(make())
    exported, files = export(
        checkout, cards := [card_of(family) for family in ("qwen2_5", "gemma2", "llama3_1", "phi3")]
    )
    stale = [one.stale for one in exported]
    assert stale == ["Qwen/Qwen2-7B-beta", "google/gemma2-2b", None, None]
    for card, name in zip(cards[:2], stale, strict=False):
        path = checkout.mapping_file(card.name)
        before, after = checkout.committed(path), files[path]
        assert f'name="{name}", cache_dir' in (before or "") and name not in after
        assert f'name="{card.checkpoint}", cache_dir' in after
    checks = [[cls.__name__, "c", "pos", "zero", 0.0] for one in exported for cls in one.names]
    text = card_text(checkout, exported, checks)
    assert text.count("looks stale") == 2 and "- qwen2: `create_qwen2` loads by default `Qwen/Qwen2.5-3B`" in text
    path = checkout.mapping_file("llama")
    assert 'name="sharpbai/alpaca-7b-merged"' in files[path], "what nobody doubts stays"


def test_what_upstream_has_beside_the_mappings_stays(make: Callable) -> None:
    folder = make()
    mine = "import torch  # mine\nllama_lm_type_to_module_mapping = {'gate': 0}\nif torch.cuda.is_available():\n    print('fast')"
    change(folder, LLAMA, "import torch", mine)
    files = export(Checkout(folder), [card_of("llama3_1")])[1]
    before, after = (folder / LLAMA).read_text(encoding="utf-8").splitlines(), files[LLAMA].splitlines()
    lost = [line for line in before if line not in after]
    assert lost and all(re.match(r'    "(head_)?(attention_value|query|key|value)_output": ', line) for line in lost)


def test_fixes_that_do_not_apply_are_named_and_the_others_written(
    make: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkout, "try_out", lambda *_: ([], "suite"))
    folder = make()
    change(folder, "pyvene/models/intervenable_base.py", "self.use_fast = kwargs", "self.fast = kwargs")
    refused(folder, "--fixes", "11", saying=r"fix 11, made for pyvene 0\.1\.8, does not apply to .*patch failed")
    code, printed, said = called("--to", str(folder), "--fixes", "9", "11")
    assert (code, printed.count("[Bug Fix]")) == (0, 1) and "fix 11, made for pyvene 0.1.8, does not apply" in said
    refused(folder, "--fixes", "8", saying="there is no fix 8; there are 1, 2, 3, 7, 9, 11, 12, 15, 22, 23")
    refused(folder, "--family", "gpt5", saying="there is no card of gpt5; there are qwen2_5")


def test_cards_that_are_not_exact_there_are_refused(make: Callable) -> None:
    folder = make()
    change(
        folder, "pyvene/models/constants.py", "torch.chunk(x, 2, dim=-1)[selct_index]", "torch.chunk(x, 2, dim=-1)[0]"
    )
    refused(folder, "--family", "phi3", saying=r"Phi3ModelCardTestCase.* fails with the pyvene of .*mlp_up")


# -- pyvene's own tests through our class ------------------------------------------------------------------------------


def test_the_suite_tells_what_fails_with_our_class_only(
    make: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make()
    (folder / "tests/unit_tests/OwnTestCase.py").write_text(
        """
import subprocess, unittest
if "pyvene" in subprocess.run(["pip", "list"], stdout=subprocess.PIPE, text=True).stdout:
    raise RuntimeError("pyvene is installed")
import pyvene
from pyvene.models.intervenable_base import IntervenableModel

class OwnTestCase(unittest.TestCase):
    def test_either(self):
        self.assertIs(IntervenableModel, pyvene.IntervenableModel)

    def test_theirs(self):
        self.assertEqual(IntervenableModel.__module__, "pyvene.models.intervenable_base")

    def test_neither(self):
        self.fail()
"""
    )
    assert upstream_suite.main(str(folder)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["theirs: 3 run, 1 fail", "ours: 3 run, 2 fail"]
    assert lines[2].startswith("fails with ours only: tests.unit_tests.OwnTestCase.OwnTestCase.test_theirs: Assert")


# -- the oldest transformers -------------------------------------------------------------------------------------------

OLDEST = ("transformers==4.55.0", "tokenizers==0.21.4", "huggingface_hub==0.34.6")  # as main's requirements have it


@pytest.fixture(scope="module")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("oldest")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(folder)]
    done = subprocess.run([*pip, *OLDEST], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{OLDEST[0]} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    return folder


IMPORTED = """
import json, transformers, pyvene
print("\\n" + json.dumps([transformers.__version__, sorted(cls.__name__ for cls in pyvene.type_to_module_mapping)]))
"""


def test_all_cards_import_with_the_oldest_transformers(make: Callable[[], Path], oldest: Path) -> None:
    folder = make()
    checkout = Checkout(folder)
    checkout.write(export(checkout, list(CARDS))[1])
    found = []
    for run, path in ((RUN, str(oldest)), (subprocess.run, "")):
        command = [sys.executable, "-W", "ignore", "-c", IMPORTED]
        environment = {**checkout.environment, "PYTHONPATH": path}
        done = run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    (version, old), (_, new) = found
    assert version == "4.55.0" and set(new) - set(old) == NEWER
    assert {cls.__name__ for card in CARDS for cls in card.plain} <= set(new)
