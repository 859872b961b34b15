"""Runs what a model has written where it can do no harm: in bubblewrap, under limits.

What a program sees: itself, its input, the system and Python, read-only, and an empty /tmp. Not:
the network, other processes, files of the user, this project, the environment. What it started
dies with it. As root it is another user, a new one for each program. What is not held back: a
hole in the kernel; the memory of all its processes together (if it runs out, they go first).
"""

import math
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from data.files import die, warn

COMPILER = shutil.which("g++", path="/usr/local/bin:/usr/bin")  # which is what a program sees
PYTHON = [sys.executable, "-I", "-X", "int_max_str_digits=0"]
ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
MADE = map(str, [*Path(sys.prefix).parents, *Path(sys.base_prefix).parents, "/etc"])
PLACES = dict.fromkeys(MADE, "--perms 0755 --dir".split())  # as root it would be 0700
SHOWN = "/usr /bin /lib /lib64 /etc/alternatives /etc/ld.so.cache".split()
PLACES |= {path: ["--ro-bind-try", path] for path in [*SHOWN, sys.base_prefix, sys.prefix]}
MINE = {str(Path(__file__).resolve().parent.parent), os.path.expanduser("~")} - {"/"}
PLACES |= dict.fromkeys(MINE, "--size 4096 --tmpfs".split())  # hidden, even in /usr
PLACES |= dict.fromkeys(["/tmp", "/dev/shm"], "--perms 1777 --size 67108864 --tmpfs".split())
BWRAP = "bwrap --die-with-parent --new-session --as-pid-1 --unshare-net --unshare-pid "
BWRAP += "--unshare-ipc --unshare-uts --proc /proc --dev /dev"
_kind = "bubblewrap"  # or "limits", if check_code() is told so


def run_inside(program, command, stdin="", seconds=10.0, memory=1 << 30, most=1 << 20):
    """(output, "ok", "wrong", "timeout" or "output_limit") of a command, its last word a program.

    program: its bytes. seconds: of CPU time per process; the clock allows ten times that, at most
    600, for it may have to share its core. memory: bytes per process, a quarter of it for the
    stack. most: bytes of output.
    """
    root, shut_in = os.getuid() == 0, _kind == "bubblewrap"
    uid, cpu = 10_000 + secrets.randbelow(50_000), math.ceil(seconds)
    words = f"setpriv --pdeathsig KILL timeout -s KILL {min(10 * seconds, 600)}".split()
    with tempfile.TemporaryDirectory() as box:
        os.chmod(box, 0o755)
        given = stdin.encode(errors="replace")
        for name, content in {"program": program, "stdin": given, "stdout": b""}.items():
            Path(box, name).write_bytes(content)
            os.chmod(Path(box, name), 0o777)  # it may open /dev/stdout; all else is read-only there
        if shut_in:
            words += BWRAP.split() + "--cap-add CAP_SETUID --cap-add CAP_SETGID".split() * root
            for path in sorted(PLACES):  # what lies in another after it
                words += [*PLACES[path], path]
            words += ["--ro-bind", box, "/box", *"--remount-ro / --remount-ro /dev".split()]
            # Process 1, with which the others die; if memory runs out, they go first.
            words += ["sh", "-c", 'echo 1000 > /proc/self/oom_score_adj; "$@"; exit $?', "sh"]
        words += f"setpriv --reuid={uid} --regid={uid} --clear-groups --no-new-privs".split() * root
        count = 32 if root or shut_in else 4096  # else all that the user has
        words += f"prlimit --cpu={cpu}:{cpu + 1} --as={memory} --stack={memory // 4}:".split()
        words += f"--nproc={count} --nofile=64 --core=0 --fsize={max(16 << 20, 2 * most)}".split()
        words += [*command, f"{'/box' if shut_in else box}/program"]
        with open(f"{box}/stdin") as given, open(f"{box}/stdout", "w") as out:
            how = {"stderr": subprocess.DEVNULL, "cwd": "/tmp", "env": ENVIRONMENT}
            code = subprocess.call(words, stdin=given, stdout=out, **how)
        printed = Path(box, "stdout").read_bytes()
    if len(printed) > most:
        return b"", "output_limit"
    killed = abs(code) % 128 in (9, 14, 24, 27)  # SIGKILL, SIGALRM, SIGXCPU, SIGPROF
    return printed, "ok" if code == 0 else "timeout" if killed else "wrong"


def check_code(records, allow_code):
    """Programs run only if --allow-code was given, in what it names, and if that works here."""
    global _kind
    languages = {record.get("language") for record in records if record["kind"] == "code"}
    if not languages:
        return
    if not allow_code:
        die('to grade problems of kind "code" is to run programs: give --allow-code to all stages')
    if "cpp" in languages and not COMPILER:
        die("programs in C++ cannot be graded without g++: apt install g++")
    _kind = allow_code
    if not shutil.which("setpriv") or run_inside(b"print(1)", PYTHON) != (b"1\n", "ok"):
        die(
            f"--allow-code={allow_code} does not work here (Debian: apt install bubblewrap; "
            "Fedora: dnf install bubblewrap; Arch: pacman -S bubblewrap; macOS: in a Linux "
            "container; root needs a Python that others may run). Weaker: --allow-code=limits"
        )
    if allow_code == "limits":
        free = "read and change files, use the network, see what is expected, and outlive the test"
        warn(f"--allow-code=limits: programs can do all that this user may: {free}")
