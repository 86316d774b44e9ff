"""The optimizer daemon: one lock, one frozen run.json, and a tick that moves every live trial on."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from optimizer_daemon.baselines import Baselines, against, keep_copies, rivals
from optimizer_daemon.commands import RequestDesk
from optimizer_daemon.database import Database
from optimizer_daemon.display import LiveLine
from optimizer_daemon.enqueue import Queue
from optimizer_daemon.failures import FailureStreak
from optimizer_daemon.finalists import line_up
from optimizer_daemon.lifecycle import Action, next_action
from optimizer_daemon.optuna_adapter.models import load_sampler
from optimizer_daemon.optuna_adapter.study import TuningStudy
from optimizer_daemon.recovery import (
    KILL_TIMEOUT_S,
    live_trial,
    recover,
    refuse_unknown_trials,
    sweep_leftovers,
)
from optimizer_daemon.refresh import ResultsRefresh
from optimizer_daemon.remains import drop_set_aside, drop_training_state, set_aside
from optimizer_daemon.results import (
    all_trials,
    publish_final,
    results_are_of,
    rewrite_summaries,
    write_results,
)
from optimizer_daemon.runner import LiveTrial, Runner, now_local
from optimizer_daemon.scorekeeper import ScoreKeeper
from optimizer_daemon.scores import ScoreReader
from optimizer_daemon.scoring_command import EVALUATOR, ScoringCommand
from optimizer_daemon.search.load import load_space
from optimizer_daemon.search.objectives import objectives_of_run, split
from optimizer_daemon.search.pruning import Pruner
from optimizer_daemon.search.space import format_parameters
from optimizer_daemon.settings import OptimizerSettings
from optimizer_daemon.slots import Slots, Standing
from optimizer_daemon.stages import Finished, announce, load_stages
from optimizer_daemon.start_checks import check_inputs
from optimizer_daemon.study_file import begun, rewritten
from optimizer_daemon.summary import ended_text, progress_fields, progress_parts, seconds, seconds_left, stopped_text
from optimizer_daemon.trainers import TRAINERS
from optimizer_daemon.trainers.base import Prepares, starts_apart
from optimizer_daemon.trial_table import TrialTable
from optimizer_daemon.warm_up import rule_of_study, with_rule
from shared.durations import duration
from shared.errors import LabError, SettingsError, Stopped
from shared.failpoints import reach
from shared.files import write_model
from shared.layout import StudyLayout
from shared.locks import FileLock
from shared.logs import log_change, set_up_logs
from shared.requests import RequestFolder
from shared.schemas import AllTrials, Run
from shared.schemas.optimizer import RunStatus
from shared.service import Service
from shared.settings import make_writable_folder
from shared.supervise import STOP_TIMEOUT_S
from shared.supervised import stop_together
from shared.watch_script import write_watch_script

TICK_S = 1.0

_STARTS = (Action.TRAIN, Action.RESUME, Action.REDO, Action.EVALUATE)

_log = logging.getLogger(__name__)


class OptimizerDaemon:
    """One study, from its lock to its last trial.

    Args:
        settings: the effective settings.
        evaluator: the evaluator's program, which scores where no manager lives.
        clock: monotonic time in seconds.
    """

    def __init__(
        self,
        settings: OptimizerSettings,
        *,
        evaluator: Sequence[str] = EVALUATOR,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if settings.output_dir is None:
            raise SettingsError("--output-dir", None, "name the study folder; it is made when missing")
        self.layout = StudyLayout(settings.output_dir.absolute())
        self._settings = settings
        self._evaluator = evaluator
        self._clock = clock
        self._service = Service(clock=clock)
        self._line = LiveLine()
        self._live: list[LiveTrial] = []
        self._table = TrialTable(self.layout)
        self._finished_by_stage: Finished = Counter()
        self._failures = FailureStreak()
        self._ticking = False
        self._begin = clock()

    # ------------------------------------------------------------------------------------------------ the whole run

    def run(self) -> None:
        """Run until enough trials are finished, or a request asks to stop.

        Raises:
            AlreadyRunningError: another daemon has this folder.
            Stopped: a signal asked to stop; the trainings were stopped and go on at the next start.
            LabError: something a person has to mend first.
        """
        self._space = load_space(self._settings.search_space)
        self._trainer = TRAINERS.load(self._settings.trainer_name)
        load_sampler(self._settings.sampler, len(split(self._settings.objectives or "")) or 1)
        self._slots = Slots.of(self._settings, apart=starts_apart(self._trainer))
        make_writable_folder("--output-dir", self.layout.root)
        # A signal counts from here to the last line: a second one must not kill us while the trainings are stopped.
        with FileLock(self.layout.optimizer_lock), self._service.signals():
            set_up_logs(self.layout.optimizer_log)
            self._open()
            try:
                self._service.run(self._tick, TICK_S)
            except LabError as error:
                # A second Ctrl-C reaches us in the middle of a tick: nothing is waited for then.
                self._stop_trials(str(error), at_once=self._ticking and isinstance(error, Stopped))
                raise
            finally:
                self._runner.close()
            if self._desk.stop_asked is not None:
                self._stop_trials("stopped by request", at_once=False)
                self._desk.answer_stop(f"stopped: {self._finished} of {self._target} trials are finished")
            else:
                self._end()

    def _open(self) -> None:
        """Freeze or compare run.json, open the study and find what an earlier daemon left."""
        space, settings = self._space, self._settings
        rule, no_rule_because = rule_of_study(settings, self.layout, space)
        space = with_rule(space, rule)
        self._stages = load_stages(space, settings.stages, settings.max_epochs)
        self._table.refresh()
        self._finished_by_stage = self._table.finished_by_stage
        self._stage = self._stages.current(self._finished_by_stage)
        checked = check_inputs(settings, self.layout, self._stages, self._trainer)
        stage = self._stages.described(self._stage, self._finished_by_stage, settings.n_trials)
        self._run: Run = checked.model_copy(update={"stage": stage, "warm_up_rule": rule})
        assert self._run.plan is not None and self._run.plan_hash is not None, "the evaluator scores this workload"
        self._objectives = objectives_of_run(self._run)
        database = Database.of(self._run, self.layout)
        database.announce()
        with begun(self._run, self.layout, database):
            self._study = TuningStudy.open(
                self._run.study_name,
                database.url,
                space,
                seed=settings.seed,
                folder_id=self._run.folder_id,
                stage=self._stage,
                sampler=settings.sampler,
                copy=database.copy,
                objectives=self._objectives,
            )
            refuse_unknown_trials(self._study, self.layout)
        keep_copies(self.layout, self._run, settings.baseline)
        self._objective = self._run.plan.scoring.objective
        never = settings.gpu_policy == "defer"  # no score comes before the training has ended
        pruner = Pruner("none" if never else settings.pruner, settings.pruner_warmup_epochs)
        reader = ScoreReader(self._run.plan_hash, self._objective, self._objectives)
        self._scores = ScoreKeeper(self._study, reader, pruner, self._objective)
        self._scoring = ScoringCommand(self._evaluator, self._run.threads_per_process, self._clock)
        threads, device = self._run.threads_per_process, self._slots.scoring_device(())
        self._baselines = Baselines(self.layout, self._run, self._evaluator, device, threads, self._clock)
        if isinstance(self._trainer, Prepares):
            self._trainer.prepare(self._run, self.layout)
        self._runner = Runner(self._trainer, self._run, settings.gpu_policy)
        self._report = ResultsRefresh(self.layout)
        requests = RequestFolder(self.layout, "optimizer")
        queue = Queue(self._study, settings.seed)
        self._desk = RequestDesk(requests, settings, queue, self._store_settings, self._report)
        sweep_leftovers(self.layout)
        requests.tidy(now_local())
        write_watch_script(self.layout)
        clock, time = self._clock(), now_local()
        self._live = recover(self._study, self.layout, space, self._runner, seed=settings.seed, now=clock, time=time)
        self._trials = self._collect()
        if self._trials.trials and not results_are_of(self.layout, self._trials):
            self._refresh_results()  # the last end of a trial came no further than the database, or a file was mended
        elif self._report.stale:
            self._report.request()
        if no_rule_because is not None:
            log_change(_log, "warm-ups are not held to half of a training", reason=no_rule_because)
        announce(self._stages)
        counts = {"finished": self._finished, "target": self._target, **self._stage_fields()}
        log_change(_log, "study opened", study=self._run.study_name, **counts)
        if settings.gpu_policy == "defer":
            log_change(_log, "gpu policy", policy="defer", pruning="off", next_trial="when all checkpoints are scored")

    def _end(self) -> None:
        """Say what was found."""
        self._line.clear()
        self._baselines.stop()
        self._report.finish()
        sweep_leftovers(self.layout)
        done = self._finished >= self._target and self._stages.is_last(self._stage)
        status: RunStatus = "finished" if done else "stopped"
        self._run = rewritten(self._run, self.layout, status, now_local())
        log_change(_log, "study ended", status=status, finished=self._finished, target=self._target)
        how_far = self._stages.how_far(self._finished_by_stage, self._desk.settings.n_trials)
        self._line.say(ended_text(self.layout, self._trials, how_far))

    def _store_settings(self, settings: OptimizerSettings) -> None:
        """Show changed settings to whoever reads run.json."""
        changed = {"n-trials": settings.n_trials, "timeout": settings.timeout}
        stage = self._stages.described(self._stage, self._finished_by_stage, settings.n_trials)
        self._store({"settings": {**self._run.settings, **changed}, "stage": stage})

    def _store(self, changed: dict[str, Any]) -> None:
        self._run = self._run.model_copy(update={**changed, "updated": now_local()})
        write_model(self.layout.run, self._run)

    def _stop_trials(self, reason: str, *, at_once: bool) -> None:
        """Stop every training so that the next start goes on with it, and say what was saved."""
        self._line.clear()
        if not at_once:
            log_change(_log, "stopping", reason=reason, trainings=sum(live.is_training for live in self._live))
        try:
            self._stop_trainings(0.0 if at_once else STOP_TIMEOUT_S)
        except Stopped:
            self._stop_trainings(0.0)
        for live in self._live:
            if live.state.state == "training" and not self._runner.ended_well(live):
                live.write_state(state="interrupted", reason=reason)
                log_change(_log, "trial interrupted", trial=live.number, saved=bool(live.layout.list_training_states()))
        self._run = rewritten(self._run, self.layout, "stopped", now_local())
        self._report.stop()
        self._line.say(stopped_text(self._live, self._finished, self._target))

    def _stop_trainings(self, term_timeout_s: float) -> None:
        processes = [live.process for live in self._live if live.process is not None]
        stop_together(processes, term_timeout_s=term_timeout_s, kill_timeout_s=KILL_TIMEOUT_S)
        self._scoring.stop()
        self._baselines.stop()

    # ------------------------------------------------------------------------------------------------------ one tick

    def _tick(self) -> None:
        self._ticking = True
        self._line.clear()
        self._desk.serve()
        if self._desk.stop_asked is not None:
            self._service.stop()
        self._scoring.poll()
        if self._baselines.poll():
            self._baselines_scored()
        for live in list(self._live):
            while self._advance(live):
                pass
        self._draw_trials()
        self._report.poll()
        so_far = (self._trials, self._finished, self._target)
        progress = progress_parts(self._live, *so_far, slots=len(self._slots), paused=self._desk.paused)
        if self._stage.name is not None:
            progress[0] = f"{self._stage.title}: {progress[0]}"
        self._line.draw(progress)
        self._service.status(", ".join(progress))
        self._ticking = False

    def _advance(self, live: LiveTrial) -> bool:
        """Take one step with a trial; return whether another may follow at once."""
        self._look_at_training(live)
        self._scores.look(live)
        waits = live.state.state in ("trained", "pruned")
        busy = waits and self._scoring.others_score(live.layout, self.layout)
        view = self._runner.view(live, told=live not in self._live, evaluator_busy=busy)
        action = next_action(view, self._clock())
        if action in _STARTS and (self._service.stopping or (self._desk.paused and action is Action.TRAIN)):
            return False
        match action:
            case Action.TRAIN | Action.RESUME | Action.REDO:
                if not self._runner.may_start(live, self._slots.free_for_training(self._standings(but=live))):
                    return False  # no slot is free, or somebody still works on the GPU it is to have alone
                self._train(live, action)
            case Action.STOP_HUNG | Action.STOP_DIVERGED:
                self._fail(live, self._runner.give_up(live, action))
            case Action.PRUNE:
                self._prune(live)
            case Action.EXCUSE:
                self._runner.excuse(live)
            case Action.MARK_TRAINED:
                live.write_state(state="trained", reason=None)
                log_change(_log, "training ended", trial=live.number, checkpoints=live.scores.seen)
            case Action.EVALUATE:
                self._scoring.start(live.layout, self._slots.scoring_device(self._standings()))
            case Action.COMPLETE:
                self._complete(live)
            case Action.FAIL:
                unscored = live.state.state == "trained"
                self._fail(live, f"unscored: {live.scores.reason}" if unscored else self._runner.why_failed(live))
            case Action.TELL:
                self._tell(live)
        return action not in (Action.WATCH, Action.EVALUATE, Action.WAIT, Action.NOTHING)

    def _draw_trials(self) -> None:
        """Ask for a trial when another may begin and one is left to run."""
        waits = self._baselines.pending and not self._time_is_up
        if self._service.stopping or waits or not self._slots.may_draw(self._standings()):
            return
        # What somebody asked for is run even where enough trials are finished.
        left = self._finished + len(self._live) < self._target or self._study.queued > 0
        if self._time_is_up or not left:
            if not self._live and (self._time_is_up or not self._enter_next_stage()):
                self._service.stop()
        elif not self._desk.paused and self._finalist_may_come():
            draw = self._study.ask()
            live = live_trial(self.layout, draw, self._space, seed=self._settings.seed, time=now_local())
            self._live.append(live)
            self._service.wake()

    def _finalist_may_come(self) -> bool:
        """Put the next finalist in line where one is due; False where the searched trials must be scored first."""
        repeated = [live.params.finalist_of for live in self._live]
        running = [None if trial is None else trial - 1 for trial in repeated]
        left = self._target - self._finished - len(running)
        count = self._desk.settings.finalists_of(self._target) if self._stages.is_last(self._stage) else 0
        return line_up(self._study, self._stage.name, left, count, running)

    def _enter_next_stage(self) -> bool:
        """Draw from the next stage from now on; return whether there is one with trials left to run."""
        stage = self._stages.current(self._finished_by_stage)
        if stage is self._stage:
            return False
        self._stage = self._study.stage = stage
        described = self._stages.described(stage, self._finished_by_stage, self._desk.settings.n_trials)
        self._store({"stage": described})
        self._trials = self._collect()
        counts = {"finished": self._finished, "target": self._target, **self._stage_fields()}
        log_change(_log, "stage begins", **counts)
        self._service.wake()
        return True

    # --------------------------------------------------------------------------------------------- a trial's actions

    def _train(self, live: LiveTrial, action: Action) -> None:
        attempt, resumes, curve = live.state.attempt, live.state.resumes, live.state.curve
        if action is Action.REDO:
            set_aside(live.layout)
            # An attempt that we ended ourselves does not count.
            attempt, resumes, curve = attempt + (live.state.state != "interrupted"), 0, ()
        elif action is Action.RESUME:
            resumes += 1
        # Written before the start: a crash in between is found as a training that never began.
        where: dict[str, Any] = {"gpu": live.gpu, "started": now_local()}
        live.write_state(state="training", reason=None, attempt=attempt, resumes=resumes, curve=curve, **where)
        how: dict[str, Any] = {"from": "its saved state"} if action is Action.RESUME else {}
        if live.params.finalist_of is not None:
            how["finalist_of"] = live.params.finalist_of
        how |= {"gpu": live.gpu} if live.gpu is not None else {}
        log_change(_log, "trial started", **self._trial_fields(live), attempt=attempt, **how)
        for line in format_parameters(live.params.parameters):
            _log.info(line)
        reach("optimizer.training_announced")
        self._runner.start(live, self._clock())

    def _look_at_training(self, live: LiveTrial) -> None:
        """Log each epoch the training has come to, the last ones of one that has ended too."""
        if live.state.state == "training":
            for _ in self._runner.follow(live, self._clock()):
                log_change(_log, "epoch", trial=live.number, **progress_fields(live))

    def _prune(self, live: LiveTrial) -> None:
        """End a training that is losing. Ended first: a crash in between lets it go on to its next score."""
        reason = self._runner.prune(live)
        if self._runner.ended_well(live):
            live.objection = ""  # it came to its end before the signal did: it is scored
            return
        live.write_state(state="pruned", reason=reason, ended=now_local())
        log_change(_log, "trial pruned", trial=live.number, reason=reason)
        reach("optimizer.pruned")

    def _complete(self, live: LiveTrial) -> None:
        final = live.scores.final
        assert final is not None, "a scored trial has a final score"
        assert self._run.plan is not None
        publish_final(live.layout, final, self._run.plan.scoring, rivals(self.layout, self._run))
        reach("optimizer.published")
        live.write_state(
            state="complete",
            reason=final.infeasible_because,
            value=final.value,
            objectives=final.values,
            feasible=final.infeasible_because is None,
            ended=now_local(),
        )

    def _fail(self, live: LiveTrial, reason: str) -> None:
        live.write_state(state="failed", reason=reason, ended=now_local())
        log_change(_log, "trial failed", level=logging.WARNING, trial=live.number, reason=reason)

    def _tell(self, live: LiveTrial) -> None:
        """Tell the study what trial_state.json already says; repeating it after a crash is harmless."""
        reach("optimizer.ended")
        drop_training_state(live.layout)
        drop_set_aside(live.layout)
        if live.state.state == "pruned":
            live.write_state(imputed_value=self._scores.imputed(live))
        state = live.state
        self._scores.tell(state)
        reach("optimizer.told")
        self._live.remove(live)
        self._trials = self._collect()
        self._refresh_results()
        if state.state == "complete":
            fields: dict[str, Any] = {self._objective: state.value, **state.objectives}
            assert state.value is not None, "a complete trial has a value"
            held = against(self._trials.baselines, state.value)
            fields |= {f"against_{name}": f"{difference:+.4f}" for name, difference in held.items()}
            if not state.feasible:
                fields["cannot_win"] = state.reason
            log_change(
                _log,
                "trial ended",
                **self._trial_fields(live),
                **fields,
                took=duration(seconds(state.started, state.ended)),
                finished=self._finished,
                study_eta=duration(seconds_left(self._trials, self._left, len(self._slots))),
            )
        self._failures.remember(state.reason if state.state == "failed" else None)

    def _baselines_scored(self) -> None:
        assert self._run.plan is not None, "the evaluator scores this workload"
        rewrite_summaries(self.layout, self._run.plan.scoring, rivals(self.layout, self._run))
        self._trials = self._collect()
        self._refresh_results()

    def _refresh_results(self) -> None:
        write_results(self.layout, self._trials, self._table)
        self._report.request()

    # ------------------------------------------------------------------------------------------------------- figures

    @property
    def _target(self) -> int:
        return self._stage.trials or self._desk.settings.n_trials

    @property
    def _left(self) -> int:
        """Trials that are not finished, those of later stages too."""
        return self._target - self._finished + self._stages.trials_after(self._stage)

    def _stage_fields(self) -> dict[str, Any]:
        stage = self._run.stage
        return {} if stage is None else {"stage": f"{stage.name} ({stage.number} of {stage.of})"}

    def _trial_fields(self, live: LiveTrial) -> dict[str, Any]:
        if self._stage.name is None:
            return {"trial": f"{live.number} of {self._target}"}
        return {"trial": live.number, "stage": live.params.stage}

    @property
    def _finished(self) -> int:
        """Finished trials of this run's stage."""
        return self._finished_by_stage[self._stage.name]

    @property
    def _time_is_up(self) -> bool:
        timeout = self._desk.settings.timeout
        return timeout is not None and self._clock() - self._begin >= timeout

    def _standings(self, but: LiveTrial | None = None) -> list[Standing]:
        return [live.standing for live in self._live if live is not but]

    def _collect(self) -> AllTrials:
        trials = all_trials(self._table, self._run.study_name, self._objective, now_local(), self._objectives)
        self._finished_by_stage = self._table.finished_by_stage
        return trials.model_copy(update={"baselines": self._baselines.results()})
