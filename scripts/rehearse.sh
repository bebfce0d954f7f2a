#!/usr/bin/env bash
# Rehearse a run on random tokens, in about ten minutes: start, save at a signal, requeue, resume, crash, retry, end, export.
#
#     scripts/rehearse.sh --config configs/pretrain/tinyllama_1.1b.yaml --train.micro_batch_size 8
#     SBATCH_ACCOUNT=lab SBATCH_PARTITION=gpu OPTIONS="--nodes 4" scripts/rehearse.sh --config FILE
#     LAUNCH="torchrun --nproc-per-node 8" scripts/rehearse.sh --config FILE
#
# Call it from the repository's root, with the Python environment active. Where there is a Slurm, it submits
# scripts/slurm/pretrain.sbatch with OPTIONS and what SBATCH_... variables say; with LAUNCH, or without a Slurm, it starts
# LAUNCH (python) here. Model, batch and GPUs are the real run's, the data are not: no corpus is needed. Flags after FILE
# are train.py's. Prints a pass or fail line for each check. Exit status: 0 all passed; 1 one failed; 2 bad input.
# The run is left in out/rehearsal, which the next rehearsal removes.
set -uo pipefail

if [ "${1:-}" != --config ] || [ $# -lt 2 ] || [ ! -e pretrain/train.py ]; then
    echo "error: give --config FILE first, then flags of train.py; call it from the repository's root" >&2
    exit 2
fi
out=out/rehearsal
patience=1200 # seconds without the next event until the rehearsal has failed
flags=(
    --train.max_steps 30 --train.max_tokens null --train.max_epochs null --train.init_from null --train.resume auto
    --optim.warmup_steps 5 --optim.schedule cosine --optim.decay_steps null --data.ramp_tokens null
    --checkpoint.interval 10 --checkpoint.keep_last 2 --log.interval 1 --log.wandb off
)
run=("$@" "${flags[@]}" "${@:3}" --out_dir "$out/run" --data.validation '[]' --data.sources "[{\"path\": \"$out/tokens\"}]")
slurm=
if [ -z "${LAUNCH:-}" ] && sinfo >/dev/null 2>&1; then slurm=1; fi
job=

pass() { printf 'pass  %4d s  %s\n' $SECONDS "$*"; }
fail() {
    printf 'fail  %4d s  %s; the end of %s:\n' $SECONDS "$*" "$out/log"
    tail -n 20 "$out/log"
    if [ -n "$slurm" ]; then scancel "$job"; else kill "$job" 2>/dev/null; fi
    exit 1
}

start() {
    local options
    if [ -n "$slurm" ]; then
        read -ra options <<<"${OPTIONS:-}"
        job=$(sbatch --parsable --output "$out/log" "${options[@]}" scripts/slurm/pretrain.sbatch "${run[@]}") || exit 2
    else
        # shellcheck disable=SC2086 # a command and its flags
        ${LAUNCH:-python} pretrain/train.py "${run[@]}" >>"$out/log" 2>&1 &
        job=$!
    fi
}
restart() { # what pretrain.sbatch does by itself
    if [ -n "$slurm" ]; then
        scontrol update "JobId=$job" StartTime=now 2>/dev/null # a requeued job would wait for two minutes
    else
        start
    fi
}
events() { grep -c "\"event\": \"$1\"" "$out/run/events.jsonl" 2>/dev/null; } # KIND: how many there have been
steps() { tail -n 1 "$out/run/metrics.csv" 2>/dev/null | sed -n 's/^\([0-9]*\),.*/\1/p'; }
beyond() { # STEP: whether it is done, in this start
    [ "$(steps)" -gt "$1" ] 2>/dev/null
}
over() {
    if [ -n "$slurm" ]; then
        ! squeue --noheader --job "$job" 2>/dev/null | grep -q .
    else
        ! kill -0 "$job" 2>/dev/null
    fi
}
until_true() { # WHAT COMMAND...: wait for it, and print that it came
    local deadline=$((SECONDS + patience))
    until "${@:2}"; do
        if ((SECONDS > deadline)); then fail "$1: not within $patience s"; fi
        if over && ! "${@:2}"; then fail "$1: the run is over"; fi
        sleep 0.2
    done
    pass "$1"
}
has() { [ "$(events "$1")" -ge "$2" ] 2>/dev/null; } # KIND COUNT
signal() { # NAME: send it to the ranks, or here to rank 0, whose end is the others', too
    local pid
    if [ -n "$slurm" ]; then # to the job's newest step: KILL to the job would cancel it
        scancel --signal="$1" "$(squeue --noheader --steps --job "$job" --format %i | grep '\.[0-9]*$' | tail -n 1)"
    else
        pid=$(sed -n 's/.*"pid": \([0-9]*\).*/\1/p' "$out/run/heartbeat/rank-00000.json")
        kill "-$1" "$pid"
    fi
}

rm -rf "$out"
mkdir -p "$out"
python - "${run[@]}" <<'END' || exit
"""Pack random tokens for the vocabulary, context and batch of a run."""
import sys
from pathlib import Path

import numpy as np

from tinyllama.config import args, cli
from tinyllama.data.packed import ShardWriter, write_manifest


def main():
    settings = cli.parse(args.PretrainArgs, sys.argv[1:])
    config = args.check(settings)
    folder = Path("out/rehearsal/tokens")
    folder.mkdir()
    count = 4 * settings.train.global_batch_size * (config.block_size + 1)
    with ShardWriter(folder, "random", config.vocab_size) as writer:
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, count)
        writer.append(tokens, np.arange(999, count, 1000).tolist() + [count])
        writer.finish(tokenizer_sha256="0" * 64, encoder="none", bos=False, eos=True, bos_id=1, eos_id=2)
    write_manifest(folder, ["random"])


