"""Whatever form a LoRA file has, the resident model computes what merging it into the weights by hand gives."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load, save

from evaluator_daemon.job import Job
from evaluator_daemon.renderers.diffusion import DiffusionRenderer
from shared.errors import RefusedCheckpointError
from shared.planning import make_plan
from shared.safetensors_file import lora_modules, read_checkpoint
from tests.evaluator_daemon.lora_forms import (
    KOHYA,
    KOHYA_XL,
    Pair,
    diffusers_name,
    dotted,
    is_attention,
    is_spatial,
    is_usual,
    kohya,
    merge,
    random_pairs,
)
from tests.evaluator_daemon.tiny_models import PROMPTS

STEPS = 3
PIPELINES = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


def job_of(folder, **plan) -> Job:
    made = make_plan(base_model=folder, prompts=PROMPTS, device="cpu", num_samples=3, steps=STEPS, **plan)
    return Job(folder.parent, made, folder, None, "cpu", 1, 1.0, 900.0)


@pytest.fixture(scope="module")
def folders(base_model, sdxl_model):
    return {"sd": base_model, "sdxl": sdxl_model}


@pytest.fixture(scope="module")
def renderers(folders):
    return {family: DiffusionRenderer(job_of(folder)) for family, folder in folders.items()}


def plain_pipeline(family, folder):
    """diffusers' own, with which this renderer shares the weights on disk only."""
    without = {"safety_checker": None} if family == "sd" else {"add_watermarker": False}
    pipeline = PIPELINES[family].from_pretrained(folder, local_files_only=True, **without)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, algorithm_type="dpmsolver++", solver_order=2, use_karras_sigmas=True
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def models_of(pipeline) -> dict[str, torch.nn.Module]:
    names = ("unet", "text_encoder", "text_encoder_2")
    return {name: getattr(pipeline, name) for name in names if getattr(pipeline, name, None) is not None}


def plain_pictures(pipeline, plan) -> np.ndarray:
    """The plan's grid by a plain call of the pipeline, one picture after the other."""
    pictures = []
    for sample in map(plan.sample, range(plan.num_samples)):
        image = pipeline(
            sample.prompt,
            negative_prompt="",
            generator=torch.Generator().manual_seed(sample.seed),
            num_inference_steps=plan.steps,
            guidance_scale=plan.cfg_scale,
            width=plan.width,
            height=plan.height,
            output_type="np",
        ).images[0]
        pictures.append((image * 255).round().astype(np.uint8))
    return np.stack(pictures)


def render(renderer) -> np.ndarray:
    return np.stack(renderer.render(lambda: None).pictures)


def unequal(pictures: np.ndarray, others: np.ndarray) -> int:
    return int(np.abs(pictures.astype(int) - others.astype(int)).max())


def parts(family: str, pipeline, wanted=is_usual, **options) -> list[Pair]:
    return [
        pair for name, model in models_of(pipeline).items() for pair in random_pairs(name, model, wanted, **options)
    ]


def sgm_name(unet_config):
    """diffusers' conversion, the other way round."""
    known = {}

    def rename(name: str) -> str:
        if not known:
            known.update(sgm_names(unet_config))
        return known.get(name, name)

    return rename


def sgm_names(config) -> dict[str, str]:
    """diffusers' kohya name -> SGM name, by diffusers' own map over every block number there may be."""
    candidates = [
        f"lora_unet_{block}_{number}_{inner}_{rest}"
        for block, first in (("input_blocks", 1), ("output_blocks", 0))  # input_blocks_0 is conv_in
        for number in range(first, 12)
        for inner in (0, 1, 2)
        for rest in LAYERS
    ] + [f"lora_unet_middle_block_{inner}_{rest}" for inner in (0, 1, 2) for rest in LAYERS]
    names = {}
    for candidate in candidates:
        try:
            names.setdefault(diffusers_name(candidate, config), candidate)
        except (ValueError, IndexError):
            continue
    return names


