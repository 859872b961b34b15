"""The code verifier against programs that want more than to be right: the verdict stands, the
machine is unharmed, nothing is left.
"""

import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

import common
from common import same_output, same_value, verify_code

DOUBLE = [
    {"call": "double", "args": [2], "expected": 4},
    {"call": "double", "args": ["ab"], "expected": "abab"},
]
SUM = [{"stdin": "1 2\n", "stdout": "3\n"}, {"stdin": "10 -4\n", "stdout": "6"}]
RIGHT = "def double(x):\n    return 2 * x\n"
KIND = common.isolation()
EQUAL = "    def __eq__(self, other):\n        return True\n"


def python(program):
    return f"Some words.\n```python\n{program}\n```\n"


def verdict(program, tests=DOUBLE, seconds=10.0):
    return verify_code({"tests": tests}, python(program), seconds)[:2]


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


def test_right_and_wrong_programs():
    right, wrong = (1, "correct"), (0, "wrong")
    assert verdict(RIGHT) == right
    assert verdict("def double(x):\n    return x + x + 0 if x != 2 else 5") == wrong
    assert verdict("def double(x:") == wrong
    assert verdict("a, b = map(int, input().split())\nprint(a + b)", SUM) == right
    assert verdict("print(3)", SUM) == wrong
    exits = "import sys\nprint(sum(map(int, sys.stdin.read().split())))\nsys.exit(1)"
    assert verdict(exits, SUM) == wrong
    longer_than_a_command_line = {"args": [[0] * 100_000], "expected": [0] * 200_000}
    assert verdict(RIGHT, [{"call": "double", **longer_than_a_command_line}]) == right
    odd = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    odd += "@dataclass\nclass A:\n    x: typing.ClassVar\n"
    assert verdict(odd + RIGHT) == right


def test_the_last_block_that_is_a_program_counts():
    def reward(response):
        return verify_code({"tests": DOUBLE}, response)[:2]

    assert reward("no program") == (0, "no_answer")
    assert reward(python("def double(x): return 0") + python(RIGHT))[0] == 1
    assert reward(python(RIGHT) + "It prints:\n```\n4\n```\n")[0] == 1
    indented = "   ```python\n   def double(x):\n       return 2 * x\n   ```\n"
    assert reward(f"1. So:\n{indented}")[0] == 1


def test_a_thousand_folders_in_each_other_are_removed():
    deep = "import os\nfor i in range(2000):\n    os.mkdir('d')\n    os.chdir('d')\n"
    assert verdict(deep + RIGHT) == (1, "correct")


def test_functions_find_installed_packages_and_exit():
    program = "def double(x):\n    return numpy.add(x, x).tolist() if x == 2 else 2 * x"
    if common.python_for(KIND) == sys.executable:  # another one need not have numpy
        assert verdict(f"import numpy\n{program}") == (1, "correct")
    assert verdict("def double(x):\n    exit()") == (0, "wrong")


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_cpp_programs():
    right = "#include <iostream>\nint main() { long a, b; std::cin >> a >> b; std::cout << a + b; }"
    wrong = (0, "wrong")
    for program, expected in (
        (right, (1, "correct")),
        (right.replace("a + b", "a - b"), wrong),
        ("int main() {", wrong),
    ):
        assert verify_code({"tests": SUM}, f"```cpp\n{program}\n```")[:2] == expected


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
        "import json\njson.dumps = lambda value: 'null'\ndef double(x):\n    return 5",
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


def test_a_program_that_closes_stdin_and_is_right_is_right():
    assert verdict("import sys\nsys.stdin.close()\n" + RIGHT) == (1, "correct")


@pytest.mark.parametrize(
    "program",
    [
        "while True:\n    pass",
        "import time\ntime.sleep(1000)",
        "import signal\nfor s in (15, 2, 1, 24):\n    signal.signal(s, lambda *a: None)\n"
        "while True:\n    pass",
        "import os\nos.close(1)\nos.close(2)\nwhile True:\n    pass",
    ],
)
def test_endless_programs_end(program):
    began = time.monotonic()
    assert verdict(program, seconds=0.5) == (0, "timeout") and time.monotonic() - began < 5


