#!/usr/bin/env bash
# Takes down what up.sh brought up in STATE_DIR, with every job: only processes in its namespaces, and its munged.
#
#     down.sh STATE_DIR
#
# The folder and its logs stay. Fails if anything is left running.
set -uo pipefail
D=${1:?"which STATE_DIR?"}

running() {
    while read -r name; do ip netns pids "$name" 2>/dev/null; done <"$D/namespaces"
    cat "$D/munge/pid" 2>/dev/null # munged removes it when it ends
}

[ -e "$D/namespaces" ] || exit 0
for signal in TERM KILL KILL; do # a second KILL for what was started meanwhile
    # shellcheck disable=SC2046 # a word for each process
    kill -$signal $(running) 2>/dev/null
    for _ in $(seq 50); do
        [ -n "$(running)" ] || break 2
        sleep 0.1
    done
done
left=$(running)
while read -r name; do ip netns delete "$name"; done <"$D/namespaces"
rm "$D/namespaces"
if [ -n "$left" ]; then
    # shellcheck disable=SC2086
    echo "error: left running by $D:" $left >&2
    exit 1
fi
