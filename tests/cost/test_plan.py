"""Plans on one device of this machine, and the slow ones for TPUs; test_hlo.py runs those on eight, eight_plan.py."""

import dataclasses
import functools
import importlib.util
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from rich.console import Console

from mmjax import cli, config, sharding
from mmjax.config import DataConfig, MeshConfig, RunConfig, TextConfig, WeightsConfig
from mmjax.cost import hardware, plan
from mmjax.data import pipeline
from mmjax.data.collate import Collator
from mmjax.data.formats import Record
from mmjax.families import FAMILIES
from mmjax.tokenizer import Tokenizer
from mmjax.training import encode_features, run
from tests import small

ROOT = Path(__file__).parents[2]
TINY = RunConfig(
    out="runs/x", weights=WeightsConfig(checkpoint="nowhere/tiny", family="minigpt4", dtype="float32"), remat=True,
    data=DataConfig(path="data/x", batch_size=2, length_multiple=8), text=TextConfig(max_txt_len=6))


def changed(base=TINY, **changes):
    """With `data_`, `text_` and `weights_` fields of the parts."""
    for part in ("data", "text", "weights"):
        names = [name for name in changes if name.startswith(f"{part}_")]
        inner = {name.removeprefix(f"{part}_"): changes.pop(name) for name in names}
        changes[part] = dataclasses.replace(getattr(base, part), **inner)
    return dataclasses.replace(base, **changes)


def source(settings, preset=None):
    return plan.architecture(settings, preset)[0]


# ---- what is planned ----


def test_a_checkpoint_is_taken_where_it_is(tmp_path):
    settings = small.run_config(tmp_path)
    found, notes = plan.architecture(settings, None)
    assert found.folder == small.checkpoint() and notes == [] and found.config.llm.vocab == 600
    assert source(settings, "minigpt4-13b").config.llm.dim == 5120


def test_a_preset_stands_in_for_a_checkpoint_of_its_name():
    settings = config.load("configs/minigpt4_stage2.py")
    found, notes = plan.architecture(settings, None)
    assert found.config.llm.dim == 4096
    assert notes == ["checkpoints/minigpt4-7b does not exist; planned for the preset minigpt4-7b."]


def test_a_phase_adds_to_a_preset():
    settings = config.load("configs/imagebind_llm_finetune.py")
    assert source(settings).config.llm.lora_rank == 16


@pytest.mark.parametrize(("settings", "preset", "message"), [
    (TINY, "huge", "preset = 'huge': name one of the presets of minigpt4 .*minigpt4-7b, minigpt4-13b"),
    (changed(weights_checkpoint="nowhere/mine"), None, "There is no checkpoint nowhere/mine: name one of the presets"),
    (changed(weights_checkpoint="nowhere/mine", weights_family=""), None,
     "There is no checkpoint nowhere/mine: name one of the presets with --preset: .*llama-adapter-7b, .*minigpt4-7b"),
    (changed(weights_family=""), None,
     "nowhere/tiny: several families have a preset 'tiny': imagebind_llm, .*--weights.family"),
    (changed(phase="pretrain"), None, "the family minigpt4 has no phases"),
])
def test_an_architecture_that_is_none(settings, preset, message):
    with pytest.raises(ValueError, match=message):
        plan.architecture(settings, preset)


# ---- how long its rows are ----

PROMPT = "<Img><ImageHere></Img> Hi"  # 4 tokens of images in the tiny model


@pytest.mark.parametrize(("changes", "length"), [
    ({}, 16),  # 1 + an image's 4 + 6 is 11
    ({"data_prompts": (PROMPT,), "text_prompt_template": "### {}"}, 32),  # 1 + (1 + 9) + 4 + (1 + 9) + 6 is 31
    ({"data_prompts": (PROMPT,), "text_max_context_len": 9}, 16),
    ({"data_prompts": (PROMPT,), "text_max_context_len": 9, "data_length_multiple": 5}, 20),
    ({"text_joint": True, "text_max_txt_len": 30}, 32),
    ({"data_pack_length": 50}, 50),
])
def test_row_length(changes, length):
    settings = changed(**changes)
    assert plan.row_length(settings, source(settings))[0] == length


