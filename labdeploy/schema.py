"""One declaration per inventory key: reading, checking, JSON Schema and the reference page all come from it.

A dataclass field made with `setting(kind, doc)` is a key of the inventory. `read_record` turns a YAML node into
that dataclass and notes every problem with its path and line instead of stopping at the first one.
"""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NewType, Protocol, TypeVar

import yaml

from labdeploy.addresses import is_ip
from labdeploy.errors import InventoryError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

T = TypeVar("T")
Mib = NewType("Mib", int)

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MERGE_TAG = "tag:yaml.org,2002:merge"
NULL_TAG = "tag:yaml.org,2002:null"
_INT_TAG = "tag:yaml.org,2002:int"


@dataclass(frozen=True)
class Problem:
    """One thing wrong with an inventory: `inventory.yaml:12: hosts.gpu1.address: ...`."""

    file: str
    line: int
    path: str
    what: str

    def __str__(self) -> str:
        return ": ".join(part for part in (f"{self.file}:{self.line}", self.path, self.what) if part)


class InventoryProblemsError(InventoryError):
    """Every problem of one inventory at once."""

    def __init__(self, problems: Iterable[Problem], *, hint: str = "") -> None:
        self.problems = tuple(sorted(problems, key=lambda problem: (problem.file, problem.line)))
        super().__init__("\n".join(map(str, self.problems)), hint=hint)


@dataclass(frozen=True)
class Place:
    """Where in which file we are, and the list that problems are added to."""

    file: str
    path: str
    problems: list[Problem] = field(default_factory=list, compare=False)

    def key(self, name: str) -> Place:
        """Give the place of a key below this one."""
        name = name if name.isprintable() else repr(name)
        return Place(self.file, f"{self.path}.{name}" if self.path else name, self.problems)

    def item(self, index: int) -> Place:
        """Give the place of a list item below this one."""
        return Place(self.file, f"{self.path}[{index}]", self.problems)

    def problem(self, node: yaml.Node, what: str) -> None:
        """Note a problem at a node."""
        self.problems.append(Problem(self.file, node.start_mark.line + 1, self.path, what))


class Kind(Protocol):
    """What values a key takes: how one is read, and how a JSON Schema says it."""

    def read(self, node: yaml.Node, place: Place) -> Any:  # noqa: ANN401
        """Return the value, or note a problem and return None."""

    def json_schema(self) -> dict[str, Any]:
        """Describe the accepted values as a JSON Schema."""

    def words(self) -> str:
        """Describe the accepted values in a few words, for the reference page."""


def setting(kind: Kind, doc: str, *, default: Any = dataclasses.MISSING) -> Any:  # noqa: ANN401
    """Declare a dataclass field that is a key of the inventory; `default=dict` makes an empty mapping."""
    metadata = {"kind": kind, "doc": doc}
    if default is dict:
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


def required(declared: dataclasses.Field[Any]) -> bool:
    """Tell whether a key must be written."""
    return declared.default is dataclasses.MISSING and declared.default_factory is dataclasses.MISSING


# --- scalars ---------------------------------------------------------------------------------------------------


# Controls, line separators, lone surrogates, and Unicode's noncharacters: systemd drops a line that holds one.
_NONCHARACTERS = "\ufdd0-\ufdef" + "".join(chr(plane << 16 | low) for plane in range(17) for low in (0xFFFE, 0xFFFF))
CONTROL = re.compile(f"[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029\\ud800-\\udfff{_NONCHARACTERS}]")
_UNIT_OR_SHELL = re.compile(r"[%$`\"\\]")


def _scalar(node: yaml.Node, place: Place, wanted: str) -> str | None:
    if isinstance(node, yaml.ScalarNode) and node.tag != NULL_TAG:
        return str(node.value)
    got = {"MappingNode": "a mapping", "SequenceNode": "a list"}.get(type(node).__name__, "nothing")
    place.problem(node, f"expected {wanted}, found {got}")
    return None


