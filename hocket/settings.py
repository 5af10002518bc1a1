"""Settings: one TOML file, overridden by environment variables, read once at the door of a process.

    [worker]
    device = "cpu"

`HOCKET_WORKER__DEVICE=cuda:0` overrides it. A table or key that nobody knows stops the start: a misspelled setting
must not be a silent default.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from hocket.errors import HocketError, Reason

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_PREFIX: Final = "HOCKET_"
_SEPARATOR: Final = "__"
_TOKEN_LENGTH_MIN: Final = 16
_TRUE: Final = frozenset({"1", "true", "yes", "on"})
_FALSE: Final = frozenset({"0", "false", "no", "off"})
_TYPES: Final[Mapping[object, str]] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_MEANT_LIKENESS: Final = 0.8

T = TypeVar("T")


def read_tables(path: Path | None, environ: Mapping[str, str], known: frozenset[str]) -> dict[str, dict[str, Any]]:
    """The settings tables of a process: the file's, overridden by the environment's.

    Args:
        path: A TOML file; None for none.
        environ: Variables such as `HOCKET_WORKER__DEVICE`; names without a double underscore are not settings.
        known: Names of the tables that exist.

    Raises:
        HocketError: `BAD_REQUEST` if the file cannot be read, is not TOML, or names an unknown table.
    """
    tables: dict[str, dict[str, Any]] = {}
    if path is not None:
        try:
            tables = tomllib.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise HocketError(Reason.BAD_REQUEST, f"cannot read the settings in {path}: {error}") from error
    for name, value in environ.items():
        table, separator, key = name.removeprefix(_PREFIX).lower().partition(_SEPARATOR)
        if name.startswith(_PREFIX) and separator:
            tables.setdefault(table, {})[key] = value
    for table in tables:
        if table not in known:
            raise HocketError(Reason.BAD_REQUEST, f"unknown settings table [{table}]; {_known(table, known)}")
    return tables


def read_token(path: Path | None) -> str | None:
    """The bearer token in a secret file; None for no file.

    Raises:
        HocketError: `BAD_REQUEST` if the file cannot be read or holds no token of at least 16 printable characters.
    """
    if path is None:
        return None
    try:
        token = path.read_text().strip()
    except (OSError, ValueError) as error:
        raise HocketError(Reason.BAD_REQUEST, f"cannot read the token file {path}: {error}") from error
    if len(token) < _TOKEN_LENGTH_MIN or not (token.isascii() and token.isprintable()):
        raise HocketError(
            Reason.BAD_REQUEST,
            f"{path} holds no token: write one line of at least {_TOKEN_LENGTH_MIN} printable characters, for example "
            "`head -c 32 /dev/urandom | base64`",
        )
    return token


def build(settings: type[T], values: Mapping[str, Any], table: str) -> T:
    """A frozen settings dataclass from one table.

    Text, as environment variables give it, becomes the declared type; other values must already have it.

    Raises:
        HocketError: `BAD_REQUEST` for an unknown key, a missing one, or a value of another type.
    """
    types_of = typing.get_type_hints(settings, localns={"Path": Path})  # modules import it for their types only
    fields = {field.name: types_of[field.name] for field in dataclasses.fields(settings)}  # type: ignore[arg-type]  # settings are dataclasses
    for key in values:
        if key not in fields:
            raise HocketError(Reason.BAD_REQUEST, f"unknown setting {table}.{key}; {_known(key, fields)}")
    converted = {key: _convert(value, fields[key], f"{table}.{key}") for key, value in values.items()}
    try:
        return settings(**converted)
    except (TypeError, ValueError) as error:
        raise HocketError(Reason.BAD_REQUEST, f"settings [{table}]: {error}") from error


def check_counts(settings: object, *names: str) -> None:
    """Return if these settings are at least 1.

    Raises:
        ValueError: One is not; `build` turns that into a refusal.
    """
    for name in names:
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be at least 1")


def check_call_seconds(settings: object, *names: str) -> None:
    """Return if these settings are finite and above 0, and the two of a drain finite and not negative.

    Raises:
        ValueError: One is not; `build` turns that into a refusal.
    """
    for name in names:
        if not 0 < getattr(settings, name) < math.inf:
            raise ValueError(f"{name} must be above 0")
    for name in ("drain_notice_seconds", "drain_grace_seconds"):
        if not 0 <= getattr(settings, name) < math.inf:
            raise ValueError(f"{name} must not be negative")


def _known(written: str, names: Iterable[str]) -> str:
    """The one name that was probably meant; all of them where none is alike."""
    every = sorted(names)
    alike = difflib.get_close_matches(written, every, n=1, cutoff=_MEANT_LIKENESS)
    return f"did you mean {alike[0]}?" if alike else f"there are {', '.join(every)}"


def _convert(value: Any, wanted: Any, where: str) -> Any:  # noqa: ANN401 - a setting of any type
    if isinstance(wanted, types.UnionType):
        options = [option for option in wanted.__args__ if option is not types.NoneType]
        return None if value is None or value == "" else _convert(value, options[0], where)
    if typing.get_origin(wanted) is dict or dataclasses.is_dataclass(wanted):
        return _convert_table(value, wanted, where)
    return _convert_value(value, wanted, where)


def _convert_value(value: Any, wanted: Any, where: str) -> Any:  # noqa: ANN401 - a setting of any type
    if typing.get_origin(wanted) is tuple:
        parts = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
        if isinstance(parts, list):
            return tuple(_convert(part, wanted.__args__[0], where) for part in parts)
    elif wanted is Path and isinstance(value, str):
        return Path(value).expanduser()
    elif wanted is bool and isinstance(value, str) and value.lower() in _TRUE | _FALSE:
        return value.lower() in _TRUE
    elif wanted in {int, float} and isinstance(value, str):
        try:
            return wanted(value)
        except ValueError:
            pass
    elif wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool)):
        return value
    if wanted is Path:  # not repeated, for the same reason as in `_convert_table`
        raise HocketError(Reason.BAD_REQUEST, f"{where} must be the name of a file or folder, as text")
    raise HocketError(Reason.BAD_REQUEST, f"{where} cannot be {value!r}: give {_in_words(wanted)}")


def _in_words(wanted: Any) -> str:  # noqa: ANN401 - as `_convert`
    """What a setting of a type is, for people."""
    if typing.get_origin(wanted) is tuple:
        return "a list"
    return _TYPES.get(wanted, getattr(wanted, "__name__", str(wanted)))


def _convert_table(value: Any, wanted: Any, where: str) -> Any:  # noqa: ANN401 - as `_convert`
    """A table inside a table, which a file alone can give: by name, each of one type, or a dataclass.

    What was given in its place is not repeated: somebody may have written a secret where the name of its file belongs.
    """
    if not isinstance(value, dict):
        raise HocketError(Reason.BAD_REQUEST, f"{where} must be a table of the settings file")
    if dataclasses.is_dataclass(wanted):
        return build(typing.cast("type[Any]", wanted), value, where)
    return {key: _convert(item, wanted.__args__[1], f"{where}.{key}") for key, item in value.items()}
