"""The short form of `benchmarks/endurance/chaos.py`: one server, and what clients do to it."""

import importlib.util
from pathlib import Path

import pytest
from vllm import SamplingParams
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from engine import chat_ids
from features import features_engine

CHAOS = Path(__file__).parents[2] / "benchmarks" / "endurance" / "chaos.py"
spec = importlib.util.spec_from_file_location("chaos", CHAOS)
chaos = importlib.util.module_from_spec(spec)
spec.loader.exec_module(chaos)
Answer, Ask = chaos.Answer, chaos.Ask

NUM_REQUESTS = 192  # with two stretches of 64 in flight


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return chaos.questions(0, tmp_path_factory.mktemp("lora") / chaos.ADAPTER)


def expected_answers(asks):
    """What an engine without speculation answers offline, by the number of the request."""
    with features_engine(max_model_len=chaos.LIMIT) as llm:
        tokenizer, prompts, params = llm.get_tokenizer(), [], []
        for ask in asks:
            kind = ChatCompletionRequest if "messages" in ask.body else CompletionRequest
            chosen: SamplingParams = kind(**ask.body).to_sampling_params(ask.body["max_tokens"], {})
            ids = ask.body.get("prompt") or chat_ids(tokenizer, ask.body)
            prompts.append({"prompt_token_ids": ids})
            params.append(chosen)
        outputs = llm.generate(prompts, params, use_tqdm=False)
    return {
        ask.number: Answer(
            status=200,
            token_ids={c.index: list(c.token_ids) for c in output.outputs},
            reasons={c.index: c.finish_reason for c in output.outputs},
        )
        for ask, output in zip(asks, outputs, strict=True)
    }


def test_a_server_in_chaos(questions, tmp_path):
    """Catches requests that hang, end the engine or are remembered, and wrong answers.

    Of a server that drafts while its pages run out, clients leave, adapters come and go, and every
    tenth request is refused.
    """
    asks, tally = [questions.ask(i) for i in range(NUM_REQUESTS)], chaos.Tally()
    tally.asks = asks
    with chaos.serving(chaos.METHODS["failfast"], tmp_path / "server.log") as url:
        tally.turn("failfast", url, asks)
    found = tally.report()["methods"]["failfast"]
    assert found["healthy"]
    assert not found["first_problems"]
    assert found["left_over"] == []
    assert found["turns_settled"] == 1
    assert found["clients_gone"] > 3
    assert found["drafts_told"] > 10
    assert found["counts"]["num_preemptions_total"] > 0
    assert found["counts"]["spec_decode_num_accepted_tokens_total"] > 100

    answers = dict(zip(range(NUM_REQUESTS), tally.answers["failfast"], strict=True))
    left_out = ("beam search", "tool call", "forced tool call")
    compared = [
        ask for ask in asks if ask.compared and ask.row not in left_out and "LoRA" not in ask.row
    ]
    assert len(compared) > 60
    expected = expected_answers(compared)
    pairs = ((ask, expected[ask.number], answers[ask.number]) for ask in compared)
    assert [d for pair in pairs if (d := chaos.difference(*pair))] == []


def test_the_same_seed_asks_the_same(questions):
    """Catches requests that depend on those before, and rows that never come."""
    asks = [questions.ask(i) for i in range(2000)]
    assert asks[1234] == questions.ask(1234)
    seen = {ask.row for ask in asks}
    assert seen >= {*chaos.ROWS, "forced tool call", "tool call", "load LoRA"}
    lens = [len(ask.body["prompt"]) for ask in asks if ask.compared and "prompt" in ask.body]
    assert min(lens) == 1
    assert max(lens) > chaos.LIMIT - 100


def plain(**changed):
    body = {"max_tokens": 4, "return_token_ids": True, **changed}
    return Ask(0, "plain", "/v1/completions", body, compared=True)


@pytest.mark.parametrize(
    ("ask", "answer", "problem"),
    [
        (plain(), Answer(error="no end within 120 s"), "hangs"),
        (plain(), Answer(500, "oh"), "status 500: oh"),
        (plain(), Answer(200, token_ids={0: [1, 2]}), "has no end: "),
        (plain(), Answer(200, "", {0: [1] * 5}, {0: "stop"}), "5 tokens of 0 to 4"),
        (plain(), Answer(200, "", {0: [1, 2]}, {0: "length"}), "2 tokens, cut at 4"),
        (plain(min_tokens=3), Answer(200, "", {0: [1]}, {0: "stop"}), "1 tokens of 3 to 4"),
        (plain(stop=["which"]), Answer(200, "", {}, {0: "stop"}, "a which"), "goes on beyond"),
        (
            plain(vllm_xargs={"failfast_max_len": 3}),
            Answer(200, "", {}, {0: "stop"}, drafted=[3, 4]),
            "drafts of 4 tokens",
        ),
    ],
)
def test_what_is_a_problem(ask, answer, problem):
    """Catches checks that find nothing; the same answer whole and right is none."""
    (found,) = chaos.problems(ask, answer)
    assert found.startswith(problem)
    right = Answer(200, "", {0: [1, 2, 3, 4]}, {0: "length"})
    assert list(chaos.problems(plain(), right)) == []


def test_what_is_a_difference():
    """Catches comparisons that ignore a token, an early end, or a client that left."""
    whole = Answer(200, "", {0: [1, 2, 3]}, {0: "stop"})
    assert chaos.difference(plain(), whole, whole) is None
    other = Answer(200, "", {0: [1, 5, 3]}, {0: "stop"})
    assert chaos.difference(plain(), whole, other)["at"] == 1
    short = Answer(200, "", {0: [1, 2]}, {0: "stop"})
    assert chaos.difference(plain(), whole, short)["at"] == 2
    gone = Answer(200, "", {0: [1, 2]}, left=True)
    assert chaos.difference(plain(), whole, gone) is None
