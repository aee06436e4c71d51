"""The correlation experiment as users run it: files in, numbers and figures out, one sentence when something is wrong."""

import hashlib
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pydantic
import pytest
from crosslingual_head_corr import Config, layer_range, main

from pyvene_ext import stats
from pyvene_ext.io.cli import run
from pyvene_ext.report import write_report

ROOT = Path(__file__).parents[2]
A, B = np.random.default_rng(0).random((2, 6, 8)).astype(np.float32)
FAST = ("--n_resamples", "50")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working folder with the two matrices in data/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    np.save("data/en.npy", A)
    np.save("data/zh.npy", B)
    return tmp_path


def correlate(*flags):
    return run(main, Config, ["--a", "data/en.npy", "--b", "data/zh.npy", *FAST, *flags])


def files():
    return sorted(str(path) for path in Path().rglob("*") if path.is_file() and path.parts[0] != "data")


def refused(capsys, *flags):
    """The one line on stderr of a run that must fail without leaving a file."""
    assert correlate(*flags) == 2
    assert files() == []
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    return line


def test_the_config_repeats_the_run_and_a_report_shows_it(capsys):
    assert correlate("--seed", "3") == 0
    out = Path("outputs/crosslingual_head_corr/en_vs_zh")
    before = json.loads((out / "correlation.json").read_text())["overall"]
    assert run(main, Config, ["--config", str(out / "correlation.yaml")]) == 0
    assert json.loads((out / "correlation.json").read_text())["overall"] == before
    write_report([out], "page.html")
    page = Path("page.html").read_text()
    assert "correlation.json" in page and page.count('<img src="data:image/png') == 2


def as_plain(correlation):
    return json.loads(json.dumps(correlation.as_dict()))


@pytest.mark.usefixtures("drawn")
def test_defaults_write_numbers_and_figures_and_the_right_numbers(capsys):
    assert correlate() == 0
    out = "outputs/crosslingual_head_corr/en_vs_zh/"
    assert files() == [
        out + name
        for name in ("correlation.json", "correlation.yaml", "layers.pdf", "layers.png", "scatter.pdf", "scatter.png")
    ]
    record = json.loads(Path(out + "correlation.json").read_text())
    assert record["overall"] == as_plain(stats.correlate_heads(A, B, 0, 50))
    layers = stats.correlate_layers(A, B, 0, 50)
    q = stats.q_values(np.array([row.spearman.p_within_layers for row in layers]))
    assert len(record["per_layer"]) == 6
    for number, (found, expected) in enumerate(zip(record["per_layer"], map(as_plain, layers), strict=True)):
        assert found.pop("layer") == number
        assert found["spearman"].pop("q") == q[number]
        assert found["pearson"].pop("q") is not None
        assert found == expected
    assert record["b"] == {
        "name": "zh",
        "file": "data/zh.npy",
        "sha256": hashlib.sha256(Path("data/zh.npy").read_bytes()).hexdigest(),
    }
    assert record["layers"] == [0, 6] and record["n_heads"] == 8
    assert (record["seed"], record["n_resamples"]) == (0, 50)
    assert record["versions"]["numpy"] == np.__version__
    printed = capsys.readouterr().out
    assert f"{record['overall']['pearson']['r']:.3f}" in printed
    assert all(name in printed for name in files())


def test_table_on_the_terminal_is_aligned(capsys):
    a = A.copy()
    a[2] = 0
    np.save("data/en.npy", a)
    assert correlate() == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("layer "))
    table = lines[start : start + 8]
    assert len({len(line) for line in table}) == 1
    assert [line.split()[0] for line in table] == ["layer", "all", *"012345"]
    assert lines[start + 8] == "layer 2: constant input: a"


@pytest.mark.parametrize("dash", ["_", "-"])
def test_every_known_flag_with_underscores_or_dashes(dash):
    flags = ["--out_json", "x/o.json", "--scatter_png", "y/s.png", "--layer_png", "l.png", "--layers", "2:5"]
    flags = [flag.replace("_", dash) if flag.startswith("--") else flag for flag in flags]
    assert correlate(*flags) == 0
    assert files() == ["l.pdf", "l.png", "x/o.json", "x/o.yaml", "y/s.pdf", "y/s.png"]
    record = json.loads(Path("x/o.json").read_text())
    assert record["overall"] == as_plain(stats.correlate_heads(A[2:5], B[2:5], 0, 50))
    assert [row["layer"] for row in record["per_layer"]] == [2, 3, 4]


