"""Chat with a running server through the `openai` package: streamed, then with shorter drafts.

Needs `pip install openai` and a server with failfast (BASE_URL; else http://localhost:8000/v1).
Exercised: `make test` runs this file against the shipped small pair.
"""

import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("BASE_URL", "http://localhost:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)
model = os.environ.get("MODEL") or client.models.list().data[0].id
question = [{"role": "user", "content": os.environ.get("PROMPT", "Count to twenty.")}]

# Nothing changes for clients, except that several tokens may arrive at once.
stream = client.chat.completions.create(
    model=model, messages=question, max_tokens=200, temperature=0, stream=True
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

# A request may ask for less than the server drafts: here for no drafts at all.
answer = client.chat.completions.create(
    model=model,
    messages=question,
    max_tokens=200,
    temperature=0,
    extra_body={"vllm_xargs": {"failfast_max_len": 0}},
)
print(f"without drafts: {answer.choices[0].message.content}")
