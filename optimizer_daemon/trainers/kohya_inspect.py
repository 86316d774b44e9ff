"""Run by the Python of kohya's environment: says what that environment and the checkout are, in one JSON object.

It needs nothing of ours. Input, JSON on stdin:

    directory   the checkout
    script      the module whose setup_parser() is asked, e.g. "train_network"
    configs     settings of trainings, each as its train_config.toml holds them
    dataset     document of the data set

Output, after MARK on a line of its own: pid, versions, and then what could be found out: `import_error`, or `options`,
`refused` and `dataset_error`. `refused` is what sd-scripts' own functions say to the first settings that they refuse.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import sys
from typing import Any

MARK = "lora-tuner-answer: "
PACKAGES = ("transformers", "diffusers", "accelerate", "safetensors", "torch", "toml", "voluptuous")


def main() -> None:
    """Answer one question."""
    asked: dict[str, Any] = json.load(sys.stdin)
    answer: dict[str, Any] = {"pid": os.getpid(), "versions": versions()}
    transformers = answer["versions"].get("transformers")
    if transformers is None or int(transformers.partition(".")[0]) < 5:  # else importing tells less than the version
        answer.update(look(asked))
    print(f"\n{MARK}{json.dumps(answer)}", flush=True)


def versions() -> dict[str, str]:
    """Return the installed version of each package that is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def look(asked: dict[str, Any]) -> dict[str, Any]:
    """Import the script and ask its own parser and its own reader of data sets."""
    sys.path[0] = asked["directory"]
    try:
        script = importlib.import_module(asked["script"])
        parser = script.setup_parser()
    except Exception as error:  # noqa: BLE001  whatever a foreign program raises is its answer
        return {"import_error": f"{type(error).__name__}: {error}"}
    options = {action.dest: describe(action) for action in parser._actions if action.dest != "help"}
    return {"options": options, **verdict(parser, asked)}


def describe(action: argparse.Action) -> dict[str, Any]:
    """Return what values an option takes: type, whether it is a list, a switch, one of some choices."""
    return {
        "type": getattr(action.type, "__name__", "str"),
        "list": action.nargs in ("*", "+"),
        "switch": action.nargs == 0,
        "choices": None if action.choices is None else list(action.choices),
    }


def verdict(parser: argparse.ArgumentParser, asked: dict[str, Any]) -> dict[str, Any]:
    """Let the script's own functions look at the trainings' settings and at the data set."""
    util = importlib.import_module("library.train_util")
    config_util = importlib.import_module("library.config_util")
    known = {action.dest for action in parser._actions}
    answer: dict[str, Any] = {}
    masked_loss = False
    for config in asked["configs"]:
        settings = {name: value for name, value in config.items() if name in known}
        what = "the settings"
        try:
            arguments = parser.parse_args([], namespace=argparse.Namespace(**settings))
            util.verify_training_args(arguments)
            util.prepare_dataset_args(arguments, True)
            masked_loss = bool(arguments.masked_loss)
            sanitizer = config_util.ConfigSanitizer(True, True, masked_loss, True)
            sanitizer.sanitize_argparse_namespace(arguments)
            what = f"network_module {arguments.network_module!r}"
            importlib.import_module(arguments.network_module)
            what = f"optimizer_type {arguments.optimizer_type!r} with optimizer_args {arguments.optimizer_args}"
            optimizer = make_optimizer(util, arguments)
            what = f"lr_scheduler {arguments.lr_scheduler!r} with lr_scheduler_args {arguments.lr_scheduler_args}"
            util.get_scheduler_fix(arguments, optimizer, 1)
        except (Exception, SystemExit) as error:  # noqa: BLE001  as above
            answer["refused"] = {"what": what, "error": f"{type(error).__name__}: {error}"}
            break
    try:
        config_util.ConfigSanitizer(True, True, masked_loss, True).sanitize_user_config(asked["dataset"])
    except Exception as error:  # noqa: BLE001  as above
        answer["dataset_error"] = str(error)
    return answer


def make_optimizer(util: Any, arguments: argparse.Namespace) -> Any:
    """Return the optimizer of a training, made by the script's own function for one small weight."""
    torch = importlib.import_module("torch")
    weight = torch.nn.Parameter(torch.zeros(4, 4))
    return util.get_optimizer(arguments, [{"params": [weight], "lr": arguments.learning_rate}])[2]


if __name__ == "__main__":
    main()
