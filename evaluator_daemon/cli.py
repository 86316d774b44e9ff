"""The `evaluator-daemon` command. Each verb imports what it needs: --help must not wait for torch or pydantic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from evaluator_daemon.verbs import compare, evaluate, inspect, metrics, retry, run, watch
from shared.verbs import Verb, run_verb, settings_verb

if TYPE_CHECKING:
    from evaluator_daemon.settings import EvaluatorSettings


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the console command; exits with the codes of `shared.errors`."""
    verbs = (
        Verb("run", "watch a study folder and score every checkpoint", run.declare),
        Verb("evaluate", "score weight files, or the checkpoints of one trial", evaluate.declare),
        Verb("compare", "say which of several checkpoints is better, and whether it can be told", compare.declare),
        Verb("retry", "lift the quarantine of a trial's checkpoints", retry.declare),
        Verb("watch", "show a study live, or as text or JSON", watch.declare),
        Verb("inspect", "prove that LoRA files are whole and fit to be scored", inspect.declare),
        Verb("metrics", "show what can be measured here and what is missing for the rest", metrics.declare),
        settings_verb(_settings_model),
    )
    run_verb("evaluator-daemon", "Render and score every checkpoint of a study as it lands.", verbs, argv)


def _settings_model() -> type[EvaluatorSettings]:
    from evaluator_daemon.settings import EvaluatorSettings

    return EvaluatorSettings


if __name__ == "__main__":
    main()
