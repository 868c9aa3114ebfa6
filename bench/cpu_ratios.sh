#!/usr/bin/env bash
# The ratios of the README that a CPU gives, to OUTDIR (bench/results): bench/cpu_ratios.sh [OUTDIR]
# One thread; ops and the demo's step at its preset's micro-batch of 8.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${1:-bench/results}
PYTHON=${PYTHON:-python3}
export OMP_NUM_THREADS=1
export PYTHONPATH=$PWD/bench/site:$PWD${PYTHONPATH:+:$PYTHONPATH}

run() { "$PYTHON" -m bench.ops --device cpu --backend cpu,reference "$@"; }

run --size small --batch 8 --budget 2 --json "$OUT/cpu-ops.json"
run --op bias_act,upfirdn2d,synthesis --size real --batch 1 --mode fwd,step --budget 20 --json "$OUT/cpu-ops-real.json"
"$PYTHON" -m bench.step --device cpu --preset demo --size real --seconds 20 --variants ours-cpu,reference --json "$OUT/cpu-step.json"
# A full-size iteration against the published operations, on all cores: ten minutes.
env -u OMP_NUM_THREADS "$PYTHON" -m bench.step --device cpu --preset ffhq --batch 4 --micro-batch 1 --seconds 30 --variants ours-cpu,published \
  --json "$OUT/cpu-step-full.json"
"$PYTHON" -m bench.report --results "$OUT"
