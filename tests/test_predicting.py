"""Images by the folder: each once in the output, whatever happens on the way."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from model_helpers import tiny_vit
from predicting_helpers import (
    PATIENCE,
    Image,
    encoded,
    folder_of_photographs,
    parquet,
    photographs,
    rows_of,
    wait_for_parts,
)
from typer.testing import CliRunner

import repavit_ops
from repavit_ops import backends
from repavit_ops.cli import app
from repavit_ops.predicting import Predictor, predict
from repavit_ops.predicting.output import joined
from repavit_ops.predicting.run import Unreadable

pa = pytest.importorskip("pyarrow")
needs_kernels = pytest.mark.skipif(
    backends.why_unavailable("cpp") is not None, reason=f"no C++ kernels: {backends.why_unavailable('cpp')}"
)


@pytest.fixture
def photos():
    return photographs()


@pytest.fixture
def folder(tmp_path):
    return folder_of_photographs(tmp_path / "photos")


@pytest.fixture
def predictor():
    return Predictor(tiny_vit(), top_k=3, threads=1)


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


def test_each_part_gives_its_memory_back(predictor, folder, tmp_path, monkeypatch):
    """Rows that are kept between batches lay over what the batches freed: 20,000 images took 200 MiB more."""
    parts = []
    monkeypatch.setattr(
        backends, "release_freed_memory", lambda: parts.append(len(list(tmp_path.glob("out/*.parquet"))))
    )
    predict(predictor, folder, tmp_path / "out", batch=4, shard=8, workers=0)
    assert len(parts) > 1
    assert parts == list(range(1, len(parts) + 1))


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


@contextlib.contextmanager
def files_of_500_bytes(out):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def disk_filled_up(out):
    gc.collect()  # whoever read the part that was deleted holds its pages
    filler = out.parent / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def mounted_read_only(out):
    subprocess.run(["mount", "-o", "remount,ro", out.parent], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", out.parent], check=True)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 512 KiB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("a small disk can be mounted by root alone, and not in every container")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    ("full", "reason"),
    [
        (files_of_500_bytes, "File too large"),
        (disk_filled_up, "No space left"),
        (mounted_read_only, "Read-only file system"),
    ],
)
def test_a_full_disk_loses_no_part_and_the_run_goes_on(request, predictor, folder, tmp_path, full, reason):
    out = (tmp_path if full is files_of_500_bytes else request.getfixturevalue("small_disk")) / "out"
    predict(predictor, folder, out, workers=0, shard=12)
    first = (out / "part-00000.parquet").read_bytes()
    (out / "part-00001.parquet").unlink()
    with full(out), pytest.raises(OSError, match=reason):
        predict(predictor, folder, out, workers=0, shard=12)
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


# --- the command ------------------------------------------------------------------------------------------------------


@needs_kernels
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