@pytest.mark.parametrize("flag", ["--no_layerwise", "--no-layerwise"])
def test_no_layerwise_leaves_out_the_layers(flag):
    assert correlate(flag, "--out_json", "o.json", "--scatter_png", "s.pdf") == 0
    assert files() == ["o.json", "o.yaml", "s.pdf"]
    assert json.loads(Path("o.json").read_text())["per_layer"] is None


@pytest.mark.filterwarnings("ignore:Glyph")  # not every machine has a Chinese font
def test_seed_and_names_are_used(capsys):
    assert correlate("--seed", "3", "--name_a", "English", "--name_b", "中文/zh", "--no_layerwise") == 0
    assert files()[0] == "outputs/crosslingual_head_corr/English_vs_中文_zh/correlation.json"
    record = json.loads(Path(files()[0]).read_text())
    assert record["overall"] == as_plain(stats.correlate_heads(A, B, 3, 50))
    assert (record["a"]["name"], record["b"]["name"]) == ("English", "中文/zh")
    assert "English against 中文/zh" in capsys.readouterr().out


def test_files_of_one_name_are_called_by_their_folders():
    for name, matrix in (("en", A), ("zh", B)):
        Path("data", name).mkdir()
        np.save(f"data/{name}/frequency.npy", matrix)
    assert correlate("--a", "data/en/frequency.npy", "--b", "data/zh/frequency.npy", "--no_layerwise") == 0
    assert files()[0] == "outputs/crosslingual_head_corr/en_vs_zh/correlation.json"


def test_constant_and_missing_numbers_become_null_with_a_note():
    a = A.copy()
    a[1], a[3, 0] = 0.5, np.nan
    np.save("data/en.npy", a)
    assert correlate("--out_json", "o.json") == 0
    record = json.loads(Path("o.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert (record["overall"]["n"], record["overall"]["dropped"]) == (47, 1)
    constant = record["per_layer"][1]
    assert constant["note"] == "constant input: a"
    assert constant["pearson"] == dict.fromkeys(("r", "p", "low", "high", "p_within_layers", "q"))
    assert record["per_layer"][3]["dropped"] == 1


@pytest.mark.parametrize(
    ("a", "b", "why"),
    [
        (np.zeros((6, 8)), np.ones((6, 8), dtype=int), "constant input: a and b"),
        (np.zeros((6, 8)), B, "constant input: a"),
        (np.ones((1, 1)), np.ones((1, 1)), "fewer than 3 pairs"),
    ],
)
def test_matrices_without_any_correlation_are_refused(a, b, why, capsys):
    np.save("data/en.npy", a)
    np.save("data/zh.npy", b)
    assert f"have no correlation ({why})" in refused(capsys)


def test_a_missing_file_is_named(capsys):
    assert refused(capsys, "--a", "data/none.npy") == "error: data/none.npy: no such file or directory"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "data/bad.npy is not a complete .npy file"),
        (b"0.1,0.2\n0.3,0.4\n", "data/bad.npy is not a complete .npy file"),
        (b"\x80\x04]\x94.", "data/bad.npy is not a complete .npy file"),  # a pickle
    ],
)
def test_a_file_that_is_no_npy_is_named(capsys, content, message):
    Path("data/bad.npy").write_bytes(content)
    assert message in refused(capsys, "--b", "data/bad.npy")


def test_a_half_written_npy_is_named(capsys):
    whole = Path("data/zh.npy").read_bytes()
    for size in (20, len(whole) - 4):
        Path("data/zh.npy").write_bytes(whole[:size])
        assert "data/zh.npy is not a complete .npy file" in refused(capsys)


class Trap:
    def __reduce__(self):
        return (open, ("trap_sprung", "w"))


