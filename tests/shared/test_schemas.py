"""What the models themselves guarantee, beyond the types."""

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pydantic import ValidationError

from shared.files import parse_model
from shared.schemas import (
    Answer,
    Attempt,
    CheckpointRecord,
    EvaluationPlan,
    EvaluationSummary,
    Gate,
    GateCheck,
    Metric,
    PlannedSample,
    PromptOptions,
    Quarantine,
    Run,
    ScoringPreset,
    Trainer,
    TrainerExit,
    TrialParams,
    TrialState,
)

NOON = datetime(2025, 11, 15, 12, tzinfo=UTC)
DIGEST = "0" * 64
ROOT = Path(__file__).parent.parent.parent


def plan(**changes) -> EvaluationPlan:
    values = {
        "prompts": ("a red ball", "a blue cube", "a green cone"),
        "negative_prompt": "",
        "num_samples": 8,
        "base_seed": 42,
        "width": 512,
        "height": 512,
        "steps": 20,
        "sampler": "dpmpp_2m_karras",
        "cfg_scale": 7.5,
        "clip_skip": 2,
        "base_digest": DIGEST,
        "vae_digest": None,
        "lora_scale": 1.0,
        "dtype": "float16",
        "batch_size": 4,
        "scoring": ScoringPreset(name="seed", objective="combined_score", values={"target.brightness": 0.5}),
    }
    return EvaluationPlan(**values | changes)


def run(**changes) -> Run:
    values = {
        "folder_id": "4f2a",
        "study_name": "luca",
        "storage": "sqlite:///x.db",
        "workload": "sd-lora",
        "score_source": "evaluator",
        "status": "running",
        "created": NOON,
        "updated": NOON,
        "plan": plan(),
        "plan_hash": plan().digest(),
        "trainer": Trainer(name="kohya"),
        "settings": {"n-trials": 30, "timeout": None, "objectives": ("brightness", "contrast")},
        "threads_per_process": 1,
        "versions": {},
    }
    return Run(**values | changes)


def state(**changes) -> TrialState:
    values = {"trial": 5, "optuna_number": 4, "state": "training", "attempt": 1, "drawn": NOON}
    return TrialState(**values | changes)


def metric(**changes) -> Metric:
    values = {"version": "1", "direction": "target", "status": "ok", "value": 0.5}
    return Metric(**values | changes)


def record(**changes) -> CheckpointRecord:
    values = {
        "checkpoint": "lora_trial_5-000002",
        "checkpoint_sha256": DIGEST,
        "plan_hash": DIGEST,
        "epoch": 2,
        "size": 100,
        "modified_ns": 1,
        "status": "waiting",
    }
    return CheckpointRecord(**values | changes)


def trainer_exit(**changes) -> TrainerExit:
    values = {"command": ("train",), "pid": 7, "exit_status": 0, "signal": None}
    return TrainerExit(**values | {"started": NOON, "ended": NOON, "seconds": 0.0} | changes)


def params(**changes) -> TrialParams:
    values = {"trial": 5, "optuna_number": 4, "parameters": {"network_dim": 64, "max_train_epochs": 12}}
    return TrialParams(**values | {"origin": "sampler", "training_seed": 1} | changes)


DONE = Attempt(started=NOON, ended=NOON, outcome="recorded")
STRIKE = Attempt(started=NOON, ended=NOON, outcome="strike", reason="out of memory")
INTERRUPTION = Attempt(started=NOON, ended=NOON, outcome="interruption", reason="stopped by signal 15")
RUNNING = Attempt(started=NOON, outcome="running")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: run(plan_hash=DIGEST), "plan_hash is not the hash of plan", id="a hash of another plan"),
        pytest.param(lambda: run(plan=None), "plan_hash is not the hash of plan", id="a hash without plan"),
        pytest.param(lambda: run(plan=None, plan_hash=None), "there is no plan", id="an evaluator without plan"),
        pytest.param(lambda: state(trial=4), "trial 4 is not optuna_number 4", id="numbers not one apart"),
        pytest.param(lambda: state(state="failed", ended=NOON), "needs a reason", id="a failure without reason"),
        pytest.param(lambda: state(state="interrupted"), "needs a reason", id="an interruption without reason"),
        pytest.param(lambda: state(state="complete", ended=NOON), "needs a value", id="complete without value"),
        pytest.param(lambda: state(ended=NOON), "contradict", id="an end of what goes on"),
        pytest.param(lambda: state(value=float("nan")), "finite", id="NaN as value"),
        pytest.param(lambda: state(atempt=2), "Extra inputs", id="an unknown field"),
        pytest.param(
            lambda: params(derived=("network_alpha",)), "network_alpha, which param", id="a lost derived value"
        ),
        pytest.param(lambda: params(origin="finalist"), "belong together", id="a finalist of nothing"),
        pytest.param(lambda: params(parameters={"x": float("inf")}), "finite", id="an infinite parameter"),
        pytest.param(lambda: metric(value=None), "status ok needs a value", id="ok without value"),
        pytest.param(lambda: metric(status="failed", reason="x"), "must be null", id="0.5 for what failed"),
        pytest.param(lambda: metric(status="unavailable", value=None), "needs a reason", id="missing without reason"),
        pytest.param(lambda: GateCheck(passed=False), "needs a reason", id="a failed check without reason"),
        pytest.param(
            lambda: Gate(feasible=True, checks={"black": GateCheck(passed=False, reason="black")}),
            "feasible contradicts",
            id="feasible in spite of a failed check",
        ),
        pytest.param(lambda: record(status="evaluating"), "contradict", id="evaluating without attempt"),
        pytest.param(lambda: record(attempts=(RUNNING,)), "contradict", id="waiting with an attempt running"),
        pytest.param(lambda: record(status="quarantined"), "contradict", id="quarantined without quarantine"),
        pytest.param(lambda: record(checkpoint_sha256="0" * 63), "pattern", id="a digest too short"),
        pytest.param(
            lambda: Attempt(started=NOON, outcome="strike", reason="x"), "contradict", id="a strike that runs"
        ),
        pytest.param(lambda: trainer_exit(signal=9), "exactly one", id="status and signal"),
        pytest.param(lambda: trainer_exit(exit_status=None), "exactly one", id="neither status nor signal"),
        pytest.param(
            lambda: Answer(request="x.json", kind=None, ok=False, answered=NOON),
            "needs an error",
            id="a silent failure",
        ),
    ],
)
def test_a_contradiction_is_refused(make, message):
    with pytest.raises(ValidationError, match=message):
        make()


