"""Configuration files and the errors of reading them, as one line that names the setting or the file and line."""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace, get_loader, set_loader
from lightning.pytorch.cli import LightningArgumentParser

from leanbert.class_paths import with_whole_paths
from leanbert.errors import UserError

SHIPPED = (Path(__file__).parent / "configs", Path(__file__).parents[2] / "configs")  # in the wheel; in a checkout

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
SHORT = {
    "lightning.pytorch.strategies.DDPStrategy": "ddp",
    "leanbert.distributed.strategy.FullySharded": "fsdp",
}
"""Strategies by their class paths, which Lightning takes for names where they have no settings."""
STRATEGIES = ("auto", "ddp", "fsdp", "hsdp", *SHORT)
"""Strategies that are tested: losses and weights of several processes are those of one."""

MOST_VALUES = 100_000
"""Values of a configuration file: aliases of aliases can stand for more than any memory holds."""


def load_settings(text: str) -> Any:
    """Parse YAML, in which classes may have short names or those of older code."""
    return with_whole_paths(parse_yaml(text))


parse_yaml = get_loader("yaml")
"""The parser's own YAML, to which 1e-3 is a number."""
set_loader("yaml", load_settings, exceptions=(yaml.YAMLError,))


class Parser(LightningArgumentParser):
    """Lightning's parser, whose errors are one line."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise the message as a UserError."""
        raise UserError(readable(message)) from ex


def one_line(message: str) -> str:
    """Return a message of several lines as one."""
    return " ".join(message.split())


def readable(message: str) -> str:
    """Return the innermost reason of a parser's message, with the whole name of the setting before it."""
    spelling = "Check its spelling; --help lists all settings."
    text = one_line(message).replace(f". {spelling}", "")  # an inner parser has said it
    names = re.findall(r'Parser key "([^"]+)":', text)
    if not names:
        hint = f" {spelling}" if "not accept" in text else ""
        if "arguments are required" in text:
            hint = " A configuration has them: --config configs/mlm.yaml, or that of another task."
        return text + ("" if text.endswith(".") else ".") + hint
    reason = re.split(r'Parser key "[^"]+":|Errors: (?:- )?(?:Expected a <class .str.> - (?!Expected))?', text)[-1]
    reason = re.split(r"(?:- )?Expected a <class 'NoneType'>| - Not a valid subclass|Given value type:", reason)[0]
    reason = re.sub(r"Expected a (?:typing\.)?Literal\[(.*?)\]", r"choose from \1", reason)
    reason = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", reason).strip().rstrip(".")
    hint = f" {spelling}" if "not accept" in reason else ""
    if reason == "Expected a list":
        values = re.findall(r"[^\s,\[\]\"']+", text.rpartition("Given value: ")[2])
        hint = f" Give --{'.'.join(names)} '{json.dumps(values)}'."
    joint = "." if re.match(r"[\w.]+: ", reason) else ": "  # an inner parser has named its setting
    return f"{'.'.join(names)}{joint}{reason}.{hint}"


def user_error_within(error: BaseException | None) -> UserError | None:
    """Return the UserError that caused `error`: the parser wraps what a class raises when it is made."""
    while error is not None:
        if isinstance(error, UserError):
            return error
        error = error.__cause__ or error.__context__
    return None


def find_shipped(arguments: list[str]) -> list[str]:
    """Return the arguments, with `configs/...` that is not in the working folder replaced by the shipped file.

    Raises:
        UserError: A configuration file is in neither place, or is not YAML.
    """
    found = list(arguments)
    for index, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name not in ("--config", "-c") or (not value and index + 1 == len(arguments)):
            continue
        path = _locate(value or arguments[index + 1])
        found[index if value else index + 1] = f"{name}={path}" if value else path
    return found


def _locate(path: str) -> str:
    relative = Path(path).relative_to("configs") if path.startswith("configs/") else Path(path)
    for candidate in (Path(path), *(folder / relative for folder in SHIPPED)):
        if candidate.is_file():
            _check_yaml(candidate)
            return str(candidate)
    shipped = sorted({str(f.relative_to(d)) for d in SHIPPED for f in d.rglob("*.yaml")})
    raise UserError(f"--config: no file {path}. Shipped ones: {', '.join('configs/' + name for name in shipped)}.")


