# Sourced by call1.sh and call2.sh: how a part runs. It has its own limit and its own file in $OUT.
set -u
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PYTHONPATH=$PWD:$PWD/tests:$PWD/benchmarks
export TORCHINDUCTOR_CACHE_DIR=$HOME/.cache/inductor TRITON_CACHE_DIR=$HOME/.cache/triton
PYTHON=${PYTHON:-python3} S=${SCALE:-1}
part() { # name, seconds, command
  local name=$1 s=$(( $2 / S )) begin=$SECONDS f=$OUT/$1.txt rc; shift 2
  printf '$ %s\n\n' "$*" >"$f"
  timeout -s INT -k 10 "$s" "$@" >>"$f" 2>&1; rc=$?
  printf '\nrc %s after %s s\n' $rc $((SECONDS - begin)) >>"$f"
  [ $rc = 0 ] || FAILED="${FAILED-} $name"
  echo "== $name: rc $rc, $((SECONDS - begin)) s"
  grep -vE '^\{' "$f" | cut -c1-260 | tail -14
}
finish() { [ -z "${FAILED-}" ] || { echo "failed:$FAILED"; exit 1; }; }
