"""What a study of several objectives optimises: scores, and quantities by their distance to a target or as they are.

Pure: names and a plan in, objectives out; measurements in, values out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from shared.errors import SettingsError
from shared.schemas import EvaluationPlan, Metrics, Objective, Run
from shared.schemas.optimizer import Direction
from shared.scoring_presets import COMBINED_SCORE, SOURCE_OF, metrics_of, terms_of

FLAG = "--objectives"

SCORES: Mapping[str, Direction] = {
    COMBINED_SCORE: "minimise",
    "brightness_score": "minimise",
    "contrast_score": "minimise",
    "pixar_style_score": "maximise",
}
"""Scores that are written for every checkpoint, beside the scoring's own."""

BETTER: Mapping[str, Direction] = {
    "sharpness": "maximise",
    "clip_consistency": "maximise",
    "prompt_match": "maximise",
    "clip_image": "maximise",
    "dino_likeness": "maximise",
    "style_distance": "minimise",
}
"""Quantities whose better end needs no target; all others are measured by their distance to one."""

USUAL_TARGETS: Mapping[str, float] = {"saturation": 0.40}
"""Where no scoring names one: the middle of the band that pixar_style_score asks for."""


def objectives_of(names: str | None, plan: EvaluationPlan) -> tuple[Objective, ...]:
    """Return the objectives that `--objectives` names; none for a study that optimises its scoring's one score.

    Raises:
        SettingsError: a name is unknown, not measured or doubled, or there is only one.
    """
    if names is None:
        return ()
    known = possible(plan)
    chosen = split(names)
    choose = f"name two or more of {', '.join(known)}"
    for name in chosen:
        if name not in known:
            raise SettingsError(FLAG, names, f"{_why_not(name)}; {choose}")
        if chosen.count(name) > 1:
            raise SettingsError(FLAG, names, f"{name} is named twice; {choose}")
    if len(chosen) < 2:
        what = "one objective is what --scoring is for" if chosen else "there is no name in it"
        raise SettingsError(FLAG, names, f"{what}; {choose}, or leave the flag out")
    return tuple(known[name] for name in chosen)


def split(names: str) -> list[str]:
    """Return the names between the commas."""
    return [name.strip() for name in names.split(",") if name.strip()]


def objectives_of_run(run: Run) -> tuple[Objective, ...]:
    """Return the objectives of a study that has begun."""
    names = run.settings.get("objectives")
    return objectives_of(names, run.plan) if isinstance(names, str) and run.plan is not None else ()


def possible(plan: EvaluationPlan) -> dict[str, Objective]:
    """Return everything that this plan measures and that can be called better or worse, by name."""
    scoring, measured = plan.scoring, metrics_of(plan)
    scores = {**SCORES, scoring.objective: SCORES.get(scoring.objective, "minimise")}
    found = {name: Objective(name=name, direction=direction) for name, direction in scores.items()}
    targets = {
        **USUAL_TARGETS,
        **{
            name.removeprefix("target."): float(value)
            for name, value in scoring.values.items()
            if name.startswith("target.")
        },
        **{
            term.metric: term.target
            for term in terms_of(scoring).values()
            if term.kind == "distance_to_target" and isinstance(term.target, float)
        },
    }
    for name, source in SOURCE_OF.items():
        if source not in measured or name in found:
            continue
        if name in targets:
            found[name] = Objective(name=name, direction="minimise", target=targets[name])
        elif name in BETTER:
            found[name] = Objective(name=name, direction=BETTER[name])
    return found


def _why_not(name: str) -> str:
    if name not in SOURCE_OF:
        return f"there is no {name!r}"
    if name in BETTER:
        return f"{name} is not measured in this study (--metrics)"
    return f"{name} is not measured in this study, or its scoring names no target for it"


def measured_values(objectives: Iterable[Objective], metrics: Metrics) -> dict[str, float]:
    """Return each objective's value for one checkpoint; what could not be measured is left out."""
    found = {}
    for objective in objectives:
        score, metric = metrics.scores.get(objective.name), metrics.metrics.get(objective.name)
        value = score.value if score is not None else None if metric is None else metric.value
        if value is not None:
            found[objective.name] = value if objective.target is None else abs(value - objective.target)
    return found


def losses(values: Mapping[str, float], objectives: Iterable[Objective]) -> tuple[float, ...]:
    """Return the values in the objectives' order, signed so that lower is better."""
    return tuple(
        values[objective.name] if objective.direction == "minimise" else -values[objective.name]
        for objective in objectives
    )
