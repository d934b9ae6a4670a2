"""The script for a lent GPU runs from end to end on a CPU with tiny settings, so that it works the first time."""

import json
import os
import subprocess
from pathlib import Path

from conftest import CONFIGS, words
from forked import program
from test_export import save_model

SCRIPT = Path(__file__).parent.parent / "benchmarks/gpu.sh"


def test_everything_is_made_and_measured(tmp_path):
    save_model(CONFIGS["mha"], tmp_path / "dense")
    (tmp_path / "text.txt").write_text("\n\n".join(words(40, seed) for seed in range(600)))
    small = {"CALIBRATED": "2048", "TUNE": "1", "BATCH": "2"}
    command = ["bash", SCRIPT, tmp_path / "dense", tmp_path / "text.txt", tmp_path / "out", "1024"]
    with program() as folder:
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        subprocess.run(command, check=True, env=os.environ | small | {"PATH": path}, capture_output=True)
    for name in ("student", "pruned"):
        assert (tmp_path / "out" / f"{name}-healed" / "config.json").exists()
        measured = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert measured["perplexity"].keys() == {"student", "dense"}
    steps = [line.split()[0] for line in (tmp_path / "out/times.txt").read_text().splitlines()]
    made = ["student", "student-healed", "student-text", "pruned", "pruned-healed", "pruned-text"]
    assert steps == made
