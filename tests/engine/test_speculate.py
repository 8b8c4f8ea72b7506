# SPDX-License-Identifier: Apache-2.0
"""Drafting changes nothing: the tokens, and the K/V behind them, are those without drafts.

Two faults were found by it while this was written: compiled drafts took token ids of another type
than vLLM's own steps, and vLLM's CPU backend judges drafts at a temperature that nobody wrote.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import TINY_LAYERS
from helpers.batches import Entries, greedy, random_plan, random_prompts, sampling
from helpers.reference import Reference
from helpers.tiny import write_llama
from vllm.exceptions import VLLMValidationError

from vllm_adaskip import bundled_model, engine_args, request
from vllm_adaskip.lab.data.sources import load_items

#: A draft that is right now and then, so that accepted and rejected ones both occur.
DRAFT: dict[str, Any] = {"skip": ["mlp:3", "attn:5"], "tokens": 3, "adapt": False}
TOKENS = 24


@pytest.fixture(scope="module")
def llm(engine: Callable[..., Any], tiny_llama: str) -> Any:
    """Chunked prefill: prompts of up to 90 tokens, 48 tokens a step."""
    return engine(tiny_llama, max_num_batched_tokens=48, **engine_args(draft=DRAFT))


def drafts(llm: Any) -> dict[str, Any]:
    found: dict[str, Any] = llm.collective_rpc("adaskip_report")[0]["drafts"]
    return found


def run(llm: Any, prompts: list[list[int]], params: list[Any]) -> list[Any]:
    found: list[Any] = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
    )
    return found


def test_a_mixed_batch_gives_the_tokens_of_the_reference(llm: Any, reference: Reference) -> None:
    """Requests that draft, plan, both, or neither."""
    rng, prompts = random.Random(1), random_prompts(1, 30)
    plans: list[Entries] = [
        [] if number % 2 else random_plan(rng, TINY_LAYERS) for number in range(30)
    ]
    lengths = [number % 4 for number in range(30)]  # tokens that may be drafted
    before = drafts(llm)
    outputs = run(
        llm,
        prompts,
        [
            sampling(None, TOKENS, extra_args=request(skip=plan, draft=length))
            for plan, length in zip(plans, lengths, strict=True)
        ],
    )
    for prompt, plan, output in zip(prompts, plans, outputs, strict=True):
        want, gap = reference.generate(prompt, plan, TOKENS)
        assert list(output.outputs[0].token_ids) == want, f"{plan}, smallest gap {gap:.2g}"
    after = drafts(llm)
    new = [now - then for now, then in zip(after["accepted"], before["accepted"], strict=True)]
    assert min(new) > 0 and sum(new) < after["drafted"] - before["drafted"]


def test_a_row_without_a_sub_layer_left_drafts_nothing(llm: Any, reference: Reference) -> None:
    """Its own plan and the draft's together leave out everything."""
    plan: Entries = [*(layer for layer in range(TINY_LAYERS) if layer != 3), "attn:3"]
    before = drafts(llm)["drafted"]
    prompts = random_prompts(2, 3)
    got = greedy(llm, prompts, [plan] * 3, TOKENS)
    assert got == [reference.generate(prompt, plan, TOKENS)[0] for prompt in prompts]
    assert drafts(llm)["drafted"] == before


@pytest.mark.parametrize("kv_fill", ["none", "copy", "project"])
def test_tight_blocks_prefix_hits_and_preemption(
    engine: Callable[..., Any], tiny_llama: str, reference: Reference, kv_fill: str
) -> None:
    """Prompts share their beginning, and the cache holds a part of the batch."""
    llm = engine(
        tiny_llama,
        max_num_batched_tokens=48,
        block_size=32,
        num_gpu_blocks_override=20,
        enable_prefix_caching=True,
        disable_log_stats=False,
        **engine_args(kv_fill=kv_fill, draft=DRAFT),
    )
    rng, common = random.Random(3), random_prompts(3, 1, longest=1)[0] * 70
    prompts = [[*common, *own] for own in random_prompts(4, 16, longest=20)]
    plans: list[Entries] = [
        [] if number % 2 else random_plan(rng, TINY_LAYERS) for number in range(16)
    ]
    for _ in range(2):
        got = greedy(llm, prompts, plans, 40)
        for prompt, plan, tokens in zip(prompts, plans, got, strict=True):
            assert tokens == reference.generate(prompt, plan, 40)[0], plan
    values = {one.name: getattr(one, "value", 0) for one in llm.get_metrics()}
    assert values["vllm:num_preemptions"] > 0 and values["vllm:prefix_cache_hits"] > 0
    counted = drafts(llm)
    assert values["vllm:spec_decode_num_accepted_tokens"] == sum(counted["accepted"]) > 0


