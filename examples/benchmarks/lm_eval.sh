#!/bin/sh
# lm-eval twice on one server, with drafts and without: the scores of a lossless method agree.
#   MODEL=Qwen/Qwen2.5-7B-Instruct ./lm_eval.sh
# Needs: a running server with failfast, `pip install 'lm-eval[api]'`. Flags go to lm-eval.
# Exercised: by hand with lm-eval 0.4.13 against the shipped small pair and a task of a local file:
# all 32 answers were equal. gsm8k, which is downloaded, was not run. In tests with a stand-in for
# lm-eval that looks at the arguments.
set -eu
: "${BASE_URL:=http://localhost:8000}" "${MODEL:=Qwen/Qwen2.5-7B-Instruct}" "${TASKS:=gsm8k}"
: "${CONCURRENCY:=8}" "${RESULTS:=.}"

evaluate() { # folder, generation arguments, further flags
    out=$1 arguments=$2
    shift 2
    server="model=$MODEL,base_url=$BASE_URL/v1/chat/completions,num_concurrent=$CONCURRENCY"
    lm-eval run --model local-chat-completions --model_args "$server" --apply_chat_template \
        --tasks "$TASKS" --gen_kwargs "$arguments" \
        --output_path "$RESULTS/$out" --log_samples "$@"
}

evaluate failfast '{"temperature": 0}' "$@"
evaluate plain '{"temperature": 0, "vllm_xargs": {"failfast_max_len": 0}}' "$@"
