"""Mutants of the package that the tests should find: one small fault each, planted by cosmic-ray.

    python tools/mutation.py --sample 30            # of each group
    python tools/mutation.py --groups forecasts --seed 1

Works in a copy of the repository, whose compiled code is kept in a folder of its own.  A mutant is
found when its tests fail, crash, or take too long.  Survivors are printed as differences.
"""

import argparse
import ast
import itertools
import json
import os
import random
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast_from_path
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.plugins import get_operator, operator_names
from cosmic_ray.work_item import MutationSpec, TestOutcome

#: Modules, and the quick tests that should find their mutants: of each group.
GROUPS = {
    "calls and states": {
        "guard": "sharing",
        "validation attention": "conventions state attention behaviour bfloat16",
        "call": "attention weights diagnostics vjp",
        "decay": "decay_span attention key_bias",
        "state": "state key_bias sharing",
        "storage": "storage",
    },
    "engine": {
        "cpu/launch cpu/states cpu/engine cpu/layout jobs numerics cpu/scaling": "attention state "
        "overflow exact exact_vjp key_bias vjp",
        "cpu/record cpu/records cpu/memory": "workspaces kept record attention",
        "cpu/tiles cpu/schedule cpu/threads": "workspaces attention pipeline threads",
        "store cpu/code": "store code",
    },
    "kernels": {
        "cpu/kernels/state cpu/kernels/step": "state window_state attention",
        "cpu/kernels/exact": "exact exact_options",
        "cpu/kernels/chunk cpu/kernels/favor cpu/kernels/heads cpu/kernels/pack "
        "cpu/kernels/functions cpu/kernels/activate": "attention overflow bfloat16",
        "cpu/kernels/floats cpu/kernels/simd": "floats exp2 attention",
        "cpu/kernels/pipeline": "pipeline",
    },
    "gradients": {
        "gradients variance": "vjp variance",
        "cpu/kernels/favor_vjp": "vjp",
        "exact cpu/kernels/exact_vjp": "exact_vjp exact_options",
        "nn/linear nn/norms nn/losses nn/position nn/products nn/feedforward nn/attention nn/layer "
        "nn/fused": "nn/gradients nn/errors nn/fused nn/generation",
    },
    "forecasts": {
        "forecast/_backtest forecast/_baselines forecast/_scores forecast/_intervals "
        "forecast/_volatility": "forecast/intervals forecast/backtest",
        "forecast/_evaluate forecast/_windows forecast/_inputs forecast/_simulate "
        "forecast/_forecast forecast/_next forecast/_compare "
        "forecast/_error_bars": "forecast/uncertainty forecast/forecast forecast/backtest "
        "forecast/live",
        "forecast/_prices forecast/_calendar": "forecast/prices forecast/calendar forecast/frames",
        "forecast/_live forecast/_trading": "forecast/trading forecast/live",
        "forecast/_performer forecast/_residual forecast/_start": "forecast/performer",
    },
}

#: Replacements of an operator that a person could have meant: an addition is never a shift.
_LIKELY = [
    {"Add", "Sub"},
    {"Mul", "Div"},
    {"Div", "FloorDiv"},
    {"FloorDiv", "Mod"},
    {"Pow", "Mul"},
    {"BitOr", "BitAnd"},
    {"RShift", "LShift"},
    {"Lt", "LtE"},
    {"Gt", "GtE"},
    {"Lt", "GtE"},
    {"Gt", "LtE"},
    {"Eq", "NotEq"},
    {"Is", "IsNot"},
    {"In", "NotIn"},
]


def likely(operator):
    """Tell if a kind of mutation is worth its time: exceptions and decorators are not."""
    name, *operators = operator.removeprefix("core/").split("_")
    if name in {"ReplaceBinaryOperator", "ReplaceComparisonOperator"}:
        return set(operators) in _LIKELY
    return name not in {"ExceptionReplacer", "RemoveDecorator"} and not name.startswith("Variable")


OPERATORS = {name: get_operator(name)() for name in operator_names() if likely(name)}


def idle(path):
    """Return where a mutation changes nothing that can be tested: types, messages, `__repr__`."""
    places = []
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Raise() | ast.FunctionDef(name="__repr__"):
                places.append(node)
            case ast.AnnAssign() | ast.arg():
                places.append(node.annotation)
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                places.append(node)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="warnings"))):
                places.append(node)
        places += getattr(node, "decorator_list", [])
        if isinstance(node, ast.FunctionDef):
            places.append(node.returns)
        if isinstance(node, ast.Assign) and "TypeAlias" in ast.unparse(node):
            places.append(node)
    return [
        ((x.lineno, x.col_offset), (x.end_lineno, x.end_col_offset))
        for x in places
        if x is not None
    ]