def test_stop_tokens_logprobs_penalties_and_the_end_of_the_context(
    engine: Callable[..., Any], tiny_llama: str, llm: Any
) -> None:
    plain = engine(tiny_llama, max_num_batched_tokens=48, **engine_args())
    prompts = random_prompts(5, 8)
    prompts[0] = (prompts[0] * 90)[:240]  # of a context of 256
    first = [output.outputs[0].token_ids for output in run(plain, prompts, [sampling([], 12)] * 8)]
    stops = [list(tokens[5:6]) for tokens in first]
    for more in (
        {"logprobs": 3},
        {"min_tokens": 8},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.2},
        {"allowed_token_ids": list(range(40))},
    ):
        want, got = (
            run(each, prompts, [sampling([], 30, stop_token_ids=stop, **more) for stop in stops])
            for each in (plain, llm)
        )
        for one, other in zip(want, got, strict=True):
            for mine, theirs in zip(one.outputs, other.outputs, strict=True):
                assert mine.token_ids == theirs.token_ids, more
                assert mine.finish_reason == theirs.finish_reason
                for step, step_of_other in zip(
                    mine.logprobs or (), theirs.logprobs or (), strict=True
                ):
                    values = [
                        {token: each.logprob for token, each in one.items()}
                        for one in (step, step_of_other)
                    ]
                    assert values[0] == pytest.approx(values[1], abs=1e-4)


def test_nothing_is_drafted_behind_an_answer_s_last_token(llm: Any) -> None:
    drafter = llm.apply_model(lambda model: model.drafter)[0]
    source, plain = drafter._state.pulled._source, drafter.propose
    prompts, drafted = random_prompts(8, 12), []

    def propose(sampled: Any, ends: Any, slots: Any) -> Any:
        found = plain(sampled, ends, slots)
        for row, own in enumerate(found):
            asked = source.request(source.batch[row])
            params = asked.sampling_params
            left = asked.num_prompt_tokens + params.max_tokens - int(ends[row])
            drafted.append((own, left, {*params.stop_token_ids}))
        return found

    first = run(llm, prompts, [sampling([], 12)] * 12)
    stops = [[output.outputs[0].token_ids[7]] for output in first]
    drafter.propose = propose
    run(llm, prompts, [sampling([], 9 + at % 4, stop_token_ids=stops[at]) for at in range(12)])
    drafter.propose = plain
    assert sum(len(own) for own, *_ in drafted) > 30
    assert {len(own) for own, left, _ in drafted if left == 2} == {1}
    for own, left, ends in drafted:
        assert len(own) < max(left, 1) and ends.isdisjoint(own)