cli.run(main)
END
touch "$out/log"
start
until_true "started, and did a step" beyond 0
stopped_at=$(steps)
signal USR1
until_true "saved a checkpoint at SIGUSR1 and stopped" has stop 1
if [ -n "$slurm" ]; then
    until_true "requeued" eval "scontrol show job $job | grep -q Restarts=1"
    sleep 2 # a node refuses a job within the second in which it was killed there
else
    wait "$job"
fi
restart
until_true "resumed from the checkpoint" has start 2
until_true "went on beyond step $stopped_at" beyond "$((stopped_at + 1))"
signal KILL
if [ -z "$slurm" ]; then wait "$job"; fi
[ -n "$slurm" ] || restart
until_true "resumed after a rank was killed" has start 3
until_true "did its last step" has "done" 1
until over; do sleep 0.2; done
python - "$out/run" <<'END' || fail "every step is in metrics.csv once, and no loss is lost"
import csv, math, sys
import yaml

rows = [row for row in csv.DictReader(open(f"{sys.argv[1]}/metrics.csv")) if row["loss"]]
settings = yaml.safe_load(open(f"{sys.argv[1]}/config.yaml"))
losses = [float(row["loss"]) for row in rows]
chance = math.log(settings["model"]["vocab_size"])
speed = float(rows[-1]["tokens_per_second"])
print(f"              loss {losses[0]:.2f} to {losses[-1]:.2f}, of a guess {chance:.2f}; {speed:,.0f} tokens/s")
steps = [int(row["step"]) for row in rows]
sys.exit(steps != [*range(1, settings["train"]["max_steps"] + 1)] or not losses[-1] < 1.5 * chance)
END
pass "every step is in metrics.csv once"
python scripts/report.py "$out/run" >>"$out/log" 2>&1 || fail "report"
pass "report: $out/run/report.html"
python scripts/convert_lit_checkpoint.py "$out/run" "$out/hf" >>"$out/log" 2>&1 || fail "export to Hugging Face"
pass "exported to $out/hf, whose logits are the checkpoint's"
echo "all passed"
