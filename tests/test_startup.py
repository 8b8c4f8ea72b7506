# SPDX-License-Identifier: Apache-2.0
"""What is refused at start-up, and what an engine's config gains; no engine is started."""

from __future__ import annotations

import json
import os
import pickle
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.profiles import write_first
from helpers.readme import ROOT, block, blocks
from transformers import AutoConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_adaskip import DecoderShape, engine_args, startup
from vllm_adaskip.classifiers.profile import ADAPTER
from vllm_adaskip.config import AdaSkipConfig, ConfigError
from vllm_adaskip.engine.compat import startup as compat_startup
from vllm_adaskip.engine.naming import planner_of
from vllm_adaskip.engine.request import Planner
from vllm_adaskip.launch import UseAdaSkip
from vllm_adaskip.startup import unsupported_accelerator

OPTION = "--additional-config"
OVERRIDE = '{"architectures": ["AdaSkipLlamaForCausalLM"]}'


def config(model: str, **kwargs: Any) -> Any:
    return EngineArgs(model, skip_tokenizer_init=True, **kwargs).create_engine_config()


def from_command_line(*arguments: str) -> Any:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    args = parser.parse_args([*arguments, "--skip-tokenizer-init"])
    return AsyncEngineArgs.from_cli_args(args).create_engine_config()


def test_an_engine_that_does_not_ask_is_left_alone(tiny_llama: str) -> None:
    for stock in (config(tiny_llama), from_command_line("--model", tiny_llama)):
        assert stock.model_config.architecture == "LlamaForCausalLM"
        assert not stock.model_config.logits_processors
        assert not stock.parallel_config.worker_extension_cls
        assert stock.cache_config.enable_prefix_caching


@pytest.mark.parametrize(
    "arguments",
    [
        ["--plugin", "adaskip"],
        ["--plugin=adaskip", "--hf-overrides", '{"max_position_embeddings": 128}'],
        ["--additional-config", '{"adaskip": {"method": "static", "skip": [1]}}'],
        ["--additional-config.adaskip.method", "none"],
        ["--plugin", "adaskip", "--additional-config", '{"somebody_elses": 1}'],
    ],
)
def test_the_command_line_turns_it_on(tiny_llama: str, arguments: list[str]) -> None:
    for ordered in (["--model", tiny_llama, *arguments], [*arguments, "--model", tiny_llama]):
        vllm_config = from_command_line(*ordered)
        assert vllm_config.model_config.architecture == "AdaSkipLlamaForCausalLM"
        assert len(vllm_config.model_config.logits_processors) == 1
        assert "AdaSkipWorkerExtension" in vllm_config.parallel_config.worker_extension_cls
        assert vllm_config.cache_config.enable_prefix_caching
        assert "MarkingScheduler" in vllm_config.scheduler_config.scheduler_cls
        if "--hf-overrides" in arguments:
            assert vllm_config.model_config.hf_config.max_position_embeddings == 128


def test_naming_our_architecture_is_enough(tiny_llama: str) -> None:
    vllm_config = config(tiny_llama, hf_overrides={"architectures": ["AdaSkipLlamaForCausalLM"]})
    assert len(vllm_config.model_config.logits_processors) == 1


