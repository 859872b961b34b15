"""The grader of programs: right ones pass, wrong ones do not, none does harm or leaves anything."""

import json
import math
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import common
import data.sandbox as sandbox
from common import program_in, same_output, same_values, verify, verify_code
from conftest import ROOT, SANDBOX, needs_bubblewrap, needs_sandbox, rows_of
from data.problems import unusable

DOUBLE = [
    {"call": "double", "args": [2], "expected": 4},
    {"call": "double", "args": ["ab"], "expected": "abab"},
]
SUM = [{"stdin": "1 2\n", "stdout": "3\n"}, {"stdin": "10 -4\n", "stdout": "6"}]
RIGHT = "def double(x):\n    return 2 * x\n"
EQUAL = "    def __eq__(self, other):\n        return True\n"
CASES = rows_of(ROOT / "tests/cases/code.jsonl")
pytestmark = needs_sandbox


def python(program):
    return f"Some words.\n```python\n{program}\n```\n"


def verdict(program, tests=DOUBLE, seconds=10.0):
    return verify_code({"tests": tests, "time_limit": seconds}, python(program))[:2]


def returns(value, program):
    """Whether double(0) of this program returns the value."""
    return verdict(program, [{"call": "double", "args": [0], "expected": value}]) == (1, "correct")


@pytest.fixture(scope="module")
def place():
    """Where the sandbox has its folders in these tests; others may use it elsewhere meanwhile."""
    folder = Path(tempfile.mkdtemp(prefix="sandboxes-"))
    folder.chmod(0o711)
    yield folder
    folder.rmdir()


@pytest.fixture(autouse=True)
def nothing_is_left(place, tmp_path, monkeypatch):  # tmp_path: pytest's own is not to be there
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield
    ps = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout
    left = [line for line in ps.splitlines() if str(place) in line or "sleep 98765" in line]
    assert left == [] == list(place.iterdir())


# ---------------------------------------------------------------- what is right


@pytest.mark.parametrize("case", CASES, ids=[case["why"][:40] for case in CASES])
def test_cases(case):
    if SANDBOX != "bubblewrap" and re.search("leaves a file|memory", case["why"]):
        pytest.skip("needs bubblewrap")
    if case.get("language") == "cpp" and not sandbox.COMPILER:
        pytest.skip("no g++")
    reward, said, _ = verify(case, case["response"])
    assert reward == case["reward"]
    assert (said == "output_limit") == ("2 MB" in case["why"])


def test_right_and_wrong_programs():
    right, wrong = (1, "correct"), (0, "wrong")
    assert verdict(RIGHT) == right
    assert verdict("def double(x):\n    return x + x + 0 if x != 2 else 5") == wrong
    assert verdict("def double(x:") == wrong == verdict("print(3)", SUM)
    assert verdict("print(sum(map(int, input().split())))\nexit(1)", SUM) == wrong
    longer_than_a_command_line = {"args": [[0] * 100_000], "expected": [0] * 200_000}
    assert verdict(RIGHT, [{"call": "double", **longer_than_a_command_line}]) == right
    odd = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    odd += "@dataclass\nclass A:\n    x: typing.ClassVar\n"
    assert verdict(odd + RIGHT) == right
    assert verdict("import sys\nsys.stdin.close()\n" + RIGHT) == right
    named = [{"call": "f", "args": [1], "kwargs": {"b": 2}, "expected": [1, 2]}]
    assert verdict("def f(a, *, b):\n    return a, b", named) == right
    assert verdict("print(10 ** 5000)", [{"stdin": "", "stdout": f"1{'0' * 5000}"}]) == right
    assert verdict("def double(x):\n    exit()") == wrong


@pytest.mark.skipif(not sandbox.COMPILER, reason="no g++")
def test_cpp_programs():
    right = "#include <iostream>\nint main() { long a, b; std::cin >> a >> b; std::cout << a + b; }"
    row, wrong = {"tests": SUM, "language": "cpp"}, right.replace("a + b", "a - b")
    answers = [f"```cpp\n{program}\n```" for program in (right, wrong, "int main() {")]
    said = [verify_code(row, answer)[1] for answer in (*answers, python("print(3)"))]
    assert said == ["correct", "wrong", "wrong", "no_answer"]


