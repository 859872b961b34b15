"""How much there is to read, after `ruff format`: python tests/sizes.py"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = sorted(ROOT.glob("0*.py"))
APART = [ROOT / f"data/{name}.py" for name in ("equal", "calls", "sandbox")]  # graders' own


def lines(path):
    return path.read_text().splitlines()


def functions(path, skipped=range(0)):
    """(lines, name) of each function of a file that does not start in the skipped lines."""
    found = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    found = [n for n in found if n.lineno not in skipped]
    return [(n.end_lineno - n.lineno + 1, n.name) for n in found]


def graders(text):
    """The lines that grade: from the first section so called to the next other one."""
    heads = [i for i, line in enumerate(text, 1) if line.startswith("# ---")]
    grading = [i for i in heads if "grading" in text[i - 1]]
    return range(grading[0], next(i for i in heads if i > grading[-1]))


def flags():
    found = set()
    for path in [*STAGES, ROOT / "common.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                found |= {arg.value for arg in node.args}
    return found


def main():
    common, readme = ROOT / "common.py", lines(ROOT / "README.md")
    skipped = graders(lines(common))
    longest = max(max(functions(path)) for path in [*STAGES, common])
    grading = [node for node in functions(common) if node not in functions(common, skipped)]
    grading += sum(map(functions, APART), [])
    apart = sum(len(lines(path)) for path in APART)
    stages = sum((lines(path) for path in STAGES), [])
    tests = [len(lines(path)) for path in (ROOT / "tests").glob("*.py")]
    claims = [len(lines(path)) for path in (ROOT / "data/claims").glob("*.py")]
    rows = [
        ("the six files at the top", len(lines(common)) + len(stages), 1939),
        ("04_self_distill.py", len(lines(STAGES[3])), 290),
        ("common.py without the graders", len(lines(common)) - len(skipped), 720),
        ("its functions", len(functions(common, skipped)), 50),
        ("the graders, data/{equal,calls,sandbox}.py too", len(skipped) + apart, 250),
        ("their functions", len(grading), 20),
        (f"longest function, {longest[1]}", longest[0], 80),
        ("flags", len(flags()), 44),
        ("tests/", sum(tests), 4000),
        ("the claims' experiments, data/claims/", sum(claims), 1400),
        ("README.md, lines", len(readme), 220),
        ("README.md, columns", max(map(len, readme)), 100),
    ]
    print("\n".join(f"{what:48} {n:6} of at most {most}" for what, n, most in rows))


main()
