#!/usr/bin/env bash
# Everything that wants a GPU, in stages of less than 8 minutes each, on an H100 and compiling included:
#   OUT=results bench/gpu_session.sh correct            doctor, then the tests marked gpu
#   OUT=results bench/gpu_session.sh etl load           then these: correct etl load train profile, all where none is named
#   DEVICE=cpu ROWS=20000 SECONDS_EACH=1 bench/gpu_session.sh     the same steps without a GPU, to see that they run
# JSON and logs go to $OUT/STAGE/, a summary to $OUT/STAGE.json. A step whose JSON is there is not done again, so a stage
# that was cut off goes on when called again; FORCE=1 does all of it anew. Days and data sets are kept in $DATA.
set -euo pipefail
cd "$(dirname "$0")/.."
export KVIKIO_COMPAT_MODE=${KVIKIO_COMPAT_MODE:-ON} # reads through the host until GPUDirect Storage is shown to be sound
exec "${PY:-python3}" -m bench.session "$@"
