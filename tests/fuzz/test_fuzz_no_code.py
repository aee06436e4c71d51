"""Nothing that is loaded is run: every loader is given every file that would write a mark if it were."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import activation_frequencies_ifr
import information_flow_routes
import numpy as np
import pytest
import torch
import xxhash
import yaml
from critical_heads import run_all
from pyvene import IntervenableConfig, RepresentationConfig, RotatedSpaceIntervention, ZeroIntervention

from pyvene_ext.engine.sweep.store import Store
from pyvene_ext.intervenable.model import IntervenableModel
from pyvene_ext.intervenable.statistics import Reference
from pyvene_ext.io.files import read_head_matrix
from pyvene_ext.methods.heads.published import read_known
from pyvene_ext.methods.heads.scores import read_head_scores
from pyvene_ext.methods.solving.results import Results
from pyvene_ext.models import codi
from pyvene_ext.models.codi import read_checkpoint
from pyvene_ext.models.latent_steps import FIELD, PROJECTION, read_projection
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.parallel import load_pairs
from pyvene_ext.prompts.problems import Problem, load_problems, tokenize_problems
from pyvene_ext.prompts.sets import PromptSet
from pyvene_ext.prompts.token_lists import read_token_list
from pyvene_ext.report import Run, write_report
from pyvene_ext.specs.files import load_specs
from tests.fuzz.outcomes import command, outcome
from tests.random_prompts import random_prompts
from tests.saved_models import save_random_model
from tests.tiny_random import random_model, tiny_config


class Trap:
    """Makes a folder when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.mark,)