def test_answers_keep_to_a_grammar_and_end_at_stop_strings(engine: Callable[..., Any]) -> None:
    """Drafts that the grammar forbids are cut off by vLLM; the bundled model has a tokenizer."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    common = {"skip_tokenizer_init": False, "max_num_batched_tokens": 48}
    plain, drafting = (
        engine(bundled_model(), **common, **engine_args(**options))
        for options in (
            {},
            {"draft": {"skip": ["mlp:5", "attn:7"], "tokens": 3, "adapt": False}},
        )
    )
    prompts = [item.prompt for item in load_items("bundled", limit=2)]
    regex = StructuredOutputsParams(regex=r"(a|b|c|d)( (a|b|c|d)){1,9}")
    for more in ({"structured_outputs": regex}, {"stop": ["a", "b"]}, {}):
        params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, **more)
        want, got = (
            [o.outputs[0] for o in one.generate(prompts, params, use_tqdm=False)]
            for one in (plain, drafting)
        )
        for one, other in zip(want, got, strict=True):
            assert (one.text, one.finish_reason, one.stop_reason) == (
                other.text,
                other.finish_reason,
                other.stop_reason,
            )
    assert sum(drafts(drafting)["accepted"]) > 20


def test_wrong_arguments_are_refused_before_they_reach_the_engine(llm: Any) -> None:
    with pytest.raises(
        VLLMValidationError, match="adaskip_draft: 4 is not allowed; allowed: 0 to 3"
    ):
        run(llm, [[1, 2]], [sampling(None, 2, extra_args={"adaskip_draft": 4})])
    with pytest.raises(VLLMValidationError, match="adaskip_skip"):
        run(llm, [[1, 2]], [sampling([99], 2)])


@pytest.fixture
def blocks(llm: Any) -> Iterator[list[set[int]]]:
    """Collect, of each time that drafts are made, blocks that they changed and should not have."""
    drafter = llm.apply_model(lambda model: model.drafter)[0]
    cache = llm.apply_model(lambda model: [one.kv_cache for one in model.adaskip.cache._layers])[0]
    found: list[set[int]] = []
    plain = drafter.propose

    def propose(sampled: Any, ends: Any, slots: Any) -> Any:
        before = [one.clone() for one in cache]
        drafted = plain(sampled, ends, slots)
        wrong: set[int] = set()
        size = cache[0].shape[2]
        table = drafter._contexts._step.attn_metadata[drafter._contexts._layers[0].layer_name]
        own = {
            int(table.block_table[row, (ends[row] - 1 + place) // size])
            for row, tokens in enumerate(drafted)
            for place in range(len(tokens))
        }
        for was, now in zip(before, cache, strict=True):
            changed = (was != now).flatten(1).any(1).nonzero()[:, 0].tolist()
            wrong |= set(changed) - own
        found.append(wrong)
        return drafted

    drafter.propose = propose
    yield found
    drafter.propose = plain


def test_drafts_write_into_their_own_blocks_alone(llm: Any, blocks: list[set[int]]) -> None:
    greedy(llm, random_prompts(6, 20), [[]] * 20, TOKENS)
    assert len(blocks) > 20 and not set().union(*blocks)


def test_what_verified_tokens_leave_in_the_cache_is_dense(
    engine: Callable[..., Any], tiny_llama: str
) -> None:
    """Of complete blocks: behind the last token a draft may be left that nobody reads."""
    prompt, tokens, size = random_prompts(7, 1)[0], 90, 32
    kept = []
    for options in ({}, {"draft": DRAFT}):
        llm = engine(tiny_llama, block_size=size, **engine_args(**options))
        greedy(llm, [prompt], [[]], tokens)
        complete = (len(prompt) + tokens - 1) // size  # the last one drawn never runs
        ((first, *others),) = llm.apply_model(
            lambda model: [one.kv_cache.clone() for one in model.adaskip.cache._layers]
        )
        written = first.flatten(1).any(1).nonzero()[:complete, 0]
        kept.append([one[written] for one in (first, *others)])
    for layer, (want, got) in enumerate(zip(*kept, strict=True)):
        assert want.any() and torch.allclose(want, got, atol=1e-4), layer


def test_at_temperature_answers_have_the_same_distribution(
    engine: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A chi-square test of the third token of many samples, over a small vocabulary."""
    path = tmp_path_factory.mktemp("words") / "llama"
    model = write_llama(path, layers=3, vocab_size=8, max_position_embeddings=128)
    llm = engine(
        model,
        max_num_seqs=64,
        max_model_len=64,
        **engine_args(draft={**DRAFT, "skip": ["mlp:1"]}),
    )
    reference, prompt = Reference(model), [1, 5, 2, 7]
    outputs = run(llm, [prompt], [sampling([], 3, temperature=1.0, n=4000, seed=None)])
    seen = Counter(tuple(one.token_ids) for one in outputs[0].outputs)
    statistic, freedom = 0.0, 0
    expected = distribution(reference, prompt, 3)
    for tokens, probability in expected.items():
        want = 4000 * probability
        if want >= 5:
            statistic += (seen[tokens] - want) ** 2 / want
            freedom += 1
    from scipy.stats import chi2

    assert freedom > 20 and sum(drafts(llm)["accepted"]) > 100
    assert chi2.sf(statistic, freedom - 1) > 1e-4, statistic