def test_nothing_can_be_reassigned():
    with pytest.raises(ValidationError, match="frozen"):
        state().attempt = 2


def test_a_gate_check_that_could_not_be_made_excludes_nothing():
    checks = {"clip": GateCheck(passed=None, reason="no CLIP weights"), "black": GateCheck(passed=True)}
    assert Gate(feasible=True, checks=checks).feasible


def test_a_trial_of_a_workload_without_epochs_has_no_epochs():
    assert params().max_train_epochs == 12
    assert params(parameters={"dist_reg_weight": 0.8}).max_train_epochs is None


@pytest.mark.parametrize(
    ("attempts", "strikes", "interruptions"),
    [
        ((), 0, 0),
        ((STRIKE, INTERRUPTION, STRIKE), 2, 0),
        ((STRIKE, INTERRUPTION, INTERRUPTION), 1, 2),
        ((INTERRUPTION,) * 5, 0, 5),
        ((INTERRUPTION, DONE), 0, 0),
    ],
)
def test_strikes_and_interruptions_are_counted(attempts, strikes, interruptions):
    counted = record(attempts=attempts)
    assert (counted.strikes, counted.interruptions_in_a_row) == (strikes, interruptions)


def test_a_running_attempt_does_not_end_a_row_of_interruptions():
    counted = record(status="evaluating", attempts=(STRIKE, INTERRUPTION, INTERRUPTION, RUNNING))
    assert (counted.strikes, counted.interruptions_in_a_row) == (1, 2)


def test_a_quarantine_goes_with_its_status():
    reason = Quarantine(code="three_strikes", reason="out of memory three times", since=NOON)
    assert record(status="quarantined", attempts=(STRIKE,) * 3, quarantine=reason).quarantine == reason


def test_samples_go_round_the_prompts_and_then_to_the_next_seed():
    samples = [(sample.prompt, sample.seed) for sample in map(plan().sample, range(7))]
    assert samples == [
        ("a red ball", 42),
        ("a blue cube", 42),
        ("a green cone", 42),
        ("a red ball", 43),
        ("a blue cube", 43),
        ("a green cone", 43),
        ("a red ball", 44),
    ]


def test_a_prompts_own_options_hold_for_all_its_samples():
    own = PromptOptions(seed=7, width=640, height=384, steps=10, sampler="euler", cfg_scale=3.0, negative_prompt="ugly")
    found = plan(overrides=(PromptOptions(), own, PromptOptions(cfg_scale=0.0)))
    assert found.sample(0) == plan().sample(0)
    assert found.sample(4) == PlannedSample("a blue cube", "ugly", 8, 640, 384, 10, "euler", 3.0)
    assert found.sample(2).cfg_scale == 0.0, "0 is a value"
    with pytest.raises(ValidationError, match="there are 1 overrides for 3 prompts"):
        plan(overrides=(own,))


