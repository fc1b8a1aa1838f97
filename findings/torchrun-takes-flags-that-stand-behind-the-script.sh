#!/usr/bin/env bash
# torchrun (torch 2.13.0, Python 3.11) refuses a flag of the *script* that abbreviates several flags of its own.
#
# `torchrun train.py --start FILE` dies with "ambiguous option: --start could match --start-method, --start_method",
# though --start stands behind the script and torchrun hands everything there on (argparse.REMAINDER). Python 3.11's
# argparse looks at every word that begins with a dash before it knows where the remainder starts, and an abbreviation of
# two options is an error at once; each option of torchrun has two spellings. `--log` and `--max` of a script fail alike,
# while --starts passes, as the same command without torchrun does. "--" in front of the script mends it. Whoever names
# the flags of a script for torchrun should keep clear of the beginnings of torchrun's own.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$work"
echo 'import sys; print("the script got", sys.argv[1:])' > script.py
run="env/bin/torchrun --nproc_per_node=1"
"$work/env/bin/python" --version
check() { # check EXPECTED WORDS...: what torchrun says, or hands to the script
  said=$($run "${@:2}" 2>&1 | grep -o "ambiguous option: --[a-z]*\|the script got.*" | head -1 || true)
  echo "torchrun ${*:2}: $said"
  [ "$said" = "$1" ]
}
check "ambiguous option: --start" script.py --start x
check "ambiguous option: --log" script.py --log x
check "ambiguous option: --max" script.py --max x
check "the script got ['--starts', 'x']" script.py --starts x
check "the script got ['--lr', '0.1']" script.py --lr 0.1
check "the script got ['--start', 'x']" -- script.py --start x
