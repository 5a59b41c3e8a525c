"""Grammars that begin after the thinking (V1): what an engine without speculation answers.

Two tokens of the shipped pair get the names that vLLM's parser looks for: its answers begin with
the first, and most of them reach the second.
"""

import json
import shutil

import pytest
from vllm import SamplingParams
from vllm.config.structured_outputs import StructuredOutputsConfig
from vllm.sampling_params import StructuredOutputsParams

from engine import chat_ids, generate, policy, shipped_prompts, watch
from failfast_vllm.config import MODELS_DIR
from failfast_vllm.tools import offline
from features import SCHEMA, asked_for

RENAMED = {"Here": "<think>", "The": "</think>"}
NUM_QUESTIONS = 6


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The shipped target and drafter with tokens that open and close the thinking."""
    root = tmp_path_factory.mktemp("thinking")
    for role in ("target", "drafter"):
        shutil.copytree(MODELS_DIR / role, root / role)
        path = root / role / "tokenizer.json"
        fields = json.loads(path.read_text(encoding="utf-8"))
        vocab, merges = fields["model"]["vocab"], fields["model"]["merges"]
        for name, tag in RENAMED.items():
            vocab[tag] = vocab.pop(name)
            flags = dict.fromkeys(
                ("single_word", "lstrip", "rstrip", "normalized", "special"), False
            )
            fields["added_tokens"].append({"id": vocab[tag], "content": tag, **flags})
        fields["added_tokens"].sort(key=lambda token: token["id"])
        parts = [m if isinstance(m, list) else m.split(" ") for m in merges]
        fields["model"]["merges"] = [
            merge
            for merge, (left, right) in zip(merges, parts, strict=True)
            if RENAMED.keys().isdisjoint((left, right, left + right))
        ]
        path.write_text(json.dumps(fields), encoding="utf-8")
    return root


def thinking_engine(pair, method):
    grammar = StructuredOutputsConfig(
        backend="xgrammar", disable_any_whitespace=True, reasoning_parser="deepseek_r1"
    )
    if method is not None:
        method = {"method": "failfast", "model": str(pair / "drafter"), **method}
    return offline.engine(
        method,
        model=str(pair / "target"),
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=8,
        disable_log_stats=False,
        structured_outputs_config=grammar,
        reasoning_config={"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"},
    )


def params(**more):
    """Of a batch: a schema after the thinking, with budgets and without, beside free answers."""
    schema = {"structured_outputs": StructuredOutputsParams(json=SCHEMA)}
    return [
        SamplingParams(temperature=0.0, max_tokens=110, **each, **more)
        for each in (
            schema,
            {},
            {**schema, "thinking_token_budget": 9},
            {"thinking_token_budget": 40},
            schema,
            {**schema, "thinking_token_budget": 40},
        )
    ]


@pytest.fixture(scope="module")
def expected(pair):
    with thinking_engine(pair, None) as llm:
        tokenizer = llm.get_tokenizer()
        prompts = [chat_ids(tokenizer, p) for p in shipped_prompts()[:NUM_QUESTIONS]]
        close = tokenizer.convert_tokens_to_ids("</think>")
        answers = generate(llm, prompts, params())
    asked = [p.structured_outputs is not None for p in params()]
    reached = [
        ids for ids, with_schema in zip(answers, asked, strict=True) if with_schema and close in ids
    ]
    assert len(reached) >= 3
    for ids in reached:
        json.loads(tokenizer.decode(ids[ids.index(close) + 1 :], skip_special_tokens=True))
    return prompts, answers


@pytest.fixture(scope="module")
def drafting(pair, expected):
    """After `expected`, so that one engine runs at a time."""
    with thinking_engine(pair, {"load_aware": False}) as llm:
        yield llm


def check_schemas(llm, expected, **more):
    prompts, answers = expected
    with watch(llm) as record:
        for some in (slice(0, 1), slice(0, 3), slice(0, NUM_QUESTIONS)):
            assert generate(llm, prompts[some], params(**more)[some]) == answers[some]
    assert (record.num_accepted > 0) == (not more)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        pytest.param("failfast", {}, id="the paper's rule"),
        pytest.param("fixed", {}, id="fixed"),
        pytest.param("failfast", asked_for(max_len=0), id="undrafted"),
    ],
)
def test_a_schema_after_the_thinking(expected, drafting, name, more):
    """Catches drafts that cross the end of the thinking unchecked, and rows that move."""
    with policy(drafting, name):
        check_schemas(drafting, expected, **more)


def test_a_schema_after_the_thinking_under_the_default(pair, expected):
    """Catches the same in steps in which the load leaves some or all without drafts."""
    with thinking_engine(pair, {}) as llm:
        check_schemas(llm, expected)
