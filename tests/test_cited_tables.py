"""Tables of README and docs/ that cite a file of bench/results say what the file says, to the digits they show."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import bench_tables
import cited_tables
import cpu_table
import pytest
import scaling_model
from scaling_model import Cluster

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench/results"
ZEN4 = sorted([*RESULTS.glob("2026-11-22-zen4-*.jsonl"), *RESULTS.glob("2026-11-23-zen4-*.jsonl")])

pytestmark = pytest.mark.skipif(not RESULTS.exists(), reason="bench/results is not in this tree (an sdist)")


def table(page: str, head: str) -> list[list[str]]:
    """The rows of the table of a page whose head begins with some words, cell by cell, without bold."""
    text = (ROOT / page).read_text()
    lines = text[text.index(f"\n| {head}") + 1 :].split("\n\n", 1)[0].splitlines()
    return [[cell.strip().replace("**", "") for cell in line.strip("|").split("|")] for line in lines[2:]]


def rows(name: str) -> dict[tuple[str, str], list[dict]]:
    """The rows of a file by case and dtype."""
    found: dict[tuple[str, str], list[dict]] = {}
    for line in (RESULTS / name).read_text().splitlines():
        row = json.loads(line)
        found.setdefault((row["case"], row["dtype"]), []).append(row)
    return found


def row(name: str, case: str, dtype: str = "float32") -> dict:
    (only,) = rows(name)[case, dtype]
    return only


def test_whole_models_in_docs_cpu():
    """All of it, by the script that made it."""
    made = cpu_table.markdown(cpu_table.read(ZEN4))
    assert made in (ROOT / "docs/cpu.md").read_text()


def test_whole_models_in_the_readme():
    shown = ("DeiT-T", "DeiT-S", "DeiT-B", "ViT-L", "Swin-T")
    names = dict(zip(shown, ("deit_tiny", "deit_small", "deit_base", "vit_large", "swin_tiny"), strict=True))
    measured = cpu_table.read(ZEN4)
    cells = table("README.md", "batch 1 | float32")
    assert [line[0] for line in cells] == list(names)
    for line in cells:
        case, wanted = f"{names[line[0]]} merged batch 1", [line[0]]
        for dtype, peers in (
            ("float32", ("openvino", "onnxruntime", "compile", "eager")),
            ("bfloat16", ("openvino", "compile", "eager")),
        ):
            found = measured[case, dtype]
            wanted += [f"{found['images']:.1f}", *(f"{found['ratios'][peer]:.2f}x" for peer in peers)]
        assert line == wanted


def test_models_of_transformers_in_docs_cpu():
    shown = ("ViT-B/16", "DINOv2-S/14", "CLIP ViT-B/32", "SigLIP-B/16", "Swin-T")
    cases = dict(zip(shown, ("vit_b16", "dinov2_s14", "clip_b32", "siglip_b16", "swin_t"), strict=True))
    cells = table("docs/cpu.md", "| fused, ms")
    assert [line[0] for line in cells] == list(cases)
    for line in cells:
        found = row("2026-11-27-zen3-foreign.jsonl", f"transformers {cases[line[0]]} batch 1")
        seconds, ratios = found["seconds"], found["ratios"]
        wanted = [
            f"{seconds['repavit_ops'][1] * 1e3:.1f}",
            f"{ratios['eager']:.2f}x",
            f"{ratios['openvino']:.2f}x",
            f"{1 / ratios['timm fused']:.2f}",
        ]
        assert line[1:] == wanted


def test_depth_in_docs_depth():
    cells = table("docs/depth.md", "blocks | MParams")
    assert [line[0] for line in cells] == ["12", "6", "4", "3"]
    for line in cells:
        one, eight = (row("2026-11-21-depth.jsonl", f"vit_tiny, {line[0]} blocks, batch {n}") for n in (1, 8))
        wanted = [f"{one['params'] / 1e6:.2f}", f"{one['macs'] / 1e9:.3f}"]
        for found, digits in ((one, 2), (eight, 1)):
            wanted += [f"{found['seconds']['repavit_ops'][1] * 1e3:.{digits}f}", f"{found['images_per_second']:.1f}"]
            wanted += [f"{found['latency_share']:.2f}"]
        assert line[1:] == wanted


def test_joined_branches_in_docs_depth():
    kinds = {"FFN": "ffn", "attention, join A": "attention, join a", "attention, join B": "attention, join b"}
    measured = rows("2026-11-21-joined-branches.jsonl")
    for line in table("docs/depth.md", "sub-block | images"):
        found = [measured[f"{kinds[line[0]]}, {b} branches, batch {line[1]}", "float32"][-1] for b in (2, 3, 4)]
        wanted = [f"{one['ratio']:.2f}x" for one in found] + [f"{one['speedup_at_one']:.1f}x" for one in found]
        assert line[2:] == wanted


def numbers(text: str) -> Iterator[float]:
    return (float(found) for found in re.findall(r"\d+\.\d+", text))


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("FFN (50 shapes each)", "ffn "),
        ("attention block (48)", "attention "),
        ("windowed attention block (16)", "windows "),
        ("RePa-DeiT-T and -S (17)", "repa_deit"),
        ("RePa-Swin-T (6)", "repa_swin"),
    ],
)
def test_never_slower_than_eager_in_docs_cpu(words, kind):
    """Geometric mean and least of every shape's ratio; of a shape that was measured again the last row counts."""
    (line,) = (cells for cells in table("docs/cpu.md", "times eager's speed") if cells[0] == words)
    measured = rows("2026-11-23-zen4-against-eager.jsonl")
    for shown, dtype in zip(line[1:], ("float32", "bfloat16", "float16"), strict=True):
        ratios = [found[-1]["ratio"] for (case, of), found in measured.items() if case.startswith(kind) and of == dtype]
        mean, least = statistics.geometric_mean(ratios), min(ratios)
        assert list(numbers(shown)) == [round(mean, 2), round(least, 2)], (words, dtype)


