#!/usr/bin/env bash
# Fairy2i end to end on the embedded model: offline, on a CPU. The living reference for what `wf` does.
#
#   bash runs/cpu.sh                             three trainings, about 20 minutes on two cores
#   OUT=/tmp/try bash runs/cpu.sh \
#     training.max_steps=5 training.max_seq_length=128 training.final_eval_tokens=4096 training.eval_tokens=2048
#                                                the same at toy size, a few minutes
#
# Arguments are settings for all trainings. OUT is where the runs go; runs that are there already are replaced.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1
PATH="$PWD/.venv/bin:$PATH"
OUT=${OUT:-outputs}

wf doctor

# 2 bits and 1 bit per weight: minutes each. Each leaves checkpoints/, final/, packed/, plots/ and results.json.
wf fairy2 -m tiny --mode w2 --force output_dir="$OUT/fairy2_tiny_w2" "$@"
wf fairy2 -m tiny --mode w1 --force output_dir="$OUT/fairy2_tiny_w1" "$@"

# The control: the unquantized model with the same extra steps, so that more training is not taken for better codes.
wf train model=tiny training=full_precision --force output_dir="$OUT/full_precision_tiny" "$@"

# Perplexity of the original and of the packed folders on the same text: half a minute each.
for model in tiny "$OUT/fairy2_tiny_w2/packed" "$OUT/fairy2_tiny_w1/packed" "$OUT/full_precision_tiny"; do
  wf eval "$model" --context 128 --tokens 20000
done

# Pack once more from the checkpoint: the same folder, certified anew.
wf export "$OUT/fairy2_tiny_w2" --out "$OUT/tiny-w2" --force

wf generate "$OUT/tiny-w2" --prompt 'def ' --max-new-tokens 64
wf plot "$OUT/fairy2_tiny_w2" "$OUT/fairy2_tiny_w1" --out "$OUT/compare.png"
wf runs "$OUT"
