"""`evaluator-daemon metrics`: what can be measured here, and what is missing for the rest."""

from __future__ import annotations

import argparse
import json
import math
from typing import TYPE_CHECKING, Any

from shared.verbs import Run

if TYPE_CHECKING:
    from evaluator_daemon.settings import EvaluatorSettings
    from shared.metric_names import MetricInputs


def declare(parser: argparse.ArgumentParser) -> Run:
    """Add the flags of the verb to its parser and return what runs it."""
    from evaluator_daemon.settings import EvaluatorSettings
    from shared.settings import add_settings_flags

    parser.description = (
        "Show every metric with its version, direction, range, licence, weights and state with these settings, or with "
        "those of the study in --optimization-dir. Only files are looked at; no network is loaded."
    )
    add_settings_flags(parser, EvaluatorSettings)
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    return _metrics


def _metrics(arguments: argparse.Namespace) -> int:
    from evaluator_daemon.metrics import METRICS
    from evaluator_daemon.settings import EvaluatorSettings
    from shared.settings import load_settings

    inputs, measured = _inputs(load_settings(EvaluatorSettings, arguments).settings)
    rows = [_row(name, inputs, measured) for name in METRICS.names]
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        print("\n\n".join(_as_text(row) for row in rows))
    return 0


def _inputs(settings: EvaluatorSettings) -> tuple[MetricInputs, tuple[str, ...] | None]:
    """Return what flags and study give, and what the study measures; None where there is no study."""
    from evaluator_daemon.job import inputs_of_flags, inputs_of_run, read_run
    from shared.errors import SettingsError
    from shared.layout import StudyLayout
    from shared.scoring_presets import metrics_of

    folder = settings.optimization_dir
    if folder is not None and not folder.is_dir():
        raise SettingsError("--optimization-dir", str(folder), "there is no such folder; name the study folder")
    run = None if folder is None else read_run(StudyLayout(folder))
    if run is None or run.plan is None:
        return inputs_of_flags(settings), None
    return inputs_of_run(settings, run), metrics_of(run.plan)


def _row(name: str, inputs: MetricInputs, measured: tuple[str, ...] | None) -> dict[str, Any]:
    from evaluator_daemon.metrics import plugin

    metric = plugin(name)
    facts, missing = metric.facts, metric.why_not(inputs)
    return {
        "name": name,
        "version": facts.version,
        "state": f"unavailable: {missing}" if missing else "ok",
        "measured_by_the_study": None if measured is None else name in measured,
        "quantities": {
            quantity: {
                "direction": is_.direction,
                "range": [end if math.isfinite(end) else None for end in (is_.low, is_.high)],
                "meaning": is_.meaning,
            }
            for quantity, is_ in facts.quantities.items()
        },
        "source": facts.source,
        "needs": list(facts.needs),
        "code_licence": facts.code_licence,
        "weights": facts.weights,
        "weights_licence": facts.weights_licence,
        "get": facts.get,
    }


def _as_text(row: dict[str, Any]) -> str:
    study = {None: "", True: ", measured by this study", False: ", not measured by this study"}
    lines = [f"{row['name']}  version {row['version']}{study[row['measured_by_the_study']]}", f"  {row['state']}"]
    for name, quantity in row["quantities"].items():
        low, high = ("any" if end is None else f"{end:g}" for end in quantity["range"])
        lines.append(f"  {name:20} {quantity['direction']:9} {f'{low} to {high}':12} {quantity['meaning']}")
    lines.append(f"  defined by: {row['source']}")
    lines.append(f"  code: {row['code_licence']}; weights: {row['weights']}; their licence: {row['weights_licence']}")
    if row["needs"]:
        lines += [f"  needs: {', '.join(row['needs'])}", f"  to get it: {row['get']}"]
    return "\n".join(lines)
