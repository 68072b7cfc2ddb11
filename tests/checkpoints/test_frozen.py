import dataclasses
import gc

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from jax.experimental.layout import Format, Layout

from mmjax.checkpoints import frozen as frozen_weights


@dataclasses.dataclass
class Sliced:
    array: np.ndarray
    rows: int
    taken: list[int] = dataclasses.field(default_factory=list)

    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)

    def slices(self):
        for start in range(0, len(self.array), self.rows):
            piece = self.array[start : start + self.rows]
            self.taken.append(piece.nbytes)
            yield piece


def arrays():
    rng = np.random.default_rng(0)
    return {
        "vit/w": rng.normal(size=(4, 6, 8)).astype(np.float16),
        "vit/b": rng.normal(size=(5,)).astype(ml_dtypes.bfloat16),
        "llm/embedding": rng.normal(size=(16, 8)).astype(np.float32),
    }


@pytest.fixture
def folder(tmp_path):
    frozen_weights.save(tmp_path / "weights",
                        {path: Sliced(array, 1 if path == "vit/w" else len(array)) for path, array in arrays().items()})
    return tmp_path / "weights"


def shapes(**changes):
    return {path: jax.ShapeDtypeStruct(array.shape, array.dtype) for path, array in arrays().items()} | changes


def test_any_orbax_reads_it(folder):
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(folder)
    held = {"vit/w": tree["vit"]["w"], "vit/b": tree["vit"]["b"], "llm/embedding": tree["llm"]["embedding"]}
    for path, array in arrays().items():
        assert held[path].dtype == array.dtype
        np.testing.assert_array_equal(held[path], array)


def test_a_memory_layout_is_restored(folder):
    layout = Format(Layout((0, 2, 1)), jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    shape = jax.ShapeDtypeStruct((4, 6, 8), np.float32, sharding=layout)
    w = frozen_weights.restore(folder, {"vit/w": shape})["vit"]["w"]
    assert w.format.layout.major_to_minor == (0, 2, 1)
    np.testing.assert_array_equal(w, arrays()["vit/w"].astype(np.float32))


def test_metadata_and_opened_arrays(folder):
    assert frozen_weights.metadata(folder) == shapes()
    np.testing.assert_array_equal(frozen_weights.arrays(folder)["vit/w"][2].read().result(), arrays()["vit/w"][2])


def test_restore_casts_and_selects(folder):
    wanted = {"vit": {"w": jax.ShapeDtypeStruct((4, 6, 8), ml_dtypes.bfloat16), "b": jax.ShapeDtypeStruct((5,), "f4")},
              "llm": {"head": jax.ShapeDtypeStruct((3,), "f4")}}
    params = frozen_weights.restore(folder, wanted, only=lambda path: path.startswith("vit/"))
    assert params.keys() == {"vit"} and params["vit"]["w"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(params["vit"]["w"], arrays()["vit/w"].astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(params["vit"]["b"], arrays()["vit/b"].astype(np.float32))


def test_restore_places_each_part_on_its_device(folder):
    devices = jax.devices()[: 8 if jax.device_count() >= 8 else 1]
    mesh = jax.sharding.Mesh(np.array(devices), ("fsdp",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "fsdp"))
    wanted = shapes(**{"vit/w": jax.ShapeDtypeStruct((4, 6, 8), "f4", sharding=sharding)})
    params = frozen_weights.restore(folder, wanted)
    array = params["vit"]["w"]
    assert array.sharding == sharding
    assert {shard.data.shape for shard in array.addressable_shards} == {(4, 6, 8 // len(devices))}
    np.testing.assert_array_equal(array, arrays()["vit/w"].astype(np.float32))


def test_everything_that_does_not_fit_is_named(folder):
    wanted = shapes(**{"vit/b": jax.ShapeDtypeStruct((6,), "f4"), "vit/c": jax.ShapeDtypeStruct((6,), "f4")})
    with pytest.raises(ValueError) as error:
        frozen_weights.restore(folder, wanted)
    assert "vit/b  expected (6,), got (5,)" in str(error.value) and "missing     vit/c" in str(error.value)
    assert str(folder) in str(error.value)


def test_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="mmjax convert"):
        frozen_weights.metadata(tmp_path)


def rewrite(folder, change):
    """Every array's entries, by name, in the database of a folder."""
    store = ts.KvStore.open({"driver": "ocdbt", "base": folder.as_uri() + "/"}).result()
    for key in store.list().result():
        change(store, key)


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [
    lambda folder: [zero(path) for path in folder.rglob("d/*")],
    lambda folder: [path.unlink() for path in folder.rglob("d/*")],
    lambda folder: zero(folder / "manifest.ocdbt"),
    lambda folder: (folder / "manifest.ocdbt").unlink(),
    lambda folder: (folder / "_METADATA").write_text("{"),
    lambda folder: rewrite(folder, lambda store, key: key.endswith(b"/.zarray") and store.write(key, b"{").result()),
    lambda folder: rewrite(folder, lambda store, key: key.endswith(b"/.zarray") or store.write(key, b"x").result()),
    lambda folder: rewrite(folder, lambda store, key: store.write(key, None).result()),
], ids=["zeros", "no data", "zero manifest", "no manifest", "no names", "descriptions", "every array", "nothing left"])
def test_damage_is_one_error_and_nothing_follows_it(folder, damage, monkeypatch):
    """TensorStore answers for the other arrays when Orbax has closed its event loop behind the first."""
    followed = []
    monkeypatch.setattr("sys.unraisablehook", lambda found: followed.append(str(found.exc_value)))
    damage(folder)
    with pytest.raises(ValueError, match="is damaged"):
        frozen_weights.restore(folder, shapes())
    gc.collect()
    assert followed == []


def test_few_slices_are_held_at_a_time(tmp_path, monkeypatch):
    size = 6 * 8 * 2
    monkeypatch.setattr(frozen_weights, "IN_FLIGHT_BYTES", 2 * size)
    source = Sliced(np.zeros((20, 6, 8), np.float16), 1)
    landed, most = 0, 0

    def advance(bytes_written):
        nonlocal landed, most
        most = max(most, sum(source.taken) - landed)
        landed += bytes_written

    frozen_weights.save(tmp_path / "weights", {"w": source}, advance)
    assert landed == sum(source.taken) == 20 * size
    assert most <= 3 * size