def test_a_tokenizer_counts_exactly(tmp_path):
    settings = small.run_config(tmp_path)
    found = source(settings)
    length, (note,) = plan.row_length(settings, found)
    (ids,) = [found.tokenizer.encode(part) for part in ("###Human: <Img>",)]
    assert len(ids) < len("###Human: <Img>") and "bytes" not in note
    known = plan.row_length(settings, dataclasses.replace(found, folder=Path("nowhere")))
    assert length <= known[0] and "counted in bytes" in known[1][0]


# ---- the plan ----


@pytest.fixture(scope="module")
def made():
    return plan.plan(TINY, "local")


def text(made):
    console = Console(width=100, file=io.StringIO())
    plan.show(made, console)
    return console.file.getvalue()


def test_what_a_plan_holds(made):
    sizes = made.parameters
    assert made.memory.trained == 4 * sizes["trained"] and made.memory.frozen == 4 * sizes["frozen"]
    assert made.memory.optimizer == 8 * sizes["trained"] + 4 + 4 + 4 + 8  # two moments, three counters, the key
    assert made.length == 16 and made.memory.batch == 2 * (4 * 16 * 3 + 2 * 16 + 4 + 28 * 28 * 3)
    assert made.collectives == [] and made.traffic > made.memory.frozen
    assert made.flops.recomputed["llm"] > 0 and made.memory.fits and not made.advice
    assert made.bottleneck is None or made.bottleneck in made.seconds
    assert made.estimate is None  # XLA makes none for a CPU


def test_what_is_shown(made):
    words = text(made)
    for expected in ("minigpt4 of tiny", f"{made.parameters['trained']:,} parameters trained", "batch 2 x 16 tokens",
                     "nowhere/tiny does not exist", "frozen weights", "headroom", "recomputed", "nothing"):
        assert expected in words
    assert plan.summary(made) in words
    again = json.loads(json.dumps(made.to_json()))
    assert again["memory"]["total"] == made.memory.total and again["flops"]["executed"] == made.flops.executed


def test_packed_rows_features_and_int8_are_planned():
    """Nothing is compiled."""
    def step(**changes):
        settings = changed(**changes)
        return plan.AbstractStep.of(settings, source(settings), sharding.make_mesh(settings.mesh), 16)

    plain, packed = step(), step(data_pack_length=16, data_pack_images=3)
    assert packed.batch.images.shape[:2] == (1, 6) and packed.batch.segments.shape == plain.batch.tokens.shape
    ready = step(data_features="features", weights_dtype="bfloat16")
    assert ready.batch.images is None and ready.batch.features.shape == (2, 1, 4, 24)
    assert ready.batch.features.dtype == "bfloat16" and "vit" not in ready.frozen
    assert ready.held["frozen"] < step(weights_dtype="bfloat16").held["frozen"]
    assert plain.held["frozen"] / 4 < step(weights_frozen_dtype="int8").held["frozen"] < plain.held["frozen"]
    mixed = step(weights_family="imagebind_llm", phase="pretrain").batch
    assert (mixed.images.shape, mixed.images.dtype) == ((2, 1, 28, 28, 3), "uint8") and mixed.media is None
    assert mixed.image_valid.shape == (2, 1) and mixed.weights["image"].shape == (2,)
    assert step(weights_family="llama_adapter").batch.images.shape == (2, 1, 3, 28, 28)


FAMILY_PRESETS = [(name, preset) for name, family in FAMILIES.items() for preset in family.presets]


