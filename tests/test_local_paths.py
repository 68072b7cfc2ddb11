"""A URL is refused at once, by the option's name, wherever a path has to be local; nothing is written."""

import dataclasses
import inspect
import re
import typing
from pathlib import Path

import numpy as np
import pytest

import mmjax
from mmjax import cli, compilation, config, files
from mmjax.batch import Sample
from mmjax.checkpoints import converted, storage
from mmjax.checkpoints import frozen as frozen_weights
from mmjax.cli import chat, data, doctor, evaluate, generate, options, parity
from mmjax.config import DataConfig, RunConfig, Source, WeightsConfig
from mmjax.convert import export, write
from mmjax.data import check, images, pipeline, prepare, senses
from mmjax.data.formats import FORMATS, rows, tar_index
from mmjax.data.formats.webdataset import shards
from mmjax.evaluate import report
from mmjax.families.base import ImageSpec
from mmjax.inference import requests
from mmjax.training import encode_features, run
from tests import small

URLS = ["gs://bucket/x", "s3://bucket/x", "hf://datasets/o/n", "https://host/x.jpg", "file:///tmp/x", "GS://bucket/x",
        "az://c/x", "gs:/bucket/x", "file:/tmp/x", " gs://bucket/x", Path("gs://bucket/x"), Path("file:///tmp/x"), "gs://",
        Path("s3://"), "gcs+mirror.v1://bucket/x"]
LOCAL = ["", "x", "/data/x", "./gs:/x", "a/gs://x", "C:/x", "C:\\x", "x:y", "tfds:coco", "coco/2014:1.1.0", "~/x", None,
         "10:30/x", "://x", Path("exp:1/x"), np.zeros(3), 7]
NOT_PATHS = {  # all other fields of a configuration that can hold text
    "weights.family", "weights.dtype", "weights.frozen_dtype", "data.format", "data.mixture.format", "data.prompts",
    "text.prompt_template", "text.input_template", "text.end_sym", "optim.schedule", "hosts.coordinator", "phase",
    "trained"}
PATHS = {"out", "weights.checkpoint", "weights.sources", "weights.start_from", "data.path", "data.root",
         "data.mixture.path", "data.mixture.root", "data.features"}


@pytest.fixture(autouse=True)
def _nothing_is_written(tmp_path_factory, monkeypatch):
    small.checkpoint()
    folder = tmp_path_factory.mktemp("empty")
    monkeypatch.chdir(folder)
    yield
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("url", URLS, ids=repr)
def test_a_url_is_told_from_a_path(url):
    assert files.url_problem(url).strip().lower().startswith(str(url).split(":")[0].strip().lower() + ":")
    with pytest.raises(ValueError, match="^--out = .*is a URL where a") as raised:
        files.require_local({"--out": url})
    assert "\n" not in str(raised.value)


def test_what_pathlib_took_is_shown_again():
    assert files.url_problem(Path("gs://b/r")).startswith("gs://b/r is")
    assert files.url_problem(Path("file:///tmp/r")).startswith("file:///tmp/r is")


@pytest.mark.parametrize("path", LOCAL, ids=repr)
def test_what_is_no_url_is_left_alone(path):
    assert files.url_problem(path) is None


@pytest.mark.parametrize("path", ["/s3/b/run", "/gs", Path("/hf/x"), "/mnt/../az/x"], ids=repr)
def test_where_orbax_would_go_to_a_bucket_is_refused(path):
    made = RunConfig(out=path, weights=WeightsConfig(path, start_from=path), data=DataConfig(path=path))
    with pytest.raises(ValueError) as refused:
        run.check(made)
    assert re.findall(r"^  ([a-z_.]+): '/(?:s3|gs|hf|az)", str(refused.value), re.M) == [
        "out", "weights.checkpoint", "weights.start_from"]
    for call in (lambda: frozen_weights.save(path, {}), lambda: frozen_weights.metadata(path),
                 lambda: frozen_weights.arrays(path)):
        with pytest.raises(ValueError, match="stands for remote storage"):
            call()
    assert not any(map(storage.problem, ("s3/b/run", "/mnt/s3/run", "/s3x/run")))


# ---- configurations ----


def _texts(cls, prefix=""):
    """The dotted names of the fields of a configuration that can hold text."""
    for name, hint in typing.get_type_hints(cls).items():
        inner = [kind for kind in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(kind)]
        if inner:
            yield from _texts(inner[0], f"{prefix}{name}.")
        elif "str" in str(hint) or "Path" in str(hint):
            yield prefix + name


