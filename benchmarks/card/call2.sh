#!/bin/bash
# The second call, at once behind the first, 130 s: settings of the flex kernel, hidden costs.
cd "$(dirname "$0")/../.." && . benchmarks/card/part.sh
if [ -n "${REHEARSE-}" ]; then
  sweep=(--device cpu --small --repeats 1)
  overheads=(--device cpu --model tiny --length 256 --rows 3 --repeats 1)
else
  sweep=(--only "32K, 32 heads of 128 over 8, 16" --repeats 3)
  overheads=()
fi
part sweep 90 $PYTHON benchmarks/card/attention.py --rungs benchmarks/card/few.json "${sweep[@]}"
part overheads 40 $PYTHON benchmarks/card/overheads.py "${overheads[@]}"
finish