def test_the_users_own_overrides_and_processors_are_kept(tiny_llama: str) -> None:
    theirs = "vllm.v1.sample.logits_processor.builtin:MinPLogitsProcessor"
    ours = engine_args(
        hf_overrides={"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}
    )
    vllm_config = config(tiny_llama, logits_processors=[theirs], **ours)
    assert vllm_config.model_config.hf_config.rope_parameters["rope_theta"] == 5.0
    assert vllm_config.model_config.logits_processors[0] == theirs


def test_without_prefix_caching_the_scheduler_is_the_users(tiny_llama: str) -> None:
    theirs = "vllm.v1.core.sched.scheduler.Scheduler"
    vllm_config = config(
        tiny_llama, enable_prefix_caching=False, scheduler_cls=theirs, **engine_args()
    )
    assert vllm_config.scheduler_config.scheduler_cls == theirs


def test_the_log_says_that_shared_plans_depend_on_the_batch(
    tiny_llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(
        "vllm_adaskip.startup.logger.info", lambda text, *facts: said.append(text % facts)
    )
    for coalesce in (0, 0.25):
        config(
            tiny_llama, **engine_args(method="adaskip", max_compute=0.6, coalesce_regret=coalesce)
        )
    told = [text for text in said if "coalesce_regret" in text]
    (text,) = told
    assert "0.25" in text and "depends on the sequences in the batch" in text


@pytest.mark.parametrize("asked", [True, False, None])
def test_the_log_says_where_asynchronous_scheduling_is_switched_off(
    tiny_llama: str, monkeypatch: pytest.MonkeyPatch, asked: bool | None
) -> None:
    for cached in (True, False):
        said: list[str] = []
        monkeypatch.setattr("vllm_adaskip.startup.logger.warning", said.append)
        options = {"async_scheduling": asked, "enable_prefix_caching": cached}
        found = config(tiny_llama, **options, **engine_args())
        assert found.scheduler_config.async_scheduling is False
        assert len(said) == bool(asked)
        assert all("--async-scheduling is switched off" in text for text in said)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"pipeline_parallel_size": 2}, ["pipeline parallel", "--pipeline-parallel-size"]),
        ({"enable_lora": True, "fully_sharded_loras": True}, ["sharded LoRA"]),
        (
            {
                "enable_lora": True,
                "enable_prefix_caching": False,
                "scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler",
            },
            ["--scheduler-cls", "--enable-lora"],
        ),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            ["--speculative-config with method 'ngram'", "adaskip.draft"],
        ),
        (
            {"worker_extension_cls": "somebody.elses.Extension"},
            ["--worker-extension-cls", "somebody.elses.Extension"],
        ),
        (
            {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"},
            ["--scheduler-cls", "--no-enable-prefix-caching"],
        ),
        ({"decode_context_parallel_size": 2, "tensor_parallel_size": 2}, ["context parallel"]),
        ({"enable_dbo": True}, ["dual batch overlap", "--enable-dbo"]),
        ({"enable_prompt_embeds": True}, ["prompt embeddings", "--enable-prompt-embeds"]),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            ["KV transfer", "--kv-transfer-config"],
        ),
    ],
)
def test_a_set_up_we_cannot_serve_is_refused_with_the_option_to_change(
    tiny_llama: str, kwargs: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError) as refusal:
        config(tiny_llama, **kwargs, **engine_args())
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"enable_lora": True}, ["drafts with LoRA adapters", "--enable-lora"]),
        ({"worker_cls": "somebody.elses.Worker"}, ["--worker-cls", "somebody.elses.Worker"]),
        ({"logits_processors": ["some.module:Theirs"]}, ["--logits-processors"]),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            ["adaskip.draft sets --speculative-config by itself"],
        ),
    ],
)
def test_what_does_not_go_with_drafts_is_refused(
    tiny_llama: str, kwargs: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError) as refusal:
        config(tiny_llama, **{**engine_args(draft={"exit": 2}), **kwargs})
    for word in words:
        assert word in str(refusal.value)


def test_drafts_need_the_options_that_go_with_them(tiny_llama: str) -> None:
    options = engine_args(draft={"exit": 2})
    del options["speculative_config"]
    with pytest.raises(
        ValueError, match=r"start with --plugin adaskip or vllm_adaskip\.engine_args"
    ):
        config(tiny_llama, **options)


def test_an_engine_that_drafts_names_what_it_needs(tiny_llama: str) -> None:
    found = config(tiny_llama, **engine_args(draft={"exit": 2, "tokens": 3}))
    assert found.speculative_config.method == "custom_class"
    assert found.speculative_config.num_speculative_tokens == 3
    assert found.speculative_config.model.startswith("vllm_adaskip.engine.drafter.SelfDraft_")
    assert found.parallel_config.worker_cls == "vllm_adaskip.engine.worker.DraftingWorker"
    assert found.scheduler_config.scheduler_cls.endswith("MarkingScheduler")
    assert planner_of(found).draft.tokens == 3