def test_the_fence_that_counts():
    program, (a, b) = "x = 1\n", ("```python\nx = 1\n```", "```\ny\n```")
    for response, expected in (
        (f"{b}\n{a}\n{b}", program),
        (b, "y\n"),
        ("```text\n5\n```", None),
        ("no program", None),
        ("```python\nx = 1\n", None),
        ("```python\n", None),
        ("Prints ```5```\n" + a, program),
        ("- a\n\n      ```python\n      if x:\n        x = 1\n      ```\n", "if x:\n  x = 1\n"),
        ("```python\r\nx = 1\r\n```\r\n", program),
    ):
        assert program_in(response, "python") == expected, response
    began = time.time()
    for degenerate in ("`" * 100_000 + "x", "```a\n" * 30_000, "``` " * 30_000, "~" * 100_000):
        assert program_in("```python\n" + degenerate, "python") is None
    assert time.time() - began < 5


def test_outputs_are_compared_as_contests_do():
    right = ("1  2\n3", "1 2 3\n"), ("0.3000001", "0.3"), ("1e-7", "0.0"), ("3", "3.0"), ("x", "x")
    right += ("1000000.5", "1000000.0"), (".5", "5e-1")
    wrong = ("1 2", "1 2 3"), ("1 2 3", "1 2"), ("0.31", "0.3"), ("4.0", "4"), ("4.0000001", "4")
    wrong += ("nan", "0.3"), ("inf", "1e999"), ("1_0.0", "10.0"), ("", "0"), ("yes", "YES")
    assert all(same_output(*pair) for pair in right)
    assert not any(same_output(*pair) for pair in wrong)
    assert same_output("4.0000001", "4", 1e-6) and same_output("31", "30", 0.1)
    assert not same_output("0.30001", "0.3", 1e-9) and not same_output("one", "1", 0.1)
    assert same_output("Yes no", "YES NO", fold=str.lower)


def test_values_are_compared_as_python_does():
    same = [(math.nan, math.nan), ({"a": 1, "b": 2}, {"b": 2, "a": 1})]
    same += [([1, 2.0, {"a": None}], [True, 2, {"a": None}])]
    others = ("1", 1), ([1], [1, 1]), ({"a": 1}, {"b": 1}), (0.1 + 0.2, 0.3), (None, 0), ([], {})
    assert not same_values('"NaN"', "NaN")
    assert all(same_values(json.dumps(a), json.dumps(b)) for a, b in same)
    assert not any(same_values(json.dumps(a), json.dumps(b)) for a, b in others)
    row = {"kind": "code", "id": "a", "problem": "?", "tests": DOUBLE, "tolerance": 0.1}
    assert "'tolerance'" in unusable(row, {}) and not unusable(row | {"tolerance": None}, {})
    assert not any(same_values(text, "[1]") for text in ("", "[", "[" * 100_000, f"[{'1' * 9999}]"))


@needs_bubblewrap
def test_numbers_of_other_kinds_are_their_value_and_sets_are_none():
    for value, expected in (
        ("Fraction(1, 4)", 0.25),
        ("Decimal('0.1')", 0.1),
        ("np.array([[1, 2]])", [[1, 2]]),
        ("{np.float32(0.5): (np.bool_(True),)}", None),
        ("[np.int64(3), np.bool_(True)]", [3, 1]),
    ):
        program = (
            "from fractions import Fraction\nfrom decimal import Decimal\nimport numpy as np\n"
        )
        assert returns(expected, f"{program}def double(x):\n    return {value}") == (
            expected is not None
        ), value
    for value in ("{1, 2}", "b'1'", "iter([1])", "object()"):
        assert not returns([1, 2], f"def double(x):\n    return {value}")


# ---------------------------------------------------------------- time, memory, luck


def test_each_test_has_its_own_cpu_time_and_waiting_for_a_core_costs_none():
    busy = "import time\ndef double(x):\n    end = time.process_time() + 0.7\n"
    busy += "    while time.process_time() < end:\n        pass\n    return 2 * x"
    with ThreadPoolExecutor(4) as threads:  # together they take longer than the limit
        graded = list(threads.map(lambda _: verdict(busy, DOUBLE, 1.0), range(4)))
    assert graded == [(1, "correct")] * 4


