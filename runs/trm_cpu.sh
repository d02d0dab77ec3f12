#!/usr/bin/env bash
# LLM-TRM end to end on a CPU, offline: a small model learns to think in words, then a tiny network learns its thoughts.
#
#   bash runs/trm_cpu.sh                         about 7 minutes on two cores
#   OUT=/tmp/try bash runs/trm_cpu.sh training.max_steps=3 training.eval_examples=20 thinking.pairs.keep_wrong=true
#                                                a toy size, for a minute
#
# Arguments are settings of all stages except the pretraining and the compressor. OUT is the folder for the runs;
# earlier runs there are replaced.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
PATH="$PWD/.venv/bin:$PATH"
OUT=${OUT:-outputs}
chains=(model=chains "output_root=$OUT")

# A Llama of 1.3 M parameters that solves chains of operations modulo 7, step by step in words: a minute and a half.
wf pretrain "${chains[@]}" --force

# Phase 1: compress hidden states from 128 numbers to 64, by PCA.
wf trm compressor "${chains[@]}" --force

# Phase 2: record what the model thinks as hidden states; train a network to produce these thoughts; train an adapter
# that gives them to the model.
wf trm pairs "${chains[@]}" --force "$@"
wf trm train "${chains[@]}" --force "$@"
wf trm inject "${chains[@]}" --force "$@"

# Phase 3: reinforcement learning. If no step improves the adapter, the start is kept.
wf trm grpo "${chains[@]}" --force "$@"

# Compare thinking in words, in latent vectors and not at all, with controls, on the same held-out problems.
wf trm eval "${chains[@]}" --force "$@"
wf generate "$OUT/chains_trm_grpo" --think latent --prompt '3 +2 *4 +1 ?' --temperature 0
