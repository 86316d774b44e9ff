"""docs/training_options.md tells every option as it is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from optimizer_daemon.lora_training.config import TrainConfig
from optimizer_daemon.lora_training.network_settings import NetworkArgs

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests/data/sd_scripts/training_golden.json"


def default_text(field: FieldInfo) -> str:
    """Return a default as the document has it."""
    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "unset"
    return "none" if isinstance(value, (dict, list, BaseModel)) else json.dumps(value).strip('"')


def rows(heading: str) -> dict[str, list[str]]:
    """Return the cells of the table whose first heading is `heading`, by the name in their first."""
    text = (ROOT / "docs/training_options.md").read_text(encoding="utf-8")
    table = text.split(f"| {heading} | default", 1)[1].split("\n\n", 1)[0]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()[2:]]
    return {name.strip(" `"): [cell.strip().replace("\\|", "|") for cell in rest] for name, *rest in cells}


@pytest.mark.parametrize(("heading", "kind"), [("option", TrainConfig), ("argument", NetworkArgs)])
def test_every_option_has_its_row(heading: str, kind: type[BaseModel]):
    found = {name: cells[:2] for name, cells in rows(heading).items()}
    assert found == {name: [default_text(field), field.description] for name, field in kind.model_fields.items()}


def test_what_is_the_same_in_sd_scripts_is_called_so():
    (theirs,) = json.loads(GOLDEN.read_text(encoding="utf-8"))["defaults"]
    for name, (_, _, comparison) in rows("option").items():
        assert (comparison == "own") == (name not in theirs), name
        if re.match(r"same(;|$)", comparison):
            default = TrainConfig.model_fields[name].get_default(call_default_factory=True)
            assert default == theirs[name], name
