#!/bin/bash
# The second call, at once behind the first, 200 s: settings of the flex kernel, FlashAttention 4, hidden costs.
# .fa4/site.tar.xz, if it is there, holds flash-attn-4 and what it needs as one folder (see fa4.py).
cd "$(dirname "$0")/../.." && . benchmarks/card/part.sh
if [ -n "${REHEARSE-}" ]; then
  sweep=(--device cpu --small --repeats 1)
  overheads=(--device cpu --model tiny --length 256 --rows 3 --repeats 1)
  fa4=(--device cpu --small --repeats 1)
else
  sweep=(--only "32K, 32 heads of 128 over 8, 16" --repeats 3)
  overheads=()
  fa4=()
fi
( [ -f .fa4/site.tar.xz ] && mkdir -p "$HOME/site" && tar xJf .fa4/site.tar.xz -C "$HOME/site" ) & unpack=$!
part sweep 90 $PYTHON benchmarks/card/attention.py --rungs benchmarks/card/few.json "${sweep[@]}"
wait $unpack
if [ -d "$HOME/site/flash_attn" ]; then
  export PYTHONPATH=$HOME/site:$HOME/site/nvidia_cutlass_dsl/python_packages:$PYTHONPATH
fi
if [ -d "$HOME/site/flash_attn" ] || [ -n "${REHEARSE-}" ]; then part fa4 70 $PYTHON benchmarks/card/fa4.py "${fa4[@]}"; fi
part overheads 40 $PYTHON benchmarks/card/overheads.py "${overheads[@]}"
finish
