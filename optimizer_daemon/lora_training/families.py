"""What the family of the base model refuses."""

from __future__ import annotations

from optimizer_daemon.lora_training.base_model import BaseModel
from shared.errors import SettingsError


def require_family(base: BaseModel, family: str | None) -> None:
    """Refuse a base model of another family than --model-family says.

    Args:
        base: the base model.
        family: as the user said it; None where nothing was said.
    Raises:
        SettingsError: the base model is of another family.
    """
    if family is not None and family != base.family:
        raise SettingsError(
            "--model-family", family, f"{base.folder} is {base.family}, by its own files; say so, or leave it out"
        )


def require_encoder_rates(text_encoder_lr: object, base: BaseModel, *, setting: str = "text_encoder_lr") -> None:
    """Refuse more rates than the base model has text encoders.

    Args:
        text_encoder_lr: a number, or a list of them.
        base: the base model.
        setting: where it was said, for messages.
    Raises:
        SettingsError: there are too many.
    """
    count = len(base.text_encoders)
    if isinstance(text_encoder_lr, list) and len(text_encoder_lr) > count:
        raise SettingsError(
            setting, text_encoder_lr, f"a base model of family {base.family} has {count} text encoder; give one rate"
        )