@dataclass(frozen=True)
class Text:
    """One line of text that goes into units as it is: nothing that a unit file or a shell reads specially."""

    what: str = "text"
    pattern: str = r".+"
    rule: str = ""

    def read(self, node: yaml.Node, place: Place) -> str | None:
        """Return the text if it is harmless and of the wanted form."""
        text = _scalar(node, place, self.what)
        if text is None:
            return None
        if found := CONTROL.search(text):
            place.problem(node, f"{text!r} holds a line break or control character ({found.group()!r})")
        elif found := _UNIT_OR_SHELL.search(text):
            place.problem(node, f"{text!r} holds {found.group()}, which units or shells read specially")
        elif not re.fullmatch(self.pattern, text):
            place.problem(node, f"{text!r} is not {self.what}" + (f" ({self.rule})" if self.rule else ""))
        else:
            return text
        return None

    def json_schema(self) -> dict[str, Any]:
        """Describe the text: strings, and bare numbers that YAML would not read as strings."""
        schema: dict[str, Any] = {"type": ["string", "number"]}
        return schema if self.pattern == r".+" else schema | {"pattern": f"^(?:{self.pattern})$"}

    def words(self) -> str:
        """Say what text is meant."""
        return self.what


NAME_RULE = "letters, digits, '.', '_' and '-', at most 63, starting with a letter or digit"
Name = Text("a name", r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", NAME_RULE)
ModelName = dataclasses.replace(Name, what="a name under models")
EnvName = Text("an environment variable name", r"[A-Za-z_][A-Za-z0-9_]*")
Hostname = Text("a host name or IP address", r"[A-Za-z0-9_.:\[\]-]+")
Login = Text("a login name", r"[A-Za-z_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class PathText:
    """A path on a host or here; never with `..`, so that it cannot leave where it is put."""

    absolute: bool | None

    def read(self, node: yaml.Node, place: Place) -> str | None:
        """Return the path."""
        text = Text("a path").read(node, place)
        if text is None:
            return None
        if self.absolute is True and not text.startswith("/"):
            place.problem(node, f"{text!r} must be absolute")
        elif self.absolute is False and text.startswith("/"):
            place.problem(node, f"{text!r} must be relative: it is looked up below models_dir")
        elif self.absolute is not None and ".." in text.split("/"):
            place.problem(node, f"{text!r} must not hold '..'")
        elif self.absolute is not None and text.startswith("-"):
            place.problem(node, f"{text!r} must not start with '-': a program would read it as a flag")
        else:
            return text
        return None

    def json_schema(self) -> dict[str, Any]:
        """Describe the path."""
        return {"type": "string"} | ({"pattern": "^/"} if self.absolute else {})

    def words(self) -> str:
        """Say which kind of path is meant."""
        return {True: "an absolute path", False: "a path below models_dir", None: "a path"}[self.absolute]


AbsolutePath = PathText(absolute=True)
ModelPath = PathText(absolute=False)
LocalPath = PathText(absolute=None)


@dataclass(frozen=True)
class IpAddress:
    """An address to listen on."""

    def read(self, node: yaml.Node, place: Place) -> str | None:
        """Return the address in its shortest form, so that the same one is always written the same."""
        text = Text("an IP address").read(node, place)
        if text is None:
            return None
        if not is_ip(text):
            place.problem(node, f"{text!r} is not an IP address; write 127.0.0.1 (this host only) or 0.0.0.0")
            return None
        return str(ipaddress.ip_address(text))

    def json_schema(self) -> dict[str, Any]:
        """Describe the address."""
        return {"type": "string"}

    def words(self) -> str:
        """Say that an address is meant."""
        return "an IP address"


@dataclass(frozen=True)
class Verbatim:
    """Text passed through to a program, escaped where it is written; only line breaks and controls are refused."""

    def read(self, node: yaml.Node, place: Place) -> str | None:
        """Return the text as it is."""
        text = _scalar(node, place, "text")
        if text is not None and (found := CONTROL.search(text)):
            place.problem(node, f"{text!r} holds a line break or control character ({found.group()!r})")
            return None
        return text

    def json_schema(self) -> dict[str, Any]:
        """Describe the text."""
        return {"type": ["string", "number", "boolean"]}

    def words(self) -> str:
        """Say that any text goes."""
        return "text"


@dataclass(frozen=True)
class Block:
    """Text of any number of lines, for a file of its own; only controls other than line breaks and tabs are refused."""

    def read(self, node: yaml.Node, place: Place) -> str | None:
        """Return the text as it is."""
        text = _scalar(node, place, "text")
        if text is not None and (found := CONTROL.search(re.sub(r"[\n\t]", "", text))):
            place.problem(node, f"the text holds a control character ({found.group()!r})")
            return None
        return text

    def json_schema(self) -> dict[str, Any]:
        """Describe the text."""
        return {"type": "string"}

    def words(self) -> str:
        """Say that several lines go."""
        return "text, also of several lines"


MOST_DIGITS = 20  # of a whole number; Python refuses to read one of thousands


@dataclass(frozen=True)
class Int:
    """A whole number within bounds."""

    low: int
    high: int

    def read(self, node: yaml.Node, place: Place) -> int | None:
        """Return the number if it is one and within bounds."""
        text = _scalar(node, place, "a whole number")
        if text is None:
            return None
        if node.tag != _INT_TAG or not re.fullmatch(r"[+-]?\d+", text):
            place.problem(node, f"{text!r} is not a whole number")
        elif len(text) > MOST_DIGITS or not self.low <= int(text) <= self.high:
            place.problem(node, f"{text[:MOST_DIGITS]} is out of range; it must be from {self.low} to {self.high}")
        else:
            return int(text)
        return None

    def json_schema(self) -> dict[str, Any]:
        """Describe the number."""
        return {"type": "integer", "minimum": self.low, "maximum": self.high}

    def words(self) -> str:
        """Say the bounds."""
        return f"{self.low} to {self.high}"


Port = Int(1, 65535)


@dataclass(frozen=True)
class Number:
    """A number, whole or not, within bounds."""

    low: float
    high: float

    def read(self, node: yaml.Node, place: Place) -> float | None:
        """Return the number if it is one and within bounds."""
        text = _scalar(node, place, "a number")
        if text is None:
            return None
        if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", text):
            place.problem(node, f"{text!r} is not a number")
        elif not self.low <= float(text) <= self.high:
            place.problem(node, f"{text} is out of range; it must be from {self.low} to {self.high}")
        else:
            return float(text)
        return None

    def json_schema(self) -> dict[str, Any]:
        """Describe the number."""
        return {"type": "number", "minimum": self.low, "maximum": self.high}

    def words(self) -> str:
        """Say the bounds."""
        return f"{self.low} to {self.high}"


@dataclass(frozen=True)
class Bool:
    """Yes or no, written as YAML 1.2 writes it: `true` or `false`."""

    def read(self, node: yaml.Node, place: Place) -> bool | None:
        """Return the truth value."""
        text = _scalar(node, place, "true or false")
        if text is None or text in ("true", "false"):
            return None if text is None else text == "true"
        place.problem(node, f"{text!r} is not true or false")
        return None

    def json_schema(self) -> dict[str, Any]:
        """Describe the truth value."""
        return {"type": "boolean"}

    def words(self) -> str:
        """Say the two values."""
        return "`true` or `false`"


@dataclass(frozen=True)
class OneOf:
    """One of a few words."""

    options: tuple[str, ...]

    def read(self, node: yaml.Node, place: Place) -> str | None:
        """Return the word if it is one of the options."""
        text = _scalar(node, place, "one of " + ", ".join(self.options))
        if text is None or text in self.options:
            return text
        place.problem(node, f"{text!r} is not one of {', '.join(self.options)}{did_you_mean(text, self.options)}")
        return None

    def json_schema(self) -> dict[str, Any]:
        """Describe the options."""
        return {"enum": list(self.options)}

    def words(self) -> str:
        """List the options."""
        return ", ".join(f"`{option}`" for option in self.options)


@dataclass(frozen=True)
class OrWord:
    """Values of a kind, or a word that stands for one, as the runner's own flag takes it; None is as if unwritten."""

    of: Kind
    stands_for: Mapping[str, Any]

    def read(self, node: yaml.Node, place: Place) -> Any:  # noqa: ANN401
        """Return the value, or what the word stands for."""
        if isinstance(node, yaml.ScalarNode) and node.value in self.stands_for:
            return self.stands_for[node.value]
        inner = Place(place.file, place.path)
        value = self.of.read(node, inner)
        taken = f"{' and '.join(self.stands_for)} {'are' if len(self.stands_for) > 1 else 'is'} taken too"
        place.problems.extend(dataclasses.replace(p, what=f"{p.what}; {taken}") for p in inner.problems)
        return value

    def json_schema(self) -> dict[str, Any]:
        """Describe both."""
        return {"anyOf": [self.of.json_schema(), {"enum": list(self.stands_for)}]}

    def words(self) -> str:
        """Name the words after the values."""
        return ", ".join((self.of.words(), *(f"`{word}`" for word in self.stands_for)))


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
_MIB_PER_UNIT = {"MiB": 1, "GiB": 1024, "TiB": 1024 * 1024}


@dataclass(frozen=True)
class Size:
    """An amount of memory with its unit: `24GiB`, `512MiB`. The value is in MiB."""

    least_mib: int = 0

    def read(self, node: yaml.Node, place: Place) -> Mib | None:
        """Return the size in MiB; a bare number is refused, because nobody can know what it means."""
        text = _scalar(node, place, "a size such as 24GiB")
        if text is None:
            return None
        found = _SIZE.fullmatch(text)
        if not found:
            place.problem(node, f"{text!r} is not a size; write it like 24GiB or 512MiB")
        elif not found[2]:
            place.problem(node, f"{text} has no unit; write {text}GiB or {text}MiB")
        elif found[2] not in _MIB_PER_UNIT:
            wanted = f"write {found[1]}GiB or {found[1]}MiB"
            place.problem(node, f"{text!r}: unit {found[2]!r} is not MiB, GiB or TiB; {wanted}")
        elif float(found[1]) * _MIB_PER_UNIT[found[2]] % 1:
            place.problem(node, f"{text!r} is not a whole number of MiB")
        elif float(found[1]) * _MIB_PER_UNIT[found[2]] < self.least_mib:
            place.problem(node, f"{text!r} is no memory at all")
        else:
            return Mib(int(float(found[1]) * _MIB_PER_UNIT[found[2]]))
        return None

    def json_schema(self) -> dict[str, Any]:
        """Describe the size."""
        return {"type": "string", "pattern": r"^\d+(\.\d+)?\s*(MiB|GiB|TiB)$"}

    def words(self) -> str:
        """Show a size."""
        return "a size such as `24GiB` or `512MiB`"


# --- containers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ListOf:
    """A list of values of one kind."""

    of: Kind

    def read(self, node: yaml.Node, place: Place) -> tuple[Any, ...] | None:
        """Return the values; wrong ones are noted and left out."""
        if not isinstance(node, yaml.SequenceNode):
            place.problem(node, "expected a list")
            return None
        values = (self.of.read(item, place.item(i)) for i, item in enumerate(node.value))
        return tuple(value for value in values if value is not None)

    def json_schema(self) -> dict[str, Any]:
        """Describe the list."""
        return {"type": "array", "items": self.of.json_schema()}

    def words(self) -> str:
        """Say what it lists."""
        return f"a list of {self.of.words()}"


@dataclass(frozen=True)
class MapOf:
    """A mapping from names to values of one kind."""

    names: Text
    of: Kind

    def read(self, node: yaml.Node, place: Place) -> dict[str, Any] | None:
        """Return the mapping; wrong entries are noted and left out."""
        found = {}
        for key, value_node in entries(node, place):
            name = self.names.read(key, place.key(key.value))
            value = self.of.read(value_node, place.key(key.value))
            if name is not None and value is not None:
                found[name] = value
        return found

    def json_schema(self) -> dict[str, Any]:
        """Describe the mapping."""
        return {
            "type": "object",
            "propertyNames": {"pattern": f"^(?:{self.names.pattern})$"},
            "additionalProperties": self.of.json_schema(),
        }

    def words(self) -> str:
        """Say what it maps."""
        return f"a mapping from {self.names.what.removeprefix('a ').removeprefix('an ')} to {self.of.words()}"


@dataclass(frozen=True)
class Flags:
    """Extra command-line flags: a list of words, or a mapping `{flag: value}` with `true` for a flag without one."""

    def read(self, node: yaml.Node, place: Place) -> tuple[str, ...] | None:
        """Return the words in order."""
        if isinstance(node, yaml.SequenceNode):
            return ListOf(Verbatim()).read(node, place)
        words: list[str] = []
        for key, value in entries(node, place):
            here = place.key(key.value)
            flag, text = Verbatim().read(key, here), Verbatim().read(value, here)
            if text == "false":
                here.problem(value, "false sets no flag; leave the line out, or write the flag's no- form")
            words += [_dashed(flag or "")]
            words += [] if text in ("true", "false", None) else [text]
        return tuple(words)

    def json_schema(self) -> dict[str, Any]:
        """Describe both forms."""
        value = Verbatim().json_schema()
        as_mapping = {"type": "object", "additionalProperties": value}
        return {"anyOf": [{"type": "array", "items": value}, as_mapping]}

    def words(self) -> str:
        """Name both forms."""
        return "a list of words, or a mapping from flag to value"


def _dashed(flag: str) -> str:
    """Write a key as a flag: dashes as written, else two, or one before a single letter."""
    dashes = "" if flag.startswith("-") else "-" if len(flag) == 1 else "--"
    return dashes + flag.replace("_", "-")


@dataclass(frozen=True)
class Record:
    """A mapping with known keys, read into a dataclass."""

    of: type

    def read(self, node: yaml.Node, place: Place) -> Any:  # noqa: ANN401
        """Return the dataclass, or None where a required key is missing or wrong."""
        return read_record(self.of, node, place)

    def json_schema(self) -> dict[str, Any]:
        """Describe the dataclass."""
        return record_schema(self.of)

    def words(self) -> str:
        """Point at the table of its keys."""
        return f"see [{title(self.of)}](#{title(self.of).lower().replace(' ', '-')})"


def title(record: type) -> str:
    """Name a record as the reference page heads its table."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", record.__name__).capitalize()


def entries(
    node: yaml.Node, place: Place, merging: tuple[yaml.Node, ...] = ()
) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
    """Yield a mapping's entries: merge keys (`<<: *anchor`) applied, repeated keys noted as problems."""
    if not isinstance(node, yaml.MappingNode):
        if node.tag != NULL_TAG:
            place.problem(node, "expected a mapping of keys to values")
        return
    seen: dict[str, int] = {}
    inherited: dict[str, tuple[yaml.ScalarNode, yaml.Node]] = {}
    for key, value in node.value:
        if key.tag == _MERGE_TAG:
            sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for source in reversed(sources):
                if source in (*merging, node):
                    place.problem(key, "merges itself")
                else:
                    inherited |= {k.value: (k, v) for k, v in entries(source, place, (*merging, node))}
        elif not isinstance(key, yaml.ScalarNode):
            place.problem(key, "a key must be a word")
        elif key.value in seen:
            place.key(key.value).problem(key, f"written twice; first in line {seen[key.value]}")
        else:
            seen[key.value] = key.start_mark.line + 1
            yield key, value
    yield from (entry for name, entry in inherited.items() if name not in seen)


def settings_of(record: type) -> dict[str, dataclasses.Field[Any]]:
    """Give the inventory keys of a dataclass, in order."""
    return {f.name: f for f in dataclasses.fields(record) if "kind" in f.metadata}


def models_named(settings: Any) -> dict[str, str]:  # noqa: ANN401
    """Give the models that settings name, by their keys."""
    keys = settings_of(type(settings)) if settings is not None else {}
    named = {key: getattr(settings, key) for key, declared in keys.items() if declared.metadata["kind"] is ModelName}
    return {key: name for key, name in named.items() if name is not None}


def read_record(record: type[T], node: yaml.Node, place: Place) -> T | None:
    """Read a mapping node into a dataclass: what is wrong is noted and left out; None where a required key is.

    So whoever reads on finds the problems that only show across keys in the same run.
    """
    known = settings_of(record)
    values: dict[str, Any] = {}
    for key, value_node in entries(node, place):
        if key.value not in known:
            place.key(key.value).problem(key, f"unknown key{did_you_mean(key.value, known)}")
        elif value_node.tag != NULL_TAG:
            values[key.value] = known[key.value].metadata["kind"].read(value_node, place.key(key.value))
    for name, declared in known.items():
        if name not in values and required(declared):
            place.problem(node, f"{name} is missing: {declared.metadata['doc']}")
    read = {name: value for name, value in values.items() if value is not None}
    return record(**read) if all(name in read for name in known if required(known[name])) else None


def read_line(record: type, line: str) -> dict[str, Any]:
    """Read `key: value, key: value` as the inventory would, into fields of a record; for lines that we wrote."""
    node = yaml.compose(f"{{{line}}}", Loader=_LOADER)
    known, place = settings_of(record), Place("", "")
    pairs = entries(node, place) if node else ()
    return {key.value: known[key.value].metadata["kind"].read(value, place) for key, value in pairs}


def _property(declared: dataclasses.Field[Any]) -> dict[str, Any]:
    """Describe a key; one that need not be written may also be left blank."""
    values = declared.metadata["kind"].json_schema()
    blank = values if required(declared) else {"anyOf": [values, {"type": "null"}]}
    return blank | {"description": declared.metadata["doc"]}


def record_schema(record: type) -> dict[str, Any]:
    """Describe a dataclass as a JSON Schema object."""
    known = settings_of(record)
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {name: _property(declared) for name, declared in known.items()},
        "required": [name for name, declared in known.items() if required(declared)],
    }


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Return `; did you mean "x"?` for the nearest option, or nothing where none is near."""
    near = difflib.get_close_matches(word, list(options), n=1, cutoff=0.6)
    return f'; did you mean "{near[0]}"?' if near else ""


def compose(path: Path) -> yaml.Node:
    """Parse a YAML file into nodes that know their lines; broken YAML is one InventoryError with its line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = "labdeploy -i FILE ...; or labdeploy sandbox up, which writes one"
        raise InventoryError("no such file", where=str(path), hint=hint) from None
    except OSError as error:
        raise InventoryError(f"cannot be read: {error.strerror}", where=str(path), hint=f"ls -ld {path}") from None
    except UnicodeDecodeError as error:
        raise InventoryError(f"is not UTF-8: {error}", where=str(path), hint=f"file {path}") from None
    try:
        node = yaml.compose(text, Loader=_LOADER)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        hint = f"sed -n {mark.line + 1}p {path} | cat -A  # shows tabs as ^I" if mark else ""
        raise InventoryError(f"not valid YAML: {error.problem or error.context}", where=where, hint=hint) from None
    except yaml.YAMLError as error:
        raise InventoryError(f"not valid YAML: {' '.join(str(error).split())}", where=str(path)) from None
    if node is None:
        raise InventoryError("is empty", where=str(path), hint="labdeploy sandbox up writes one to start from")
    return node
