"""YAML files and `key=value` words to frozen dataclasses: one loader for every recipe.

Every value is read by the type of its field. A text field takes the text as it stands (`output=007` is a folder `007`), so
nothing is guessed: `on`, `12:30` or `1e3` are texts there, and errors where a number is asked for. Nothing is resolved
either: no `${...}`, no environment variable, no `~`.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_args, get_origin

import yaml

from unidiff.errors import DamagedFile, check_regular, first_line, reading
from unidiff.schema import check_value, describe, field_types, from_data, short_value

T = TypeVar("T")
_TRUTH = {word: truth for truth in (True, False) for word in (str(truth), str(truth).lower(), str(truth).upper())}
_NOTHING = ("null", "Null", "NULL", "~", "")
_HOME = re.compile(r"(^|::)~[^/\s]*(/|$)")
CONFIGS = Path(__file__).parent / "configs"
"""Settings that come with the package."""
_LONGEST_FILE = 2**20  # bytes
_MOST_VALUES, _DEEPEST = 20_000, 40


def load_config(schema: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Read `path` (YAML in UTF-8, or the name of a config of the package; None for the defaults alone) into `schema`, then apply `key.sub=value` overrides.

    Args:
        schema: a frozen dataclass, nested ones allowed; its defaults fill whatever the file leaves out.
        overrides: dotted assignments as typed on a command line. A text is taken as it stands, but for one pair of quotes
            around it (`key=''` is the empty text); lists and mappings are YAML: `data.shards=[a.tar, b.tar]`. Of several
            for one key the last one counts.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: an unknown key, a value of the wrong type, or no YAML; the message names it and where it stands.
    """
    settings: dict[str, Any] = {}
    if path is not None and (root := _read_yaml(path)) is not None:
        reader = _YamlReader(schema, str(path))
        settings = reader.value(root, schema, "")
    for text in overrides:
        _merge(settings, _override(schema, text))
    try:
        return from_data(schema, settings, "the config")
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if path is not None else str(error)) from error


def top_keys(path: str | Path) -> set[str]:
    """The outermost keys of a YAML file, which tell what it configures; errors as of `load_config`."""
    root = _read_yaml(path)
    return set() if root is None else {name.value for name, _ in root.value}


def named_config(name: str) -> Path:
    """The file of a config that comes with the package. Raises FileNotFoundError for a name that there is not."""
    known = {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}
    if name not in known:
        raise FileNotFoundError(f"config {short_value(name)} does not exist; there are {', '.join(known)}")
    return known[name]


def dump_config(config: Any) -> str:
    """The YAML text of a config dataclass; `load_config` reads it back."""
    return yaml.safe_dump(asdict(config), sort_keys=False, width=120)


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


class _Loader(yaml.SafeLoader):
    """Scalars stay the texts that they are: the fields' types say what they mean."""

    yaml_implicit_resolvers: ClassVar[dict] = {}


_TAGS = {yaml.ScalarNode: "str", yaml.SequenceNode: "seq", yaml.MappingNode: "map"}


