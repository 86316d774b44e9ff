"""Verbs that both commands have."""

from __future__ import annotations

import argparse
import json
from typing import Any

from shared.settings import DaemonSettings, add_settings_flags, describe_settings, load_settings


def add_settings_verb(verbs: Any, model: type[DaemonSettings]) -> None:
    """Add `settings`: show every effective setting and where it comes from."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "settings",
        help="show the effective settings and where each comes from",
        description="Show every setting as flags, environment, study file and defaults leave it, and its origin.",
    )
    add_settings_flags(parser, model)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(verb=lambda arguments: _show_settings(model, arguments))


def _show_settings(model: type[DaemonSettings], arguments: argparse.Namespace) -> int:
    rows = describe_settings(load_settings(model, arguments))
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    width = max(len(row["field"]) for row in rows)
    for row in rows:
        value = "-" if row["value"] is None else row["value"]
        print(f"{row['field']:{width}}  {value}  ({row['origin']})")
    return 0
