#!/usr/bin/env bash
# BitDistill on a hub model with a GPU: teacher, SubLN, continued pretraining, distillation on a task, export.
#
#   bash runs/bitdistill.sh                                     SmolLM2-135M on SST-2
#   MODEL=qwen3_0_6b TASK=mnli bash runs/bitdistill.sh
#   MODEL=tiny TASK=stdlib_kind bash runs/bitdistill.sh         minutes on a CPU, no download
#   STAGES=0,1,3 bash runs/bitdistill.sh                        without continued pretraining
#
# Arguments are settings. KEY=VALUE applies to every stage that uses it, 3:KEY=VALUE to stage 3 only. By default stage 2
# trains on 10 B tokens as in the paper, which takes days on one GPU. For a first result, add
# 2:training.total_tokens=100_000_000.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
MODEL=${MODEL:-smollm2_135m}
TASK=${TASK:-sst2}
STAGES=${STAGES:-0,1,2,3}

wf doctor
# An interrupted stage resumes and a finished stage is skipped, so this script can be started again at any time.
wf bitdistill -m "$MODEL" --task "$TASK" --stages "$STAGES" "$@"
run="outputs/bitdistill_$(basename "$MODEL")_stage3_distill"
wf generate "$run" --prompt 'def ' --temperature 0