def test_every_field_is_a_path_or_known_to_be_none():
    assert set(_texts(RunConfig)) == PATHS | NOT_PATHS


def _with(name, url):
    """A configuration that is sound but for one path."""
    good = {"out": "run", "weights": WeightsConfig("ckpt"), "data": DataConfig(path="data")}
    match name.split("."):
        case ["out"]:
            good["out"] = url
        case ["weights", field]:
            value = {"vit": url} if field == "sources" else url
            good["weights"] = dataclasses.replace(good["weights"], **{field: value})
        case ["data", "mixture", field]:
            source = dataclasses.replace(Source("jsonl", "a"), **{field: url})
            good["data"] = DataConfig(mixture=(Source("jsonl", "b"), source))
        case ["data", field]:
            good["data"] = dataclasses.replace(good["data"], **{field: url})
    return RunConfig(**good)


def _shown(name):
    return name.replace("sources", "sources.vit").replace("mixture", "mixture.1")


@pytest.mark.parametrize("name", sorted(PATHS))
def test_a_run_is_refused(name):
    for url in URLS:
        made = _with(name, url)
        (problem,) = made.url_problems("finetune.")
        assert problem.startswith(f"finetune.{_shown(name)} = ")
        with pytest.raises(ValueError, match="This configuration cannot run") as raised:
            run.train(made)
        assert f"\n  {_shown(name)} = " in str(raised.value)


def test_all_phases_are_looked_at_before_the_first_begins():
    with pytest.raises(ValueError, match=r"^second\.out = gs://b/r is a URL"):
        run.train_phases({"first": _with("out", "run"), "second": _with("out", "gs://b/r")})


def test_no_config_of_the_project_is_refused():
    assert _with("out", "run").url_problems() == []
    for file in sorted((Path(__file__).parents[1] / "configs").glob("*.py")):
        built = config.load(str(file))
        for each in built.values() if isinstance(built, dict) else [built]:
            assert each.url_problems() == []


@pytest.mark.parametrize("command", ["train", "plan"])
@pytest.mark.parametrize(("file", "option", "name"), [
    ("tiny_minigpt4.py", "--out", "out"), ("tiny_minigpt4.py", "--data.path", "data.path"),
    ("tiny_minigpt4.py", "--weights.start-from", "weights.start_from"),
    ("tiny_imagebind_llm.py", "--finetune.weights.checkpoint", "finetune.weights.checkpoint")])
def test_a_command_on_a_config_is_refused(monkeypatch, capsys, command, file, option, name):
    path = Path(__file__).parents[1] / "configs" / file
    topology = ["--topology", "local"] if command == "plan" else []
    error = _refused(monkeypatch, capsys, command, "--config", path, *topology, option, "gs://bucket/run")
    assert error.startswith(f"mmjax {command}: {name} = gs://bucket/run is a URL where a local path is expected.")


# ---- formats: which read URLs ----


@pytest.mark.parametrize("format", FORMATS)
def test_a_format_reads_urls_or_is_refused(format):
    source = Source(format, "gs://b/{0..3}.tar")
    assert bool(source.url_problems("path", "root")) == (format != "webdataset")
    assert source.url_problems("path", "root", drawn=True)
    assert Source(format, "data", root="s3://b/x").url_problems("SOURCE", "--root")[0].startswith("--root = s3://b/x")


@pytest.mark.parametrize("url", ["file:///a.tar", "https://h/a.tar", "GS://b/a.tar", "gs:/b/a.tar", "ftp://h/a.tar"])
def test_webdataset_says_which_urls_it_reads(url):
    with pytest.raises(ValueError, match="is a URL"):
        shards(url)
    with pytest.raises(ValueError, match="is a URL"):
        shards(f"{{{url},b.tar}}")
    problem = files.url_problem(url, config.REMOTE["webdataset"])
    advice = "without file://" if url.startswith("file") else "begins with gs://, s3://, az://, hf://"
    assert advice in problem


def test_webdataset_names_a_package_that_is_missing(monkeypatch):
    from etils import epath

    def missing(_):
        raise ImportError("Please install gcsfs to use this.")

    monkeypatch.setattr(epath.Path, "is_dir", missing)
    with pytest.raises(ValueError, match="^gs://b/x.tar cannot be read on this machine: Please install gcsfs"):
        FORMATS["webdataset"]("gs://b/x.tar", None)


