"""The command line: what each command prints, writes and returns, and that mistakes are one clear line."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import types
from xml.etree import ElementTree

import pytest
import torch
from cli_helpers import run_command
from model_helpers import images, tiny_vit

from repavit_ops import backends, fuse, info, load_checkpoint, load_packed, reparameterize, save_checkpoint
from repavit_ops.cli.verify import junit_xml
from repavit_ops.verification import Comparison, VerificationReport

OK, FAILED, USAGE = 0, 1, 2


@pytest.fixture
def call(monkeypatch):
    """Run the command; returns (exit status, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "200")
    return run_command


@pytest.fixture
def trained(tmp_path):
    """A training checkpoint with the authors' keys and nothing else in it."""
    path = tmp_path / "trained.pth"
    torch.save({"model": tiny_vit().state_dict()}, path)
    return path


LOAD = ("--idle-ratio", "0.75", "--num-heads", "3")


# --- version, models --------------------------------------------------------------------------------------------------


def test_the_version_is_printed_alone(call):
    assert call("--version") == (OK, f"repavit-ops {info.__version__}\n", "")


def test_models_are_listed_with_their_sizes_and_filtered_by_words(call):
    status, out, _ = call("models", "joined", "tiny", "--json")
    assert status == OK
    rows = json.loads(out)
    assert [row["name"] for row in rows] == [f"joined_vit_tiny_{depth}" for depth in (6, 4, 3)]
    assert all(row["params"] == 5717416 and 1.0e9 < row["macs"] < 1.2e9 for row in rows)
    status, out, _ = call("models", "joined", "tiny_4")
    assert (status, out.split()[:3]) == (OK, ["joined_vit_tiny_4", "5.72", "M"])
    status, _, err = call("models", "resnet")
    assert status == USAGE
    assert "no model's name holds resnet; repavit-ops models lists all" in err


# --- convert --packed -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    backends.why_unavailable("cpp") is not None, reason=f"no C++ kernels: {backends.why_unavailable('cpp')}"
)
def test_convert_packed_writes_what_load_packed_maps(call, trained, tmp_path):
    packed = tmp_path / "packed.safetensors"
    status, out, err = call("convert", trained, packed, *LOAD, "--packed", "--dtype", "bfloat16")
    assert (status, err) == (OK, "")
    assert "(packed)" in out
    model = load_packed(packed, source=trained, check=True)
    expected = fuse(load_checkpoint(trained, num_heads=3, idle_ratio=0.75), dtype=torch.bfloat16)
    x = images().bfloat16()
    with torch.no_grad():
        assert torch.equal(model(x), expected(x))
    status, _, err = call("convert", trained, packed, *LOAD, "--packed", "--layout", "authors")
    assert status == USAGE
    assert "give one of them" in err
    assert call("convert", trained, packed, *LOAD, "--packed", "--quantize", "int8")[0] == OK
    assert load_packed(packed).blocks[0].mlp.quantize == "int8"
    status, _, err = call("convert", trained, packed, *LOAD, "--quantize", "int8")
    assert status == USAGE
    assert "give --packed beside it" in err
    status, _, err = call("convert", trained, packed, *LOAD, "--dtype", "bfloat16")
    assert status == USAGE
    assert "beside --packed" in err
    status, _, err = call("convert", packed, tmp_path / "plain.safetensors")
    assert status == USAGE
    assert "load_packed reads it" in err


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_export_merges_writes_runs_and_compares(call, trained, tmp_path, precision):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    target = tmp_path / "model.onnx"
    status, out, err = call("export", trained, target, "--precision", precision, "--batch", "0", *LOAD)
    assert (status, err) == (OK, "")
    assert runtime.__version__ in out
    session = runtime.InferenceSession(str(target))
    merged = reparameterize(load_checkpoint(trained, idle_ratio=0.75, num_heads=3))
    x = images(3)
    ours = session.run(None, {"images": x.half().numpy() if precision == "fp16" else x.numpy()})[0]
    close = 1e-2 if precision == "fp16" else 1e-5
    torch.testing.assert_close(torch.from_numpy(ours).float(), merged(x).detach(), rtol=close, atol=close)


def test_export_fails_where_the_file_computes_something_else(call, trained, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from repavit_ops.exporting.checked import TARGETS

    onnx = TARGETS[".onnx"]
    wrong = onnx._replace(run=lambda path, x: (onnx.run(path, x)[0], onnx.run(path, x)[1] * (1 + 1e-4)))
    monkeypatch.setitem(TARGETS, ".onnx", wrong)
    status, _, err = call("export", trained, tmp_path / "model.onnx", *LOAD)
    assert status == FAILED
    assert "FAILED: the file computes something else" in err


def test_a_joined_name_is_joined_as_at_the_end_of_a_training(call, tmp_path):
    name = "joined_vit_tiny_3"
    assert call("verify", name, name, "--form", "fused", "--img-size", "32", "--batch", "1")[0] == OK
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert call("export", name, tmp_path / "model.onnx", "--image-size", "32")[0] == OK


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("vanilla_vit_tiny", "model.bin"), "OUT: got model.bin, wanted a name that ends in .onnx, .pte, .tflite"),
        (("vanilla_vit_tiny", "model.tflite", "--precision", "fp16"), "precision: got fp16, wanted fp32, the only one"),
        (("vanilla_vit_tiny", "model.pte", "--batch", "0"), "batch: got 0 (any number), wanted a number of images"),
        (("vanilla_vit_teeny", "model.onnx"), "MODEL: vanilla_vit_teeny is no file, and no name that"),
        (("vanilla_vit_tiny", "model.onnx", "--batch", "-1"), "batch: got -1"),
    ],
)
def test_mistakes_of_export_are_one_line(call, arguments, words):
    status, _, err = call("export", *arguments)
    assert status == USAGE
    assert words in err