@dataclass
class _YamlReader:
    """Typed values of a YAML tree. `source` opens every message."""

    schema: type
    source: str
    line_numbers: bool = True
    count: int = 0

    def value(self, node: yaml.Node, annotation: Any, key: str, depth: int = 0) -> Any:
        """What `node` means for a field of this type; a dataclass is a dict of those of its fields that are there."""
        self.count += 1
        if self.count > _MOST_VALUES or depth > _DEEPEST:
            raise self.wrong(
                node, f"there are more than {_MOST_VALUES} values, or more than {_DEEPEST} inside each other"
            )
        if node.tag != f"tag:yaml.org,2002:{_TAGS[type(node)]}":
            raise self.wrong(node, f"{key or 'the file'} has the tag {node.tag!r}; leave tags out")
        kinds = _alternatives(annotation)
        if types.NoneType in kinds and _is_nothing(node):
            return None
        annotation = kinds[0]
        origin, parts = get_origin(_bare(annotation)), get_args(_bare(annotation))
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, annotation, key)
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, annotation, key, depth)
        if annotation is Any:
            parts = (Any, ...)
        elif origin not in (list, tuple, Sequence):
            raise self.wrong(node, f"{key} is a list; expected {_expected(annotation)}")
        inner = parts if origin is tuple and parts[-1] is not Ellipsis else [parts[0]] * len(node.value)
        if len(inner) != len(node.value):
            raise self.wrong(node, f"{key} holds {len(node.value)} values; expected {describe(annotation)}")
        found = [self.value(v, part, f"{key}[{n}]", depth + 1) for n, (v, part) in enumerate(zip(node.value, inner))]
        return tuple(found) if origin is tuple else found

    def mapping(self, node: yaml.MappingNode, annotation: Any, key: str, depth: int) -> dict[str, Any]:
        """A mapping for a dataclass, a dict, or anything."""
        nested, free = is_dataclass(annotation), annotation is Any or get_origin(annotation) in (dict, Mapping)
        if not nested and not free:
            said = f"{key} is a mapping; expected {_expected(annotation)}; put a text with braces in quotes"
            raise self.wrong(node, said)
        found: dict[str, Any] = {}
        for name_node, value in node.value:
            if not isinstance(name_node, yaml.ScalarNode):
                raise self.wrong(name_node, f"a key of {key or 'the file'} is no plain text")
            name = name_node.value
            whole = f"{key}.{name}" if key else name
            if name in found:
                raise self.wrong(name_node, f"the key {whole!r} is there twice, which is not valid YAML; leave one out")
            kinds = field_types(annotation) if nested else {name: Any if annotation is Any else get_args(annotation)[1]}
            if name not in kinds:
                raise self.wrong(name_node, _unknown(self.schema, whole))
            found[name] = self.value(value, kinds[name], whole, depth + 1)
        return found

    def scalar(self, node: yaml.ScalarNode, annotation: Any, key: str) -> Any:
        """A plain value. A quoted text is the same as an unquoted one, except where it would mean nothing (null)."""
        text, expected, bounded = node.value, _expected(annotation), annotation
        annotation = _bare(annotation)
        if "${" in text:
            raise self.wrong(
                node, f"{key} is {short_value(text)}; nothing is put in for ${{...}}, write the value itself"
            )
        if annotation is str or annotation is Any:
            value = text if node.style is not None or annotation is str else _guess(text)
            if annotation is str and _is_nothing(node):
                raise self.wrong(node, f"{key} is nothing (null); expected {expected}, '' for none")
        elif is_dataclass(annotation) or get_origin(annotation) is not None:
            listed = get_origin(annotation) in (list, tuple, Sequence)
            hint = f", for instance {key}=[{text}]" if listed and not self.line_numbers and len(text) < 80 else ""
            raise self.wrong(node, f"{key} is {short_value(text)}; expected {expected}{hint}")
        else:
            value = _typed(text.strip(), annotation)
            if value is None:
                raise self.wrong(node, f"{key} is {short_value(text)}; expected {expected}")
        if isinstance(value, str) and _HOME.search(value):
            raise self.wrong(node, f"{key} is {short_value(value)}; ~ is not looked up, write the whole path (or ./~)")
        if isinstance(value, str) and ("\0" in value or value != value.encode("utf-8", "ignore").decode()):
            raise self.wrong(node, f"{key} is {short_value(value)}; it holds characters that no text has")
        try:
            check_value(value, bounded, key)
        except ValueError as error:
            bounds = " that 64 bits hold" if bounded in (int, float) else ""
            raise self.wrong(node, f"{error}{bounds}") from None
        return value

    def wrong(self, node: yaml.Node, reason: str) -> ValueError:
        line = f" line {node.start_mark.line + 1}" if self.line_numbers and node.start_mark else ""
        return ValueError(f"{self.source}{line}: {reason}")


