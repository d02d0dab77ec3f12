#!/usr/bin/env bash
# Fairy2i end to end on the embedded model, offline, on a CPU: the reference for how the commands of `wf` fit together.
#
#   bash runs/cpu.sh                             three trainings, about 20 minutes on two cores
#   OUT=/tmp/try bash runs/cpu.sh \
#     training.max_steps=5 training.max_seq_length=128 training.final_eval_tokens=4096 training.eval_tokens=2048
#                                                a toy size, for a few minutes
#
# Arguments are settings of all trainings. OUT is the folder for the runs; earlier runs there are replaced.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1
PATH="$PWD/.venv/bin:$PATH"
OUT=${OUT:-outputs}

wf doctor

# 2 bits and 1 bit per weight; minutes each. Each writes checkpoints/, final/, packed/, plots/ and results.json.
wf fairy2 -m tiny --mode w2 --force output_dir="$OUT/fairy2_tiny_w2" "$@"
wf fairy2 -m tiny --mode w1 --force output_dir="$OUT/fairy2_tiny_w1" "$@"

# The control: the unquantized model with the same extra steps, which shows how much comes from more training alone.
wf train model=tiny training=full_precision --force output_dir="$OUT/full_precision_tiny" "$@"

# Perplexity of the original and of the packed folders on the same text: half a minute each.
for model in tiny "$OUT/fairy2_tiny_w2/packed" "$OUT/fairy2_tiny_w1/packed" "$OUT/full_precision_tiny"; do
  wf eval "$model" --context 128 --tokens 20000
done

# Pack again from the checkpoint. This gives the same folder, and certifies it again.
wf export "$OUT/fairy2_tiny_w2" --out "$OUT/tiny-w2" --force

wf generate "$OUT/tiny-w2" --prompt 'def ' --max-new-tokens 64
wf plot "$OUT/fairy2_tiny_w2" "$OUT/fairy2_tiny_w1" --out "$OUT/compare.png"
wf runs "$OUT"
