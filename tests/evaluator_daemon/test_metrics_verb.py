"""`evaluator-daemon metrics`: the state of every metric, judged from files alone."""

from __future__ import annotations

import json
import subprocess
import sys

from evaluator_daemon.metrics import METRICS


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys; sys.argv[0] = 'evaluator-daemon'\nimport atexit\n"
        "atexit.register(lambda: print('LOADED', *({'torch', 'transformers', 'lpips'} & set(sys.modules)),"
        " file=sys.stderr))\nfrom evaluator_daemon.cli import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-c", code, "metrics", *arguments], capture_output=True, text=True, check=False
    )


def test_every_metric_is_listed_with_its_state_and_nothing_heavy_is_imported(clip_model, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes(b"only its bytes count here")
    result = run("--json", "--clip-model", str(clip_model), "--reference-pictures", str(pictures))
    assert result.returncode == 0, result.stderr
    assert result.stderr.strip() == "LOADED"
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert sorted(rows) == METRICS.names
    ok = {name for name, row in rows.items() if row["state"] == "ok"}
    assert ok == {"pixels", "clip_consistency", "clip_image", "style_distance"}
    assert "--dino-model" in rows["dino_likeness"]["state"]
    assert "alexnet-owt-7be5be79.pth" in rows["lpips_diversity"]["state"]
    assert all(row["quantities"] and row["version"] and row["source"] for row in rows.values())


def test_the_table_for_people_names_licence_and_where_to_get_the_weights():
    text = run().stdout
    for wanted in ("Apache-2.0", "BSD-3-Clause", "to get it: download", "unavailable: ", "minimise", "0 to 1"):
        assert wanted in text


def test_a_folder_without_pictures_is_bad_input(tmp_path):
    result = run("--reference-pictures", str(tmp_path))
    assert result.returncode == 2
    assert "--reference-pictures" in result.stderr
    assert "Traceback" not in result.stderr