@pytest.mark.parametrize(
    "program",
    [
        "while True:\n    pass",
        "import time\ntime.sleep(1000)",
        "import signal\nfor s in (15, 2, 1, 24, 27):\n    signal.signal(s, lambda *a: None)\n"
        "while True:\n    pass",
        "import os\nos.close(1)\nos.close(2)\nwhile True:\n    pass",
    ],
)
def test_endless_programs_end(program):
    began = time.monotonic()
    assert verdict(program, DOUBLE[:1], 0.5) == (0, "timeout") and time.monotonic() - began < 9


def test_output_beyond_the_limit_is_no_wrong_answer():
    for n, expected, says in (
        (1_200_000, "1", "output_limit"),
        (1_000_000, "1", "wrong"),
        (1_200_000, "1" * 1_200_000, "correct"),
        (1_200_000, "1" * 1_100_000, "wrong"),
    ):
        assert verdict(f"print('1' * {n})", [{"stdin": "", "stdout": expected}])[1] == says
    endless = "import sys\nwhile True:\n    sys.stdout.write('x' * 65536)"
    assert verdict(endless, SUM)[1] == "output_limit"


def test_a_lucky_run_is_not_remembered(monkeypatch):
    runs = iter([(b"3\n", "ok"), (b"6\n", "ok"), (b"4\n", "ok")])
    monkeypatch.setattr(common, "run_inside", lambda *args, **how: next(runs))
    program = "import random\nprint(random.choice([3, 4]))"
    assert [verdict(program, SUM)[0] for _ in range(2)] == [1, 0]


def test_threads_and_deep_recursion_have_room():
    threads = "import threading\ndef f():\n    print(3)\nt = threading.Thread(target=f)\nt.start()"
    assert verdict(threads, [{"stdin": "", "stdout": "3"}]) == (1, "correct")
    deep = (
        "import sys\nsys.setrecursionlimit(10**6)\ndef double(x):\n    return f(40000) and 2 * x\n"
    )
    deep += "def f(n):\n    return n == 0 or f(n - 1)"
    assert verdict(deep) == (1, "correct")


# ---------------------------------------------------------------- programs that want more


@pytest.mark.parametrize(
    "program",
    [
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "print('4')\nprint('\"abab\"')\nraise SystemExit",
        "import os\nfor fd in range(3, 20):\n    try:\n        os.write(fd, b'true\\ntrue\\n')\n"
        "    except OSError:\n        pass\nos._exit(0)",
        f"class Same:\n{EQUAL}def double(x):\n    return Same()",
        f"class Same(int):\n{EQUAL}def double(x):\n    return Same(5)",
        "import json\njson.dumps = lambda *a, **k: 'null'\ndef double(x):\n    return 5",
        "def double(x):\n    print(4)\n    print('\"abab\"')",
        "import builtins\nbuiltins.print = lambda *a, **k: None\ndef double(x):\n    return 5",
        "def double(x):\n    return float('nan')",
        "import sys\nsys.stdin.close()\ndef double(x):\n    return None",
        "def double(x):\n    return [[[[" + "[" * 80 + "]" * 84,
        "def double(x):\n    a = []\n    a.append(a)\n    return a",
    ],
)
def test_no_trick_makes_a_wrong_program_right(program):
    assert verdict(program)[0] == 0


