"""The options that a class declares, read from its source: importing it, and torch with it, would take seconds."""

import ast
import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple


class Option(NamedTuple):
    """A field of a dataclass, or an argument of a constructor.

    Attributes:
        default: as YAML writes it; "" if there is none, or if it is computed.
        help: the first sentence of what the class says about it.
    """

    default: str
    help: str


def declared_options(module: str, name: str) -> dict[str, Option]:
    """Return the options of a class by name, without those that it inherits.

    Args:
        module: the full name of a module; the package that holds it is not imported, only the package's parents.
        name: the class: a dataclass, or any other whose constructor takes the options.
    """
    package, _, file_name = module.rpartition(".")
    spec = find_spec(package)
    assert spec is not None, package
    assert spec.submodule_search_locations, package
    source = Path(spec.submodule_search_locations[0], f"{file_name}.py").read_text(encoding="utf-8")
    node = next(item for item in ast.parse(source).body if isinstance(item, ast.ClassDef) and item.name == name)
    described = _described(ast.get_docstring(node) or "")
    constructor = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
    declared: Iterable[tuple[str, Any, str]] = _fields(node)
    for function in constructor:  # all of its arguments but "self" have defaults
        pairs = zip(function.args.args[1:], function.args.defaults, strict=True)
        declared = [(argument.arg, _literal(default), "") for argument, default in pairs]
    return {
        option: Option(_as_yaml(default), _first_sentence(help or described.get(option, "")))
        for option, default, help in declared
    }


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, Any, str]]:
    """Yield name, default and help of the fields that a dataclass's constructor takes."""
    for item in node.body:
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        value, help = item.value, ""
        if isinstance(value, ast.Call):  # of `field`
            options = {keyword.arg: keyword.value for keyword in value.keywords}
            if _literal(options.get("init")) is False:
                continue
            value, metadata = options.get("default"), options.get("metadata")
            pairs = zip(metadata.keys, metadata.values, strict=True) if isinstance(metadata, ast.Dict) else ()
            help = next((_literal(text) for key, text in pairs if _literal(key) == "help"), "")
        yield item.target.id, _literal(value), help if isinstance(help, str) else ""


def _literal(node: ast.expr | None) -> Any:
    """Return the value of a literal, or `...` for anything else."""
    with contextlib.suppress(ValueError, TypeError):
        if node is not None:
            return ast.literal_eval(node)
    return ...


def _as_yaml(value: Any) -> str:
    return "" if value is ... else value if isinstance(value, str) and value else json.dumps(value)


def _described(docstring: str) -> dict[str, str]:
    """Return what a Google-style docstring says about each attribute or argument, on one line."""
    entries = re.findall(r"^    (\w+): ((?:.+\n?)(?:^ {8,}.+\n?)*)", docstring, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=\.)(?<!e\.g\.)(?<!i\.e\.)\s", text.strip(), maxsplit=1)[0]
