"""From a YAML file and dotted overrides to a checked configuration; errors name file, field and remedy."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError

from pipeline.config.core import Config, ConfigError

C = TypeVar("C", bound=Config)


COMMAND_LINE = "command line"
"""What errors name as the source of values that stand in no file."""


def load_config(path: str | Path | None, overrides: Sequence[str], config_class: type[C]) -> C:
    """Reads a YAML file, if any, into `config_class` and lays `field.sub=value` overrides on top (values are YAML).

    A file that says `extends: other.yaml`, relative to itself, holds only what differs from that one; lists are replaced.
    Raises ConfigError naming file, field and remedy.
    """
    values, sources = _read_all(path, overrides, config_class)
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        where = COMMAND_LINE if path is None else str(path)
        raise ConfigError("\n".join(_explain(where, sources, config_class, e) for e in error.errors())) from None


def read_values(path: str | Path | None, overrides: Sequence[str], config_class: type[C]) -> dict[str, Any]:
    """Returns what `load_config` reads before it checks it: one mapping of files and overrides, by names of fields."""
    return _read_all(path, overrides, config_class)[0]


def _read_all(
    path: str | Path | None, overrides: Sequence[str], config_class: type[C]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the values, and by dotted name the file or override that each comes from."""
    sources: dict[str, str] = {}
    values = {} if path is None else _read(Path(path), (), config_class, sources)
    for override in overrides:
        sources[_override(values, override, config_class)] = f"override {override!r}"
    return values, sources


def with_values(config: C, values: Mapping[str, Any], source: str) -> C:
    """Returns a configuration with other values of some fields, by dotted name, checked as a whole.

    Raises ConfigError naming `source`, field and remedy.
    """
    plain = config.model_dump()
    for name, value in values.items():
        *path, last = field_path(name, type(config)).split(".")
        group = plain
        for part in path:
            group = group.setdefault(part, {})
            if not isinstance(group, dict):
                raise ConfigError(f"{source}: {name}: {part!r} is no group of fields")
        group[last] = value
    try:
        return type(config).model_validate(plain)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(source, {}, type(config), e) for e in error.errors())) from None


