"""The benchmarks' machinery, with models that are done in a moment. What needs PyTorch has the marker torch."""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks import machine, rows, run, sizes, training
from benchmarks.rows import Row
from mmjax.families import FAMILIES

TOY = sizes.SIZES["toy"]


def test_turns_alternate_and_the_first_call_is_not_counted(monkeypatch):
    calls, now = [], [0.0]
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])

    def side(name, seconds):
        def call():
            calls.append(name)
            now[0] += seconds

        return call

    found = machine.turns({"ours": side("ours", 1.0), "theirs": side("theirs", 2.0)}, 3)
    assert calls == ["ours", "theirs", "ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert found == {"ours": [1.0] * 3, "theirs": [2.0] * 3}
    assert machine.medians({"ours": [3.0, 1.0, 2.0]}) == {"ours": 2.0}


def test_ceilings_are_measured():
    found = machine.ceiling(64, 2**16, "float32", "cpu", theirs=False, rounds=2)
    assert found.matmul.keys() == {"ours"} and min(*found.matmul.values(), found.copy, found.read) > 0


def test_peak_of_a_process_sees_what_it_holds():
    before = machine.peak()
    held = np.ones(2**26, np.uint8)
    assert machine.peak() - before > 0.9 * held.nbytes


def test_a_process_that_fails_is_told_with_its_words():
    with pytest.raises(RuntimeError, match="-m json.tool absent ended with status [12]:(.|\n)*No such file"):
        machine.run_module("json.tool", "absent")


def test_batches_are_as_the_pipeline_makes_them():
    cfg = TOY.minigpt4
    packed = sizes.batch(cfg, [[30, 34], [29]], 80, image_count=4)
    assert packed.images.shape[:2] == (1, 4)
    assert packed.valid.sum(1).tolist() == [64, 29]
    assert packed.positions[0, [29, 30, 63]].tolist() == [29, 0, 33]
    assert sorted(set(packed.soft_index[0])) == [-1, *range(2 * cfg.image_tokens)]
    assert sorted(set(packed.soft_index[1])) == [-1, *range(2 * cfg.image_tokens, 3 * cfg.image_tokens)]
    assert packed.segments[0, [0, 30, 64]].tolist() == [0, 1, -1]
    assert not packed.loss_mask[:, 0].any() and not packed.loss_mask[0, 30] and packed.loss_mask[0, 29]
    apart = sizes.batch(cfg, [[30], [34]], 40)
    assert apart.segments is None and apart.positions[0, -1] == 39


def test_rows_tell_how_many_times_better():
    faster, less = Row("a", "samples/s", 30.0, 20.0), Row("b", "s", 2.0, 5.0, lower=True)
    assert (faster.ratio, less.ratio, Row("c", "s", 2.0).ratio) == (1.5, 2.5, None)
    assert less.to_json()["ratio"] == 2.5


def test_mmjax_alone(tmp_path, capsys):
    run.main(["--size", "toy", "--ours", "--only", "vit", "generate", "--out", str(tmp_path)])
    told = json.loads((tmp_path / "benchmarks.json").read_text())
    row, = told["rows"]  # what is against PyTorch alone is left out
    assert row["name"] == "ViT-G block, forward" and row["ours"] > 0
    assert row["theirs"] is row["ratio"] is None and row["ceiling"].keys() == {"ours"}
    assert told["facts"]["matmul_gflops"]["ours"] > 0 and told["facts"]["size"] == "toy"
    assert not (tmp_path / "benchmarks.png").exists()  # nothing to compare
    assert "ViT-G block, forward" in capsys.readouterr().out


def test_what_was_found_before_a_part_fails_is_kept(tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("no more")

    monkeypatch.setitem(run.PARTS, "vit", lambda *_: [Row("first", "s", 1.0)])
    monkeypatch.setitem(run.PARTS, "imagebind", fail)
    with pytest.raises(ValueError, match="no more"):
        run.main(["--size", "toy", "--ours", "--only", "vit", "imagebind", "--out", str(tmp_path)])
    assert [row["name"] for row in json.loads((tmp_path / "benchmarks.json").read_text())["rows"]] == ["first"]


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own():
    row, cached = training.step(TOY, 1, ["ours"])
    assert cached.ours > 0 and cached.theirs is None and not cached.memory
    assert 1e8 < row.memory["ours"] < 4e9 and row.ours > 0


def test_sizes_are_whole_models():
    for name, size in sizes.SIZES.items():
        assert size.name == name
        assert max(sizes.lengths(size.minigpt4, 1_000)) <= size.pack_length
        for family, cfg in (("minigpt4", size.minigpt4), ("imagebind_llm", size.imagebind)):
            assert FAMILIES[family].Config is type(cfg)


def test_the_setting_of_a_gpu_trains_at_toy_size():
    """What `--size 7b` does, in its dtype, without its weights."""
    dtype = sizes.SIZES["7b"].dtype
    model = training.Model("minigpt4", TOY.minigpt4, dtype)
    ours = training.sides(model, ["ours"])["ours"]
    batch = training.equal_rows(TOY, model.cfg)
    losses = [ours(batch) for _ in range(3)]
    assert losses == sorted(losses, reverse=True) and np.isfinite(losses).all()
    assert str(ours.frozen["llm"]["head"]["w"].dtype) == dtype and ours.flops(batch) > 0


def test_chart(tmp_path):
    compared = [Row("training step", "samples/s", 3.0, 2.0, target=1.0), Row("start-up", "s", 4.0)]
    rows.write(compared, {"size": "toy"}, tmp_path)
    assert (tmp_path / "benchmarks.png").read_bytes().startswith(b"\x89PNG")


def test_a_target_that_is_missed_is_red():
    table = rows.table([Row("good", "x", 3.0, 2.0, target=1.0), Row("bad", "x", 1.0, 2.0, target=1.0)])
    assert list(table.columns[4].cells) == ["[green]1.50[/]", "[red]0.50[/]"]


@pytest.mark.torch
@pytest.mark.parametrize("family", ["minigpt4", "imagebind_llm"])
def test_both_sides_train_alike(family):
    """The same losses over steps of both optimizers: so the gradients are the same too."""
    cfg = {"minigpt4": TOY.minigpt4, "imagebind_llm": TOY.imagebind}[family]
    model = training.Model(family, cfg, "float32")
    racing = training.sides(model, ["ours", "theirs"])
    batch = training.equal_rows(TOY, cfg)
    if family == "imagebind_llm":
        feature = np.random.default_rng(0).standard_normal((TOY.rows, cfg.bind.inputs), np.float32)
        batch = dataclasses.replace(batch, features=feature / np.linalg.norm(feature, axis=-1, keepdims=True))
    losses = {name: [side(batch) for _ in range(4)] for name, side in racing.items()}
    np.testing.assert_allclose(losses["ours"], losses["theirs"], rtol=1e-5)
    assert losses["ours"][-1] < losses["ours"][0]


def test_sides_that_differ_are_not_timed():
    model = training.Model("minigpt4", TOY.minigpt4, "float32")
    with pytest.raises(ValueError, match="do not compute the same: their first losses are .* Nothing was timed"):
        training.agree(model, {"ours": lambda _: 1.0, "theirs": lambda _: 1.001}, None)


@pytest.mark.torch
def test_every_part_against_pytorch(tmp_path):
    run.main(["--size", "toy", "--only", "step", "captions", "imagebind", "vit", "--out", str(tmp_path)])
    told = json.loads((tmp_path / "benchmarks.json").read_text())
    assert [row["name"] for row in told["rows"]] == [
        "training step", "training step, cached features", "captions, packed", "captions, packed, cached features",
        "ImageBind-LLM step", "ViT-G block, forward"]
    assert all(row["ratio"] > 0 for row in told["rows"])
    assert told["rows"][0]["memory"].keys() == {"ours", "theirs"}
    assert (tmp_path / "benchmarks.png").stat().st_size > 10_000