def _read_yaml(path: str | Path) -> yaml.Node | None:
    """The tree of a YAML file, None for an empty one."""
    file = Path(path)
    if not file.exists():
        if file.suffix or file.name != str(path):
            raise FileNotFoundError(f"config file {str(path)!r} does not exist")
        file = named_config(str(path))
    check_regular(file)
    with reading(path, "a config (YAML in UTF-8)"), open(file, "rb") as handle:
        content = handle.read(_LONGEST_FILE + 1)
        if len(content) > _LONGEST_FILE:
            raise DamagedFile(f"{str(path)!r} is larger than {_LONGEST_FILE // 2**20} MiB; that is no config")
        text = content.decode("utf-8-sig")
    root = _compose(text, str(path))
    if root is not None and not isinstance(root, yaml.MappingNode):
        if _is_nothing(root):
            return None
        kind = "a list" if isinstance(root, yaml.SequenceNode) else "a text"
        raise ValueError(f"{path} holds {kind}; expected `key: value` lines")
    return root


def _compose(text: str, source: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Loader)
    except RecursionError:
        raise ValueError(f"{source}: brackets or indents lie too deep inside each other") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).replace('in "<unicode string>", ', "").split())[:300]
        hint = "; indent with spaces, not with tabs" if "'\\t'" in reason else ""
        raise ValueError(f"{source} is not valid YAML: {reason}{hint}") from None
    except (ValueError, OverflowError) as error:  # the number of a character that does not exist
        raise ValueError(f"{source} is not valid YAML: {first_line(error)}") from None


def _override(schema: type, word: str) -> dict[str, Any]:
    """The nested dict of one `key.sub=value`."""
    key, equals, text = word.partition("=")
    source = f"override {short_value(word)}"
    if not equals or not key.strip():
        raise ValueError(f"{source} is not of the form key=value")
    names = key.strip().split(".")
    annotation: Any = schema
    for number, name in enumerate(names):
        origin = get_origin(annotation)
        if is_dataclass(annotation) and name in field_types(annotation):  # type: ignore[arg-type]
            annotation = field_types(annotation)[name]  # type: ignore[arg-type]
        elif name and (annotation is Any or origin in (dict, Mapping)):  # keys of its own
            annotation = Any if annotation is Any else get_args(annotation)[1]
        elif name and number and not is_dataclass(annotation):
            whole = ".".join(names[:number])
            raise ValueError(f"{source}: {whole} is no mapping but {_expected(annotation)}; write {whole}=...")
        else:
            raise ValueError(f"{source}: {_unknown(schema, '.'.join(names))}")
    if len(names) > _DEEPEST:
        raise ValueError(f"{source}: more than {_DEEPEST} keys inside each other")
    reader = _YamlReader(schema, source, line_numbers=False)
    found = reader.value(_override_node(text, annotation, source), annotation, ".".join(names))
    for name in reversed(names):
        found = {name: found}
    return found


def _override_node(text: str, annotation: Any, source: str) -> yaml.Node:
    """YAML for lists and mappings, and for what looks like it where anything goes; else the text as it stands."""
    wanted = [_bare(kind) for kind in _alternatives(annotation)]
    structured = any(is_dataclass(kind) or get_origin(kind) is not None for kind in wanted)
    if structured or (annotation is Any and text.strip()[:1] in ("[", "{", "'", '"')):
        node = _compose(text, source)
        if node is not None and not text[node.end_mark.index :].strip():
            return node
        if node is not None:
            raise ValueError(
                f"{source}: what follows {short_value(text[: node.end_mark.index])} would be left out; remove it"
            )
    if str in wanted and len(text) > 1 and text[0] == text[-1] in ("'", '"'):
        inside = text[1:-1]  # as YAML has it: key='' is the empty text
        text = text if text[0] in inside or "\\" in inside else inside
        wanted = [str]
    optional_null = types.NoneType in wanted and text == "null"
    mark = yaml.Mark(source, 0, 0, 0, None, None)
    style = None if optional_null or annotation is Any or str not in wanted else "'"
    return yaml.ScalarNode("tag:yaml.org,2002:str", text, mark, mark, style)


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> None:
    """Put `above` over `below`, mappings key by key. In place."""
    for name, value in above.items():
        if isinstance(value, Mapping) and isinstance(below.get(name), dict):
            _merge(below[name], value)
        else:
            below[name] = value


