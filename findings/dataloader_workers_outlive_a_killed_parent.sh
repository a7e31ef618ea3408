#!/usr/bin/env bash
# A lock outlives the process that took it, held by the workers of its DataLoader.
#
# Guess: a run that locks its folder with flock gives the lock back at kill -9, so that it can be started again at once.
# Seen (torch 2.13.0, Linux): workers of a DataLoader are forked and inherit the open file, and with it the lock. They look
# for their parent every 5 s only, so the lock is held for that long. A lock of lockf is the process's own, and is free.
#
#   flock: held behind the kill, free after some seconds      lockf: free behind the kill
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/run.py" <<'PY'
import fcntl
import sys
import time

import torch


class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 1000

    def __getitem__(self, index):
        time.sleep(0.05)
        return index


kind, path = sys.argv[1:]
file = open(path, "w")
getattr(fcntl, kind)(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
for number, _ in enumerate(torch.utils.data.DataLoader(Slow(), num_workers=1)):
    if number == 3:
        print("running", flush=True)
PY
cat >"$folder/probe.py" <<'PY'
import fcntl
import subprocess
import sys
import time


def is_free(kind, path):
    with open(path, "w") as file:
        try:
            getattr(fcntl, kind)(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


folder, told = sys.argv[1], []
for kind in ("flock", "lockf"):
    path = f"{folder}/{kind}.lock"
    process = subprocess.Popen([sys.executable, f"{folder}/run.py", kind, path], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"running\n"
    process.kill()
    process.wait()
    free, began = is_free(kind, path), time.perf_counter()
    while not is_free(kind, path):
        time.sleep(0.1)
        assert time.perf_counter() - began < 30
    told.append(f"{kind}: {'free behind the kill' if free else 'held behind the kill, free after some seconds'}")
    assert free == (kind == "lockf")
print("      ".join(told))
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.3.4
"$folder/env/bin/python" "$folder/probe.py" "$folder"