def mutants(modules, rng):
    """Return one mutation of each place in modules."""
    places = {}
    for name in modules.split():
        path = Path("favor_np", name).with_suffix(".py")
        without = idle(path)
        nodes = list(ast_nodes(get_ast_from_path(path)))
        for operator in sorted(OPERATORS):
            found = (
                place for node in nodes for place in OPERATORS[operator].mutation_positions(node)
            )
            for occurrence, (start, end) in enumerate(found):
                if not any(a <= start < b for a, b in without):
                    mutation = MutationSpec(path, operator, occurrence, start, end)
                    places.setdefault((name, start, end), []).append(mutation)
    return [rng.choice(places[key]) for key in sorted(places)]


def pytest(tests):
    """Return the command for some files of tests."""
    files = [
        str(Path("tests", name).with_name(f"test_{Path(name).name}.py")) for name in tests.split()
    ]
    return shlex.join(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
    )


def copy_of(repository, folder):
    """Copy what git knows of a repository, and go there."""
    listed = subprocess.run(
        ["git", "-C", repository, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (repository / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(repository / name, folder / name)
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)


class Stored:
    """Compiled code beside the copy's modules: that of mutants is thrown away."""

    def __init__(self):
        self.folder = Path("favor_np/__pycache__")
        self.kept = {}

    def keep(self):
        self.kept |= {path: path.read_bytes() for path in self.folder.glob("*.code")}

    def restore(self):
        for path in self.folder.glob("*.code"):
            if path not in self.kept:
                path.unlink()
        for path, code in self.kept.items():
            if not path.exists():
                path.write_bytes(code)


class Limits(dict):
    """How long each command may take with a mutant, once it has passed without one."""

    def __missing__(self, command):
        start = time.monotonic()
        subprocess.run(shlex.split(command), check=True, stdout=subprocess.DEVNULL)
        self[command] = 120 + 3 * (time.monotonic() - start)
        return self[command]


def sample(group, count, seed):
    """Return some mutations of a group, each with the command that should find it."""
    rng = random.Random(f"{seed} {group}")
    found = [
        (group, mutation, pytest(tests))
        for modules, tests in GROUPS[group].items()
        for mutation in mutants(modules, rng)
    ]
    return rng.sample(found, min(count, len(found)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=30, help="mutants of each group")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--groups", nargs="*", choices=GROUPS, default=list(GROUPS))
    parser.add_argument(
        "--limit",
        type=float,
        help="seconds of a mutant's tests, which are known to pass without it",
    )
    parser.add_argument("--folder", type=Path, help="for the copy; kept if it is given")
    parser.add_argument("--record", type=Path, help="append a line of JSON for each mutant")
    args = parser.parse_args()
    record = args.record and args.record.absolute()
    repository = Path(__file__).absolute().parents[1]
    with tempfile.TemporaryDirectory() as folder:
        copy_of(repository, (args.folder or Path(folder)).absolute())
        # A mutant may ask for any amount of memory.
        resource.setrlimit(resource.RLIMIT_DATA, (16 << 30, resource.RLIM_INFINITY))
        samples = [sample(group, args.sample, args.seed) for group in args.groups]
        in_turns = filter(None, itertools.chain(*itertools.zip_longest(*samples)))
        results = run(in_turns, args.limit, record)
        os.chdir(repository)
    for group in args.groups:
        found = [found for name, found in results if name == group]
        print(f"{group}: {sum(found)} of {len(found)} found, {sum(found) / len(found):.0%}")


def run(work, given, record):
    """Plant each mutation in its turn; return the groups, and whether the mutants were found."""
    stored = Stored()
    limits = Limits()
    results = []
    for group, mutation, command in work:
        limit = given or limits[command]
        stored.keep()
        start = time.monotonic()
        result = mutate_and_test([mutation], command, limit)
        found = result.test_outcome != TestOutcome.SURVIVED
        results.append((group, found))
        print("found" if found else "SURVIVED", result.diff, flush=True)
        if record:
            line = {
                "group": group,
                "module": str(mutation.module_path),
                "line": mutation.start_pos[0],
                "operator": mutation.operator_name,
                "occurrence": mutation.occurrence,
                "found": found,
                "seconds": round(time.monotonic() - start),
                "command": command,
                "diff": result.diff,
                "output": (result.output or "")[-1000:],
            }
            with record.open("a") as file:
                print(json.dumps(line), file=file)
        if mutation.module_path.parts[1] == "cpu":
            stored.restore()
    return results


if __name__ == "__main__":
    main()