def test_model_runner_v2_may_run_compiled(tiny_llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    vllm_config = config(tiny_llama, **engine_args())
    (check,) = vllm_config.model_config.logits_processors
    assert "RequestCheck" in check and not vllm_config.scheduler_config.async_scheduling


@pytest.mark.parametrize(
    ("variables", "kwargs", "word"),
    [
        ({"VLLM_USE_BREAKABLE_CUDAGRAPH": "1"}, {}, "unset VLLM_USE_BREAKABLE_CUDAGRAPH"),
        ({}, {"compilation_config": {"mode": 1}}, "mode 1 of -cc"),
    ],
)
def test_what_would_run_whole_steps_without_us_is_refused(
    tiny_llama: str,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    kwargs: dict[str, Any],
    word: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=word):
        config(tiny_llama, **kwargs, **engine_args())


def test_before_0_32_the_front_end_is_told_of_a_check_that_the_runner_does_not_see(
    tiny_llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There V2 is refused where a logits processor is named, and the front end asks it anyway."""
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import validate_logits_processors_parameters

    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setattr("vllm_adaskip.engine.compat.admission.find_spec", lambda _: None)
    model = config(tiny_llama, enforce_eager=True, **engine_args()).model_config
    assert not model.logits_processors and len(model.logits_processors) == 1
    kept = pickle.loads(pickle.dumps(model.logits_processors))
    bad = SamplingParams(extra_args={"adaskip_skip": [8]})
    with pytest.raises(VLLMValidationError, match="layers 0 to 7"):
        validate_logits_processors_parameters(kept, bad)


def accelerated(is_v2: bool = True) -> Any:
    """As much of a config as is looked at beyond what every device needs."""
    return SimpleNamespace(use_v2_model_runner=is_v2)


@pytest.mark.parametrize(
    ("options", "is_v2", "words"),
    [
        ({}, True, ["adaskip.untested_accelerator", "docs/gpu.md"]),
        ({"untested_accelerator": True}, False, ["VLLM_USE_V2_MODEL_RUNNER"]),
        (
            {"untested_accelerator": True, "method": "ffn-skip", "scope": "token", "threshold": 1},
            True,
            ["'ffn-skip'", "on the host", "CPU backend"],
        ),
        ({"untested_accelerator": True, "method": "static", "skip": [1]}, True, []),
    ],
)
def test_an_accelerator_is_refused_with_what_is_missing(
    options: dict[str, Any], is_v2: bool, words: list[str]
) -> None:
    chosen = AdaSkipConfig.parse(options)
    classifier = Planner(chosen.facts(DecoderShape(4, 1, 3))).classifier
    problems = list(unsupported_accelerator(accelerated(is_v2), chosen, classifier))
    assert len(problems) == bool(words)
    for word in words:
        assert word in problems[0]


def variant(tiny_llama: str, folder: Path, **changes: Any) -> str:
    """The tiny model's config, changed; no weights."""
    facts = json.loads((Path(tiny_llama) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**facts, **changes}))
    return str(folder)


def family(folder: Path, name: str, **changes: Any) -> str:
    """The config of another family's model; no weights."""
    AutoConfig.for_model(
        name, architectures=[f"{NAMES[name]}ForCausalLM"], max_position_embeddings=512, **changes
    ).save_pretrained(folder)
    return str(folder)


#: transformers' ``model_type`` -> the family's part of the architecture's name.
NAMES = {
    "gemma3_text": "Gemma3",
    "llama": "Llama",
    "mistral": "Mistral",
    "opt": "OPT",
    "phi3": "Phi3",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
}


def test_an_architecture_without_a_family_is_refused_with_the_list_and_the_recipe(
    tiny_llama: str, tmp_path: Path
) -> None:
    other = variant(tiny_llama, tmp_path, architectures=["GPT2LMHeadModel"], model_type="gpt2")
    with pytest.raises(ValueError) as refusal:
        config(other, **engine_args())
    everybody = ", ".join(f"{name}ForCausalLM" for name in NAMES.values())
    assert f"GPT2LMHeadModel; supported: {everybody}. " in str(refusal.value)
    (recipe,) = re.findall(r"docs/[\w-]+\.md", str(refusal.value))
    assert (ROOT / recipe).exists()


@pytest.mark.parametrize("name", NAMES)
def test_the_plugin_picks_the_class_of_the_family(tmp_path: Path, name: str) -> None:
    model = family(tmp_path, name)
    found = from_command_line("--model", model, "--plugin", "adaskip").model_config
    assert found.architecture == f"AdaSkip{NAMES[name]}ForCausalLM"
    assert len(found.logits_processors) == 1


def test_the_page_s_server_shortens_prompts(tmp_path: Path) -> None:
    """The command of docs/prompts.md, for another model of as many layers."""
    words = shlex.split(block("vllm serve", "docs/prompts.md").replace("\\\n", ""))
    model = family(tmp_path, "llama", num_hidden_layers=30)
    found = from_command_line("--model", model, *words[words.index("--plugin") :])
    prompt = AdaSkipConfig.of(found.additional_config).prompt
    assert prompt is not None and (prompt.exit, prompt.tail, prompt.shortest) == (27, 16, 100)


def test_the_page_s_server_drafts(tmp_path: Path) -> None:
    """The command of docs/lossless.md, for another model of as many layers."""
    words = shlex.split(block("vllm serve", "docs/lossless.md").replace("\\\n", ""))
    model = family(tmp_path, "llama", num_hidden_layers=30)
    found = from_command_line("--model", model, *words[words.index("--plugin") :])
    draft = planner_of(found).draft
    assert draft is not None and str(draft.plan).endswith("29") and draft.tokens == 4
    with pytest.raises(SystemExit):
        from_command_line(
            "--model", model, *words[words.index("--plugin") :], "-sc.method", "ngram"
        )


def test_experts_in_some_layers_alone_and_adapters_beside_experts_are_refused(
    tmp_path: Path,
) -> None:
    for change in ({"decoder_sparse_step": 2}, {"mlp_only_layers": [1]}):
        mixed = family(tmp_path / next(iter(change)), "qwen3_moe", **change)
        with pytest.raises(ValueError, match="experts in some layers alone"):
            config(mixed, **engine_args())
    model = family(tmp_path / "all", "qwen3_moe")
    config(model, **engine_args())
    with pytest.raises(ValueError, match=r"adapters beside experts.*remove --enable-lora"):
        config(model, enable_lora=True, **engine_args())


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3"])
def test_sliding_windows_are_served_on_cpus_and_refused_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    own = {"use_sliding_window": True, "max_window_layers": 0} if name != "mistral" else {}
    model = family(tmp_path, name, sliding_window=64, **own)
    served = config(model, **engine_args())
    assert not [*startup._unsupported(served, AdaSkipConfig())]
    monkeypatch.setattr(startup.current_platform, "is_cpu", lambda: False)
    (problem,) = startup._unsupported(served, AdaSkipConfig())
    assert re.search(r"add --disable-sliding-window.* of 64 tokens", problem)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dual_chunk_attention_config": {"chunk_size": 64}}, "dual chunk attention"),
        ({"is_causal": False}, "bidirectional attention"),
        ({"qk_norm": True}, "norm on queries and keys"),
    ],
)
def test_other_forms_of_attention_are_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    key = next(iter(changes))
    with pytest.raises(ValueError, match=rf"{words}.*\({key} is"):
        config(family(tmp_path, "qwen2", **changes), runner="generate", **engine_args())


