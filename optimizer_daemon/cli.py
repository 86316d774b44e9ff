"""The `optimizer-daemon` command. Each verb imports what it needs: --help must not wait for Optuna or pydantic."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from shared.verbs import Verb, run_verb, settings_verb

if TYPE_CHECKING:
    from optimizer_daemon.settings import OptimizerSettings

Run = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the console command; exits with the codes of `shared.errors`."""
    verbs = (
        Verb("run", "run a study, or continue it", _declare_run),
        Verb("status", "show a study and its best trials", _declare_status),
        settings_verb(_settings_model),
    )
    run_verb("optimizer-daemon", "Search LoRA hyperparameters: draw, train, prune and rank trials.", verbs, argv)


def _settings_model() -> type[OptimizerSettings]:
    from optimizer_daemon.settings import OptimizerSettings

    return OptimizerSettings


def _declare_run(parser: argparse.ArgumentParser) -> Run:
    from shared.settings import add_settings_flags

    parser.description = (
        "Run the study in --output-dir until --n-trials trials are finished. Ctrl-C stops in order, twice at once; the "
        "same command again goes on where it stopped."
    )
    add_settings_flags(parser, _settings_model())
    return _run


def _declare_status(parser: argparse.ArgumentParser) -> Run:
    from shared.settings import add_settings_flags

    parser.description = "Show how far the study in --output-dir is, whether or not a daemon lives."
    add_settings_flags(parser, _settings_model())
    parser.add_argument("--top", type=int, default=10, metavar="N", help="how many of the best trials (default: 10)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return _status


def _run(arguments: argparse.Namespace) -> int:
    from optimizer_daemon.daemon import OptimizerDaemon
    from optimizer_daemon.settings import load_optimizer_settings

    OptimizerDaemon(load_optimizer_settings(arguments)).run()
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from optimizer_daemon.settings import load_optimizer_settings
    from optimizer_daemon.status import status_text, study_status
    from shared.errors import SettingsError
    from shared.layout import StudyLayout

    settings = load_optimizer_settings(arguments)
    if settings.output_dir is None:
        raise SettingsError("--output-dir", None, "name the study folder")
    status = study_status(StudyLayout(settings.output_dir.absolute()), arguments.top)
    print(json.dumps(status, indent=2) if arguments.json else status_text(status))
    return 0


if __name__ == "__main__":
    main()
