"""Draw the package: a floor for each layer of the import contract, an arrow for each import.

    python tools/structure.py           # writes docs/_static/structure.svg
    python tools/structure.py --check   # fails if that is not what it would write

An arrow that follows from others is left out; a dashed one is an import that only functions make.
"""

import ast
import sys
import tomllib
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from math import fsum  # unlike sum, the same to the last bit in every version of Python
from pathlib import Path

ROOT = Path(__file__).parent.parent
PICTURE = Path("docs", "_static", "structure.svg")
PACKAGE = "favor_np"
HOUSES = {"cpu": 0, "cuda": 2}  # packages drawn module by module, and on which side; 1 is between
WIDTH, HOUSE, BOX, PITCH, LANE = 800, 180, 24, 48, 9  # pixels
SWEEPS, STIFF = 500, 10
STYLE = """<title>The modules and what they import</title>
<style>
#structure { max-width: 100%; height: auto; font: 13px ui-monospace, Menlo, Consolas, monospace }
#structure:root { color: #1f2328 }
@media (prefers-color-scheme: dark) { #structure:root { color: #e6edf3 } }
#structure * { stroke: currentColor; fill: currentColor; fill-opacity: .06; stroke-opacity: .7 }
#structure > path { fill: none; marker-end: url(#tip) }
#structure .house { fill-opacity: .03; stroke-opacity: .3 }
#structure .late { stroke-dasharray: 4 3 }
#structure text, #structure marker path { fill-opacity: 1; stroke: none; text-anchor: middle }
</style>
<marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0 0L8 4L0 8z"/></marker>"""


def floors_of(root):
    """The floor of each box, counted from the top."""
    linter = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]
    (layers,) = (c["layers"] for c in linter["contracts"] if c["type"] == "layers")
    names = [(name.strip(), floor) for floor, x in enumerate(layers) for name in x.split("|")]
    return {name.removeprefix(f"{PACKAGE}."): floor for name, floor in names}


def box_of(module, floors):
    """The box of a module: its own or that of a package around it; empty if there is none."""
    package, _, name = module.partition(".")
    while name and (name not in floors or package != PACKAGE):
        name = name.rpartition(".")[0]
    return name


