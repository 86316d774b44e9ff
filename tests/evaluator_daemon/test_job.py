"""What an evaluator is told: by flags until there is a run.json, by the study from then on."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluator_daemon import job as job_module
from evaluator_daemon.gpu_policy import policy_of
from evaluator_daemon.job import adopt_run, find_job, read_run
from evaluator_daemon.settings import EvaluatorSettings
from shared.errors import StudyMismatchError, UnreadableFileError
from shared.files import read_kept, read_model, write_model
from shared.layout import StudyLayout
from shared.planning import make_plan
from shared.prompts import read_prompt_file
from shared.schemas import Run
from shared.settings import LoadedSettings
from tests.evaluator_daemon.test_gpu_policy import run_of

PROMPTS = "a red ball\na blue cube --w 24 --d 7\n"


@pytest.fixture
def study(tmp_path) -> StudyLayout:
    (tmp_path / "study").mkdir()
    return StudyLayout(tmp_path / "study")


def told(base_model: Path, folder: Path, prompts: str = PROMPTS, **flags) -> LoadedSettings[EvaluatorSettings]:
    file = folder / "prompts.txt"
    file.write_text(prompts)
    given = {"base_model": base_model, "prompts": file, "device": "cpu", **flags}
    origins = dict.fromkeys(EvaluatorSettings.model_fields, "default")
    origins |= {name: f"--{name.replace('_', '-')}" for name in given}
    return LoadedSettings(EvaluatorSettings(**given), origins)


def begin_study(study: StudyLayout, base_model: Path, folder: Path, prompts: str = PROMPTS) -> None:
    """Another process writes run.json, with steps and a guidance of its own."""
    file = folder / "of_the_study.txt"
    file.write_text(prompts)
    plan = make_plan(
        base_model=base_model, prompts=read_prompt_file(file), device="cpu", num_samples=2, steps=4, cfg_scale=3.0
    )
    write_model(study.run, run_of(base_model).model_copy(update={"plan": plan, "plan_hash": plan.digest()}))


def test_flags_alone_make_a_job_with_the_prompts_own_options(study, base_model, tmp_path):
    job = find_job(told(base_model, tmp_path), study)
    assert job is not None
    assert not job.from_run
    assert (job.plan.sample(1).width, job.plan.sample(1).height, job.plan.sample(1).seed) == (24, 16, 7)


def test_a_study_that_agrees_with_every_flag_is_adopted_with_all_that_no_flag_names(study, base_model, tmp_path):
    loaded = told(base_model, tmp_path)
    job = find_job(loaded, study)
    assert adopt_run(loaded, study, job, read_run(study)) is job, "there is none yet"
    begin_study(study, base_model, tmp_path)
    adopted = adopt_run(loaded, study, job, read_run(study))
    assert adopted.from_run
    assert (adopted.plan.steps, adopted.plan.cfg_scale, adopted.plan.num_samples) == (4, 3.0, 2)
    assert adopt_run(loaded, study, adopted, read_run(study)) is adopted
    begin_study(study, base_model, tmp_path, "a green cone\n")
    with pytest.raises(StudyMismatchError, match="holds another plan than the one evaluated here; start again"):
        adopt_run(loaded, study, adopted, read_run(study))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param({"prompts": "a red ball\n"}, r"--prompts is \['a red ball'\], but the study's run.json has "
                     r"\['a red ball', 'a blue cube'\]", id="other prompts"),
        pytest.param({"prompts": "a red ball\na blue cube --w 24\n"}, r"--prompts \(the options\) is \[{}, "
                     r"{'width': 24}\], but the study's run.json has \[{}, {'seed': 7, 'width': 24}\]",
                     id="other options"),
        pytest.param({"num_samples": 5}, "--num-samples is 5, but the study's run.json has 2", id="other samples"),
    ],
)  # fmt: skip
def test_a_study_that_contradicts_a_flag_is_refused_with_both_values(study, base_model, tmp_path, flags, message):
    loaded = told(base_model, tmp_path, **flags)
    job = find_job(loaded, study)
    begin_study(study, base_model, tmp_path)
    with pytest.raises(StudyMismatchError, match=message):
        adopt_run(loaded, study, job, read_run(study))


def test_the_run_is_read_again_only_when_its_file_has_changed(study, base_model, tmp_path, monkeypatch):
    reads: list[Path] = []
    monkeypatch.setattr(job_module, "read_kept", lambda path, model: reads.append(path) or read_kept(path, model))
    assert read_run(study) is None
    begin_study(study, base_model, tmp_path)
    reads.clear()
    assert read_run(study) is read_run(study)
    assert policy_of(study, "defer") == "defer"
    assert len(reads) == 1
    write_model(study.run, read_model(study.run, Run).model_copy(update={"status": "finished"}))
    assert read_run(study).status == "finished"
    assert len(reads) == 2
    study.run.write_text("{}")
    for _ in range(2):
        with pytest.raises(UnreadableFileError):
            read_run(study)
    assert policy_of(study, "defer") == "defer"
    study.run.unlink()
    assert read_run(study) is None