@pytest.mark.parametrize(("suffix", "package"), [(".pte", "executorch"), (".tflite", "litert-torch")])
def test_export_writes_for_phones_or_says_what_to_install(call, trained, tmp_path, suffix, package):
    target = tmp_path / f"model{suffix}"
    status, out, err = call("export", trained, target, *LOAD)
    if importlib.util.find_spec(package.replace("-", "_")) is not None:
        assert status == OK
        assert "of the largest output, against float64" in out
    else:
        assert status != OK
        assert f"{package} is not installed" in err
        assert f"pip install -c keep.txt {package}" in err
        assert "Traceback" not in err


# --- info -------------------------------------------------------------------------------------------------------------


def test_info_names_versions_and_every_backend(call):
    status, out, _ = call("info")
    assert status == OK
    for word in (torch.__version__, "backend reference", "backend cpp", "backend triton", "threads", "extra timm"):
        assert word in out


def test_info_cuts_no_path(call, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("REPAVIT_TUNED", str(tmp_path / ("long" * 20)))
    if backends.why_unavailable("cpp") is not None:
        pytest.skip("no C++ kernels, so no table of them")
    assert "long" * 20 in "".join(call("info")[1].split())


def test_info_says_in_one_line_that_a_level_is_unknown(call, monkeypatch):
    def refuse():
        raise RuntimeError("REPAVIT_CPU_ISA: got 'avx9', wanted one of scalar, avx2")

    monkeypatch.setattr(info, "cpu", refuse)
    status, _, err = call("info")
    assert (status, err.strip()) == (USAGE, "error: REPAVIT_CPU_ISA: got 'avx9', wanted one of scalar, avx2")


def test_info_as_json_gives_each_backend_none_or_a_reason(call):
    status, out, _ = call("info", "--json")
    info = json.loads(out)
    assert status == OK
    assert info["backends"]["reference"] is None
    assert all(reason is None or len(reason) > 10 for reason in info["backends"].values())
    assert (info["cpu"]["isa"] is None) == (info["backends"]["cpp"] is not None)


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "repavit_ops", "info", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)["torch"] == torch.__version__


# --- convert ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["native", "authors"])
def test_convert_merges_and_the_result_computes_the_same(call, trained, tmp_path, layout):
    target = tmp_path / "deployed.safetensors"
    status, out, err = call("convert", trained, target, *LOAD, "--layout", layout)
    assert status == OK, err
    assert "2 ChannelIdleFFN" in out
    before, after = (sum(p.numel() for p in m.parameters()) for m in (tiny_vit(), load_checkpoint(target)))
    assert f"{before:,} → {after:,}" in out
    expected = reparameterize(tiny_vit())(images())
    torch.testing.assert_close(load_checkpoint(target)(images()), expected, rtol=1e-5, atol=1e-5)


def test_convert_rewrites_a_deployed_checkpoint(call, tmp_path):
    source, target = tmp_path / "native.pt", tmp_path / "authors.pt"
    save_checkpoint(reparameterize(tiny_vit()), source)
    status, out, _ = call("convert", source, target, "--layout", "authors")
    assert status == OK
    assert "nothing (already in deployed form)" in out
    assert any(key.endswith("mlp.fc3.weight") for key in torch.load(target, weights_only=True)["model"])


def test_convert_reads_a_config_file_and_a_ratio_per_block(call, trained, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"num_heads": 3}))
    status, _, err = call("convert", trained, tmp_path / "out.pt", "--config", config, "--idle-ratio", "0.75,0.75")
    assert status == OK, err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convert", "absent.pth", "out.pth"], "absent.pth"),
        (["convert", "{trained}", "out.pth", "--num-heads", "3"], "idle_ratio"),
        (["convert", "{trained}", "out.pth", "--num-heads", "3", "--idle-ratio", "most"], "--idle-ratio"),
        (["convert", "{trained}", "{tmp}/out.onnx", *LOAD], ".safetensors"),
        (["convert", "{trained}", "out.pth", "--config", "{trained}"], "utf-8"),
        (["convert", "{trained}", "out.pth", "--config", "{list}"], "wanted an object"),
        (["verify", "repa_diet_tiny", "repa_deit_tiny"], "repa_deit_tiny"),
        (["verify", "{trained}", "{trained}", *LOAD, "--dtype", "int4"], "bfloat16"),
        (["verify", "vanilla_deit_tiny={trained}", "vanilla_deit_tiny"], "no checkpoint of vanilla_deit_tiny"),
    ],
)
def test_a_mistake_is_a_clear_error_without_traceback(call, trained, tmp_path, arguments, words):
    (tmp_path / "list.json").write_text("[1]")
    places = {"trained": trained, "tmp": tmp_path, "list": tmp_path / "list.json"}
    status, _, err = call(*(argument.format(**places) for argument in arguments))
    assert status == USAGE
    assert err.startswith("error: ")
    assert words in err
    assert "Traceback" not in err