def test_a_pickled_npy_is_refused_and_its_code_never_runs(capsys):
    np.save("data/zh.npy", np.array([[Trap()]], dtype=object), allow_pickle=True)
    assert "data/zh.npy is not a complete .npy file" in refused(capsys)
    assert not Path("trap_sprung").exists()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones(8), "data/zh.npy has shape (8,)"),
        (np.ones((2, 6, 8)), "data/zh.npy has shape (2, 6, 8)"),
        (np.ones((0, 8)), "data/zh.npy has shape (0, 8)"),
        (np.ones((6, 7)), "data/en.npy is (6, 8) and data/zh.npy is (6, 7)"),
        (np.ones((6, 8), dtype=complex), "data/zh.npy holds complex128"),
        (np.full((6, 8), "x"), "data/zh.npy holds <U1"),
    ],
)
def test_matrices_that_do_not_fit_are_refused(capsys, array, message):
    np.save("data/zh.npy", array)
    assert message in refused(capsys)


@pytest.mark.parametrize("layers", ["3", "3-5", "a:b", "1:2:3", "-2:", "4:4", "5:2", "0:7", "6:", "7:9", ""])
def test_layers_that_are_malformed_or_not_there_are_refused(capsys, layers):
    assert f"--layers {layers!r} " in refused(capsys, f"--layers={layers}")


@pytest.mark.parametrize("beside", ["{name}.json", "{name}.meta.json", "{name}/summary.json"])
def test_heads_of_two_models_are_not_correlated(beside, capsys):
    for name, matrix, weights in (("en", A, "w1"), ("zh", B, "w2")):
        facts = Path("data", beside.format(name=name))
        facts.parent.mkdir(exist_ok=True)
        np.save(facts.with_name("frequency.npy") if "/" in beside else f"data/{name}.npy", matrix)
        facts.write_text(json.dumps({"weight_hash": weights}))
    pair = ("data/en/frequency.npy", "data/zh/frequency.npy") if "/" in beside else ("data/en.npy", "data/zh.npy")
    flags = ("--a", pair[0], "--b", pair[1], "--no_layerwise")
    line = refused(capsys, *flags)
    assert f"{pair[0]} was measured on the weights w1 and {pair[1]} on w2" in line
    assert correlate(*flags, "--allow_different_weights") == 0
    facts.write_text(json.dumps({"weight_hash": "w1"}))
    assert correlate(*flags) == 0
    facts.write_text(json.dumps({"no": "hash"}))
    assert correlate(*flags) == 0


def test_four_heads_a_layer_have_an_exact_p_and_no_interval(capsys):
    np.save("data/en.npy", np.arange(24.0).reshape(6, 4))
    np.save("data/zh.npy", np.arange(24.0).reshape(6, 4) ** 2)
    assert correlate() == 0
    record = json.loads(Path("outputs/crosslingual_head_corr/en_vs_zh/correlation.json").read_text())
    for row in record["per_layer"]:
        assert row["spearman"]["p"] == row["spearman"]["p_within_layers"] == pytest.approx(2 / 24)
        assert row["pearson"]["p"] >= 1 / 24 and row["pearson"]["low"] is None
    shown = capsys.readouterr().out
    assert "layers 0, 1, 2, 3, 4, 5: 4 pairs: exact p, 0.042 at the least, no interval" in shown
    assert shown.splitlines()[4].count(f"{'-':^16}") == 2
    pearson = record["overall"]["pearson"]
    (line,) = (line for line in shown.splitlines() if line.startswith("evidence: "))
    assert line.startswith(f"evidence: 24 heads; Pearson's r is {pearson['r']:.3g} [{pearson['low']:.3g}, ")
    assert f"heads shuffled within their layer, p = {pearson['p_within_layers']:.2g}" in line
    assert record["evidence"][0]["sample"] == "24 heads"


def test_layers_are_a_half_open_range():
    assert [*layer_range("0:2", 6)] == [0, 1]
    assert [*layer_range("4:", 6)] == [4, 5]
    assert [*layer_range(":1", 6)] == [0]
    assert [*layer_range(":", 6)] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--scatter_png", "s.txt"), "s.txt does not end in a figure format"),
        (("--layer_png", "layers"), "layers does not end in a figure format"),
        (("--layer_png", "l.png", "--no_layerwise"), "give one of the two"),
        (("--scatter_png", "x/s.pdf", "--layer_png", "x/s.png"), "are both x/s; give two names"),
        (("--n_resamples", "0"), "--n_resamples must be 1 or more, not 0."),
        (("--out_json", "o.yaml"), "o.yaml is where the config goes"),
        (("--scatter_png", "data/en.npy/s.png"), "data/en.npy"),
    ],
)
def test_flags_that_cannot_be_met_are_refused_before_anything_is_written(capsys, flags, message):
    assert message in refused(capsys, *flags)