def test_a_quantisation_that_was_not_tested_is_refused(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for FP8 on accelerators, whose modules are vLLM's own."""
    facts = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    quantised = variant(tiny_llama, tmp_path, quantization_config=facts)
    with pytest.raises(ValueError, match=r"quantisation 'fp8' has not been tested.*auto_gptq"):
        config(quantised, **engine_args())
    taken = config(tiny_llama, **engine_args())
    taken.model_config.quantization = "fp8"
    monkeypatch.setattr(startup.current_platform, "is_cpu", lambda: False)
    assert not [*startup._unsupported(taken, AdaSkipConfig())]


def test_a_profile_s_lora_does_not_go_into_quantised_weights(
    tiny_llama: str, tmp_path: Path
) -> None:
    facts = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
    quantised = variant(tiny_llama, tmp_path, quantization_config=facts)
    profile = write_first(tmp_path / "profile", quantised)
    config(quantised, **engine_args(profile=profile))
    (tmp_path / "profile" / ADAPTER).mkdir()
    with pytest.raises(ValueError, match=r"LoRA.* cannot be added to .* quantisation 'awq'"):
        config(quantised, **engine_args(profile=profile))


def test_a_profile_s_lora_does_not_go_below_adapters_of_requests(
    tiny_llama: str, tmp_path: Path
) -> None:
    profile = write_first(tmp_path / "profile", tiny_llama)
    config(tiny_llama, enable_lora=True, **engine_args(profile=profile))
    (tmp_path / "profile" / ADAPTER).mkdir()
    with pytest.raises(ValueError, match=r"LoRA.* made for weights without.*--enable-lora"):
        config(tiny_llama, enable_lora=True, **engine_args(profile=profile))


def test_a_guard_says_that_it_measures_no_adapters(
    tiny_llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("vllm_adaskip.startup.logger.warning", said.append)
    config(tiny_llama, enable_lora=True, **engine_args(method="static", skip=[3], guard=True))
    assert ["guard measures no adapters" in text for text in said] == [True]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mehtod": "static"}, ["mehtod", "did you mean 'method'"]),
        ({"method": "static", "skip": [8]}, ["8", "layers 0 to 7"]),
        ({"method": "static", "skip": list(range(8))}, ["all 16 sub-layers"]),
    ],
)
def test_bad_options_stop_the_start(tiny_llama: str, options: Any, words: list[str]) -> None:
    for start in (
        lambda: config(tiny_llama, **engine_args(**options)),
        lambda: config(
            tiny_llama,
            hf_overrides={"architectures": ["AdaSkipLlamaForCausalLM"]},
            additional_config={"adaskip": options},
        ),
    ):
        with pytest.raises((ConfigError, ValueError)) as refusal:
            start()
        for word in words:
            assert word in str(refusal.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--plugin", "adaskp"], ["adaskp", "adaskip"]),
        (["--additional-config", '{"adaskip": {"mehtod": "static"}}'], ["mehtod", "'method'"]),
        (["--additional-config", '{"adaskip": [1]}'], ["[1]", "JSON object"]),
        (["--plugin", "adaskip", "--additional-config", "[1]"], ["[1]", "no JSON object"]),
    ],
)
def test_bad_arguments_are_usage_errors(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    with pytest.raises(SystemExit):
        from_command_line(*arguments)
    complaint = capsys.readouterr().err
    for word in words:
        assert word in complaint


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--plugin", "adaskip", OPTION, '{"method": "exit", "layers": 6}'], ["layers, method"]),
        (["--plugin", "adaskip", f"{OPTION}.method", "exit"], ['{"adaskip": {"method": ...}}']),
        ([OPTION, '{"adaskip": {"method": "exit"}, "layers": 6}'], ["nobody reads layers"]),
        ([OPTION, '{"AdaSkip": {"method": "exit", "layers": 6}}'], ["'AdaSkip'", "'adaskip'"]),
        ([f"{OPTION}.vllm_adaskip.method", "exit"], ["'vllm_adaskip'", "'adaskip'"]),
        ([f"{OPTION}.adskip.method", "exit"], ["'adskip'", "'adaskip'"]),
        (["--plugin", "adaskip", "--config=server.yaml"], ["--config server.yaml"]),
    ],
)
def test_options_in_the_wrong_place_are_usage_errors(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    parser.add_argument("--config")  # as a server's has
    with pytest.raises(SystemExit):
        parser.parse_args(arguments)
    complaint = capsys.readouterr().err
    for word in words:
        assert word in complaint


OURS = {"adaskip": {"method": "exit", "layers": 6}}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"additional_config": OURS}, ["LlamaForCausalLM", "engine_args", OVERRIDE]),
        ({"additional_config": {"Ada-Skip": {}}}, ["'Ada-Skip'", "'adaskip'"]),
        (
            {"hf_overrides": json.loads(OVERRIDE), "additional_config": OURS["adaskip"]},
            ["nobody reads layers, method", '{"adaskip": {"layers": ...}}'],
        ),
        (
            {"hf_overrides": json.loads(OVERRIDE), "additional_config": {"ADASKIP": {}}},
            ["'ADASKIP'", "'adaskip'"],
        ),
    ],
)
def test_an_engine_with_options_of_ours_that_nobody_would_read_is_refused(
    tiny_llama: str, options: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError) as refusal:
        config(tiny_llama, **options)
    for word in words:
        assert word in str(refusal.value)