def fed(settings, model):
    """The first batch that the pipeline makes for a run of a model, of records with an image each if it reads any."""
    image = str(small.images() / "image" / "0.jpg") if model.images else None
    records = [Record(str(number), image, "a red star") for number in range(4)]
    collator = Collator.of(settings, small_tokenizer(), model)
    return next(pipeline.batches([records] * len(settings.data.sources), settings.data, collator)).batch


@functools.cache
def small_tokenizer():
    return Tokenizer.from_folder(small.GOLDEN / "ckpt" / "llama_hf")


def planned_and_fed(settings):
    """The batch that is planned for and the batch that is fed, as `{field: (shape, dtype)}`."""
    found = source(settings)
    batch = fed(settings, found.config)
    spec = run.model_spec(settings, found, sharding.make_mesh(settings.mesh))
    shapes = plan.batch_of(settings, spec, batch.tokens.shape[1])
    return [{jax.tree_util.keystr(path): (leaf.shape, leaf.dtype) for path, leaf in
             jax.tree_util.tree_leaves_with_path(made)} for made in (shapes, batch)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("family", "preset"), FAMILY_PRESETS)
def test_the_planned_batch_is_what_a_family_is_fed(family, preset, packed):
    model = FAMILIES[family].presets[preset]
    prompt = FAMILIES[family].prompt.with_images("Hi", bool(model.image_size))
    length = (2 * model.image_tokens + 100) if packed else None
    settings = changed(
        weights_checkpoint=f"nowhere/{preset}", weights_family=family, data_prompts=(prompt,), data_pack_length=length)
    if packed and model.injects:
        with pytest.raises(ValueError, match="one injection for each row: set data.pack_length = None"):
            planned_and_fed(settings)
        return
    expected, found = planned_and_fed(settings)
    assert expected == found and (".images" in found) == bool(model.image_size)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_the_planned_batch_is_what_a_config_feeds(path):
    loaded = config.load(str(path))
    for settings in loaded.values() if isinstance(loaded, dict) else [loaded]:
        weights = settings.weights
        if path.stem.startswith("tiny_"):  # their checkpoints are of no preset
            weights = dataclasses.replace(weights, checkpoint="nowhere/tiny", family=FAMILY_OF[path.stem])
        data = dataclasses.replace(settings.data, batch_size=2)
        expected, found = planned_and_fed(dataclasses.replace(
            settings, weights=weights, data=data, mesh=MeshConfig(data=1)))
        assert expected == found


FAMILY_OF = {"tiny_minigpt4": "minigpt4", "tiny_imagebind_llm": "imagebind_llm"}


def test_the_planned_batch_is_what_stored_features_give(tmp_path):
    settings = small.run_config(tmp_path / "run", data=DataConfig(
        path=str(small.images()), prompts=(small.PROMPT,), batch_size=2, length_multiple=64,
        features=str(tmp_path / "features")))
    encode_features.make(settings, source(settings), tmp_path / "features", batch_size=8)
    job = run.set_up(settings)
    (step, batch) = next(job.batches(0, 0))
    expected = plan.batch_of(settings, job.spec, batch.tokens.shape[1])
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), expected) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), batch)
    assert batch.images is None and batch.features.shape[0] == len(step.names)


