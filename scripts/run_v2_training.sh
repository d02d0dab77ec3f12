#!/usr/bin/env bash
# The whole V2 training: get the cache, train, and save a copy of the run.
#
#   bash scripts/run_v2_training.sh                                                     as on Colab, with a GPU
#   MODEL=tiny CACHE=caches/tiny V1= STEPS=100 DEST=kept bash scripts/run_v2_training.sh   minutes on a CPU
#
# CACHE is a folder, or the name of an archive for pull_cache.sh. V1 is the checkpoint to start from; empty means none.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)
MODEL=${MODEL:-Qwen/Qwen3-0.6B}
CACHE=${CACHE:-alpaca_chat_think_both_L128_K128_R1024}
V1=${V1-runs/v1/best.pt}
OUT=${OUT:-runs/v2_output}
STEPS=${STEPS:-1000}

if [ ! -d "$CACHE" ]; then
  bash scripts/pull_cache.sh "$CACHE"
  CACHE=caches/$CACHE
fi
if [ -f "$CACHE/meta.json" ] && [ ! -f "$CACHE/manifest.json" ]; then  # a cache of the original tools
  "$PYTHON" -m wrinklefree.cli cache --import "$CACHE" --out "$CACHE-imported" -m "$MODEL"
  CACHE=$CACHE-imported
fi
start=(--from-scratch)
if [ -n "$V1" ]; then start=(--v1-checkpoint "$V1"); fi
"$PYTHON" scripts/train_v2_simple.py "${start[@]}" --model-id "$MODEL" --cache-dir "$CACHE" --output-dir "$OUT" \
  --max-steps "$STEPS" --lr 1e-4 --batch-size 8 "$@"
bash scripts/save_to_drive.sh "$OUT" "$(basename "$OUT")"
