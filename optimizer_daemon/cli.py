"""The `optimizer-daemon` command. Each verb imports what it needs: --help must not wait for Optuna or pydantic."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from shared.verbs import Run, Verb, run_verb, settings_verb

if TYPE_CHECKING:
    from optimizer_daemon.settings import OptimizerSettings
    from shared.layout import StudyLayout
    from shared.schemas.requests import Request


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the console command; exits with the codes of `shared.errors`."""
    verbs = (
        Verb("run", "run a study, or continue it", _declare_run),
        Verb("check", "look at a study's space and input before it begins; needs no GPU", _declare_check),
        Verb("status", "show a study and its best trials", _declare_status),
        Verb("analyze", "write tables, pictures and the report of what a study found", _declare_analyze),
        Verb("pause", "start no more trials; what trains goes on", _declare_pause),
        Verb("resume", "start trials again after a pause", _declare_resume),
        Verb("stop", "stop in order; the next run goes on where it stopped", _declare_stop),
        Verb("set", "change n-trials or timeout of the running study", _declare_set),
        Verb("enqueue", "train a configuration of your own next", _declare_enqueue),
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


def _declare_check(parser: argparse.ArgumentParser) -> Run:
    from shared.settings import add_settings_flags

    parser.description = (
        "Look at everything a study is given, before it begins and without a GPU: how much of the search space its "
        "rules leave, rules that never fire, values nobody can reach, ten configurations as they would be drawn, the "
        "trainer's command and the disk that is needed. Nothing is written."
    )
    add_settings_flags(parser, _settings_model())
    parser.add_argument("--json", action="store_true", help="print JSON")
    return _check


def _declare_status(parser: argparse.ArgumentParser) -> Run:
    from shared.settings import add_settings_flags

    parser.description = "Show how far the study in --output-dir is, whether or not a daemon lives."
    add_settings_flags(parser, _settings_model())
    parser.add_argument("--top", type=int, default=10, metavar="N", help="how many of the best trials (default: 10)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return _status


def _declare_analyze(parser: argparse.ArgumentParser) -> Run:
    parser.description = (
        "Write every file of results/ anew: statistics, tables, pictures, OPTIMIZATION_REPORT.md and the winner's "
        "training configuration. A running study does so after each trial. Missing and damaged files are named."
    )
    _declare_study(parser)
    parser.add_argument("--results-dir", type=Path, metavar="DIR", help="study folder, the same as --output-dir")
    parser.add_argument("--top-n", type=int, default=10, metavar="N", help="trials in the table (default: 10)")
    parser.add_argument("--json", action="store_true", help="print summary_statistics.json")
    return _analyze


def _declare_pause(parser: argparse.ArgumentParser) -> Run:
    parser.description = (
        "Have the running daemon start no more trials; the one that trains goes on and is scored. It lasts until "
        "`resume`, or until the daemon ends: `run` starts trials again."
    )
    _declare_study(parser)

    def pause(arguments: argparse.Namespace) -> int:
        from shared.schemas import Pause

        return _ask(arguments, Pause(kind="pause", asked_by="optimizer-daemon pause"))

    return pause


def _declare_resume(parser: argparse.ArgumentParser) -> Run:
    parser.description = "Have a paused daemon start trials again."
    _declare_study(parser)

    def resume(arguments: argparse.Namespace) -> int:
        from shared.schemas import Resume

        return _ask(arguments, Resume(kind="resume", asked_by="optimizer-daemon resume"))

    return resume


def _declare_stop(parser: argparse.ArgumentParser) -> Run:
    parser.description = (
        "Stop the running daemon in order, as SIGTERM does: the training saves its state and goes on at the next run. "
        "Returns when everything has stopped; the daemon exits with 0. Where no daemon runs, trainings that a killed "
        "one left are ended the same way."
    )
    _declare_study(parser)

    def stop(arguments: argparse.Namespace) -> int:
        from shared.schemas import Stop

        return _ask(arguments, Stop(kind="stop", asked_by="optimizer-daemon stop"))

    return stop


def _declare_set(parser: argparse.ArgumentParser) -> Run:
    parser.description = "Change settings of the running daemon until it ends: n-trials and timeout."
    _declare_study(parser)
    parser.add_argument("settings", nargs="+", metavar="NAME=VALUE", help="such as n-trials=50")

    def set_(arguments: argparse.Namespace) -> int:
        from shared.schemas import Set

        settings = _pairs(arguments.settings)
        return _ask(arguments, Set(kind="set", settings=settings, asked_by="optimizer-daemon set"))

    return set_


def _declare_enqueue(parser: argparse.ArgumentParser) -> Run:
    parser.description = (
        "Train a configuration of your own before the sampler draws again; parameters you leave out are drawn so that "
        "no rule of the search space is broken. Works whether or not the daemon runs."
    )
    _declare_study(parser)
    parser.add_argument("parameters", nargs="*", metavar="NAME=VALUE", help="such as learning_rate=1e-4")
    parser.add_argument(
        "--finalist-of", type=int, metavar="N", help="train the configuration of trial N again, with a fresh seed"
    )
    parser.add_argument(
        "--training-seed", type=int, metavar="N", help="seed of its training (default: the study's; a finalist's own)"
    )

    def enqueue(arguments: argparse.Namespace) -> int:
        from shared.errors import SettingsError
        from shared.schemas import Enqueue

        seed = arguments.training_seed
        if seed is not None and seed < 0:
            raise SettingsError("--training-seed", seed, "write 0 or more")
        of = arguments.finalist_of
        if of is not None and of < 1:
            raise SettingsError("--finalist-of", of, "trials are counted from 1")
        if of is None and not arguments.parameters:
            raise SettingsError("NAME=VALUE", None, "write the parameters you want, or a trial by --finalist-of")
        command = Enqueue(
            kind="enqueue",
            parameters=_pairs(arguments.parameters),
            finalist_of=of,
            training_seed=seed,
            asked_by="optimizer-daemon enqueue",
        )
        return _ask(arguments, command)

    return enqueue


def _declare_study(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="study file (TOML) that names the study folder")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="study folder")


def _pairs(words: Sequence[str]) -> dict[str, bool | int | float | str]:
    """Read NAME=VALUE words; a value is a number, true, false or text."""
    from shared.errors import SettingsError

    values: dict[str, bool | int | float | str] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not (name and equals and text) or name in values:
            raise SettingsError(word, text, "write each as NAME=VALUE, once")
        try:
            value = json.loads(text, parse_constant=str)  # NaN is no number anybody can train with
        except ValueError:
            value = text
        values[name] = value if isinstance(value, bool | int | float | str) else text
    return values


def _ask(arguments: argparse.Namespace, command: Request) -> int:
    from optimizer_daemon.commands import ask

    print(ask(_study(arguments), command))
    return 0


def _study(arguments: argparse.Namespace) -> StudyLayout:
    """Return the study that the settings name."""
    from optimizer_daemon.settings import load_optimizer_settings
    from shared.errors import SettingsError
    from shared.layout import StudyLayout

    folder = load_optimizer_settings(arguments).output_dir
    if folder is None:
        raise SettingsError("--output-dir", None, "name the study folder")
    return StudyLayout(folder.absolute())


def _run(arguments: argparse.Namespace) -> int:
    from optimizer_daemon.settings import load_optimizer_settings

    settings = load_optimizer_settings(arguments)
    from optimizer_daemon.daemon import OptimizerDaemon  # a second of Optuna, so wrong settings are told before

    OptimizerDaemon(settings).run()
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from optimizer_daemon.settings import load_optimizer_settings

    settings = load_optimizer_settings(arguments)
    from optimizer_daemon.check import check, check_text

    found = check(settings)
    print(json.dumps(found, indent=2) if arguments.json else check_text(found))
    return 0


def _analyze(arguments: argparse.Namespace) -> int:
    from optimizer_daemon.commands import ask
    from shared.errors import SettingsError
    from shared.layout import StudyLayout
    from shared.schemas import Analyze

    if arguments.top_n < 1:
        raise SettingsError("--top-n", arguments.top_n, "show one trial or more")
    folder = arguments.results_dir
    study = _study(arguments) if folder is None else StudyLayout(folder.absolute())
    said = ask(study, Analyze(kind="analyze", top_n=arguments.top_n, asked_by="optimizer-daemon analyze"))
    if arguments.json:
        print(study.results.summary_statistics.read_text(), end="")
        return 0
    print(study.results.optimization_report.read_text().partition("\n## ")[0].strip())
    print(f"\n{said}")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from optimizer_daemon.status import status_text, study_status
    from shared.errors import SettingsError

    if arguments.top < 1:
        raise SettingsError("--top", arguments.top, "show one trial or more")
    status = study_status(_study(arguments), arguments.top)
    print(json.dumps(status, indent=2) if arguments.json else status_text(status))
    return 0


if __name__ == "__main__":
    main()
