#!/usr/bin/env bash
# Builds, tests, measures and trains everything on a GPU, without a network: bench/gpu_day.sh [options] [OUTDIR]
#
#   --quick      inside 9 minutes instead of 17: fewer shapes, fewer variants, a shorter training
#   --cpu        a rehearsal without a GPU, on tiny shapes; no result is written beside the real ones
#   --only PART  one of: build check tests kernels sanitize demo ops renderer step autotune report
#
# Writes JSON to OUTDIR (bench/results) and logs to OUTDIR/logs. A part that fails or takes too long is reported, and the
# others go on; the exit status is 1 then. PYTHON names the interpreter (python3); nothing is installed into it.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ROOT=$PWD
PYTHON=${PYTHON:-python3}
PARTS="build check tests kernels sanitize demo ops renderer step autotune report"

usage() { sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

MODE=full ONLY='' OUT=''
while [ $# -gt 0 ]; do
  case $1 in
    --quick) MODE=quick ;;
    --cpu) MODE=cpu ;;
    --only)
      ONLY=${2:-}
      case " $PARTS " in *" $ONLY "*) shift ;; *) echo "--only takes one of: $PARTS" >&2; exit 2 ;; esac
      [ -n "$ONLY" ] || { echo "--only takes one of: $PARTS" >&2; exit 2; } ;;
    -h | --help) usage; exit 0 ;;
    -*) echo "unknown option $1" >&2; usage >&2; exit 2 ;;
    *) OUT=$1 ;;
  esac
  shift
done
if [ -z "$OUT" ]; then
  if [ "$MODE" = cpu ]; then OUT=$(mktemp -d); else OUT=bench/results; fi
fi
mkdir -p "$OUT/logs"
OUT=$(cd "$OUT" && pwd)
LOGS=$OUT/logs

export PYTHONPATH=$ROOT/bench/site:$ROOT${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
export PATH=$PATH:/usr/local/cuda/bin

case $MODE in
  full) TOTAL=1020 ;;
  quick) TOTAL=535 ;;
  cpu) TOTAL=7200 ;; # a rehearsal's limits end what hangs, on any machine
esac

names=() states=() took=()

note() { # NAME STATE SECONDS
  names+=("$1") states+=("$2") took+=("$3")
  printf '%-9s %s, %s s\n' "$1" "$2" "$3"
}

wanted() { [ -z "$ONLY" ] || [ "$ONLY" = "$1" ]; }

# The exit status of a command, `timeout`'s included, in words.
state() { # STATUS LIMIT
  case $1 in
    0) echo ok ;;
    124 | 137) echo "FAILED: took more than $2 s" ;;
    *) echo "FAILED: exit status $1" ;;
  esac
}

limit() { # SECONDS: those, or what is left of the whole
  local left=$((TOTAL - SECONDS))
  [ "$left" -lt 5 ] && left=5
  if [ "$1" -lt "$left" ]; then echo "$1"; else echo "$left"; fi
}

part() { # NAME SECONDS COMMAND...
  local name=$1 most begun=$SECONDS status
  most=$(limit "$2")
  shift 2
  wanted "$name" || return 0
  timeout -k 10 "$most" "$@" >"$LOGS/$name.log" 2>&1
  status=$?
  note "$name" "$(state "$status" "$most")" $((SECONDS - begun))
}

skip() { # NAME WHY
  if wanted "$1"; then note "$1" "skipped: $2" 0; fi
}

# A rehearsal takes the extension that is there: to build it is minutes, and other processes may have it loaded.
build() {
  if [ "$MODE" != cpu ] || ! compgen -G 'epigraf_fast/_C.*' >/dev/null; then
    "$PYTHON" setup.py -q build_ext --inplace || return
  fi
  [ "$MODE" = cpu ] || "$PYTHON" -m epigraf_fast doctor
}

# What the first start of a run does: what follows takes the kernels that pass.
check() {
  "$PYTHON" -m epigraf_fast doctor --check
}

pytest() {
  local workers=()
  if [ "$MODE" != cpu ] && "$PYTHON" -c 'import xdist' 2>/dev/null; then workers=(-n 8); fi
  "$PYTHON" -m pytest -q -p no:cacheprovider "${workers[@]}" "$@"
}

run_tests() {
  local status
  if [ "$MODE" = cpu ]; then
    pytest tests/ops/test_checks.py -k tolerance
    return
  fi
  pytest --continue-on-collection-errors tests -m gpu
  status=$?
  [ "$status" -eq 5 ] && { echo "no test is marked gpu"; status=0; }
  return "$status"
}

# What follows the device: on a GPU it runs the kernels there. Hundreds of them are compiled.
run_kernels() {
  if [ "$MODE" = cpu ]; then
    pytest tests/ops/test_backends.py -k "not without_the_extension"
    return
  fi
  pytest tests/ops tests/models -m "not gpu" -k "triton or cuda"
}

run_sanitize() {
  if [ "$MODE" = cpu ]; then
    "$PYTHON" -m bench.ops.sanitize
    return
  fi
  # Without the caching allocator every tensor is an allocation of its own, whose ends the tool sees.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 --log-file "$LOGS/memcheck.txt" \
    "$PYTHON" -m bench.ops.sanitize
}

run_autotune() {
  "$PYTHON" -m bench.ops.tune --json "$OUT/kernels.json"
}

