"""The live terminal view of a study, and its plain text where there is no terminal to draw on."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import termios
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from evaluator_daemon.overview import (
    MAIN_PARAMETERS,
    EvaluatorAtWork,
    Gpu,
    Overview,
    Point,
    TrialOverview,
    Trouble,
    best_point,
)
from evaluator_daemon.snapshot import StudyReader
from evaluator_daemon.sparkline import sparkline
from shared.durations import duration
from shared.errors import Stopped
from shared.service import Service

DEFAULT_INTERVAL_S = 5.0
PLAIN_WIDTH = 120
PLAIN_TRIALS = 40
"""How many trials plain text shows; --json has them all."""

_COLUMNS = (  # from this width on, the columns shown, and how many characters a curve has
    (100, ("trial", "state", "epochs", "scored", "curve", "best", "gate", "s/it", "left", "parameters"), 16),
    (72, ("trial", "state", "epochs", "scored", "curve", "best", "gate", "left"), 10),
    (0, ("trial", "state", "curve", "best"), 8),
)
_RIGHT = ("trial", "epochs", "scored", "s/it", "left")
_HIGH = 20  # lines; a lower terminal cuts what a higher one wraps
_WRAPPED_LINES = 2  # of a long line, and of unreadable files; plain text holds all of it

_STATES = {  # state in trial_state.json -> as it is called here, style
    "training": ("training", "bold cyan"),
    "trained": ("scoring", "bold yellow"),
    "interrupted": ("interrupted", "yellow"),
    "drawn": ("drawn", "cyan"),
    "complete": ("complete", "green"),
    "pruned": ("pruned", "dim"),
    "failed": ("failed", "red"),
}


@dataclass(frozen=True)
class Marks:
    """The characters a curve is drawn with: bars from low to high, the best, one that failed its gate, no score."""

    bars: str
    best: str
    failed: str
    gap: str


BLOCKS = Marks("▁▂▃▄▅▆▇█", "◆", "x", "·")
ASCII = Marks("_.:-=+#@", "*", "x", "?")


def watch(reader: StudyReader, interval_s: float | None, stream: TextIO = sys.stdout) -> int:
    """Show a study until a signal asks to stop.

    A terminal that can be drawn on gets the live view. Anything else, such as a pipe or TERM=dumb, gets plain text:
    once, or every `interval_s` seconds where that was asked for.

    Args:
        interval_s: seconds between two looks; None for the default of a terminal.
    Returns:
        The exit status: 0, or that of the signal.
    """
    if not is_live(stream):
        return watch_plainly(reader, interval_s, stream)
    service = Service()
    try:
        with _wakes_on_resize(service), _quiet_keys(sys.stdin), _screen(stream) as live:

            def draw() -> None:
                overview = reader.look(datetime.now().astimezone())
                live.update(screen(overview, live.console, marks_for(stream)), refresh=True)

            service.run(draw, interval_s or DEFAULT_INTERVAL_S)
    except Stopped as stop:
        return stop.exit_code  # how one leaves the view: nothing to complain about
    return 0


def watch_plainly(reader: StudyReader, interval_s: float | None, stream: TextIO) -> int:
    """Print the study as plain text, once or every `interval_s` seconds; see `watch`."""
    if interval_s is None:
        print(plain_text(reader.look(datetime.now().astimezone()), marks_for(stream)), file=stream)
        return 0

    def say() -> None:
        print(plain_text(reader.look(datetime.now().astimezone()), marks_for(stream)), "", sep="\n", file=stream)
        stream.flush()

    try:
        Service().run(say, interval_s)
    except Stopped as stop:
        return stop.exit_code
    return 0


def is_live(stream: TextIO) -> bool:
    """Whether somebody looks at `stream` through a terminal whose cursor can be moved."""
    return stream.isatty() and os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown")


def marks_for(stream: TextIO) -> Marks:
    """Return the characters that the stream's encoding can hold."""
    try:
        "".join((BLOCKS.bars, BLOCKS.best, BLOCKS.gap)).encode(stream.encoding or "ascii")
    except UnicodeEncodeError:
        return ASCII
    return BLOCKS