def _check_yaml(path: Path) -> None:
    """Parse once to name file and line; the parser's own error has neither."""
    try:
        size = _size(yaml.safe_load(path.read_text(encoding="utf-8")), {})
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not YAML: {error.problem}. Mend this line.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {one_line(str(error))}. Give a text file in UTF-8.") from error
    except RecursionError as error:
        raise UserError(f"{path}: nested too deeply. Give settings as --print_config shows them.") from error
    if size > MOST_VALUES:
        raise UserError(f"{path}: its aliases stand for more than {MOST_VALUES:,} values. Write them out.")


def _size(value: object, known: dict[int, int]) -> int:
    """Return how many values there are with all aliases written out."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(part, known) for part in inner)
    return known[id(value)]


def refuse_empty(part: str, made: type, settings: Any) -> None:
    """Raise UserError if a value of `settings`, by name, is null and must not be: of classes the parser lets it pass.

    `part` of the configuration, such as `model`, is what `made` is made for.
    """
    own = [vars(kind)["__init__"] for kind in reversed(made.__mro__) if "__init__" in vars(kind)]  # **kwargs hand on
    parameters = {name: taken for init in own for name, taken in inspect.signature(init).parameters.items()}
    for name, value in vars(settings).items() if isinstance(settings, Namespace) else ():
        if value is None and name in parameters and parameters[name].default is not None:
            raise UserError(f"{part}.{name}: is null. Give a value, or leave it out.")


def refuse_duplicates(callbacks: list[Any]) -> None:
    """Raise UserError if a callback is configured twice, which Lightning would accept."""
    for class_path, count in Counter(callback["class_path"] for callback in callbacks).items():
        if count > 1:
            raise UserError(f"trainer.callbacks: {class_path} is given {count} times. Leave one of the overlays out.")


def add_overlay(settings: Any, overlay: dict[str, Any]) -> None:
    """Add parsed YAML to parsed settings as a further `--config` would; its callbacks replace those of their kind."""
    for part in ("model", "data"):
        for name, value in overlay.get(part, {}).get("init_args", {}).items():
            own = settings[part]["init_args"]
            group = vars(own[name]) if isinstance(own[name], Namespace) else {}  # nothing: its defaults count
            own[name] = Namespace(**{**group, **value}) if isinstance(value, dict) else value
    trainer = overlay.get("trainer", {})
    if "strategy" in trainer:
        settings["trainer"]["strategy"] = trainer["strategy"]
    added = with_whole_paths(trainer.get("callbacks+", []))
    kinds = {entry["class_path"] for entry in added}
    settings["trainer"]["callbacks"] = [
        *(entry for entry in settings["trainer"]["callbacks"] or [] if entry["class_path"] not in kinds),
        *(Namespace(class_path=e["class_path"], init_args=Namespace(**e.get("init_args", {}))) for e in added),
    ]


def check_devices(trainer: Any) -> None:
    """Raise UserError for an accelerator that does not exist, or a strategy that is not known to train rightly."""
    accelerator, strategy = trainer["accelerator"], trainer["strategy"]
    if isinstance(accelerator, str) and accelerator not in ACCELERATORS:
        raise UserError(f"trainer.accelerator: {accelerator!r} is unknown. Choose from {', '.join(ACCELERATORS)}.")
    if isinstance(strategy, str) and strategy in SHORT:
        strategy = trainer["strategy"] = SHORT[strategy]
    own = Namespace() if isinstance(strategy, str) else strategy.get("init_args", Namespace())
    name = strategy if isinstance(strategy, str) else strategy["class_path"]
    if name not in STRATEGIES or own.get("start_method", "popen") != "popen":
        raise UserError(
            f"trainer.strategy: {name} is not known to train rightly here: its processes could drift apart unseen. "
            "Choose auto, ddp, fsdp or hsdp."
        )


def device_type(accelerator: object) -> str:
    """Return cpu, cuda or mps for Lightning's accelerator setting."""
    if accelerator in ("cuda", "gpu", "auto", None) and torch.cuda.is_available():
        return "cuda"
    if accelerator in ("mps", "gpu", "auto", None) and torch.backends.mps.is_available():
        return "mps"
    return "cpu"