def archive(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in files.items():
            file.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def in_buffer(write: Callable[..., Any], *args: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    write(buffer, *args, **options)
    return buffer.getvalue()


def saved_by_torch(file: io.BytesIO, value: Any, **options: Any) -> None:
    torch.save(value, file, **options)


def traps(mark: Path) -> dict[str, tuple[bytes, Callable[[bytes], Any]]]:
    """Files by kind, and the careless way to read each, which falls into it."""
    trap = Trap(mark)
    objects = in_buffer(np.save, np.array([[trap]], dtype=object), allow_pickle=True)
    run, new = (f"!!python/object/{how}:os.mkdir [{mark}]\n" for how in ("apply", "new"))

    def numpy(content: bytes) -> Any:
        found = np.load(io.BytesIO(content), allow_pickle=True)
        return found["clean"] if isinstance(found, np.lib.npyio.NpzFile) else found

    def loosely(content: bytes) -> Any:
        return yaml.load(content, yaml.UnsafeLoader)

    return {
        "pickle": (pickle.dumps(trap), pickle.loads),
        "pickle in ASCII": (pickle.dumps(trap, 0), pickle.loads),
        "pickle of a list": (pickle.dumps([1, 2, [trap]], 2), pickle.loads),
        "array of objects": (objects, numpy),
        "pickle called array": (pickle.dumps(trap), numpy),
        "archive of arrays of objects": (archive(clean=objects), numpy),
        "torch": (in_buffer(saved_by_torch, {"w": trap}), lambda c: torch.load(io.BytesIO(c), weights_only=False)),
        "torch of old": (
            in_buffer(saved_by_torch, {"w": trap}, _use_new_zipfile_serialization=False),
            lambda c: torch.load(io.BytesIO(c), weights_only=False),
        ),
        "YAML": (run.encode(), loosely),
        "YAML of flags": (f"model: {run}".encode(), loosely),
        "YAML of specs": (f"- kind: zero\n  site: {new}".encode(), loosely),
        "YAML key": (f"? {run}: 1\n".encode(), loosely),
    }


KINDS = tuple(traps(Path("/nowhere")))


@pytest.mark.parametrize("kind", KINDS)
def test_each_file_is_a_trap(kind: str, tmp_path: Path) -> None:
    content, careless = traps(tmp_path / "mark")[kind]
    try:
        careless(content)
    except TypeError as error:  # a mapping key of None is none
        assert "unhashable" in str(error)
    except yaml.YAMLError as error:
        assert kind == "YAML key", error
    assert (tmp_path / "mark").is_dir()


def flags(path: Path) -> None:
    if not command(print, activation_frequencies_ifr.Config, ["--config", str(path)]):
        raise ValueError(str(path))


def in_folder(name: str, read: Callable[[Path], Any], beside: dict[str, str] | None = None) -> Callable[[Path], Any]:
    """A reader of folders that is given one with the file in it, called `name`."""

    def of_file(path: Path) -> Any:
        folder = path.parent / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / name).parent.mkdir(parents=True)
        shutil.copy(path, folder / name)
        for other, text in (beside or {}).items():
            (folder / other).write_text(text)
        return read(folder)

    return of_file


def store_of(folder: Path) -> Any:
    """A store whose one wave, or whose result, is the file, with the digest that belongs to it."""
    content = (folder / "content").read_bytes()
    with Store(folder / "store", {}, {}) as store:
        waves = store._waves
        waves.mkdir()
        (waves / "000000.npz").write_bytes(content + xxhash.xxh3_128_digest(content, seed=0))
        try:
            return store.finished
        finally:
            store.complete({"clean": np.zeros(2)})
            (folder / "store/clean.npy").write_bytes(content)
            manifest = store._manifest
            manifest["arrays"]["clean"]["hash"] = xxhash.xxh3_128_hexdigest(content)
            store._write_manifest(manifest)
            with contextlib.suppress(ValueError), Store(folder / "store", {}, {}) as again:
                again.result  # noqa: B018


class Number:
    """What can be kept between runs."""

    def as_dict(self) -> dict[str, Any]:
        return {"number": 7}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Any:
        return record["number"]


def kept(folder: Path) -> Any:
    results = Results(folder / "kept", {})
    assert results.get({}, Number, Number) == 7
    (file,) = (folder / "kept").iterdir()
    shutil.copy(folder / "content", file)
    found = results.get({}, Number, Number)
    assert found == 7, "it is measured again"
    return found


def projection(folder: Path) -> Any:
    return read_projection(str(folder), None, 8)


CONFIG_YAML = {"config.yaml": "model: x\n"}
HEADER = "scores,layer,head\n"
# Under which name a file is given, and to whom.
LOADERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "prompts": ("p.json", PromptSet.load),
    "prompts by line": ("p.jsonl", PromptSet.load),
    "prompts as a dataset": ("p", in_folder("dataset_info.json", PromptSet.load)),
    "prompts as a dataset's state": ("p", in_folder("state.json", PromptSet.load, {"dataset_info.json": "{}"})),
    "prompts of another name": ("p.pkl", PromptSet.load),
    "prompts by a script": ("p.py", PromptSet.load),
    "problems": ("p.json", load_problems),
    "problems by line": ("p.jsonl", load_problems),
    "parallel text": ("p.tsv", lambda path: load_pairs(path, ("en", "fr"))),
    "parallel text by line": ("p.jsonl", lambda path: load_pairs(path, ("en", "fr"))),
    "token ids": ("ids.json", read_token_list),
    "token ids, pickled": ("ids.pkl", read_token_list),
    "token ids, Pickled": ("ids.PICKLE", read_token_list),
    "head scores": ("heads.csv", lambda path: read_head_scores(path, tiny_config("gpt2"))),
    "specs": ("specs.yaml", load_specs),
    "specs as JSON": ("specs.json", load_specs),
    "flags": ("config.yaml", flags),
    "settings": ("settings.yaml", run_all.read_settings),
    "known heads": ("known.json", read_known),
    "matrix": ("a.npy", read_head_matrix),
    "frequencies": ("a.npy", information_flow_routes.read_frequencies),
    "run": ("config.yaml", in_folder("config.yaml", Run.read)),
    "facts of a run": ("summary.json", in_folder("summary.json", Run.read, CONFIG_YAML)),
    "table of a run": ("heads.csv", in_folder("heads.csv", Run.read, CONFIG_YAML)),
    "deltas of a run": (
        "deltas.npy",
        in_folder(
            "deltas.npy",
            lambda folder: write_report([folder], folder / "report.html"),
            CONFIG_YAML | {"prompts.json": '["a"]'},
        ),
    ),
    "attention of a run": ("attention.json", in_folder("attention.json", Run.read, CONFIG_YAML)),
    "routes of a run": ("routes.json", in_folder("routes.json", Run.read, CONFIG_YAML)),
    "CODI checkpoint": ("w.bin", in_folder("pytorch_model.bin", read_checkpoint)),
    "CODI safetensors": ("w.safetensors", in_folder("model.safetensors", read_checkpoint)),
    "projection": ("p.safetensors", in_folder(PROJECTION, projection)),
    "manifest": ("m.json", in_folder("manifest.json", lambda folder: Store(folder, {}, {}).close())),
    "results": ("r.json", in_folder("content", kept)),
    "wave and result": ("w.npz", in_folder("content", store_of)),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_no_loader_runs_what_a_file_says(loader: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    name, load = LOADERS[loader]
    for kind, (content, _) in traps(mark).items():
        path = tmp_path / name
        path.write_bytes(content)
        given = outcome(load, path)
        assert given is None or "deltas" not in loader, kind
        assert not mark.exists(), kind


# -- folders of models -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_random_model("qwen2_5", folder)
    return folder


def hostile(saved: Path, tmp_path: Path, **changes: dict[str, Any]) -> tuple[Path, Path]:
    """A copy of a model's folder with entries put into its JSON files, and code beside them that makes the mark."""
    folder, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(saved, folder)
    code = f"import os\nos.mkdir({str(mark)!r})\nclass Evil: pass\n"
    for name in ("evil.py", "modeling_evil.py", "tokenization_evil.py", "__init__.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    for name, entries in changes.items():
        path = folder / f"{name}.json"
        values = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(values | entries))
    return folder, mark


AUTO = {
    "AutoConfig": "evil.Evil",
    "AutoModelForCausalLM": "evil.Evil",
    "AutoModel": "evil.Evil",
    "AutoTokenizer": ["evil.Evil", "evil.Evil"],
}
HOSTILE: dict[str, dict[str, dict[str, Any]]] = {
    "own code of a known type": {"config": {"auto_map": AUTO}},
    "own code of an unknown type": {"config": {"auto_map": AUTO, "model_type": "evil"}},
    "own code of no type": {"config": {"auto_map": AUTO, "model_type": None}},
    "own tokenizer": {"tokenizer_config": {"auto_map": AUTO, "tokenizer_class": "Evil"}},
    "own tokenizer of a known class": {"tokenizer_config": {"auto_map": AUTO, "tokenizer_class": "Qwen2Tokenizer"}},
    "own tokenizer in the config": {"config": {"tokenizer_class": "evil.Evil", "auto_map": AUTO}},
    "own generation": {"generation_config": {"custom_generate": ".", "auto_map": AUTO}},
    "own attention": {"config": {"_attn_implementation": "evil/kernel", "attn_implementation": "evil/kernel"}},
    "own kernels": {"config": {"use_kernels": True, "experts_implementation": "evil/kernel"}},
    "an adapter beside": {"adapter_config": {"auto_mapping": {"parent_library": "evil", "base_model_class": "Evil"}}},
    "own quantisation": {
        "config": {"quantization_config": {"quant_method": "evil", "modules_to_not_convert": ["evil"]}}
    },
    "trust in the config": {"config": {"trust_remote_code": True, "auto_map": AUTO}},
    "trust in both": {
        "config": {"trust_remote_code": True, "auto_map": AUTO},
        "tokenizer_config": {"trust_remote_code": True, "auto_map": AUTO},
    },
    "a template that reaches for Python": {
        "tokenizer_config": {"chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}"}
    },
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_models_folder_runs_no_code_of_its_own(
    case: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, mark = hostile(saved, tmp_path, **HOSTILE[case])
    monkeypatch.chdir(folder)  # whence Python imports
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr("builtins.input", lambda *_: "yes")  # to whatever transformers may ask
    loaded = outcome(load_model, folder, names=folder)
    if loaded is not None:
        model, tokenizer = loaded
        assert type(model).__module__.startswith("transformers.")
        assert type(tokenizer).__module__.startswith("transformers.")
        ids = torch.tensor([tokenizer("Anna")["input_ids"]])
        assert model.generate(ids, max_new_tokens=1, do_sample=False).shape[1] == ids.shape[1] + 1
    assert not mark.exists()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "YAML" not in kind])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_pickled_weights_are_not_loaded(kind: str, name: str, saved: Path, tmp_path: Path) -> None:
    folder, mark = hostile(saved, tmp_path)
    (folder / "model.safetensors").unlink()
    content, _ = traps(mark)[kind]
    (folder / name).write_bytes(content)
    assert outcome(load_model, folder, names=folder) is None
    assert not mark.exists()


LATENT = {"opening": [3], "latent": 4, "closing": [5]}


@pytest.mark.parametrize("kind", KINDS)
def test_a_projection_is_not_unpickled(kind: str, saved: Path, tmp_path: Path) -> None:
    folder, mark = hostile(saved, tmp_path, config={FIELD: LATENT})
    content, _ = traps(mark)[kind]
    (folder / PROJECTION).write_bytes(content)
    assert outcome(load_model, folder, names=folder) is None
    assert not mark.exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_checkpoint_is_converted_without_running_it(kind: str, name: str, saved: Path, tmp_path: Path) -> None:
    content, _ = traps(tmp_path / "mark")[kind]
    (tmp_path / name).write_bytes(content)
    flags = ["--checkpoint", str(tmp_path), "--base", str(saved), "--out", str(tmp_path / "out")]
    assert not command(codi.main, codi.Config, flags, names=tmp_path)
    assert not (tmp_path / "mark").exists() and not (tmp_path / "out").exists()


# What templates of chats may say, which are programs: none gets out of its sandbox, and each that fails is named.
TEMPLATES = {
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.mkdir(MARK) }}",
    "globals of a function": "{{ raise_exception.__globals__['__builtins__']['__import__']('os').mkdir(MARK) }}",
    "globals by filter": "{{ (messages|attr('__class__')).__mro__[-1].__subclasses__() }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "import": "{% import 'os' as os %}{{ os.mkdir(MARK) }}",
    "include": "{% include MARK %}",
    "range": "{% for i in range(10**10) %}x{% endfor %}",
    "power": "{{ 'x' * 10**14 }}",
    "self": "{{ self.__init__.__globals__ }}",
    "exception": "{{ raise_exception('no, this will not be') }}",
    "nothing known": "{{ nothing.at.all }}",
    "syntax": "{% for %}",
    "half a character": "{{ '\ud800' }}",
    "division": "{{ 1 // 0 }}",
    "type": "{{ messages + 1 }}",
}


