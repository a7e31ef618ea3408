"""Images by the folder: preprocessed as their libraries do, each once in the output whatever happens on the way."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from model_helpers import randomise, tiny_vit
from typer.testing import CliRunner

import repavit_ops
from repavit_ops import backends
from repavit_ops.cli import app
from repavit_ops.predicting import Predictor, Preprocessing, predict
from repavit_ops.predicting.output import joined
from repavit_ops.predicting.predictor import given_cpus
from repavit_ops.predicting.preprocessing import preprocessing_of
from repavit_ops.predicting.run import Unreadable

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'repavit-ops[predict]'")
parquet = pytest.importorskip("pyarrow.parquet")
Image = pytest.importorskip("PIL.Image")
load_sample_images = pytest.importorskip("sklearn.datasets").load_sample_images
pytest.importorskip("tqdm")


SMALL = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}


@pytest.fixture(scope="session")
def photos():
    """Crops of two photographs, upright and lying ones."""
    generator, found = np.random.default_rng(0), []
    for number in range(24):
        photo = Image.fromarray(load_sample_images().images[number % 2])
        width, height = generator.integers(60, 200, 2)
        left, top = generator.integers(0, 400), generator.integers(0, 200)
        found.append(photo.crop((left, top, left + width, top + height)))
    return found


def encoded(photo, kind="JPEG"):
    file = io.BytesIO()
    photo.save(file, kind)
    return file.getvalue()


@pytest.fixture
def folder(photos, tmp_path):
    """The crops as files, in two folders."""
    for number, photo in enumerate(photos):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number:02d}.{'jpg' if number % 3 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(photo, "JPEG" if number % 3 else "PNG"))
    return tmp_path / "photos"


@pytest.fixture
def predictor():
    return Predictor(tiny_vit(), top_k=3, threads=1)


def rows_of(out):
    """All rows of a run by path; fails where one is there twice."""
    rows = [row for path in sorted(Path(out).glob("part-*.parquet")) for row in parquet.read_table(path).to_pylist()]
    by_path = {row["path"]: row for row in rows}
    assert len(by_path) == len(rows)
    return by_path


# --- preprocessing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "vit_base_patch16_clip_224.openai"]
)
def test_pixels_are_those_of_timms_own_transform(timm, photos, name):
    with torch.device("meta"):
        model = timm.create_model(name)
    config = timm.data.resolve_model_data_config(model)
    theirs = timm.data.create_transform(**config, is_training=False)
    ours = preprocessing_of(model)
    for photo in photos:
        pixels = torch.from_numpy(ours.pixels(encoded(photo, "PNG")))[None]
        assert torch.allclose(ours.normalised(pixels, torch.float32)[0], theirs(photo), atol=1e-6)


def test_the_size_that_a_model_was_built_for_wins_over_its_config(timm, photos):
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch14_dinov2", img_size=98)
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 518, 518)
    assert preprocessing_of(model).size == (98, 98)
    assert preprocessing_of(model).pixels(encoded(photos[0])).shape == (3, 98, 98)


@pytest.mark.parametrize(
    ("processor", "arguments"),
    [
        ("ViTImageProcessor", {"size": {"height": 32, "width": 32}}),
        ("BitImageProcessor", {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}, "resample": 3}),
    ],
)
def test_pixels_are_those_of_transformers_processors_within_a_level(torchvision_stub, photos, processor, arguments):
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, processor)(**arguments)
    model = transformers.ViTModel(transformers.ViTConfig(**SMALL))
    ours = preprocessing_of(model, theirs)
    for photo in photos[:6]:
        expected = theirs(photo, return_tensors="pt")["pixel_values"]
        got = ours.normalised(torch.from_numpy(ours.pixels(encoded(photo, "PNG")))[None], torch.float32)
        assert (got - expected).abs().max() <= 1.01 / 255 / min(ours.std)


def test_a_crop_that_is_not_known_is_refused_by_name(timm):
    model = timm.create_model("test_vit")
    model.pretrained_cfg = {**model.pretrained_cfg, "crop_mode": "border"}
    with pytest.raises(ValueError, match=r"crop 'border'.*preprocessing=Preprocessing"):
        preprocessing_of(model)


# --- one predictor ----------------------------------------------------------------------------------------------------


def test_a_predictor_answers_what_its_model_answers(photos):
    model = tiny_vit()
    predictor = Predictor(model, top_k=3, features=True)
    found = predictor({"bytes": [encoded(photo, "PNG") for photo in photos[:4]] + [b""], "id": np.arange(5)})
    pixels = np.stack([predictor.preprocessing.pixels(encoded(photo, "PNG")) for photo in photos[:4]])
    with torch.no_grad():
        x = predictor.preprocessing.normalised(torch.from_numpy(pixels), torch.float32)
        features = model.forward_head(model.forward_features(x), pre_logits=True)
        scores, labels = model.head(features).softmax(-1).topk(3)
    assert np.array_equal(found["labels"][:4], labels.numpy())
    assert np.array_equal(found["label"][:4], labels[:, 0].numpy())
    np.testing.assert_allclose(found["scores"][:4], scores.numpy(), atol=1e-5)
    np.testing.assert_allclose(found["features"][:4], features.numpy(), atol=1e-4)
    assert found["label"][4] == -1
    assert np.isnan(found["features"][4]).all()
    assert list(found["error"]) == [None] * 4 + ["ValueError: the file is empty"]
    assert found["id"].tolist() == list(range(5))


def test_threads_are_set_again_whoever_set_them_meanwhile(predictor):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        predictor.predict(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ValueError, match="threads: got 0"):
        Predictor(tiny_vit(), threads=0)


def test_features_in_half_are_refused_where_they_do_not_fit():
    model = tiny_vit()
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    assert Predictor(model, features=True, half=True).predict(image)["features"].dtype == np.float16
    with torch.no_grad():
        model.norm.weight.fill_(1e6)
    with pytest.raises(ValueError, match="float16 holds 65504"):
        Predictor(model, features=True, half=True).predict(image)


def test_models_without_classes_give_features_and_others_say_what_they_lack(torchvision_stub):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(**SMALL, intermediate_size=96)
    image = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    preprocessing = Preprocessing((32, 32), (36, 36))
    bare = Predictor(randomise(transformers.ViTModel(config)), preprocessing=preprocessing)
    assert bare.predict(image)["features"].shape == (2, 48)
    classes = randomise(transformers.ViTForImageClassification(config))
    assert Predictor(classes, preprocessing=preprocessing).predict(image)["label"].shape == (2,)
    with pytest.raises(ValueError, match=r"does not say how its images are prepared; give the folder"):
        Predictor(classes)
    with pytest.raises(ValueError, match="give its base model"):
        Predictor(classes, preprocessing=preprocessing, features=True).predict(image)


def test_a_folder_of_transformers_is_a_model_with_its_processor(torchvision_stub, photos, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = randomise(transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, intermediate_size=96)))
    model.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    predictor = Predictor(tmp_path)
    assert predictor.preprocessing.mean == (0.5, 0.5, 0.5)
    with torch.no_grad():
        pixels = torch.from_numpy(predictor.preprocessing.pixels(encoded(photos[0])))[None]
        expected = model(predictor.preprocessing.normalised(pixels, torch.float32)).logits.argmax(-1)
    assert predictor.predict(pixels)["label"] == expected.numpy()


@pytest.mark.parametrize("name", ["none.safetensors", "no_such_architecture"])
def test_a_model_that_is_not_there_is_named(timm, name):
    with pytest.raises(ValueError, match=f"model: got .*{name}"):
        Predictor(name)


# --- sources ----------------------------------------------------------------------------------------------------------


def tar_of(photos, path):
    with tarfile.open(path, "w") as tar:
        for number, photo in enumerate(photos):
            for name, data in ((f"{number:04d}.png", encoded(photo, "PNG")), (f"{number:04d}.cls", b"1")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_gives_a_row_for_each_image(predictor, folder, tmp_path, workers):
    summary = predict(predictor, folder, tmp_path / "out", batch=5, workers=workers, shard=7)
    rows = rows_of(tmp_path / "out")
    assert (summary.images, summary.computed, summary.unreadable) == (24, 24, [])
    assert sorted(rows) == sorted(str(path) for path in folder.rglob("*.*g"))
    alone = predictor({"path": sorted(rows)})
    assert [rows[path]["labels"] for path in sorted(rows)] == alone["labels"].tolist()
    schema = parquet.read_schema(tmp_path / "out" / "part-00000.parquet")
    assert schema.field("scores").type == pa.list_(pa.float32(), 3)
    assert schema.field("label").type == pa.int32()


def test_lists_parquet_and_tar_shards_give_the_same(predictor, folder, photos, tmp_path):
    paths = sorted(folder.rglob("*.png"))
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{path.relative_to(tmp_path)}\n" for path in paths))
    images = [path.read_bytes() for path in paths]
    parquet.write_table(pa.table({"id": [str(p) for p in paths], "image": images}), tmp_path / "a.parquet")
    structs = [{"bytes": data, "path": str(path)} for data, path in zip(images, paths, strict=True)]
    parquet.write_table(pa.table({"image": structs}), tmp_path / "b.parquet")
    parquet.write_table(pa.table({"path": [str(p.relative_to(tmp_path)) for p in paths]}), tmp_path / "c.parquet")
    tar_of([Image.open(path) for path in paths], tmp_path / "d.tar")
    found = {}
    for name in ("list.txt", "a.parquet", "b.parquet", "c.parquet", "d.tar", "*.tar"):
        out = tmp_path / "out" / name.replace("*", "all")
        assert predict(predictor, tmp_path / name, out, workers=0).images == len(paths)
        found[name] = [row["scores"] for row in rows_of(out).values()]
    assert all(scores == found["list.txt"] for scores in found.values())
    with pytest.raises(ValueError, match=r"several kinds \(files, parquet, tar\)"):
        predict(predictor, tmp_path, tmp_path / "none", workers=0)
    with pytest.raises(FileNotFoundError, match="that exists and holds images"):
        predict(predictor, tmp_path / "nothing", tmp_path / "none", workers=0)


def huge_png(side=20_000):
    """A PNG whose header says so many pixels, and that has none."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_images_that_cannot_be_read_are_listed_with_the_reason_and_cost_nothing_else(predictor, folder, tmp_path):
    whole = next(folder.rglob("*.jpg")).read_bytes()
    broken = {
        "empty.jpg": (b"", "the file is empty"),
        "text.png": (b"no image at all", "cannot identify image file"),
        "cut.jpg": (whole[: len(whole) // 2], "[Tt]runcated"),
        "huge.png": (huge_png(), "400000000 pixels"),
        "large.png": (huge_png(12_000), "12000 x 12000 pixels, more than the 134217728 that are decoded"),
    }
    for name, (data, _) in broken.items():
        (folder / name).write_bytes(data)
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere")  # of a folder's list, not of its files
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(str(path) for path in sorted(folder.rglob("*.*g"))))
    summary = predict(predictor, listed, tmp_path / "out", workers=1)
    assert summary.images == 24 + len(broken) + 1
    reasons = {Path(path).name: error for path, error in summary.unreadable}
    assert reasons.keys() == {*broken, "gone.jpg"}
    for name, (_, text) in broken.items():
        assert re.search(text, reasons[name]), reasons[name]
    assert "FileNotFoundError" in reasons["gone.jpg"]
    rows = rows_of(tmp_path / "out")
    assert rows[str(folder / "empty.jpg")]["label"] == -1
    assert all(row["label"] >= 0 for row in rows.values() if row["error"] is None)
    kept = [json.loads(line) for line in (tmp_path / "out" / "unreadable.jsonl").read_text().splitlines()]
    assert len(kept) == len(summary.unreadable)
    with pytest.raises(Unreadable, match=r"\.(jpg|png): "):
        predict(predictor, listed, tmp_path / "strict", workers=0, strict=True)


def test_a_shard_that_ends_early_loses_nothing_of_what_is_there(predictor, photos, tmp_path):
    whole, cut = tmp_path / "0.tar", tmp_path / "1.tar"
    tar_of(photos[:6], whole)
    data = whole.read_bytes()
    cut.write_bytes(data[: len(data) // 2])
    (tmp_path / "2.tar").write_bytes(data)
    summary = predict(predictor, f"{tmp_path}/*.tar", tmp_path / "out", workers=0)
    rows = rows_of(tmp_path / "out")
    ((path, reason),) = summary.unreadable
    assert path == str(cut)
    assert "damaged behind" in reason
    assert {f"{cut}/0000.png", f"{whole}/0005.png", f"{tmp_path}/2.tar/0005.png"} <= rows.keys()
    assert rows[f"{cut}/0000.png"]["scores"] == rows[f"{whole}/0000.png"]["scores"]
    (tmp_path / "3.parquet").write_bytes(b"PAR1 and no more")
    summary = predict(predictor, tmp_path / "3.parquet", tmp_path / "out 3", workers=0)
    assert [path for path, _ in summary.unreadable] == [str(tmp_path / "3.parquet")]


# --- runs that are stopped --------------------------------------------------------------------------------------------

PATIENCE = 300  # seconds that a run may take to start, on a machine that is busy
SLOW = """
import sys, time, types, torch
sys.modules["torchvision._meta_registrations"] = types.ModuleType("stub")
from model_helpers import tiny_vit
from repavit_ops.predicting import Predictor, predict

class Slow(Predictor):
    def predict(self, pixels):
        time.sleep(0.3)
        return super().predict(pixels)

predict(Slow(tiny_vit(), top_k=3, threads=1), sys.argv[1], sys.argv[2], batch=2, shard=2, workers=1)
"""


def started(folder, out):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, str(folder), str(out)], env=environment, stderr=subprocess.PIPE
    )


def wait_for_parts(out, count, process):
    for _ in range(PATIENCE * 20):
        if len(list(out.glob("part-*.parquet"))) >= count:
            return
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.05)
    raise AssertionError(f"no part was written within {PATIENCE} seconds")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found by Linux's /proc")
