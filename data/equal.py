"""Compares answers by math-verify, in a process of its own: sympy can hang, or eat all memory.

common.ask_grader() starts it. A line of JSON in: [reference, answer, are letters units?, decimal
places]; a word out: correct, wrong, or error (the reference cannot be read).
"""

import json
import resource
import signal
import sys
from contextlib import suppress

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, grader, parse, verify
from sympy import solve

solve_and_compare = grader.sympy_solve_and_compare


def with_solutions(gold, *others):
    """Two equations without real solutions are not the same: 0 = 1 is not x^2 + 1 = 0."""
    return bool(solve(gold, gold.free_symbols)) and solve_and_compare(gold, *others)


grader.sympy_solve_and_compare = with_solutions
with suppress(ValueError):  # macOS has no such limit
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
print(flush=True)
for line in sys.stdin:
    signal.setitimer(signal.ITIMER_PROF, float(sys.argv[1]))  # seconds of CPU time; then it dies
    reference, answer, units, places = json.loads(line)
    normal = NormalizationConfig(units=units, malformed_operators=True, nits=True, boxed="none")
    how = {"extraction_config": [LatexExtractionConfig(normalization_config=normal)]}
    # In $…$ and with no fallback: else of what cannot be read, any number in it is an answer.
    how |= {"fallback_mode": "no_fallback", "parsing_timeout": None}
    gold, other = (parse(f"${text}$", **how) for text in (reference, answer))
    how = {"allow_set_relation_comp": True, "timeout_seconds": None}
    same = gold and verify(gold, other, places, 100, **how)
    print("correct" if same else "wrong" if gold else "error", flush=True)