PROBLEM = Problem(question="Anna has 2 cakes. How many?", solution="2\n#### 2", answer=2, steps=0)


@pytest.mark.parametrize("case", TEMPLATES)
def test_chat_templates_stay_in_their_sandbox(case: str, saved: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    _, tokenizer = load_model(saved)
    tokenizer.chat_template = TEMPLATES[case].replace("MARK", repr(str(mark)))
    found = outcome(lambda: tokenize_problems([PROBLEM], tokenizer, chat=True), names="chat template")
    assert found is None or case in ("format", "self")
    assert not mark.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_is_not_unpickled(kind: str, tmp_path: Path) -> None:
    model, place = random_model("gpt2"), [("z", 1)]
    first = Reference.compute(model, random_prompts((5, 6)), place, cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    content, _ = traps(tmp_path / "mark")[kind]
    file.write_bytes(content)
    again = Reference.compute(model, random_prompts((5, 6)), place, cache_dir=tmp_path)
    assert torch.equal(first.mean(place[0]), again.mean(place[0])) and not (tmp_path / "mark").exists()


# -- saved intervenable models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["torch", "torch of old", "pickle"])
@pytest.mark.parametrize("name", ["intkey", "pytorch_model.bin"])
def test_saved_interventions_are_not_unpickled(kind: str, name: str, tmp_path: Path) -> None:
    model, mark = random_model("gpt2"), tmp_path / "mark"
    trained = RepresentationConfig(0, "mlp_output", "pos", intervention_type=RotatedSpaceIntervention)
    config = IntervenableConfig([trained])
    IntervenableModel(config, model).save(str(tmp_path / "saved"))
    key = json.loads((tmp_path / "saved/config.json").read_text())
    made = IntervenableModel(config, model)
    file = name if "." in name else f"intkey_{next(iter(made.interventions))}.bin"
    content, _ = traps(mark)[kind]
    (tmp_path / "saved" / file).write_bytes(content)
    with pytest.raises(ValueError, match="holds more than weights, and is not loaded"):
        IntervenableModel.load(str(tmp_path / "saved"), model, include_model=True)
    assert key and not mark.exists()


@pytest.mark.parametrize(
    "named",
    [
        "os.mkdir",
        "evil.Evil",
        "pyvene_ext.io.files.os",
        "pyvene.models.interventions.torch",
        "pyvene.evil.Evil",
        "builtins.exec",
    ],
)
def test_a_saved_intervention_of_another_class_is_refused(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, mark = random_model("gpt2"), tmp_path / "mark"
    config = IntervenableConfig([RepresentationConfig(0, "mlp_output", "pos", intervention_type=ZeroIntervention)])
    IntervenableModel(config, model).save(str(tmp_path / "saved"))
    path = tmp_path / "saved/config.json"
    path.write_text(path.read_text().replace("pyvene.models.interventions.ZeroIntervention", named))
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert named in path.read_text()
    assert outcome(IntervenableModel.load, str(tmp_path / "saved"), model, names=named) is None
    assert not mark.exists()
