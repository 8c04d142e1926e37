#!/usr/bin/env bash
# What one GPU does with the 1.17-billion-parameter model and around it: one command, at most six minutes, a row as each
# thing is measured. Every part is a process with a time limit of its own, so that the others still run.
#   bash benchmarks/gpu.sh                   the rows also go to runs/gpu/rows.md
#   bash benchmarks/gpu.sh --tiny            small networks and few steps, also on a CPU: to try the parts themselves
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$(test -x .venv/bin/python && echo .venv/bin/python || echo python3)}
OUT=${OUT:-runs/gpu}
PATIENCE=${PATIENCE:-1}  # times the limits, for slow machines
mkdir -p "$OUT"
failed=0

part() {  # seconds, name, command ...
  local limit=$(($1 * PATIENCE)) name=$2
  shift 2
  timeout --kill-after=5 "$limit" "$@" || {
    code=$?
    failed=1
    echo "| $name | | $([ $code -ge 124 ] && echo "over its $limit s" || echo "failed with $code") | | | |"
    return 1
  }
}

gpu() {  # seconds, part, options ...
  local limit=$1 name=$2
  shift 2
  part "$limit" "$name" "$PYTHON" benchmarks/gpu.py "$name" --out "$OUT" "$@"
}

exec > >(tee "$OUT/rows.md")
echo "| what | precision | rate | time | peak memory | remarks |"
echo "| --- | --- | --- | --- | --- | --- |"
gpu 20 matmul "$@"
gpu 40 eager "$@"
gpu 130 quickstart "$@" >"$OUT/quickstart.rows" &  # a small network, while the compiler is at work: the card has time
beside=$!
gpu 130 compile "$@"
wait "$beside" || failed=1
cat "$OUT/quickstart.rows"
gpu 30 compiled "$@"
gpu 60 cached "$@"
gpu 30 fp16 "$@"
gpu 15 encoders "$@"
gpu 20 lora "$@"
gpu 15 sampling "$@"
exit "$failed"
