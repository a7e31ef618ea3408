"""The file of a packed model: its format, and whatever is wrong with one is said before a model comes of it."""

from __future__ import annotations

import json
import resource
import struct

import numpy as np
import pytest
import safetensors
import torch
from model_helpers import images, tiny_vit
from packed_helpers import first_output, fused_and_saved, needs_kernels

import repavit_ops
from repavit_ops.checkpoints.mapped_file import LINE, PACKED

pytestmark = needs_kernels


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.fixture
def saved(path):
    return fused_and_saved(path)


def test_safetensors_reads_the_file_and_every_tensor_begins_at_a_cache_line(path):
    repavit_ops.save_packed(repavit_ops.fuse(tiny_vit(), dtype=torch.bfloat16), path)
    with safetensors.safe_open(path, framework="pt") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    header = json.loads(path.read_bytes()[8 : 8 + length])
    assert (8 + length) % LINE == 0
    assert all(header[name]["data_offsets"][0] % LINE == 0 for name in held if "padding" not in name)
    loaded = repavit_ops.load_packed(path)
    assert torch.equal(held["head.weight"], loaded.head.weight)
    assert all(p.data_ptr() % LINE == 0 for p in (loaded.head.weight, loaded.blocks[0].mlp.packed_copy))


def test_saving_what_was_loaded_gives_the_same_file(saved, tmp_path):
    _, path = saved
    again = tmp_path / "again.safetensors"
    repavit_ops.save_packed(repavit_ops.load_packed(path), again)
    assert again.read_bytes() == path.read_bytes()


class File:
    """A packed file in parts, to be changed and written."""

    def __init__(self, path):
        whole = path.read_bytes()
        (length,) = struct.unpack("<Q", whole[:8])
        self.path, self.header, self.data = path, json.loads(whole[8 : 8 + length]), bytearray(whole[8 + length :])
        self.said = json.loads(self.header["__metadata__"][PACKED])

    def write(self):
        self.header["__metadata__"][PACKED] = json.dumps(self.said)
        text = json.dumps(self.header).encode()
        text += b" " * (-(8 + len(text)) % LINE)
        self.path.write_bytes(struct.pack("<Q", len(text)) + text + self.data)

    def at(self, name):
        return self.header[name]["data_offsets"][0]


FFN, QKV = "blocks.0.mlp.packed", "blocks.0.attn.packed"


def swap_offsets(file, first, second):
    a, b = file.header[first], file.header[second]
    file.header[first], file.header[second] = b, a


def renamed(file, old, new):
    file.header[new] = file.header.pop(old)


def put(file, name, offset, number, kind="<q"):
    struct.pack_into(kind, file.data, file.at(name) + offset, number)


