"""bench/cpu_table.py: one line per model, its last figures, and every peer that was ever measured beside it."""

from __future__ import annotations

import json

import cpu_table


def row(case, dtype, images, **ratios):
    return json.dumps({"case": case, "dtype": dtype, "images_per_second": {"repavit_ops": images}, "ratios": ratios})


def test_last_figures_of_every_peer_in_the_order_of_batches(tmp_path):
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    first = row("deit_tiny merged batch 8", "float32", 100, openvino=1.1, compile=1.7)
    old.write_text(
        f"{row('ffn C192 batch 1 mu 1', 'float32', 0)}\n{row('deit_tiny merged batch 32', 'bfloat16', 50)}\n{first}\n"
    )
    new.write_text(row("deit_tiny merged batch 8", "float32", 120, openvino=1.25) + "\n")
    lines = cpu_table.markdown(cpu_table.read([old, new])).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| deit_tiny | merged | 8 | 120.0 | 1.25 |  | 1.70 |")
    assert lines[3].startswith("| deit_tiny | merged | 32 |  |")
    assert "| 50.0 |" in lines[3]
