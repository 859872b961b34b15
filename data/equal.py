"""Compares answers by math-verify, in a process of its own: sympy can hang, or eat all memory.

common.ask_grader() starts it. A line of JSON in: [reference, answer, are letters units?]; a word
out: correct, wrong, or error (the reference cannot be read).
"""

import json
import re
import resource
import signal
import sys
from contextlib import suppress
from functools import partial

from latex2sympy2_extended import NormalizationConfig, latex2sympy2
from latex2sympy2_extended.sets import FiniteSet
from math_verify import LatexExtractionConfig, grader, parse, parser, verify
from sympy import Eq, Float, Rational, Tuple, solve

solve_and_compare = grader.sympy_solve_and_compare
apart = latex2sympy2.ConversionConfig(lowercase_symbols=False)  # R is not r
parser.latex2sympy = partial(latex2sympy2.latex2sympy, conversion_config=apart)


def with_solutions(gold, *others):
    """Two equations without real solutions are not the same: 0 = 1 is not x^2 + 1 = 0."""
    return bool(solve(gold, gold.free_symbols)) and solve_and_compare(gold, *others)


grader.sympy_solve_and_compare = with_solutions
with suppress(ValueError):  # macOS has no such limit
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))


def same(gold, other, decimals):
    """As math-verify says, but a list is no pair and no range, and 7,7,2 is not 7,2,2."""
    lists = [x for x in (gold, other) if isinstance(x, FiniteSet)]
    if len(lists) == 1 and len(lists[0]._unsorted_args) > 1 and not lists[0].has(Eq):
        return False
    if len(lists) == 2:
        gold, other = (Tuple(*sorted(x._unsorted_args, key=grader.sort_key)) for x in lists)
    if not decimals:  # exactly: 0.142857 is not 1/7
        exact = {x: Rational(str(x)) for x in gold.atoms(Float) | other.atoms(Float)}
        gold, other = gold.xreplace(exact), other.xreplace(exact)
    how = {"allow_set_relation_comp": True, "timeout_seconds": None}
    return verify(gold, other, max([6, *map(len, decimals)]), 100, **how)


for line in sys.stdin:
    signal.setitimer(signal.ITIMER_PROF, 5)  # seconds of CPU time; then it dies
    reference, answer, units = json.loads(line)
    normal = NormalizationConfig(units=units, malformed_operators=True)
    how = {"extraction_config": [LatexExtractionConfig(normalization_config=normal)]}
    # In $$…$$ and with no fallback: else of what cannot be read, any number in it is an answer.
    how |= {"fallback_mode": "no_fallback", "parsing_timeout": None}
    gold, other = (parse(f"$${text}$$", **how) for text in (reference, answer))
    decimals = [] if "10^" in reference else re.findall(r"\.(\d+)", reference)
    right = gold and other and same(gold[0], other[0], decimals)
    print("correct" if right else "wrong" if gold else "error", flush=True)
