"""Prompts with options of their own: each sample looks as if the whole plan had been like it."""

from __future__ import annotations

import numpy as np
import pytest

from evaluator_daemon.job import Job
from evaluator_daemon.renderers.diffusion import DiffusionRenderer
from evaluator_daemon.renderers.sampling import SAMPLERS
from shared.errors import UnknownPluginError
from shared.planning import make_plan
from shared.samplers import SAMPLER_TITLES
from shared.schemas import PromptOptions


def job_of(base_model, overrides=(), prompts=("a red ball", "a blue cube"), **changes) -> Job:
    plan = make_plan(base_model=base_model, prompts=prompts, device="cpu", num_samples=4, steps=3)
    options = tuple(PromptOptions(**values) for values in overrides)
    return Job(
        base_model.parent, plan.model_copy(update={"overrides": options, **changes}), base_model, None, "cpu", 1, 1, 1
    )


def rendered(job: Job) -> list[np.ndarray]:
    return DiffusionRenderer(job).render(lambda: None).pictures


def test_every_sampler_that_a_plan_may_name_can_be_rendered():
    assert SAMPLERS.keys() == SAMPLER_TITLES.keys()


@pytest.mark.parametrize(
    ("own", "size"),
    [
        pytest.param({"width": 24, "height": 32}, (32, 24), id="size"),
        pytest.param({"steps": 2}, (16, 16), id="steps"),
        pytest.param({"cfg_scale": 1.0}, (16, 16), id="guidance off"),
        pytest.param({"sampler": "euler"}, (16, 16), id="euler"),
        pytest.param({"sampler": "ddim"}, (16, 16), id="ddim"),
    ],
)
def test_what_differs_is_rendered_in_a_batch_of_its_own_as_if_all_were_so(base_model, own, size):
    plain, mixed = (rendered(job_of(base_model, overrides)) for overrides in ((), ({}, own)))
    assert [picture.shape for picture in mixed] == [(16, 16, 3), (*size, 3)] * 2
    alone = rendered(job_of(base_model, prompts=("a blue cube",), num_samples=2, batch_size=2, **own))
    for index in (1, 3):
        assert (mixed[index] == alone[index // 2]).all()
        assert mixed[index].shape != plain[index].shape or (mixed[index] != plain[index]).any()
    ours = job_of(base_model, prompts=("a red ball",), num_samples=2, batch_size=2)
    assert all((mixed[index] == rendered(ours)[index // 2]).all() for index in (0, 2))


def test_an_own_seed_and_an_own_negative_prompt_reach_the_picture_in_the_common_batch(base_model):
    plain = rendered(job_of(base_model))
    seeded = rendered(job_of(base_model, ({}, {"seed": 43})))
    assert (seeded[1] == plain[3]).all(), "its first sample has the seed that the second one has in the plan"
    negative = rendered(job_of(base_model, ({}, {"negative_prompt": "blurry"})))
    assert [(a == b).all() for a, b in zip(plain, negative, strict=True)] == [True, False, True, False]


def test_a_sampler_that_is_not_there_is_told_before_the_model_is_loaded(base_model):
    with pytest.raises(UnknownPluginError, match="no image sampler named 'unipc'"):
        DiffusionRenderer(job_of(base_model, ({}, {"sampler": "unipc"})))
