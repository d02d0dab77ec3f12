#!/usr/bin/env bash
# LLM-TRM end to end on a CPU, offline: a small model learns to think in words, then a tiny network thinks for it.
#
#   bash runs/trm_cpu.sh                         some 7 minutes on two cores
#   OUT=/tmp/try bash runs/trm_cpu.sh training.max_steps=3 training.eval_examples=20 thinking.pairs.keep_wrong=true
#                                                the same at toy size, a minute
#
# Arguments are settings for all stages but the first and the compressor. OUT is where the runs go; what is there already is
# replaced.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
PATH="$PWD/.venv/bin:$PATH"
OUT=${OUT:-outputs}
chains=(model=chains "output_root=$OUT")

# A Llama of 1.3 M parameters that works out chains of operations modulo 7, aloud: a minute and a half.
wf pretrain "${chains[@]}" --force

# Phase 1: hidden states of 128 numbers in 64, by PCA.
wf trm compressor "${chains[@]}" --force

# Phase 2: what the model thinks, as hidden states; a network that thinks it; an adapter that tells the model.
wf trm pairs "${chains[@]}" --force "$@"
wf trm train "${chains[@]}" --force "$@"
wf trm inject "${chains[@]}" --force "$@"

# Phase 3: reinforce what leads to right answers; the start is kept where nothing is better.
wf trm grpo "${chains[@]}" --force "$@"

# Words, latents, nothing, and the controls, on the same held-out problems.
wf trm eval "${chains[@]}" --force "$@"
wf generate "$OUT/chains_trm_grpo" --think latent --prompt '3 +2 *4 +1 ?' --temperature 0
