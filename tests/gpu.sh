#!/usr/bin/env bash
# Everything that only a GPU can show, in minutes: its tests, then data/bench.json and its table.
#
#     bash tests/gpu.sh wheels     # where there is a network: what a bare machine lacks, into .whl
#     bash tests/gpu.sh            # where the GPU is; it needs no network, but a torch of its own
set -uo pipefail
cd "$(dirname "$0")/.."
needed=$(grep -E '^(transformers|datasets|math-verify)==' requirements.txt)
needed="$needed latex2sympy2_extended==1.11.0 antlr4-python3-runtime==4.13.2 dill==0.4.1"
needed="$needed multiprocess==0.70.19"
if [ "${1-}" = wheels ]; then
    for package in $needed; do
        pip download -q --no-deps --python-version 3.12 -d .whl "$package"
    done
    exit
fi
if ls .whl/*.whl > /dev/null 2>&1; then
    pip install -q --no-index --no-deps --target /tmp/site --upgrade .whl/*.whl
    export PYTHONPATH=/tmp/site
fi
python3 - << 'END'
import re, importlib.metadata as installed
for name, wanted in re.findall(r"(\S+)==(\S+)", open("requirements.txt").read()):
    try:
        there = installed.version(name)
    except installed.PackageNotFoundError:
        there = "none"
    if there.split("+")[0] != wanted:
        print(f"{name}: {there} here, {wanted} in requirements.txt")
END
python3 -m pytest -q tests/test_gpu.py
for part in large kl sampling step; do
    timeout 240 python3 tests/bench.py "$part" --repeats 1
done