def test_a_killed_run_goes_on_with_each_image_once(predictor, folder, tmp_path):
    out = tmp_path / "out"
    process = started(folder, out)
    wait_for_parts(out, 1, process)
    with pytest.raises(RuntimeError, match="another process is writing"):
        predict(predictor, folder, out, batch=2, shard=2, workers=0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(ValueError, match="run of other settings"):  # so the lock is free, whatever its children do
        predict(Predictor(tiny_vit(), top_k=2, threads=1), folder, out, batch=2, shard=2, workers=0)
    process = started(folder, out)  # and of this one the process that decodes
    wait_for_parts(out, 2, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    decoders = [pid for pid in children if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
    for pid in decoders:
        os.kill(int(pid), signal.SIGKILL)
    assert process.wait(PATIENCE) != 0
    assert b"DataLoader worker" in process.stderr.read()
    done = len(list(out.glob("part-*.parquet")))
    assert 2 <= done < 12
    (out / "part-00099.unfinished").write_bytes(b"half")
    (folder / "new.jpg").write_bytes(next(folder.rglob("*.jpg")).read_bytes())  # of another run
    summary = predict(predictor, folder, out, batch=2, shard=2, workers=1)
    assert (summary.images, summary.computed) == (24, 24 - 2 * done)
    assert len(rows_of(out)) == 24
    assert not list(out.glob("*.unfinished"))


def test_another_run_does_not_go_on_with_this_one(predictor, folder, tmp_path):
    predict(predictor, folder, tmp_path / "out", workers=0)
    assert predict(predictor, folder, tmp_path / "out", workers=0).computed == 0
    other = Predictor(tiny_vit(), top_k=2)
    with pytest.raises(ValueError, match=r"run of other settings: top_k 3 \(now 2\)"):
        predict(other, folder, tmp_path / "out", workers=0)
    (tmp_path / "out" / "run.json").unlink()
    with pytest.raises(ValueError, match=r"no run of ours"):
        predict(predictor, folder, tmp_path / "out", workers=0)


def test_a_full_disk_loses_no_part_and_the_run_goes_on(predictor, folder, tmp_path):
    out = tmp_path / "out"
    predict(predictor, folder, out, workers=0, shard=12)
    first = (out / "part-00000.parquet").read_bytes()
    (out / "part-00001.parquet").unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            predict(predictor, folder, out, workers=0, shard=12)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(out.glob("*.unfinished"))
    assert (out / "part-00000.parquet").read_bytes() == first
    assert predict(predictor, folder, out, workers=0, shard=12).computed == 12
    assert len(rows_of(out)) == 24


def test_a_folder_that_cannot_be_written_is_an_error_before_any_work(predictor, folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        predict(predictor, folder, tmp_path / "file" / "out", workers=0)


def test_rows_of_two_widths_are_refused():
    with pytest.raises(ValueError, match="features: got rows of several widths"):
        joined([{"features": np.zeros((1, 3))}, {"features": np.zeros((1, 4))}])


# --- on a cluster -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster():
    """A Ray of three CPUs in this machine."""
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'repavit-ops[ray]'")
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=2**27)
    yield ray
    ray.shutdown()


def test_a_cluster_gives_what_this_process_gives(cluster, folder, photos, tmp_path):
    file = tmp_path / "model.safetensors"
    repavit_ops.save_checkpoint(tiny_vit(), file)
    predictor = Predictor(file, top_k=3, features=True, threads=1)
    (folder / "empty.jpg").write_bytes(b"")
    predict(predictor, folder, tmp_path / "here", workers=0, shard=4)
    summary = predict(predictor, folder, tmp_path / "there", batch=5, shard=4, ray="auto", actors=2)
    assert (summary.images, summary.computed) == (25, 25)
    here, there = rows_of(tmp_path / "here"), rows_of(tmp_path / "there")
    assert here.keys() == there.keys()
    for path, row in here.items():
        assert there[path]["labels"] == row["labels"]
        assert there[path]["error"] == row["error"]
        np.testing.assert_allclose(there[path]["features"], row["features"], rtol=1e-5, atol=1e-5)
    schemas = [parquet.read_schema(tmp_path / name / "part-00000.parquet") for name in ("here", "there")]
    assert schemas[0] == schemas[1]
    (tmp_path / "there" / "part-00002.parquet").unlink()
    assert predict(predictor, folder, tmp_path / "there", shard=4, ray="auto", actors=1).computed == 4
    with tarfile.open(tmp_path / "none.tar", "w"):
        pass
    assert predict(predictor, tmp_path / "none.tar", tmp_path / "none", ray="auto", actors=1).images == 0


KILLED = """
import os, sys, time, types, torch
sys.modules["torchvision._meta_registrations"] = types.ModuleType("stub")
from repavit_ops.predicting import Predictor, on_ray, predict
model, folder, out = sys.argv[1:]

class Slow(on_ray._Actor):
    def __call__(self, batch):
        open(f"{out}.pids", "a").write(f"{os.getpid()}\\n")
        time.sleep(0.3)
        return super().__call__(batch)

on_ray._Actor = Slow
predict(Predictor(model, top_k=3, threads=1), folder, out, batch=2, shard=2, ray="auto", actors=2)
"""


def test_a_killed_actor_costs_nothing_and_a_killed_driver_goes_on_with_each_image_once(cluster, folder, tmp_path):
    model, out = tmp_path / "model.safetensors", tmp_path / "out"
    repavit_ops.save_checkpoint(tiny_vit(), model)
    settings = {"batch": 2, "shard": 2}

    def started():
        command = [sys.executable, "-c", KILLED, str(model), str(folder), str(out)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)

    process = started()
    wait_for_parts(out, 1, process)
    process.kill()  # the driver: Ray ends its actors
    process.communicate()
    done = len(list(out.glob("part-*.parquet")))
    assert 1 <= done < 12
    process = started()
    wait_for_parts(out, done + 1, process)
    pids = (tmp_path / "out.pids").read_text().split()
    os.kill(int(pids[-1]), signal.SIGKILL)  # an actor: Ray starts another, and does its batches again
    assert process.wait(PATIENCE) == 0, process.stderr.read().decode()
    assert len(set((tmp_path / "out.pids").read_text().split()) - set(pids)) >= 1
    assert predict(Predictor(model, top_k=3, threads=1), folder, out, workers=0, **settings).computed == 0
    there, here = rows_of(out), tmp_path / "here"
    predict(Predictor(model, top_k=3, threads=1), folder, here, workers=0, **settings)
    assert {path: row["labels"] for path, row in there.items()} == {p: r["labels"] for p, r in rows_of(here).items()}
    assert len(there) == 24
    assert not list(out.glob("*.unfinished"))


def test_a_cluster_that_is_too_small_is_said_and_not_waited_for(cluster, folder, tmp_path, predictor):
    file = tmp_path / "model.safetensors"
    repavit_ops.save_checkpoint(tiny_vit(), file)
    with pytest.raises(RuntimeError, match="has 3 CPUs, wanted 4: 3 actors of 1 threads and 1 for decoding"):
        predict(Predictor(file, threads=1), folder, tmp_path / "a", ray="auto", actors=3)
    with pytest.raises(RuntimeError, match="has 3 CPUs, wanted 4: 1 actors of 3 threads"):
        predict(Predictor(file, threads=3), folder, tmp_path / "b", ray="auto")
    with pytest.raises(ValueError, match="wanted one of a file or name"):
        predict(predictor, folder, tmp_path / "c", ray="auto")


def test_threads_are_the_cpus_that_ray_gave(cluster):
    task = cluster.remote(given_cpus)
    assert cluster.get(task.options(num_cpus=2).remote()) == 2
    assert cluster.get(task.options(num_cpus=1).remote()) == 1
    assert given_cpus() == len(os.sched_getaffinity(0))  # the driver was given none


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    backends.why_unavailable("cpp") is not None, reason=f"no C++ kernels: {backends.why_unavailable('cpp')}"
)
def test_the_command_takes_a_packed_file(folder, tmp_path):
    packed = tmp_path / "model.safetensors"
    repavit_ops.save_packed(repavit_ops.fuse(tiny_vit(), dtype=torch.bfloat16), packed)
    (folder / "empty.jpg").write_bytes(b"")
    arguments = ["predict", str(packed), str(folder), "--out", str(tmp_path / "out"), "--features", "--half"]
    done = CliRunner().invoke(app, [*arguments, "--workers", "0", "--top-k", "2", "--quiet"])
    assert done.exit_code == 0, done.output
    assert "25 images, 25 of them now" in done.output
    assert "empty.jpg: ValueError: the file is empty" in done.output
    schema = parquet.read_schema(tmp_path / "out" / "part-00000.parquet")
    assert schema.field("features").type == pa.list_(pa.float16(), 48)
    done = CliRunner().invoke(app, [*arguments, "--dtype", "float32"])
    assert done.exit_code == 2
    assert "is packed in torch.bfloat16; convert it again" in done.stderr
    done = CliRunner().invoke(app, [*arguments[:-2], "--strict", "--quiet", "--out", str(tmp_path / "strict")])
    assert done.exit_code == 2
    assert "empty.jpg" in done.stderr
