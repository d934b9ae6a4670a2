#!/usr/bin/env bash
# A student and its static prune, each converted, healed and measured beside the dense model: what one GPU makes in 25 minutes.
#
#     benchmarks/gpu.sh SmolLM2-135M-Instruct.Q4_1.gguf mixed.jsonl runs/gpu-smollm2 20000000
#     benchmarks/gpu.sh qwen2.5-coder-0.5b-instruct-q4_k_m.gguf code.jsonl runs/gpu-qwen 4000000
#
# The folder then holds the healed checkpoints and tables: student.json, pruned.json, and a log of each command with its
# time in times.txt. Whatever is done is not done again, so an interrupted run goes on. CALIBRATED, TUNE and BATCH may be
# set; tests run it with tiny ones on the CPU.
set -euo pipefail

model=$1 text=$2 out=$3 tokens=$4
calibrated=${CALIBRATED:-500000} tune=${TUNE:-2} batch=${BATCH:-16}
mkdir -p "$out"

# timed NAME COMMAND...: factorllm's command, its words in NAME.log and its seconds in times.txt
timed() {
  local name=$1 start=$SECONDS
  shift
  factorllm "$@" 2>&1 | tee "$out/$name.log"
  echo "$name $((SECONDS - start)) s" | tee -a "$out/times.txt"
}

make_one() {
  local name=$1 recipe=$2
  timed "$name" factorize "$model" -o "$out/$name" --recipe "$recipe" --text "$text" --tokens "$calibrated" --tune "$tune" --no-baseline
  timed "$name-healed" heal "$out/$name" --teacher "$model" -o "$out/$name-healed" --text "$text" --tokens "$tokens" --batch "$batch" --micro-batch "$batch"
}

make_one student S2A2E8
timed student-text eval "$out/student-healed" --against "$model" --text "$text" --tasks "" --device auto -o "$out/student.json"
make_one pruned S4A0E8
timed pruned-text eval "$out/pruned-healed" --against "$model" --text "$text" --tasks "" --device auto -o "$out/pruned.json"
