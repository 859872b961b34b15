"""The code verifier against programs that want more than to be right: the verdict stands, the machine is unharmed, nothing is left."""

import os
import shutil
import signal
import socket
import subprocess
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
python = lambda program: f"Some words.\n```python\n{program}\n```\n"
verdict = lambda program, tests=DOUBLE, seconds=10.0: verify_code(
    {"tests": tests}, python(program), seconds
)[:2]
RIGHT = "def double(x):\n    return 2 * x\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where the sandbox has its folders in these tests; others may use it elsewhere at the same time."""
    tmp_path_factory.getbasetemp()  # pytest's own is not to be there
    folder = Path(tempfile.mkdtemp(prefix="sandboxes-"))
    folder.chmod(0o711)
    yield folder
    folder.rmdir()


@pytest.fixture(autouse=True)
def nothing_is_left(place, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield
    processes = subprocess.run(
        ["ps", "-eo", "pid,args"], capture_output=True, text=True
    ).stdout.splitlines()
    assert (
        [line for line in processes if str(place) in line or "sleep 98765" in line]
        == []
        == list(place.iterdir())
    )


def test_right_and_wrong_programs():
    assert verdict(RIGHT) == (1, "correct") and verdict(
        "def double(x):\n    return x + x + 0 if x != 2 else 5"
    ) == (0, "wrong")
    assert verdict("a, b = map(int, input().split())\nprint(a + b)", SUM) == (1, "correct")
    assert verdict("print(3)", SUM) == (0, "wrong")
    assert verdict(
        "import sys\nprint(sum(map(int, sys.stdin.read().split())))\nsys.exit(1)", SUM
    ) == (0, "wrong")
    assert verify_code({"tests": DOUBLE}, "no program")[1] == "no_answer" and verdict(
        "def double(x:"
    ) == (0, "wrong")
    assert (
        verify_code({"tests": DOUBLE}, python("def double(x): return 0") + python(RIGHT))[0] == 1
    ), "the last block counts"
    assert verify_code({"tests": DOUBLE}, python(RIGHT) + "It prints:\n```\n4\n```\n")[0] == 1, (
        "the last block that is a program"
    )
    assert (
        verify_code(
            {"tests": DOUBLE},
            "1. So:\n   ```python\n   def double(x):\n       return 2 * x\n   ```\n",
        )[0]
        == 1
    )
    assert (
        verdict(
            "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: typing.ClassVar\n"
            + RIGHT
        )[0]
        == 1
    )
    assert verdict(
        RIGHT, [{"call": "double", "args": [[0] * 100_000], "expected": [0] * 200_000}]
    ) == (1, "correct")  # longer than a command line


def test_a_thousand_folders_in_each_other_are_removed():
    deep = "import os\nfor i in range(2000):\n    os.mkdir('d')\n    os.chdir('d')\n"
    assert verdict(deep + RIGHT) == (1, "correct")


def test_functions_find_installed_packages_and_exit():
    assert verdict(
        "import numpy\ndef double(x):\n    return numpy.add(x, x).tolist() if x == 2 else 2 * x"
    ) == (1, "correct")
    assert verdict("def double(x):\n    exit()") == (0, "wrong")


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_cpp_programs():
    program = "#include <iostream>\nint main() { long a, b; std::cin >> a >> b; std::cout << a + b << std::endl; }"
    assert verify_code({"tests": SUM}, f"```cpp\n{program}\n```")[:2] == (1, "correct")
    assert verify_code({"tests": SUM}, f"```cpp\n{program.replace('a + b', 'a - b')}\n```")[:2] == (
        0,
        "wrong",
    )
    assert verify_code({"tests": SUM}, "```cpp\nint main() {\n```")[:2] == (0, "wrong")


@pytest.mark.parametrize(
    "program",
    [
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "print('4')\nprint('\"abab\"')\nraise SystemExit",
        "import os\nfor fd in range(3, 20):\n    try:\n        os.write(fd, b'true\\ntrue\\n')\n    except OSError:\n        pass\nos._exit(0)",
        "class Same:\n    def __eq__(self, other):\n        return True\ndef double(x):\n    return Same()",
        "class Same(int):\n    def __eq__(self, other):\n        return True\ndef double(x):\n    return Same(5)",
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
        "import signal, time\nfor s in (15, 2, 1, 24):\n    signal.signal(s, lambda *a: None)\nwhile True:\n    pass",
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
    program = (
        f"import os\nfor f in ('stdin', 'program.py'):\n    try:\n        os.remove(f)\n    except OSError:\n        pass\na, b = map(int, input().split())\n"
        f"print(a + b, flush=True)\n{trap.format(mine=str(mine))}"
    )
    assert verdict(program, SUM)[0] in (0, 1)
    assert verdict(
        "import os\nprint(sum(map(int, input().split())) if sorted(os.listdir()) == ['program.py'] else 'used')",
        SUM,
    ) == (1, "correct")
    assert mine.read_text() == "precious" and mine.stat().st_mode == mode


def test_a_child_that_holds_the_output_does_not_hold_the_grader():
    began = time.monotonic()
    program = (
        "import os, subprocess\nsubprocess.Popen(['sleep', '7'], start_new_session=True)\n" + RIGHT
    )
    assert verdict(program) == (1, "correct") and time.monotonic() - began < 5
    if common.isolation() == "limits":
        time.sleep(7)  # which it alone does not end


def test_hungry_programs_starve_alone():
    assert verdict("x = bytearray(10 << 30)\n" + RIGHT)[0] == 0
    assert verdict("import sys\nwhile True:\n    sys.stdout.write('x' * 65536)", SUM)[0] == 0
    assert (
        verdict("f = open('big', 'wb')\nwhile True:\n    f.write(bytes(1 << 20))", SUM, 3.0)[0] == 0
    )
    assert shutil.disk_usage("/tmp").free > 1 << 20


@pytest.mark.skipif(common.isolation() == "limits", reason="needs namespaces")
def test_a_fork_bomb_and_children_that_would_outlive_it_are_gone():
    began = time.monotonic()
    assert (
        verdict(
            "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
            seconds=2.0,
        )[0]
        == 0
    )
    assert verdict(
        "import os, subprocess\nsubprocess.Popen(['sleep', '98765'], start_new_session=True)\n"
        + RIGHT,
        seconds=4.0,
    )[1] in ("correct", "timeout")
    assert time.monotonic() - began < 15
    time.sleep(0.2)


def test_files_and_environment_of_the_user_are_safe(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    assert (
        verdict(
            "import os\ndef double(x):\n    return [k for k in os.environ if 'SECRET' in k] + ['PATH' in os.environ]",
            [{"call": "double", "args": [0], "expected": [True]}],
        )[0]
        == 1
    )
    mine = tmp_path / "mine.txt"
    mine.write_text("precious")
    tmp_path.chmod(0o755)
    if common.isolation() == "bubblewrap" or os.getuid() == 0:
        everything = (
            ", lambda: shutil.rmtree('/')" if common.isolation() == "bubblewrap" else ""
        )  # elsewhere it sees the real one
        attack = (
            f"import os, shutil\nfor f in (lambda: os.remove({str(mine)!r}), lambda: open({str(mine)!r}, 'w'){everything}):\n"
            "    try:\n        f()\n    except OSError:\n        pass\n"
        )
        verdict(attack + RIGHT)
        assert mine.read_text() == "precious" and Path(common.__file__).exists()
    if common.isolation() == "bubblewrap":
        assert (
            verdict(
                f"import os\ndef double(x):\n    return os.path.exists({str(mine)!r})",
                [{"call": "double", "args": [0], "expected": False}],
            )[0]
            == 1
        )


@pytest.mark.skipif(common.isolation() == "limits", reason="needs namespaces")
def test_no_network_and_no_killing_of_other_processes():
    server = socket.create_server(("127.0.0.1", 0))
    calls, at = [], server.getsockname()[1]
    threading.Thread(target=lambda: calls.append(server.accept()), daemon=True).start()
    program = f"import socket\ndef double(x):\n    try:\n        socket.create_connection(('127.0.0.1', {at}), 1)\n        return 1\n    except OSError:\n        return 0"
    assert verdict(program, [{"call": "double", "args": [0], "expected": 0}])[0] == 1 and not calls
    victim = subprocess.Popen(["sleep", "30"])
    kill = "import os, signal\nfor pid in [os.getppid(), -1, *range(2, 100000)]:\n    try:\n        os.kill(pid, 9)\n    except OSError:\n        pass\n"
    verdict(kill + RIGHT, seconds=4.0)
    assert victim.poll() is None
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert verdict(RIGHT) == (1, "correct")


def test_values_and_outputs_are_compared_by_kind():
    assert (
        same_value([1, 2.0, {"a": None}], [1, 2, {"a": None}])
        and not same_value(True, 1)
        and not same_value("1", 1)
        and not same_value([1], [1, 1])
    )
    assert (
        same_value(0.1 + 0.2, 0.3, 1e-9)
        and not same_value(0.1 + 0.2, 0.3)
        and not same_value(float("nan"), float("nan"), 1.0)
    )
    assert (
        not same_value(10**400, 2.5, 1e-6)
        and not same_value(1.0, float("inf"), 1e-6)
        and not same_value(1000001, 1000000, 1e-3)
    )
    assert not same_output("1000000507", "1000000007", 1e-6) and same_output("3", "3.0", 1e-6)
    assert same_value(10**400, 10**400, 1e-9) and not same_value({"a": 1}, {"b": 1})
    assert (
        same_output("1  2\n3", "1 2 3\n")
        and not same_output("1 2", "1 2 3")
        and not same_output("0.30000001", "0.3")
    )
    assert (
        same_output("0.30000001 yes", "0.3 yes", 1e-6)
        and not same_output("0.31", "0.3", 1e-6)
        and not same_output("nan", "0.3", 1e-6)
    )
