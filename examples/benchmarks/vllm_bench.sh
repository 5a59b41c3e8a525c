#!/bin/sh
# `vllm bench serve` twice on one server: with drafts, then without (see docs/benchmarking.md).
#   PROMPTS=prompts.jsonl MODEL=Qwen/Qwen2.5-7B-Instruct ./vllm_bench.sh
# Needs: a running server with failfast, `pip install 'vllm[bench]'`, and PROMPTS with a line
# {"prompt": "..."} per prompt. MODEL is the tokenizer, too.
# Exercised: `make test` runs this file against the shipped small pair.
set -eu
: "${BASE_URL:=http://localhost:8000}" "${MODEL:=Qwen/Qwen2.5-7B-Instruct}"
: "${PROMPTS:?a file of prompts}" "${NUM_PROMPTS:=64}" "${CONCURRENCY:=8}" "${RESULTS:=.}"

bench() {
    vllm bench serve --base-url "$BASE_URL" --backend openai-chat --endpoint /v1/chat/completions \
        --model "$MODEL" --dataset-name custom --dataset-path "$PROMPTS" --skip-chat-template \
        --custom-output-len 200 --num-prompts "$NUM_PROMPTS" --max-concurrency "$CONCURRENCY" \
        --num-warmups "$CONCURRENCY" --temperature 0 --save-result --result-dir "$RESULTS" "$@"
}

bench --result-filename failfast.json
bench --result-filename plain.json --extra-body '{"vllm_xargs": {"failfast_max_len": 0}}'
