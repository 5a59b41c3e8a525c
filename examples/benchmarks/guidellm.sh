#!/bin/sh
# GuideLLM twice on one server: with drafts, then without.
#   PROMPTS=prompts.jsonl MODEL=Qwen/Qwen2.5-7B-Instruct ./guidellm.sh
# Needs: a running server with failfast, `pip install guidellm`, and PROMPTS with a line
# {"prompt": "..."} per prompt. MODEL is the tokenizer, too.
# Exercised: by hand with GuideLLM 0.8.1 against the shipped small pair. In tests with a stand-in
# for guidellm that looks at the arguments.
set -eu
: "${BASE_URL:=http://localhost:8000}" "${MODEL:=Qwen/Qwen2.5-7B-Instruct}"
: "${PROMPTS:?a file of prompts}" "${NUM_PROMPTS:=64}" "${CONCURRENCY:=8}" "${RESULTS:=.}"

bench() { # file, further fields of the request
    backend=$(
        tr -d "\n" <<END
{"kind": "openai_http", "target": "$BASE_URL", "model": "$MODEL",
 "request_format": "/v1/chat/completions",
 "extras": {"body": {"temperature": 0, "max_tokens": 200$2}}}
END
    )
    guidellm run --backend "$backend" \
        --profile "kind=concurrent,streams=$CONCURRENCY" \
        --constraint "kind=max_requests,count=$NUM_PROMPTS" \
        --tokenizer "kind=huggingface_auto,model=$MODEL" \
        --data "kind=json_file,path=$PROMPTS" \
        --output "kind=json,path=$RESULTS/$1" --disable-console-interactive
}

bench failfast.json ''
bench plain.json ', "vllm_xargs": {"failfast_max_len": 0}'
