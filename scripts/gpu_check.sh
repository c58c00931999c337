#!/usr/bin/env bash
# Everything that only a GPU can show, on a bare machine with PyTorch and a CUDA GPU, without ROS, within 15 minutes on a
# workstation and an hour on a Jetson:
#
#   scripts/gpu_check.sh OUTDIR
#
# gpu-marked tests, float16 against float32, captured graphs against eager frames, models that change under load, batches
# and camera sizes, memory at its peak, latency budgets, the engine tensorrt and ONNX Runtime's CUDA and TensorRT where they
# are installed, and the benchmark tables; each as JSON (or a log) in OUTDIR, a summary, and all of it in
# OUTDIR/report.json, to be sent back. Needs what `import clustvit_ros` needs besides PyTorch (numpy, OpenCV, PyYAML,
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

# A Jetson's limits, and a CPU's, are four times a workstation's.
scale="$("$python" -c "
import sys, torch
small = sys.argv[1] == 'cpu' or torch.cuda.get_device_properties(0).multi_processor_count < 20
print(4 if small else 1)" "$device")" || exit 3
deadline=$((SECONDS + 900 * scale))
failed=0
summary="$out/summary.txt"
: >"$summary"

# step NAME SECONDS COMMAND...: runs it, its output in NAME.log, at most so long and never past the deadline.
step() {
  local name="$1" limit=$(($2 * scale)) began=$SECONDS status
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
import importlib.metadata, json, platform, sys, torch
from clustvit_ros import __version__
from clustvit_ros.measure.bench import result_stem
device = torch.device(sys.argv[1])
versions = {}
for name in ("onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "triton", "numpy"):
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps({"name": result_stem(device), "clustvit_ros": __version__, "torch": torch.__version__,
                  "cuda": torch.version.cuda, "python": platform.python_version(), **versions}, indent=2))
PY

sizes=(--warmup 20 --runs 200)
random=(--size 512x512 --classes 150)
archs=vit_t,clustvit_t,vit_s,clustvit_s,vit_b,clustvit_b
if [ "$device" = cpu ]; then
  sizes=(--warmup 1 --runs 2)
  random=(--size 64x64 --classes 5)
  archs=vit_t,clustvit_t
fi
# Their limits sum to 890 s.
step tests 120 "$python" -m pytest -q -p no:cacheprovider -m gpu test/engine --junitxml "$out/tests.xml"
step agreement 60 "$python" scripts/gpu_check.py agreement --device "$device" --json "$out/agreement.json"
step graphs 80 "$python" scripts/gpu_check.py graphs --device "$device" --json "$out/graphs.json"
for part in swap batches memory budgets; do
  step "$part" 40 "$python" scripts/gpu_check.py "$part" --device "$device" --json "$out/$part.json"
done
for precision in float16 float32; do
  for engine in cuda_graph torch; do
    bench "bench_${precision}_$engine" 60 --arch "$archs" "${random[@]}" --engine "$engine" --precision "$precision"
  done
done
if [ "$device" = cpu ] || "$python" -c 'import tensorrt, onnx' 2>/dev/null; then
  step tensorrt 150 "$python" scripts/gpu_check.py tensorrt --device "$device" --json "$out/tensorrt.json"
else
  echo "tensorrt: not tried, it and onnx are not installed" | tee -a "$summary"
fi
if "$python" -c 'import onnx, onnxruntime' 2>/dev/null; then
  bench "bench_float32_onnx_$device" 30 --model camvid_tiny --engine onnxruntime --provider "$device"
  [ "$device" = cpu ] || bench bench_float16_onnx_tensorrt 50 --model camvid_tiny --engine onnxruntime --provider tensorrt --precision float16
else
  echo "onnxruntime: not tried, it and onnx are not installed" | tee -a "$summary"
fi

"$python" - "$out" "$device" <<'PY' | tee -a "$summary"
import json, pathlib, sys
out, device = pathlib.Path(sys.argv[1]), sys.argv[2]
for path in sorted(out.glob("bench_*.json")):
    rows = json.loads(path.read_text())
    for row in rows:
        if row["arch"].startswith("clustvit_"):
            plain = next(r for r in rows if r["arch"] == row["arch"][5:] and r["engine"] == row["engine"])
            print(f"{path.stem}: {row['arch']} {row['engine']}: {row['p50_ms']:.2f} ms, "
                  f"{plain['p50_ms'] / row['p50_ms']:.2f}x of {plain['arch']}, p99/p50 {row['p99_ms'] / row['p50_ms']:.2f}")
PY
"$python" scripts/gpu_check.py report "$out"
echo "everything is in $out/report.json; please send it back"
exit $failed