def _read(path: Path, extending: Sequence[Path], config_class: type[Config], sources: dict[str, str]) -> dict[str, Any]:
    """Returns what a YAML file and those that it extends say; `extending` are the files that extend it.

    `sources` gets the file of each value, by dotted name.
    """
    if path.resolve() in extending:
        raise ConfigError(f"{extending[0]}: `extends` leads back to {path.name}; remove one of them")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except FileNotFoundError:
        hint = "; it comes first, and FIELD=VALUE after it" if "=" in path.name else ""
        hint = f", which {extending[-1]} extends" if extending else hint
        raise ConfigError(f"{path}: no such configuration file{hint}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark is not None else ""
        raise ConfigError(f"{path}: not valid YAML: {where}{error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must be a mapping of fields, found {type(values).__name__}")
    try:
        values = _by_field_names(values, config_class)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    other = values.pop("extends", None)
    for name in _leaves(values):
        sources.setdefault(name, str(path))
    if other is None:
        return values
    if not isinstance(other, str):
        raise ConfigError(f"{path}: extends: must be the path of one file, found {type(other).__name__}")
    return _merged(_read(path.parent / other, (*extending, path.resolve()), config_class, sources), values)


def _leaves(values: Any, prefix: str = "") -> Iterator[str]:
    """Yields the dotted names of the values in groups and lists."""
    entries = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else None
    if not entries:
        yield prefix.removesuffix(".")
        return
    for name, value in entries:
        yield from _leaves(value, f"{prefix}{name}.")


def _merged(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Returns groups of fields with those of `now` on top."""
    merged = dict(before)
    for name, value in now.items():
        both = isinstance(value, dict) and isinstance(before.get(name), dict)
        merged[name] = _merged(before[name], value) if both else value
    return merged


def _by_field_names(values: Any, config_class: type[Config], prefix: str = "") -> Any:
    """Returns values by the names of the fields, not by aliases or former names; raises ValueError where one is given twice."""
    if isinstance(values, list):
        return [_by_field_names(entry, config_class, f"{prefix}{i}.") for i, entry in enumerate(values)]
    if not isinstance(values, dict):
        return values
    renamed = config_class.without_aliases(values, prefix)
    for name, value in renamed.items():
        field = config_class.model_fields.get(name)
        if field is not None and (group := group_of(field.annotation)) is not None:
            renamed[name] = _by_field_names(value, group, f"{prefix}{name}.")
    return renamed


def _override(values: dict[str, Any], override: str, config_class: type[Config]) -> str:
    """Lays an override on values; returns the field's dotted name."""
    key, separator, text = override.partition("=")
    if not separator:
        raise ConfigError(f"override {override!r}: write it as field.sub=value, e.g. expert.rank=16")
    *path, last = field_path(key.strip(), config_class).split(".")
    group: Any = values
    config: type[Config] | None = config_class
    done: list[str] = []
    for part in path:
        name, config = _step(group, part, config, ".".join(done), override)
        group = group[name]
        done.append(str(name))
    name, _ = _step(group, last, config, ".".join(done), override, is_last=True)
    try:
        group[name] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: not valid YAML: {error}") from None
    return ".".join((*done, str(name)))


def _step(
    group: Any, part: str, config: type[Config] | None, path: str, override: str, *, is_last: bool = False
) -> tuple[str | int, type[Config] | None]:
    """Returns the key of `part` in a group or list of values, and the class of what is there; makes groups on the way.

    `path` is the dotted name of `group`. Raises ConfigError where it has no such entry, or is no group.
    """
    if isinstance(group, list):
        return _entry(group, part, path, override), config
    if not isinstance(group, dict):
        raise ConfigError(f"override {override!r}: {path} is not a group of fields but {group!r}")
    field = config.model_fields.get(part) if config is not None else None
    inner = group_of(field.annotation) if field is not None else None
    if is_last:
        return part, inner
    if group.get(part) is None and get_origin(field.annotation if field is not None else None) is tuple:
        raise ConfigError(
            f"override {override!r}: {path}{'.' * bool(path)}{part} has no entries; write them into the file"
        )
    if group.get(part) is None:  # left empty in the file
        group[part] = {}
    elif isinstance(group[part], str) and inner is not None and "path" in inner.model_fields:
        group[part] = {"path": group[part]}  # a source may be written as its path
    elif not isinstance(group[part], (dict, list)):
        raise ConfigError(f"override {override!r}: {part!r} is not a group of fields but {group[part]!r}")
    return part, inner


def _entry(entries: list[Any], part: str, path: str, override: str) -> int:
    """Returns the index of the entry of a list that has this number or this `name`."""
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in entries]
    if part in names:
        return names.index(part)
    if part.isdecimal() and int(part) < len(entries):
        return int(part)
    known = ", ".join(f"{i} ({name})" if name else str(i) for i, name in enumerate(names))
    raise ConfigError(f"override {override!r}: {path} has no entry {part!r}; there are: {known or 'none'}")


_INDEX = re.compile(r"\[\s*([^\[\]]+?)\s*\]")


def field_path(path: str, config_class: type[Config]) -> str:
    """Returns a dotted name, of which parts may be aliases or former names, by the names of the fields.

    Entries of lists are named by number or by their `name`: `stream.tasks[0]`, `stream.tasks.0`, `stream.tasks.digits`.
    """
    names: list[str] = []
    group: type[Config] | None = config_class
    is_entry = False
    for part in _INDEX.sub(r".\1", path).split("."):
        if is_entry:
            names.append(part)
            is_entry = False
            continue
        name = group.field_name(part) if group is not None else part
        field = group.model_fields.get(name) if group is not None else None
        group = group_of(field.annotation) if field is not None else None
        is_entry = group is not None and field is not None and get_origin(field.annotation) is tuple
        names.append(name)
    return ".".join(names)


ELSEWHERE = {
    "lr": "expert.learning_rate",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "deepspeed": "training.zero_stage",
    "gradient_accumulation_steps": "training.micro_batch",
    "num_train_epochs": "expert.steps",
    "lora_r": "expert.rank",
    "torch_dtype": "base.dtype",
}
"""Names of PEFT, the HF Trainer and DeepSpeed that mean something else here, and the field to look at."""

UNION_TAGS = {"int", "str", "float"}
"""What pydantic adds to the place of an error where a field has several types."""


def _explain(path: str, sources: Mapping[str, str], config_class: type[Config], error: Any) -> str:
    """One readable line for a pydantic error: which file or override, where, what, and what would be right."""
    parts = [part for part in error["loc"] if part not in UNION_TAGS]
    where = ".".join(str(part) for part in parts)
    source = sources.get(where) or next((f for name, f in sources.items() if name.startswith(f"{where}.")), path)
    group = f"{where}: " if where else ""
    key = ".".join(part for part in parts if isinstance(part, str))  # without the numbers of tasks
    fields = dict(fields_of(config_class, everywhere=True))
    if error["type"] == "extra_forbidden":
        return f"{source}: {group}no such field; {_hint(key, list(fields), config_class)}"
    former = {name: before for before, name in other_names_of(config_class, former_only=True).items()}
    if key in former:
        group = f"{where} (formerly {former[key]}): "
    field = fields.get(key) if parts and isinstance(parts[-1], str) else None  # not of an entry of a list
    meaning = f"\n    {where}: {' '.join(field.description.split())}" if field is not None and field.description else ""
    # Of a whole group all would be printed that is right, too.
    without_input = error["type"] == "missing" or isinstance(error["input"], (dict, Config))
    given = "" if without_input else f" (given: {error['input']!r})"
    return f"{source}: {group}{error['msg'].removeprefix('Value error, ')}{given}{meaning}"


def _hint(key: str, fields: Sequence[str], config_class: type[Config]) -> str:
    """Returns which field may be meant by a name that is none."""
    if (elsewhere := ELSEWHERE.get(key.rpartition(".")[2])) in fields:
        return f"see `{elsewhere}`"
    groups = {name.rpartition(".")[0] for name in fields}
    kept = [name for name in fields if name not in groups or ("." not in key and "." not in name)]
    names = {name: name for name in kept} | other_names_of(config_class)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    return (
        f"did you mean `{names[near[0]]}`?" if near else f"`pointsman {config_class.COMMAND} --help` lists the fields"
    )


def aliases_of(config_class: type[Config], prefix: str = "") -> dict[str, str]:
    """Returns names from other libraries that are accepted, dotted, and the fields that they stand for."""
    aliases = {f"{prefix}{alias}": f"{prefix}{name}" for alias, name in config_class.ALIASES.items()}
    for name, group in _groups(config_class):
        aliases |= aliases_of(group, f"{prefix}{name}.")
    return aliases


def other_names_of(config_class: type[Config], prefix: str = "", *, former_only: bool = False) -> dict[str, str]:
    """Returns former names and aliases, dotted, and the fields that they stand for; `former_only` leaves aliases out."""
    names = {f"{prefix}{before}": f"{prefix}{name}" for name, before in config_class.FORMER_NAMES.items()}
    if not former_only:
        names |= {f"{prefix}{alias}": f"{prefix}{name}" for alias, name in config_class.ALIASES.items()}
    for name, group in _groups(config_class):
        names |= other_names_of(group, f"{prefix}{name}.", former_only=former_only)
    return names


def _groups(config_class: type[Config]) -> Iterator[tuple[str, type[Config]]]:
    for name, field in config_class.model_fields.items():
        if (group := group_of(field.annotation)) is not None:
            yield name, group


def fields_of(config_class: type[Config], prefix: str = "", *, everywhere: bool = False) -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, pydantic field) of a configuration class, depth first.

    With `everywhere` also the fields of optional groups and of the groups in lists, e.g. `stream.tasks.name`.
    """
    for name, field in config_class.model_fields.items():
        yield f"{prefix}{name}", field
        group = group_of(field.annotation) if everywhere else field.annotation
        if isinstance(group, type) and issubclass(group, Config):
            yield from fields_of(group, f"{prefix}{name}.", everywhere=everywhere)


def documented_fields(config_class: type[Config]) -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, pydantic field) of each group once; `[]` marks a list: `stream.tasks[].train.path`."""
    seen: set[type[Config]] = set()

    def visit(group: type[Config], prefix: str) -> Iterator[tuple[str, Any]]:
        seen.add(group)
        for name, field in group.model_fields.items():
            yield f"{prefix}{name}", field
            inner = group_of(field.annotation)
            if inner is not None and inner not in seen:
                yield from visit(inner, f"{prefix}{name}{'[]' * (get_origin(field.annotation) is tuple)}.")

    return visit(config_class, "")


def group_of(annotation: Any) -> type[Config] | None:
    """Returns the group inside an annotation such as `tuple[TaskConfig, ...]` or `Source | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    return next((group for part in get_args(annotation) if (group := group_of(part))), None)
