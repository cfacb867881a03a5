#!/usr/bin/env bash
# merge_by_blocks.sh MODEL STYLE CHARACTER OUT: the style in the outer blocks, the character in the middle ones.
set -euo pipefail
lycotool merge "$1" "$2:0.8:te=0:lbw=OUTALL" "$3:0.7:lbw=MIDD" --verify -q -o "$4"