def test_an_unknown_option_is_a_usage_error(call):
    assert call("info", "--nonsense")[0] == USAGE


# --- verify -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["as-is", "merged", "fused"])
def test_verify_accepts_a_checkpoint_in_every_form(call, trained, form):
    status, out, err = call("verify", trained, trained, *LOAD, "--form", form, "--batch", "2")
    assert status == OK, err
    assert "PASS in float32" in out
    assert ("fused" in out) == (form == "fused")


def test_verify_of_int8_goes_by_the_cosine(call, trained):
    status, out, _ = call("verify", trained, trained, *LOAD, "--form", "fused", "--quantize", "int8", "--batch", "2")
    assert status == OK
    assert "cosine" in out
    assert "(at least 0.99)" in out
    status, _, err = call("verify", trained, trained, *LOAD, "--quantize", "int8")
    assert status != OK
    assert "--form fused" in err


@pytest.mark.parametrize("layout", ["native", "authors"])
def test_verify_compares_a_training_checkpoint_with_what_it_was_converted_to(call, trained, tmp_path, layout):
    target = tmp_path / "deployed.safetensors"
    call("convert", trained, target, *LOAD, "--layout", layout)
    status, out, err = call("verify", trained, target, *LOAD)
    assert status == OK, err
    assert "blocks.1" in out


def test_verify_fails_with_status_1_and_says_so_everywhere(call, trained, tmp_path):
    other = tmp_path / "other.pth"
    torch.save({"model": tiny_vit(seed=1).state_dict()}, other)
    junit = tmp_path / "report.xml"
    status, out, err = call("verify", trained, other, *LOAD, "--json", "-", "--junit", junit)
    assert status == FAILED
    report = json.loads(out)
    assert not report["passed"]
    assert report["output"]["max_abs"] > report["output"]["bound"]
    assert "FAIL in float32" in err
    suite = ElementTree.parse(junit).getroot()
    assert int(suite.attrib["failures"]) == len(suite.findall(".//failure")) > 0


def test_verify_builds_models_by_name_with_the_same_random_weights(call, tmp_path):
    target = tmp_path / "report.json"
    arguments = ("repa_deit_tiny", "repa_deit_tiny", "--form", "fused", "--img-size", "32", "--batch", "1")
    status, _, err = call("verify", *arguments, "--json", target)
    assert status == OK, err
    assert json.loads(target.read_text())["passed"]


def test_verify_loads_weights_into_a_named_model(call, tmp_path):
    from repavit_ops import create_model

    torch.manual_seed(5)
    path = tmp_path / "vanilla.pt"
    torch.save(create_model("vanilla_deit_tiny").state_dict(), path)
    source = f"vanilla_deit_tiny={path}"
    assert call("verify", source, source, "--form", "fused", "--img-size", "32", "--batch", "1")[0] == OK
    assert call("verify", source, "vanilla_deit_tiny", "--img-size", "32", "--batch", "1")[0] == FAILED


def test_junit_counts_a_block_beyond_its_bound_as_skipped_where_the_output_holds():
    def row(name, passed):
        return Comparison(name, max_abs=1e-3, relative=1e-3, cosine=1.0, bound=1e-6, top1=None, passed=passed)

    held = VerificationReport((row("blocks.0", False), row("blocks.1", True)), (row("output", True),), "float32")
    assert "over blocks.0" in str(held)
    suite = ElementTree.fromstring(junit_xml(held, "a = b").encode())
    assert {key: suite.attrib[key] for key in ("tests", "failures", "skipped")} == {
        "tests": "3",
        "failures": "0",
        "skipped": "1",
    }


# --- demo -------------------------------------------------------------------------------------------------------------


def test_the_demo_without_its_packages_says_what_to_install(call, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("repavit_ops.demo")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    status, _, err = call("demo")
    assert status == USAGE
    assert "pip install 'repavit-ops[demo]'" in err


def test_info_names_each_gpu_and_says_whether_its_tiles_were_tuned(monkeypatch, tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    device = types.SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=140 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setenv("REPAVIT_TUNED", str(tmp_path))
    shown = dict(info.rows(info.collect()))
    assert shown["backend triton"] == "available"
    assert shown["gpu"] == "NVIDIA H200, sm 9.0, 140.0 GiB, tiles by rule of thumb: repavit-ops tune NAME..."
    (tmp_path / "nvidia_h200.json").write_text("{}")
    assert "tuned tiles" in dict(info.rows(info.collect()))["gpu"]