def imports_in(node, late=False):
    """The import statements in code, but those for type checkers, and which are in functions."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node, late
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler):
            yield from imports_in(child, late or isinstance(node, ast.FunctionDef))


def arrows_of(root, floors):
    """Which box imports which: {(importer, imported): whether only functions do}."""
    top = ast.parse((root / PACKAGE / "__init__.py").read_text("utf-8"))
    origins = (node for node in ast.walk(top) if isinstance(node, ast.ImportFrom))
    homes = {alias.name: node.module for node in origins for alias in node.names}  # of public names
    arrows = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        importer = box_of(".".join(parts), floors)
        for node, late in imports_in(ast.parse(path.read_text("utf-8"))):
            modules = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                above = parts[: -node.level] if node.level else ()
                base = ".".join([*above, node.module] if node.module else above)
                public = homes if base == PACKAGE else {}
                modules = [public.get(name, f"{base}.{name}") for name in modules]
            for imported in (box_of(module, floors) for module in modules):
                if importer and imported and imported != importer:
                    arrows[importer, imported] = arrows.get((importer, imported), True) and late
    return arrows


def reduced(arrows, floors):
    """The arrows that do not follow from others."""
    reach, kept = defaultdict(set), {}
    for a, b in sorted(arrows, key=lambda arrow: (-floors[arrow[0]], floors[arrow[1]], arrow)):
        if floors[a] >= floors[b]:
            raise SystemExit(f"{a} imports {b}, which is not below it")
        if b not in reach[a]:
            kept[a, b] = arrows[a, b]
        reach[a] |= {b} | reach[b]
    return kept


@dataclass(eq=False)
class Item:
    """A box, or the place where an arrow passes a floor, which has no name."""

    floor: int
    side: int
    name: str = ""
    x: float = 0.0  # of its middle
    near: list["Item"] = field(default_factory=list)

    def __post_init__(self):
        self.y = PITCH * self.floor + (PITCH - BOX) // 2
        self.width = 8 * len(self.name) + 28 if self.name else LANE


def way_of(first, last):
    """The items that an arrow leads through; neighbours on the same side pull at each other."""
    side = first.side if first.side == last.side else 1
    way = [first, *(Item(floor, side) for floor in range(first.floor + 1, last.floor)), last]
    for above, below in pairwise(way):
        if above.side == below.side:
            above.near.append(below)
            below.near.append(above)
    return way


def place(items, storeys):
    """Let every item settle in the middle of those that pull at it, as far as there is room."""
    bands = defaultdict(list)
    for item in items:
        bands[item.floor, item.side].append(item)
    for band in bands.values():
        for number, item in enumerate(band, 1):
            item.x = WIDTH * (item.side + number / (len(band) + 1)) / 3
    for sweep in range(SWEEPS):  # up and down; arrows become straighter in the second half
        for floor, side in sorted(bands, reverse=sweep % 2 == 0):
            left, right = (HOUSE * (floor in storeys[house]) for house in HOUSES)
            edges = 0, left, WIDTH - right, WIDTH
            stiff = STIFF if 2 * sweep > SWEEPS else 1
            settle(bands[floor, side], edges[side], edges[side + 1], stiff)


def settle(band, low, high, stiff):
    """Put items side by side between two limits."""
    wanted = {}
    for item in band:
        pulls = [(x.x, 1 if x.name or item.name else stiff) for x in item.near]
        pulls += [((low + high) / 2, 1)] if item.name or not pulls else []
        wanted[item] = fsum(x * pull for x, pull in pulls) / fsum(pull for _, pull in pulls)
    band.sort(key=wanted.get)
    starts = [*accumulate(((a.width + b.width) / 2 for a, b in pairwise(band)), initial=0.0)]
    least, most = low + band[0].width / 2, high - band[-1].width / 2 - starts[-1]
    moves = (wanted[item] - start for item, start in zip(band, starts, strict=True))
    moves = [max(least, min(move, most)) for move in moves]
    rightward, leftward = accumulate(moves, max), [*accumulate(moves[::-1], min)][::-1]
    for item, start, *two in zip(band, starts, rightward, leftward, strict=True):
        item.x = start + fsum(two) / 2


def path_of(way):
    """The path of an arrow, which leaves and enters its boxes where that is nearest."""
    xs, y = [item.x for item in way], way[0].y + BOX
    for end, beside in ((0, 1), (-1, -2)):
        reach = way[end].width / 2 - 17
        xs[end] += max(-reach, min(way[beside].x - xs[end], reach))
    path = f"M{xs[0]:.0f} {y}"
    for (x, new), below in zip(pairwise(xs), way[1:], strict=True):
        bend = below.y - (PITCH - BOX) // 2
        path += f"V{bend - 12}C{x:.0f} {bend} {new:.0f} {bend} {new:.0f} {below.y}"
    return path


def drawn(root):
    """The picture, as text."""
    floors = floors_of(root)
    arrows = reduced(arrows_of(root, floors), floors)
    boxes, storeys = {}, defaultdict(list)
    for name, floor in floors.items():
        house, _, room = name.rpartition(".")
        boxes[name] = Item(floor, HOUSES.get(house, 1), room)
        storeys[house] = range(min([floor, *storeys[house]]), floor + 1)
    ways = {(a, b): way_of(boxes[a], boxes[b]) for a, b in arrows}
    place([*boxes.values(), *(item for way in ways.values() for item in way[1:-1])], storeys)
    height = PITCH * (floor + 1)
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    head = f'<svg id="structure" xmlns="http://www.w3.org/2000/svg" role="img" {size}>'
    lines = [head, STYLE]
    for house in filter(storeys.get, HOUSES):
        x, y = HOUSES[house] * (WIDTH - HOUSE) // 2 + 4, PITCH * storeys[house][0] - 4
        size = f'width="{HOUSE - 8}" height="{PITCH * len(storeys[house])}"'
        lines.append(f'<rect class="house" x="{x}" y="{y}" {size} rx="8"/>')
        x = HOUSES[house] * (WIDTH - 48) // 2 + 24
        lines.append(f'<text x="{x}" y="{y + 18}">{house}</text>')
    for box in boxes.values():
        x, size = box.x - box.width / 2 + 7, f'width="{box.width - 14}" height="{BOX}"'
        lines.append(f'<rect x="{x:.0f}" y="{box.y}" {size} rx="4"/>')
        lines.append(f'<text x="{box.x:.0f}" y="{box.y + 16}">{box.name}</text>')
    for (a, b), way in ways.items():
        late = ' class="late"' if arrows[a, b] else ""
        lines.append(f'<path{late} d="{path_of(way)}"><title>{a} imports {b}</title></path>')
    return "\n".join([*lines, "</svg>", ""])


def main(options, root=ROOT):
    """Write the picture, or compare it; return the exit status."""
    picture, path = drawn(root).encode(), root / PICTURE
    if options != ["--check"]:
        path.write_bytes(picture)
    elif path.read_bytes() != picture:
        print(f"{PICTURE.as_posix()} is not what python tools/structure.py would write: run it")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