run_report() {
  cp README.md docs/benchmarks.md "$LOGS/" 2>/dev/null || return
  "$PYTHON" -m bench.report --results "$OUT" --readme "$LOGS/README.md" --page "$LOGS/benchmarks.md" --plots "$LOGS/plots"
}

export -f build check pytest run_tests run_kernels run_sanitize run_autotune run_report
KIND=gpu
if [ "$MODE" = cpu ]; then
  KIND=cpu
  export OMP_NUM_THREADS=1 # tiny shapes: threads would only wait for one another
  export CUDA_VISIBLE_DEVICES= # also where there is a GPU
fi
export PYTHON MODE OUT LOGS KIND

echo "$MODE on $("$PYTHON" -c '
import importlib.metadata, os, platform
gpu = "no GPU"
if os.environ["MODE"] != "cpu":
    import torch
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else gpu
print(gpu, "Python " + platform.python_version(), "torch " + importlib.metadata.version("torch"), sep=", ")
' 2>&1 | tail -n 1), results in $OUT"
if [ "$MODE" != cpu ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "torch finds no GPU: bench/gpu_day.sh --cpu rehearses without one" >&2
  exit 1
fi

rest=(120 30 60) # check, autotune, report
case $MODE in
  full)
    tests=300 sanitize=60 demo=180 demo_args=()
    ops=(bench.ops --batch 8 --mode fwd,step,double --dtype fp32,tf32,fp16 --backend triton,cuda,published,reference
      --budget 0.04 --timeout 45)
    renderer=(bench.ops --op renderer --batch 8 --mode fwd,step --backend triton,published,compile,reference
      --dtype fp32,tf32 --budget 0.1 --timeout 45)
    step=(bench.step --preset ffhq --resolution 512 --batch 8 --seconds 2 --timeout 75
      --variants published,ours-fp32,ours-tf32,ours-tf32-graphs,ours-fp16,eager,compile)
    times=(45 115 50 140)
    ;;
  quick)
    tests=150 sanitize=25 demo=60 demo_args=()
    ops=(bench.ops --op decode_triplane,composite,bias_act,modulated_conv2d --batch 4 --mode step --dtype fp32
      --backend triton,cuda,published,reference --budget 0.03 --timeout 25)
    renderer=(bench.ops --op renderer --batch 4 --mode step --backend triton,published,reference --budget 0.05 --timeout 20)
    step=(bench.step --preset ffhq --resolution 512 --batch 8 --seconds 1 --timeout 30 --no-largest
      --variants published,ours-fp32,ours-tf32)
    times=(40 45 20 50)
    ;;
  cpu)
    tests=1800 sanitize=1800 demo=1800 demo_args=(--kimg 0.008 --device cpu)
    ops=(bench.ops --size tiny --op decode_triplane,bias_act --mode step,double --budget 0.02)
    renderer=(bench.ops --size tiny --op renderer --mode step --budget 0.02)
    step=(bench.step --size tiny --variants ours-fp32,published --seconds 0.2)
    times=(1800 1800 1800 1800) rest=(1800 1800 1800)
    ;;
esac

part build "${times[0]}" bash -c build
part check "${rest[0]}" bash -c check

# The training takes minutes and little of the GPU: it runs beside the tests, and ends before anything is measured.
demo_process='' demo_begun=$SECONDS
if wanted demo; then
  demo_limit=$(limit "$demo")
  rm -rf "$LOGS/demo-run"
  timeout --preserve-status -s TERM -k 15 "$demo_limit" "$PYTHON" -m bench.runs.demo --run-dir "$LOGS/demo-run" \
    --json "$OUT/$KIND-demo.json" "${demo_args[@]}" >"$LOGS/demo.log" 2>&1 &
  demo_process=$!
fi
part tests "$tests" bash -c run_tests
part kernels "$tests" bash -c run_kernels
if [ "$MODE" = cpu ] || command -v compute-sanitizer >/dev/null; then
  part sanitize "$sanitize" bash -c run_sanitize
else
  skip sanitize "there is no compute-sanitizer"
fi
if [ -n "$demo_process" ]; then
  wait "$demo_process"
  note demo "$(state $? "$demo_limit")" $((SECONDS - demo_begun))
fi
part ops "${times[1]}" "$PYTHON" -m "${ops[@]}" --json "$OUT/$KIND-ops.json"
part renderer "${times[2]}" "$PYTHON" -m "${renderer[@]}" --json "$OUT/$KIND-renderer.json"
part step "${times[3]}" "$PYTHON" -m "${step[@]}" --json "$OUT/$KIND-step.json"
if [ -f bench/ops/tune.py ]; then
  part autotune "${rest[1]}" bash -c run_autotune
else
  skip autotune "this checkout has no bench/ops/tune.py"
fi
part report "${rest[2]}" bash -c run_report

echo
echo "== $MODE, $SECONDS s, logs in $LOGS"
failed=0
for i in "${!names[@]}"; do
  printf '%-9s %4s s  %s\n' "${names[$i]}" "${took[$i]}" "${states[$i]}"
  case ${states[$i]} in
    FAILED*)
      failed=1
      tail -n 2 "$LOGS/${names[$i]}.log" | cut -c 1-150 | sed 's/^/          | /'
      ;;
  esac
done
"$PYTHON" -m bench.report --results "$OUT" --summary 2>&1 | head -n 40
exit "$failed"