@pytest.mark.parametrize(
    "trap",
    [
        "os.symlink({mine!r}, 'stdin')",
        "os.mkfifo('stdin')",
        "os.mkdir('stdin')",
        "os.symlink({mine!r}, 'program.py')",
        "os.chmod('.', 0)",
        "[(os.mkdir('d'), os.chdir('d')) for _ in range(1500)]",
        "os.mkdir('d'), os.symlink({mine!r}, 'd/x'), os.chmod('d', 0o500)",
    ],
)
def test_traps_in_the_folder_catch_nobody(trap, tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("precious")
    mode = mine.stat().st_mode
    program = "import os\nfor f in ('stdin', 'program.py'):\n    try:\n        os.remove(f)\n"
    program += (
        "    except OSError:\n        pass\nprint(sum(map(int, input().split())), flush=True)\n"
    )
    assert verdict(program + trap.format(mine=str(mine)), SUM)[0] in (0, 1)
    program = "import os\nfresh = sorted(os.listdir()) == ['program.py']\n"
    program += "print(sum(map(int, input().split())) if fresh else 'used')"
    assert verdict(program, SUM) == (1, "correct")
    assert mine.read_text() == "precious" and mine.stat().st_mode == mode


def test_a_child_that_holds_the_output_does_not_hold_the_grader():
    began = time.monotonic()
    child = "import subprocess\nsubprocess.Popen(['sleep', '7'], start_new_session=True)\n"
    assert verdict(child + RIGHT) == (1, "correct") and time.monotonic() - began < 5
    time.sleep(7 * (KIND == "limits"))  # which it alone does not end


def test_hungry_programs_starve_alone():
    endless = "import sys\nwhile True:\n    sys.stdout.write('x' * 65536)"
    big = "f = open('big', 'wb')\nwhile True:\n    f.write(bytes(1 << 20))"
    assert verdict("x = bytearray(10 << 30)\n" + RIGHT)[0] == 0
    assert verdict(endless, SUM)[0] == 0 and verdict(big, SUM, 3.0)[0] == 0
    assert shutil.disk_usage("/tmp").free > 1 << 20


@pytest.mark.skipif(KIND == "limits", reason="needs namespaces")
def test_a_fork_bomb_and_children_that_would_outlive_it_are_gone():
    began = time.monotonic()
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    assert verdict(bomb, seconds=2.0)[0] == 0
    child = "import subprocess\nsubprocess.Popen(['sleep', '98765'], start_new_session=True)\n"
    assert verdict(child + RIGHT, seconds=4.0)[1] in ("correct", "timeout")
    assert time.monotonic() - began < 15
    time.sleep(0.2)


def test_files_and_environment_of_the_user_are_safe(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    told = "[k for k in os.environ if 'SECRET' in k] + ['PATH' in os.environ]"
    assert returns([True], f"import os\ndef double(x):\n    return {told}")
    mine, alone = tmp_path / "mine.txt", KIND == "bubblewrap"
    mine.write_text("precious")
    tmp_path.chmod(0o755)
    if alone or os.getuid() == 0:
        acts = [f"os.remove({str(mine)!r})", f"open({str(mine)!r}, 'w')"]
        acts += ["shutil.rmtree('/')"] * alone  # elsewhere it sees the real one
        tries = [f"try:\n    {act}\nexcept OSError:\n    pass\n" for act in acts]
        verdict("import os, shutil\n" + "".join(tries) + RIGHT)
        assert mine.read_text() == "precious" and Path(common.__file__).exists()
    if alone:
        assert returns(
            False, f"import os\ndef double(x):\n    return os.path.exists({str(mine)!r})"
        )


@pytest.mark.skipif(KIND == "limits", reason="needs namespaces")
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


def test_values_are_compared_by_kind():
    assert same_value([1, 2.0, {"a": None}], [1, 2, {"a": None}])
    for a, b in ((True, 1), ("1", 1), ([1], [1, 1]), ({"a": 1}, {"b": 1}), (0.1 + 0.2, 0.3)):
        assert not same_value(a, b), a
    assert same_value(0.1 + 0.2, 0.3, 1e-9) and same_value(10**400, 10**400, 1e-9)
    not_close = (math.nan, math.nan), (1.0, math.inf), (10**400, 2.5), (1000001, 1000000)
    assert not any(same_value(a, b, 1e-3) for a, b in not_close)  # whole numbers exactly


def test_outputs_are_compared_word_by_word():
    assert same_output("1  2\n3", "1 2 3\n") and not same_output("1 2", "1 2 3")
    assert not same_output("0.30000001", "0.3")
    for printed, expected in (("0.30000001 yes", "0.3 yes"), ("3", "3.0")):
        assert same_output(printed, expected, 1e-6)
    for printed, expected in (("0.31", "0.3"), ("nan", "0.3"), ("1000000507", "1000000007")):
        assert not same_output(printed, expected, 1e-6)