@pytest.mark.parametrize(
    "flags",
    [
        ("--out_json", "data/en.npy"),
        ("--out_json", "data/../data/zh.npy"),
        ("--out_json", "data/en.json"),  # what says which weights the matrix was measured on
        ("--scatter_png", "data/c.png"),
        ("--scatter_png", "data/c.pdf"),
        ("--layer_png", "data/c.png"),
        ("--layer_png", "data/c.svg"),
    ],
)
def test_an_output_that_is_an_input_is_refused_and_the_input_kept(capsys, flags):
    np.save("data/c.png", B)
    Path("data/c.png.npy").rename("data/c.png")
    for other in ("data/c.pdf", "data/c.svg"):
        Path(other).hardlink_to("data/c.png")
    Path("data/en.json").write_text("{}", encoding="utf-8")
    before = {path: path.read_bytes() for path in Path("data").iterdir()}
    given = ("--b", "data/c.png") if "c." in flags[1] else ()
    assert f"nothing was run: give another {flags[0]}." in refused(capsys, *given, *flags)
    assert {path: path.read_bytes() for path in Path("data").iterdir()} == before


@pytest.mark.parametrize("flags", [("--threshold", "1"), ("--seed", "one")])
def test_unknown_or_malformed_flags_exit_with_2(capsys, flags):
    with pytest.raises(SystemExit) as exit_:
        correlate(*flags)
    assert exit_.value.code == 2 and files() == []
    assert flags[0] in capsys.readouterr().err


def test_the_script_gives_an_exit_code_and_its_command(folder, monkeypatch, capsys):
    data = folder / "data"
    outputs = [f"--{flag}={folder / name}" for flag, name in (("out_json", "o.json"), ("scatter_png", "s.png"))]
    flags = [f"--a={data / 'en.npy'}", f"--b={data / 'zh.npy'}", "--no_layerwise", *outputs]
    monkeypatch.setattr(sys, "argv", ["experiments/crosslingual_head_corr.py", *flags])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.chdir(ROOT)
        runpy.run_path(sys.argv[0], run_name="__main__")
    assert (exit_.value.code, capsys.readouterr().err) == (0, "")
    assert files() == ["o.json", "o.yaml", "s.pdf", "s.png"]
    assert json.loads(Path("o.json").read_text())["command"].startswith(
        "python experiments/crosslingual_head_corr.py --a"
    )


def test_help_opens_with_the_commands_and_writes_flags_with_underscores(capsys):
    with pytest.raises(SystemExit) as exit_:
        correlate("--help")
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert "python experiments/crosslingual_head_corr.py --a en.npy --b zh.npy" in text
    assert "--out_json" in text and "--no_layerwise" in text and "--out-json" not in text


def test_defects_of_ours_keep_their_traceback():
    def study(_: Config):
        raise KeyError("a defect")

    with pytest.raises(KeyError):
        run(study, Config, ["--a", "x", "--b", "y"])


INTERRUPTED = "interrupted; nothing was finished that could be kept, and the same command starts from the beginning"


def test_other_errors_are_one_line_too(capsys):
    class Settings(pydantic.BaseModel):
        layer: int = pydantic.Field(ge=0)

    for raised, code, line in (
        (ValueError("two\nlines"), 2, "error: two lines"),
        (ValueError(), 2, "error: ValueError"),
        (OSError("no network"), 2, "error: no network"),
        (KeyboardInterrupt(), 130, INTERRUPTED),
        (lambda: Settings(layer=-1), 2, "error: layer must be greater than or equal to 0, not -1."),
    ):

        def study(_: Config, raised=raised):
            if callable(raised):
                raised()
            raise raised

        assert run(study, Config, ["--a", "x", "--b", "y"]) == code
        assert capsys.readouterr().err.splitlines() == [line]
