#!/usr/bin/env bash
# The whole workflow on a CPU, from nothing: each command is printed, then run. Start it with `make quickstart`.
# A second run skips what is done. Nothing is downloaded.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TOKENIZERS_PARALLELISM=false
export OMP_WAIT_POLICY=passive # threads that wait by spinning take a busy machine's cores from themselves

raw=data/quickstart/raw
tokenizer=data/quickstart/tokenizer.model
run=out/quickstart
prompt="def __init__(self,"
pretrain=(python pretrain/train.py --config configs/pretrain/quickstart.yaml)
seconds=()

stage() { # NAME
    finish_stage
    name=$1 began=$SECONDS
    printf '\n== %s\n' "$name"
}
finish_stage() {
    if [ -n "${name:-}" ]; then seconds+=("$(printf '%4d s  %s' $((SECONDS - began)) "$name")"); fi
}
say() { # COMMAND: print it as one would type it
    local words=() word
    for word; do
        case $word in *[!A-Za-z0-9_./:=\&-]*) words+=("\"$word\"") ;; *) words+=("$word") ;; esac
    done
    printf '\n$ %s\n' "${words[*]}"
}
step() { # COMMAND: print it and run it
    say "$@"
    "$@"
}

stage "corpus: the prose and the code that every Python carries"
step python scripts/quickstart_corpus.py --output $raw

stage "tokenizer: sentencepiece BPE with Llama 2's settings"
step python scripts/train_tokenizer.py --source $raw/slimpajama/train $raw/starcoder:content \
    --output $tokenizer --vocab_size 2048

stage "preparation: raw shards to packed tokens"
step python scripts/prepare_slimpajama.py --source $raw/slimpajama --tokenizer $tokenizer \
    --output data/quickstart/slimpajama
step python scripts/prepare_slimpajama.py --source $raw/slimpajama --split validation --tokenizer $tokenizer \
    --output data/quickstart/slimpajama_validation
step python scripts/prepare_starcoder.py --source $raw/starcoder --tokenizer $tokenizer \
    --output data/quickstart/starcoder
step python scripts/prepare_starcoder.py --source $raw/starcoder_validation --tokenizer $tokenizer \
    --output data/quickstart/starcoder_validation
step python scripts/inspect_packed.py data/quickstart/starcoder --verify

stage "pretraining: the first half, then a signal like Slurm's before a time limit"
if [ -d $run/checkpoints ]; then
    echo "$run has checkpoints already: the next stage resumes from the newest"
else
    say "${pretrain[@]}" "&"
    "${pretrain[@]}" &
    job=$!
    trap 'kill $job' EXIT # Ctrl-C here ends it too
    while kill -0 $job 2>/dev/null; do
        step=$(tail -n 1 $run/metrics.csv 2>/dev/null | cut -d, -f1) || true # not there yet
        if [[ $step =~ ^[0-9]+$ ]] && [ "$step" -ge 100 ]; then break; fi
        sleep 0.2
    done
    trap - EXIT
    say kill -USR1 $job
    kill -USR1 $job 2>/dev/null || true # the process may have died; wait reports its status
    status=0
    wait $job || status=$?
    echo "exit status $status"
    if [ $status != 75 ]; then exit $status; fi # 75: stopped by a signal, checkpoint saved
fi

stage "resume: the same command continues where it stopped"
step "${pretrain[@]}"

stage "conversion: to a folder that transformers loads, logits compared"
step python scripts/convert_lit_checkpoint.py $run $run/hf --tokenizer $tokenizer

stage "generation: by our model, and by transformers from the converted folder"
ours=(python scripts/generate.py "$run" --tokenizer "$tokenizer" --prompt "$prompt" --max_new_tokens 40)
theirs=(python -c "
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained('$run/hf')
ids = tokenizer('$prompt', return_tensors='pt').input_ids
ids = AutoModelForCausalLM.from_pretrained('$run/hf').generate(ids, max_length=len(ids[0]) + 40, do_sample=False)
print(tokenizer.decode(ids[0], skip_special_tokens=True))")
say "${ours[@]}"
by_ours=$("${ours[@]}")
echo "$by_ours"
say "${theirs[@]}"
by_theirs=$("${theirs[@]}")
echo "$by_theirs"
[ "$by_ours" = "$by_theirs" ]
echo
echo "both wrote the same"

stage "report: the run on one page"
say python scripts/report.py $run
picture=$(python scripts/report.py $run)
finish_stage

printf '\n== done\n'
printf '%s\n' "${seconds[@]}"
val_losses=$(cut -d, -f4 $run/metrics.csv | grep '[0-9]')
val_loss=$(printf 'validation loss %.3f -> %.3f' "${val_losses%%$'\n'*}" "${val_losses##*$'\n'}") # first and last
cat <<END

your own run   pretrain/README.md, configs/pretrain/tinyllama_1.1b.yaml
metrics        $run/metrics.csv
checkpoints    $run/checkpoints
Hugging Face   $run/hf

$val_loss, and all losses on the way:

$picture
END