TAMPERED = {
    "overlapping offsets": (lambda f: f.header["head.bias"].update(data_offsets=[0, 40]), "begins at byte"),
    "an end past the file": (lambda f: f.data.__delitem__(slice(-64, None)), "tensors end at byte"),
    "more behind": (lambda f: f.data.extend(b"x" * 64), "tensors end at byte"),
    "a shape too large": (lambda f: f.header["head.weight"].update(shape=[10, 4800]), "bytes for the shape"),
    "a negative side": (lambda f: f.header["head.weight"].update(shape=[-10, -48]), "no dtype, shape and offsets"),
    "sides that overflow": (lambda f: f.header["head.weight"].update(shape=[2**61, 2**61, 0]), "bytes for the shape"),
    "a dtype unknown": (lambda f: f.header["head.weight"].update(dtype=["F32"]), "no dtype, shape and offsets"),
    "another shape": (lambda f: f.header["head.weight"].update(shape=[48, 10]), "its model wants"),
    "a tensor missing": (lambda f: renamed(f, "head.bias", "padding.77"), r"head\.bias has nothing"),
    "a tensor too many": (lambda f: renamed(f, next(n for n in f.header if "padding" in n), "x"), "no place for: x"),
    "integers for floats": (lambda f: f.header["head.bias"].update(dtype="I32"), "its model wants"),
    "copies exchanged": (lambda f: swap_offsets(f, "blocks.0.mlp.packed", "blocks.1.mlp.packed"), None),
    "copies of other kinds": (lambda f: swap_offsets(f, FFN, QKV), "begins with b'rvffn001', wanted rvatt001"),
    "a form of numbers": (
        lambda f: f.said["operators"]["blocks.0.mlp"].update(quantize="int8"),
        "is not what its model",
    ),
    "a form unknown": (lambda f: f.said["operators"]["blocks.0.mlp"].update(quantize="int1"), "int1"),
    "another magic": (lambda f: put(f, FFN, 0, 7), "begins with"),
    "more channels": (lambda f: put(f, FFN, 16, 4800), "is not what its model's weights are packed to"),
    "fewer active": (lambda f: put(f, FFN, 24, 16), "is not what its model's weights are packed to"),
    "other bytes": (lambda f: put(f, FFN, 32, 2**60), "is not what its model's weights are packed to"),
    "another dtype": (lambda f: put(f, QKV, 8, 2, "<i"), "is not what its model's weights are packed to"),
    "other heads": (lambda f: put(f, QKV, 12, 1, "<i"), "is not what its model's weights are packed to"),
    "a fingerprint": (lambda f: put(f, FFN, 56, 99), "says that it follows weights"),
    "shapes in the metadata": (lambda f: f.said["copies"]["blocks.0.mlp"]["shapes"].update(w_in=[1, 1]), "has weights"),
    "a copy of no operator": (lambda f: f.said["copies"].update(head=f.said["copies"]["blocks.0.mlp"]), "no operator"),
    "a dtype that is a function": (
        lambda f: f.said["copies"]["blocks.0.mlp"].update(dtype="load"),
        "describe no model",
    ),
    "no recipe": (lambda f: f.said.pop("recipe"), "describe no model"),
    "a recipe unknown": (lambda f: f.said["recipe"].update(of="os"), "got a recipe of 'os'"),
    "a class unknown": (lambda f: f.said["recipe"]["model"].update(type="system"), "no description of a model"),
    "sizes of a giant": (lambda f: f.said["recipe"]["model"]["args"].update(embed_dim=2**50), "cannot be built|wants"),
    "a list for a dict": (lambda f: f.said.update(copies=[]), "describe no model"),
    "another version": (
        lambda f: f.said["versions"].update(repavit_ops="0.0.1"),
        r"0\.0\.1 \(here: .*convert it again",
    ),
    "another format": (lambda f: f.said.update(format=2), r"format 2 \(here: 1\).*convert it again"),
    "another byte order": (lambda f: f.said.update(byteorder="big"), "byte order big"),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_tampered_file_is_refused_with_the_reason(saved, what):
    fused, path = saved
    change, reason = TAMPERED[what]
    file = File(path)
    change(file)
    file.write()
    if reason is None:  # another model's weights, whole: only the digest can tell
        assert not torch.equal(first_output(repavit_ops.load_packed(path), images()), first_output(fused, images()))
        file.data[-1] ^= 1
        file.write()
        with pytest.raises(ValueError, match="sha256"):
            repavit_ops.load_packed(path, check=True)
        return
    with pytest.raises(ValueError, match=reason) as raised:
        repavit_ops.load_packed(path)
    assert path.name in str(raised.value)


@pytest.mark.parametrize(
    ("size", "why"),
    [(0, "no header"), (7, "no header"), (8, "its header has"), (100, "its header has"), (-1, "end"), (-64, "end")],
)
def test_a_truncated_file_is_refused(saved, size, why):
    _, path = saved
    path.write_bytes(path.read_bytes()[: size if size >= 0 else path.stat().st_size + size])
    with pytest.raises(ValueError, match=f"damaged file or one of another kind.*{why}"):
        repavit_ops.load_packed(path)


def test_random_damage_is_an_error_or_a_model_and_never_a_crash(saved):
    _, path = saved
    whole, generator = path.read_bytes(), np.random.default_rng(0)
    (length,) = struct.unpack("<Q", whole[:8])
    refused = 0
    for _ in range(120):
        damaged = bytearray(whole)
        for at in generator.integers(0, 8 + length, generator.integers(1, 4)):
            damaged[at] = generator.integers(0, 256)
        path.write_bytes(damaged)
        try:
            first_output(repavit_ops.load_packed(path), images())
        except (ValueError, RuntimeError):
            refused += 1
    assert refused > 60


def test_other_files_are_named_for_what_they_are(saved, tmp_path):
    fused, path = saved
    with pytest.raises(ValueError, match=r"got a packed model, wanted a checkpoint; repavit_ops\.load_packed"):
        repavit_ops.load_checkpoint(path)
    plain = tmp_path / "plain.safetensors"
    repavit_ops.save_checkpoint(tiny_vit(), plain)
    with pytest.raises(ValueError, match=r"no packed model; read it with repavit_ops\.load_checkpoint"):
        repavit_ops.load_packed(plain)
    with pytest.raises(FileNotFoundError, match="wanted an existing file"):
        repavit_ops.load_packed(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=r"wanted a name ending in \.safetensors"):
        repavit_ops.save_packed(fused, tmp_path / "model.bin")


def test_a_changed_number_is_seen_when_asked_for(saved):
    _, path = saved
    repavit_ops.load_packed(path, check=True)
    file = File(path)
    file.data[file.at(FFN) + 1000] ^= 1
    file.write()
    repavit_ops.load_packed(path)
    with pytest.raises(ValueError, match="its data has the sha256"):
        repavit_ops.load_packed(path, check=True)


def test_a_file_knows_the_weights_that_it_was_made_of(saved, tmp_path):
    fused, path = saved
    source, other = tmp_path / "source.safetensors", tmp_path / "other.safetensors"
    repavit_ops.save_checkpoint(tiny_vit(), source)
    repavit_ops.save_checkpoint(tiny_vit(seed=1), other)
    with pytest.raises(ValueError, match="does not say which file"):
        repavit_ops.load_packed(path, source=source)
    repavit_ops.save_packed(fused, path, source=source)
    repavit_ops.load_packed(path, source=source)
    with pytest.raises(ValueError, match=r"was made of source\.safetensors .*stale"):
        repavit_ops.load_packed(path, source=other)


HOSTILE = {
    "a path": ({"of": "timm", "name": "hf-hub:somebody/model", "arguments": {}}, "one of timm's architectures"),
    "a file to read": (
        {"of": "timm", "name": "vit_tiny_patch16_224", "arguments": {"checkpoint_path": "x"}},
        "none that reads other files",
    ),
    "a class that is none": (
        {"of": "transformers", "class": "pipeline", "config_class": "ViTConfig"},
        "classes of models",
    ),
    "code on a hub": (
        {"of": "transformers", "class": "ViTModel", "config_class": "ViTConfig", "attention": "sdpa"}
        | {"config": {"auto_map": {"AutoModel": "evil--code.Model"}}},
        "got auto_map",
    ),
    "a kernel on a hub": (
        {"of": "transformers", "class": "ViTModel", "config_class": "ViTConfig", "attention": "evil/kernel"}
        | {"config": {}},
        "got the attention 'evil/kernel'",
    ),
    "a kernel inside": (
        {"of": "transformers", "class": "ViTModel", "config_class": "ViTConfig", "attention": "sdpa"}
        | {"config": {"vision": [{"attn_implementation": "evil/kernel"}]}},
        "got attn_implementation",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_recipe_names_constructors_and_nothing_that_fetches(timm, saved, what):
    _, path = saved
    recipe, reason = HOSTILE[what]
    library = pytest.importorskip(recipe["of"])
    file = File(path)
    file.said["recipe"] = recipe
    file.said["versions"][recipe["of"]] = library.__version__
    file.write()
    with pytest.raises(ValueError, match=reason):
        repavit_ops.load_packed(path)


def test_a_model_of_another_version_of_its_library_is_converted_again(timm, path):
    fused = repavit_ops.fuse(timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32).eval())
    repavit_ops.save_packed(fused, path, arguments={"depth": 1, "img_size": 32})
    file = File(path)
    file.said["versions"]["timm"] = "0.1"
    file.write()
    with pytest.raises(ValueError, match=r"timm 0\.1 \(here: .*convert it again here"):
        repavit_ops.load_packed(path)


def test_models_that_hold_no_packed_weights_are_refused_with_the_way_out(path):
    with pytest.raises(ValueError, match=r"nothing in it is fused: repavit_ops\.fuse"):
        repavit_ops.save_packed(tiny_vit(), path)
    with pytest.raises(ValueError, match=r"backend 'auto' in torch\.float64"):
        repavit_ops.save_packed(repavit_ops.fuse(tiny_vit(), dtype=torch.float64), path)
    with pytest.raises(RuntimeError, match="is in training mode"):
        repavit_ops.save_packed(repavit_ops.fuse(tiny_vit()).train(), path)
    assert not path.exists()


def test_a_disk_that_fills_up_leaves_the_old_file_and_nothing_else(saved):
    fused, path = saved
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # what write() then says, ENOSPC says alike
    try:
        with pytest.raises(OSError, match="File too large"):
            repavit_ops.save_packed(fused, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