LAYERS = [
    "proj_in",
    "proj_out",
    *(
        f"transformer_blocks_{depth}_{layer}"
        for depth in range(10)
        for layer in (
            *(f"attn{n}_{part}" for n in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out_0")),
            "ff_net_0_proj",
            "ff_net_2",
        )
    ),
]


def peft_metadata(pairs: list[Pair], common: float) -> dict[str, str]:
    """As diffusers' save_lora_adapter writes it: one alpha for each model, and those that differ by path."""
    settings: dict = {}
    for pair in pairs:
        settings[f"{pair.component}.lora_alpha"] = common
        pattern = settings.setdefault(f"{pair.component}.alpha_pattern", {})
        if pair.alpha != common:
            pattern[pair.path] = pair.alpha
    return {"lora_adapter_metadata": json.dumps(settings)}


def old_processors(content: bytes) -> bytes:
    """The names of attention layers as diffusers had them before peft."""
    renamed = {
        re.sub(r"\.to_(q|k|v|out)(?:\.0)?\.lora\.", r".processor.to_\1_lora.", name): tensor
        for name, tensor in load(content).items()
    }
    return save(renamed, {"format": "pt"})


def at_rank(pairs: list[Pair]) -> list[Pair]:
    return [dataclasses.replace(pair, alpha=float(len(pair.down))) for pair in pairs]


def with_own_alphas(pairs: list[Pair]) -> list[Pair]:
    return [dataclasses.replace(pair, alpha=0.5 + index % 3) for index, pair in enumerate(pairs)]


def sd(wanted=is_usual, **options):
    return lambda pipeline: parts("sd", pipeline, wanted, **options)


def only(component: str, wanted=is_usual):
    return lambda pipeline: random_pairs(component, models_of(pipeline)[component], wanted)


FORMS = {
    "kohya, every usual layer": ("sd", sd(), kohya),
    "kohya, the UNet alone": ("sd", only("unet"), kohya),
    "kohya, the text encoder alone": ("sd", only("text_encoder"), kohya),
    "kohya, one kind of layer alone": ("sd", sd(lambda path, _: path.endswith(("q_proj", "fc1"))), kohya),
    "kohya, another rank for each": ("sd", sd(ranks=(1, 2, 5)), kohya),
    "kohya, LoCon's kernels": ("sd", sd(lambda *a: is_usual(*a) or is_spatial(*a)), kohya),
    "peft, alphas that differ in the metadata": (
        "sd",
        lambda pipeline: with_own_alphas(parts("sd", pipeline)),
        lambda pairs: dotted(pairs, ".lora_A.weight", ".lora_B.weight", peft_metadata(pairs, 1.5)),
    ),
    "peft, no metadata": (
        "sd",
        lambda pipeline: at_rank(parts("sd", pipeline, is_attention, ranks=(2, 3))),
        lambda pairs: dotted(pairs, ".lora_A.weight", ".lora_B.weight"),
    ),
    "diffusers before peft": (
        "sd",
        lambda pipeline: at_rank(parts("sd", pipeline, is_attention)),
        lambda pairs: dotted(pairs, ".lora.down.weight", ".lora.up.weight"),
    ),
    "diffusers before peft, a text encoder's": (
        "sd",
        lambda pipeline: at_rank(only("text_encoder", is_attention)(pipeline)),
        lambda pairs: dotted(pairs, ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ),
    "diffusers 0.14, below attention processors": (
        "sd",
        lambda pipeline: at_rank(
            random_pairs("unet", pipeline.unet, lambda path, _: path.endswith(("to_q", "to_k", "to_v", "to_out.0")))
        ),
        lambda pairs: old_processors(dotted(pairs, ".lora.down.weight", ".lora.up.weight")),
    ),
    "SDXL in kohya's SGM names": ("sdxl", sd(), "sgm"),
    "SDXL in kohya's form with diffusers' names": ("sdxl", sd(), lambda pairs: kohya(pairs, KOHYA_XL)),
    "SDXL, the second text encoder alone": ("sdxl", only("text_encoder_2"), lambda pairs: kohya(pairs, KOHYA_XL)),
    "SDXL, LoCon's kernels": ("sdxl", sd(is_spatial), lambda pairs: kohya(pairs, KOHYA_XL)),
    "SDXL in peft's form": (
        "sdxl",
        lambda pipeline: with_own_alphas(parts("sdxl", pipeline)),
        lambda pairs: dotted(pairs, ".lora_A.weight", ".lora_B.weight", peft_metadata(pairs, 1.5)),
    ),
}


@pytest.mark.parametrize(("family", "make", "write"), FORMS.values(), ids=FORMS.keys())
def test_each_form_gives_what_the_merged_weights_give(renderers, folders, tmp_path, family, make, write):
    renderer, pipeline = renderers[family], plain_pipeline(family, folders[family])
    pairs = make(pipeline)
    if write == "sgm":
        content = kohya(pairs, KOHYA_XL, sgm_name(pipeline.unet.config))
        names = [name for name in load(content) if name.startswith("lora_unet")]
        assert not [name for name in names if re.search("down_blocks|mid_block|up_blocks", name)]
    else:
        content = write(pairs)
    path = tmp_path / "lora.safetensors"
    path.write_bytes(content)
    checkpoint = read_checkpoint(path, tmp_path)
    layout = lora_modules(checkpoint)
    assert len(layout.modules) == len(pairs) > 0
    before = render(renderer)

    merge(pairs, models_of(pipeline))
    with renderer.lora(checkpoint, layout):
        pictures = render(renderer)
        inputs = layer_inputs(family, renderer)
        outputs = {name: model(**inputs[name]) for name, model in models_of(renderer._pipeline).items()}
    for name, model in models_of(pipeline).items():
        got, wanted = outputs[name][0], model(**inputs[name])[0]
        assert torch.allclose(got, wanted, atol=1e-4, rtol=1e-4), (name, float((got - wanted).abs().max()))
    assert unequal(pictures, plain_pictures(pipeline, renderer.plan)) <= 2, "the merged model's own pictures"
    assert unequal(pictures, before) > 4, "it changes what is seen"
    assert (render(renderer) == before).all()


def layer_inputs(family, renderer) -> dict:
    """Random inputs of each model."""
    generator = torch.Generator().manual_seed(9)
    config = renderer._pipeline.unet.config
    unet = {
        "sample": torch.randn((2, 4, 8, 8), generator=generator),
        "timestep": torch.tensor(300),
        "encoder_hidden_states": torch.randn((2, 24, config.cross_attention_dim), generator=generator),
    }
    if family == "sdxl":
        unet["added_cond_kwargs"] = {
            "text_embeds": torch.randn((2, 32), generator=generator),
            "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2),
        }
    ids = torch.randint(0, 188, (2, 24), generator=generator)
    ids[:, -1] = 189
    return {"unet": unet, "text_encoder": {"input_ids": ids}, "text_encoder_2": {"input_ids": ids}}


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_base_model_renders_what_a_plain_call_of_its_pipeline_gives(renderers, folders, family):
    plain = plain_pictures(plain_pipeline(family, folders[family]), renderers[family].plan)
    assert plain.std() > 5, "they show something"
    assert unequal(render(renderers[family]), plain) <= 2


@pytest.mark.parametrize("strength", [0.0, 0.6, -1.0])
def test_the_strength_multiplies_every_pair(folders, tmp_path, strength):
    renderer = DiffusionRenderer(job_of(folders["sd"], lora_scale=strength))
    pipeline = plain_pipeline("sd", folders["sd"])
    pairs = parts("sd", pipeline)
    merge(pairs, models_of(pipeline), strength)
    path = tmp_path / "lora.safetensors"
    path.write_bytes(kohya(pairs, KOHYA))
    checkpoint = read_checkpoint(path, tmp_path)
    with renderer.lora(checkpoint, lora_modules(checkpoint)):
        assert unequal(render(renderer), plain_pictures(pipeline, renderer.plan)) <= 2


def applied(renderer, tmp_path, content: bytes):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(content)
    checkpoint = read_checkpoint(path, tmp_path)
    return renderer.lora(checkpoint, lora_modules(checkpoint))


def two_names(pipeline) -> bytes:
    """One layer under diffusers' and under SGM's name."""
    pairs = random_pairs("unet", pipeline.unet, is_usual)[:1]
    twice = load(kohya(pairs, KOHYA_XL)) | load(kohya(pairs, KOHYA_XL, sgm_name(pipeline.unet.config)))
    return save(twice)


def half_a_kernel(pipeline) -> bytes:
    """1x1 weights for a 3x3 convolution."""
    pairs = random_pairs("unet", pipeline.unet, is_spatial)[:1]
    return kohya([dataclasses.replace(pair, down=pair.down[:, :, :1, :1].contiguous()) for pair in pairs], KOHYA_XL)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(two_names, "1 of its modules name a layer that another one names", id="one layer by two names"),
        pytest.param(half_a_kernel, "another width", id="a pointwise pair for a spatial kernel"),
        pytest.param(
            lambda pipeline: kohya(parts("sdxl", pipeline), KOHYA), "do not exist", id="SD 1.x's text encoder prefix"
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_applied(renderers, tmp_path, make, message):
    renderer = renderers["sdxl"]
    before = render(renderer)
    with (
        pytest.raises(RefusedCheckpointError, match=message) as caught,
        applied(renderer, tmp_path, make(renderer._pipeline)),
    ):
        pytest.fail("it was applied")
    assert caught.value.code == "not_applied"
    assert (render(renderer) == before).all()


def test_a_pair_whose_layer_never_ran_is_a_refusal(renderers, tmp_path, monkeypatch):
    renderer = renderers["sd"]
    pairs = parts("sd", renderer._pipeline)
    asleep = renderer._pipeline.unet.mid_block.attentions[0]
    monkeypatch.setattr(asleep, "forward", lambda states, **_: (states,))
    before = render(renderer)
    with (
        pytest.raises(RefusedCheckpointError, match="take no part in rendering") as caught,
        applied(renderer, tmp_path, kohya(pairs)),
    ):
        render(renderer)
    assert caught.value.code == "not_applied"
    assert (render(renderer) == before).all()


def test_each_prompt_is_encoded_once_and_all_in_one_batch(renderers, tmp_path):
    renderer = renderers["sdxl"]
    render(renderer)
    batches = []
    encoders = (renderer._pipeline.text_encoder, renderer._pipeline.text_encoder_2)
    hooks = [e.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0]))) for e in encoders]
    try:
        render(renderer)
        assert batches == [], "the base model's embeddings are remembered"
        with applied(renderer, tmp_path, kohya(only("unet")(renderer._pipeline), KOHYA_XL)):
            render(renderer)
        assert batches == [], "and serve LoRAs that leave the text encoders alone"
        with applied(renderer, tmp_path, kohya(only("text_encoder_2")(renderer._pipeline), KOHYA_XL)):
            render(renderer)
        assert batches == [3, 3], "two prompts and the negative one, by each encoder"
    finally:
        for hook in hooks:
            hook.remove()


def test_sdxls_vae_works_in_single_precision_where_its_configuration_asks_for_it(folders):
    job = job_of(folders["sdxl"])
    half = DiffusionRenderer(Job(**{**vars(job), "plan": job.plan.model_copy(update={"dtype": "float16"})}))
    assert half._pipeline.unet.dtype is torch.float16
    assert half._pipeline.vae.dtype is torch.float32
    assert unequal(render(half), render(DiffusionRenderer(job))) <= 12, "half a model shows nearly the same"
