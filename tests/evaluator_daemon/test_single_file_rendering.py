"""The evaluator on a base model in one file: the pictures of the same model as a diffusers folder."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evaluator_daemon.gpu import loaded_bytes
from evaluator_daemon.job import Job
from evaluator_daemon.pictures import describe
from evaluator_daemon.renderers.diffusion import DiffusionRenderer
from evaluator_daemon.renderers.families import load_family
from evaluator_daemon.renderers.sampling import make_scheduler
from shared.errors import ResourceError
from shared.planning import make_plan
from shared.prompts import parse_line
from tests.shared.single_files import save_single_file, tiny_sd15, tiny_sdxl


def job_of(base_model) -> Job:
    prompts = [parse_line("a red ball --w 32 --h 32", "p.txt"), parse_line("a cat --w 32 --h 32", "p.txt")]
    plan = make_plan(base_model=base_model, prompts=prompts, device="cpu", num_samples=2, steps=2)
    return Job(base_model.parent, plan, base_model, None, "cpu", 1, 1.0, 900.0)


@pytest.mark.parametrize("make", [tiny_sd15, tiny_sdxl])
def test_it_renders_the_pictures_of_the_folder_and_takes_the_memory_of_the_folder(make, tmp_path):
    pipeline = make(tmp_path)
    pipeline.save_pretrained(folder := tmp_path / "folder")
    file = save_single_file(pipeline, tmp_path / "model.safetensors")
    jobs = [job_of(folder), job_of(file)]
    assert (jobs[1].plan.width, jobs[1].plan.height) == (jobs[0].plan.width, jobs[0].plan.height)
    pictures = [np.stack(DiffusionRenderer(job).render(lambda: None).pictures) for job in jobs]
    assert (pictures[0][0] != pictures[0][1]).any()
    assert (pictures[0] == pictures[1]).all()
    assert loaded_bytes(jobs[1]) == loaded_bytes(jobs[0])


def test_a_velocity_model_is_sampled_as_it_was_trained(tmp_path):
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    file = save_single_file(tiny_sdxl(tmp_path), tmp_path / "velocity.safetensors", **marks)
    scheduler = make_scheduler("dpmpp_2m_karras", load_family(file, torch.float32).pipeline.scheduler)
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.rescale_betas_zero_snr is True


def test_its_pictures_name_it_as_the_web_ui_does_and_a_lost_file_is_waited_for(tmp_path):
    file = save_single_file(tiny_sd15(tmp_path), tmp_path / "v1-tiny.safetensors")
    job = job_of(file)
    assert f"Model hash: {job.plan.base_digest[:10]}, Model: v1-tiny, " in describe(job.plan.sample(0), job, None)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])  # still being copied
    with pytest.raises(ResourceError, match=r"v1-tiny\.safetensors: the base model cannot be read \(has "):
        load_family(file, torch.float32)
    file.unlink()
    with pytest.raises(ResourceError, match="the base model cannot be read"):
        load_family(file, torch.float32)
