#!/usr/bin/env bash
# Everything that wants a GPU, in one go: correctness first, then the benchmarks; JSON and logs into $OUT.
#   OUT=results bench/gpu_session.sh            on a machine with a GPU
#   DEVICE=cpu ROWS=20000 bench/gpu_session.sh  the same steps without one, to see that they run
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu_results} DEVICE=${DEVICE:-cuda} ROWS=${ROWS:-8000000} PY=${PY:-python3} SECONDS_EACH=${SECONDS_EACH:-5}
mkdir -p "$OUT"
DATA=$(mktemp -d)
trap 'rm -rf "$DATA"' EXIT
failed=0

step() {  # step NAME COMMAND...: its stdout to NAME.json, its stderr to NAME.log; goes on after a failure
    local name=$1
    shift
    echo "== $name: $*"
    local start=$SECONDS
    if "$@" >"$OUT/$name.json" 2>"$OUT/$name.log"; then echo "   ok, $((SECONDS - start)) s"
    else echo "   FAILED"; tail -n 20 "$OUT/$name.log"; failed=1; fi
}

step pytest "$PY" -m pytest -m gpu -q
step synth "$PY" -m gpu_etl synth --rows "$ROWS" --days 3 --no-gzip --out "$DATA/days"
for device in cpu $([ "$DEVICE" = cpu ] || echo "$DEVICE"); do
    step "encode_$device" "$PY" -m gpu_etl encode "$DATA"/days/day_? --out "$DATA/$device" --device "$device"
done
[ "$DEVICE" = cpu ] || step same_bytes diff -r "$DATA/cpu" "$DATA/$DEVICE"
step slab "$PY" -m bench slab --device "$DEVICE"
step etl "$PY" -m bench etl --rows "$ROWS" --repeat 3 --device "$DEVICE"
for dtype in float32 bfloat16; do
    step "step_kernels_$dtype" "$PY" -m bench step_kernels --model_config mlperf_10m.limit --embedding_dtype "$dtype"
done
step load "$PY" -m bench load --rows "$ROWS" --device "$DEVICE" --png "$OUT/load.png"
step train "$PY" -m bench train --device "$DEVICE" --batch_size 2048 16384 65536 --seconds "$SECONDS_EACH"
step scaling "$PY" -m bench scaling --device "$DEVICE" --world 1 --batch_size 65536 --seconds "$SECONDS_EACH"
step dist "$PY" -m torch.distributed.run --standalone --nproc_per_node="${GPUS:-1}" dist_train.py --dataset "$DATA/cpu" \
    @criteo_kaggle --shuffle_batch_order --device "$DEVICE"
step learn "$PY" train.py --dataset "$DATA/cpu" @criteo_kaggle --shuffle_batch_order --device "$DEVICE"
exit $failed
