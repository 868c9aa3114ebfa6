#!/usr/bin/env bash
# The ratios of the README that a CPU gives, to OUTDIR (bench/results): bench/cpu_ratios.sh [OUTDIR]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${1:-bench/results}
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD/bench/site:$PWD${PYTHONPATH:+:$PYTHONPATH}

run() { "$PYTHON" -m bench.run --device cpu --backend cpu,reference "$@"; }

run --size small --budget 2 --json "$OUT/cpu-ops.json"
run --op synthesis --size real --batch 1 --mode fwd,step --budget 60 --json "$OUT/cpu-synthesis.json"
"$PYTHON" -m bench.step --device cpu --size tiny --seconds 20 --variants ours-cpu,reference --json "$OUT/cpu-step.json"
"$PYTHON" -m bench.report --results "$OUT"