def test_a_data_set_by_its_name_is_no_url():
    for path in ("tfds:coco", "tfds:/data/coco", "coco/2014:1.1.0?split=train"):
        assert Source("tfds", path).url_problems("path", "root") == []
    assert Source("tfds", "tfds:gs://b/coco").url_problems("path", "root")


# ---- commands ----

SHIPPED = ("minigpt4", "imagebind_llm", "llama_adapter", "llama")
COMMANDS = {  # those whose options are made of a function or a dataclass, and the names of paths that are text there
    "chat": (chat.converse, "media"),
    "doctor": (doctor.examine,),
    "parity": (parity.compare,),
    "export": (export.export,),
    **{family: (write.command(family),) for family in SHIPPED},
    "generate": (generate.GenerateOptions, "media"),
    "evaluate": (evaluate.EvaluateOptions, "data", "root"),
    "check": (data.data_check,),
    "prepare": (data.data_prepare,),
    "verify": (data.data_verify,),
    "features": (data.data_features,),
}
OPTIONS = [(command, name) for command, (made_of, *texts) in COMMANDS.items()
           for name, hint in typing.get_type_hints(made_of).items() if "Path" in str(hint) or name in texts]

BY_PLACE = {("doctor", "checkpoint"), ("parity", "checkpoint"), ("verify", "folder")}


def test_no_path_of_a_command_is_left_out():
    named = {"checkpoint", "image", "media", "json", "text", "reference", "out", "llm", "delta", "vit", "qformer",
             "projector", "lora", "arch", "imagebind", "adapter", "words", "clip", "samples", "images", "root",
             "recall", "data", "config", "tokenizer", "folder"}
    assert {name for _, name in OPTIONS} == named


@pytest.mark.parametrize(("command", "name"), OPTIONS)
def test_an_option_is_refused(command, name):
    made_of, *texts = COMMANDS[command]
    needed = {parameter.name: "x" for parameter in inspect.signature(made_of).parameters.values()
              if parameter.default is parameter.empty}
    hint = str(typing.get_type_hints(made_of)[name])
    shown = name.upper() if (command, name) in BY_PLACE else f"--{name}"
    for url in URLS:
        value = {"audio": url} if "dict" in hint else ("a.jpg", url) if "tuple" in hint else url
        with pytest.raises(ValueError, match="is a URL where a") as raised:
            if dataclasses.is_dataclass(made_of):
                {"generate": generate.answer, "evaluate": evaluate.score}[command](made_of(**needed | {name: value}))
            else:
                options.local(made_of, *texts)(**needed | {name: value})
        assert str(raised.value).startswith(shown + (" audio = " if "dict" in hint else " = "))


def test_words_for_a_sense_may_be_a_url():
    options.require_local(chat.converse, {"media": {"text": "https://host/x"}}, "media")


@pytest.mark.parametrize(("args", "option"), [
    (("convert", "llama", "--llama", "s3://b/llama", "--out", "o"), "--llm = s3://b/llama"),
    (("convert", "llama", "--llm", "o", "--out", "gs://b/o"), "--out = gs://b/o"),
    (("export", "--checkpoint", "gs://b/c", "--part", "llama", "--out", "o"), "--checkpoint = gs://b/c"),
    (("generate", "--checkpoint", "GS://b/c", "--prompt", "Hi"), "--checkpoint = GS://b/c"),
    (("chat", "--checkpoint", "c", "--image", "a.jpg", "https://h/a.jpg"), "--image = https://h/a.jpg"),
    (("evaluate", "--benchmark", "vsr", "--out", "o", "--data", "s3://b/d"), "--data = s3://b/d"),
    (("doctor", "hf://o/n"), "CHECKPOINT = hf://o/n"),
    (("parity", "c", "--reference", "file:///r.npz"), "--reference = file:///r.npz"),
    (("plan", "--config", "c.py", "--topology", "local", "--json", "gs://b/j"), "--json = gs://b/j"),
    (("train", "--config", "gs://b/c.py"), "--config = gs://b/c.py"),
    (("data", "check", "--format", "jsonl", "--path", "gs://b/d"), "--path = gs://b/d"),
    (("data", "check", "--format", "webdataset", "--path", "gs:/b/d"), "--path = gs:/b/d"),
    (("data", "check", "--config", small.GOLDEN, "--out", "gs://b/o"), "--out = gs://b/o"),
    (("data", "prepare", "jsonl", "gs://b/d", "--out", "o"), "SOURCE = gs://b/d"),
    (("data", "prepare", "jsonl", "d", "--root", "s3://b/d", "--out", "o"), "--root = s3://b/d"),
    (("data", "verify", "gs://b/d"), "FOLDER = gs://b/d"),
    (("data", "features", "--config", "c.py", "--out", "az://b/o"), "--out = az://b/o")])
