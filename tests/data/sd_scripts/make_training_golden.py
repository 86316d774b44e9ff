"""Write what sd-scripts' own functions compute for many settings: $SD_SCRIPTS_PYTHON make_training_golden.py > FILE.

SD_SCRIPTS_DIR is the checkout, SD_SCRIPTS_PYTHON the Python of its environment. The settings have the same names here
and there. Runs without this project's packages.
"""

from __future__ import annotations

import json
import os
import random
import sys
from contextlib import nullcontext, redirect_stdout
from types import SimpleNamespace

TOTAL_STEPS = 20
RATES = {"learning_rate": 1e-3, "text_encoder_lr": 5e-4, "unet_lr": 1e-3}
COURSES = [
    {"lr_scheduler": "constant"},
    {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 4},
    {"lr_scheduler": "linear", "lr_warmup_steps": 3},
    {"lr_scheduler": "cosine", "lr_warmup_steps": 0.13},
    {"lr_scheduler": "cosine", "lr_scheduler_args": {"num_cycles": 1.5}},
    {"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 3, "lr_warmup_steps": 2},
    {"lr_scheduler": "polynomial", "lr_scheduler_power": 2.0, "lr_warmup_steps": 2},
    {"lr_scheduler": "polynomial", "lr_scheduler_args": {"lr_end": 1e-5}},
    {"lr_scheduler": "inverse_sqrt", "lr_warmup_steps": 5},
    {"lr_scheduler": "inverse_sqrt", "lr_scheduler_timescale": 7},
    {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_min_lr_ratio": 0.1, "lr_warmup_steps": 4},
    {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_args": {"min_lr": 2e-4}, "lr_scheduler_num_cycles": 3},
    {"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 4, "lr_decay_steps": 0.4},
    {
        "lr_scheduler": "warmup_stable_decay",
        "lr_warmup_steps": 0.2,
        "lr_decay_steps": 5,
        "lr_scheduler_min_lr_ratio": 0.2,
    },
    {"lr_scheduler": "piecewise_constant", "lr_scheduler_args": {"step_rules": "1:5,0.5:12,0.1"}},
    {"lr_scheduler_type": "StepLR", "lr_scheduler_args": {"step_size": 6, "gamma": 0.5}},
    {"lr_scheduler_type": "torch.optim.lr_scheduler.CosineAnnealingWarmRestarts", "lr_scheduler_args": {"T_0": 6}},
    {
        "optimizer_type": "Adafactor",
        "optimizer_args": {"relative_step": True, "scale_parameter": False, "warmup_init": True},
        "lr_scheduler": "adafactor",
    },
]
VELOCITY = {"v_parameterization": True}
OBJECTIVES = [
    {},
    VELOCITY,
    {"min_snr_gamma": 5.0},
    {"min_snr_gamma": 0.5, **VELOCITY},
    {"noise_offset": 0.1},
    {"noise_offset": 0.3, "noise_offset_random_strength": True},
    {"noise_offset": 0.1, "adaptive_noise_scale": 0.5},
    {"noise_offset": 0.1, "adaptive_noise_scale": -2.0, "noise_offset_random_strength": True},
    {"multires_noise_iterations": 6},
    {"multires_noise_iterations": 10, "multires_noise_discount": 0.8, "noise_offset": 0.05},
    {"ip_noise_gamma": 0.1},
    {"ip_noise_gamma": 0.2, "ip_noise_gamma_random_strength": True, **VELOCITY},
    {"loss_type": "l1"},
    {"loss_type": "huber"},
    {"loss_type": "huber", "huber_schedule": "constant", "huber_c": 0.3, "huber_scale": 2.0},
    {"loss_type": "huber", "huber_schedule": "exponential", "huber_c": 0.05, "huber_scale": 0.5},
    {"loss_type": "smooth_l1", "huber_schedule": "snr", "huber_c": 0.2},
    {"loss_type": "smooth_l1", "huber_schedule": "exponential", **VELOCITY},
    {"loss_type": "smooth_l1", "huber_schedule": "constant", "min_snr_gamma": 1.0},
    {"debiased_estimation_loss": True},
    {"debiased_estimation_loss": True, **VELOCITY},
    {"scale_v_pred_loss_like_noise_pred": True, **VELOCITY},
    {"v_pred_like_loss": 0.3},
    {"zero_terminal_snr": True, **VELOCITY},
    {"zero_terminal_snr": True, "min_snr_gamma": 5.0, **VELOCITY},
    {"zero_terminal_snr": True, "loss_type": "huber", "huber_schedule": "snr", **VELOCITY},
    {"min_timestep": 200, "max_timestep": 600},
    {"min_timestep": 990},
    {"min_timestep": 5, "max_timestep": 5, "min_snr_gamma": 5.0},
    {
        "min_snr_gamma": 3.0,
        "scale_v_pred_loss_like_noise_pred": True,
        "debiased_estimation_loss": True,
        "noise_offset": 0.1,
        "multires_noise_iterations": 4,
        "multires_noise_discount": 0.5,
        "ip_noise_gamma": 0.05,
        "loss_type": "l1",
        "zero_terminal_snr": True,
        **VELOCITY,
    },
    {"min_snr_gamma": 2.0, "v_pred_like_loss": 0.5, "debiased_estimation_loss": True, "min_timestep": 1},
]
SQUARE, NARROW = (8, 8), (4, 16)
OF_NARROW = [{"multires_noise_iterations": 5}, {"multires_noise_iterations": 5, "noise_offset": 0.2}]
"""Objectives whose latents are no square."""
NETWORKS = [
    {},
    {"network_dim": 2, "network_alpha": 8.0, "network_dropout": 0.5},
    {"network_args": {"conv_dim": 3}},
    {"network_args": {"conv_dim": 2, "conv_alpha": 4.0, "rank_dropout": 0.4}, "network_alpha": 0.0},
    {"network_args": {"module_dropout": 0.5}},
    {
        "network_args": {"conv_dim": 2, "rank_dropout": 0.3, "module_dropout": 0.2, "loraplus_lr_ratio": 4.0},
        "network_dropout": 0.1,
        "scale_weight_norms": 0.5,
    },
    {"network_args": {"loraplus_unet_lr_ratio": 16.0}, "scale_weight_norms": 2.0},
    {"network_args": {"loraplus_text_encoder_lr_ratio": 8.0, "loraplus_lr_ratio": 2.0}},
]
SEED = 7
SAMPLE_WEIGHTS = [1.0, 0.5, 2.0]
"""Of the images: 1.0, or prior_loss_weight of a regularisation image."""


def main() -> None:
    """Print the golden values."""
    sys.path.insert(0, os.environ["SD_SCRIPTS_DIR"])
    with redirect_stdout(sys.stderr):
        found = {"courses": courses(), "objectives": objectives(), "networks": networks()}
        found["defaults"] = [{"settings": {}, **plain_defaults()}]
    # One case a line
    parts = [f'"{name}": [\n' + ",\n".join(map(json.dumps, cases)) + "\n]" for name, cases in found.items()]
    print("{" + ",\n".join(parts) + "}")


def arguments(settings: dict) -> SimpleNamespace:
    """Return sd-scripts' own defaults with these settings, a table as the list of texts that it takes there."""
    import train_network

    values = vars(train_network.setup_parser().parse_args([]))
    for name, value in settings.items():
        values[name] = [f"{key}={inner!r}" for key, inner in value.items()] if isinstance(value, dict) else value
    return SimpleNamespace(**values)


def courses() -> list[dict]:
    """Return the rates of the text encoder and of the UNet before each step, and after the last."""
    import torch
    from library import train_util

    found = []
    for settings in COURSES:
        args = arguments({**RATES, "optimizer_type": "SGD", "max_train_steps": TOTAL_STEPS, **settings})
        weights = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
        groups = [
            {"params": [weight], "lr": rate}
            for weight, rate in zip(weights, (args.text_encoder_lr, args.unet_lr), strict=True)
        ]
        optimizer = train_util.get_optimizer(args, groups)[2]
        scheduler = train_util.get_scheduler_fix(args, optimizer, 1)
        rates = []
        for _ in range(TOTAL_STEPS):
            rates.append(list(map(float, scheduler.get_last_lr())))
            for weight in weights:
                weight.grad = torch.ones_like(weight)
            optimizer.step()
            scheduler.step()
        rates.append(list(map(float, scheduler.get_last_lr())))
        found.append({"settings": settings, "rates": rates})
    return found


def objectives() -> list[dict]:
    """Return the timesteps, some of the noise and of the noisy latents, and the loss of one batch."""
    import torch
    import train_network

    class Trainer(train_network.NetworkTrainer):
        """The real one, but for a prediction that is a simple function of what it is given."""

        def call_unet(self, args, accelerator, unet, noisy_latents, timesteps, *rest, **more):
            places = torch.arange(noisy_latents.numel()).reshape(noisy_latents.shape)
            self.seen = (noisy_latents.detach(), timesteps)
            return 0.7 * noisy_latents + 0.2 * torch.cos(places * 0.1)

    accelerator = SimpleNamespace(device=torch.device("cpu"), autocast=nullcontext)
    batch = {
        "text_encoder_outputs_list": [torch.zeros(3, 1)],
        "loss_weights": torch.tensor(SAMPLE_WEIGHTS),
    }
    found = []
    for settings, size in [*((each, SQUARE) for each in OBJECTIVES), *((each, NARROW) for each in OF_NARROW)]:
        latents = torch.sin(torch.arange(3 * 4 * 64).reshape(3, 4, *size) * 0.37) / 0.18215
        args = arguments(settings)
        trainer = Trainer()
        scheduler = trainer.get_noise_scheduler(args, accelerator.device)
        random.seed(SEED)
        torch.manual_seed(SEED)
        loss = trainer.process_batch(
            {**batch, "latents": latents}, [], None, None, None, scheduler, None, None, accelerator, args, None, None,
            train_text_encoder=False,
        )  # fmt: skip
        noisy, times = trainer.seen
        found.append(
            {
                "settings": settings,
                "size": size,
                "timesteps": times.tolist(),
                "noisy": noisy.flatten()[::37].tolist(),
                "loss": loss.item(),
            }
        )
    return found


def networks() -> list[dict]:
    """Return the layers, their initial weights, what they add in training, their rates, and what a limit leaves."""
    import torch
    from networks import lora
    from toy_networks import fill, outputs, toys

    found = []
    for settings in NETWORKS:
        args = arguments({**RATES, **{name: value for name, value in settings.items() if name != "network_args"}})
        encoder, unet = toys()
        torch.manual_seed(SEED)
        network = lora.create_network(
            1.0, args.network_dim, args.network_alpha, None, encoder, unet, args.network_dropout,
            **{key: str(value) for key, value in settings.get("network_args", {}).items()},
        )  # fmt: skip
        lora.LoRANetwork.UNET_TARGET_REPLACE_MODULE = ["Transformer2DModel"]  # conv_dim adds to the list for good
        network.apply_to(encoder, unet, True, True)
        initial = {name: tensor.flatten()[0].item() for name, tensor in network.state_dict().items()}
        fill(network, 0.7, "lora_up.weight")
        network.train()
        said = outputs(encoder, unet)
        groups, names = network.prepare_optimizer_params(args.text_encoder_lr, args.unet_lr, args.learning_rate)
        if args.scale_weight_norms:
            network.apply_max_norm_regularization(args.scale_weight_norms, "cpu")
        found.append(
            {
                "settings": settings,
                "names": list(initial),
                "initial": list(initial.values()),
                "outputs": said,
                "groups": names,
                "rates": [group["lr"] for group in groups],
                "weights_in_groups": [sum(weight.numel() for weight in group["params"]) for group in groups],
                "norms": [tensor.float().norm().item() for tensor in network.state_dict().values()],
            }
        )
    return found


def plain_defaults() -> dict:
    """Return sd-scripts' default of each of its settings that JSON can hold."""
    return {name: value for name, value in vars(arguments({})).items() if name != "config_file"}


if __name__ == "__main__":
    main()