# --------------------------------------------------------------------------------------------------------- whole views


def plain_text(overview: Overview, marks: Marks = BLOCKS) -> str:
    """Return the view as lines of text without any escape codes."""
    buffer = io.StringIO()
    console = Console(file=buffer, width=PLAIN_WIDTH, color_system=None, force_terminal=False, _environ={})
    for line in _head(overview):
        console.print(line, soft_wrap=True)
    console.print()
    console.print(_table(overview, PLAIN_WIDTH, PLAIN_TRIALS, marks))
    for line in [*_hidden(overview, PLAIN_TRIALS), *_foot(overview, marks, len(overview.unreadable))]:
        console.print(line, soft_wrap=True)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def screen(overview: Overview, console: Console, marks: Marks = BLOCKS) -> Group:
    """Return the view, no higher than the console: what does not fit of the trials is counted instead."""
    width, height = console.size
    most = _WRAPPED_LINES if height >= _HIGH else 1
    head = [part for line in _head(overview) for part in _wrapped(line, console, width, most)]
    foot = [part for line in _foot(overview, marks, most) for part in _wrapped(line, console, width, most)]
    room = max(0, height - len(head) - len(foot) - 3)  # a blank line on either side, and the table's header
    rows = room if len(overview.trials) <= room else max(0, room - 1)
    hidden = [_cut(line, width) for line in _hidden(overview, rows)]
    return Group(*head, Text(), _table(overview, width, rows, marks), *hidden, Text(), *foot)


# --------------------------------------------------------------------------------------------------------------- parts


def _head(overview: Overview) -> list[Text]:
    title = Text.assemble(
        (_clean(overview.study), "bold"), f"  {overview.time:%Y-%m-%d %H:%M:%S}  ", (_clean(overview.folder), "dim")
    )
    lines = [title, _daemons(overview)]
    lines += [_gpu(gpu) for gpu in overview.gpus]
    lines += [_queue(overview), _best(overview)]
    if overview.last_quarantine is not None:
        lines.append(_labelled(f"{overview.quarantined} quarantined", overview.last_quarantine, "yellow"))
    return lines


def _daemons(overview: Overview) -> Text:
    line = Text(f"study {overview.status}  ")
    for name, alive in (("optimizer", overview.optimizer_alive), ("evaluator", overview.evaluator_alive)):
        told, style = {True: ("runs", "green"), False: ("not running", "dim"), None: ("unknown", "red")}[alive]
        line.append(f"{name} ").append(told, style)
        if name == "evaluator" and alive and overview.device is not None:
            line.append(f" on {overview.device}")
        line.append("  ")
    of_target = "" if overview.target is None else f" of {overview.target}"
    line.append(f"{overview.finished}{of_target} trials finished")
    if overview.failed:
        line.append(", ").append(f"{overview.failed} failed", "red")
    if overview.eta_s:
        line.append(f"  about {duration(overview.eta_s)} {'left' if overview.optimizer_alive else 'of work left'}")
    return line


def _gpu(gpu: Gpu) -> Text:
    used, total, percent = (
        "?" if value is None else str(value)
        for value in (gpu.memory_used_mib, gpu.memory_total_mib, gpu.utilisation_percent)
    )
    return Text(f"GPU {gpu.index} {_clean(gpu.name)}  {used}/{total} MiB  {percent} % busy")


def _queue(overview: Overview) -> Text:
    queue = overview.queue
    parts = [f"{queue.waiting} checkpoints {'waiting' if queue.proven else 'unscored'}"]
    parts += [_at_work(evaluator) for evaluator in queue.evaluators]
    parts += [f"{queue.deferred} deferred"] if queue.deferred else []
    return Text(f"queue  {'  '.join(parts)}")


def _at_work(evaluator: EvaluatorAtWork) -> str:
    if evaluator.activity == "evaluating":
        return f"{_clean(evaluator.trial)} scores {_clean(evaluator.checkpoint or 'a checkpoint')}"
    return f"{_clean(evaluator.trial)} {evaluator.activity}"