def test_times_are_of_the_published_figures():
    chip = hardware.CHIPS["v5e"]
    place = hardware.Topology("v5e:4x4", (), chip, chip.memory, 100e9)
    count = plan.Flops({"llm": 16 * 197 * 10**12}, {}, {})
    found = [plan.Collective("all-gather", ("fsdp",), 16, "bf16", (), 16 * 10**9, 5)]
    seconds = plan.lower_bounds(place, 16, count, found, 819 * 10**9 // 2)
    assert seconds == {"compute": pytest.approx(1.0), "memory": pytest.approx(0.5), "links": pytest.approx(0.75)}
    assert plan.lower_bounds(dataclasses.replace(place, chip=None), 16, count, found, 1) == {}


def test_the_summary_and_the_table_have_the_compilers_estimate(made):
    memory = dataclasses.replace(made.memory, limit=int(15.75 * 2**30))
    slow = dataclasses.replace(made, seconds={"compute": 0.683, "memory": 0.2}, estimate=1.019, memory=memory)
    assert plan.summary(slow) == (f"{memory.total / 2**30:.2f} of 15.75 GiB a device; a step takes 683 ms at least "
                                  "(compute), 1,019 ms by the compiler's estimate")
    words = text(slow)
    assert re.search(r"at least, for compute +683\.0", words)
    assert re.search(r"by the compiler's estimate, links excluded +1,019\.0", words)
    assert plan.summary(dataclasses.replace(slow, compiled=None, estimate=None)).endswith("; it does not compile")


SPLASH = """HloModule jit_step

ENTRY %main (q: bf16[4,256,128]) -> bf16[4,256,128] {
  %q = bf16[4,256,128]{2,1,0} parameter(0)
  %KERNEL = bf16[4,256,128]{2,1,0} custom-call(%q, %q, %q), custom_call_target="tpu_custom_call"
  ROOT %e = bf16[4,256,128]{2,1,0} exponential(%KERNEL), backend_config={"estimated_cycles":"1500"}
}
"""


def test_a_step_with_kernels_is_estimated_by_one_rule():
    chip = hardware.CHIPS["v5e"]
    place = hardware.Topology("v5e:1x1", (), chip, chip.memory, 100e9)
    mesh = sharding.make_mesh(TINY.mesh)
    _, traffic, seconds, notes = plan._read(SPLASH.replace("KERNEL", "splash_mha_fwd_no_residuals"), mesh, place)
    operations = 2 * 2 * 4 * 256 * 256 * 128
    assert seconds == pytest.approx(1500 / chip.clock + operations / (0.5 * chip.flops)) and traffic == 6 * 2**18
    assert len(notes) == 1 and "50% of the chip's peak" in notes[0]
    *_, notes = plan._read(SPLASH.replace("KERNEL", "mine"), mesh, place)
    assert notes == ["The estimate leaves out kernels whose operations are unknown: mine."]
    assert plan._read(SPLASH, mesh, dataclasses.replace(place, chip=None))[2:] == (None, [])


# ---- the command ----


@pytest.fixture
def call(monkeypatch, tmp_path):
    file = tmp_path / "config.py"
    file.write_text(f"from mmjax.config import *\ndef config():\n    return {TINY!r}\n")

    def call(*args):
        monkeypatch.setattr("sys.argv", ["mmjax", "plan", "--config", str(file), *map(str, args)])
        cli.main()

    before = jax.config.jax_platforms, jax.config.jax_enable_compilation_cache
    yield call
    for name, value in zip(("jax_platforms", "jax_enable_compilation_cache"), before, strict=True):
        jax.config.update(name, value)


def test_the_command(monkeypatch, call, capsys, tmp_path, made):
    asked = []

    def planned(settings, *args):
        asked.append((settings, *args))
        return made

    monkeypatch.setattr(plan, "plan", planned)
    call("--topology", "local", "--preset", "tiny", "--length=24", "--json", tmp_path / "plan.json",
         "--data.batch-size", 7)
    (settings, *others), = asked
    assert settings == changed(data_batch_size=7) and others == ["local", "tiny", 24]
    assert "frozen weights" in capsys.readouterr().out
    assert json.loads((tmp_path / "plan.json").read_text())["length"] == made.length

    full = dataclasses.replace(made, memory=dataclasses.replace(made.memory, limit=made.memory.total - 1))
    monkeypatch.setattr(plan, "plan", lambda *_: full)
    with pytest.raises(SystemExit) as stopped:
        call("--topology", "local")
    assert stopped.value.code == 1 and "missing" in capsys.readouterr().out


@pytest.mark.parametrize(("args", "message"), [
    (("--topology", "v5e"), "topology = 'v5e'"), (("--topology", "local", "--length", "1"), "--length 1"),
    (("--topology", "local", "--preset", "x"), "preset = 'x'"), ((), "--topology"),
    (("--topology", "local", "--data.batch-size", "0"), "data.batch_size = 0")])
def test_mistakes(call, capsys, args, message):
    with pytest.raises(SystemExit) as stopped:
        call(*args)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def refused(words):
    """A step whose compilation XLA refuses."""
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(words)

    class Call:
        def lower(self, *_):
            return Lowered()

    step = plan.AbstractStep.of(TINY, source(TINY), sharding.make_mesh(TINY.mesh), 16)
    return dataclasses.replace(step, call=Call())


def test_too_little_memory():
    """XLA's own words for a program that does not fit, with what it would need."""
    step = refused("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of HBM, the total memory required for "
                   "HLO temporaries (20.98G) exceeds available HBM (15.75G). HLO module: jit_step.")
    nothing, needed = plan._compile(step)
    memory = plan._memory(step.held, nothing, needed, int(15.75 * 2**30))
    assert (nothing, memory.total, memory.fits) == (None, int(20.98 * 2**30), False)


def test_what_xla_cannot_compile():
    with pytest.raises(ValueError, match="XLA cannot compile this step for these devices: .*CompileTimeScopedVmemOom"):
        plan._compile(refused("RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom: Ran out of memory in vmem"))


# ---- TPUs ----

# The plan in a config's docstring: the command, and what it found.
TOLD = re.compile(r"mmjax (plan --config (configs/\w+\.py) .*)\n +([\d.]+) of ([\d.]+) GiB a device")
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.py") if not path.name.startswith("tiny_"))
PLANS = [  # config, options, topology, fits
    ("minigpt4_stage2.py", ("--data.batch-size", "4"), "v5e:1x1", True),
    ("minigpt4_stage2.py", ("--data.batch-size", "64"), "v5e:1x1", False),
    ("minigpt4_stage2.py", ("--data.batch-size", "16", "--mesh.fsdp", "16"), "v5e:4x4", True),
]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_pod_config_says_what_it_needs(path):
    (found,) = TOLD.findall(path.read_text())
    assert found[1] == f"configs/{path.name}" and float(found[2]) < float(found[3])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra `tpu`)")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_what_a_config_says_is_true(path, tmp_path):
    ((command, _, needed, limit),) = TOLD.findall(path.read_text())
    out = tmp_path / "plan.json"
    code = "from mmjax.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *command.split(), "--json", out], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    memory = json.loads(out.read_text())["memory"]
    assert memory["limit"] / 2**30 == pytest.approx(float(limit), abs=0.005)
    assert memory["total"] / 2**30 == pytest.approx(float(needed), rel=0.2)  # versions of libtpu differ so much


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra `tpu`)")
@pytest.mark.parametrize(("file", "options", "where", "fits"), PLANS)
def test_seven_billion_parameters_on_a_tpu(tmp_path, file, options, where, fits):
    out = tmp_path / "plan.json"
    args = ["plan", "--config", f"configs/{file}", "--topology", where, "--json", out, *options]
    code = "from mmjax.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == (0 if fits else 1), done.stdout + done.stderr
    made = json.loads(out.read_text())
    assert made["memory"]["fits"] == fits
    if not fits:
        assert made["advice"] and made["collectives"] is None
        return
    weights = made["memory"]["frozen"] * (16 if where == "v5e:4x4" else 1)
    assert abs(weights / 2 - made["parameters"]["frozen"]) < 1e-3 * made["parameters"]["frozen"]
    gathered = [one for one in made["collectives"] if one["kind"] == "all-gather" and one["bytes"] > 2**20]
    assert bool(gathered) == (where == "v5e:4x4")
    assert {one["dtype"] for one in gathered} <= {"bf16"}