def test_so_is_one_whose_family_we_do_not_have(tiny_llama: str, tmp_path: Path) -> None:
    gemma = {"architectures": ["GemmaForCausalLM"], "model_type": "gemma", "head_dim": 32}
    with pytest.raises(ValueError, match=r"GemmaForCausalLM.*remove them.*LlamaForCausalLM"):
        config(variant(tiny_llama, tmp_path, **gemma), additional_config=OURS)


def test_the_form_of_the_docs_reads_the_options(tiny_llama: str) -> None:
    found = config(tiny_llama, hf_overrides=json.loads(OVERRIDE), additional_config=OURS)
    assert found.model_config.architecture == "AdaSkipLlamaForCausalLM"
    (feeder,) = found.model_config.logits_processors
    assert planner_of(found).facts.method == "exit" and "V1Feeder" in feeder


def test_the_pages_command_for_lm_eval_runs_our_class(tiny_llama: str) -> None:
    (command,) = [text for text in blocks("text", "docs/offline.md") if text.startswith("lm_eval")]
    model_args = json.loads(shlex.split(command)[-1])
    del model_args["pretrained"]
    model_args["additional_config"]["adaskip"]["layers"] = 4  # the tiny model has eight
    found = config(tiny_llama, **model_args)
    assert planner_of(found).facts.method_options == {"layers": 4}