@pytest.mark.parametrize(
    ("overrides", "batch_size", "batches"),
    [
        pytest.param((), 8, ((0, 1, 2, 3, 4, 5, 6, 7),), id="all alike go together"),
        pytest.param((), 3, ((0, 1, 2), (3, 4, 5), (6, 7)), id="as many as fit"),
        pytest.param(({}, {"width": 64}, {}), 8, ((0, 2, 3, 5, 6), (1, 4, 7)), id="another size"),
        pytest.param(({"steps": 5}, {}, {}), 2, ((0, 3), (6,), (1, 2), (4, 5), (7,)), id="other steps come first"),
        pytest.param(({}, {"sampler": "ddim"}, {"cfg_scale": 1.0}), 8, ((0, 3, 6), (1, 4, 7), (2, 5)), id="two others"),
        pytest.param(
            ({"negative_prompt": "x"}, {"seed": 1}, {}), 8, ((0, 1, 2, 3, 4, 5, 6, 7),), id="only words, seed"
        ),
    ],
)
def test_samples_are_batched_by_the_plan_alone(overrides, batch_size, batches):
    found = plan(overrides=tuple(PromptOptions(**options) for options in overrides))
    assert found.batches(batch_size) == batches


OTHER_PLANS = {
    "prompts": ("a red ball",),
    "negative_prompt": "blurry",
    "num_samples": 4,
    "base_seed": 43,
    "width": 768,
    "height": 768,
    "steps": 30,
    "sampler": "euler",
    "cfg_scale": 7.0,
    "clip_skip": 1,
    "base_digest": "1" * 64,
    "vae_digest": "2" * 64,
    "lora_scale": 0.8,
    "dtype": "float32",
    "batch_size": 1,
    "scoring": ScoringPreset(name="seed", objective="combined_score", values={"target.brightness": 0.45}),
    "overrides": (PromptOptions(), PromptOptions(width=768), PromptOptions()),
}


@pytest.mark.parametrize("field", EvaluationPlan.model_fields)
def test_every_field_of_a_plan_is_part_of_its_identity(field):
    assert plan(**{field: OTHER_PLANS[field]}).digest() != plan().digest()


def test_the_identity_of_a_plan_never_changes():
    assert plan().digest() == "cf1d8526c67a09995cb9802f45370ab3487af985230ddc3908cdad0ea98a332d"


def test_a_field_added_with_a_default_keeps_the_identity_of_old_plans():
    class LaterPlan(EvaluationPlan):
        tiling: bool = False

    values = {name: getattr(plan(), name) for name in EvaluationPlan.model_fields}
    assert LaterPlan(**values).digest() == plan().digest()
    assert LaterPlan(**values, tiling=True).digest() != plan().digest()


EARLIER_SUMMARY = """{
  "trial_name": "trial_0005",
  "total_checkpoints_evaluated": 2,
  "checkpoints": {
    "lora_trial_5-000002": {"epoch": 2, "mean_brightness": 0.512, "mean_contrast": 0.178, "mean_saturation": 0.623,
      "evaluation_time": "2025-11-15T10:23:45"},
    "lora_trial_5-000004": {"epoch": 4, "mean_brightness": 0.528, "mean_contrast": 0.189, "mean_saturation": 0.645,
      "evaluation_time": "2025-11-15T10:45:12"}
  },
  "last_update": "2025-11-15T12:34:56"
}"""


def test_a_summary_of_the_earlier_scripts_reads_and_its_times_are_local():
    summary = parse_model(EARLIER_SUMMARY.encode(), Path("evaluation_summary.json"), EvaluationSummary, edited=True)
    assert summary.checkpoints["lora_trial_5-000002"].mean_brightness == 0.512
    assert summary.last_update == datetime(2025, 11, 15, 12, 34, 56).astimezone()
    assert summary.last_update.utcoffset() is not None


def test_a_contrast_on_the_scale_of_255_is_refused():
    entry = {"epoch": 2, "mean_brightness": 0.5, "mean_contrast": 45.3, "mean_saturation": 0.4, "evaluation_time": NOON}
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        EvaluationSummary(
            trial_name="trial_0005", total_checkpoints_evaluated=1, checkpoints={"x": entry}, last_update=NOON
        )


@pytest.mark.parametrize("clock", ["2025-11-15T10:23:45", "2025-11-15T10:23:45.123456"])
def test_a_time_without_offset_is_local(clock):
    assert state(drawn=clock).drawn == datetime.fromisoformat(clock).astimezone()


def test_a_time_with_offset_is_that_moment():
    assert state(drawn="2025-11-15T20:00:00+08:00").drawn == NOON
    assert state(drawn="2025-11-15T20:00:00+08:00").drawn.utcoffset() == timedelta(hours=8)


@pytest.mark.parametrize(
    "clock", ["0001-01-01T00:00:00", "2025-11-15", "20251115T102345", "2025-13-01T00:00:00", "now"]
)
def test_what_is_no_time_is_refused(clock):
    with pytest.raises(ValidationError):
        state(drawn=clock)


def test_importing_the_schemas_imports_nothing_heavy():
    script = (
        "import sys, shared.schemas, shared.files; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {"torch", "numpy", "optuna", "diffusers"} & set(done.stdout.split()) == set()