@needs_bubblewrap
@pytest.mark.parametrize(
    "trap",
    [
        "os.symlink({mine!r}, '/tmp/stdin')",
        "os.mkfifo('/tmp/stdin')",
        "os.remove('/box/program')",
        "open('/box/program', 'w')",
        "os.chmod('/tmp', 0)",
        "[(os.mkdir('d'), os.chdir('d')) for _ in range(1500)]",
        "os.ftruncate(0, 0), os.ftruncate(1, 0)",
    ],
)
def test_traps_catch_nobody(trap, tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("precious")
    program = "import os\nprint(sum(map(int, input().split())), flush=True)\n"
    assert verdict(program + trap.format(mine=str(mine)), SUM)[0] in (0, 1)
    program = "import os\nfresh = not {'stdin', 'd'} & {*os.listdir('/tmp')}\n"
    program += "print(sum(map(int, input().split())) if fresh else 'used')"
    assert verdict(program, SUM) == (1, "correct")
    assert mine.read_text() == "precious"


@needs_bubblewrap
def test_hungry_programs_starve_alone():
    big = "f = open('/tmp/big', 'wb')\nwhile True:\n    f.write(bytes(1 << 20))"
    many = "for i in range(99):\n    open(f'/tmp/{i}', 'wb').write(bytes(1 << 20))\n"
    assert verdict("x = bytearray(10 << 30)\n" + RIGHT)[0] == 0
    assert verdict(big, SUM, 3.0)[0] == 0 == verdict(many + RIGHT)[0]


@needs_bubblewrap
def test_a_fork_bomb_and_children_that_would_outlive_it_are_gone():
    began = time.monotonic()
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    assert verdict(bomb, seconds=0.3)[0] == 0
    child = "import subprocess\nsubprocess.Popen(['sleep', '98765'], start_new_session=True)\n"
    assert verdict(child + RIGHT) == (1, "correct")  # and it does not hold the output
    assert time.monotonic() - began < 10


@needs_bubblewrap
def test_a_program_sees_and_changes_nothing_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    told = "[k for k in os.environ if 'SECRET' in k] + ['PATH' in os.environ]"
    assert returns([True], f"import os\ndef double(x):\n    return {told}")
    mine = tmp_path / "mine.txt"
    mine.write_text("precious")
    tmp_path.chmod(0o755)
    acts = [f"os.remove({str(mine)!r})", f"open({str(mine)!r}, 'w')", "shutil.rmtree('/')"]
    tries = [f"try:\n    {act}\nexcept OSError:\n    pass\n" for act in acts]
    verdict("import os, shutil\n" + "".join(tries) + RIGHT)
    assert mine.read_text() == "precious" and Path(common.__file__).exists()
    for path in (mine, ROOT / "common.py", Path.home() / ".bashrc", "/etc/passwd", "/sys", "/var"):
        exists = f"import os\ndef double(x):\n    return os.path.exists({str(path)!r})"
        assert returns(False, exists), path


@needs_bubblewrap
def test_no_network_and_no_killing_of_other_processes():
    server, calls = socket.create_server(("127.0.0.1", 0)), []
    threading.Thread(target=lambda: calls.append(server.accept()), daemon=True).start()
    connect = f"socket.create_connection({server.getsockname()}, 1)"
    program = f"import socket\ndef double(x):\n    try:\n        {connect}\n        return 1\n"
    assert returns(0, program + "    except OSError:\n        return 0") and not calls
    victim = subprocess.Popen(["sleep", "30"])
    kill = "import os\nfor pid in [os.getppid(), -1, *range(2, 100000)]:\n    try:\n"
    kill += "        os.kill(pid, 9)\n    except OSError:\n        pass\n"
    verdict(kill + RIGHT, seconds=4.0)
    assert victim.poll() is None
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert verdict(RIGHT) == (1, "correct")


def test_what_a_test_expects_is_given_to_no_process(monkeypatch):
    given, run = [], subprocess.Popen

    def spy(words, stdin, **how):
        given.append((words, how.get("env"), stdin.read()))
        given.extend(path.read_bytes() for path in Path(stdin.name).parent.iterdir())
        stdin.seek(0)
        return run(words, stdin=stdin, **how)

    tests = [{"call": "double", "args": [1], "expected": 918273645}]
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", spy)
        assert verdict("def double(x):\n    return 3 * x", tests) == (0, "wrong")
    assert given and "918273645" not in repr(given) and "double" in repr(given)


# ---------------------------------------------------------------- what cannot be run


def test_without_bubblewrap_one_line_says_how_to_install_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sandbox, "_kind", sandbox._kind)
    monkeypatch.setattr(sandbox, "BWRAP", "no-such-program")
    for allow, says in ((None, "--allow-code"), ("bubblewrap", "apt install bubblewrap")):
        with pytest.raises(SystemExit):
            common.check_code([{"kind": "code"}], allow)
        assert says in capsys.readouterr().err
    common.check_code([{"kind": "math"}], None)
    monkeypatch.setattr(sandbox, "run_inside", lambda *args: (b"1\n", "ok"))
    common.check_code([{"kind": "code"}], "limits")
    assert "use the network" in capsys.readouterr().err and sandbox._kind == "limits"
