"""The rooms of the project: each is on the map, arrows point downwards."""

import ast
import re
from graphlib import TopologicalSorter

from conftest import REPO

ROOMS = {path.stem for path in REPO.glob("*.py")}
CORE = {"cam", "models", "data", "optim", "recorded", "train"}


def imports(room):
    """The rooms that a script imports when it is imported: not by its functions, nor its last
    lines."""
    def names(node):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Try | ast.If) and "__main__" not in ast.unparse(node):
            for inner in ast.iter_child_nodes(node):
                yield from names(inner)

    tree = ast.parse((REPO / f"{room}.py").read_text())
    return {name for node in tree.body for name in names(node)} & ROOMS


def test_every_room_is_on_the_map():
    table = re.findall(r"^\| `(\w+)\.py` \|", (REPO / "CONTRIBUTING.md").read_text(), re.M)
    assert sorted(table) == sorted(ROOMS)


def test_arrows_point_downwards_and_never_out_of_the_core():
    arrows = {room: imports(room) for room in ROOMS}
    assert arrows["score"] > {"metrics", "tables"}  # they are seen
    assert not any(arrows[room] for room in CORE - {"train"} | {"metrics"})
    assert arrows["train"] <= CORE
    list(TopologicalSorter(arrows).static_order())  # raises where there is a circle
