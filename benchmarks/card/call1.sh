#!/bin/bash
# The first of two calls on a GPU, 510 s: attention alone, a step of 4B, 256K tokens, the tests. Most valuable first.
# OUT is the folder for results; SCALE=2 halves every part; REHEARSE=1 runs all of it on a CPU at small sizes.
cd "$(dirname "$0")/../.." && . benchmarks/card/part.sh
if [ -n "${REHEARSE-}" ]; then
  attention=(--device cpu --small --repeats 1)
  step=(--device cpu --model tiny --shapes "3 x 64/256/64" --fill 256 --repeats 1)
  long=(--device cpu --model tiny --lengths 256)
  tests=(--rehearse tests/gpu/test_ordinary.py)
else
  attention=(--only "32 heads of 128" --seconds 100)
  step=(--model 4B --fill 8192 --shapes "16 x 64/256/64" "30 x 150/60/30" --repeats 4 --seconds 60)
  long=(--model 0.6B --lengths 262144 --unchecked)
  tests=(-n 8 --dist worksteal tests/gpu)
fi
ways=(--loss chunked --ways one-by-one padded packed one-pass plain-row --backends flex segments)
part attention 120 $PYTHON benchmarks/card/attention.py "${attention[@]}"
part step 120 $PYTHON benchmarks/steps.py "${step[@]}" "${ways[@]}"
part long 100 $PYTHON benchmarks/long.py "${long[@]}"
export TORCHINDUCTOR_COMPILE_THREADS=2
part tests 170 $PYTHON -m pytest -v --tb=short -W default -p no:cacheprovider --import-mode=importlib -m gpu "${tests[@]}"
finish
