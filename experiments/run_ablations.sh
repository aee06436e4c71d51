#!/usr/bin/env bash
# The published grid on Llama-3.1-8B-Instruct: no, 1, 5, 10, 20 and 50 heads x zero and mean x full, top and bottom layers, the heads
# with the highest induction scores and 20 random sets beside each: with the published scores 582 sets of heads (about as many with
# others), on 300 permutations of 500 tokens.
#
#   bash experiments/run_ablations.sh
#   bash experiments/run_ablations.sh --tokens_path llama-1k-tokens.pkl --induction_scores_csv scores.csv
#   LAUNCH="accelerate launch" bash experiments/run_ablations.sh       # on all GPUs
#   bash experiments/run_ablations.sh --device auto                    # one model spread over all GPUs
#   bash experiments/run_ablations.sh --model_name tiny-gemma2 --to_abl 0-1-2-3 --n_tokens 20     # to try it out
#
# The same command resumes an interrupted run.
#
# Memory, on each GPU that has a model:
#   weights       8.03e9 parameters x 2 bytes (bfloat16)                          15.0 GiB
#   sweep         half of the weights by default (--memory 4 for a smaller card)   7.5 GiB
#   together      22.5 GiB and what CUDA itself takes: a card of 32 GB or more; with --memory 4 one of 24 GB
# and in each process' main memory
#   loading       the weights once                                                15.0 GiB
#   results       582 sets x 300 permutations x 501 tokens x 4 bytes               0.3 GiB, three times while they are merged
# and on disk, besides the model, 0.4 GB until the files are written and 0.1 GB of files.
#
# Arithmetic: 2.0e9 times a token through a block (70% of one forward pass per set and permutation, because each set shares the run up
# to the first head it ablates), 2 x 2.2e8 operations each: 8.6e17 in all, an hour at 240e12 operations a second.
set -euo pipefail
here=$(dirname "$0")

exec ${LAUNCH:-python} "$here/run_ablations.py" --config "$here/run_ablations_grid.yaml" "$@"