def test_a_command_is_refused(monkeypatch, capsys, args, option):
    error = _refused(monkeypatch, capsys, *args)
    assert error.startswith(f"mmjax {args[0]}: {option} is a URL")


def _refused(monkeypatch, capsys, *args):
    monkeypatch.setattr("sys.argv", ["mmjax", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1, error
    return error


# ---- from Python ----


@pytest.mark.parametrize("call", [
    lambda url: mmjax.load(url),
    lambda url: converted.ConvertedCheckpoint.open(url),
    lambda url: export.export(url, "llama", "out"),
    lambda url: export.export(small.checkpoint(), "llama", url),
    lambda url: write.command("llama")(url, "out"),
    lambda url: write.command("llama")("llama", url),
    lambda url: frozen_weights.save(url, {}),
    lambda url: report.write(url, "title", [], [], []),
    lambda url: check.check(DataConfig(path="data"), url),
    lambda url: prepare.prepare("jsonl", url, "out"),
    lambda url: prepare.prepare("jsonl", "data", url),
    lambda url: pipeline.read(DataConfig(path=url)),
    lambda url: encode_features.make(RunConfig(), None, url),
])
@pytest.mark.parametrize("url", ["gs://b/x", Path("s3://b/x"), "file:///x"], ids=repr)
def test_a_function_refuses(call, url):
    with pytest.raises(ValueError, match="is a URL where a"):
        call(url)


@pytest.mark.parametrize("url", ["gs://b/a.jpg", "https://h/a.jpg", Path("s3://b/a.jpg")], ids=repr)
def test_a_image_or_sound_of_a_sample_is_named(url, tmp_path):
    message = f"{str(url).replace(':/', '://').replace('///', '//')} is a URL where a local path is expected"
    with pytest.raises(ValueError, match=message):
        images.stack([Sample(images=[url], prompt="?")], ImageSpec(8, tokens=4))
    with pytest.raises(ValueError, match=message):
        senses.read_wav(url)


def test_an_array_is_named():
    with pytest.raises(ValueError, match="gs://b/a.npy is a URL where"):
        requests.read_sense("imu", "gs://b/a.npy")


def test_lines_with_urls_are_named(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"image": "a.jpg", "prompt": "Hi"}\n{"image": "https://h/a.jpg", "prompt": "https://h/ ?"}\n')
    with pytest.raises(ValueError, match="line 2: the image https://h/a.jpg is a URL where") as raised:
        requests.read_jsonl(path)
    assert "line 1" not in str(raised.value)
    assert rows.image_path(str(tmp_path), "gs:/a.jpg")  # a folder of that name is one, in data


# ---- variables ----


def test_variables_are_named(monkeypatch):
    monkeypatch.setenv(tar_index.VARIABLE, "gs://b/index")
    with pytest.raises(ValueError, match="^MMJAX_TAR_INDEX = gs://b/index is a URL"):
        tar_index.folder()
    monkeypatch.setenv("TFDS_DATA_DIR", "gs://b/sets")
    with pytest.raises(ValueError, match="^TFDS_DATA_DIR = gs://b/sets is a URL"):
        FORMATS["tfds"]("coco", None)
    monkeypatch.setenv(compilation.VARIABLE, "gs://b/cache")
    with pytest.raises(ValueError, match="^MMJAX_COMPILATION_CACHE = gs://b/cache is a URL"):
        compilation.enable()


def test_a_bucket_that_jax_was_told_of_stays_so(monkeypatch):
    told = {}
    monkeypatch.delenv(compilation.VARIABLE, raising=False)
    monkeypatch.setattr(compilation.jax.config, "update", told.__setitem__)
    monkeypatch.setattr(type(compilation.jax.config), "jax_compilation_cache_dir", "gs://b/cache")
    assert compilation.enable() == told["jax_compilation_cache_dir"] == "gs://b/cache"