def _typed(text: str, kind: Any) -> Any:
    """A number or a truth, or None where the text is none; whole numbers may be written as 1e3."""
    if kind is bool:
        return _TRUTH.get(text)
    if kind in (int, float) and text.isascii() and text.lstrip("+-")[:3].lower() not in ("nan", "inf"):
        with suppress(ValueError):
            return kind(text)
        with suppress(ValueError):
            number = float(text)
            return int(number) if number.is_integer() and abs(number) < 2**53 else None
    return None


def _guess(text: str) -> Any:
    """An unquoted value of a field that takes anything, by the rules of YAML 1.2: nothing, truth, number, or text."""
    if text in _NOTHING:
        return None
    whole = _typed(text, int) if text.lstrip("+-").replace("_", "").isdecimal() else None
    found = (value for value in (_TRUTH.get(text), whole, _typed(text, float)) if value is not None)
    return next(found, text)


def _alternatives(annotation: Any) -> list[Any]:
    """The types of a union (one besides nothing, in all schemas), or the type itself."""
    union = get_origin(annotation) in (typing.Union, types.UnionType)
    return sorted(get_args(annotation), key=lambda kind: kind is types.NoneType) if union else [annotation]


def _bare(annotation: Any) -> Any:
    """A type without the bounds of its values."""
    origin, parts = get_origin(annotation), get_args(annotation)
    return parts[0] if origin is Annotated else type(parts[0]) if origin is typing.Literal else annotation


def _is_nothing(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value in _NOTHING


def _expected(annotation: Any) -> str:
    if is_dataclass(annotation):
        names = ", ".join(field.name for field in fields(annotation))
        return f"a mapping of settings ({names})"
    return describe(annotation).replace(", each value a Any", "")


def _unknown(schema: type, key: str) -> str:
    """A sentence about an unknown key, with the nearest one that there is."""
    known, names = list(all_keys(schema)), key.split(".")
    if new := _new_name(schema, names):
        return f"the key {short_value(key)} has a new name: {new}"
    last, place = names[-1], ""
    near = [k for k in known if k.rpartition(".")[2] == last]
    for number, name in enumerate(names):
        level = [k.removeprefix(place) for k in known if k.startswith(place)]
        if not near and name not in level:
            found = difflib.get_close_matches(name, [k for k in level if "." not in k], 1, 0.6)
            longer = [".".join([place + n, *names[number + 1 :]]) for n in found]
            near = [k for k in longer if k in known] or [place + n for n in found]
            break
        place += f"{name}."
    if not near:
        ends = {k.rpartition(".")[2]: k for k in known}
        near = [ends[name] for name in difflib.get_close_matches(last, ends, 1, 0.6)]
    nearest = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(field_types(schema))}"
    return f"the key {short_value(key)} is unknown{nearest}"


def _new_name(schema: Any, names: list[str]) -> str | None:
    """What a key is called now, where a dataclass on the way to it says so (`renamed`: former name to name)."""
    for number, name in enumerate(names):
        if not is_dataclass(schema):
            return None
        if new := getattr(schema, "renamed", {}).get(name):
            return ".".join([*names[:number], new, *names[number + 1 :]])
        schema = field_types(schema).get(name)  # type: ignore[arg-type]
    return None


def all_keys(schema: type, before: str = "") -> Iterator[str]:
    """All dotted keys."""
    for name, annotation in field_types(schema).items():
        yield f"{before}{name}"
        if is_dataclass(annotation):
            yield from all_keys(annotation, f"{before}{name}.")  # type: ignore[arg-type]