def distribution(reference: Reference, prompt: list[int], length: int) -> dict[Any, float]:
    """Return the probability of each continuation of so many tokens."""
    found: dict[Any, float] = {(): 1.0}
    for _ in range(length):
        rows = [[*prompt, *each] for each in found]
        with torch.inference_mode():
            logits = reference.model(torch.tensor(rows)).logits[:, -1]
        found = {
            (*tokens, token): weight * probability
            for (tokens, weight), row in zip(
                found.items(), logits.softmax(-1).tolist(), strict=True
            )
            for token, probability in enumerate(row)
        }
    return found


def test_drafts_stop_by_themselves_where_they_do_not_pay(
    engine: Callable[..., Any], tiny_llama: str, reference: Reference
) -> None:
    """With random weights an early exit is hardly ever right."""
    llm = engine(tiny_llama, **engine_args(draft={"exit": 1, "tokens": 3}))
    prompts = random_prompts(8, 4)
    got = greedy(llm, prompts, [[]] * 4, 100)
    assert got == [reference.generate(prompt, [], 100)[0] for prompt in prompts]
    counted = drafts(llm)
    assert counted["off"] > 50 > counted["passes"] and counted["gain"]


def test_a_part_of_the_vocabulary_drafts_its_own_tokens(
    engine: Callable[..., Any], tiny_llama: str, reference: Reference
) -> None:
    llm = engine(tiny_llama, **engine_args(draft={**DRAFT, "vocabulary": 100}))
    prompts, proposed = random_prompts(9, 6), []
    drafter = llm.apply_model(lambda model: model.drafter)[0]
    plain = drafter.propose

    def propose(*args: Any) -> Any:
        drafted = plain(*args)
        proposed.extend(token for own in drafted for token in own)
        return drafted

    drafter.propose = propose
    got = greedy(llm, prompts, [[]] * 6, TOKENS)
    assert got == [reference.generate(prompt, [], TOKENS)[0] for prompt in prompts]
    assert max(proposed) < 100 and max(map(max, got)) >= 100
    with pytest.raises(ValueError, match="token 512 does not exist"):
        engine(tiny_llama, **engine_args(draft={**DRAFT, "vocabulary": 513}))


def test_plans_that_a_method_reads_from_the_prompt_are_verified(
    engine: Callable[..., Any], tiny_llama: str, reference: Reference
) -> None:
    """The table is fed without a logits processor, and prompts are read all the same."""
    llm = engine(
        tiny_llama,
        max_num_batched_tokens=48,
        **engine_args(method="adaskip", max_compute=0.7, kv_fill="project", draft=DRAFT),
    )
    prompts = random_prompts(10, 8)
    got = greedy(llm, prompts, [None] * 8, TOKENS)
    given = llm.collective_rpc("adaskip_plans", args=([(None, each) for each in prompts],))[0]
    assert all(given)
    for prompt, plan, tokens in zip(prompts, given, got, strict=True):
        assert tokens == reference.generate(prompt, plan, TOKENS, kv_fill="project")[0]


def test_compiled_drafts_are_those_of_the_loop(
    engine: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("few") / "llama"
    model = write_llama(path, layers=4, vocab_size=512, max_position_embeddings=256)
    speculate = {"skip": ["mlp:1", "attn:2"], "tokens": 3, "adapt": False}
    prompts, found = random_prompts(11, 6), []
    for eager in (True, False):
        llm = engine(model, enforce_eager=eager, **engine_args(draft=speculate))
        found.append((greedy(llm, prompts, [[]] * 6, TOKENS), drafts(llm)["accepted"]))
    want = [Reference(model).generate(prompt, [], TOKENS)[0] for prompt in prompts]
    assert found[0] == found[1] and found[0][0] == want