@pytest.mark.parametrize("others", [{"method": "x", "layers": 1}, {"somebody_elses": {}}, {}])
def test_additional_config_of_others_is_left_alone(tiny_llama: str, others: Any) -> None:
    assert config(tiny_llama, additional_config=others).additional_config == others


def test_engine_args_does_not_override_options_that_stand_in_additional_config() -> None:
    with pytest.raises(ConfigError, match="'adaskip' is not allowed there"):
        engine_args(additional_config=OURS)
    with pytest.raises(ConfigError, match="nobody reads layers, method"):
        engine_args(additional_config=OURS["adaskip"])
    assert engine_args(additional_config={"a": 1}, method="exit", layers=6)[
        "additional_config"
    ] == {"a": 1, **OURS}


def test_an_allow_list_without_the_plugin_is_named(
    tiny_llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(ValueError, match=r"VLLM_PLUGINS is 'other'.*add adaskip"):
        config(tiny_llama, **engine_args())


def test_parsing_leaves_the_environment_as_it_is(
    tiny_llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VLLM_PLUGINS would switch off plugins that are installed later, in whoever comes after."""
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    before = dict(os.environ)
    AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(
        ["--model", tiny_llama, "--plugin", "adaskip"]
    )
    assert dict(os.environ) == before


def somebody_elses_plugin(parser: Any) -> Any:
    parser.add_argument("--plugin", help="Somebody else's.")
    return parser


def before_ours(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's own parser has the option."""
    parser = FlexibleArgumentParser()
    return EngineArgs.add_cli_args(somebody_elses_plugin(parser))


def after_ours(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Another plugin adds it to what we return, or a server to what the engine's parser has."""
    return somebody_elses_plugin(EngineArgs.add_cli_args(FlexibleArgumentParser()))


def failing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Groups of a parser work otherwise in some release to come."""
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    parser.add_argument("--plugin")
    monkeypatch.setattr(parser, "add_argument_group", lambda: None)
    return parser


@pytest.mark.parametrize("made", [before_ours, after_ours, failing])
def test_an_option_named_plugin_stays_that_of_others(
    tiny_llama: str, monkeypatch: pytest.MonkeyPatch, made: Any
) -> None:
    said: list[str] = []
    compat_startup._warn_once.cache_clear()
    monkeypatch.setattr(compat_startup.logger, "warning", said.append)
    parser = made(monkeypatch)
    assert said == []
    args = parser.parse_args(["--model", tiny_llama, "--plugin", "adaskip"])
    assert args.plugin == "adaskip"
    stock = EngineArgs.from_cli_args(args)
    assert not isinstance(stock.hf_overrides, UseAdaSkip)
    arguments = ["--model", tiny_llama, "--additional-config", '{"adaskip": {}}']
    made(monkeypatch).parse_args([])  # a second parser says it no more
    ours = parser.parse_args(arguments)
    assert isinstance(EngineArgs.from_cli_args(ours).hf_overrides, UseAdaSkip)
    assert len(said) == 1 and "leaves vLLM's arguments as they are" in said[0]
    assert made is failing or "turn vllm-adaskip on by its options" in said[0]
    assert made is failing or "vllm-adaskip" not in parser.format_help()


def test_an_engine_that_nobody_feeds_is_refused(tiny_llama: str) -> None:
    """As when our architecture is named but the config hook did not run."""
    from vllm_adaskip.engine.decide import shared_state

    with pytest.raises(RuntimeError, match="would ignore every plan"):
        shared_state(config(tiny_llama, **engine_args()))


def test_an_nvidia_gpu_needs_no_permission_where_its_release_was_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "vllm_adaskip.startup.current_platform", SimpleNamespace(is_cuda=lambda: True)
    )
    chosen = AdaSkipConfig.parse({"method": "static", "skip": [1]})
    classifier = Planner(chosen.facts(DecoderShape(4, 1, 3))).classifier
    assert not list(unsupported_accelerator(accelerated(), chosen, classifier))
    monkeypatch.delattr(
        "vllm.v1.worker.gpu.model_states.interface.ModelState.capture_inner_cudagraphs"
    )
    assert list(unsupported_accelerator(accelerated(), chosen, classifier))
