#!/usr/bin/env bash
# Fairy2i on a hub model with a GPU: train W2 and W1, evaluate, export, plot.
#
#   bash runs/fairy2.sh                                   SmolLM2-135M, 0.5 B tokens of web text each
#   MODEL=qwen3_0_6b bash runs/fairy2.sh
#   MODEL=/path/to/model SCALE=large bash runs/fairy2.sh  four GPUs
#   bash runs/fairy2.sh training.max_steps=100            a first try: minutes
#
# Arguments are settings of both trainings. It needs the hub (for model and data), one GPU with bf16, and disk space for
# two checkpoints of 12 bytes per parameter and final/ with 4: about 4 GB per run for 135 M parameters.
# Expected time: 1-2 hours for 0.5-1 B tokens of SmolLM2-135M on one H100, according to the guide; not measured here.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
MODEL=${MODEL:-smollm2_135m}
SCALE=${SCALE:-small}
DATA=${DATA:-fineweb_edu}
OUT=${OUT:-outputs}
NAME=$(basename "$MODEL")

wf doctor

for mode in w2 w1; do
  run="$OUT/fairy2_${NAME}_$mode"
  # An interrupted run resumes, and a finished run is kept.
  if [[ ! -d "$run/packed" ]]; then
    resume=()
    compgen -G "$run/checkpoints/step_*" > /dev/null && resume=(training.resume_from=latest)
    wf fairy2 -m "$MODEL" --mode "$mode" --scale "$SCALE" data="$DATA" output_dir="$run" ${resume[@]+"${resume[@]}"} "$@"
  fi
done

# Perplexity on text that is unrelated to the training data.
for model in "$MODEL" "$OUT/fairy2_${NAME}_w2/packed" "$OUT/fairy2_${NAME}_w1/packed"; do
  wf eval "$model"
done

# With the extra `eval` (pip install 'wrinklefree[eval]'): the paper's five tasks.
if python -c 'import lm_eval' 2> /dev/null; then
  wf eval "$OUT/fairy2_${NAME}_w2/packed" --tasks arc_easy,arc_challenge,hellaswag,piqa,winogrande
fi

wf export "$OUT/fairy2_${NAME}_w2" --out "$OUT/$NAME-w2" --force
wf generate "$OUT/$NAME-w2" --prompt 'The capital of France is' --max-new-tokens 32
wf plot "$OUT/fairy2_${NAME}_w2" "$OUT/fairy2_${NAME}_w1" --out "$OUT/compare_$NAME.png"
wf runs "$OUT"
