"""`evaluator-daemon inspect`: is a file whole, and is it a LoRA?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from shared.verbs import Run


def declare(parser: argparse.ArgumentParser) -> Run:
    """Add the flags of the verb to its parser and return what runs it."""
    parser.description = (
        "Say for each file whether it is complete, unaltered, finite and a LoRA. Exit code 3 when any file is not."
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="*.safetensors file")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    return _inspect


def _inspect(arguments: argparse.Namespace) -> int:
    from shared.errors import CheckpointError

    rows = [_inspect_file(file) for file in arguments.files]
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            print(_as_line(row))
    return 0 if all(row["code"] == "ok" for row in rows) else CheckpointError.exit_code


def _inspect_file(file: Path) -> dict[str, Any]:
    from shared.errors import CheckpointError
    from shared.layout import checkpoint_epoch
    from shared.safetensors_file import lora_modules, read_checkpoint

    try:
        checkpoint = read_checkpoint(file, file.parent)
        layout = lora_modules(checkpoint)
    except CheckpointError as error:
        return {"file": str(file), "code": error.code, "reason": error.reason}
    return {
        "file": str(file),
        "code": "ok",
        "family": layout.family,
        "modules": len(layout.modules),
        "ranks": sorted(layout.ranks),
        "epoch": checkpoint_epoch(file.name, checkpoint.epoch, None, ""),
        "size_bytes": checkpoint.size,
        "sha256": checkpoint.sha256,
    }


def _as_line(row: dict[str, Any]) -> str:
    if row["code"] != "ok":
        return f"{row['file']}: {row['code']}: {row['reason']}"
    epoch = "unknown" if row["epoch"] is None else row["epoch"]
    return (
        f"{row['file']}: ok, {row['family']}, {row['modules']} modules, rank {'/'.join(map(str, row['ranks']))}, "
        f"epoch {epoch}, {row['size_bytes'] / 1e6:.1f} MB, sha256 {row['sha256'][:12]}"
    )
