"""The house: what each room of the package may know of the others, how large a room is, and what must be described.

The package is read as text (``ast``): an import inside a function counts as one at the top does.
"""

import ast
import inspect
from collections import Counter, defaultdict
from functools import lru_cache
from pathlib import Path

import click
import pytest
from places import ROOT

import usage_middleware
from usage_middleware.cli import commands

PACKAGE = Path(usage_middleware.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES = 350  # about 300: a file of more is two
MOST_FILES = 18  # of a room
CONCRETE_STORES = ("stores.memory", "stores.sqlite", "stores.sql", "stores.new_api")

# Which rooms a room may import from. What is in no room ("") are the package's own words: keys, tokens, rules.
ROOMS = {
    "": {""},
    "stores": {"", "stores"},
    "wsgi": {"", "stores", "wsgi"},
    "testing": {"", "stores", "wsgi", "testing"},
    "service": {"", "stores", "wsgi", "service"},
    "cli": {"", "stores", "wsgi", "service", "cli"},
}


def module_of(file):
    """The name of a module within the package: ``stores.sqlite.connections``; of the package itself ``""``."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def resolved(module, node):
    """The modules of the package that an import statement of a module names."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names if alias.name.split(".")[0] == "usage_middleware"]
        return [name.removeprefix("usage_middleware").lstrip(".") for name in names]
    if node.level == 0:
        if (node.module or "").split(".")[0] != "usage_middleware":
            return []
        base = node.module.removeprefix("usage_middleware").lstrip(".")
    else:
        package = module.split(".") if MODULES[module].name == "__init__.py" else module.split(".")[:-1]
        package = package[: len(package) - node.level + 1]
        base = ".".join([*filter(None, package), *filter(None, [node.module])])
    found = []
    for alias in node.names:
        submodule = f"{base}.{alias.name}".lstrip(".")
        found.append(submodule if submodule in MODULES else base)
    return found


@lru_cache(None)
def imports(module, *, typing=True):
    """The modules that a module imports, anywhere in it.

    :param typing: those too that it imports for a type checker alone.
    """
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    left_out = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            left_out |= {id(inner) for part in node.body for inner in ast.walk(part)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and (typing or id(node) not in left_out):
            found.update(resolved(module, node))
    return found - {module}


def room_of(module):
    return module.split(".")[0] if module.split(".")[0] in ROOMS else ""


def test_imports_are_found():
    """What the tests below rely upon: every way to write an import is seen."""
    assert {"stores.base", "stores.memory", "wsgi.middleware"} <= imports("")
    assert "stores.sql.sql_store" in imports("", typing=True) - imports("", typing=False)
    for module in MODULES:
        assert imports(module) <= MODULES.keys(), module


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {""}))
def test_a_room_knows_only_those_that_it_may(module):
    allowed = ROOMS[room_of(module)]
    assert {other for other in imports(module) if room_of(other) not in allowed} == set()


def of_concrete_stores(modules):
    return {module for module in modules if module.startswith(CONCRETE_STORES)}


# The command is where a person names stores, and `stores` is where their names are registered.
@pytest.mark.parametrize(
    "module",
    sorted({module for module in MODULES if room_of(module) != "cli"} - {"", "stores"} - of_concrete_stores(MODULES)),
)
def test_which_stores_there_are_is_known_in_one_place(module):
    assert of_concrete_stores(imports(module)) == set()


def test_nothing_imports_the_command():
    assert [module for module in MODULES if room_of(module) != "cli" and "cli" in map(room_of, imports(module))] == []


def cycle_in(graph):
    """Modules that import each other in a circle, if any do."""
    done, path = set(), []

    def visit(module):
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        path.append(module)
        for other in sorted(graph[module]):
            if found := visit(other):
                return found
        path.pop()
        done.add(module)
        return None

    return next((found for module in sorted(graph) if (found := visit(module))), None)


def test_a_cycle_is_found():
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_no_modules_import_each_other():
    # A type checker knows what to do with a circle; an interpreter that imports one half of it does not.
    assert cycle_in({module: imports(module, typing=False) for module in MODULES}) is None


def test_no_two_files_share_a_name():
    names = Counter(file.name for file in FILES if file.name != "__init__.py")
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_a_file_can_be_held_in_the_head(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@pytest.mark.parametrize("where", [PACKAGE, ROOT / "tests"], ids=["the package", "its tests"])
def test_a_room_is_not_crowded(where):
    rooms = Counter(file.parent.relative_to(where).as_posix() for file in where.rglob("*.py"))
    assert {room: count for room, count in rooms.items() if count > MOST_FILES} == {}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_says_what_it_holds(module):
    assert ast.get_docstring(ast.parse(MODULES[module].read_text(encoding="utf-8")))


# What the package re-exports is written ``from .room import Name as Name``; some of it is imported when it is needed.
PUBLIC = sorted(
    alias.name
    for node in ast.walk(ast.parse(MODULES[""].read_text(encoding="utf-8")))
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
    if alias.asname == alias.name
)


def described_members(public):
    """The methods and properties of a class that are its own or that of another class of ours."""
    for name, value in inspect.getmembers(public) if inspect.isclass(public) else ():
        function = value.fget if isinstance(value, property) else value
        if inspect.isfunction(function) and function.__module__.startswith("usage_middleware"):
            yield name, value


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_described(name):
    public = getattr(usage_middleware, name)
    # A class does not inherit the description of its base, and what `dataclass` makes is not one.
    assert public.__doc__
    assert not public.__doc__.startswith(f"{name}(")
    members = described_members(public)
    assert [member for member, value in members if not member.startswith("_") and not inspect.getdoc(value)] == []


def options_of(name, command):
    """Each way to write an option or a subcommand, below the name of its command."""
    if isinstance(command, click.Group):
        for child, inner in command.commands.items():
            yield from options_of(f"{name} {child}", inner)
        return
    yield name, name
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            for written in (*parameter.opts, *parameter.secondary_opts):
                yield name, written


PAGE = ROOT / "docs" / "command.md"


@pytest.mark.skipif(not PAGE.exists(), reason="the command's page is not written yet")
@pytest.mark.parametrize("name", sorted(commands.commands))
def test_a_command_is_documented_with_every_option(name):
    page = PAGE.read_text(encoding="utf-8")
    undocumented = defaultdict(list)
    for command, written in options_of(f"usage-middleware {name}", commands.commands[name]):
        if f"`{written}" not in page and f" {written}" not in page:
            undocumented[command].append(written)
    assert undocumented == {}
