#!/usr/bin/env bash
# Everything that only a GPU can show, on a bare machine with PyTorch and a CUDA GPU, without ROS, within 9 minutes:
#
#   scripts/gpu_check.sh OUTDIR
#
# gpu-marked tests, float16 against float32, captured graphs against eager frames, and the benchmark tables, each as JSON
# (or a log) in OUTDIR, and a summary. Needs what `import clustvit_ros` needs besides PyTorch (numpy, OpenCV, PyYAML,
# safetensors) and pytest with hypothesis and pytest-timeout; installs nothing.
# PYTHON chooses the interpreter. GPU_CHECK_DEVICE=cpu goes through all the steps with tiny cases, to test this script.
#
# Exit: 0 all passed, 1 something failed, 2 wrong usage, 3 no GPU, 4 a package is missing.

set -u
if [ $# -ne 1 ]; then
  echo "usage: scripts/gpu_check.sh OUTDIR" >&2
  exit 2
fi
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
mkdir -p "$1" && out="$(cd "$1" && pwd)" || exit 2
cd "$root" || exit 2
python="${PYTHON:-python3}"
device="${GPU_CHECK_DEVICE:-cuda}"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

missing="$("$python" - <<'PY'
import importlib.util
names = "torch numpy cv2 yaml safetensors pytest hypothesis pytest_timeout"
print(" ".join(name for name in names.split() if importlib.util.find_spec(name) is None))
PY
)" || { echo "gpu_check: $python does not run; set PYTHON to an interpreter that has PyTorch" >&2; exit 4; }
if [ -n "$missing" ]; then
  echo "gpu_check: $python lacks $missing; install them there, or set PYTHON to an interpreter that has them" >&2
  exit 4
fi
if [ "$device" != cpu ]; then
  "$python" - <<'PY' || exit 3
import sys
from clustvit_ros.errors import ClustvitError
from clustvit_ros.engine.network_engine import select_device
try:
    select_device("cuda")
except ClustvitError as error:
    sys.exit(f"gpu_check: no GPU: {error}")
PY
fi

deadline=$((SECONDS + 520))
failed=0
summary="$out/summary.txt"
: >"$summary"

# step NAME SECONDS COMMAND...: runs it, its output in NAME.log, at most so long and never past the deadline.
step() {
  local name="$1" limit="$2" began=$SECONDS status
  shift 2
  local left=$((deadline - SECONDS))
  if [ $left -lt 10 ]; then
    status="skipped: out of time"
    failed=1
  elif timeout $((left < limit ? left : limit)) "$@" >"$out/$name.log" 2>&1; then
    status=passed
  else
    local code=$?
    status="FAILED (exit $code$([ $code -eq 124 ] && echo ', out of time')), see $name.log"
    failed=1
  fi
  echo "$name: $status, $((SECONDS - began)) s" | tee -a "$summary"
}

bench() { # bench NAME SECONDS OPTIONS...
  local name="$1" limit="$2"
  shift 2
  step "$name" "$limit" "$python" -m clustvit_ros.cli.main bench --device "$device" "${sizes[@]}" --kept-fraction 0.3 \
    --roofline --json "$out/$name.json" "$@"
}

"$python" - "$device" >"$out/machine.json" <<'PY'
import json, platform, sys, torch
from clustvit_ros.measure.bench import result_stem
device = torch.device(sys.argv[1])
print(json.dumps({"name": result_stem(device), "torch": torch.__version__, "cuda": torch.version.cuda,
                  "python": platform.python_version()}, indent=2))
PY

sizes=(--size 512x512 --classes 150 --warmup 20 --runs 200)
archs=vit_t,clustvit_t,vit_s,clustvit_s,vit_b,clustvit_b
if [ "$device" = cpu ]; then
  sizes=(--size 64x64 --classes 5 --warmup 1 --runs 2)
  archs=vit_t,clustvit_t
fi
step tests 150 "$python" -m pytest -q -p no:cacheprovider -m gpu test/engine --junitxml "$out/tests.xml"
step agreement 60 "$python" scripts/gpu_check.py agreement --device "$device" --json "$out/agreement.json"
step graphs 90 "$python" scripts/gpu_check.py graphs --device "$device" --json "$out/graphs.json"
for precision in float16 float32; do
  for engine in cuda_graph torch; do
    bench "bench_${precision}_$engine" 120 --arch "$archs" --engine "$engine" --precision "$precision"
  done
done

"$python" - "$out" "$device" <<'PY' | tee -a "$summary"
import json, pathlib, sys
out, device = pathlib.Path(sys.argv[1]), sys.argv[2]
for path in sorted(out.glob("bench_*.json")):
    rows = json.loads(path.read_text())
    for row in rows:
        if row["arch"].startswith("clustvit"):
            plain = next(r for r in rows if r["arch"] == row["arch"][5:] and r["engine"] == row["engine"])
            print(f"{path.stem}: {row['arch']} {row['engine']}: {row['p50_ms']:.2f} ms, "
                  f"{plain['p50_ms'] / row['p50_ms']:.2f}x of {plain['arch']}, p99/p50 {row['p99_ms'] / row['p50_ms']:.2f}")
PY
exit $failed