def _best(overview: Overview) -> Text:
    objective, best = overview.objective, overview.best
    better = "lower" if objective.direction == "minimise" else "higher"
    line = Text.assemble("best   ", f"{_clean(objective.name)}, {better} is better: ")
    if best is None:
        return line.append("nothing has passed its gate yet" if _any_score(overview) else "nothing is scored yet")
    epoch = "" if best.epoch is None else f" epoch {best.epoch}"
    line.append(f"{best.score:.4f}", "bold green").append(f"  {_clean(best.trial)}{epoch}  {_clean(best.checkpoint)}")
    if not best.file_exists:
        line.append(" (file removed)")
    won = next((trial for trial in overview.trials if trial.name == overview.winner), None)
    if won is not None and won.value is not None and not (best.final and best.trial == won.name):
        kind = "final" if won.finalist_of is None else "finalist"
        line.append(f"  best {kind} {won.value:.4f} {_clean(won.name)}")
    return line


def _any_score(overview: Overview) -> bool:
    return any(trial.scored for trial in overview.trials)


def _table(overview: Overview, width: int, rows: int, marks: Marks) -> Table:
    columns, curve_width = next((names, curve) for least, names, curve in _COLUMNS if width >= least)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", expand=False)
    for name in columns:
        right = name in _RIGHT
        table.add_column(name, no_wrap=True, overflow="ellipsis", justify="right" if right else "left")
    for trial in overview.trials[:rows]:
        cells = _cells(trial, overview, marks, curve_width)
        table.add_row(*(cells[name] for name in columns))
    return table


def _cells(trial: TrialOverview, overview: Overview, marks: Marks, curve_width: int) -> dict[str, Text]:
    # a curve on which nothing passed its gate still has a lowest point, shown as such
    best = trial.best or best_point((_without_gate(trial)), overview.objective)
    curve = sparkline(
        trial.curve,
        trial.best,
        overview.objective,
        curve_width,
        marks.bars,
        best_mark=marks.best,
        failed_mark=marks.failed,
        gap_mark=marks.gap,
    )
    drawn = Text(curve, "cyan")
    drawn.highlight_words([marks.best], "bold green")
    drawn.highlight_words([marks.failed], "red")
    score = "-" if best is None or best.score is None else f"{best.score:.4f}"
    at = "" if best is None or best.epoch is None else f" @{best.epoch}"
    feasible = trial.feasible if trial.feasible is not None else _passed(trial)
    told, style = {True: ("ok", "green"), False: ("failed", "red"), None: ("-", "dim")}[feasible]
    training = trial.training
    per_step = training.seconds_per_step if training is not None else None
    eta_s = training.eta_s if training is not None else None
    return {
        "trial": Text(_clean(trial.label)),
        "state": _state(trial, overview),
        "epochs": Text(_of(trial.epochs_done, trial.epochs)),
        "scored": Text(_of(trial.scored, trial.checkpoints_expected)),
        "curve": drawn,
        "best": Text(f"{score}{at}", "green" if trial.best is not None else "dim"),
        "gate": Text(told, style),
        "s/it": Text("" if per_step is None else f"{per_step:.3g}"),
        "left": Text("" if eta_s is None else duration(eta_s)),
        "parameters": Text(_parameters(trial), "dim"),
    }


def _without_gate(trial: TrialOverview) -> Iterator[Point]:
    return (Point(p.checkpoint, p.epoch, p.score, None) for p in trial.curve)


def _passed(trial: TrialOverview) -> bool | None:
    """Whether any checkpoint passed its gate so far; None while nothing is scored."""
    if trial.best is not None:
        return True
    return False if trial.scored else None


def _state(trial: TrialOverview, overview: Overview) -> Text:
    name, style = _STATES.get(trial.state or "", ("-", "dim"))
    training = trial.training
    if training is not None and training.preparing is not None:
        return Text(f"{_clean(training.preparing)} {training.step}/{training.steps}", style)
    if trial.state == "training" and not trial.trainer_alive and not overview.optimizer_alive:
        return Text("not running", "yellow")
    if trial.state is None and trial.trainer_alive:
        return Text("training", "bold cyan")
    return Text(name, style)


