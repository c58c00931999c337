#!/usr/bin/env bash
# Trains the models that are shipped, and their plain ViT twins, on one GPU; call it again and again until it says "done".
#
#   scripts/train_models.sh DATA OUT [STAGE...]
#
#   DATA    folder with camvid/{train,val} and cwfid/train
#   OUT     run folders; what is complete there is not trained again, what is not is continued
#   STAGE   some of the stages below, in that order; default: all
#
# Environment: MINUTES   stop and save after so long (default 8.5, for machines that lend ten at a time)
#              DEVICE    auto, cpu, cuda (default auto)
#              EPOCHS    replaces the recipes' number of epochs, for a trial or a slower machine; use an OUT of its own
#              PYTHON    default: .venv/bin/python if there is one, else python3 with torch, opencv, numpy, pyyaml,
#                        safetensors, tqdm, matplotlib
#              PACK      folder that gets models and reports as archives of at most 15 MB each at the end of every call;
#                        `cat models.tar.* | tar x` unpacks them (default: not packed)
#
# Exit code 75 when time ran out, 0 when everything asked for is done.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ $# -lt 2 ]; then sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 2; fi
DATA=$1 OUT=$2; shift 2
STAGES=${*:-pretrain_small camvid_small pretrain_tiny camvid_tiny cwfid_tiny camvid_tiny_vit camvid_small_vit report}
MINUTES=${MINUTES:-8.5} DEVICE=${DEVICE:-auto} EPOCHS=${EPOCHS:-} PACK=${PACK:-}
if [ -z "${PYTHON:-}" ]; then PYTHON=python3; [ -x .venv/bin/python ] && PYTHON=.venv/bin/python; fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
"$PYTHON" -c 'import torch, cv2, numpy, yaml, safetensors, tqdm, matplotlib' || exit 2
mkdir -p "$OUT"
START=$(date +%s)

left() { "$PYTHON" -c "import time; print(f'{max($MINUTES - (time.time() - $START) / 60, 0):.2f}')"; }

# What is complete, without encoders and checkpoints: they are as large as the models, and are made again from the recipes.
pack() {
  [ -n "$PACK" ] || return 0
  mkdir -p "$PACK"; rm -f "$PACK"/models.tar.*
  (cd "$OUT" && {
      for done in */done.json; do
        [ -f "$done" ] && find "${done%/*}" -maxdepth 2 -type f \( -path '*/model/*' -o -name '*.json' -o -name '*.yaml' \
          -o -name log.jsonl \) -not -path '*/fold*/model/*' -print0
      done
      find . -maxdepth 2 -type f \( -name 'report*.json' -o -name report.html \) -print0
    } | tar c --null -T -) | split -b 15m - "$PACK/models.tar."
}

# Runs a command of clustvit-ros within what is left of the time.
within_time() {
  local minutes; minutes=$(left)
  if [ "$("$PYTHON" -c "print($minutes < 0.2)")" = True ]; then pack; echo "time is up; call again"; exit 75; fi
  local code=0
  "$PYTHON" -m clustvit_ros.cli.main "$@" --time-limit "$minutes" --device "$DEVICE" ${EPOCHS:+--epochs $EPOCHS} || code=$?
  if [ $code -eq 75 ]; then pack; echo "time is up; call again"; exit 75; fi
  [ $code -eq 0 ] || { pack; exit $code; }
}

pretrain() { within_time pretrain "config/train/$2.yaml" --images "$DATA/camvid/train/images" "$DATA/cwfid/train/images" --out "$OUT/$1"; }
train() { local name=$1 recipe=$2; shift 2; within_time train "config/train/$recipe.yaml" --out "$OUT/$name" "$@"; }

for stage in $STAGES; do
  echo "== $stage"
  case $stage in
    pretrain_small) pretrain pretrain_small camvid_small_gpu ;;
    pretrain_tiny) pretrain pretrain_tiny camvid_tiny_gpu ;;
    camvid_small) train camvid_small camvid_small_gpu --data "$DATA/camvid" --init "$OUT/pretrain_small/encoder.safetensors" ;;
    camvid_tiny) train camvid_tiny camvid_tiny_gpu --data "$DATA/camvid" --init "$OUT/pretrain_tiny/encoder.safetensors" ;;
    camvid_small_vit) train camvid_small_vit camvid_small_gpu --without-merging --data "$DATA/camvid" --init "$OUT/pretrain_small/encoder.safetensors" ;;
    camvid_tiny_vit) train camvid_tiny_vit camvid_tiny_gpu --without-merging --data "$DATA/camvid" --init "$OUT/pretrain_tiny/encoder.safetensors" ;;
    # Starts from the CamVid model: the encoder of the pre-training has seen the images that the folds hold out.
    cwfid_tiny) train cwfid_tiny cwfid_tiny_gpu --data "$DATA/cwfid" --folds 5 --init "$OUT/camvid_tiny/model" ;;
    report)
      for size in tiny small; do
        models=()
        for name in camvid_$size camvid_${size}_vit; do
          [ -f "$OUT/$name/done.json" ] && models+=("$OUT/$name/model")
        done
        [ ${#models[@]} -eq 0 ] || "$PYTHON" -m clustvit_ros.cli.main evaluate --model "${models[@]}" \
          --data "$DATA/camvid" --device "$DEVICE" --report "$OUT/report_$size" --json "$OUT/report_$size.json"
      done ;;
    *) echo "$0: unknown stage $stage" >&2; exit 2 ;;
  esac
done
pack
echo "done: $OUT"