def test_rotary_models_in_docs_rotary_and_gates():
    """Every run of a model, smallest first."""
    starts = ("transformers dinov3_s16", "transformers dinov3_b16", "timm eva02_s14", "timm eva02_b14")
    measured = rows("2026-11-27-zen3-gated-and-rotary.jsonl")
    cells = table("docs/rotary-and-gates.md", "| eager | OpenVINO")
    assert len(cells) == len(starts)
    for line, start in zip(cells, starts, strict=True):
        runs = [found for (case, _), of in measured.items() if case.startswith(start) for found in of]
        for shown, peer in zip(line[1:], ("eager", "openvino"), strict=True):
            assert list(numbers(shown)) == sorted(round(found["ratios"][peer], 2) for found in runs), (start, peer)


@pytest.mark.parametrize("page", bench_tables.pages(), ids=lambda page: page.name)
def test_what_stands_between_marks_is_what_the_script_makes(page):
    assert bench_tables.filled(page.read_text()) == page.read_text()


def test_every_kind_of_table_stands_somewhere():
    kinds = {found[2] for page in bench_tables.pages() for found in bench_tables.PLACE.finditer(page.read_text())}
    assert kinds == {*bench_tables.KINDS, *cited_tables.KINDS}


def sentence(page: str, words: str) -> str:
    """A paragraph of a page by its first words."""
    text = (ROOT / page).read_text()
    return text[text.index(f"\n{words}") + 1 :].split("\n\n", 1)[0].replace("\n", " ")


def test_shares_of_the_peak_in_docs_cpu():
    wanted = []
    for name, dtype in (
        ("2026-11-22-zen4-avx512-bf16.jsonl", "float32"),
        ("2026-11-22-zen4-avx512-bf16.jsonl", "bfloat16"),
        ("2026-11-22-zen4-avx2-level.jsonl", "float32"),
    ):
        measured = {case: found for (case, of), found in rows(name).items() if case.startswith("ffn ") and of == dtype}
        shares = [found[-1]["share_of_peak"] for found in measured.values()]
        wanted += [round(min(shares), 2), round(max(shares), 2)]
    assert list(numbers(sentence("docs/cpu.md", "The FFN runs at"))) == wanted


def test_shares_of_the_peak_in_docs_int8():
    """Of sizes whose peak was the greater: what was looked for beside another's work came out too small."""
    found = [line for (case, _), (line,) in rows("2026-11-27-zen3-int8.jsonl").items() if case.startswith("ffn")]
    quiet = [line["share_of_peak"] for line in found if line["share_of_peak"] <= 1]
    over = [line["ratios"]["float32"] for line in found]
    text = sentence("docs/int8.md", "The FFN reaches")
    assert f"{100 * min(quiet):.0f} to {100 * max(quiet):.0f} %" in text
    assert f"{min(over):.1f} to {max(over):.1f} times the float32 FFN" in text
    assert len(found) - len(quiet) == 1


def test_predictions_in_docs_scaling():
    """The clusters whose names the page has, by the model that predicts them."""
    many = Cluster(machines=64)
    apart = replace(many, writers=64)
    clusters = {
        "1 x 8 GPUs": Cluster(machines=1),
        "64 x 8 GPUs, one run": many,
        "64 runs, a machine each": apart,
        "and files on each machine": replace(apart, files_gbs=64 * many.files_gbs),
    }
    lines = "\n".join(scaling_model.line(name, cluster) for name, cluster in clusters.items())
    assert f"|\n{lines}\n\n" in (ROOT / "docs/scaling.md").read_text()
    assert len(table("docs/scaling.md", "predicted images/s")) == len(clusters)


def test_every_file_of_results_that_a_page_cites_is_there():
    for page in ("README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))):
        for name in re.findall(r"results/([\w*-]+\.jsonl)", (ROOT / page).read_text()):
            assert list(RESULTS.glob(name)), f"{page} cites {name}"