def _of(done: int | None, everything: int | None) -> str:
    return f"{'?' if done is None else done}/{'?' if everything is None else everything}"


def _parameters(trial: TrialOverview) -> str:
    shown = ((short, trial.parameters[name]) for name, short in MAIN_PARAMETERS.items() if name in trial.parameters)
    return _clean(" ".join(f"{short} {f'{v:.3g}' if isinstance(v, float) else v}" for short, v in shown))


def _hidden(overview: Overview, rows: int) -> list[Text]:
    count = len(overview.trials) - min(rows, len(overview.trials))
    return [Text(f"{count} more trials are not shown", "dim")] if count else []


def _foot(overview: Overview, marks: Marks, most_unreadable: int) -> list[Text]:
    lines = []
    if overview.last_error is not None:
        lines.append(_labelled("last error", overview.last_error, "red"))
    lines += [Text(f"unreadable  {_clean(sentence)}", "red") for sentence in overview.unreadable[:most_unreadable]]
    if more := len(overview.unreadable) - most_unreadable:
        lines += [Text(f"unreadable  {more} more files", "red")] if more > 0 else []
    if not overview.trials:
        lines.append(Text("no trial has begun yet"))
    low = "low" if overview.objective.direction == "minimise" else "high"
    lines.append(
        Text(
            f"curve: {low} is good; {marks.best} the best, {marks.failed} failed its gate, {marks.gap} no score", "dim"
        )
    )
    return lines


def _labelled(label: str, trouble: Trouble, style: str) -> Text:
    time = trouble.time.astimezone()
    return Text.assemble((label, style), f"  {time:%m-%d %H:%M:%S}  {_clean(trouble.place)}: {_clean(trouble.text)}")


def _clean(text: str) -> str:
    """Keep what files say from moving the cursor."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _cut(line: Text, width: int) -> Text:
    line = line.copy()
    line.truncate(width, overflow="ellipsis")
    return line


def _wrapped(line: Text, console: Console, width: int, most: int) -> list[Text]:
    parts = list(line.wrap(console, width))
    if len(parts) <= most:
        return parts
    rest = Text(" ").join(parts[most - 1 :])
    return [*parts[: most - 1], _cut(rest, width)]


# -------------------------------------------------------------------------------------------------------- the terminal


@contextlib.contextmanager
def _screen(stream: TextIO) -> Iterator[Live]:
    """The terminal's second screen; the first one is as it was when we leave, however we do."""
    # Not COLUMNS and LINES: where they are exported they stay what they were when the window is resized.
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    console = Console(file=stream, _environ=environment)
    live = Live(
        console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False, transient=True
    )
    try:
        with live:
            yield live
    except OSError:
        if not _is_gone(stream):
            raise
        raise Stopped(signal.SIGTERM) from None  # the window was closed


def _is_gone(stream: TextIO) -> bool:
    try:
        os.get_terminal_size(stream.fileno())
    except OSError:
        return True
    return False


@contextlib.contextmanager
def _quiet_keys(stream: TextIO) -> Iterator[None]:
    """Keep what is typed off the screen, and from the shell afterwards; Ctrl-C still works."""
    try:
        before = termios.tcgetattr(stream)
    except (termios.error, OSError, ValueError):  # no terminal at stdin
        yield
        return
    quiet = [*before]
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(stream, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        with contextlib.suppress(termios.error, OSError):  # the window was closed
            termios.tcsetattr(stream, termios.TCSAFLUSH, before)


@contextlib.contextmanager
def _wakes_on_resize(service: Service) -> Iterator[None]:
    """Draw again at once when the window changes, or when we come back from the background."""
    numbers = (signal.SIGWINCH, signal.SIGCONT)
    before = {number: signal.signal(number, lambda *_: service.wake()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
