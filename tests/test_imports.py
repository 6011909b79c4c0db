"""Imports run one way: no room imports a higher one, and no modules import each other in a circle."""

import ast
import pathlib

PACKAGE = pathlib.Path(__file__).parents[1] / "dar_jax"
# From low to high. A room may import itself and what stands in earlier lines; rooms of one line know nothing of each
# other. A room is a folder or a file of dar_jax.
ORDER = (
    {"errors"},
    {"hosts"},
    {"config", "files", "conditions", "sharding", "routing"},
    {"lock"},
    {"models", "diffusion"},
    {"pretrained"},
    {"objectives"},
    {"logs", "data"},
    {"checkpoint"},
    {"streaming"},
    {"mmdit_weights"},
    {"init_from"},
    {"evaluation"},
    {"diagnosis", "adapters"},
    {"training"},
    {"planning"},
    {"validate"},
    {"cli", "runtime"},
    {"main", "sample", "evaluate", "diagnose", "prepare", "convert", "plan"},
)
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(name):
    """The modules of dar_jax that a module imports, anywhere in its text, also inside functions."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [full if full in MODULES else node.module for full in found]
        else:
            continue
        yield from (other for other in found if other in MODULES and other != "dar_jax")


def room(name):
    return name.split(".")[1]


def test_every_room_has_its_place():
    assert {room(name) for name in MODULES if name != "dar_jax"} == set(RANK)


def test_no_room_imports_a_higher_one():
    wrong = [
        f"{name} imports {other}"
        for name in MODULES
        for other in imported(name)
        if room(other) != room(name) and RANK[room(other)] >= RANK[room(name)]
    ]
    assert not wrong, wrong


def test_no_circle():
    """A package's __init__ that gathers names imports its modules, so they must not import it."""
    arrows = {name: set(imported(name)) for name in MODULES}
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for other in arrows[name]:
                visit(other)
            done.add(path.pop())

    for name in MODULES:
        visit(name)
